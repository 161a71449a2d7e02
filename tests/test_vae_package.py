"""The package's front: public names, loaded only when asked for."""

import subprocess
import sys

import pytest

import vae

HEAVY = ("torch", "pyarrow", "sklearn", "PIL", "jinja2", "ray", "optuna")


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("statement", ["import vae", "import vae.config", "from vae import InputError, ModelConfig"])
def test_the_package_and_its_config_load_nothing_heavy(statement):
    assert not modules_after(statement) & set(HEAVY)


def test_the_trainer_loads_neither_ray_nor_optuna_nor_readers():
    loaded = modules_after("from vae import Trainer, load, load_data")
    assert "torch" in loaded
    assert not loaded & {"ray", "optuna", "pyarrow", "sklearn"}


def test_every_public_name_is_found_and_listed():
    assert sorted(vae._HOME) == sorted(vae.__all__)
    assert set(vae.__all__) <= set(dir(vae))
    for name in vae.__all__:
        assert getattr(vae, name).__name__ == name if callable(getattr(vae, name)) else True


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = vae.nonsense
