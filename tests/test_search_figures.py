"""The figures of a study: they show what the tables say, whatever there is of it, and read on white and on black."""

import json
import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from report_studies import ACTIVATIONS, BASELINE, made_up_study, write_tables
from test_search_ledger import epoch_row, trial_row
from test_search_results import make_study

from search import drawing, figures
from search.comparison import Comparison, compare
from search.results import Study
from search.statistics import Estimate, Interval, Pair, Verdict
from search.svg import WIDTH, svg
from vae.config import ActivationName

OF_STUDY = (
    figures.learning_curves,
    figures.learning_rates,
    figures.slices,
    figures.dead_units,
    figures.active_units,
    figures.gradient_ratios,
    figures.rate_distortion,
)
OF_COMPARISON = (
    figures.forest,
    figures.differences,
    figures.expected_best,
    figures.cost_front,
    figures.importances,
)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Comparison]:
    study = made_up_study(tmp_path_factory.mktemp("studies") / "compared", trials=96, seeds=6)
    return study, compare(study)


def values_of(figure: Any) -> list[float]:
    """Every number that is drawn."""
    return [v for trace in figure.data for axis in (trace.x, trace.y) for v in axis if v is not None]


def verdict_of(*means: tuple[str, float], pairs: tuple[Pair, ...] = ()) -> Verdict:
    estimates = tuple(Estimate(name, m, Interval(m - 0.3, m + 0.2), m, m, 0.1, 0.5) for name, m in means)
    return Verdict(
        kind="group", group=tuple(name for name, _ in means), estimates=estimates, pairs=pairs, rope=0.1, seeds=10,
        images=100, draws=1000, smallest_p=0.002, seeds_to_be_significant=6, seeds_to_decide=None, is_equivalent=False,
    )  # fmt: skip


def pair_of(a: str, b: str, difference: float) -> Pair:
    interval = Interval(difference - 0.1, difference + 0.3)
    return Pair(a, b, difference, interval, 0.7, Interval(0.5, 0.9), 0.01, 0.03, False)


# ---- all of them


@pytest.mark.parametrize("draw", OF_STUDY)
def test_a_figure_of_a_study_has_points_that_plotly_and_json_can_take(draw, compared):
    figure = draw(compared[0])
    assert figure.data
    assert all(math.isfinite(value) for value in values_of(figure))
    assert json.loads(figure.to_json())["layout"]["title"]["text"]


@pytest.mark.parametrize("draw", OF_COMPARISON)
def test_a_figure_of_a_comparison_has_points_that_plotly_and_json_can_take(draw, compared):
    figure = draw(compared[1])
    assert figure.data
    assert all(math.isfinite(value) for value in values_of(figure))


@pytest.mark.parametrize("draw", [*OF_STUDY, *OF_COMPARISON])
def test_where_nothing_is_known_there_is_no_trace_and_a_reason(draw, tmp_path):
    study = make_study(tmp_path / "s")
    figure = draw(compare(study) if draw in OF_COMPARISON else study)
    assert not figure.data
    assert figure.layout.meta["note"].endswith((".", "compare-activations."))
    assert svg(figure, "x") == ""


@pytest.mark.parametrize("draw", [*OF_STUDY, *OF_COMPARISON])
def test_trials_without_a_finite_value_are_left_out(draw, tmp_path):
    study = make_study(tmp_path / "s", budget={"trials": 3, "max_epochs": 3})
    rows = [
        trial_row(0, val_nelbo=math.nan, epochs=3),
        trial_row(1, "FAIL", status="error", val_nelbo=None, epochs=0),
        trial_row(2, "RUNNING", val_nelbo=math.inf, epochs=1),
    ]
    epochs = [epoch_row(0, 1, val_nelbo=math.nan, objective=math.nan), epoch_row(2, 1, objective=math.inf)]
    write_tables(study.path, trials=rows, epochs=epochs)
    figure = draw(compare(study) if draw in OF_COMPARISON else study)
    assert all(math.isfinite(value) for value in values_of(figure))


# ---- colours


def test_each_activation_looks_like_no_other_and_the_usual_eight_differ_in_colour():
    assert len({drawing.look_of(name) for name in get_args(ActivationName)}) == len(get_args(ActivationName))
    assert len({drawing.look_of(name).colour for name in drawing.FIRST}) == 8
    assert drawing.look_of("relu/silu") == drawing.look_of("relu")


def luminance(colour: str) -> float:
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("ground", ["#ffffff", "#181b21"])
def test_colours_stand_out_on_white_and_on_the_dark_page(ground):
    """3 to 1 is what WCAG 2.1 asks of graphical objects (1.4.11)."""
    for colour in (*drawing.COLOURS, drawing.QUIET):
        low, high = sorted((luminance(colour), luminance(ground)))
        assert (high + 0.05) / (low + 0.05) >= 3, colour


# ---- the verdict


def test_the_forest_shows_the_mean_and_the_interval_of_each_finalist(compared):
    comparison = replace(compared[1], verdict=verdict_of(("silu", 20.0), ("tanh", 21.0)))
    figure = figures.forest(comparison)
    found = {trace.name: (trace.x[0], trace.error_x.arrayminus[0], trace.error_x.array[0]) for trace in figure.data}
    assert set(found) == {"silu", "tanh"}
    assert found["tanh"] == pytest.approx((21.0, 0.3, 0.2))
    low, high = figure.layout.xaxis.range
    assert low < 19.7
    assert high > 21.2


def test_before_there_are_finals_the_forest_has_the_best_of_each_without_intervals(compared):
    comparison = replace(compared[1], verdict=None)
    figure = figures.forest(comparison)
    best = {arm.activation: arm.best.val_nelbo for arm in comparison.arms if arm.best is not None}
    assert {trace.name: trace.x[0] for trace in figure.data} == pytest.approx(best, rel=1e-5)
    assert all(trace.error_x.array is None for trace in figure.data)


def test_differences_are_what_an_activation_has_beyond_the_leader_whichever_way_the_pair_was_taken(compared):
    pairs = (pair_of("silu", "tanh", -0.5), pair_of("relu", "silu", 0.8), pair_of("relu", "tanh", 0.3))
    verdict = verdict_of(("silu", 20.0), ("tanh", 20.5), ("relu", 20.8), pairs=pairs)
    figure = figures.differences(replace(compared[1], verdict=verdict))
    found = {trace.name: trace for trace in figure.data}
    assert {name: trace.x[0] for name, trace in found.items()} == pytest.approx({"tanh": 0.5, "relu": 0.8})
    turned = found["tanh"].error_x
    assert (turned.arrayminus[0], turned.array[0]) == pytest.approx((0.3, 0.1))  # the interval is turned with it


def test_the_cost_front_holds_those_on_it_and_no_other(compared):
    figure = figures.cost_front(compared[1])
    on_front = [arm for arm in compared[1].arms if arm.is_on_front]
    assert len(figure.data[0].x) == len(on_front)
    assert {trace.name for trace in figure.data[1:]} == {
        arm.activation for arm in compared[1].arms if arm.dropped is None
    }


# ---- the search


def test_a_curve_has_its_epochs_and_a_stopped_one_a_cross_at_its_end(tmp_path):
    study = make_study(tmp_path / "s")
    rows = [
        trial_row(0, val_nelbo=3.0, epochs=3, no_latent_nelbo=6.0),
        trial_row(1, "PRUNED", val_nelbo=5.0, epochs=2),
        trial_row(2, "PRUNED", status="diverged", epochs=1),
    ]
    ends = [(0, 1, 5.0), (0, 2, 4.0), (0, 3, 3.0), (1, 1, 5.5), (1, 2, 5.0), (2, 1, 5.2)]
    write_tables(study.path, trials=rows, epochs=[epoch_row(t, e, objective=v) for t, e, v in reversed(ends)])
    figure = figures.learning_curves(study)
    thin, crosses, bold = figure.data
    assert [*zip(bold.x, bold.y, strict=True)][:-1] == [(1, 5.0), (2, 4.0), (3, 3.0)]
    assert bold.line.width > thin.line.width
    assert [*zip(crosses.x, crosses.y, strict=True)] == [(2, 5.0), (1, 5.2)]
    assert any("diverged" in text for text in crosses.hovertext)
    assert [note.text for note in figure.layout.annotations] == ["no latents"]


def test_of_many_curves_some_are_drawn_the_best_among_them_and_that_is_said(tmp_path):
    study = made_up_study(tmp_path / "s", trials=200, max_epochs=4, compared=False)
    figure = figures.learning_curves(study)
    drawn = {text.split(",")[0] for t in figure.data for text in t.hovertext or () if text and "trial" in text}
    assert f"{figures.MAX_CURVES} of 200 trials" in figure.layout.meta["note"]
    best = min(row.val_nelbo for row in study.rows() if row.status == "ok" and row.val_nelbo is not None)
    assert min(values_of(figure)) <= best
    assert len(drawn) >= len(ACTIVATIONS)


def test_a_parameter_is_drawn_as_the_space_has_it(compared):
    study = compared[0]
    assert figures.parameter_slice(study, "learning_rate").layout.xaxis.type == "log"
    assert figures.parameter_slice(study, "dropout").layout.xaxis.type is None
    only = figures.parameter_slice(study, "leaky_relu_slope")
    assert {trace.name for trace in only.data} == {"leaky_relu"}


def test_named_values_of_a_parameter_have_a_place_each(tmp_path):
    study = make_study(tmp_path / "s")
    rows = [trial_row(n, val_nelbo=5.0 + n, epochs=3, normalization=("none", "layer")[n % 2]) for n in range(6)]
    write_tables(study.path, trials=rows)
    figure = figures.parameter_slice(study, "normalization")
    assert list(figure.layout.xaxis.ticktext) == ["layer", "none"]
    assert {round(x) for trace in figure.data for x in trace.x} == {0, 1}


def test_only_parameters_that_differ_are_sliced(compared):
    names = figures.searched(compared[0].rows())
    assert set(names) == {"learning_rate", "dropout", "latent_dim", "leaky_relu_slope"}
    assert len(figures.slices(compared[0]).data) >= len(names)


def test_dead_units_are_those_of_the_worst_layer_at_the_last_look(tmp_path):
    from report_studies import _layers

    study = make_study(tmp_path / "s")
    row = trial_row(0, val_nelbo=5.0, epochs=3)
    layers = [replace(layer, dead=0.1 * place) for place, layer in enumerate(_layers(row))]
    write_tables(study.path, trials=[row], layers=layers)
    figure = figures.dead_units(study)
    assert figure.data[0].x == (pytest.approx(0.7),)


def test_the_baseline_of_models_without_latents_is_within_sight(compared):
    low, high = figures.learning_curves(compared[0]).layout.yaxis.range
    assert low < BASELINE < high


def test_texts_of_a_study_are_no_markup_for_plotly(tmp_path):
    study = make_study(tmp_path / "s")
    write_tables(study.path, trials=[trial_row(0, activation="<a href='http://x'>x", val_nelbo=1.0, epochs=3)])
    figure = figures.learning_rates(study)
    assert "<a" not in figure.layout.yaxis.ticktext[0]
    assert all("<a" not in text for trace in figure.data for text in trace.hovertext)


# ---- as static drawings


@pytest.mark.parametrize("draw", [*OF_STUDY, *OF_COMPARISON])
def test_the_drawing_of_a_figure_is_well_formed_and_stays_within_its_frame(draw, compared):
    if draw is figures.slices:  # a page draws them one by one
        draw = lambda study: figures.parameter_slice(study, "dropout")  # noqa: E731
    figure = draw(compared[1] if draw in OF_COMPARISON else compared[0])
    root = ElementTree.fromstring(svg(figure, 'a "label" & more'))
    assert root.get("aria-label") == 'a "label" & more'
    height = float(root.get("viewBox", "").split()[3])
    texts = [element for element in root.iter() if element.tag.endswith("text")]
    assert len(texts) > 4
    for element in texts:
        if element.get("x") is not None:
            assert 0 <= float(element.get("x", "")) <= WIDTH
            assert 0 <= float(element.get("y", "")) <= height


def test_a_drawn_point_lies_where_the_axes_say():
    figure = drawing.blank("t", "x", "y", height=300)
    figure.add_trace(drawing.points_of("silu", [1.0, 10.0, 100.0], [1.0, 2.0, 3.0], ["", "", ""], size=8))
    figure.update_xaxes(type="log", range=[0, 2], tickvals=[1, 100], ticktext=["1", "100"])
    figure.update_yaxes(range=[1, 3])
    root = ElementTree.fromstring(svg(figure, ""))
    dots = next(e.get("d", "") for e in root.iter() if e.get("stroke-linecap") == "round")
    places = [tuple(map(float, part.removesuffix("h0").split())) for part in dots.split("M")[1:]]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.11)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.11)
    assert (x0, x2) == pytest.approx((62, WIDTH - 14))
    assert y0 > y2  # upwards


def test_points_beyond_the_axes_are_not_drawn(tmp_path: Path):
    figure = drawing.blank("t", "x", "y")
    figure.add_trace(drawing.points_of("silu", [0.0, 1.0, 50.0], [0.0, 1.0, 1.0], ["", "", ""], size=8))
    figure.update_xaxes(range=[0, 1])
    figure.update_yaxes(range=[0, 1])
    assert svg(figure, "").count("h0") == 2
