"""The space of a study as Optuna distributions, conditional where a parameter belongs to one activation."""

import math
from dataclasses import fields
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from search.spec import Entry, Params, Range, SpaceSpec, values_of
from vae.config import OWN_PARAMETERS, ModelConfig, TrainConfig

ACTIVATIONS = ("activation", "decoder_activation")
_SETTINGS_STREAM = 3  # apart from what else is drawn with the same seed

INTEGERS = ("latent_dim", "hidden_width", "hidden_layers", "batch_size", "avg_pool_window", "apl_hinges")


class Space:
    """What there is to choose (`distributions`) and what is fixed (`constants`)."""

    def __init__(self, spec: SpaceSpec) -> None:
        activations = {*values_of(spec.activation), *values_of(spec.decoder_activation)}
        self.spec = spec
        self.constants: Params = {}
        self.distributions: dict[str, BaseDistribution] = {}
        for name in type(spec).model_fields:  # activation comes first: the others may hang on it
            entry = getattr(spec, name)
            if entry is None or (name in OWN_PARAMETERS and activations.isdisjoint(OWN_PARAMETERS[name])):
                continue
            if isinstance(entry, tuple) and len(entry) == 1:
                entry = entry[0]
            if isinstance(entry, Range | tuple):
                self.distributions[name] = _distribution(name, entry)
            else:
                self.constants[name] = entry

    @property
    def is_fixed(self) -> bool:
        """True when the space leaves nothing to choose: every trial is the same but for its seed."""
        return not self.distributions

    def start(self) -> Params:
        """The first trial: the defaults of `vae.config`, or what is nearest to them in the space."""
        defaults = {field.name: field.default for config in (ModelConfig, TrainConfig) for field in fields(config)}
        chosen = {name: dist for name, dist in self.distributions.items() if name in defaults}
        nearest: Params = {}
        for name, dist in chosen.items():
            if name == "decoder_activation":
                nearest[name] = _nearest(defaults["activation"], dist)
            elif name not in OWN_PARAMETERS:
                nearest[name] = _nearest(defaults[name], dist)
        return nearest

    def settings(self, count: int, seed: int) -> list[Params]:
        """`count` draws that fill the space evenly but for its activations: scrambled Sobol points. Owen 1998.

        Each has a value for every parameter, also for those of one activation: whoever uses it takes what applies.
        """
        from scipy.stats import qmc

        spread = {name: dist for name, dist in self.distributions.items() if name not in ACTIVATIONS}
        if not spread:
            return [{} for _ in range(count)]
        rng = np.random.default_rng((seed, _SETTINGS_STREAM))
        points = qmc.Sobol(len(spread), rng=rng).random_base2(math.ceil(math.log2(count)))
        return [
            {name: _value_at(share, dist) for share, (name, dist) in zip(point, spread.items(), strict=True)}
            for point in points[:count].tolist()
        ]

    def suggest(self, trial: optuna.Trial) -> Params:
        """One draw: the sampler's choices and the constants, conditional parameters only where they apply."""
        params: Params = {}
        for name in SpaceSpec.model_fields:
            if not self.spec.applies(name, params):
                continue
            if name in self.constants:
                params[name] = self.constants[name]
            elif name in self.distributions:
                params[name] = _suggest(trial, name, self.distributions[name])
        return params

    def chosen(self, params: Params) -> tuple[Params, dict[str, BaseDistribution]]:
        """The part of a draw that the sampler chose, with its distributions: what Optuna records of it."""
        names = [name for name in self.distributions if name in params]
        return {n: params[n] for n in names}, {n: self.distributions[n] for n in names}


def _distribution(name: str, entry: Entry) -> BaseDistribution:
    if isinstance(entry, tuple):
        return CategoricalDistribution(entry)
    if name in INTEGERS:
        return IntDistribution(int(entry.low), int(entry.high), log=entry.log)
    return FloatDistribution(entry.low, entry.high, log=entry.log)


def _value_at(share: float, dist: BaseDistribution) -> Any:
    """The value below which a share in [0, 1) of a distribution lies."""
    if isinstance(dist, CategoricalDistribution):
        return dist.choices[int(share * len(dist.choices))]
    assert isinstance(dist, FloatDistribution | IntDistribution)
    half = 0.5 if isinstance(dist, IntDistribution) else 0.0  # each whole number has the same room
    low, high = dist.low - half, dist.high + half
    value = low * (high / low) ** share if dist.log else low + (high - low) * share
    if isinstance(dist, IntDistribution):
        value = round(value)
    return min(max(value, dist.low), dist.high)


def _nearest(value: Any, dist: BaseDistribution) -> object:
    if isinstance(dist, CategoricalDistribution):
        if value in dist.choices or isinstance(value, str):
            return value if value in dist.choices else dist.choices[0]
        return min(dist.choices, key=lambda choice: abs(choice - value))
    assert isinstance(dist, FloatDistribution | IntDistribution)
    return min(max(value, dist.low), dist.high)


def _suggest(trial: optuna.Trial, name: str, dist: BaseDistribution) -> object:
    if isinstance(dist, CategoricalDistribution):
        return trial.suggest_categorical(name, dist.choices)
    if isinstance(dist, IntDistribution):
        return trial.suggest_int(name, dist.low, dist.high, log=dist.log)
    assert isinstance(dist, FloatDistribution)
    return trial.suggest_float(name, dist.low, dist.high, log=dist.log)
