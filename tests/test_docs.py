"""What the pages say is what the program does: every command, query and snippet in them is run."""

import gzip
import json
import math
import os
import re
import struct
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import typer
from clusters import ray_head
from pyarrow import fs
from pydantic import BaseModel

from search.cli import app
from search.comparison import compare
from search.ledger import Ledger
from search.results import Study, write_study_file
from search.spec import StudySpec
from search.sql import query
from search.studies_table import STUDIES
from search.tables import (
    SCHEMAS,
    AttemptRow,
    DiagnosticsRow,
    EpochRow,
    FinalImageRow,
    FinalRow,
    LayerRow,
    TrialRow,
    to_table,
)

ROOT = Path(__file__).parent.parent
README, RESULTS, CLUSTERS = ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "clusters.md"
MNIST = ROOT.parent / "shared" / "data" / "mnist"
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


OUTCOMES: list[tuple[str, str | None, str | None, int]] = [  # state, status, reason, epochs of 6
    ("COMPLETE", "ok", None, 6),
    ("PRUNED", "ok", None, 3),
    ("COMPLETE", "collapsed", "no active latent unit", 6),
    ("PRUNED", "diverged", "10 steps in a row were not finite", 2),
    ("COMPLETE", "ok", None, 6),
    ("PRUNED", "oom", "its node ran out of memory", 1),
    ("FAIL", "error", "ValueError: made up", 0),
    ("FAIL", "lost", "its node is gone", 4),
    ("FAIL", "timeout", "no training step for too long", 2),
    ("RUNNING", None, None, 5),
]
CUT_OFF: dict[int, list[tuple[str, int, int, int]]] = {  # place in OUTCOMES -> how, from and to epoch, gone on from
    1: [("lost", 0, 2, 1), ("lost", 1, 3, 3)],
    4: [("timeout", 0, 5, 3)],
    5: [("oom", 0, 1, 0)] * 3,
}
REASONS = {status: reason for _, status, reason, _ in OUTCOMES if status in ("oom", "lost", "timeout")}
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two made-up studies, every state and status among their trials: of the digits, and one that is not by nats."""
    folder = tmp_path_factory.mktemp("storage")
    make_up(folder, StudySpec(budget={"trials": 30, "max_epochs": 6}))
    make_up(
        folder, StudySpec(name="other", budget={"trials": 10, "max_epochs": 6}, train={"objective": "vae_gan"}), 5.0
    )
    return folder


def make_up(folder: Path, spec: StudySpec, better: float = 0.0) -> None:
    """better: by so many nats than the other."""
    path = folder / spec.name
    path.mkdir()
    provenance = {"created_at": NOW, "trials_at_first": spec.budget.trials, "data_fingerprint": "00", "input_dim": 64}
    write_study_file(path, spec, provenance)
    ledger = Ledger(path)
    rows = [made_up_trial(spec, number, better) for number in range(spec.budget.trials)]
    for row in rows:
        for attempt in made_up_attempts(row):
            ledger.update_attempt(attempt)
        ledger.start_trial(row)
        ledger.add_epochs(made_up_epoch(row, epoch) for epoch in range(1, row.epochs + 1))
        ledger.add_diagnostics(*made_up_looks(row))
        if row.state != "RUNNING":
            ledger.end_trial(row)
    for row in rows[:8:4] if spec.train.objective == "elbo" else []:  # healthy ones of silu and relu
        for run in range(4):
            final, images = made_up_final(row, run)
            ledger.end_final(final, to_table(images, SCHEMAS["final_images"]))
    ledger.flush()
    ledger.close()


def made_up_trial(spec: StudySpec, number: int, better: float) -> TrialRow:
    state, status, reason, epochs = OUTCOMES[number % len(OUTCOMES)]
    value = 23.0 + (7 * number + 5) % 30 / 10 - better if epochs else None  # the least is of one out of memory
    return TrialRow(
        study=spec.name, trial=number, state=state, status=status, reason=reason,
        activation=("silu", "relu", "mixture")[number % 3], train_objective=spec.train.objective,
        dropout=number / 60, learning_rate=10 ** (-4 + number / 15), latent_dim=2 + number, hidden_dims=[8, 8],
        batch_size=64, seed=number, objective=value if state == "COMPLETE" else None, val_nelbo=value,
        train_nelbo=22.0, val_kl=4.0, active_units=number, no_latent_nelbo=27.4, epochs=epochs, max_epochs=6,
        suggested_at=NOW, ended_at=None if state == "RUNNING" else NOW,
    )  # fmt: skip


def made_up_attempts(row: TrialRow) -> list[AttemptRow]:
    cut_off = CUT_OFF.get(row.trial % len(OUTCOMES), [])
    last = row.status if row.status in REASONS else None if row.state == "RUNNING" else "ended"
    ends = [
        *((how, begun, ended) for how, begun, ended, _ in cut_off),
        (last, cut_off[-1][3] if cut_off else 0, row.epochs),
    ]
    return [
        AttemptRow(
            study=row.study, trial=row.trial, attempt=number, outcome=how, reason=REASONS.get(how), from_epoch=begun,
            epochs=ended, started_at=NOW,
        )
        for number, (how, begun, ended) in enumerate(ends, 1)
    ]  # fmt: skip


def made_up_epoch(row: TrialRow, epoch: int) -> EpochRow:
    return EpochRow(
        study=row.study, trial=row.trial, epoch=epoch, attempt=1, train_nelbo=25.0, train_recon=20.0, train_kl=5.0,
        val_nelbo=30.0 - epoch + row.trial / 7, val_recon=20.0, val_kl=10.0 - epoch, active_units=1, grad_norm=120.0,
        clipped_steps=epoch % 2, skipped_steps=0, kl_weight=1.0, wall_s=0.1, samples_per_s=1e4 + 10 * row.trial + epoch,
        objective=30.0 - epoch, reported_at=NOW + timedelta(seconds=epoch),
    )  # fmt: skip


def made_up_looks(row: TrialRow) -> tuple[list[DiagnosticsRow], list[LayerRow]]:
    """Of the model before training and at its end."""
    looks = [
        DiagnosticsRow(
            study=row.study, trial=row.trial, epoch=epoch, rate=4.0, distortion=19.0, active_units=row.trial,
            kl_active_units=row.trial, collapsed_share=0.1, mutual_information=3.5, aggregated_kl=0.5,
            aggregated_kl_low=0.6, logvar_clamped=0.0, encoder_gradient_ratio=0.3, decoder_gradient_ratio=0.4,
            generalization_gap=0.2, precision_effect=None, flags=["saturated"],
        )
        for epoch in sorted({0, row.epochs})
    ]  # fmt: skip
    mixture = [0.2, 0.3, 0.5] if row.activation == "mixture" else None
    layers = [
        LayerRow(
            study=row.study, trial=row.trial, epoch=look.epoch, net=net, layer=layer, width=8, dead=0.1, dormant=0.2,
            saturated=0.3, gradient_ratio=0.01, second_moment=1.0, mixture=mixture,
        )
        for look in looks for net in ("encoder", "decoder") for layer in (0, 1)
    ]  # fmt: skip
    return looks, layers


def made_up_final(row: TrialRow, run: int) -> tuple[FinalRow, list[FinalImageRow]]:
    """The fourth of relu's failed."""
    is_well = run < 3 or row.activation == "silu"
    nll = 22.0 + row.trial / 10 + run * run / 50
    final = FinalRow(
        study=row.study, trial=row.trial, activation=row.activation, run=run, seed=run, importance_samples=1000,
        state="COMPLETE" if is_well else "FAIL", status="ok" if is_well else "diverged", nll=nll if is_well else None,
    )  # fmt: skip
    images = [
        FinalImageRow(study=row.study, trial=row.trial, run=run, row=image, nll=nll + image, nelbo=nll + image + 0.5)
        for image in range(5 * is_well)
    ]
    return final, images


@pytest.mark.parametrize("sql", blocks(RESULTS, "sql"))
def test_every_question_of_the_results_page_gets_an_answer(sql, storage):
    assert query(sql, storage).num_rows > 0


def test_the_results_page_names_every_column_and_its_type():
    text = RESULTS.read_text(encoding="utf-8")
    fields = [field for schema in (*SCHEMAS.values(), STUDIES) for field in schema]
    assert not [field.name for field in fields if not re.search(rf"\b{field.name}\b", text)]
    told = re.search(
        r"Whole numbers are int32, but (.*?) are int64; .*? times in microseconds, UTC; (.*?) are lists",
        text,
        re.DOTALL,
    )
    assert told is not None
    long, lists = (set(re.findall(r"`(\w+)`", part)) for part in told.groups())
    for field in fields:
        kind, name = str(field.type), field.name
        assert kind.startswith("list") == (name in lists), name
        assert kind.startswith("list") or (kind == "int64") == (name in long), name
        assert (kind == "timestamp[us, tz=UTC]") == name.endswith("_at"), name
        assert kind in ("string", "int32", "int64", "double", "timestamp[us, tz=UTC]") or name in lists, name


ASKED = """
import ast, json, sys
import pyarrow as pa

names, answers = {}, []
for code in json.load(sys.stdin):
    *body, last = ast.parse(code).body
    exec(compile(ast.Module(body, []), "page", "exec"), names)
    answer = eval(compile(ast.Expression(last.value), "page", "eval"), names)
    answers.append(pa.table(answer).to_pylist())
print(json.dumps(answers, default=float))  # duckdb's sums of whole numbers
"""
"""Runs blocks one after the other, as cells of a notebook, and prints what their last lines come to."""

Rows = list[dict[str, Any]]


def answers(codes: list[str], folder: Path, **environment: str) -> list[Rows]:
    done = subprocess.run(
        [sys.executable, "-c", ASKED], input=json.dumps(codes), cwd=folder, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def questions(text: str, language: str) -> list[tuple[str, str]]:
    """(the words above a block, the block)."""
    return re.findall(rf"^([^\n]+)\n\n```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


SIDE_BY_SIDE = "Learning curves side by side, a column for each trial:"  # SQL has no such question on the page
LIBRARIES = RESULTS.read_text(encoding="utf-8").split("\n### ")[1:]


def side_by_side(study: Path) -> Rows:
    rows = Study(study).epochs().to_pylist()
    trials = sorted({row["trial"] for row in rows})
    known = {(row["trial"], row["epoch"]): row["val_nelbo"] for row in rows}
    return [
        {"epoch": epoch} | {str(trial): known.get((trial, epoch)) for trial in trials}
        for epoch in sorted({row["epoch"] for row in rows})
    ]


@pytest.mark.parametrize("section", LIBRARIES, ids=lambda section: section.split(",")[0])
def test_every_library_gives_the_answers_of_sql(section, storage, tmp_path, request):
    """With a second study beside the digits, whose rows must come in, or stay out."""
    (tmp_path / "studies").symlink_to(storage)
    asked, environment = storage, {}
    if "one study" in section.splitlines()[0]:
        asked = tmp_path / "one"
        asked.mkdir()
        (asked / "digits").symlink_to(storage / "digits")
    if "s3://" in section:
        url = request.getfixturevalue("s3_url")
        there, path = fs.FileSystem.from_uri(url)
        fs.copy_files(str(storage), path, destination_filesystem=there)
        environment = s3_environment(url)
    sql = dict(questions(RESULTS.read_text(encoding="utf-8"), "sql"))
    here = questions(section, "python")
    assert len(here) == section.count("```python")
    for (question, _), found in zip(here, answers([code for _, code in here], tmp_path, **environment), strict=True):
        wanted = (
            side_by_side(storage / "digits") if question == SIDE_BY_SIDE else query(sql[question], asked).to_pylist()
        )
        assert len(found) == len(wanted) > 0, question
        for row, same in zip(found, wanted, strict=True):
            assert row == pytest.approx(same), question


def test_plain_duckdb_answers_every_question_over_views_of_the_files(storage, tmp_path):
    (tmp_path / "studies").symlink_to(storage)
    sql = blocks(RESULTS, "sql")
    (_, views), *_ = questions(LIBRARIES[0], "python")
    assert '"attempts"):' in views
    codes = [views.replace('"attempts"):', '"attempts", "finals"):'), *(f"duckdb.sql({text!r})" for text in sql)]
    for text, found in zip(sql, answers(codes, tmp_path)[1:], strict=True):
        assert unordered(found) == unordered(query(text, storage).to_pylist()), text


def unordered(rows: Rows) -> list[str]:
    def plain(value: Any) -> Any:
        return float(f"{value:.9g}") if isinstance(value, int | float | Decimal) else value

    return sorted(json.dumps({name: plain(value) for name, value in row.items()}, sort_keys=True) for row in rows)


def s3_environment(url: str) -> dict[str, str]:
    """What a reader has in the environment whose object store is the tests'."""
    endpoint = parse_qs(urlsplit(url).query)["endpoint_override"][0]
    return {"AWS_ENDPOINT_URL": f"http://{endpoint}", "AWS_REGION": "us-east-1"}


PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
HISTORY = ("log.md", "article.md")  # tell of keys that were
PRESENT = [page for page in PAGES if page.name not in HISTORY]

RUN_BY = {  # (page, language) -> the test that runs its blocks
    ("README.md", "sh"): "test_docs.py: test_every_command_and_snippet_of_the_readme_runs_as_printed",
    ("README.md", "python"): "test_docs.py: test_every_command_and_snippet_of_the_readme_runs_as_printed",
    ("CONTRIBUTING.md", "sh"): "test_docs.py: test_ci_installs_and_tests_with_the_commands_of_the_pages",
    ("clusters.md", "sh"): "test_docs.py: test_every_command_for_a_cluster_runs_as_printed",
    # Docker's, Kubernetes' and the clouds': what they are given is tested, and the first with podman.
    ("clusters.md", "bash"): "test_docs.py: test_what_needs_machines_of_others_names_files_that_are_there",
    ("comparing.md", "bash"): "test_search_comparison.py: test_every_command_of_the_page_runs_as_printed",
    ("results.md", "sql"): "test_docs.py: test_every_question_of_the_results_page_gets_an_answer",
    ("results.md", "python"): "test_docs.py: test_every_library_gives_the_answers_of_sql",
}


def test_every_code_block_of_every_page_is_run_by_a_test():
    """A block without a language, or of another one, is none of these; `text` is what programs print."""
    found = set()
    for page in PAGES:
        fences = re.findall(r"^ *```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) % 2 == 0, page.name
        found |= {(page.name, language) for language in fences[::2]}
    assert {block for block in found if block[1] != "text"} == set(RUN_BY)
    for place in RUN_BY.values():
        file, _, name = place.partition(": ")
        assert f"def {name}(" in (Path(__file__).parent / file).read_text(encoding="utf-8"), place


@pytest.mark.parametrize("page", PRESENT, ids=lambda page: page.name)
def test_commands_options_and_keys_that_a_page_names_are_there(page):
    text = re.sub(r"^```python\n.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    commands = typer.main.get_command(app).commands
    options = {
        name: {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)}
        for name, command in commands.items()
    }
    named = set(re.findall(r"vaesearch ([a-z]+)\b", text)) - {"searches", "is", "prints"}
    assert named <= set(commands) | {"command"}
    for name, rest in re.findall(r"vaesearch ([a-z]+)\b([^`\n|&>]*)", text):
        assert set(re.findall(r"(?<=\s)--?[a-z][a-z-]*", rest)) <= options.get(name, set()), f"vaesearch {name}{rest}"
    alone = set(re.findall(r"`(--[a-z][a-z-]*)", text))
    assert alone <= set().union(*options.values()) | {"--debug", "--help"}
    sections = {name: getattr(StudySpec(), name) for name in StudySpec.model_fields}
    for section, key in re.findall(r"[`'\" ]([a-z]+)\.([a-z_]+)(?=[`= ,;:]|\.\s)", text):
        if isinstance(sections.get(section), BaseModel) and key not in ("py", "vae"):  # a file; what vae.load gives
            assert key in type(sections[section]).model_fields, f"{section}.{key}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_that_are_there(page):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_ci_installs_and_tests_with_the_commands_of_the_pages():
    installs = [block.strip() for block in blocks(README, "sh") if block.startswith("pip install")]
    assert installs == ["pip install . && vaesearch run", "pip install -e '.[test]' && pytest"]
    (contributors,) = blocks(ROOT / "docs" / "CONTRIBUTING.md", "sh")
    assert contributors.strip() == installs[1]
    assert installs[1] in (ROOT / ".ci" / "run").read_text()


def test_what_needs_machines_of_others_names_files_that_are_there():
    lines = "".join(blocks(CLUSTERS, "bash")).splitlines()
    first = {re.split(r"[ =]", line.removeprefix("(umask 077; "))[0] for line in lines}
    assert first <= {"cluster/deploy/make-token", "docker", "echo", "export", "kubectl", "key", "ray", "vaesearch"}
    for file in re.findall(r"cluster/deploy/(?!secrets)\S+", "\n".join(lines)):
        assert (ROOT / file).is_file(), file


def first_images_of(folder: Path, count: int, to: Path) -> None:
    """The idx files of a folder, cut short: the whole of MNIST is searched in tests/test_system.py."""
    to.mkdir(parents=True)
    for file in folder.glob("*.gz"):
        content = gzip.decompress(file.read_bytes())
        sizes = struct.unpack_from(f">{content[3]}I", content, 4)
        kept = min(count, sizes[0])
        head = content[:4] + struct.pack(f">{len(sizes)}I", kept, *sizes[1:])
        start = 4 + 4 * len(sizes)
        body = content[start : start + kept * math.prod(sizes[1:])]
        (to / file.name).write_bytes(gzip.compress(head + body))


@pytest.mark.system
@pytest.mark.timeout(300)
def test_every_command_for_a_cluster_runs_as_printed(tmp_path):
    with ray_head() as head:
        environment = head.environment() | {"RAY_ADDRESS": head.url}
        for line in "".join(blocks(CLUSTERS, "sh")).splitlines():
            subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, check=True, timeout=120)
            if line.endswith("> study.toml"):  # a smaller one
                text = (tmp_path / "study.toml").read_text()
                for key, value in (("trials", 4), ("max_epochs", 6)):
                    text, count = re.subn(rf"^{key} = \d+", f"{key} = {value}", text, flags=re.MULTILINE)
                    assert count == 1
                (tmp_path / "study.toml").write_text(text)
    assert len(Study(tmp_path / "studies" / "digits").rows()) == 4


def test_the_notebook_is_stored_with_outputs_that_can_be_shown_anywhere():
    """Tables, text and still pictures, as code hosts show them, and nothing of whoever ran it."""
    content = (ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8")
    assert len(content) < 300_000
    cells = [cell for cell in json.loads(content)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert {output["name"] for output in outputs if output["output_type"] == "stream"} == {"stdout"}
    kinds = {kind for output in outputs for kind in output.get("data", ())}
    assert kinds == {"text/plain", "text/html", "image/png", "image/svg+xml"}
    assert not re.search(r"<script|[^\w.<]/(?:tmp|home|root|usr|opt|work|Users)/", json.dumps(outputs))
    assert all(not cell["metadata"] for cell in cells)


@pytest.mark.system
@pytest.mark.timeout(300)
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path):
    cells = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tour: 12 trials of up to 30 epochs" in done.stdout
    assert "equal bit for bit" in done.stdout
    assert len(Study(tmp_path / "studies" / "tour").rows()) == 12


@pytest.mark.system
@pytest.mark.timeout(900)
def test_every_command_and_snippet_of_the_readme_runs_as_printed(tmp_path, s3_url):
    environment = ENVIRONMENT | {k: v for k, v in os.environ.items() if k.startswith("AWS_")} | s3_environment(s3_url)
    rng = np.random.default_rng(0)
    np.savetxt(tmp_path / "points.csv", rng.normal(size=(400, 5)), delimiter=",", header="a,b,c,d,e", comments="")
    np.savez(tmp_path / "images.npz", images=rng.integers(0, 256, size=(400, 8, 8), dtype=np.uint8))
    if MNIST.is_dir():
        first_images_of(MNIST, 6000, tmp_path / "path" / "to" / "mnist")
    for language, text in re.findall(r"^```(sh|python)\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL):
        if language == "python":
            subprocess.run([sys.executable, "-c", text], cwd=tmp_path, env=environment, check=True, timeout=300)
            continue
        for line in text.splitlines():
            command = line.removeprefix("pip install . && ")
            if command.startswith("pip install") or ("mnist" in command and not MNIST.is_dir()):
                continue  # .ci/run does the one; the other needs files that are not here
            subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, check=True, timeout=600)
    assert (tmp_path / "curves.csv").stat().st_size > 0
    assert compare(Study(tmp_path / "studies" / "activations")).sentence.startswith("best: silu")  # as docs/ has it
    assert (tmp_path / "model").is_dir()
    assert (tmp_path / "from-afar").is_dir()
