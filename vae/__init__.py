"""Variational autoencoders: model, objective, training, export. Importing this loads no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vae.activations import ACTIVATIONS
    from vae.adversarial import make_trainer
    from vae.config import DataConfig, InputError, ModelConfig, TrainConfig
    from vae.data import load_data
    from vae.export import read_config, read_units
    from vae.loaded import Model, load
    from vae.model import VAE
    from vae.objective import evaluate, fixed_noise, importance_weighted
    from vae.training import Trainer

_HOME = {
    "ACTIVATIONS": "vae.activations",
    "DataConfig": "vae.config",
    "InputError": "vae.config",
    "Model": "vae.loaded",
    "ModelConfig": "vae.config",
    "TrainConfig": "vae.config",
    "Trainer": "vae.training",
    "VAE": "vae.model",
    "evaluate": "vae.objective",
    "fixed_noise": "vae.objective",
    "importance_weighted": "vae.objective",
    "load": "vae.loaded",
    "load_data": "vae.data",
    "make_trainer": "vae.adversarial",
    "read_config": "vae.export",
    "read_units": "vae.export",
}

__all__ = [
    "ACTIVATIONS",
    "VAE",
    "DataConfig",
    "InputError",
    "Model",
    "ModelConfig",
    "TrainConfig",
    "Trainer",
    "evaluate",
    "fixed_noise",
    "importance_weighted",
    "load",
    "load_data",
    "make_trainer",
    "read_config",
    "read_units",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
