"""What people see: whole in a pipe, fitted to a terminal without a number broken or cut, and how far things are."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from report_studies import BEGIN, made_up_study
from rich.console import Console
from test_search_ledger import trial_row

import search.cli_cluster
import search.progress
from search.cli_options import ctrl_c_explained
from search.progress import Progress, counting
from search.spec import StudySpec
from search.tables import FinalRow
from search.terminal import Column, Table, fitting, wrapped

WIDTHS = [40, 60, 80]
SPLITS = ("train", "validation", "test")
COMMANDS = {
    "list": ["list"],
    "show": ["show", "one"],
    "show of one without trials": ["show", "fresh"],
    "trials": ["show", "one", "--trials"],
    "compare": ["compare", "one", "--importances"],
    "compare a pair": ["compare", "one", "--a", "silu", "--b", "relu"],
    "compare studies": ["compare", "one", "other"],
    "data": ["data"],
    "env": ["env"],
}

LEFT_OUT = re.compile(r"parameters|at|learning|rates|\de-\d\d")
"""The header of what stands below its row, and learning rates of a comparison, for which there may be no room."""

Shown = Callable[..., str]


class Terminal(io.TextIOWrapper):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    made_up_study(folder / "one", trials=64, seeds=6, pictures=2)
    made_up_study(folder / "other", trials=16, seeds=0, compared=False)
    made_up_study(folder / "fresh", trials=0, asked=8, compared=False)
    return folder


@pytest.fixture
def shown(storage: Path, monkeypatch: pytest.MonkeyPatch, in_process: Callable[..., tuple[int, str, str]]) -> Shown:
    """What a command prints: into a terminal so many columns wide, or with `columns` None into a pipe."""
    monkeypatch.chdir(storage.parent)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("VAESEARCH_STORAGE", str(storage))

    def run(columns: int | None, *arguments: object) -> str:
        if columns is None:
            code, out, err = in_process(*arguments)
            assert (code, err) == (0, "")
            return out
        terminal = Terminal(io.BytesIO(), encoding="utf-8", write_through=True)
        with monkeypatch.context() as patch:
            patch.setenv("COLUMNS", str(columns))
            patch.setattr(sys, "stdout", terminal)
            assert in_process(*arguments)[0] == 0
        return terminal.buffer.getvalue().decode()  # type: ignore[attr-defined]

    return run


def words(text: str) -> set[str]:
    return {word for word in text.split() if word.strip("─")}


def is_to_be_copied(line: str) -> bool:
    return line.startswith(("  vaesearch ", "model: "))


# ---- a terminal and a pipe


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("command", COMMANDS)
def test_in_a_terminal_every_word_and_number_is_whole_and_every_line_fits(command, width, shown, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    text, whole = shown(width, *COMMANDS[command]), shown(None, *COMMANDS[command])
    assert words(text) <= words(whole)
    assert not [word for word in words(whole) - words(text) if not LEFT_OUT.fullmatch(word)]
    for line in text.splitlines():
        assert len(line) <= width or is_to_be_copied(line) or len(line.split()) == 1, line


@pytest.mark.parametrize("command", COMMANDS)
def test_a_pipe_gets_the_same_whatever_columns_a_terminal_elsewhere_has(command, shown, monkeypatch):
    whole = shown(None, *COMMANDS[command])
    assert "\x1b" not in whole
    for columns, term in (("40", "xterm-256color"), ("200", "dumb")):
        monkeypatch.setenv("COLUMNS", columns)
        monkeypatch.setenv("TERM", term)
        assert shown(None, *COMMANDS[command]) == whole


@pytest.mark.parametrize("width", WIDTHS)
def test_what_is_told_of_plans_and_clusters_fits_a_terminal_too(width, shown, monkeypatch):
    import search.plan
    import search.submit

    plan = search.plan.Plan(
        study="digits", folder="studies/digits", data="digits", features=64, rows=dict.fromkeys(SPLITS, 12_345),
        model="mlp, hidden 128-128, bernoulli", num_parameters=1_234_567, searched={"dropout": "0 to 0.5"},
        fixed={"beta": "1", "weight_decay": "0.001", "ema_decay": "0.999"}, trials=24, trials_ended=3, max_epochs=60,
        rungs=[5, 10, 20, 40], concurrency=2, cpus_per_trial=1, gpus_per_trial=0.5, epochs_at_most=1260,
        epochs_expected=500, final_runs=10, epoch_s=0.123, seconds_at_most=155.0, seconds_expected=61.5,
        why_untimed=None, disk_bytes=123_456_789, free_bytes=9_876_543_210, advice=None,
    )  # fmt: skip
    standing = search.submit.Standing(
        id="digits", state="RUNNING", progress="[3/24] trial 2 PRUNED at epoch 8/60: 26.906 nats, lr 1.7e-03",
        started_at=BEGIN, ended_at=None, exit_code=None, storage="", version="1",
    )  # fmt: skip
    monkeypatch.setattr(search.plan, "plan_study", lambda spec, **options: plan)
    monkeypatch.setattr(search.submit, "standings", lambda jobs: [standing])
    monkeypatch.setattr(search.cli_cluster, "_jobs", lambda address, insecure: None)
    for command in (["run", "--dry-run"], ["status"]):
        text = shown(width, *command)
        assert words(text) == words(shown(None, *command))
        assert max(map(len, text.splitlines())) <= width


def test_in_a_pipe_a_row_is_a_line(shown):
    lines = shown(None, "show", "one", "--trials").splitlines()
    assert sum("latent" in line and "nats" not in line and "lr" in line for line in lines) == 64
    assert len(shown(None, "compare", "one").splitlines()[0]) > 200  # the verdict


def test_colours_are_for_terminals_that_have_some(shown, monkeypatch):
    plain = shown(None, "show", "one")
    assert "\x1b[1" in shown(400, "show", "one")
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown(400, "show", "one") == plain
    monkeypatch.setenv("NO_COLOR", "")
    monkeypatch.setenv("TERM", "dumb")
    assert shown(400, "show", "one") == plain


def test_the_width_is_that_of_the_terminal_itself(storage):
    """On a real one, whose output is read from its other end."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 44, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "FORCE_COLOR")}
    environment |= {"NO_COLOR": "1", "TERM": "xterm"}
    command = [sys.executable, "-m", "search.cli", "list", "--storage", str(storage)]
    done = subprocess.run(command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=environment, check=True)
    os.close(theirs)
    text = os.read(ours, 100_000).decode()
    os.close(ours)
    assert done.stderr == b""
    assert {"one", "other", "fresh", "silu,"} <= words(text)
    assert max(map(len, text.splitlines())) in range(30, 45)


# ---- tables


def test_a_name_that_is_too_long_is_folded_and_its_numbers_stay_whole():
    name = "/a/very/long/path/to/a/file/of/which/there/is/no/end.npy"
    table = Table([Column("data", [name, "x"], is_text=True), Column("best", ["-1234.567", "8.25"])])
    lines = printed(table, 40)
    assert max(map(len, lines)) <= 40
    assert "".join(line.removesuffix("-1234.567").strip() for line in lines if "/" in line or "." in line).startswith(
        name
    )
    assert sum("-1234.567" in line for line in lines) == sum("8.25" in line for line in lines) == 1


def test_of_columns_that_do_not_fit_extra_ones_are_left_out_and_long_ones_stand_below():
    columns = [
        Column("activation", ["silu", "relu"], is_text=True),
        *(Column(f"figure\n{n}", [f"{n}.125", f"{n}.25"]) for n in range(4)),
        Column("extra", ["1e-3 to 1e-2", "1e-4 to 1e-3"], is_extra=True),
        Column("parameters", ["a 1.5, " * 6, ""], is_text=True, is_long=True),
    ]
    wide, narrow = printed(Table(columns), 200), printed(Table(columns), 44)
    assert len(wide) == 1 + 2 + 1 + 2 + 1  # blank, header, rule, rows, blank
    assert "1e-3 to 1e-2" in "".join(wide)
    assert "1e-3 to 1e-2" not in "".join(narrow)
    assert max(map(len, narrow)) <= 44
    assert [line.split()[0] for line in narrow if line.startswith(" silu") or line.startswith(" relu")] == [
        "silu",
        "relu",
    ]
    below = [line for line in narrow if line.startswith("     ")]
    assert " ".join(" ".join(below).split()).count("a 1.5,") == 6


def printed(table: Table, width: int) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width).print(table, soft_wrap=True)
    return file.getvalue().splitlines()


def test_text_is_broken_between_words_and_goes_on_further_in():
    assert wrapped("data: 1,437 rows to train on", 16) == "data: 1,437 rows\n  to train on"
    assert wrapped("  deep 12345 12345", 14) == "  deep 12345\n    12345"
    assert wrapped("x" * 30, 20) == "x" * 30
    assert wrapped("as it\nstands", 20) == "as it\nstands"


def test_pieces_are_whole_or_not_there():
    assert fitting(["silu", "", "lr 1.0e-03", "latent 16"], 16) == "silu, lr 1.0e-03"
    assert fitting(["silu", "lr 1.0e-03"], 15) == "silu"
    assert fitting(["silu"], 3) == ""


# ---- queries


def test_a_query_that_does_not_fit_a_terminal_has_a_line_a_value(shown):
    sql = "SELECT trial, val_nelbo, activation, learning_rate, reason FROM trials ORDER BY ALL"
    whole, narrow = shown(None, "query", sql), shown(40, "query", sql)
    assert shown(400, "query", sql) == whole
    assert "── 80 ─" in narrow
    assert max(map(len, narrow.splitlines())) <= 40
    values = {word for word in words(narrow) if not word.startswith("─")}
    assert words(whole) <= values
    assert shown(40, "query", f"{sql} LIMIT 0") == shown(None, "query", f"{sql} LIMIT 0")


# ---- how far things are


def row(number: int, **values: object) -> object:
    return replace(trial_row(number, "RUNNING", epochs=3, val_nelbo=1234.567), **values)


@pytest.mark.parametrize("width", [24, *WIDTHS, 120])
def test_the_picture_of_a_study_has_whole_words_and_lines_that_fit(width):
    def drawn(width: int) -> list[str]:
        progress = Progress(Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None))
        spec = StudySpec.model_validate({"budget": {"trials": 120, "max_epochs": 60}})
        progress.search_started(spec, [trial_row(n, val_nelbo=90.0 + n, epochs=60) for n in range(3)])
        for number in (3, 11, 104):
            progress.trial_started(row(number, learning_rate=10.0**-number))  # type: ignore[arg-type]
        progress.final_started(
            FinalRow(study="s", trial=7, activation="leaky_relu", run=2, seed=0, state="RUNNING", importance_samples=9)
        )
        with progress.console.capture() as capture:
            progress.console.print(progress._picture())
        return capture.get().splitlines()

    lines = drawn(width)
    assert len(lines) == 2 + 4
    assert max(map(len, lines)) <= width
    assert {word for word in words("\n".join(lines)) if word.strip("━╸╺")} <= {
        end for word in words("\n".join(drawn(400))) for end in (word, word.removesuffix(","))
    }
    assert "3 of 120 trials" in lines[0]
    assert "trial 104" in lines[4]


def test_a_terminal_that_moves_no_cursor_and_a_log_get_a_line_a_trial(monkeypatch):
    for is_terminal, term, force in ((True, "dumb", None), (False, "xterm", "1")):
        stream = Terminal(io.BytesIO(), encoding="utf-8") if is_terminal else io.StringIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            patch.setenv("TERM", term)
            if force is not None:
                patch.setenv("FORCE_COLOR", force)
            with Progress() as progress:
                progress.search_started(StudySpec(), [])
                progress.trial_ended(trial_row(0, val_nelbo=90.5, epochs=3))
            stream.flush()
            text = stream.buffer.getvalue().decode() if isinstance(stream, Terminal) else stream.getvalue()
        assert text.startswith("[1/24] trial 0 COMPLETE")
        assert "\x1b" not in text


def test_a_bar_comes_up_while_one_piece_is_worked_on_and_leaves_nothing_behind(monkeypatch):
    monkeypatch.setattr(search.progress, "QUIET_S", 0.01)
    file = io.StringIO()
    with counting("models", Console(file=file, force_terminal=True, width=60, color_system=None)) as count:
        count(0, 1, "1-trial-5: its files")  # and is not told of again
        deadline = time.monotonic() + 20
        while "its files" not in file.getvalue():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert "1-trial-5: its files, 0 s so far" in file.getvalue()
    assert file.getvalue().endswith("\x1b[1A\x1b[2K")


@pytest.mark.parametrize("width", [24, *WIDTHS])
def test_a_bar_has_whole_words_at_every_width(width, monkeypatch):
    monkeypatch.setattr(search.progress, "QUIET_S", 0.0)
    file = io.StringIO()
    with counting("epochs", Console(file=file, force_terminal=True, width=width, color_system=None)) as count:
        count(0, 1200, "train nelbo 12345.678")
        count(1, 1200, "train nelbo 12345.678")
        picture = count.__self__._bar.get_renderable()  # type: ignore[attr-defined]
    with Console(file=io.StringIO(), width=width).capture() as capture:
        capture._console.print(picture)
    (line,) = capture.get().splitlines()
    assert len(line) <= width
    assert line.startswith("epochs 1/1,200")
    assert ("12345.678" in line) == (width > 36)
    assert not {"12345", "12345."} & words(line)


def test_parts_that_take_unlike_times_promise_no_end(monkeypatch):
    monkeypatch.setattr(search.progress, "QUIET_S", 0.0)
    monkeypatch.setattr(search.progress, "LINE_EVERY_S", 0.0)
    said = {}
    for is_even in (True, False):
        file = io.StringIO()
        with counting("parts", Console(file=file), is_even=is_even) as count:
            count(0, 3, "one")
            count(1, 3, "two")
        said[is_even] = file.getvalue().splitlines()
    assert said[False] == ["vaesearch: 0 of 3 parts: one", "vaesearch: 1 of 3 parts: two"]
    assert said[True][1].endswith("two, about 0 s left")


def test_ctrl_c_is_told_of_with_how_far_it_was_and_what_goes_on(capsys):
    import typer

    @ctrl_c_explained("nothing was written")
    def command(done: int, total: int) -> None:
        with counting("rows") as count:
            count(done, total)
            raise KeyboardInterrupt

    for done, total, how_far in ((1500, 20_000, " with 1,500 of 20,000 rows done"), (0, 1, "")):
        with pytest.raises(typer.Exit) as left:
            command(done, total)
        assert left.value.exit_code == 130
        assert capsys.readouterr().err == f"vaesearch: interrupted{how_far}: nothing was written\n"
