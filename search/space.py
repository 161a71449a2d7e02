"""The space of a study as Optuna distributions, conditional where a parameter belongs to one activation."""

from dataclasses import fields
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from search.spec import Entry, Params, Range, SpaceSpec, values_of
from vae.config import OWN_PARAMETERS, ModelConfig, TrainConfig

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
