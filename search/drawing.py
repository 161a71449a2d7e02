"""How figures look: their colours and axes, what stands for an activation, and what is drawn of very many points.

Colours are legible on white and on black alike. Every axis has its range, so that a figure is the same wherever it is
drawn.
"""

import html
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, get_args

from plotly import graph_objects as go

from vae.config import ActivationName

COLOURS = ("#3f83d9", "#12979b", "#8672e0", "#d07a1f", "#c4529b", "#3d9a50", "#dc4a4a", "#a07f1c")
SYMBOLS = ("circle", "diamond", "square", "triangle-up")
QUIET = "#868c94"
GRID = "rgba(128, 132, 140, 0.22)"
CLEAR = "rgba(0, 0, 0, 0)"
HOVER, HOVER_TEXT = "#20242c", "#f4f5f7"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

FIRST = ("relu", "leaky_relu", "prelu", "tanh", "sigmoid", "elu", "silu", "gelu")  # each has a colour of its own
_ORDER = (*FIRST, *(name for name in get_args(ActivationName) if name not in FIRST))

MAX_POINTS = 400  # of a scatter plot
ROW_PX, LETTER_PX = 30, 7.5
LOG_SPAN = 20.0  # listed values that span more than this factor are drawn on a logarithmic axis

T = TypeVar("T")


class Look(NamedTuple):
    colour: str
    symbol: str


def look_of(activation: str) -> Look:
    """The same for an activation in every figure of every study; an encoder's, where the decoder has its own."""
    name = activation.split("/")[0]
    place = _ORDER.index(name) if name in _ORDER else len(_ORDER)
    return Look(COLOURS[place % len(COLOURS)], SYMBOLS[place // len(COLOURS) % len(SYMBOLS)])


def blank(title: str, x: str, y: str = "", height: int = 360) -> go.Figure:
    """A figure without a trace. x and y: titles of its axes."""
    axis = {"gridcolor": GRID, "zeroline": False, "ticks": "", "ticklabelstandoff": 4, "tickangle": 0}
    words: dict[str, Any] = {"standoff": 10, "font": {"size": 13}}
    return go.Figure(
        layout={
            "template": "none",
            "title": {"text": title, "x": 0.01, "font": {"size": 16}},
            "font": {"family": FONT, "size": 13, "color": QUIET},
            "paper_bgcolor": CLEAR,
            "plot_bgcolor": CLEAR,
            "height": height,
            "margin": {"l": 62, "r": 18, "t": 44, "b": 48},  # automatic ones are adjusted again and again on a phone
            "hovermode": "closest",
            "hoverlabel": {
                "align": "left",
                "bgcolor": HOVER,
                "font": words["font"] | {"family": FONT, "color": HOVER_TEXT},
            },
            "legend": {"orientation": "h", "y": -0.22, "yanchor": "top"},
            "xaxis": axis | {"title": {"text": x} | words},
            "yaxis": axis | {"title": {"text": y} | words},
            "barmode": "overlay",
            "meta": {"note": ""},
        }
    )


def points_of(
    name: str, x: Iterable[float], y: Iterable[float], texts: Sequence[str], size: float, **more: Any
) -> go.Scatter:
    """Markers of an activation, with a text each for whoever points at them."""
    look = look_of(name)
    return go.Scatter(
        name=name,
        legendgroup=name,
        x=shortened(x),
        y=shortened(y),
        mode="markers",
        marker={"color": look.colour, "symbol": look.symbol, "size": size},
        hovertext=list(texts),
        hoverinfo="text",
        **more,
    )


def in_rows(figure: go.Figure, names: Sequence[str]) -> go.Figure:
    """A line of the figure for each name, from the top."""
    count = len(names)
    figure.update_yaxes(
        tickvals=list(range(count)), ticktext=[escaped(name) for name in names], range=[count - 0.5, -0.5], title=None
    )
    left = 18 + LETTER_PX * max(map(len, names), default=0)
    figure.update_layout(height=104 + ROW_PX * max(count, 2), margin={"l": left})
    figure.layout.legend.y = -60 / (16 + ROW_PX * max(count, 2))
    return figure


def band(figure: go.Figure, low: float, high: float) -> None:
    """Shade what lies between two values of x."""
    figure.add_shape(
        type="rect", x0=low, x1=high, y0=0, y1=1, yref="paper", fillcolor=faint(QUIET, 0.16), line={"width": 0}
    )


def line_at(figure: go.Figure, x: float | None = None, y: float | None = None) -> None:
    """A dashed line across the figure, at a value of x or of y."""
    ends = {"x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper"}
    if y is not None:
        ends = {"x0": 0, "x1": 1, "xref": "paper", "y0": y, "y1": y}
    figure.add_shape(type="line", line={"color": QUIET, "width": 1.2, "dash": "dash"}, **ends)


def note(figure: go.Figure, text: str) -> None:
    """Add a sentence to what a page says below the title."""
    figure.layout.meta = {"note": " ".join(filter(None, (figure.layout.meta["note"], text)))}


def note_thinned(figure: go.Figure, drawn: int, known: int) -> None:
    if drawn < known:
        note(figure, f"{drawn:,} of {known:,} trials are drawn, an even choice.")


def nothing(figure: go.Figure, why: str) -> go.Figure:
    """A figure that says why there is none."""
    note(figure, why)
    figure.update_layout(height=160, shapes=[])
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    figure.add_annotation(x=0.5, y=0.5, xref="paper", yref="paper", text=why, showarrow=False)
    return figure


def finish(figure: go.Figure, cap: float | None = None) -> go.Figure:
    """Give both axes a range, where they have none: what is drawn of the figure elsewhere must agree with plotly."""
    for axis, letter in ((figure.layout.xaxis, "x"), (figure.layout.yaxis, "y")):
        values = [value for trace in figure.data for value in _extent(trace, letter)]
        if axis.range is None and values:
            high = max(values) if cap is None or letter == "x" else min(max(values), max(cap, min(values)))
            if axis.type == "log":
                axis.range = padded(math.log10(min(values)), math.log10(high))
                ticks = dict(_log_ticks(*axis.range))
                axis.update(tickvals=list(ticks), ticktext=list(ticks.values()))
            else:
                axis.range = padded(min(values), high)
    return figure


def _extent(trace: Any, letter: str) -> list[float]:
    values = [value for value in trace[letter] or () if is_number(value)]
    if letter == "x" and trace.type == "scatter" and trace.error_x.array is not None:
        values += [trace.x[0] + trace.error_x.array[0], trace.x[0] - trace.error_x.arrayminus[0]]
    return values


def _log_ticks(low: float, high: float) -> Iterator[tuple[float, str]]:
    """Values and texts: 1, 2 and 5 of each decade, fewer of them where there are more decades."""
    factors = (1, 2, 5) if high - low < 1.6 else (1, 3) if high - low < 3.2 else (1,)
    for power in range(math.floor(low), math.ceil(high) + 1, max(1, round((high - low) / 6))):
        for factor in factors:
            if low <= power + math.log10(factor) <= high:
                value = factor * 10.0**power
                text = f"{factor}e{power}" if power < -3 or power > 5 else f"{value:g}"
                yield value, text.replace("-", "\u2212")


def padded(low: float, high: float, share: float = 0.05) -> list[float]:
    """A range of an axis with some air at both ends."""
    pad = share * (high - low) or 0.05 * abs(high) or 0.5
    return [low - pad, high + pad]


# ---- numbers


def cap_of(values: Iterable[float], share: float = 0.95) -> Any:
    """The quantile beyond which values would only squeeze the others; None without values."""
    ordered = sorted(value for value in values if is_number(value))
    if not ordered:
        return None
    quantile = ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)))]
    return quantile if ordered[-1] - ordered[0] > 2 * (quantile - ordered[0]) else ordered[-1]


def thin(items: Sequence[T], count: int) -> list[T]:
    """At most so many of a sequence, evenly chosen, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    if count < 2:
        return list(items[:count])
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]


def share_of_points(groups: int) -> int:
    """How many points each of so many groups may have."""
    return max(10, MAX_POINTS // groups)


def grouped(items: Iterable[T], key: Any) -> dict[str, list[T]]:
    """The items of each value of `key`, groups in the order of their first items."""
    groups: dict[str, list[T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)


def jitter(number: int) -> float:
    """In [-0.3, 0.3], always the same for a trial."""
    return 0.6 * (number * 0.618034 % 1 - 0.5)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def short(value: float) -> float:
    return float(f"{value:.6g}")


def shortened(values: Iterable[float]) -> list[float | None]:
    """Numbers with the digits that a drawing can show; None for what is not finite."""
    return [short(value) if is_number(value) else None for value in values]


def faint(colour: str, opacity: float) -> str:
    """A colour such as "#3f83d9", to be seen through."""
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {opacity})"


def escaped(text: str) -> str:
    """Plotly reads a little HTML in texts."""
    return html.escape(text, quote=False)
