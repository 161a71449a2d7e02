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
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import typer
from clusters import ray_head
from pydantic import BaseModel

from search.cli import app
from search.comparison import compare
from search.ledger import Ledger
from search.results import Study, write_study_file
from search.spec import StudySpec
from search.sql import query
from search.studies_table import STUDIES
from search.tables import SCHEMAS, AttemptRow, DiagnosticsRow, EpochRow, LayerRow, TrialRow

ROOT = Path(__file__).parent.parent
README, RESULTS, CLUSTERS = ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "clusters.md"
MNIST = ROOT.parent / "shared" / "data" / "mnist"
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of twelve made-up trials, every state and status among them."""
    folder = tmp_path_factory.mktemp("storage")
    spec = StudySpec(budget={"trials": 12, "max_epochs": 6})
    path = folder / spec.name
    path.mkdir()
    now = datetime.now(UTC)
    write_study_file(path, spec, {"created_at": now, "trials_at_first": 12, "data_fingerprint": "00", "input_dim": 64})
    ledger = Ledger(path)
    outcomes = [("COMPLETE", "ok"), ("PRUNED", "ok"), ("COMPLETE", "collapsed"), ("PRUNED", "diverged")]
    for number in range(12):
        state, status = outcomes[number % 4]
        num_epochs = 6 if state == "COMPLETE" else 3
        row = TrialRow(
            study=spec.name, trial=number, state=state, status=status,
            activation=("silu", "relu", "mixture")[number % 3],
            dropout=number / 24, learning_rate=10 ** (-4 + number / 6), latent_dim=2 + number, hidden_dims=[8, 8],
            batch_size=64, seed=number, val_nelbo=23.0 + number, train_nelbo=22.0, val_kl=4.0, active_units=number,
            no_latent_nelbo=27.4, epochs=num_epochs, max_epochs=6, suggested_at=now, ended_at=now,
        )  # fmt: skip
        attempt = AttemptRow(
            study=spec.name, trial=number, attempt=1, outcome="ended", from_epoch=0, epochs=num_epochs, started_at=now
        )  # fmt: skip
        ledger.update_attempt(attempt)
        ledger.start_trial(row)
        ledger.add_epochs(
            EpochRow(
                study=spec.name, trial=number, epoch=epoch, attempt=1, train_nelbo=25.0, train_recon=20.0, train_kl=5.0,
                val_nelbo=30.0 - epoch, val_recon=20.0, val_kl=10.0 - epoch, active_units=1, grad_norm=120.0,
                clipped_steps=epoch % 2, skipped_steps=0, kl_weight=1.0, wall_s=0.1, samples_per_s=1e4 + number,
                objective=30.0 - epoch, reported_at=now + timedelta(seconds=epoch),
            )
            for epoch in range(1, num_epochs + 1)
        )  # fmt: skip
        ledger.add_diagnostics(
            [
                DiagnosticsRow(
                    study=spec.name, trial=number, epoch=epoch, rate=4.0, distortion=19.0, active_units=number,
                    kl_active_units=number, collapsed_share=0.1, mutual_information=3.5, aggregated_kl=0.5,
                    aggregated_kl_low=0.6, logvar_clamped=0.0, encoder_gradient_ratio=0.3, decoder_gradient_ratio=0.4,
                    generalization_gap=0.2, precision_effect=None, flags=["saturated"],
                )
                for epoch in (0, num_epochs)
            ],
            [
                LayerRow(
                    study=spec.name, trial=number, epoch=epoch, net=net, layer=layer, width=8, dead=0.1, dormant=0.2,
                    saturated=0.3, gradient_ratio=0.01, second_moment=1.0,
                    mixture=[0.2, 0.3, 0.5] if row.activation == "mixture" else None,
                )
                for epoch in (0, num_epochs) for net in ("encoder", "decoder") for layer in (0, 1)
            ],
        )  # fmt: skip
        ledger.end_trial(row)
    ledger.flush()
    return folder


@pytest.mark.parametrize("sql", blocks(RESULTS, "sql"))
def test_every_question_of_the_results_page_gets_an_answer(sql, storage):
    assert query(sql, storage).num_rows > 0


def test_the_results_page_names_every_column():
    text = RESULTS.read_text(encoding="utf-8")
    missing = [
        name for schema in (*SCHEMAS.values(), STUDIES) for name in schema.names if not re.search(rf"\b{name}\b", text)
    ]
    assert not missing


def test_the_python_of_the_results_page_runs(storage, tmp_path):
    (tmp_path / "studies").symlink_to(storage)
    for snippet in blocks(RESULTS, "python"):
        subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, check=True, timeout=60)


PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
HISTORY = ("log.md", "article.md")  # tell of keys that were


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in HISTORY], ids=lambda page: page.name)
def test_commands_and_keys_that_a_page_names_are_there(page):
    text = re.sub(r"^```python\n.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    commands = set(re.findall(r"vaesearch ([a-z]+)\b", text)) - {"searches", "is", "prints"}
    assert commands <= set(typer.main.get_command(app).commands) | {"command"}
    sections = {name: getattr(StudySpec(), name) for name in StudySpec.model_fields}
    for section, key in re.findall(r"[`'\" ]([a-z]+)\.([a-z_]+)(?=[`= ,;:]|\.\s)", text):
        if isinstance(sections.get(section), BaseModel) and key not in ("py", "vae"):  # a file; what vae.load gives
            assert key in type(sections[section]).model_fields, f"{section}.{key}"


def test_ci_installs_and_tests_with_the_command_of_the_readme():
    installs = [block.strip() for block in blocks(README, "sh") if block.startswith("pip install")]
    assert installs == ["pip install . && vaesearch run", "pip install -e '.[test]' && pytest"]
    assert installs[1] in (ROOT / ".ci" / "run").read_text()


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
    endpoint = parse_qs(urlsplit(s3_url).query)["endpoint_override"][0]
    aws = {"AWS_ENDPOINT_URL": f"http://{endpoint}", "AWS_REGION": "us-east-1"}
    environment = ENVIRONMENT | {k: v for k, v in os.environ.items() if k.startswith("AWS_")} | aws
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
