"""The page of a study: whole, safe whatever its texts are, sensible whatever there is of it, put where it was asked."""

import base64
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_studies import made_up_study, write_tables
from test_search_ledger import NOON, epoch_row, trial_row
from test_search_results import make_study

import search.interrupts
from search.report import PARTS, Snapshot, report_html, write_report
from search.results import Study
from search.storage import location
from search.tables import AttemptRow
from search.trial_table import trial_table
from vae.config import InputError

SECTIONS = ("activations", "search", "parameters", "models", "pictures", "trials", "failures", "cost", "reproduce")
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
VOID = {"meta", "link", "img", "input", "br", "hr"}


class Page(HTMLParser):
    """What a page holds, taken apart by a parser that we did not write."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.contents: dict[str, list[str]] = {"script": [], "style": []}
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in self.contents:
            self.contents[tag].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.contents:
            self.contents[self.open[-1]][-1] += data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def policy(self) -> str:
        return next(a["content"] or "" for _, a in self.tags if a.get("http-equiv") == "Content-Security-Policy")

    @property
    def data(self) -> dict[str, Any]:
        return dict(json.loads(self.contents["script"][0]))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return made_up_study(tmp_path_factory.mktemp("studies") / "compared", trials=64, seeds=6, pictures=2)


@pytest.fixture(scope="module")
def page(study: Study) -> Page:
    return Page(report_html(study))


@pytest.fixture(scope="module")
def light(study: Study) -> str:
    return report_html(study, light=True)


# ---- what it holds


def test_the_page_has_every_section_and_says_the_verdict(page):
    ids = [attributes.get("id") for _, attributes in page.tags]
    assert [id for id in ids if id in SECTIONS] == list(SECTIONS)
    assert len(set(filter(None, ids))) == len(list(filter(None, ids)))
    assert "complete, 64 of 64 trials" in page.text
    for word in ("Test loss of each activation", "Rate and distortion", "f00d", "vaesearch run study.toml", "seed"):
        assert word in page.text


def test_nothing_in_the_page_points_outside_of_it(page, light):
    for tags in (page.tags, Page(light).tags):
        for _, attributes in tags:
            for name in ("src", "href", "srcset", "action", "data", "poster"):
                value = attributes.get(name)
                assert value is None or value.startswith(("#", "data:"))
    styles = "".join(page.contents["style"])
    assert "url(" not in styles
    assert "@import" not in styles


def test_its_policy_allows_its_own_scripts_and_nothing_else(page):
    _, *scripts = page.contents["script"]
    assert len(scripts) == 2
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert page.policy.split("; ")[:2] == [
        "default-src 'none'",
        "script-src " + " ".join(f"'sha256-{value}'" for value in hashes),
    ]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


def test_plotly_is_there_once_and_every_figure_has_its_data_and_a_still(page):
    assert sum("plotly.js v" in script for script in page.contents["script"]) == 1
    places = [attributes["data-figure"] for _, attributes in page.tags if "data-figure" in attributes]
    assert set(places) == set(page.data["figures"])
    stills = [attributes for tag, attributes in page.tags if tag == "svg" and attributes.get("class") == "static"]
    assert len(stills) == len(places) > 10


def test_the_light_page_has_the_same_figures_without_any_script_in_half_a_megabyte(light, page):
    still = Page(light)
    assert still.contents["script"] == []
    assert "script-src 'none'" in still.policy
    drawings = re.findall(r'<svg class="static".*?</svg>', light, re.DOTALL)
    assert len(drawings) == len(page.data["figures"])
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    assert len(light.encode()) < 500_000


def test_pictures_of_exported_models_are_in_the_page_and_those_without_are_named(page, light):
    for tags in (page.tags, Page(light).tags):
        images = [attributes for tag, attributes in tags if tag == "img"]
        assert len(images) == 4
        assert all((image["src"] or "").startswith("data:image/png;base64,") for image in images)
        assert all(image["alt"] for image in images)
    assert "No exported model, so no pictures: " in page.text


def test_a_picture_that_is_none_is_left_out(tmp_path):
    study = made_up_study(tmp_path / "s", trials=8, pictures=1, compared=False)
    (study.model_folders()[0] / "samples.png").write_text("<script>")
    assert sum(tag == "img" for tag, _ in Page(report_html(study)).tags) == 1


def test_what_failed_stands_there_with_its_cause_those_of_a_cause_together(tmp_path):
    study = make_study(tmp_path / "s", budget={"trials": 3})
    oom = {"status": "oom", "reason": "CUDA out of memory\nat line 7"}
    rows = [trial_row(0, "PRUNED", **oom), trial_row(1, "PRUNED", **oom), trial_row(2, val_nelbo=3.0, epochs=3)]
    lost = AttemptRow(study="s", trial=0, attempt=1, outcome="lost", reason="no pulse", started_at=NOON)
    write_tables(study.path, trials=rows, attempts=[lost])
    text = Page(report_html(study)).text
    assert "oom 2 silu (2) 0; 1 CUDA out of memory" in text
    assert "lost, 1 time, for example: no pulse" in text


# ---- whatever there is of a study


CASES: dict[str, Callable[[Path], Study]] = {
    "one trial": lambda path: made_up_study(path, trials=1, activations=["silu"], compared=False),
    "one activation": lambda path: made_up_study(path, trials=12, activations=["silu"], seeds=2),
    "none begun": lambda path: made_up_study(path, trials=0, asked=8),
    "none finished": lambda path: made_up_study(path, trials=6, unfinished=6, compared=False),
    "all failed": lambda path: made_up_study(path, trials=16, failing=True),
    "a search for the best": lambda path: made_up_study(path, trials=20, unfinished=2, asked=40, compared=False),
}


@pytest.mark.parametrize("light", [False, True], ids=["full", "light"])
@pytest.mark.parametrize("case", CASES)
def test_the_page_is_sensible_whatever_there_is_of_a_study(case, light, tmp_path):
    page = Page(report_html(CASES[case](tmp_path / "s"), light=light))
    assert [a["id"] for tag, a in page.tags if tag == "section"] == ["verdict", *SECTIONS]
    assert not re.search(r"\b(None|nan|NaN|inf|Undefined)\b", re.sub("loss is nan", "", page.text))
    assert len(re.findall(r"[.\w] trials", page.text)) > 0


def test_losses_that_are_no_numbers_are_no_numbers_in_its_data(tmp_path):
    study = make_study(tmp_path / "s", budget={"trials": 2})
    rows = [trial_row(0, val_nelbo=float("nan"), epochs=3), trial_row(1, val_nelbo=3.0, epochs=3)]
    write_tables(study.path, trials=rows, epochs=[epoch_row(0, 1, objective=float("nan")), epoch_row(1, 1)])
    page = Page(report_html(study))
    json.dumps(page.data, allow_nan=False)
    loss = [column["key"] for column in page.data["trials"]["columns"]].index("loss")
    assert {row[loss] for row in page.data["trials"]["rows"]} == {None, 3.0}


def test_a_study_that_is_being_worked_on_says_so_and_one_that_was_left_too(tmp_path):
    study = made_up_study(tmp_path / "s", trials=6, asked=8, unfinished=1, compared=False)
    assert "unfinished: 5 of 8 trials; nobody is at work on it" in Page(report_html(study)).text
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as driver:
        lease = {"host": socket.gethostname(), "pid": driver.pid, "heartbeat": 0.0}
        (study.path / "lease.json").write_text(json.dumps(lease))
        assert "still running: 5 of 8 trials when this was written" in Page(report_html(study)).text
        driver.communicate(b"\n")


def test_an_adversarial_study_is_ranked_by_its_error_and_compares_no_nats(tmp_path):
    study = make_study(tmp_path / "s", budget={"trials": 2}, train={"objective": "vae_gan"})
    rows = [
        trial_row(n, val_nelbo=50.0, objective=2.0 + n, epochs=3, train_objective="vae_gan", activation=name)
        for n, name in enumerate(("silu", "relu"))
    ]
    write_tables(study.path, trials=rows, epochs=[epoch_row(0, 1, objective=2.5)])
    page = Page(report_html(study))
    assert "squared error of 2.000 per example: silu" in page.text
    assert "trained adversarially" in page.text
    assert "cost-0" not in page.data["figures"]


def test_all_of_a_page_tells_of_one_moment(tmp_path):
    study = make_study(tmp_path / "s")
    write_tables(study.path, trials=[trial_row(0)])
    snapshot = Snapshot(study.path)
    assert len(snapshot.rows()) == 1
    write_tables(study.path, trials=[trial_row(1)])
    assert len(snapshot.rows()) == snapshot.summary().ended == 1
    assert len(study.rows()) == 2


# ---- texts from a study


def test_texts_that_are_markup_are_harmless(tmp_path):
    made = make_study(tmp_path / "s", budget={"trials": 3}, data={"source": EVIL})
    study = Study(made.path.rename(tmp_path / "<script>alert(3)<"))
    rows = [
        trial_row(0, "FAIL", status="error", reason=EVIL, device=EVIL, host=EVIL),
        trial_row(1, activation=EVIL, val_nelbo=3.0, epochs=3),
        trial_row(2, decoder_activation=EVIL, val_nelbo=4.0, epochs=3),
    ]
    write_tables(study.path, trials=rows, epochs=[epoch_row(1, 1)])
    for light in (False, True):
        page = Page(report_html(study, light=light))
        assert sum(tag == "script" for tag, _ in page.tags) == (0 if light else 3)
        assert not [tag for tag, _ in page.tags if tag == "img"]
        assert "alert(3)" in page.text
        assert EVIL in " ".join(page.words)
        if not light:
            assert any(EVIL in row for row in page.data["trials"]["rows"])
            assert all("\u2028" not in script for script in page.contents["script"])


# ---- the table of trials


def test_the_table_has_the_best_first_and_leaves_out_what_tells_nothing():
    rows = [
        trial_row(0, "PRUNED", val_nelbo=1.0, epochs=1, learning_rate=1e-3),
        trial_row(1, val_nelbo=5.0, epochs=3, learning_rate=2e-3),
        trial_row(2, val_nelbo=4.0, epochs=3, learning_rate=3e-3),
        trial_row(3, status="diverged", reason="loss is nan", epochs=1, learning_rate=4e-3),
    ]
    table = trial_table(rows)
    keys = [column.key for column in table.columns]
    assert [row[0] for row in table.rows] == [2, 1, 0, 3]
    assert {"learning_rate", "reason", "epochs"} <= set(keys)
    assert not {"dropout", "beta", "phase", "hidden", "weights"} & set(keys)
    assert [row[keys.index("outcome")] for row in table.rows] == ["in full", "in full", "stopped early", "diverged"]
    assert table.texts(table.rows[0])[keys.index("loss")] == "4.000"
    assert trial_table([]).rows == []


# ---- where it is put


def test_the_page_is_put_in_the_studys_folder_or_where_asked(tmp_path, study, monkeypatch):
    monkeypatch.setattr("search.report.report_html", lambda study, light, tell: f"page, light {light}")
    assert write_report(study) == study.path / "report.html"
    assert (study.path / "report.html").read_text() == "page, light False"
    asked = tmp_path / "a b.html"
    assert write_report(study, str(asked), light=True) == asked
    assert asked.read_text() == "page, light True"
    assert [file.name for file in tmp_path.iterdir()] == ["a b.html"]


def test_a_place_that_cannot_be_written_is_the_users_to_mend(tmp_path, study, monkeypatch):
    monkeypatch.setattr("search.report.report_html", lambda study, light, tell: "page")
    with pytest.raises(InputError, match=r"name a file in it with -o"):
        write_report(study, tmp_path)
    with pytest.raises(InputError, match=r"nowhere.*No such file or directory; name another file with -o"):
        write_report(study, tmp_path / "nowhere" / "x.html")


def test_the_page_of_a_study_behind_a_url_is_put_here_or_where_asked(s3_url, tmp_path, monkeypatch):
    local = made_up_study(tmp_path / "s", trials=4, compared=False)
    place = location(s3_url)
    for file in local.path.rglob("*"):
        if file.is_file():
            (place / f"remote/{file.relative_to(local.path).as_posix()}").write_bytes(file.read_bytes())
    study = Study(place / "remote")
    monkeypatch.chdir(tmp_path)
    assert write_report(study, light=True) == Path("remote.html")
    assert Path("remote.html").stat().st_size > 10_000
    target = write_report(study, study.path / "page.html", light=True)
    assert "remote" in target.read_text()


def test_how_far_the_page_is_is_told_part_by_part(tmp_path):
    study, told = made_up_study(tmp_path / "s", trials=4, compared=False), []
    write_report(study, light=True, tell=lambda *part: told.append(part))
    assert told == [(done, len(PARTS), part) for done, part in enumerate(PARTS)]


def test_ctrl_c_leaves_the_page_as_it_was_and_says_so(tmp_path, monkeypatch, in_process):
    study = made_up_study(tmp_path / "s", trials=4, compared=False)
    (study.path / "report.html").write_text("as it was")

    def interrupted(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("search.report.pictures", interrupted)
    monkeypatch.setattr(search.interrupts, "_swallowed", [])  # or it would end the next study of this process
    code, out, err = in_process("report", "s", "--storage", tmp_path)
    assert (code, out) == (130, "")
    assert err == ("vaesearch: interrupted with 6 of 7 parts done: no page was written; the same command begins anew\n")
    assert (study.path / "report.html").read_text() == "as it was"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]


def test_the_command_prints_where_the_page_is(tmp_path):
    study = made_up_study(tmp_path / "s", trials=6, compared=False)
    command = [sys.executable, "-m", "search.cli", "report", "s", "--storage", str(tmp_path), "--light"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout == f"{study.path / 'report.html'}\n"
    assert done.stderr == ""


def test_a_page_and_its_figures_need_neither_torch_nor_ray():
    code = "import sys, search.report, search.figures, search.notebook; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not set(done.stdout.split()) & {"torch", "ray", "matplotlib"}


# ---- in a notebook


def test_a_notebook_shows_where_a_study_stands_and_its_leaders(tmp_path):
    study = made_up_study(tmp_path / "a&b", trials=12, asked=16, unfinished=2, compared=False)
    page = Page(study._repr_html_())
    best = study.summary().best
    assert best is not None
    assert page.text.startswith("a&b : 10 of 16 trials")
    assert f"1 {best.trial} {best.val_nelbo:.3f} {best.activation}" in page.text
    assert "2 unfinished" in page.text


def test_a_notebook_shows_a_study_that_has_not_begun(tmp_path):
    assert "No healthy trial" in Page(make_study(tmp_path / "s")._repr_html_()).text
