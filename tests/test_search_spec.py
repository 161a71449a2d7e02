"""The study file: what it says is what is run, and whatever it says wrongly is refused in words."""

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from search.spec import (
    Range,
    StudySpec,
    spec_diff,
)
from search.study_file import KINDS, commented_study_file, parse_value, read_study_file
from vae.config import (
    SUPPORTS,
    ActivationName,
    ActivationScope,
    Body,
    InputError,
    KlSchedule,
    LikelihoodName,
    LrSchedule,
    ModelConfig,
    Precision,
    TrainConfig,
)

TOML = """
name = "faces"
seed = 7
[data]
source = "faces.npy"
[train]
weight_decay = 1e-4
[space]
activation = ["relu", "silu"]
learning_rate = {low = 1e-4, high = 1e-2, log = true}
dropout = 1e-1
latent_dim = [2, 8, 32]
[budget]
trials = 5
max_epochs = 12
[resources]
gpus_per_trial = 0.25
"""
YAML = """
name: faces
seed: 7
data: {source: faces.npy}
train: {weight_decay: 1e-4}
space:
  activation: [relu, silu]
  learning_rate: {low: 1e-4, high: 1e-2, log: true}
  dropout: 1e-1
  latent_dim: [2, 8, 32]
budget:
  trials: 5
  max_epochs: 12
resources:
  gpus_per_trial: 0.25
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def load_set(**overrides: object) -> StudySpec:
    """The spec of `--set a.b=value`, dots written as two underscores."""
    return StudySpec.load(None, {key.replace("__", "."): value for key, value in overrides.items()})


def refused(path: Path | None = None, overrides: dict[str, object] | None = None) -> str:
    with pytest.raises(InputError) as caught:
        StudySpec.load(path, overrides)
    text = str(caught.value)
    assert 1 <= len(text.splitlines()) <= 4
    return text


# ---- reading


def test_an_empty_file_is_the_defaults_and_a_file_is_not_needed(tmp_path):
    assert StudySpec.load(write(tmp_path / "empty.toml", "")) == StudySpec.load() == StudySpec()
    assert StudySpec.load(write(tmp_path / "empty.yaml", "")) == StudySpec()


def test_the_defaults_search_the_digits_that_need_no_download():
    spec = StudySpec()
    assert (spec.name, spec.data.source, spec.goal, spec.seed) == ("digits", "digits", "best-model", 0)
    assert (spec.sampler.kind, spec.scheduler.kind) == ("tpe", "asha")
    assert (spec.resources.gpus_per_trial, spec.resources.concurrency) == (0, "auto")
    assert set(spec.space.activation) <= set(get_args(ActivationName))


def test_the_defaults_of_spec_model_and_training_agree():
    """Three places name them; a study of the defaults trains what `ModelConfig` and `TrainConfig` say."""
    assert StudySpec().model_config_for({}, (64,)) == ModelConfig(input_dim=64)
    assert StudySpec().train_config_for({}) == TrainConfig()


def test_toml_and_yaml_with_the_same_keys_are_the_same_study(tmp_path):
    of_toml = StudySpec.load(write(tmp_path / "a.toml", TOML))
    of_yaml = StudySpec.load(write(tmp_path / "a.yaml", YAML))
    assert of_toml == of_yaml
    assert of_toml.space.learning_rate == Range(1e-4, 1e-2, log=True)  # YAML reads 1e-4 as text
    assert of_yaml.train.weight_decay == 1e-4
    assert of_yaml.space.dropout == 0.1
    assert of_yaml.space.latent_dim == (2, 8, 32)


def test_a_yml_suffix_in_any_case_is_yaml(tmp_path):
    assert StudySpec.load(write(tmp_path / "a.YML", "seed: 3")).seed == 3


def test_the_provenance_that_a_stored_study_carries_is_passed_over(tmp_path):
    assert read_study_file(write(tmp_path / "a.toml", 'seed = 3\n[provenance]\nx = "y"\n')) == {"seed": 3}


def test_the_commented_file_parses_back_to_the_defaults(tmp_path):
    assert StudySpec.load(write(tmp_path / "study.toml", commented_study_file(StudySpec()))) == StudySpec()


@pytest.mark.parametrize("kind", KINDS)
def test_the_commented_file_of_a_kind_of_data_has_what_that_needs_and_defaults(tmp_path, kind):
    spec = StudySpec.model_validate(KINDS[kind].values)
    text = commented_study_file(spec, KINDS[kind].description)
    assert StudySpec.load(write(tmp_path / "study.toml", text)) == spec
    given = {f"{section}.{key}" for section, keys in KINDS[kind].values.items() for key in keys}
    changed = {line.split(":")[0] for line in spec_diff(StudySpec().identity(), spec.identity())}
    assert changed <= given | {"name", "data.binarize"}


def test_the_commented_file_names_every_key_under_its_section():
    sections: dict[str, str] = {"": ""}
    section = ""
    for line in commented_study_file(StudySpec()).splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        sections[section] = sections.get(section, "") + line + "\n"
    for key, value in StudySpec().model_dump().items():
        if not isinstance(value, dict):
            assert f"{key} =" in sections[""]
            continue
        for name in value:
            assert f"{name} =" in sections[key], f"{key}.{name}"


def test_with_its_commented_keys_uncommented_the_file_is_still_toml():
    keys = {*StudySpec.model_fields, *(k for section in StudySpec().model_dump().values() if isinstance(section, dict)
                                       for k in section)}  # fmt: skip
    lines = []
    for line in commented_study_file(StudySpec()).splitlines():
        bare = line.removeprefix("# ")
        name, equals, rest = bare.partition(" =")
        uncomment = line != bare and equals and name in keys and rest.split("#")[0].strip()
        lines.append(bare if uncomment else line)
    StudySpec.model_validate(tomllib.loads("\n".join(lines)))


# ---- refusing

BAD_VALUES: dict[str, tuple[str, object, list[str]]] = {
    # what -> key, value, words that the message must have
    "unknown section": ("budgets.trials", 3, ["budgets", "unknown", "budget"]),
    "unknown key at the top": ("sed", 3, ["sed", "unknown", "did you mean seed"]),
    "unknown key in a section": ("budget.trails", 3, ["budget.trails", "unknown", "did you mean trials"]),
    "singular with a prefix": ("budget.num_trial", 3, ["budget.num_trial", "did you mean trials"]),
    "unknown key without a near one": ("budget.zzz", 3, ["budget.zzz", "unknown", "trials", "max_epochs"]),
    "empty list": ("space.activation", [], ["space.activation", "empty", "at least one"]),
    "empty list of numbers": ("space.latent_dim", [], ["space.latent_dim", "empty"]),
    "double in a list": ("space.activation", ["relu", "silu", "relu"], ["space.activation", "twice"]),
    "double number in two spellings": ("space.latent_dim", [2, 2.0], ["space.latent_dim", "twice"]),
    "unknown activation": ("space.activation", ["leaky_rely"], ["space.activation", "did you mean leaky_relu"]),
    "activation of another kind": ("space.activation", 5, ["space.activation", "unknown activation", "relu"]),
    "inverted range": ("space.dropout", {"low": 0.5, "high": 0.1}, ["space.dropout", "empty", "0.5", "0.1"]),
    "empty range": ("space.dropout", {"low": 0.5, "high": 0.5}, ["space.dropout", "below"]),
    "half a range": ("space.dropout", {"low": 0.5}, ["space.dropout", "low and high"]),
    "range with another key": ("space.dropout", {"low": 0, "high": 0.5, "step": 1}, ["space.dropout", "step"]),
    "log that is no truth value": ("space.dropout", {"low": 0.1, "high": 0.5, "log": "yes"}, ["space.dropout", "log"]),
    "log range from 0": ("space.dropout", {"low": 0, "high": 0.5, "log": True}, ["space.dropout", "above 0"]),
    "text for a number": ("space.dropout", "much", ["space.dropout", "number", "much"]),
    "truth for a number": ("space.dropout", True, ["space.dropout", "number"]),
    "NaN in the space": ("space.learning_rate", float("nan"), ["space.learning_rate", "nan"]),
    "inf in the space": ("space.learning_rate", float("inf"), ["space.learning_rate", "inf"]),
    "NaN for a whole number": ("space.latent_dim", float("nan"), ["space.latent_dim"]),
    "NaN elsewhere": ("train.beta", float("nan"), ["train.beta", "finite"]),
    "inf elsewhere": ("train.clip_grad_norm", float("inf"), ["train.clip_grad_norm", "finite"]),
    "learning rate of 0": ("space.learning_rate", 0, ["space.learning_rate", "(0, 10]"]),
    "dropout of 1": ("space.dropout", [0.1, 1.0], ["space.dropout", "0.95"]),
    "slope beyond 1": ("space.leaky_relu_slope", 1.5, ["space.leaky_relu_slope", "[0, 1]"]),
    "no latent dimension": ("space.latent_dim", 0, ["space.latent_dim", "[1, "]),
    "half a latent dimension": ("space.latent_dim", {"low": 1.5, "high": 3}, ["space.latent_dim", "whole"]),
    "wrong sampler": ("sampler.kind", "cmaes", ["sampler.kind", "cmaes", "tpe", "random", "gp"]),
    "wrong scheduler": ("scheduler.kind", "hyperband", ["scheduler.kind", "asha", "none"]),
    "wrong likelihood": ("model.likelihood", "gauss", ["model.likelihood", "bernoulli"]),
    "wrong goal": ("goal", "worst-model", ["goal", "best-model"]),
    "wrong scale": ("data.scale", "log", ["data.scale", "minmax"]),
    "name that leaves the folder": ("name", "../elsewhere", ["name", "../elsewhere", "letters"]),
    "name that is absolute": ("name", "/etc/x", ["name", "/etc/x"]),
    "name that is hidden": ("name", ".hidden", ["name", ".hidden", "first"]),
    "name with a space": ("name", "a b", ["name", "a b"]),
    "name with a line break": ("name", "a\n", ["name", "letters"]),
    "validation fraction of 0": ("data.validation_fraction", 0, ["data.validation_fraction", "greater than 0"]),
    "test fraction of 1": ("data.test_fraction", 1.0, ["data.test_fraction", "less than 1"]),
    "fractions that leave nothing": ("data.validation_fraction", 0.95, ["validation_fraction", "test_fraction"]),
    "grace beyond max_epochs": ("scheduler.grace_epochs", 61, ["scheduler.grace_epochs", "61", "max_epochs", "60"]),
    "factor of 1": ("scheduler.reduction_factor", 1, ["scheduler.reduction_factor", "greater than or equal to 1.1"]),
    "no trials": ("budget.trials", 0, ["budget.trials", "1"]),
    "text for trials": ("budget.trials", "many", ["budget.trials", "many", "integer"]),
    "negative seed": ("seed", -1, ["seed", "0"]),
    "width of 0": ("model.hidden_dims", [128, 0], ["model.hidden_dims", "1"]),
    "even window": ("space.avg_pool_window", 2, ["avg_pool_window", "odd"]),
    "a range of windows": ("space.avg_pool_window", {"low": 1, "high": 9}, ["space.avg_pool_window", "odd", "list"]),
    "unknown norm in the space": ("space.normalization", ["none", "bach"], ["space.normalization", "batch"]),
    "group norm of dense layers": ("model.normalization", "group", ["normalization", "conv"]),
    "attention of dense layers": ("model.attention", "self_attention", ["attention", "conv"]),
    "a decoder's activation that is shared": ("space.decoder_activation", "relu", ["activation_scope", "separate"]),
    "averaging for ever": ("train.ema_decay", 1.0, ["train.ema_decay", "less than 1"]),
    "standard scores under bernoulli": ("data.scale", "standard", ["standard", "[0, 1]"]),
    "two GPUs": ("resources.gpus_per_trial", 2, ["gpus_per_trial", "one GPU", "0.25"]),
    "concurrency of 0": ("resources.concurrency", 0, ["concurrency", "1"]),
    "concurrency in words": ("resources.concurrency", "all", ["resources.concurrency", "auto"]),
    "no storage": ("storage.path", "", ["storage.path"]),
    "a value for a section": ("train", 3, ["train"]),
    "a section for a value": ("seed.x", 3, ["seed"]),
}


@pytest.mark.parametrize("what", BAD_VALUES)
def test_a_bad_value_is_refused_by_key_and_remedy(what):
    key, value, words = BAD_VALUES[what]
    message = refused(overrides={key: value})
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("what", ["unknown key in a section", "inverted range", "wrong sampler", "no trials"])
def test_in_a_file_the_message_opens_with_the_file_and_the_key(what, tmp_path):
    key, value, words = BAD_VALUES[what]
    section, name = key.split(".")
    path = write(tmp_path / "study.toml", tomli_w.dumps({section: {name: value}}))
    message = refused(path)
    assert message.startswith(f"{path}: {key}"), message
    assert "--set" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("what", ["unknown key in a section", "inverted range", "wrong sampler", "no trials"])
def test_an_override_is_named_as_such_also_beside_a_file(what, tmp_path):
    key, value, _ = BAD_VALUES[what]
    path = write(tmp_path / "study.toml", "seed = 1\n")
    message = refused(path, {key: value})
    assert (f"--trials: {key}" if what == "no trials" else f"--set {key}") in message
    assert str(path) not in message


def test_an_error_in_the_file_is_not_blamed_on_a_sound_override(tmp_path):
    path = write(tmp_path / "study.toml", "[budget]\ntrials = 0\n")
    message = refused(path, {"budget.max_epochs": 3})
    assert str(path) in message
    assert "--set" not in message


def test_many_errors_are_counted_and_the_first_are_shown():
    message = refused(overrides={f"budget.{c}": 1 for c in "abcdefg"})
    assert message.count("unknown key") == 3
    assert "4 more" in message


@pytest.mark.parametrize("suffix", ["toml", "yaml"])
def test_a_missing_file_is_refused_with_the_command_that_makes_one(suffix, tmp_path):
    message = refused(tmp_path / f"none.{suffix}")
    assert f"none.{suffix}" in message
    assert "vaesearch init" in message


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    assert str(tmp_path) in refused(tmp_path)


def test_bytes_that_are_not_text_are_refused(tmp_path):
    path = tmp_path / "study.toml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    assert str(path) in refused(path)


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("torn.toml", '[budget]\ntrials = 3\n[spa', "TOML"),
        ("twice.toml", "seed = 1\nseed = 2\n", "TOML"),
        ("torn.yaml", "budget: {trials: 3", "YAML"),
        ("tab.yml", "budget:\n\ttrials: 3\n", "YAML"),
    ],
)  # fmt: skip
def test_a_torn_file_is_refused_by_its_name_and_kind(name, text, kind, tmp_path):
    message = refused(write(tmp_path / name, text))
    assert name in message
    assert f"not valid {kind}" in message


@pytest.mark.parametrize("text", ["- seed\n- 3\n", "seed", "3"])
def test_yaml_that_is_not_keys_and_values_is_refused(text, tmp_path):
    message = refused(write(tmp_path / "a.yaml", text))
    assert "a.yaml" in message
    assert "keys" in message


def test_yaml_cannot_build_python_objects(tmp_path):
    target = tmp_path / "made"
    path = write(tmp_path / "a.yaml", f"name: !!python/object/apply:pathlib.Path.touch [!!python/name:x {target}]\n")
    assert "a.yaml" in refused(path)
    assert not target.exists()


@pytest.mark.parametrize("value", [float("inf"), {"low": 1, "high": float("inf")}, [2, float("-inf")], "inf"])
def test_an_infinite_whole_number_is_refused_by_its_key(value):
    assert "space.latent_dim" in refused(overrides={"space.latent_dim": value})


def test_a_range_key_that_is_no_text_is_refused_by_its_key(tmp_path):
    assert "space.dropout" in refused(write(tmp_path / "a.yaml", "space:\n  dropout: {1: 2}\n"))


@pytest.mark.parametrize("value", [12.0, "12"])
def test_max_epochs_in_another_spelling_is_the_same_study(value):
    assert load_set(budget__max_epochs=value) == load_set(budget__max_epochs=12)


def test_an_override_below_a_value_is_named_as_such():
    assert "--set train.beta" in refused(overrides={"train.beta.x": 1})


# ---- defaults that follow


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("digits", "digits"),
        ("fashion-mnist", "fashion-mnist"),
        ("/data/my faces (2).npy", "my-faces-2"),
        ("../x/points.csv", "points"),
        ("~/a.b.parquet", "a.b"),
        ("/data/.npy", "npy"),
        ("/data/日本.npy", "study"),
    ],
)
def test_the_name_follows_the_data_unless_given(source, name):
    assert load_set(data__source=source).name == name
    assert load_set(data__source=source, name="mine").name == "mine"


@pytest.mark.parametrize("max_epochs", [1, 2, 5, 6, 7, 17, 30, 31, 300])
def test_warm_up_and_grace_shrink_with_a_short_budget(max_epochs):
    spec = load_set(budget__max_epochs=max_epochs)
    assert spec.train.kl_warmup_epochs <= max_epochs / 6
    assert spec.train.kl_warmup_epochs <= StudySpec().train.kl_warmup_epochs
    assert 1 <= spec.scheduler.grace_epochs <= min(max_epochs, StudySpec().scheduler.grace_epochs)


def test_a_long_budget_has_the_default_warm_up_and_grace():
    spec = load_set(budget__max_epochs=1000)
    assert spec.train == StudySpec().train
    assert spec.scheduler == StudySpec().scheduler


def test_warm_up_and_grace_that_were_given_do_not_shrink():
    spec = load_set(budget__max_epochs=6, train__kl_warmup_epochs=5, scheduler__grace_epochs=6)
    assert (spec.train.kl_warmup_epochs, spec.scheduler.grace_epochs) == (5, 6)


def test_another_key_of_the_same_section_leaves_them_following():
    spec = load_set(budget__max_epochs=6, train__beta=0.5, scheduler__reduction_factor=2)
    assert spec.train.kl_warmup_epochs == 1
    assert spec.train.beta == 0.5
    assert spec.scheduler.reduction_factor == 2


def test_sections_built_in_python_follow_like_those_of_a_file():
    from search.spec import BudgetSpec, TrainSpec

    built = StudySpec(budget=BudgetSpec(max_epochs=6), train=TrainSpec(beta=0.5))
    assert built == load_set(budget__max_epochs=6, train__beta=0.5)


def test_without_a_scheduler_grace_may_lie_beyond_the_budget():
    assert load_set(scheduler__kind="none", scheduler__grace_epochs=100).rungs() == []


# ---- --set


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("0.5", 0.5),
        ("1e-4", 1e-4),
        ("true", True),
        ("relu", "relu"),
        ('"relu"', "relu"),
        ('["relu", "silu"]', ["relu", "silu"]),
        ("{low = 0.1, high = 0.5}", {"low": 0.1, "high": 0.5}),
        ("a path/with spaces.npy", "a path/with spaces.npy"),
        ("", ""),
    ],
)
def test_the_value_of_a_set_flag_is_toml_or_else_text(text, value):
    assert parse_value(text) == value


def test_overrides_win_over_the_file_and_leave_its_other_keys(tmp_path):
    spec = StudySpec.load(write(tmp_path / "a.toml", TOML), {"budget.trials": 9, "space.dropout": 0.2})
    assert (spec.budget.trials, spec.budget.max_epochs, spec.space.dropout, spec.seed) == (9, 12, 0.2, 7)


# ---- writing and comparing

UNIT = st.floats(0.001, 0.4)


def numbers(low: float, high: float, whole: bool = False) -> st.SearchStrategy[Any]:
    """A value, a list or a range of a parameter."""
    one = st.integers(int(low), int(high)) if whole else st.floats(low, high)
    ends = st.tuples(one, one).filter(lambda pair: pair[0] != pair[1]).map(sorted)
    ranges = st.tuples(ends, st.booleans()).map(lambda r: {"low": r[0][0], "high": r[0][1], "log": r[1]})
    return one | st.lists(one, min_size=1, max_size=4, unique=True) | ranges


def section(**keys: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=keys)


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
SPECS = section(
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,12}", fullmatch=True),
    seed=st.integers(0, 2**40),
    data=section(
        source=TEXT,
        data_dir=TEXT,
        columns=st.lists(TEXT, min_size=1, max_size=3),
        image_shape=st.lists(st.integers(1, 64), min_size=2, max_size=3),
        binarize=st.sampled_from(["none", "threshold", "static", "dynamic"]),
        validation_fraction=UNIT,
        test_fraction=UNIT,
    ),
    model=section(
        hidden_dims=st.lists(st.integers(1, 512), max_size=4),
        body=st.sampled_from(get_args(Body)),
        channels=st.lists(st.integers(1, 64), min_size=1, max_size=3),
        normalization=st.sampled_from(["none", "layer", "batch"]),
        activation_scope=st.sampled_from(get_args(ActivationScope)),
        likelihood=st.just("bernoulli"),
    ),
    train=section(
        beta=UNIT,
        batch_size=st.integers(1, 512),
        kl_warmup_epochs=st.integers(0, 9),
        kl_schedule=st.sampled_from(get_args(KlSchedule)),
        free_bits=UNIT,
        weight_decay=UNIT,
        ema_decay=UNIT,
        precision=st.sampled_from(get_args(Precision)),
    ),
    space=section(
        activation=st.lists(st.sampled_from(get_args(ActivationName)), min_size=1, max_size=5, unique=True),
        leaky_relu_slope=numbers(0.001, 1),
        avg_pool_window=st.integers(0, 9).map(lambda k: 2 * k + 1),
        activation_dropout=numbers(0.001, 0.95),
        apl_hinges=numbers(1, 8, whole=True),
        dropout=numbers(0.001, 0.95),
        learning_rate=numbers(1e-9, 10),
        latent_dim=numbers(1, 4096, whole=True),
        hidden_width=numbers(1, 512, whole=True),
        hidden_layers=numbers(1, 8, whole=True),
        batch_size=numbers(1, 512, whole=True),
        lr_schedule=st.sampled_from(get_args(LrSchedule)),
        ema_decay=numbers(0.001, 0.99),
    ),
    budget=section(trials=st.integers(1, 10**6), max_epochs=st.integers(1, 500)),
    sampler=section(kind=st.sampled_from(["tpe", "random", "gp"])),
    scheduler=section(kind=st.just("none") | st.just("asha"), reduction_factor=st.floats(1.5, 10)),
    resources=section(
        cpus_per_trial=st.integers(1, 64),
        gpus_per_trial=st.sampled_from([0, 0.25, 1, "auto"]),
        concurrency=st.just("auto") | st.integers(1, 99),
    ),
    storage=section(path=TEXT),
).map(StudySpec.model_validate)


@settings(deadline=None, max_examples=80)
@given(spec=st.just(StudySpec()) | SPECS)
def test_a_spec_written_as_toml_reads_back_equal(spec, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "round_trip.toml"
    path.write_bytes(tomli_w.dumps(spec.dump()).encode())
    back = StudySpec.load(path)
    assert back == spec
    assert back.identity() == spec.identity()
    assert back.dump() == spec.dump()


@settings(deadline=None, max_examples=80)
@given(spec=SPECS)
def test_rungs_begin_after_warm_up_and_grace_ascend_and_stop_short_of_the_last_epoch(spec):
    rungs = spec.rungs()
    assert rungs == sorted(set(rungs))
    assert all(rung < spec.budget.max_epochs for rung in rungs)
    first = spec.train.kl_warmup_epochs + spec.scheduler.grace_epochs
    assert all(rung >= first for rung in rungs)
    if spec.train.kl_schedule == "linear":  # a cyclical one may put the first off, behind a warm-up that comes again
        assert rungs[:1] == ([first] if first < spec.budget.max_epochs else [])


def test_rungs_are_those_of_successive_halving_shifted_by_the_warm_up():
    spec = load_set(budget__max_epochs=100, train__kl_warmup_epochs=10, scheduler__grace_epochs=2)
    assert spec.rungs() == [10 + 2, 10 + 6, 10 + 18, 10 + 54]
    assert load_set(budget__max_epochs=9, train__kl_warmup_epochs=0, scheduler__grace_epochs=1).rungs() == [1, 3]


IGNORED = {
    "name": "other",
    "storage.path": "/elsewhere",
    "resources.cpus_per_trial": 8,
    "resources.gpus_per_trial": 0.5,
    "resources.concurrency": 3,
    "export.top": 9,
    "data.data_dir": "/moved",
    "data.source": "moved.npy",
    "sampler.first": [{"latent_dim": 4}],
}


def test_what_is_tried_first_lies_in_the_space():
    space = {"space.latent_dim": 8, "space.hidden_width": None}
    assert StudySpec.load(None, {**space, "sampler.first": [{"latent_dim": 8}, {"dropout": 0.5}]}).sampler.first
    for wrong, why in (
        ({"latent_dim": 9}, "outside the space"),
        ({"learning_rate": 1}, "outside the space"),
        ({"dropout": 0.6}, "outside the space"),
        ({"dropout": "high"}, "outside the space"),
        ({"activation": "step"}, "outside the space"),
        ({"hidden_width": 9}, "not in the space"),
        ({"colour": 9}, "not in the space"),
    ):
        with pytest.raises(InputError, match=why):
            StudySpec.load(None, {**space, "sampler.first": [wrong]})
    with pytest.raises(InputError, match="common to all"):
        StudySpec.load(None, {"goal": "compare-activations", "sampler.first": [{"dropout": 0.5}]})


@pytest.mark.parametrize("key", IGNORED)
def test_where_and_how_fast_does_not_make_another_study(key):
    assert StudySpec.load(None, {key: IGNORED[key]}) != StudySpec()
    assert StudySpec.load(None, {key: IGNORED[key]}).identity() == StudySpec().identity()


TELLING = {
    "seed": 1,
    "data.binarize": "none",
    "model.hidden_dims": [64],
    "train.beta": 2.0,
    "space.dropout": {"low": 0.0, "high": 0.4},
    "space.activation": ["relu"],
    "budget.trials": 3,
    "sampler.kind": "random",
    "scheduler.reduction_factor": 4,
}


@pytest.mark.parametrize("key", TELLING)
def test_what_changes_the_results_is_told_by_one_line_of_the_diff(key):
    old, new = StudySpec().identity(), StudySpec.load(None, {key: TELLING[key]}).identity()
    (line,) = spec_diff(old, new)
    assert line.startswith(f"{key}: ")
    assert str(old[key]) in line
    assert str(new[key]) in line


def test_a_diff_tells_keys_that_one_side_alone_has_and_nothing_of_equals():
    assert spec_diff({"a": 1, "b": 2}, {"a": 1, "b": 2}) == []
    assert spec_diff({"a": 1}, {"b": 2}) == ["a: 1 -> unset", "b: unset -> 2"]


# ---- what follows from other keys


@pytest.mark.parametrize("likelihood", get_args(LikelihoodName))
def test_rows_are_what_the_likelihood_speaks_of_and_binarised_for_bernoulli_alone(likelihood):
    config = load_set(model__likelihood=likelihood).data_config()
    assert config.support == SUPPORTS[likelihood]
    assert config.binarize == ("dynamic" if likelihood == "bernoulli" else "none")


@pytest.mark.parametrize("likelihood", ["gaussian", "poisson", "negative_binomial"])
def test_binarised_rows_of_numbers_and_counts_are_refused(likelihood):
    with pytest.raises(InputError, match="binarize = none"):
        load_set(model__likelihood=likelihood, data__binarize="static")


@pytest.mark.parametrize("scale", ["minmax", "standard"])
def test_counts_are_not_scaled(scale):
    with pytest.raises(InputError, match="scale = none"):
        load_set(model__likelihood="poisson", data__scale=scale)


def test_a_decoder_with_an_activation_of_its_own_has_the_choice_of_the_encoder_unless_it_is_given():
    assert load_set().space.decoder_activation is None
    both = load_set(model__activation_scope="separate", space__activation=["relu", "silu"])
    assert both.space.decoder_activation == ("relu", "silu")
    assert load_set(model__activation_scope="separate").space.decoder_activation == StudySpec().space.activation
    own = load_set(model__activation_scope="separate", space__decoder_activation="tanh")
    assert own.space.decoder_activation == "tanh"
    assert own.model_config_for({"activation": "relu", "decoder_activation": "tanh"}, (4,)).activations == (
        "relu",
        "tanh",
    )


@pytest.mark.parametrize("likelihood", get_args(LikelihoodName))
def test_a_study_file_to_start_from_takes_any_likelihood(likelihood, tmp_path):
    path = write(tmp_path / "study.toml", commented_study_file(StudySpec()))
    spec = StudySpec.load(path, {"model.likelihood": likelihood})
    assert spec.data.binarize == ("dynamic" if likelihood == "bernoulli" else "none")


def test_a_key_of_an_earlier_version_is_told_where_it_is_now():
    assert "model.avg_pool_window: is space.avg_pool_window now" in refused(overrides={"model.avg_pool_window": 3})


def test_where_the_warm_up_comes_again_no_rung_is_in_a_ramp():
    spec = load_set(budget__max_epochs=60, train__kl_schedule="cyclical", train__kl_warmup_epochs=5)
    assert spec.rungs() == [8, 14, 35]  # linear: 8, 14, 32; cycles of 15 epochs begin with 5 of warm-up
    assert load_set(budget__max_epochs=60, train__kl_warmup_epochs=5).rungs() == [8, 14, 32]


def test_a_decoder_activation_of_none_is_as_if_it_were_not_given():
    spec = StudySpec.model_validate({"model": {"activation_scope": "separate"}, "space": {"decoder_activation": None}})
    assert spec.space.decoder_activation == spec.space.activation
    assert StudySpec.model_validate(spec.dump()) == spec


def test_one_wrong_activation_is_one_error():
    message = refused(overrides={"model.activation_scope": "separate", "space.activation": "rellu"})
    assert message.count("rellu") == 1


def test_images_make_a_convolutional_model_and_flat_rows_none():
    spec = load_set(model__body="conv", model__channels=[8, 16])
    assert spec.model_config_for({}, (28, 28)).image_shape == (28, 28)
    assert spec.model_config_for({}, (8, 8, 3)).input_dim == 192
    with pytest.raises(ValueError, match="image_shape"):
        spec.model_config_for({}, (784,))


def test_the_largest_models_have_each_activation_at_the_largest_sizes():
    spec = load_set(
        space__activation=["relu", "glu"], space__hidden_width=[8, 32], space__latent_dim={"low": 2, "high": 5}
    )
    models = list(spec.largest_models((10,)))
    assert [model.activation for model in models] == ["relu", "glu"]
    assert {(model.latent_dim, model.hidden_dims) for model in models} == {(5, (32, 32))}


# ---- a trial's configs


def test_a_draw_over_the_model_section_makes_the_architecture():
    spec = load_set(model__hidden_dims=[300, 200], model__normalization="layer")
    params = {"activation": "leaky_relu", "leaky_relu_slope": 0.2, "dropout": 0.1, "latent_dim": 3}
    config = spec.model_config_for({**params, "learning_rate": 1e-3, "batch_size": 32}, (10,))
    wanted = ModelConfig(input_dim=10, hidden_dims=(300, 200), normalization="layer", **params)
    assert config == wanted


@pytest.mark.parametrize(
    ("given", "params", "hidden"),
    [
        ([300, 200], {}, (300, 200)),
        ([300, 200], {"hidden_width": 64}, (64, 64)),
        ([300, 200], {"hidden_layers": 3}, (300, 300, 300)),
        ([300, 200], {"hidden_width": 64, "hidden_layers": 1}, (64,)),
        ([], {}, ()),
        ([], {"hidden_width": 64}, (64,)),
        ([], {"hidden_width": 32, "hidden_layers": 2}, (32, 32)),
    ],
)
def test_searched_width_and_depth_stand_in_for_hidden_dims(given, params, hidden):
    spec = load_set(model__hidden_dims=given)
    assert spec.model_config_for(params, (4,)).hidden_dims == hidden


def test_a_draw_over_the_train_section_makes_the_training():
    spec = load_set(train__batch_size=100, train__beta=0.5, budget__max_epochs=12)
    assert spec.train_config_for({"learning_rate": 0.02}) == TrainConfig(
        learning_rate=0.02, batch_size=100, beta=0.5, max_epochs=12, kl_warmup_epochs=2
    )
    assert spec.train_config_for({"learning_rate": 0.02, "batch_size": 7}).batch_size == 7


def test_the_seed_of_the_study_is_that_of_its_data():
    assert load_set(seed=5).data_config().seed == 5


def test_reading_a_spec_loads_no_heavy_library():
    code = "import sys, search.spec; search.spec.StudySpec(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not set(done.stdout.split()) & {"torch", "ray", "optuna", "pyarrow", "numpy", "duckdb"}


# ---- comparisons


def test_a_comparison_shares_its_budget_out_evenly_and_ends_with_finalists():
    spec = StudySpec.load(None, {"goal": "compare-activations"})
    arms = len(spec.space.activation)
    assert spec.finalists.confirm
    assert [arm.activation for arm in spec.arms()] == list(spec.space.activation)
    assert spec.budget.trials == 2 * spec.comparison.settings * arms
    assert [spec.place(number) for number in (0, arms - 1, arms)] == [(0, 0), (arms - 1, 0), (0, 1)]
    first_refined = spec.comparison.settings * arms
    assert [spec.phase(number) for number in (0, first_refined - 1, first_refined)] == ["screen", "screen", "refine"]
    given = StudySpec.load(None, {"goal": "compare-activations", "budget.trials": 10 * arms})
    assert given.comparison.settings == 5
    assert not StudySpec().finalists.confirm
    assert StudySpec().phase(7) == "search"
    assert StudySpec().place(7) == (0, 7)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"budget.trials": 17}, ["budget.trials = 17", "16 or 24"]),
        ({"budget.trials": 16, "comparison.settings": 3}, ["comparison.settings = 3", "1..2"]),
        ({"model.activation_scope": "separate"}, ["activation_scope"]),
        ({"train.objective": "vae_gan"}, ["elbo"]),
        ({"finalists.seeds": 0}, ["finalists.seeds"]),
    ],
)
def test_a_comparison_that_cannot_be_fair_is_refused(overrides, told):
    with pytest.raises(InputError) as refused:
        StudySpec.load(None, {"goal": "compare-activations", **overrides})
    assert all(text in str(refused.value) for text in told), refused.value


def test_how_finalists_are_run_is_no_part_of_a_studys_identity():
    one = StudySpec.load(None, {"goal": "compare-activations"})
    other = StudySpec.load(None, {"goal": "compare-activations", "finalists.seeds": 29})
    assert one.identity() == other.identity()
    assert one.identity() != StudySpec.load(None, {"goal": "compare-activations", "comparison.settings": 8}).identity()


def test_adversarial_training_is_not_confirmed_in_nats():
    with pytest.raises(InputError, match=r"finalists\.confirm"):
        StudySpec.load(None, {"train.objective": "vae_gan", "finalists.confirm": True})


@pytest.mark.parametrize("columns", ["height, weight", ["height", "weight"]])
def test_columns_may_be_typed_with_commas(columns):
    assert StudySpec.load(None, {"data.columns": columns}).data.columns == ("height", "weight")
