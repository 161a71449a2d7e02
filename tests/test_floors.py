"""The floors: imports point down only, and what is heavy stays where it is needed."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import pytest

import search

ROOT = Path(__file__).parents[1]
PACKAGES = ("vae", "cluster", "search")
LIGHT = (
    *("spec", "results", "ledger", "sql", "output", "lease", "leaderboard"),
    *("submit", "fetch", "supervisor"),
)
MAY_IMPORT_TUNE = {"search/study.py", "search/sampler.py", "search/trial.py"}
TEXT_SUFFIXES = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".html", ".j2", ".sh", ".cfg", ".json"}


def folder_of(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def modules_of(package: str) -> list[str]:
    return [f"{package}.{module.name}" for module in pkgutil.iter_modules([str(folder_of(package))])]


def loaded_by(*modules: str) -> set[str]:
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def imports_of(file: Path) -> set[str]:
    """Every module that a file names in an import, wherever the statement stands; `from a import b` is a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            assert node.module is not None
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def sources() -> dict[str, Path]:
    """`search/spec.py` and so on -> file."""
    return {
        f"{package}/{file.relative_to(folder_of(package))}": file
        for package in PACKAGES
        for file in sorted(folder_of(package).rglob("*.py"))
    }


def test_vae_with_all_its_modules_loads_nothing_of_the_floors_above():
    loaded = loaded_by(*modules_of("vae"))
    assert {"torch", "vae.training"} <= loaded
    assert not loaded & {"ray", "optuna", "duckdb", "pyarrow.dataset", "search", "cluster"}


@pytest.mark.parametrize(("body", "objective"), [("mlp", "elbo"), ("conv", "elbo"), ("mlp", "vae_gan")])
def test_to_train_to_count_and_to_resume_load_no_compiler(body, objective):
    code = f"""
import sys
from vae.adversarial import make_trainer
from vae.config import DataConfig, ModelConfig, TrainConfig
from vae.data import load_data
from vae.model import num_parameters
data = load_data(DataConfig(source="digits"))
config = ModelConfig(input_dim=64, image_shape=(8, 8), body={body!r}, latent_dim=2, hidden_dims=(8,), channels=(4,))
trainer = make_trainer(config, TrainConfig(max_epochs=1, objective={objective!r}), data, seed=0)
assert num_parameters(config) == trainer.model.num_parameters
trainer.train_epoch()
trainer.diagnose()
trainer.load_state_dict(trainer.state_dict())
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not set(done.stdout.split()) & {"torch._dynamo", "torch._inductor", "sklearn"}


def test_cluster_with_all_its_modules_loads_neither_the_model_nor_the_study():
    loaded = loaded_by(*modules_of("cluster"))
    assert "cluster.resources" in loaded
    assert not loaded & {"vae", "search", "torch", "optuna"}


def test_the_light_modules_of_search_load_nothing_heavy():
    light = [f"search.{name}" for name in LIGHT]
    assert not loaded_by("search", *light) & {"torch", "ray", "optuna", "sklearn"}


def test_no_source_names_a_package_of_a_floor_above_also_where_it_imports_late():
    forbidden = {
        "vae": ("cluster", "search", "ray", "optuna", "duckdb", "pyarrow.dataset"),
        "cluster": ("vae", "search", "torch", "optuna"),
        "search": (),
    }
    for name, file in sources().items():
        for module in imports_of(file):
            for other in forbidden[name.split("/")[0]]:
                assert not f"{module}.".startswith(f"{other}."), f"{name} imports {module}"


def test_ray_tune_is_imported_by_study_sampler_and_trial_alone():
    users = {name for name, file in sources().items() if "ray.tune" in " ".join(f"{m} " for m in imports_of(file))}
    assert users
    assert users <= MAY_IMPORT_TUNE


def test_nobody_imports_the_roof():
    assert [name for name, file in sources().items() if "search.cli" in imports_of(file)] == ["search/start.py"]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_is_that_of_this_repository_or_of_the_installed_distribution(package):
    origin = folder_of(package).resolve()
    shipped = {Path(str(file.locate())).resolve().parent for file in distribution("vaesearch").files or []}
    assert origin.is_relative_to(ROOT.resolve()) or origin in shipped


def test_no_file_tells_where_it_was_made():
    places = [str(ROOT.resolve()), sys.prefix]
    files = [*ROOT.glob("*.md"), *ROOT.glob("*.toml")]
    for folder in (*PACKAGES, "tests", "docs"):
        files += [file for file in (ROOT / folder).rglob("*") if file.suffix in TEXT_SUFFIXES]
    assert len(files) > 20
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert [place for place in places if place in text] == [], file


def test_every_public_name_of_search_is_found_in_its_module():
    for name, home in search._HOMES.items():
        assert getattr(importlib.import_module(home), name).__module__ == home
    assert sorted(search._HOMES) == search.__all__


def test_every_public_name_of_search_can_be_called_as_imported():
    code = "from search import query; print(callable(query))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "True\n"


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = search.nonsense
