"""The studies of a storage folder as a table, one row each, for SQL."""

from typing import Any

import pyarrow as pa

from search.results import Study

STUDIES = pa.schema(
    [
        ("study", pa.string()),
        ("goal", pa.string()),
        ("seed", pa.int64()),
        ("source", pa.string()),
        ("data_fingerprint", pa.string()),
        ("binarize", pa.string()),
        ("body", pa.string()),
        ("likelihood", pa.string()),
        ("train_objective", pa.string()),
        ("trials", pa.int32()),  # asked for
        ("max_epochs", pa.int32()),
        ("created_at", pa.timestamp("us", tz="UTC")),
        ("path", pa.string()),
    ]
)


def studies_table(studies: list[Study]) -> pa.Table:
    return pa.Table.from_pylist([_study_row(study) for study in studies], schema=STUDIES)


def _study_row(study: Study) -> dict[str, Any]:
    spec, provenance = study.spec, study.provenance
    return {
        "study": study.name,
        "goal": spec.goal,
        "seed": spec.seed,
        "source": spec.data.source,
        "data_fingerprint": provenance["data_fingerprint"],
        "binarize": spec.data.binarize,
        "body": spec.model.body,
        "likelihood": spec.model.likelihood,
        "train_objective": spec.train.objective,
        "trials": spec.budget.trials,
        "max_epochs": spec.budget.max_epochs,
        "created_at": provenance["created_at"],
        "path": str(study.path),
    }
