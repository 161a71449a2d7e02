"""The commands that use a trained model. `search.cli` registers them; what they do is in `search.use`."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from search.cli_options import (
    ANEW,
    DataDir,
    Json,
    MovedDir,
    Storage,
    complete_study,
    ctrl_c_explained,
    print_json,
    print_lines,
    say,
)
from search.layout import DEFAULT_STORAGE
from search.model_output import (
    LATENTS_FORMATS,
    ROW,
    VALUES_FORMATS,
    check_output,
    check_picture,
    grid_columns,
    output_format,
    write_columns,
    write_values,
)
from vae.config import InputError

if TYPE_CHECKING:
    from search.model_output import Written
    from search.use import Progress, Rows
    from vae.loaded import Model


ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Folder of an exported model, or a study: its best.", autocompletion=complete_study
    ),
]
Data = Annotated[
    str | None,
    typer.Option(help="digits, mnist, fashion-mnist or a file.", show_default="what the model was trained on"),
]
Split = Annotated[
    str | None, typer.Option(help="train, validation, test or all.", show_default="test, and of --data all")
]
NumRows = Annotated[int | None, typer.Option("--rows", help="The first rows alone.")]
Draws = Annotated[bool, typer.Option("--draws", help="Draws in place of means.")]
Seed = Annotated[int, typer.Option(help="Seed of what is drawn.")]
Output = Annotated[
    Path | None,
    typer.Option(
        "-o", "--output", help="A .png, .npy, .csv or .parquet file.", show_default="CSV on stdout, of tables"
    ),
]


@ctrl_c_explained(ANEW)
def evaluate(
    model: ModelName,
    data: Annotated[str | None, typer.Option(help="Data to evaluate on.", show_default="those it was made on")] = None,
    data_dir: MovedDir = None,
    importance_samples: Annotated[int, typer.Option(help="Latents drawn for each row.")] = 5000,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    seed: Annotated[int, typer.Option(help="Seed of the latents' noise.")] = 0,
    rows: Annotated[int | None, typer.Option(help="The first rows of the split alone.")] = None,
    per_image: Annotated[bool, typer.Option("--per-image", help="Values of each row, into the file of -o.")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="A .parquet or .csv file.")] = None,
    storage: Storage = DEFAULT_STORAGE,
    json: Json = False,
) -> None:
    """The likelihood of data under a model, by importance sampling."""
    if per_image != (output is not None):
        raise InputError("--per-image and -o FILE go together; the file ends in .parquet or .csv")
    output_format(output, ("parquet", "csv"))

    from search.evaluation import evaluate_model, evaluation_lines
    from search.output import plain
    from search.progress import counting
    from search.use import model_folder

    with model_folder(model, storage) as folder, counting("rows") as count:
        evaluation = evaluate_model(
            folder,
            name=model,
            data=data,
            data_dir=data_dir,
            split=split,
            importance_samples=importance_samples,
            seed=seed,
            rows=rows,
            say=say,
            count=count,
        )
    if output is not None:
        write_columns(evaluation.per_image(), output)
    if json:
        print_json(plain(evaluation.document()))
    else:
        print_lines(evaluation_lines(evaluation))


@ctrl_c_explained(ANEW)
def sample(
    model: ModelName,
    n: Annotated[int, typer.Option("-n", "--number", help="How many.")] = 64,
    output: Output = None,
    draws: Draws = False,
    seed: Seed = 0,
    storage: Storage = DEFAULT_STORAGE,
    json: Json = False,
) -> None:
    """New images or rows from a model."""
    _check_output(output, json)
    from search import use

    opened = _open(model, storage, output)
    check_picture(opened, output, n)
    with _progress(n) as progress:
        values = use.sample(opened, n, draws=draws, seed=seed, progress=progress)
    _tell(write_values(opened, values, output, columns=grid_columns(n)), json)


@ctrl_c_explained(ANEW)
def reconstruct(
    model: ModelName,
    data: Data = None,
    data_dir: DataDir = None,
    split: Split = None,
    rows: NumRows = None,
    output: Output = None,
    draws: Draws = False,
    seed: Seed = 0,
    storage: Storage = DEFAULT_STORAGE,
    json: Json = False,
) -> None:
    """What a model makes of data; a picture shows each row's original above it."""
    _check_output(output, json)
    import numpy as np

    from search import use

    opened = _open(model, storage, output)
    found = _rows(opened, data, data_dir, split).first(rows)
    if output is not None and output.suffix.lower() == ".png" and rows is None:
        if len(found.values) > use.PICTURED_ROWS:
            say(f"{output}: the first {use.PICTURED_ROWS} of {len(found.values):,} rows; --rows asks for more")
        found = found.first(use.PICTURED_ROWS)
    check_picture(opened, output, 2 * len(found.values))
    with _progress(len(found.values)) as progress:
        values = use.reconstruct(opened, found, draws=draws, seed=seed, progress=progress)
    beside = {ROW: np.arange(len(values))}
    columns = grid_columns(len(values))
    written = write_values(opened, values, output, beside=beside, originals=found.values, columns=columns)
    _tell(written, json)


@ctrl_c_explained(ANEW)
def encode(
    model: ModelName,
    data: Data = None,
    data_dir: DataDir = None,
    split: Split = None,
    rows: NumRows = None,
    to: Annotated[
        Path | None,
        typer.Option("--to", "-o", "--output", help="A .parquet, .csv or .npy file.", show_default="CSV on stdout"),
    ] = None,
    draws: Draws = False,
    seed: Seed = 0,
    storage: Storage = DEFAULT_STORAGE,
    json: Json = False,
) -> None:
    """The latents of data: mean and log variance of each, or draws."""
    _check_output(to, json, flag="--to", known=LATENTS_FORMATS)
    from search import use

    opened = use.open_model(model, storage)
    found = _rows(opened, data, data_dir, split).first(rows)
    with _progress(len(found.values)) as progress:
        table = use.encode(opened, found, draws=draws, seed=seed, progress=progress)
    _tell(write_columns(table, to), json)


@ctrl_c_explained(ANEW)
def decode(
    model: ModelName,
    latents: Annotated[
        Path, typer.Option(help="A .parquet or .csv file with columns mu_0.. or z_0.., or an .npy array.")
    ],
    output: Output = None,
    draws: Draws = False,
    seed: Seed = 0,
    storage: Storage = DEFAULT_STORAGE,
    json: Json = False,
) -> None:
    """Images or rows from latents, such as `encode` writes."""
    _check_output(output, json)
    from search import use

    opened = _open(model, storage, output)
    found = use.read_latents(latents, opened.latent_dim)
    check_picture(opened, output, len(found.z))
    with _progress(len(found.z)) as progress:
        values = use.decode(opened, found, draws=draws, seed=seed, progress=progress)
    columns = grid_columns(len(values))
    _tell(write_values(opened, values, output, beside={ROW: found.row}, columns=columns), json)


@ctrl_c_explained(ANEW)
def interpolate(
    model: ModelName,
    start: Annotated[int, typer.Option("--from", metavar="ROW", help="The row to begin with, counted from 0.")],
    end: Annotated[int, typer.Option("--to", metavar="ROW", help="The row to end with.")],
    data: Data = None,
    data_dir: DataDir = None,
    split: Split = None,
    steps: Annotated[int, typer.Option(help="How many, the two rows' own among them.")] = 10,
    spherical: Annotated[bool, typer.Option("--spherical", help="Along a great circle, not a straight line.")] = False,
    output: Output = None,
    storage: Storage = DEFAULT_STORAGE,
    json: Json = False,
) -> None:
    """From one row of data to another, by way of the latents between their means."""
    _check_output(output, json)
    import numpy as np

    from search import use

    opened = _open(model, storage, output)
    found = _rows(opened, data, data_dir, split)
    ends = found.one(start, "--from"), found.one(end, "--to")
    with _warnings_said():
        values = use.interpolate(opened, *ends, steps=steps, spherical=spherical)
    beside = {"share": np.linspace(0, 1, steps)}
    _tell(write_values(opened, values, output, beside=beside, columns=steps), json)


@ctrl_c_explained(ANEW)
def traverse(
    model: ModelName,
    dims: Annotated[str | None, typer.Option(help="Which latents: 0,3,5.", show_default="all")] = None,
    steps: Annotated[int, typer.Option(help="Points of each latent.")] = 7,
    range_: Annotated[
        float, typer.Option("--range", help="How far to each side, in standard deviations of the prior.")
    ] = 3.0,
    around: Annotated[
        int | None, typer.Option(metavar="ROW", help="The row of data at whose mean the other latents stay, not at 0.")
    ] = None,
    data: Data = None,
    data_dir: DataDir = None,
    split: Split = None,
    output: Output = None,
    storage: Storage = DEFAULT_STORAGE,
    json: Json = False,
) -> None:
    """What each latent does: one at a time is moved, the others stay; a picture has a line for each."""
    _check_output(output, json)
    if around is None and any(option is not None for option in (data, data_dir, split)):
        raise InputError("--data, --data-dir and --split say where the row of --around ROW is; give that, too")
    chosen = _numbers(dims)
    from search import use

    opened = _open(model, storage, output)
    row = None if around is None else _rows(opened, data, data_dir, split).one(around, "--around")
    with _warnings_said():
        latent, value, values = use.traverse(opened, dims=chosen, steps=steps, limit=range_, around=row)
    labels = [f"z {dim}" for dim in latent[::steps]]
    beside = {"latent": latent, "value": value}
    _tell(write_values(opened, values, output, beside=beside, columns=steps, labels=labels), json)


def _check_output(output: Path | None, json: bool, flag: str = "-o", known: Sequence[str] = VALUES_FORMATS) -> None:
    """Before anything heavy is imported."""
    if json and output is None:
        raise InputError(f"--json tells what was written: give {flag} FILE, too")
    output_format(output, known, flag)


def _open(model: str, storage: str, output: Path | None) -> "Model":
    from search.use import open_model

    opened = open_model(model, storage)
    check_output(opened, output)
    return opened


def _rows(model: "Model", data: str | None, data_dir: str | None, split: str | None) -> "Rows":
    from search.use import read_rows

    return read_rows(model, data, data_dir, split, say)


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--dims {text}: expected numbers with commas between them, such as 0,3,5") from None


@contextmanager
def _progress(total: int) -> Iterator["Progress"]:
    from search.progress import counting

    done = 0

    def tell(more: int) -> None:
        nonlocal done
        done += more
        count(done, total)

    with counting("rows") as count, _warnings_said():
        count(0, total)
        yield tell


@contextmanager
def _warnings_said() -> Iterator[None]:
    """What the model warns of, as a line for people."""
    said: set[str] = set()

    def tell(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in said:
            said.add(str(message))
            say(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = tell
        yield


def _tell(written: "Written", json: bool) -> None:
    if json:
        from dataclasses import asdict

        print_json(asdict(written))
    elif written.path is not None:
        print(written.path)
