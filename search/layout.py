"""Where the files of a study lie and how its tables are versioned. Light: importing this loads no pyarrow."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from search.storage import Location

SCHEMA_VERSION = "4"
"""Of the tables; each part has it in its footer."""

STUDY_FILE = "study.toml"
DEFAULT_STORAGE = "studies"

TABLES = ("epochs", "diagnostics", "layers", "attempts", "final_images", "finals", "trials")
"""In the order in which they are written: what a trial's row sums up is there before it."""


def study_folders(storage: "Location") -> "list[Location]":
    """The folders of all studies of a storage folder, by name."""
    return sorted((file.parent for file in storage.glob(f"*/{STUDY_FILE}")), key=lambda folder: folder.name)


def part_files(study_path: "Location", table: str) -> "list[Location]":
    """The parts of a table, oldest first; [] if there is none yet."""
    return sorted((study_path / table).glob("part-*.parquet"), key=lambda path: path.name)
