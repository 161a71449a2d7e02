"""The figures of a study as plotly objects: for a notebook, and for the page that `search.report` writes of it.

Each is sensible also where little or nothing is known yet: then it has no trace, and `layout.meta["note"]` says why.
Of many trials some are drawn, and the note says which.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from plotly import graph_objects as go
from plotly.subplots import make_subplots

from search.comparison_words import p_text, sd_text
from search.drawing import (
    COLOURS,
    LOG_SPAN,
    MAX_POINTS,
    QUIET,
    band,
    blank,
    cap_of,
    escaped,
    faint,
    finish,
    grouped,
    in_rows,
    is_number,
    jitter,
    line_at,
    look_of,
    note,
    note_thinned,
    nothing,
    padded,
    points_of,
    share_of_points,
    short,
    shortened,
    thin,
)
from search.progress import params_text
from search.results import Study, best_of_each
from search.spec import Range, StudySpec
from search.tables import TrialRow

if TYPE_CHECKING:
    from search.comparison import Arm, Comparison

WORST_TO_BEST = ((0.0, "#9a9fa6"), (0.5, "#7d97c2"), (1.0, "#1f74e0"))
MAX_CURVES, MAX_CURVE_POINTS = 60, 60


# ---- the verdict


def forest(comparison: "Comparison") -> go.Figure:
    """The finalists' test NLL with 95 % intervals; before there are any, the best trial of each activation."""
    if comparison.verdict is None:
        return _best_of_each(comparison.arms)
    estimates = {estimate.name: estimate for estimate in comparison.verdict.estimates}
    names = [arm.activation for arm in comparison.arms if arm.activation in estimates]
    figure = blank("Test loss of each activation, with 95 % intervals", "negative log-likelihood, nats per example")
    for place, name in enumerate(names):
        e = estimates[name]
        text = f"<b>{escaped(name)}</b><br>mean {e.mean:.3f} [{e.interval.low:.3f}, {e.interval.high:.3f}]"
        text += f"<br>median {e.median:.3f}, interquartile mean {e.iqm:.3f}, sd over seeds {sd_text(e)}"
        text += f"<br>first in {e.first:.0%} of the draws"
        figure.add_trace(_with_interval(name, e.mean, e.interval.low, e.interval.high, place, text))
    leader = min((estimates[name] for name in names), key=lambda e: e.mean, default=None)
    if leader is not None and comparison.verdict.rope > 0:
        rope = comparison.verdict.rope
        band(figure, leader.mean - rope, leader.mean + rope)
        note(
            figure, f"The shaded band is {rope:.2g} nats to either side of {leader.name}: within it, as good as equal."
        )
    return finish(in_rows(figure, names))


def differences(comparison: "Comparison") -> go.Figure:
    """What every activation loses against the leader, seed by seed, with 95 % intervals."""
    figure = blank("Loss beyond the leader's, seed by seed", "difference, nats per example")
    verdict = comparison.verdict
    if verdict is None:
        return nothing(figure, "There are no two finalists yet that were trained from the same seeds.")
    means = {estimate.name: estimate.mean for estimate in verdict.estimates}
    leader = min(means, key=lambda name: means[name], default="")
    names: list[str] = []
    lows: list[float] = []
    highs: list[float] = []
    for arm in comparison.arms:
        name = arm.activation
        found = next((pair for pair in verdict.pairs if {pair.a, pair.b} == {name, leader}), None)
        if found is None or name == leader:
            continue
        sign = 1 if found.a == name else -1
        low, high = sorted((sign * found.interval.low, sign * found.interval.high))
        text = f"<b>{escaped(name)}</b> against {escaped(leader)}<br>{sign * found.difference:+.3f} "
        text += f"[{low:+.3f}, {high:+.3f}] nats"
        text += f"<br>p {p_text(found.p_value)}, after Holm {p_text(found.p_holm)}"
        figure.add_trace(_with_interval(name, sign * found.difference, low, high, len(names), text))
        names.append(name)
        lows.append(low)
        highs.append(high)
    if not names:
        return nothing(figure, "There is only one finalist.")
    line_at(figure, x=0)
    if verdict.rope > 0:
        band(figure, -verdict.rope, verdict.rope)
    note(figure, f"To the right of 0: worse than {leader}. The shaded band counts as equal.")
    figure.layout.xaxis.range = padded(min(-verdict.rope, *lows), max(verdict.rope, *highs))  # 0 and the band, too
    return finish(in_rows(figure, names))


def _with_interval(name: str, x: float, low: float, high: float, y: int, text: str) -> go.Scatter:
    """A point of an activation, and a bar from low to high."""
    error = {"array": [high - x], "arrayminus": [x - low]}
    style = {"type": "data", "symmetric": False, "thickness": 2.5, "width": 5}
    return points_of(name, [x], [y], [text], size=11, error_x=style | error)


def _best_of_each(arms: Sequence["Arm"]) -> go.Figure:
    found = [(arm.activation, arm.best) for arm in arms if arm.best is not None and is_number(arm.best.ranks_by)]
    unit = _unit(row for _, row in found)
    figure = blank("The best trial of each activation", f"validation loss, {unit}")
    if not found:
        return nothing(figure, "No healthy trial has trained to its last epoch yet.")
    for place, (name, row) in enumerate(found):
        assert row.ranks_by is not None
        figure.add_trace(points_of(name, [row.ranks_by], [place], [_of_trial(row)], size=11))
    note(figure, "One run each: the best of many looks better than it is, so there are no intervals here.")
    return finish(in_rows(figure, [name for name, _ in found]))


def expected_best(comparison: "Comparison") -> go.Figure:
    """What so many trials of an activation are expected to find, from those at settings common to all."""
    figure = blank("The best to be expected of so many trials", "trials", "validation loss, nats per example")
    known = [arm for arm in comparison.arms if arm.expected_best]
    most = max((len(arm.expected_best) for arm in known), default=0)
    counts = thin(sorted({round(most ** (step / 200)) for step in range(201)}), MAX_CURVE_POINTS)
    for arm in known:
        name, (low, high) = arm.activation, arm.expected_band
        known_counts = [count for count in counts if count <= min(len(low), len(high))]
        outline = [(count, high[count - 1]) for count in known_counts]
        outline += [(count, low[count - 1]) for count in reversed(known_counts)]
        figure.add_trace(
            go.Scatter(
                name=name,
                legendgroup=name,
                x=[count for count, _ in outline],
                y=shortened(value for _, value in outline),
                mode="lines",
                line={"width": 0},
                fill="toself",
                fillcolor=faint(look_of(name).colour, 0.13),
                hoverinfo="skip",
                showlegend=False,
            )
        )
    for arm in known:
        name = arm.activation
        points = [(count, arm.expected_best[count - 1]) for count in counts if count <= len(arm.expected_best)]
        texts = [f"<b>{escaped(name)}</b><br>best of {count}: {value:.3f}" for count, value in points]
        line = points_of(name, [count for count, _ in points], [value for _, value in points], texts, size=5)
        line.update(mode="lines+markers", line={"color": look_of(name).colour, "width": 2})
        figure.add_trace(line)
    if most > LOG_SPAN:
        figure.update_xaxes(type="log")
    if not figure.data:
        return nothing(figure, "Needs trials at settings common to all activations: goal = compare-activations.")
    note(figure, "Bands hold 95 % of what chance does to the trials drawn.")
    return finish(figure, cap=cap_of(value for arm in known for value in arm.expected_best))


def cost_front(comparison: "Comparison") -> go.Figure:
    """What an epoch costs against what comes of it; no activation is both better and faster than one on the line."""
    means = {e.name: e.mean for e in comparison.verdict.estimates} if comparison.verdict else {}
    figure = blank("Cost against loss", "seconds an epoch", "test loss, nats" if means else "best trial's loss, nats")
    placed: list[tuple[Arm, float, float]] = []
    for arm in comparison.arms:
        loss = means.get(arm.activation, arm.best.ranks_by if arm.best is not None and not means else None)
        if arm.epoch_s is not None and loss is not None and is_number(loss):
            placed.append((arm, arm.epoch_s, loss))
    if not placed:
        return nothing(figure, "No activation has both a cost and a result yet.")
    front = sorted((cost, loss) for arm, cost, loss in placed if arm.is_on_front)
    figure.add_trace(
        go.Scatter(
            x=shortened(cost for cost, _ in front),
            y=shortened(loss for _, loss in front),
            mode="lines",
            line={"color": QUIET, "width": 1.5, "dash": "dot"},
            hoverinfo="skip",
            showlegend=False,
        )
    )
    for arm, cost, loss in placed:
        size = f", {arm.num_parameters:,} parameters" if arm.num_parameters is not None else ""
        text = f"<b>{escaped(arm.activation)}</b><br>{loss:.3f} nats at {cost:.3g} s an epoch{size}"
        point = points_of(arm.activation, [cost], [loss], [text], size=11)
        point.update(mode="markers+text", text=[escaped(arm.activation)], textposition="top center", cliponaxis=False)
        figure.add_trace(point)
    note(figure, "No activation is both better and faster than those on the dotted line.")
    losses, costs = [loss for _, _, loss in placed], [cost for _, cost, _ in placed]
    figure.update_xaxes(range=padded(min(costs), max(costs), 0.12))
    figure.update_yaxes(range=padded(min(losses), max(losses), 0.12))
    return finish(figure)


def importances(comparison: "Comparison") -> go.Figure:
    """Which parameters matter: shares by PED-ANOVA, with failed trials and without."""
    figure = blank("What matters", "share of the importance")
    found = comparison.importances
    if not found:
        return nothing(figure, "Needs more trials that cover the space evenly: goal = compare-activations.")
    names = sorted(found, key=lambda name: -found[name])
    healthy = comparison.importances_without_failures
    series = [("all trials", found, COLOURS[0])]
    if healthy and healthy != found:
        series.append(("without those that failed", healthy, QUIET))
        note(figure, "Blue: all trials at the common settings; grey: without those that failed.")
    height = 0.8 / len(series)
    for number, (label, shares, colour) in enumerate(series):
        values = [shares.get(name, 0.0) for name in names]
        figure.add_trace(
            go.Bar(
                name=label,
                orientation="h",
                x=shortened(values),
                y=[place - 0.4 + height * (number + 0.5) for place in range(len(names))],
                width=[height * 0.9] * len(names),
                marker={"color": colour},
                hovertext=[
                    f"<b>{escaped(name)}</b>, {label}: {value:.0%}" for name, value in zip(names, values, strict=True)
                ],
                hoverinfo="text",
            )
        )
    figure.update_xaxes(tickformat=".0%", range=[0, 1.05 * max(max(shares.values()) for _, shares, _ in series) or 1])
    return finish(in_rows(figure, names))


# ---- the search


def learning_curves(study: Study) -> go.Figure:
    """Loss by epoch: bold the best of each activation, a cross where a trial was stopped before its last epoch."""
    rows = study.rows()
    figure = blank("Learning curves", "epoch", f"validation loss, {_unit(rows)}")
    drawn = _curves_to_draw(rows)
    curves = _curves(study.epochs(), {row.trial for row in drawn})
    drawn = [row for row in drawn if row.trial in curves]
    if not drawn:
        return nothing(figure, "No epoch has been reported yet.")
    leading = {row.trial for row in best_of_each(rows).values()}
    by_activation: dict[str, list[TrialRow]] = defaultdict(list)
    for row in drawn:
        by_activation[row.activations].append(row)
    for name, its_rows in by_activation.items():
        others = [row for row in its_rows if row.trial not in leading]
        figure.add_trace(_joined_curves(name, others, curves, width=1, opacity=0.45))
    for name, its_rows in by_activation.items():
        ends = [(row, *curves[row.trial][-1]) for row in its_rows if _was_cut_short(row)]
        texts = [f"{_of_trial(row)}<br>{_end(row)} at epoch {epoch}" for row, epoch, _ in ends]
        crosses = points_of(name, [e for _, e, _ in ends], [v for _, _, v in ends], texts, size=7)
        crosses.marker.update(symbol="x-thin", line={"width": 1.5, "color": look_of(name).colour})
        crosses.showlegend = False
        figure.add_trace(crosses)
        bold = _joined_curves(name, [row for row in its_rows if row.trial in leading], curves, width=3, opacity=1)
        figure.add_trace(bold)
    baseline = _baseline(rows)
    cap = _cap_of_curves(curves.values(), baseline)
    if baseline is not None and (cap is None or baseline <= cap):
        line_at(figure, y=baseline)
        figure.add_annotation(
            x=1, xref="paper", y=baseline, text="no latents", showarrow=False, xanchor="right", yanchor="bottom"
        )
    notes = ["Bold: the best of each activation. A cross: ended before its last epoch."]
    if len(drawn) < len(rows):
        notes.append(
            f"{len(drawn):,} of {len(rows):,} trials are drawn: the best of each activation, and an even choice."
        )
    note(figure, " ".join(notes))
    return finish(figure, cap=cap)


def searched(rows: Sequence[TrialRow]) -> list[str]:
    """The parameters that differ between trials, without the activation."""
    values: dict[str, set[Any]] = defaultdict(set)
    for row in rows:
        for name, value in row.params.items():
            values[name].add(value)
    return [name for name, found in values.items() if len(found) > 1 and name != "activation"]


def parameter_slice(study: Study, parameter: str) -> go.Figure:
    """One parameter against the loss: filled where a trial had its full budget, hollow where it was stopped."""
    rows = [row for row in study.rows() if parameter in row.params]
    name = parameter.replace("_", " ")
    figure = blank(f"Loss by {name}", name, "validation loss", height=300)
    known = [(row, row.params[parameter], _loss(row)) for row in rows if row.status in (None, "ok")]
    known = [(row, value, loss) for row, value, loss in known if is_number(loss)]
    if not known:
        return nothing(figure, "No healthy trial has a value yet.")
    full = thin(sorted((k for k in known if _is_full(k[0])), key=lambda k: k[2]), MAX_POINTS)
    stopped = thin(sorted((k for k in known if not _is_full(k[0])), key=lambda k: k[2]), MAX_POINTS // 2)
    numbers = [value for _, value, _ in known if not isinstance(value, str)]
    categories = sorted({str(value) for _, value, _ in known}) if not numbers else []
    for entries, is_full in ((stopped, False), (full, True)):
        for activation, its in grouped(entries, lambda entry: entry[0].activations).items():
            xs = [categories.index(str(v)) + jitter(row.trial) if categories else v for row, v, _ in its]
            points = points_of(
                activation, xs, [loss for _, _, loss in its], [_of_trial(row) for row, _, _ in its], size=7
            )
            if not is_full:
                points.marker.update(symbol=f"{look_of(activation).symbol}-open", opacity=0.65)
                points.showlegend = False
            figure.add_trace(points)
    if categories:
        figure.update_xaxes(
            tickvals=list(range(len(categories))), ticktext=categories, range=[-0.5, len(categories) - 0.5]
        )
    elif min(numbers) > 0 and _is_logarithmic(study.spec, parameter, numbers):
        figure.update_xaxes(type="log")
    note_thinned(figure, len(full) + len(stopped), len(known))
    cap = cap_of([loss for _, _, loss in full] or [loss for _, _, loss in stopped])
    baseline = _baseline(rows)
    return finish(figure, cap=cap if baseline is None else max(cap, baseline))


def slices(study: Study) -> go.Figure:
    """All searched parameters against the loss, side by side."""
    names = searched(study.rows())
    if not names:
        return nothing(blank("Parameters", "", ""), "No parameter differs between trials yet.")
    parts = [parameter_slice(study, name) for name in names]
    columns = min(3, len(parts))
    lines = -(-len(parts) // columns)
    whole = make_subplots(lines, columns, horizontal_spacing=0.08, vertical_spacing=0.25 / lines)
    whole.update_layout(blank("Parameters", "", "", height=320 * lines).layout)
    shown: set[str] = set()
    for place, part in enumerate(parts):
        line, column = place // columns + 1, place % columns + 1
        for trace in part.data:
            trace.showlegend = trace.showlegend is not False and trace.name not in shown
            shown |= {trace.name} if trace.showlegend else set()
            whole.add_trace(trace, line, column)
        whole.update_xaxes(part.layout.xaxis, row=line, col=column)
        whole.update_yaxes(part.layout.yaxis, row=line, col=column)
        whole.update_yaxes(title=None, row=line, col=column)
    return whole


def learning_rates(study: Study) -> go.Figure:
    """Learning rate x activation: which rates suit which activation. The bluer and larger, the lower the loss."""
    rows = [row for row in study.rows() if row.status in (None, "ok") and is_number(_loss(row))]
    figure = blank("Learning rate and activation", "learning rate")
    if not rows:
        return nothing(figure, "No healthy trial has a value yet.")
    names = list(dict.fromkeys(row.activations for row in sorted(rows, key=lambda r: (not _is_full(r), _loss(r)))))
    groups = grouped(rows, lambda row: row.activations).values()
    drawn = [row for its in groups for row in thin(sorted(its, key=_loss), share_of_points(len(groups)))]
    drawn.sort(key=_loss, reverse=True)  # the best on top
    losses = [_loss(row) for row in drawn]
    lowest = min(losses)
    highest = lowest + 2 * (median(losses) - lowest)  # so that the better half has half of the colours
    baseline = _baseline(rows)
    if baseline is not None and baseline > lowest:
        highest = min(highest, baseline)
    share = [1 - min(1.0, (loss - lowest) / ((highest - lowest) or 1.0)) for loss in losses]
    figure.add_trace(
        go.Scatter(
            x=shortened(row.learning_rate for row in drawn),
            y=[names.index(row.activations) + 0.7 * jitter(row.trial) for row in drawn],
            mode="markers",
            marker={
                "color": shortened(share),
                "cmin": 0,
                "cmax": 1,
                "colorscale": [list(stop) for stop in WORST_TO_BEST],
                "size": [round(6 + 7 * s, 1) for s in share],
                "symbol": ["circle" if _is_full(row) else "circle-open" for row in drawn],
                "opacity": 0.85,
                "line": {"width": 0},
            },
            hovertext=[_of_trial(row) for row in drawn],
            hoverinfo="text",
            showlegend=False,
        )
    )
    rates = [row.learning_rate for row in drawn]
    if max(rates) > min(rates):
        figure.update_xaxes(type="log")
    text = f"The bluer and larger, the lower the loss, from {highest:.4g} down to {lowest:.4g} {_unit(rows)}. "
    note(figure, text + "Hollow: stopped early.")
    note_thinned(figure, len(drawn), len(rows))
    return finish(in_rows(figure, names))


# ---- what the models were like


def dead_units(study: Study) -> go.Figure:
    """The share of hidden units without a gradient for any row, in the layer with most of them."""
    worst: dict[int, float] = {}
    for trial, _, dead in _last_of_each(study.layers(), "dead"):
        worst[trial] = max(dead, worst.get(trial, 0.0))
    figure = blank("Dead units", "share of the units of the worst layer")
    return _strip(figure, study.rows(), worst, lambda v: f"{v:.0%} of a layer dead", percent=True)


def active_units(study: Study) -> go.Figure:
    """The share of latent dimensions that are in use."""
    size = {row.trial: row.latent_dim for row in study.rows()}
    looks = _last_of_each(study.diagnostics(), "active_units")
    shares = {trial: units / size[trial] for trial, _, units in looks if trial in size}
    figure = blank("Active latent units", "share of the latent dimensions")
    return _strip(figure, study.rows(), shares, lambda v: f"{v:.0%} of the latents active", percent=True)


def gradient_ratios(study: Study, net: str = "encoder") -> go.Figure:
    """Gradient to weight of the first layer over that of the last: far below 1 vanishes, far above explodes."""
    looks = _last_of_each(study.diagnostics(), f"{net}_gradient_ratio")
    ratios = {trial: ratio for trial, _, ratio in looks if is_number(ratio) and ratio > 0}
    figure = blank(f"Gradients of the {net}", "first layer over last")
    figure.update_xaxes(type="log")
    line_at(figure, x=1)
    return _strip(figure, study.rows(), ratios, lambda v: f"gradient ratio {v:.2g}")


def rate_distortion(study: Study) -> go.Figure:
    """Rate against distortion, the two terms of the bound, at the end of each trial."""
    figure = blank("Rate and distortion", "rate (KL), nats per example", "distortion, nats per example")
    known = {row.trial: row for row in study.rows()}
    distortion = {trial: value for trial, _, value in _last_of_each(study.diagnostics(), "distortion")}
    points = [
        (known[trial], rate, distortion[trial])
        for trial, _, rate in _last_of_each(study.diagnostics(), "rate")
        if trial in known and is_number(rate) and is_number(distortion.get(trial))
    ]
    if not points:
        return nothing(figure, "No model has been looked at yet.")
    drawn = thin(sorted(points, key=lambda p: p[1] + p[2]), MAX_POINTS)
    best = drawn[0][1] + drawn[0][2]
    rates = [rate for _, rate, _ in drawn]
    cap = cap_of(d for _, _, d in drawn)
    figure.add_trace(
        go.Scatter(
            x=shortened([0, max(rates)]),
            y=shortened([best, best - max(rates)]),
            mode="lines",
            line={"color": QUIET, "width": 1.5, "dash": "dot"},
            hoverinfo="skip",
            showlegend=False,
        )
    )
    for name, its in grouped(drawn, lambda p: p[0].activations).items():
        texts = [f"{_of_trial(row)}<br>rate {r:.2f} + distortion {d:.2f} = {r + d:.2f}" for row, r, d in its]
        cloud = points_of(name, [r for _, r, _ in its], [d for _, _, d in its], texts, size=8)
        cloud.marker.opacity = 0.75
        figure.add_trace(cloud)
    note(figure, "Along the dotted line the sum is that of the lowest. Far left: latents that tell nothing.")
    note_thinned(figure, len(drawn), len(points))
    figure.update_xaxes(range=padded(0, max(rates)))
    return finish(figure, cap=cap)


def _strip(
    figure: go.Figure, rows: Sequence[TrialRow], values: Mapping[int, float], say: Any, percent: bool = False
) -> go.Figure:
    """A dot a trial and a bar at the median, a line of them for each activation."""
    known = [(row, values[row.trial]) for row in rows if is_number(values.get(row.trial))]
    if not known:
        return nothing(figure, "No model has been looked at yet.")
    groups = grouped(known, lambda entry: entry[0].activations)
    names = sorted(groups)
    drawn = 0
    for place, name in enumerate(names):
        its = sorted(groups[name], key=lambda entry: entry[1])
        middle = its[len(its) // 2][1]
        shown = thin(its, share_of_points(len(groups)))
        drawn += len(shown)
        ys = [place + 0.8 * jitter(row.trial) for row, _ in shown]
        dots = points_of(name, [v for _, v in shown], ys, [f"{_of_trial(row)}<br>{say(v)}" for row, v in shown], size=7)
        dots.marker.opacity = 0.5
        figure.add_trace(dots)
        bar = points_of(name, [middle], [place], [f"<b>{escaped(name)}</b>, median: {say(middle)}"], size=20)
        bar.marker.update(symbol="line-ns", line={"width": 3, "color": look_of(name).colour})
        bar.showlegend = False
        figure.add_trace(bar)
    note(figure, "A dot a trial, a bar at the median.")
    note_thinned(figure, drawn, len(known))
    if percent:
        figure.update_xaxes(tickformat=".0%", range=[-0.03, 1.03])
    return finish(in_rows(figure, names))


def _last_of_each(table: pa.Table, column: str) -> Iterable[tuple[int, int, Any]]:
    """(trial, epoch, value) of every row of a trial's last look; not of the one before training."""
    if not table.num_rows:
        return []
    last = table.group_by("trial").aggregate([("epoch", "max")])
    until = dict(zip(last["trial"].to_pylist(), last["epoch_max"].to_pylist(), strict=True))
    columns = (table[name].to_pylist() for name in ("trial", "epoch", column))
    return [entry for entry in zip(*columns, strict=True) if entry[1] == until[entry[0]] and entry[1] > 0]


# ---- curves


def _curves_to_draw(rows: Sequence[TrialRow]) -> list[TrialRow]:
    """The best of each activation, and an even choice of the others by their loss."""
    best = best_of_each(list(rows)).values()
    leading = {row.trial for row in best}
    others = [row for row in rows if row.trial not in leading and row.epochs]
    others.sort(key=lambda row: (_loss(row) if is_number(_loss(row)) else math.inf, row.trial))
    return [*best, *thin(others, max(0, MAX_CURVES - len(best)))]


def _curves(epochs: pa.Table, trials: set[int]) -> dict[int, list[tuple[int, float]]]:
    """Of each trial (epoch, what early stopping was told), in order; only finite ones, and not too many."""
    chosen = epochs.filter(pc.is_in(epochs["trial"], pa.array(sorted(trials), epochs["trial"].type)))
    found: dict[int, list[tuple[int, float]]] = defaultdict(list)
    columns = (chosen[name].to_pylist() for name in ("trial", "epoch", "objective"))
    for trial, epoch, value in zip(*columns, strict=True):
        if is_number(value):
            found[trial].append((epoch, value))
    return {trial: thin(sorted(curve), MAX_CURVE_POINTS) for trial, curve in found.items()}


def _joined_curves(
    name: str, rows: Sequence[TrialRow], curves: Mapping[int, list[tuple[int, float]]], width: float, opacity: float
) -> go.Scatter:
    """Curves as one line with gaps."""
    xs: list[float | None] = []
    ys: list[float | None] = []
    texts: list[str | None] = []
    for row in rows:
        label = escaped(f"trial {row.trial}, {row.activations}")
        for epoch, value in curves[row.trial]:
            xs.append(epoch)
            ys.append(short(value))
            texts.append(f"{label}<br>epoch {epoch}: {value:.3f}")
        xs.append(None)
        ys.append(None)
        texts.append(None)
    return go.Scatter(
        name=name,
        legendgroup=name,
        x=xs,
        y=ys,
        mode="lines",
        line={"color": look_of(name).colour, "width": width},
        opacity=opacity,
        hovertext=texts,
        hoverinfo="text",
        showlegend=width > 1,
    )


def _cap_of_curves(curves: Iterable[list[tuple[int, float]]], baseline: float | None) -> float | None:
    """Where the axis ends, so that the first epochs do not flatten all that matters."""
    settled = [value for curve in curves for _, value in curve[len(curve) // 4 :]]
    cap = cap_of(settled, share=0.9)
    lowest = min(settled, default=0.0)
    if cap is not None and baseline is not None and lowest < baseline:
        cap = max(cap, baseline + 0.04 * (baseline - lowest)) if baseline - lowest < 3 * (cap - lowest) else cap
    return cap


# ---- rows


def _is_logarithmic(spec: StudySpec, parameter: str, values: Sequence[float]) -> bool:
    """As the space has it; a list of values is if it spans much."""
    entry = getattr(spec.space, parameter, None)
    return entry.log if isinstance(entry, Range) else max(values) > LOG_SPAN * min(values)


def _loss(row: TrialRow) -> Any:
    return row.val_nelbo if row.train_objective == "elbo" else row.objective


def _baseline(rows: Iterable[TrialRow]) -> float | None:
    """What a model without latents has, where losses are nats: a loss above it tells no more than it."""
    known = (row.no_latent_nelbo for row in rows if row.train_objective == "elbo")
    return next((value for value in known if is_number(value)), None)


def _is_full(row: TrialRow) -> bool:
    return row.state == "COMPLETE"


def _was_cut_short(row: TrialRow) -> bool:
    return row.state in ("PRUNED", "FAIL") and row.epochs < row.max_epochs


def _end(row: TrialRow) -> str:
    return "stopped early" if row.status == "ok" else str(row.status)


def _unit(rows: Iterable[TrialRow]) -> str:
    adversarial = any(row.train_objective != "elbo" for row in rows)
    return "squared error per example" if adversarial else "nats per example"


def _of_trial(row: TrialRow) -> str:
    loss = _loss(row)
    value = f"{loss:.3f} at epoch {row.epochs} of {row.max_epochs}" if is_number(loss) else f"epoch {row.epochs}"
    return f"<b>trial {row.trial}</b>: {value}<br>{escaped(params_text(row))}"
