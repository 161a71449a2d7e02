"""The page of a study as people meet it: opened from a file in Chromium, on a desk, on a phone, in the dark, on paper.

Needs Chromium and playwright; for accessibility axe-core, in tests/browser/node_modules or where AXE_CORE says.
"""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_studies import made_up_study, write_tables
from test_search_ledger import epoch_row, trial_row
from test_search_results import make_study

from search.report import write_report

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
AXE = Path(os.environ.get("AXE_CORE") or Path(__file__).parent / "browser" / "node_modules" / "axe-core" / "axe.min.js")
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> file, each of a study of its own kind."""
    folder = tmp_path_factory.mktemp("pages")
    studies = {
        "compared": made_up_study(folder / "compared", trials=64, seeds=6, pictures=3),
        "running": made_up_study(folder / "running", trials=12, unfinished=3, asked=24, compared=False),
        "one": made_up_study(folder / "one", trials=1, activations=["silu"], compared=False),
        "none": made_up_study(folder / "none", trials=0, asked=8),
        "failed": made_up_study(folder / "failed", trials=16, failing=True),
    }
    files = {name: write_report(study, folder / f"{name}.html") for name, study in studies.items()}
    files["light"] = write_report(studies["compared"], folder / "light.html", light=True)
    return {name: Path(str(file)) for name, file in files.items()}


class Visit:
    """A page in a browser, and what it complained of or asked for."""

    def __init__(self, chromium: Any, file: Path, **context: Any) -> None:
        self.context = chromium.new_context(**({"viewport": DESK} | context))
        self.context.set_default_timeout(300_000)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(f"dialog: {dialog.message}") or dialog.dismiss())
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())

    def __enter__(self) -> "Visit":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def see_all(self) -> None:
        """Scroll through the page, until all figures are drawn."""
        figures = self.page.locator(".plot[data-figure]")
        for number in range(figures.count()):
            figures.nth(number).scroll_into_view_if_needed()
            figures.nth(number).locator(".main-svg").first.wait_for()

    def hover(self, point: Any, label: Any) -> Any:
        """The label of a point, once the pointer has brought it: a figure that was just drawn may not listen yet."""
        for _ in range(100):
            point.hover(force=True)
            self.page.wait_for_timeout(100)
            if label.count():
                break
            self.page.mouse.move(0, 0)
        label.first.wait_for()
        return label

    def column(self, name: str) -> list[str]:
        """The cells of a column of the trials that are shown."""
        heads = self.page.locator("#trial-table thead th").all_inner_texts()
        place = [head.strip() for head in heads].index(name) + 1
        return list(self.page.locator(f"#trial-table tbody td:nth-child({place})").all_inner_texts())


@pytest.mark.parametrize("name", ["compared", "running", "one", "none", "failed", "light"])
def test_the_page_opens_without_a_complaint_and_asks_for_nothing(name, chromium, pages):
    with Visit(chromium, pages[name]) as visit:
        visit.see_all()
        assert visit.complaints == []
        assert [url for url in visit.requests if not url.startswith("data:")] == [pages[name].as_uri()]
        assert visit.page.locator(".plot[data-figure]:not(.drawn)").count() == 0


def test_the_table_of_activations_fits_a_desk(chromium, pages):
    with Visit(chromium, pages["compared"]) as visit:
        widths = visit.page.locator("#activations .scroll").evaluate("e => [e.scrollWidth, e.clientWidth]")
        assert widths[0] <= widths[1]


@pytest.mark.parametrize("name", ["compared", "light"])
def test_nothing_scrolls_sideways_on_a_phone(name, chromium, pages):
    with Visit(chromium, pages[name], viewport=PHONE, is_mobile=True, has_touch=True) as visit:
        visit.see_all()
        assert visit.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        assert visit.page.evaluate("getComputedStyle(document.body).fontSize") == "16px"


@pytest.mark.parametrize(("name", "scheme"), [("running", "dark"), ("light", "light"), ("none", "light")])
def test_axe_finds_nothing_that_keeps_people_out(name, scheme, chromium, pages):
    if not AXE.is_file():
        pytest.skip("axe-core is not installed: npm install --prefix tests/browser")
    with Visit(chromium, pages[name], color_scheme=scheme) as visit:
        visit.see_all()
        visit.page.evaluate(AXE.read_text())
        found = visit.page.evaluate("axe.run()")["violations"]
        told = [(f["id"], f["impact"], [node["html"][:120] for node in f["nodes"][:3]]) for f in found]
        assert [finding for finding in told if finding[1] != "minor"] == []


def test_a_figure_answers_to_the_pointer(chromium, pages):
    with Visit(chromium, pages["compared"]) as visit:
        figure = visit.page.locator("[data-figure='activations-0']")
        figure.scroll_into_view_if_needed()
        label = visit.hover(figure.locator(".point").first, figure.locator(".hoverlayer .hovertext"))
        assert "mean" in (label.text_content() or "")


def test_the_table_is_sorted_by_a_click_or_a_key_and_says_how(chromium, pages):
    with Visit(chromium, pages["compared"]) as visit:
        head = visit.page.locator("#trial-table thead th", has_text="KL")
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == "ascending"
        numbers = [float(text) for text in visit.column("KL") if text]
        assert numbers == sorted(numbers)
        assert len(numbers) > 40
        visit.page.keyboard.press("Enter")  # the focus is on it
        assert head.get_attribute("aria-sort") == "descending"
        numbers = [float(text) for text in visit.column("KL") if text]
        assert numbers == sorted(numbers, reverse=True)
        assert visit.page.locator("th[aria-sort]").count() == 1


def test_trials_without_a_value_stand_last_whichever_way_they_are_sorted(chromium, pages):
    with Visit(chromium, pages["failed"]) as visit:
        for _ in range(2):
            visit.page.locator("#trial-table thead th", has_text="loss").locator("button").click()
            losses = visit.column("loss")
            assert "" in losses
            assert "" not in losses[: losses.index("")]
            assert set(losses[losses.index("") :]) == {""}


def test_the_table_is_filtered_and_its_pages_turned(chromium, pages):
    with Visit(chromium, pages["compared"]) as visit:
        shown = visit.page.locator("#shown")
        assert shown.inner_text() == "1 to 50 of 64 trials"
        visit.page.locator("#next").press("Enter")
        assert shown.inner_text() == "51 to 64 of 64 trials"
        assert visit.page.locator("#next").is_disabled()
        visit.page.get_by_label("Activation", exact=True).select_option("relu")
        assert set(visit.column("activation")) == {"relu"}
        assert shown.inner_text() == "1 to 8 of 8 found, of 64 trials"
        visit.page.get_by_label("Activation", exact=True).select_option("")
        visit.page.get_by_label("Find").fill("stopped  ELU")
        assert set(visit.column("outcome")) == {"stopped early"}
        assert all("elu" in name for name in visit.column("activation"))
        visit.page.get_by_label("Find").fill("nobody is called this")
        assert shown.inner_text() == "No trial is like that."


def test_the_script_writes_numbers_as_the_still_page_does(chromium, pages):
    with Visit(chromium, pages["compared"]) as alive:
        with Visit(chromium, pages["compared"], java_script_enabled=False) as still:
            cells = [v.page.locator("#trial-table tbody").inner_text() for v in (alive, still)]
    assert cells[0] == cells[1]


def test_an_activation_is_hidden_in_all_figures_at_once(chromium, pages):
    count = """() => [...document.querySelectorAll(".js-plotly-plot")].reduce(
        (sum, plot) => sum + plot.data.filter(t => t.legendgroup === "silu" && t.visible === false).length, 0)"""
    with Visit(chromium, pages["compared"]) as visit:
        visit.see_all()
        button = visit.page.locator(".legend button", has_text="silu").first
        button.press("Space")
        assert button.get_attribute("aria-pressed") == "false"
        visit.page.wait_for_function(f"({count})() > 10")
        button.press("Space")
        visit.page.wait_for_function(f"({count})() === 0")


def test_without_scripts_every_figure_is_there_as_a_still(chromium, pages):
    with Visit(chromium, pages["compared"], java_script_enabled=False) as visit:
        stills = visit.page.locator("svg.static")
        assert stills.count() > 10
        assert all(stills.nth(number).is_visible() for number in range(stills.count()))
        assert not visit.page.locator("#controls").is_visible()


def test_on_paper_figures_are_stills_on_white_whether_they_were_drawn_or_not(chromium, pages):
    with Visit(chromium, pages["compared"], color_scheme="dark") as visit:
        figures = visit.page.locator(".plot[data-figure]")
        figures.first.scroll_into_view_if_needed()
        figures.first.locator(".main-svg").first.wait_for()
        visit.page.emulate_media(media="print", color_scheme="dark")
        assert visit.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert all(visit.page.locator("svg.static").nth(n).is_visible() for n in range(figures.count()))
        assert not visit.page.locator(".js-plotly-plot").first.is_visible()
        assert len(visit.page.pdf(format="A4")) > 50_000


def test_markup_in_the_texts_of_a_study_does_nothing(chromium, tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)><svg onload=alert(3)>"
    study = make_study(tmp_path / "s", budget={"trials": 2}, data={"source": evil})
    rows = [
        trial_row(0, activation=evil, val_nelbo=3.0, epochs=3),
        trial_row(1, "FAIL", status="error", reason=evil, device=evil),
    ]
    write_tables(study.path, trials=rows, epochs=[epoch_row(0, 1), epoch_row(0, 2)])
    with Visit(chromium, Path(str(write_report(study)))) as visit:
        visit.see_all()
        visit.hover(visit.page.locator(".scatterlayer .point").first, visit.page.locator(".hoverlayer .hovertext"))
        visit.page.get_by_label("Find").fill("alert")
        assert visit.complaints == []
        assert len(visit.requests) == 1


def test_a_study_of_5000_trials_makes_a_small_file_that_shows_a_page_of_them_at_a_time(chromium, tmp_path):
    study = made_up_study(tmp_path / "s", trials=5000, max_epochs=20, seeds=6)
    began = time.process_time()
    file = Path(str(write_report(study)))
    assert time.process_time() - began < 10
    assert file.stat().st_size < 15_000_000
    assert Path(str(write_report(study, tmp_path / "light.html", light=True))).stat().st_size < 500_000
    with Visit(chromium, file) as visit:
        visit.see_all()
        began = time.monotonic()
        visit.page.get_by_label("Find").fill("gelu stopped")
        visit.page.locator("#trial-table thead th", has_text="loss").locator("button").click()
        assert "of 5,000 trials" in visit.page.locator("#shown").inner_text()
        assert 0 < visit.page.locator("#trial-table tbody tr").count() <= 50
        assert time.monotonic() - began < 60
        assert visit.complaints == []
