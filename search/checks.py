"""What is checked before anything is written: an error here leaves no trace on disk."""

from dataclasses import dataclass, replace
from itertools import pairwise

from cluster.resources import PlacementError, fitting_trials
from cluster.runtime import Runtime
from search.checkpoints import KEPT, CheckpointStore
from search.finalists import missing_runs
from search.lease import Lease
from search.results import CHECKPOINTS_FOLDER, FINAL_CHECKPOINTS_FOLDER, STUDY_FILE, Study
from search.spec import Range, StudySpec, largest, settings_of, spec_diff, values_of
from search.storage import check_writable, free_bytes
from vae.config import InputError, ModelConfig
from vae.data import Dataset, load_data

STATE_COPIES = 4  # weights, their average, and the two moments of Adam, as float32
STATE_OVERHEAD_BYTES = 64 * 2**10  # of a stored state: its epochs' figures and torch's own frame
LEDGER_ROW_BYTES = 128  # of an epoch in Parquet, generously

# Of a dense layer: no activation makes it wider than twice; biases, normalisation and what is learned for each unit are
# so many numbers a unit.
WIDEST, SMALL = 2, 16


@dataclass(frozen=True)
class Prepared:
    """A study that may begin, or go on."""

    spec: StudySpec  # as it is to be run
    data: Dataset
    stored: Study | None  # what an earlier run left
    is_complete: bool  # nothing is left to do


def prepared(spec: StudySpec, *, address: str | None, extend: int) -> Prepared:
    """What can be told before Ray starts; arguments as of `run_study`. Raises InputError; writes nothing."""
    data = load_data(spec.data_config())
    check_model(spec, data)
    check_batches(spec, data)
    if address is None:
        check_compiler(spec)
    stored = Study(spec.folder) if (spec.folder / STUDY_FILE).is_file() else None
    if stored is not None:
        spec = same_study(spec, stored, data, extend)
        if _is_complete(spec, stored):
            return Prepared(spec, data, stored, is_complete=True)
    elif extend:
        raise InputError(f"{spec.folder}: there is no study to extend; set budget.trials instead")
    check_writable(spec.folder.parent)
    Lease(spec.folder).check()
    return Prepared(spec, data, stored, is_complete=False)


def _is_complete(spec: StudySpec, stored: Study) -> bool:
    folders = (CHECKPOINTS_FOLDER, FINAL_CHECKPOINTS_FOLDER)
    if any(CheckpointStore(stored.path / folder).trials() for folder in folders):
        return False  # states go once the best are exported
    rows = stored.rows()
    if sum(row.state != "RUNNING" for row in rows) < spec.budget.trials:
        return False
    return not spec.finalists.confirm or not missing_runs(spec, rows, stored.whole_final_rows())


def check_batches(spec: StudySpec, data: Dataset) -> None:
    key = "train.batch_size" if spec.space.batch_size is None else "space.batch_size"
    sizes = values_of(spec.batch_sizes)
    smallest = min(size.low if isinstance(size, Range) else size for size in sizes)
    if smallest < 2 and "batch" in (*values_of(spec.space.normalization), spec.model.normalization):
        raise InputError(f"{key}: batch normalisation needs batches of at least 2 rows")
    if largest(spec.batch_sizes) > len(data.train):
        raise InputError(
            f"{data.config.source}: {len(data.train)} rows to train on are fewer than a batch; "
            f"set {key} = {len(data.train)} or lower, or bring more rows"
        )


def check_compiler(spec: StudySpec) -> None:
    """Raises InputError if models are to be compiled and this machine cannot."""
    if spec.train.compile != "none":
        from vae.training import require_compiler

        require_compiler(spec.train.compile, "cpu")


def check_model(spec: StudySpec, data: Dataset) -> None:
    """Raises InputError if the data cannot be what the model takes."""
    try:
        spec.model_config_for({}, data.row_shape)
    except ValueError as error:
        raise InputError(f"{data.config.source}: {error}") from None


def disk_budget_bytes(spec: StudySpec, num_parameters: int, concurrency: int) -> int:
    """What a study takes on its storage at the most: states of the trials under way and of the best, and the tables.

    num_parameters: of the largest model.
    """
    weights = 4 * num_parameters
    discriminator = weights if spec.train.objective == "vae_gan" else 0  # has an encoder's body, and two moments too
    state = STATE_COPIES * weights + 3 * discriminator + STATE_OVERHEAD_BYTES
    states = KEPT * (concurrency + spec.num_exported) + 1  # one more while it is being written
    models = 2 * spec.num_exported * weights  # the new ones beside those of an earlier run
    return states * state + models + spec.budget.trials * spec.budget.max_epochs * LEDGER_ROW_BYTES


def concurrency_of(spec: StudySpec, runtime: Runtime, gpus_per_trial: float) -> int:
    """How many trials run at once. Raises InputError if the cluster cannot hold one."""
    asked = spec.resources.concurrency
    try:
        return fitting(spec, runtime, gpus_per_trial, None if asked == "auto" else asked)
    except PlacementError as error:
        raise InputError(str(error)) from None


def fitting(spec: StudySpec, runtime: Runtime, gpus_per_trial: float, wanted: int | None) -> int:
    """How many trials of a study a cluster holds, at most `wanted`. Raises PlacementError if it holds none."""
    return fitting_trials(
        runtime,
        cpus_per_trial=spec.resources.cpus_per_trial,
        gpus_per_trial=gpus_per_trial,
        wanted=wanted,
        is_growing=spec.resources.autoscaling,
    )


def check_space(spec: StudySpec, data: Dataset, concurrency: int) -> None:
    """Raises InputError if the study would not fit on its disk."""
    free, models = free_bytes(spec.folder), list(spec.largest_models(data.row_shape))
    if free is None:
        return
    bounds = [bound for model in models if (bound := most_parameters(model)) is not None]
    if len(bounds) == len(models) and disk_budget_bytes(spec, max(bounds), concurrency) <= free:
        return
    needed = disk_budget_bytes(spec, largest_num_parameters(spec, data), concurrency)
    if needed > free:
        raise InputError(
            f"{spec.folder.parent}: the study may take {needed / 2**20:,.0f} MiB and {free / 2**20:,.0f} MiB are free; "
            f"make room, name another --storage, or lower export.top, resources.concurrency or the model's size"
        )


def largest_num_parameters(spec: StudySpec, data: Dataset) -> int:
    """Of the largest model in the space."""
    from vae.model import num_parameters  # torch: a second, in which trials could have started

    return max(map(num_parameters, spec.largest_models(data.row_shape)))


def most_parameters(config: ModelConfig) -> int | None:
    """No fewer than those of the model, which is not built; None for convolutions."""
    if config.body == "conv":
        return None
    widths = (config.input_dim, *config.hidden_dims, config.latent_dim)
    nets = [*pairwise(widths), *pairwise(reversed(widths)), (widths[-2], widths[-1])]  # two heads of the encoder
    is_square = "dynamic_relu" in config.activations  # which has layers of its own
    return sum(WIDEST * (fan_in + is_square * width + config.apl_hinges + SMALL) * width for fan_in, width in nets)


def check_fingerprint(study: Study, data: Dataset, remedy: str = "bring those back or use another --name") -> None:
    """Raises InputError if the data are not those the study was made on."""
    fingerprint = study.provenance["data_fingerprint"]
    if fingerprint != data.fingerprint:
        raise InputError(
            f"{study.path}: the study was made on other data (SHA-256 {fingerprint[:12]}..., "
            f"those of {data.config.source} have {data.fingerprint[:12]}...); {remedy}"
        )


def own_data(study: Study, source: str | None = None, data_dir: str | None = None) -> Dataset:
    """The data that the study was made on, wherever they are now. Raises InputError if they are gone or others."""
    config = study.spec.data_config()
    config = replace(config, source=source or config.source, data_dir=data_dir or config.data_dir)
    try:
        dataset = load_data(config)
    except InputError as error:
        if source is not None or data_dir is not None:
            raise
        raise InputError(f"{error}\nif they have moved since the study: --data FILE, or --data-dir FOLDER") from None
    check_fingerprint(study, dataset, "name the file with those: --data FILE, or --data-dir FOLDER")
    return dataset


def same_study(spec: StudySpec, stored: Study, data: Dataset, extend: int) -> StudySpec:
    """The spec to go on with. Raises InputError with a diff if what is asked for is another study."""
    check_fingerprint(stored, data)
    old = stored.spec
    spec = _with_what_was_confirmed(spec, stored)
    spec = spec.model_copy(update={"sampler": spec.sampler.model_copy(update={"first": old.sampler.first})})
    before, after = old.identity(), spec.identity()
    asked = after["budget.trials"]
    if asked in (stored.provenance["trials_at_first"], before["budget.trials"]):
        after["budget.trials"] = before["budget.trials"]  # the command that began it, also after an extension
        if after["comparison.settings"] == settings_of(asked, spec.num_arms):  # which follows from the trials
            after["comparison.settings"] = before["comparison.settings"]
            spec = spec.model_copy(update={"comparison": old.comparison})
    if extend % spec.num_arms:
        raise InputError(
            f"{stored.path}: --extend {extend} cannot be shared out evenly among {spec.num_arms} activations"
        )
    if diff := spec_diff(before, after):
        more = ", or --extend N for more trials of the same" if all("budget.trials" in line for line in diff) else ""
        raise InputError(f"{stored.path}: the study there is another one: {'; '.join(diff)}\nuse another --name{more}")
    if extend and stored.summary().ended < old.budget.trials:
        raise InputError(f"{stored.path}: not complete yet; run it without --extend first")
    budget = spec.budget.model_copy(update={"trials": old.budget.trials + extend})
    return spec.model_copy(update={"budget": budget})


def _with_what_was_confirmed(spec: StudySpec, stored: Study) -> StudySpec:
    """Runs of finalists that are there are never too many: what is asked for is at least what was."""
    scored = {final.importance_samples for final in stored.final_rows() if final.state != "RUNNING"}
    if not scored:
        return spec
    asked, old = spec.finalists, stored.spec.finalists
    if asked.confirm and scored != {asked.importance_samples}:
        raise InputError(
            f"{stored.path}: finalists.importance_samples = {asked.importance_samples}, and its finalists were scored "
            f"with {scored.pop()}: values compare at the same number alone"
        )
    at_least = {name: max(getattr(asked, name), getattr(old, name)) for name in ("confirm", "seeds", "per_activation")}
    return spec.model_copy(update={"finalists": old.model_copy(update=at_least)})
