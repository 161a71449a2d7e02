"""The commands that train a configuration of a study again. `search.cli` registers them; see `search.replay` and
`search.refit` for what they do."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from search.cli_options import (
    ANEW,
    Json,
    MovedData,
    MovedDir,
    Name,
    Onnx,
    Storage,
    ctrl_c_explained,
    is_onnx_written,
    print_json,
    print_lines,
    say,
    study_folder,
    tell_refused,
)
from search.interrupts import Interrupted
from search.layout import DEFAULT_STORAGE

if TYPE_CHECKING:
    from search.replay import Replay, Tell
    from vae.training import EpochMetrics

EPOCHS_SHOWN = 10

Trial = Annotated[int, typer.Argument(help="Number of the trial.", min=0)]


@ctrl_c_explained(ANEW)
def replay(
    study: Name,
    trial: Trial,
    storage: Storage = DEFAULT_STORAGE,
    data: MovedData = None,
    data_dir: MovedDir = None,
    json: Json = False,
) -> None:
    """Train one trial again from the tables alone, and compare. Exit status 1 beyond the tolerance."""
    from search.results import open_study

    opened = open_study(study_folder(storage, study))

    from search.output import plain
    from search.replay import replay as replay_trial
    from search.replay import replay_lines

    with _epochs_shown() as tell:
        replayed = replay_trial(opened, trial, data=data, data_dir=data_dir, tell=tell)
    if json:
        print_json(plain(replayed.document()))
    else:
        print_lines([*replay_lines(replayed), *_table(replayed)])
    if replayed.verdict == "different":
        raise typer.Exit(1)


@ctrl_c_explained("what was trained before stays; the same command goes on with it, or begins")
def refit(
    study: Name,
    epochs: Annotated[int, typer.Option(help="Epochs to train for; schedules span them.")],
    trial: Annotated[int | None, typer.Option(help="Whose configuration.", show_default="the best")] = None,
    storage: Storage = DEFAULT_STORAGE,
    data: Annotated[str | None, typer.Option(help="Other data of the same kind, or the same if they moved.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="Folder with the idx files.")] = None,
    train_on: Annotated[
        str, typer.Option(help="train, or train+validation: the value is then that of the test split.")
    ] = "train",
    to: Annotated[
        Path | None, typer.Option(help="The folder to write.", show_default="models/STUDY-trial-N-refit")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, order and noise.", show_default="the trial's")] = None,
    onnx: Onnx = None,
    json: Json = False,
) -> None:
    """Train a chosen configuration for longer, or on more data, and export it. If it is cut off, the same goes on."""
    from search.results import open_study

    with_onnx = is_onnx_written(onnx)
    opened = open_study(study_folder(storage, study))

    from search.refit import refit as refit_trial
    from search.refit import refit_lines

    done = 0
    try:
        with _epochs_shown("now its files, each checked") as tell:

            def tell_and_count(epoch: int, of: int, metrics: "EpochMetrics") -> None:
                nonlocal done
                done = epoch
                tell(epoch, of, metrics)

            refitted = refit_trial(
                opened,
                epochs=epochs,
                trial=trial,
                data=data,
                data_dir=data_dir,
                train_on=train_on,
                to=to,
                seed=seed,
                programs=True,
                onnx=with_onnx,
                tell=tell_and_count,
                say=say,
            )
    except Interrupted as interrupted:
        where = f"with {done} of {epochs} epochs done" if done else "before a further epoch was done"
        say(f"interrupted {where}; go on with: {shlex.join(['vaesearch', *sys.argv[1:]])}")
        raise typer.Exit(128 + interrupted.signum) from None
    tell_refused(refitted.folder)
    if json:
        from dataclasses import asdict

        from search.output import plain

        print_json(plain(asdict(refitted)))
    else:
        print_lines(refit_lines(refitted))
        print(f"next:\n  vaesearch evaluate {shlex.quote(refitted.folder)}")


def _table(replayed: "Replay") -> list[str]:
    """Epochs that differ, the first and then some up to the last."""
    differing = replayed.differing
    if not differing:
        return []
    step = max(1, -(-len(differing) // EPOCHS_SHOWN))
    shown = sorted({0, *range(0, len(differing), step), len(differing) - 1})
    lines = ["", f"{'epoch':>5}  {'val_nelbo then':>16}  {'now':>16}  {'difference':>10}  what differs"]
    for epoch in (differing[index] for index in shown):
        then = epoch.then["val_nelbo"]
        if epoch.now is None:
            lines.append(f"{epoch.epoch:5}  {then:16.10g}  {'':16}  {'':10}  not reached")
            continue
        now, names = epoch.now["val_nelbo"], epoch.differing
        what = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(f"{epoch.epoch:5}  {then:16.10g}  {now:16.10g}  {now - then:10.2g}  {what}")
    if len(shown) < len(differing):
        lines.append(f"{len(shown)} of the {len(differing)} epochs that differ; --json has all")
    return lines


@contextmanager
def _epochs_shown(then: str = "") -> Iterator["Tell"]:
    """then: what is done after the last one."""
    from search.progress import counting

    with counting("epochs") as count:

        def tell(done: int, total: int, metrics: "EpochMetrics") -> None:
            count(done, total, then if then and done == total else f"train nelbo {metrics.train_nelbo:.3f}")

        yield tell
