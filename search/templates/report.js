"use strict";
// The page without this script has every figure as a picture and the first rows of the table; here they come alive.
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const hidden = new Set();
  const PAGE = 50;

  // ---- figures

  function draw(place) {
    const figure = data.figures[place.dataset.figure];
    const target = document.createElement("div");
    place.append(target);
    place.classList.add("drawn");
    const touch = window.matchMedia("(pointer: coarse)").matches;
    figure.layout.dragmode = touch ? false : "zoom";
    const options = { displayModeBar: false, responsive: true, showTips: false };
    Plotly.newPlot(target, figure.data, figure.layout, options).then(function () {
      show(target);
    }).catch(function (error) {
      target.remove();
      place.classList.remove("drawn");
      console.error(error);
    });
  }

  function show(target) {
    const visible = target.data.map(function (trace) { return !hidden.has(trace.legendgroup); });
    if (visible.some(function (is, number) { return is !== (target.data[number].visible !== false); })) {
      Plotly.restyle(target, { visible: visible });
    }
  }

  function drawAll() {
    const places = document.querySelectorAll(".plot[data-figure]");
    const observer = new IntersectionObserver(function (entries) {
      entries.forEach(function (entry) {
        if (entry.isIntersecting) {
          observer.unobserve(entry.target);
          draw(entry.target);
        }
      });
    }, { rootMargin: "400px" });
    places.forEach(function (place) { observer.observe(place); });
  }

  // ---- the legend: an activation is hidden in all figures at once

  function makeLegends() {
    document.querySelectorAll(".legend li").forEach(function (item) {
      const button = document.createElement("button");
      button.type = "button";
      button.setAttribute("aria-pressed", "true");
      button.title = "show or hide in all figures";
      button.append(...item.childNodes);
      item.append(button);
      button.addEventListener("click", function () { toggle(item.dataset.activation); });
    });
  }

  function toggle(activation) {
    if (!hidden.delete(activation)) {
      hidden.add(activation);
    }
    document.querySelectorAll(".legend li").forEach(function (item) {
      item.firstElementChild.setAttribute("aria-pressed", String(!hidden.has(item.dataset.activation)));
    });
    document.querySelectorAll(".js-plotly-plot").forEach(show);
  }

  // ---- the table of trials

  function text(value, kind) {
    if (value === null || value === "") {
      return "";
    }
    if (kind === "nats") {
      return value.toFixed(3);
    }
    if (kind === "count") {
      return String(value).replace(/\B(?=(\d{3})+$)/g, ",");
    }
    if (kind === "seconds") {
      return value.toFixed(1);
    }
    if (typeof value === "number" && !Number.isInteger(value)) {
      const short = Number(value.toPrecision(3));
      return Math.abs(short) < 1e-4 ? short.toExponential().replace("e-", "e-0") : String(short);
    }
    return String(value);
  }

  function makeTable() {
    const table = document.getElementById("trial-table");
    if (!table) {
      return;
    }
    const columns = data.trials.columns;
    const place = Object.fromEntries(columns.map(function (column, number) { return [column.key, number]; }));
    const entries = data.trials.rows.map(function (row) {
      const cells = row.map(function (value, number) { return text(value, columns[number].kind); });
      return { row: row, cells: cells, all: cells.join(" ").toLowerCase() };
    });
    const body = table.tBodies[0];
    const heads = Array.from(table.tHead.rows[0].cells);
    const find = document.getElementById("find");
    const byActivation = document.getElementById("by-activation");
    const byOutcome = document.getElementById("by-outcome");
    const previous = document.getElementById("previous");
    const next = document.getElementById("next");
    let sorted = null;
    let descending = false;
    let first = 0;
    let found = entries;

    function compare(a, b) {
      const x = a.row[sorted];
      const y = b.row[sorted];
      const none = (x === null || x === "") - (y === null || y === "");  // unknown values stand last, either way
      if (none || x === y || x === null || x === "") {
        return none;
      }
      const order = typeof x === "number" && typeof y === "number" ? x - y : String(x) < String(y) ? -1 : 1;
      return descending ? -order : order;
    }

    function search() {
      const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
      found = entries.filter(function (entry) {
        return words.every(function (word) { return entry.all.includes(word); }) &&
          (!byActivation.value || entry.row[place.activation] === byActivation.value) &&
          (!byOutcome.value || entry.row[place.outcome] === byOutcome.value);
      });
      if (sorted !== null) {
        found.sort(compare);
      }
      first = 0;
      fill();
    }

    function fill() {
      const lines = found.slice(first, first + PAGE).map(function (entry) {
        const line = document.createElement("tr");
        entry.cells.forEach(function (cell, number) {
          const box = line.insertCell();
          box.textContent = cell;
          if (columns[number].kind === "text") {
            box.className = "text";
          }
        });
        return line;
      });
      body.replaceChildren(...lines);
      const last = first + lines.length;
      const of = found.length === entries.length ? "" : " found, of " + text(entries.length, "count");
      document.getElementById("shown").textContent = found.length
        ? (first + 1) + " to " + last + " of " + text(found.length, "count") + of + " trials"
        : "No trial is like that.";
      previous.disabled = first === 0;
      next.disabled = last >= found.length;
      document.getElementById("turn").hidden = found.length <= PAGE;
    }

    heads.forEach(function (head, number) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", function () {
        descending = sorted === number && !descending;
        sorted = number;
        heads.forEach(function (other) { other.removeAttribute("aria-sort"); });
        head.setAttribute("aria-sort", descending ? "descending" : "ascending");
        search();
      });
    });
    [find, byActivation, byOutcome].forEach(function (control) { control.addEventListener("input", search); });
    previous.addEventListener("click", function () { first = Math.max(0, first - PAGE); fill(); });
    next.addEventListener("click", function () { first += PAGE; fill(); });
    document.getElementById("controls").hidden = false;
    fill();
  }

  makeLegends();
  makeTable();
  drawAll();
})();
