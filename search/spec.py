"""The study file: what is searched, on which data, with which budget. Checked here, once; light to import."""

import contextlib
import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationError
from pydantic import model_validator as pydantic_model_validator

from search.storage import Location, location
from search.study_file import explain, read_study_file, set_dotted
from vae.config import (
    OWN_PARAMETERS,
    SUPPORTS,
    ActivationName,
    ActivationScope,
    Attention,
    Binarize,
    Body,
    CompileMode,
    DataConfig,
    GaussianScale,
    InputError,
    KlSchedule,
    LikelihoodName,
    LrSchedule,
    ModelConfig,
    Normalization,
    Precision,
    Scale,
    TrainConfig,
    TrainObjective,
)

if TYPE_CHECKING:
    from cluster.resources import Packing

Goal = Literal["best-model", "compare-activations"]
Phase = Literal["search", "screen", "refine"]

Params = dict[str, Any]
"""One draw from the space: parameter name -> value, conditional parameters only where they apply."""

MODEL_FIELDS = {field.name for field in fields(ModelConfig)}
TRAIN_FIELDS = {field.name for field in fields(TrainConfig)}
SIZES = ("latent_dim", "hidden_width", "hidden_layers")

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class Range:
    """An interval of the space, both ends included; `log` draws uniformly in the logarithm."""

    low: float
    high: float
    log: bool = False


NO_IDENTITY = (
    ("data", "source"),
    ("data", "data_dir"),
    ("budget", "max_retries"),
    ("budget", "max_consecutive_failures"),
    ("budget", "stall_timeout_s"),
    ("sampler", "first"),
)
"""Keys that may change from one run of a study to the next."""

Entry = Any
"""A parameter of the space: a value fixes it, a tuple enumerates it, a `Range` ranges over it."""


def _number(value: object, kind: type, name: str) -> float | int:
    """A number of the wanted kind; text is allowed because YAML reads 1e-4 as text."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"{name} must be a number, got {value!r}") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    if kind is int and float(value) != int(value):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    return kind(value)


def _numeric_entry(kind: type, low: float, high: float, *, open_low: bool = False) -> Any:
    """The type of a space entry whose values lie in [low, high], or (low, high] with `open_low`."""

    def check(value: object, name: str = "value") -> float | int:
        number = _number(value, kind, name)
        if not (low < number if open_low else low <= number) or not number <= high:
            raise ValueError(f"{name} = {number:g} must lie in {'(' if open_low else '['}{low:g}, {high:g}]")
        return number

    def parse(value: object) -> Entry:
        if isinstance(value, Range):
            value = asdict(value)
        if isinstance(value, Mapping):
            return _parse_range(value, check)
        if isinstance(value, list | tuple):
            return _parse_list([check(v) for v in value])
        return check(value)

    return Annotated[Entry, PlainValidator(parse), PlainSerializer(_dump_entry)]


def _parse_range(value: Mapping[str, object], check: Callable[[object, str], float | int]) -> Range:
    unknown = set(value) - {"low", "high", "log"}
    if unknown:
        raise ValueError(f"a range has low, high and log, not {', '.join(sorted(map(str, unknown)))}")
    if not {"low", "high"} <= set(value):
        raise ValueError("a range needs both low and high")
    low, high, log = check(value["low"], "low"), check(value["high"], "high"), value.get("log", False)
    if not isinstance(log, bool):
        raise ValueError(f"log must be true or false, got {log!r}")
    if low >= high:
        raise ValueError(f"the range is empty: low = {low:g} must be below high = {high:g}")
    if log and low <= 0:
        raise ValueError(f"a logarithmic range must start above 0, not at {low:g}")
    return Range(low, high, log)


def _parse_list(values: list) -> tuple:
    if not values:
        raise ValueError("the list is empty; name at least one value")
    if len(set(values)) != len(values):
        raise ValueError("a value stands twice in the list")
    return tuple(values)


def _choice_entry(what: str, literal: Any) -> Any:
    """The type of a space entry whose values are those of a Literal."""

    def check(name: object) -> str:
        known = get_args(literal)
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"unknown {what} {name!r}; {hint}")
        return str(name)

    def parse(value: object) -> Entry:
        return _parse_list([check(v) for v in value]) if isinstance(value, list | tuple) else check(value)

    return Annotated[Entry, PlainValidator(parse), PlainSerializer(_dump_entry)]


def _parse_concurrency(value: object) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f'give a whole number from 1, or "auto", not {value!r}')
    return value


def _parse_columns(value: object) -> object:
    """A list, or one text with commas, as it is typed."""
    return tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else value


def _parse_gpus(value: object) -> float | Literal["auto"]:
    if value == "auto":
        return "auto"
    number = _number(value, float, "gpus_per_trial")
    if number < 0:
        raise ValueError(f"gpus_per_trial must be at least 0, got {number:g}")
    if number > 1:
        raise ValueError(f"a trial trains on one GPU: give 0, a share such as 0.25, 1, or auto, not {number:g}")
    return number


def _dump_entry(entry: Entry) -> object:
    if isinstance(entry, Range):
        return asdict(entry)
    return list(entry) if isinstance(entry, tuple) else entry


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)


class DataSpec(_Section):
    source: str = Field(
        "digits", description="digits | mnist | fashion-mnist | a path to .npy, .npz, .csv, .parquet", min_length=1
    )
    data_dir: str | None = Field(None, description="folder with the idx files of mnist or fashion-mnist")
    key: str | None = Field(None, description="which array of a .npz file")
    columns: Annotated[tuple[str, ...] | None, BeforeValidator(_parse_columns)] = Field(
        None, description="which columns of a .csv or .parquet file"
    )
    image_shape: tuple[int, ...] | None = Field(None, description="[height, width] of flat rows that are images")
    scale: Scale = Field(
        "auto",
        description="auto (8-bit integers / 255, floats as they are; gaussian: columns standardised) | none | minmax "
        "| standard",
    )
    binarize: Binarize = Field(
        "dynamic",
        description="none | threshold (at 0.5) | static (drawn once) | dynamic (drawn every batch); "
        "unset: none, where the likelihood is not bernoulli",
    )
    validation_fraction: float = Field(0.1, gt=0, lt=1, description="share of the rows the search is judged on")
    test_fraction: float = Field(0.1, gt=0, lt=1, description="share kept aside; unused by mnist, which has its own")


class ModelSpec(_Section):
    body: Body = Field("mlp", description="mlp | conv (images; convolutions, then the layers of hidden_dims)")
    hidden_dims: tuple[Annotated[int, Field(ge=1, le=2**53)], ...] = Field(
        (128, 128), description="widths of the encoder's hidden layers; the decoder mirrors them"
    )
    channels: tuple[Annotated[int, Field(ge=1, le=65536)], ...] = Field(
        (32, 64), description="of the convolutions of body = conv"
    )
    strides: tuple[Annotated[int, Field(ge=1, le=64)], ...] | None = Field(
        None, description="one for each of the channels; unset: 2 each"
    )
    attention: Attention = Field("none", description="none | squeeze_excitation | self_attention; body = conv")
    normalization: Normalization = Field("none", description="none | layer | batch | group (body = conv)")
    activation_scope: ActivationScope = Field(
        "shared", description="shared | separate (the decoder has an activation of its own, searched too)"
    )
    likelihood: LikelihoodName = Field(
        "bernoulli", description="bernoulli | continuous_bernoulli | gaussian | poisson | negative_binomial"
    )
    gaussian_scale: GaussianScale = Field("shared", description="shared | per_dimension: the learned sigma")


class TrainSpec(_Section):
    objective: TrainObjective = Field("elbo", description="elbo | vae_gan (adversarial; kept out of rankings by nats)")
    batch_size: int = Field(64, ge=1, description="rows")
    lr_schedule: LrSchedule = Field("cosine", description="constant | cosine | warmup_cosine, over max_epochs")
    beta: float = Field(1.0, ge=0, description="weight of the KL term; results are always at 1")
    kl_warmup_epochs: int = Field(
        5, ge=0, description="epochs over which the KL weight rises to beta; unset: at most max_epochs / 6"
    )
    kl_schedule: KlSchedule = Field("linear", description="linear | cyclical (the warm-up comes again)")
    kl_cycles: int = Field(4, ge=1, description="of kl_schedule = cyclical, over max_epochs")
    free_bits: float = Field(0.0, ge=0, description="nats of each latent dimension that cost nothing in training")
    weight_decay: float = Field(0.0, ge=0, description="decoupled, per step; never on biases and learned slopes")
    clip_grad_norm: float = Field(100.0, gt=0, description="global gradient norm beyond which a step is scaled down")
    max_skipped_steps: int = Field(10, ge=0, description="steps in a row that may be not finite and are left out")
    ema_decay: float = Field(0.0, ge=0, lt=1, description="of averaged weights, used for results; 0: none")
    precision: Precision = Field("float32", description="float32 | bfloat16 (in training alone; slow on many CPUs)")
    compile: CompileMode = Field(
        "none",
        description="none | default | reduce-overhead (CUDA graphs on a GPU) | max-autotune: torch.compile's, "
        "for long trials; on a CPU not for plain perceptrons",
    )


class SpaceSpec(_Section):
    activation: _choice_entry("activation", ActivationName) = Field(  # type: ignore[valid-type]
        ("relu", "leaky_relu", "prelu", "tanh", "sigmoid", "elu", "silu", "gelu"),
        description="any of " + ", ".join(get_args(ActivationName)),
    )
    decoder_activation: _choice_entry("activation", ActivationName) | None = Field(  # type: ignore[valid-type]
        None, description="of model.activation_scope = separate; unset: the same entry as activation"
    )
    leaky_relu_slope: _numeric_entry(float, 0, 1) = Field(  # type: ignore[valid-type]
        Range(0.001, 0.5, log=True), description="slope below zero; only where activation = leaky_relu"
    )
    avg_pool_window: _numeric_entry(int, 1, 4095) = Field(  # type: ignore[valid-type]
        3, description="units or pixels, odd; only where activation = avg_pool or relu_avgpool"
    )
    activation_dropout: _numeric_entry(float, 0, 0.95) = Field(  # type: ignore[valid-type]
        0.2, description="rate; only where activation = dropout"
    )
    apl_hinges: _numeric_entry(int, 1, 32) = Field(  # type: ignore[valid-type]
        2, description="learned hinges of a unit; only where activation = apl"
    )
    dropout: _numeric_entry(float, 0, 0.95) = Field(  # type: ignore[valid-type]
        Range(0.0, 0.5), description="rate after every hidden activation"
    )
    learning_rate: _numeric_entry(float, 0, 10, open_low=True) = Field(  # type: ignore[valid-type]
        Range(1e-4, 1e-2, log=True), description="of Adam; its peak, where the schedule varies it"
    )
    latent_dim: _numeric_entry(int, 1, 4096) = Field(  # type: ignore[valid-type]
        Range(2, 64, log=True), description="dimensions of z"
    )
    hidden_width: _numeric_entry(int, 1, 65536) | None = Field(  # type: ignore[valid-type]
        None, description="one width for all hidden layers, instead of model.hidden_dims"
    )
    hidden_layers: _numeric_entry(int, 1, 64) | None = Field(  # type: ignore[valid-type]
        None, description="number of hidden layers, instead of model.hidden_dims"
    )
    normalization: _choice_entry("normalization", Normalization) | None = Field(  # type: ignore[valid-type]
        None, description="instead of model.normalization"
    )
    batch_size: _numeric_entry(int, 1, 65536) | None = Field(  # type: ignore[valid-type]
        None, description="rows, instead of train.batch_size"
    )
    lr_schedule: _choice_entry("lr_schedule", LrSchedule) | None = Field(  # type: ignore[valid-type]
        None, description="instead of train.lr_schedule"
    )
    beta: _numeric_entry(float, 0, 1e6) | None = Field(  # type: ignore[valid-type]
        None, description="instead of train.beta"
    )
    free_bits: _numeric_entry(float, 0, 1e6) | None = Field(  # type: ignore[valid-type]
        None, description="nats, instead of train.free_bits"
    )
    weight_decay: _numeric_entry(float, 0, 10) | None = Field(  # type: ignore[valid-type]
        None, description="instead of train.weight_decay"
    )
    ema_decay: _numeric_entry(float, 0, 0.999999) | None = Field(  # type: ignore[valid-type]
        None, description="instead of train.ema_decay"
    )
    precision: _choice_entry("precision", Precision) | None = Field(  # type: ignore[valid-type]
        None, description="instead of train.precision"
    )

    def applies(self, name: str, params: Params) -> bool:
        """True unless `name` is a parameter of activations alone of which a draw has none."""
        drawn = {params.get("activation"), params.get("decoder_activation")}
        return name not in OWN_PARAMETERS or not drawn.isdisjoint(OWN_PARAMETERS[name])


class BudgetSpec(_Section):
    trials: int = Field(24, ge=1, description="configurations to try")
    max_epochs: int = Field(60, ge=1, description="epochs of a trial that is not stopped early")
    max_retries: int = Field(3, ge=0, description="times a trial is started again after its worker was lost")
    max_consecutive_failures: int = Field(5, ge=1, description="failed trials in a row after which the study stops")
    stall_timeout_s: float = Field(
        600, gt=0, description="seconds without a training step after which a trial is started again elsewhere"
    )


class SamplerSpec(_Section):
    kind: Literal["tpe", "random", "gp"] = Field("tpe", description="tpe | random | gp")
    startup_trials: int = Field(10, ge=1, description="random trials before tpe or gp models anything")
    first: tuple[dict[str, str | int | float], ...] = Field(
        (), description='tried first, behind the default: [{activation = "silu", latent_dim = 8}]; see run --warm-start'
    )


class SchedulerSpec(_Section):
    kind: Literal["asha", "none"] = Field("asha", description="asha (stops poor trials early) | none")
    grace_epochs: int = Field(3, ge=1, description="epochs after the KL warm-up before a trial may be stopped")
    reduction_factor: float = Field(3, ge=1.1, description="one in this many goes on at each rung")


class ComparisonSpec(_Section):
    settings: int = Field(
        16,
        ge=1,
        description="of the first trials of each activation: the same for all, spread evenly; "
        "unset: half of budget.trials",
    )


class FinalistsSpec(_Section):
    confirm: bool = Field(
        False,
        description="train the best of each activation anew from fresh seeds and score it on the test split; "
        "unset: true where goal = compare-activations",
    )
    per_activation: int = Field(1, ge=1, description="configurations of each activation")
    seeds: int = Field(10, ge=1, le=1000, description="runs of each, paired: run n has the same seed for all")
    importance_samples: int = Field(1000, ge=1, description="latents drawn for each row of the test split")


class ExportSpec(_Section):
    top: int = Field(
        3,
        ge=0,
        description="best models that are kept and exported; of a comparison: that of each activation, or 0",
    )


class ResourcesSpec(_Section):
    cpus_per_trial: int = Field(1, ge=1, description="cores, and torch's threads")
    gpus_per_trial: Annotated[float | Literal["auto"], PlainValidator(_parse_gpus)] = Field(
        0.0,
        description="0, a share such as 0.25, 1, or auto: as many trials on a GPU as it was measured to hold",
    )
    concurrency: Annotated[int | Literal["auto"], PlainValidator(_parse_concurrency)] = Field(
        "auto", description="trials at once; auto: as many as fit"
    )
    autoscaling: bool = Field(
        False, description="the cluster grows while trials wait: all of concurrency, a number, are asked for at once"
    )

    @pydantic_model_validator(mode="after")
    def _check(self) -> "ResourcesSpec":
        if self.autoscaling and self.concurrency == "auto":
            raise ValueError("autoscaling = true needs concurrency as a number: how many trials at once to grow for")
        return self

    def gpus(self, packing: "Packing | None") -> float:
        """What a trial is given of GPUs. packing: what `auto` was measured to be; None: there is no GPU."""
        if self.gpus_per_trial == "auto":
            return 0.0 if packing is None else packing.share
        return self.gpus_per_trial


class StorageSpec(_Section):
    path: str = Field(
        "studies", min_length=1, description="what holds the studies: a folder, or a URL such as s3://bucket/studies"
    )
    patience_s: float = Field(
        120, ge=0, description="seconds for which writing is tried again where it fails, before the study stops"
    )


class StudySpec(_Section):
    """A whole study, every default filled in. Built from a file with `load`, or from keywords in Python."""

    name: str = Field("", description="the study's folder; by default named after the data")
    goal: Goal = Field(
        "best-model", description="best-model | compare-activations (the same budget for each, and a verdict)"
    )
    seed: int = Field(0, ge=0, description="of the split, the suggestions and every trial")
    data: DataSpec = DataSpec()
    model: ModelSpec = ModelSpec()
    train: TrainSpec = TrainSpec()
    space: SpaceSpec = SpaceSpec()
    budget: BudgetSpec = BudgetSpec()
    sampler: SamplerSpec = SamplerSpec()
    scheduler: SchedulerSpec = SchedulerSpec()
    comparison: ComparisonSpec = ComparisonSpec()
    finalists: FinalistsSpec = FinalistsSpec()
    export: ExportSpec = ExportSpec()
    resources: ResourcesSpec = ResourcesSpec()
    storage: StorageSpec = StorageSpec()

    @pydantic_model_validator(mode="before")
    @classmethod
    def _fill_defaults_that_depend(cls, values: Any) -> Any:
        """Unless they were given: the name follows the data, binarisation the likelihood, the decoder's activation
        the encoder's, and warm-up and grace shrink with a short budget. A comparison has as many trials again to
        refine each activation as there are common settings, and ends with finalists.
        """
        if not isinstance(values, dict):
            return values
        filled: dict[str, Any] = {k: v for k, v in values.items() if v is not None}  # YAML's empty sections
        source = _given(filled, "data", "source", "digits")
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(str(source)).stem).strip("-._")
        filled["name"] = filled.get("name") or stem or "study"
        following: list[tuple[str, str, object]] = []
        if _given(filled, "model", "likelihood", "bernoulli") != "bernoulli":
            following.append(("data", "binarize", "none"))
        if _given(filled, "model", "activation_scope", "shared") == "separate":
            default = SpaceSpec.model_fields["activation"].default
            activation = _given(filled, "space", "activation", default)
            names = activation if isinstance(activation, list | tuple) else [activation]
            if all(name in get_args(ActivationName) for name in names):  # else the error is of that key
                following.append(("space", "decoder_activation", activation))
        if filled.get("goal") == "compare-activations":
            following.append(("finalists", "confirm", True))
            activations = _given(filled, "space", "activation", SpaceSpec.model_fields["activation"].default)
            arms = len(activations) if isinstance(activations, list | tuple) else 1
            with contextlib.suppress(TypeError, ValueError, OverflowError):
                trials = _given(filled, "budget", "trials", None)
                if trials is not None:
                    following.append(("comparison", "settings", settings_of(int(trials), arms)))
                settings = int(
                    _given(filled, "comparison", "settings", ComparisonSpec.model_fields["settings"].default)
                )
                following.append(("budget", "trials", 2 * settings * arms))
        with contextlib.suppress(TypeError, ValueError, OverflowError):  # the error comes from the field itself
            max_epochs = max(1, int(float(_given(filled, "budget", "max_epochs", 60))))
            following.append(("train", "kl_warmup_epochs", min(5, max_epochs // 6)))
            following.append(("scheduler", "grace_epochs", min(3, max_epochs)))
        for section, key, default in following:
            given: Any = filled.get(section) or {}
            known = given.model_dump(exclude_unset=True) if isinstance(given, BaseModel) else given
            if isinstance(known, Mapping) and known.get(key) is None:
                filled[section] = {**known, key: default}
        return filled

    @pydantic_model_validator(mode="after")
    def _check_across_sections(self) -> "StudySpec":
        if not NAME_PATTERN.fullmatch(self.name):
            raise ValueError(f"name = {self.name!r}: letters, digits, '.', '_' and '-' only, a letter or digit first")
        if self.scheduler.kind == "asha" and self.scheduler.grace_epochs > self.budget.max_epochs:
            raise ValueError(
                f"scheduler.grace_epochs = {self.scheduler.grace_epochs} "
                f"must lie in 1..budget.max_epochs = {self.budget.max_epochs}"
            )
        if self.space.decoder_activation is not None and self.model.activation_scope == "shared":
            raise ValueError('space.decoder_activation is for model.activation_scope = "separate"')
        self._check_first()
        if self.goal == "compare-activations":
            self._check_comparison()
        if self.train.objective == "vae_gan" and self.finalists.confirm:
            raise ValueError('finalists.confirm compares nats, which train.objective = "vae_gan" does not train for')
        if self.train.objective == "vae_gan" and SUPPORTS[self.model.likelihood] == "counts":
            raise ValueError('train.objective = "vae_gan" makes means pass for data, which those of counts cannot')
        windows = self.space.avg_pool_window
        if isinstance(windows, Range):
            raise ValueError("space.avg_pool_window: give a list of odd numbers, not a range")
        try:  # the owners of these rules are the configs themselves
            self.data_config()
            self.train_config_for({})
            for window in values_of(windows):
                self.model_config_for({"avg_pool_window": window}, (1, 1))
            for norm in values_of(self.space.normalization):
                self.model_config_for({} if norm is None else {"normalization": norm}, (1, 1))
        except ValueError as error:
            raise ValueError(str(error)) from None
        return self

    def _check_first(self) -> None:
        if self.sampler.first and self.goal != "best-model":
            raise ValueError('sampler.first is for goal = "best-model": a comparison has settings common to all')
        for number, configuration in enumerate(self.sampler.first, 1):
            for name, value in configuration.items():
                entry = getattr(self.space, name, None)
                if name not in SpaceSpec.model_fields or entry is None:
                    raise ValueError(f"sampler.first: {name} of configuration {number} is not in the space")
                if not fits(entry, value):
                    raise ValueError(
                        f"sampler.first: {name} = {value!r} of configuration {number} is outside the space"
                    )

    def _check_comparison(self) -> None:
        if self.model.activation_scope != "shared":
            raise ValueError('goal = "compare-activations" compares single ones: model.activation_scope = "shared"')
        if self.train.objective != "elbo":
            raise ValueError('goal = "compare-activations" compares nats: train.objective = "elbo"')
        arms, trials = self.num_arms, self.budget.trials
        if trials % arms:
            lower = trials - trials % arms
            near = f"{lower} or {lower + arms}" if lower else f"{arms}"
            raise ValueError(
                f"budget.trials = {trials} cannot be shared out evenly among {arms} activations; {near} can"
            )
        if self.comparison.settings > trials // arms:
            raise ValueError(
                f"comparison.settings = {self.comparison.settings} must lie in 1..{trials // arms}, "
                f"the trials of each activation"
            )

    @classmethod
    def load(cls, path: Location | None = None, overrides: Mapping[str, object] | None = None) -> "StudySpec":
        """Read a TOML or YAML study file (none: all defaults), then set the dotted keys of `overrides`.

        Raises InputError that names the file or the key, and what would do.
        """
        values = read_study_file(path) if path is not None else {}
        overrides = dict(overrides or {})
        for key, value in overrides.items():
            set_dotted(values, key, value)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            where = str(path) if path is not None else "study"
            raise InputError("\n".join(explain(error, cls, where, overrides))) from None

    @property
    def folder(self) -> Location:
        """Where the study lies. Raises InputError if the storage cannot be opened."""
        return location(self.storage.path) / self.name

    def data_config(self) -> DataConfig:
        return DataConfig(**self.data.model_dump(), support=SUPPORTS[self.model.likelihood], seed=self.seed)

    def model_config_for(self, params: Params, row_shape: tuple[int, ...]) -> ModelConfig:
        """The architecture of a trial: the model section with the trial's own parameters over it.

        row_shape: (X,), or of an image (H, W) or (H, W, C).
        """
        hidden = list(self.model.hidden_dims)
        if "hidden_width" in params or "hidden_layers" in params:
            width = params.get("hidden_width", hidden[0] if hidden else 128)
            hidden = [width] * params.get("hidden_layers", len(hidden) or 1)
        fixed = self.model.model_dump(exclude={"activation_scope"})
        values = fixed | {name: value for name, value in params.items() if name in MODEL_FIELDS}
        image_shape = row_shape if len(row_shape) > 1 else None
        values |= {"hidden_dims": hidden, "input_dim": math.prod(row_shape), "image_shape": image_shape}
        return ModelConfig(**values)

    def largest_models(self, row_shape: tuple[int, ...]) -> Iterator[ModelConfig]:
        """Models of which one has the most weights in the space: the largest sizes with each activation."""
        entries = {name: getattr(self.space, name) for name in (*SIZES, *OWN_PARAMETERS)}
        params = {name: largest(entry) for name, entry in entries.items() if entry is not None}
        for encoder in values_of(self.space.activation):
            for decoder in values_of(self.space.decoder_activation):
                yield self.model_config_for(params | {"activation": encoder, "decoder_activation": decoder}, row_shape)

    def train_config_for(self, params: Params) -> TrainConfig:
        values = self.train.model_dump() | {"max_epochs": self.budget.max_epochs}
        return TrainConfig(**values | {name: value for name, value in params.items() if name in TRAIN_FIELDS})

    @property
    def batch_sizes(self) -> Entry:
        """Rows of a batch: as searched, else as fixed."""
        return self.train.batch_size if self.space.batch_size is None else self.space.batch_size

    @property
    def num_exported(self) -> int:
        """How many models are kept at the most."""
        return self.export.top if self.goal == "best-model" else self.num_arms * (self.export.top > 0)

    @property
    def num_arms(self) -> int:
        return 1 if self.goal == "best-model" else len(values_of(self.space.activation))

    def arms(self) -> list[SpaceSpec]:
        """The spaces that are searched side by side and in turn: that of each activation compared, or the whole."""
        if self.goal == "best-model":
            return [self.space]
        return [self.space.model_copy(update={"activation": name}) for name in values_of(self.space.activation)]

    def place(self, trial: int) -> tuple[int, int]:
        """Whose turn a trial is: the arm's index, and how many of its trials came before."""
        turn, arm = divmod(trial, self.num_arms)
        return arm, turn

    def phase(self, trial: int) -> Phase:
        if self.goal == "best-model":
            return "search"
        return "screen" if self.place(trial)[1] < self.comparison.settings else "refine"

    def rungs(self) -> list[int]:
        """The epochs at which a trial may be stopped and its state is stored, ascending: warm-up + grace * factor^k.

        They count from the end of the KL warm-up. While the KL is not yet weighed in training, the lowest
        value at beta = 1 is that of a model whose latents have collapsed, and early stopping would select it.
        """
        rungs: list[int] = []
        grace = float(self.scheduler.grace_epochs)
        while (rung := self.train.kl_warmup_epochs + int(grace)) < self.budget.max_epochs:
            rung = self._behind_the_ramp(rung)
            if rung not in rungs and rung < self.budget.max_epochs:
                rungs.append(rung)
            grace *= self.scheduler.reduction_factor
        return rungs

    def _behind_the_ramp(self, epoch: int) -> int:
        """The first epoch from this one on in which the KL is weighed in full; of use where its warm-up comes again."""
        if self.train.kl_schedule == "linear":
            return epoch
        cycle = self.budget.max_epochs / self.train.kl_cycles
        start = epoch // cycle * cycle
        return max(epoch, math.ceil(start + min(self.train.kl_warmup_epochs, cycle)))

    def identity(self) -> dict[str, Any]:
        """What makes two specs the same study, as dotted keys: all but where, how fast and how patiently it is run.

        The data are known by their fingerprint, not by the path they were read from.
        """
        dump = self.model_dump(mode="json", exclude={"name", "storage", "resources", "export", "finalists"})
        for section, key in NO_IDENTITY:
            dump[section].pop(key)
        return dict(_flatten(dump))

    def dump(self) -> dict[str, Any]:
        """Plain nested values, without the keys that are None, which TOML cannot say."""
        return _without_none(self.model_dump(mode="json"))


def largest(entry: Entry) -> Any:
    """The largest value that a parameter can take."""
    if isinstance(entry, Range):
        return entry.high
    return max(entry) if isinstance(entry, tuple) else entry


def fits(entry: Entry, value: object) -> bool:
    """Whether a parameter of the space can have a value."""
    if isinstance(entry, Range):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_kind = is_number and (isinstance(entry.low, float) or float(value).is_integer())
        return is_kind and entry.low <= value <= entry.high  # type: ignore[operator]
    return value in values_of(entry)


def values_of(entry: Entry) -> tuple[Any, ...]:
    """Those of a choice: a fixed one, or None where there is no entry, is the only one."""
    return entry if isinstance(entry, tuple) else (entry,)


def settings_of(trials: int, arms: int) -> int:
    """How many settings are common to the arms of a comparison, unless it is said: half of the trials of each."""
    return max(1, trials // arms // 2)


def spec_diff(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    """The lines that tell two `identity` mappings apart."""
    keys = [k for k in {**old, **new} if old.get(k) != new.get(k)]
    return [f"{key}: {old.get(key, 'unset')} -> {new.get(key, 'unset')}" for key in keys]


def _given(values: Mapping[str, Any], section: str, key: str, default: object) -> Any:
    found = values.get(section, {})
    if isinstance(found, BaseModel):
        return getattr(found, key)
    return found.get(key, default) if isinstance(found, Mapping) else default


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and not {"low", "high"} <= set(value):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return value
