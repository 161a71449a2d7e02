"""A figure of `search.figures` as static SVG: for pages without scripts, and until scripts have run.

It draws what those figures are made of and no more: lines, filled outlines, markers, labels, error bars and horizontal
bars, on axes whose ranges are given, and whose ticks are where they are logarithmic. Colours of text and grid come from
the page's style sheet.
"""

import html
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

WIDTH = 520
RIGHT, TOP, BOTTOM = 14, 12, 46
LETTER = 6.6  # usual width of a letter of the axis' labels
OUTLINES: dict[str, Callable[[float], str]] = {  # symbol -> its path round a point, of a radius
    "circle": lambda r: f"m{-r:g} 0a{r:g} {r:g} 0 1 0 {2 * r:g} 0a{r:g} {r:g} 0 1 0 {-2 * r:g} 0",
    "diamond": lambda r: f"m0 {-1.3 * r:g}l{r:g} {1.3 * r:g} {-r:g} {1.3 * r:g} {-r:g} {-1.3 * r:g}z",
    "square": lambda r: f"m{-r:g} {-r:g}h{2 * r:g}v{2 * r:g}h{-2 * r:g}z",
    "triangle-up": lambda r: f"m0 {-1.2 * r:g}l{1.1 * r:g} {2 * r:g}h{-2.2 * r:g}z",
    "line-ns": lambda r: f"m0 {-r:g}v{2 * r:g}",
    "x-thin": lambda r: f"m{-r:g} {-r:g}l{2 * r:g} {2 * r:g}m0 {-2 * r:g}l{-2 * r:g} {2 * r:g}",
}
DOT = "h0"
LINES = ("line-ns", "x-thin")
DASHES = {"dash": "6 4", "dot": "2 4"}


def svg(figure: Any, label: str) -> str:
    """The drawing as an element of a page; '' where the figure has no trace."""
    if not figure.data:
        return ""
    drawing = _Drawing(figure)
    body = "".join([*drawing.grid(), *drawing.shapes(), *drawing.traces(), *drawing.labels()])
    return (
        f'<svg class="static" viewBox="0 0 {WIDTH} {drawing.height:g}" role="img" aria-label="{html.escape(label)}" '
        f'xmlns="http://www.w3.org/2000/svg">{body}</svg>'
    )


class _Axis:
    """From values of a figure to coordinates of the drawing."""

    def __init__(self, axis: Any, start: float, end: float) -> None:
        self.low, self.high = axis.range
        self.start, self.end, self.log = start, end, axis.type == "log"
        self.title = axis.title.text or ""
        self.ticks = list(self._ticks(axis))

    def __call__(self, value: float | None) -> float | None:
        """None where there is nothing to draw."""
        if value is None or not math.isfinite(value) or (self.log and value <= 0):
            return None
        place = math.log10(value) if self.log else value
        return self.start + (place - self.low) / (self.high - self.low) * (self.end - self.start)

    def _ticks(self, axis: Any) -> Iterator[tuple[float, str]]:
        if axis.tickvals is not None:
            texts = axis.ticktext or [f"{value:g}" for value in axis.tickvals]
            yield from zip(axis.tickvals, texts, strict=True)
        else:
            for value in _linear_ticks(self.low, self.high):
                yield value, f"{value:.0%}" if "%" in (axis.tickformat or "") else _number(value)


class _Drawing:
    def __init__(self, figure: Any) -> None:
        self.figure, layout = figure, figure.layout
        self.height = layout.height - 50  # without the room for a title and a legend, which the page has
        self.x = _Axis(layout.xaxis, layout.margin.l, WIDTH - RIGHT)
        self.y = _Axis(layout.yaxis, self.height - BOTTOM, TOP)

    def grid(self) -> Iterator[str]:
        x, y = self.x, self.y
        for value, text in x.ticks:
            if (place := x(value)) is not None:
                yield f'<path class="grid" d="M{place:.1f} {y.end}V{y.start:g}"/>'
                yield f'<text x="{place:.1f}" y="{y.start + 17:g}" text-anchor="middle">{_escaped(text)}</text>'
        for value, text in y.ticks:
            if (place := y(value)) is not None:
                yield f'<path class="grid" d="M{x.start:g} {place:.1f}H{x.end}"/>'
                yield f'<text x="{x.start - 8:g}" y="{place + 4:.1f}" text-anchor="end">{_escaped(text)}</text>'
        middle = (x.start + x.end) / 2
        yield f'<text x="{middle:.1f}" y="{self.height - 6:g}" text-anchor="middle">{_escaped(x.title)}</text>'
        if y.title:
            middle = (y.start + y.end) / 2
            turn = f'transform="translate(13 {middle:.1f}) rotate(-90)"'
            yield f'<text {turn} text-anchor="middle">{_escaped(y.title)}</text>'

    def shapes(self) -> Iterator[str]:
        """Bands and lines across the whole figure."""
        for shape in self.figure.layout.shapes:
            xs = [self._clipped(self.x, v, shape.xref == "paper") for v in (shape.x0, shape.x1)]
            ys = [self._clipped(self.y, v, shape.yref == "paper") for v in (shape.y0, shape.y1)]
            if shape.type == "rect":
                yield (
                    f'<rect x="{min(xs):.1f}" y="{min(ys):.1f}" width="{abs(xs[1] - xs[0]):.1f}" '
                    f'height="{abs(ys[1] - ys[0]):.1f}" fill="{shape.fillcolor}"/>'
                )
            else:
                yield (
                    f'<path d="M{xs[0]:.1f} {ys[0]:.1f}L{xs[1]:.1f} {ys[1]:.1f}" stroke="{shape.line.color}" '
                    f'stroke-dasharray="{DASHES["dash"]}"/>'
                )

    def traces(self) -> Iterator[str]:
        for trace in self.figure.data:
            opacity = "" if trace.opacity is None else f' opacity="{trace.opacity}"'
            parts = self._bars(trace) if trace.type == "bar" else self._scatter(trace)
            content = "".join(parts)
            if content:
                yield f"<g{opacity}>{content}</g>"

    def labels(self) -> Iterator[str]:
        for note in self.figure.layout.annotations:
            x = self._clipped(self.x, note.x, note.xref == "paper")
            y = self._clipped(self.y, note.y, note.yref == "paper")
            anchor = {"right": "end", "left": "start"}.get(note.xanchor, "middle")
            yield f'<text x="{x:.1f}" y="{y - 5:.1f}" text-anchor="{anchor}">{_escaped(note.text)}</text>'

    def _bars(self, trace: Any) -> Iterator[str]:
        zero = self.x(0) or self.x.start
        for value, place, width in zip(trace.x, trace.y, trace.width, strict=True):
            end, top, bottom = self.x(value), self.y(place - width / 2), self.y(place + width / 2)
            if end is not None and top is not None and bottom is not None:
                yield (
                    f'<rect x="{zero:.1f}" y="{top:.1f}" width="{max(0, end - zero):.1f}" '
                    f'height="{bottom - top:.1f}" fill="{trace.marker.color}"/>'
                )

    def _scatter(self, trace: Any) -> Iterator[str]:
        places = [(self.x(x), self.y(y)) for x, y in zip(trace.x, trace.y, strict=True)]
        if "lines" in trace.mode:
            yield from self._path(trace, places)
        if trace.error_x.array is not None:
            yield from self._intervals(trace)
        if "markers" in trace.mode:
            yield from self._markers(trace, places)
        if "text" in trace.mode:
            for (x, y), text in zip(places, trace.text, strict=True):
                if x is not None and y is not None and self._is_inside(x, y):
                    x = min(x, WIDTH - RIGHT - LETTER * len(text) / 2)
                    yield f'<text x="{x:.1f}" y="{y - 10:.1f}" text-anchor="middle">{_escaped(text)}</text>'

    def _path(self, trace: Any, places: Sequence[tuple[float | None, float | None]]) -> Iterator[str]:
        steps, pen_is_up = [], True
        for x, y in places:
            if x is None or y is None:
                pen_is_up = True
                continue
            y = max(TOP - 4.0, min(self.height, y))  # what rises out of the figure is held at its edge
            steps.append(f"{'M' if pen_is_up else 'L'}{x:.1f} {y:.1f}")
            pen_is_up = False
        if not steps:
            return
        if trace.fill == "toself":
            yield f'<path d="{"".join(steps)}Z" fill="{trace.fillcolor}"/>'
        elif trace.line.width:
            dash = f' stroke-dasharray="{DASHES[trace.line.dash]}"' if trace.line.dash in DASHES else ""
            stroke = f'stroke="{trace.line.color}" stroke-width="{trace.line.width:g}"'
            yield f'<path d="{"".join(steps)}" fill="none" {stroke} stroke-linejoin="round"{dash}/>'

    def _intervals(self, trace: Any) -> Iterator[str]:
        error = trace.error_x
        for x, y, more, less in zip(trace.x, trace.y, error.array, error.arrayminus, strict=True):
            low, high, place = self.x(x - less), self.x(x + more), self.y(y)
            if low is not None and high is not None and place is not None:
                ends = f"M{low:.1f} {place - 5:.1f}v10M{high:.1f} {place - 5:.1f}v10"
                yield (
                    f'<path d="M{low:.1f} {place:.1f}H{high:.1f}{ends}" stroke="{trace.marker.color}" '
                    f'stroke-width="{error.thickness:g}" fill="none"/>'
                )

    def _markers(self, trace: Any, places: Sequence[tuple[float | None, float | None]]) -> Iterator[str]:
        """A path for all markers of a look, dots as round ends of no line: a tenth of the size of an element each."""
        marker, count = trace.marker, len(places)
        outlines: dict[tuple[str, float, str], list[str]] = defaultdict(list)
        looks = zip(_each(marker.symbol, count), _each(marker.size, count), _colours(marker, count), strict=True)
        for (x, y), look in zip(places, looks, strict=True):
            if x is not None and y is not None and self._is_inside(x, y):
                symbol, size, _ = look
                outline = DOT if symbol == "circle" else OUTLINES[symbol.removesuffix("-open")](size / 2)
                outlines[look].append(f"M{x:.1f} {y:.1f}{outline}")
        opacity = "" if marker.opacity is None else f' opacity="{marker.opacity}"'
        for (symbol, size, colour), steps in outlines.items():
            stroke = f'stroke="{colour}" stroke-width="{marker.line.width or 1.5:g}"'
            is_line = symbol.endswith("-open") or symbol in LINES
            paint = f'fill="none" {stroke}' if is_line else f'fill="{colour}"'
            if symbol == "circle":
                paint = f'stroke="{colour}" stroke-width="{size:g}" stroke-linecap="round"'
            yield f'<path d="{"".join(steps)}" {paint}{opacity}/>'

    def _is_inside(self, x: float, y: float) -> bool:
        return self.x.start - 8 <= x <= self.x.end + 8 and self.y.end - 8 <= y <= self.y.start + 8

    @staticmethod
    def _clipped(axis: _Axis, value: float, is_share: bool) -> float:
        if is_share:
            return axis.start + value * (axis.end - axis.start)
        place = axis(value)
        low, high = sorted((axis.start, axis.end))
        return min(high, max(low, low if place is None else place))


def _each(value: Any, count: int) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value] * count


def _colours(marker: Any, count: int) -> Sequence[str]:
    values = _each(marker.color, count)
    if not count or isinstance(values[0], str):
        return values
    stops = [(at, [int(colour[i : i + 2], 16) for i in (1, 3, 5)]) for at, colour in marker.colorscale]
    return [_between(value, stops) for value in values]


def _between(value: float, stops: Sequence[tuple[float, Sequence[int]]]) -> str:
    for (low, start), (high, end) in pairwise(stops):
        if value <= high:
            share = (value - low) / (high - low)
            return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(start, end, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in stops[-1][1])


def _linear_ticks(low: float, high: float) -> Iterable[float]:
    low, high = sorted((low, high))
    power = 10 ** math.floor(math.log10((high - low) / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= 6)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _number(value: float) -> str:
    text = f"{value:.6g}"
    return "0" if float(text) == 0 else text.replace("e-0", "e-").replace("-", "\u2212")


def _escaped(text: str) -> str:
    """Texts of a figure are escaped once already."""
    return html.escape(html.unescape(text))
