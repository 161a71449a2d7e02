"""What is checked before anything is written: an error here leaves no trace on disk."""

import tempfile
from pathlib import Path

from search.results import Study
from search.spec import StudySpec, spec_diff
from vae.config import InputError
from vae.data import Dataset


def check_batches(spec: StudySpec, data: Dataset) -> None:
    entry = spec.space.batch_size if spec.space.batch_size is not None else spec.train.batch_size
    key = "space.batch_size" if spec.space.batch_size is not None else "train.batch_size"
    largest = entry.high if hasattr(entry, "high") else max(entry) if isinstance(entry, tuple) else entry
    if largest > len(data.train):
        raise InputError(
            f"{data.config.source}: {len(data.train)} rows to train on are fewer than a batch; "
            f"set {key} = {len(data.train)} or lower, or bring more rows"
        )


def check_fingerprint(study: Study, data: Dataset) -> None:
    """Raises InputError if the data are not those the study was made on."""
    fingerprint = study.provenance["data_fingerprint"]
    if fingerprint != data.fingerprint:
        raise InputError(
            f"{study.path}: the study was made on other data (SHA-256 {fingerprint[:12]}..., "
            f"those of {data.config.source} have {data.fingerprint[:12]}...); bring those back or use another --name"
        )


def same_study(spec: StudySpec, stored: Study, data: Dataset, extend: int) -> StudySpec:
    """The spec to go on with. Raises InputError with a diff if what is asked for is another study."""
    check_fingerprint(stored, data)
    old = stored.spec
    before, after = old.identity(), spec.identity()
    asked = after["budget.trials"]
    if asked in (stored.provenance["trials_at_first"], before["budget.trials"]):
        after["budget.trials"] = before["budget.trials"]  # the command that began it, also after an extension
    if diff := spec_diff(before, after):
        raise InputError(
            f"{stored.path}: the study there is another one: {'; '.join(diff)}\n"
            f"use another --name, or --extend N for more trials of the same"
        )
    if extend and stored.summary().ended < old.budget.trials:
        raise InputError(f"{stored.path}: not complete yet; run it without --extend first")
    budget = old.budget.model_copy(update={"trials": old.budget.trials + extend})
    return spec.model_copy(update={"budget": budget})


def check_writable(storage: Path) -> None:
    """Raises InputError if the storage folder could not be made or written. Leaves nothing there."""
    folder = storage.absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"{storage}: cannot be written: {error.strerror}; name another folder with --storage"
        ) from None
