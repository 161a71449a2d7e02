"""Text and tables for people: as wide as the terminal is, and whole where there is none.

In a pipe or a file a row is a line and a sentence is a line, however wide a terminal there is elsewhere. In a terminal
text is broken between words, and what does not fit of a table stands below its rows, or in a second table below the
first: a number is never broken, nor cut so that it reads as another. Light: loads rich where something is drawn.
"""

import os
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

WHOLE = 1_000_000  # columns where there is no terminal
NARROWEST = 8  # that a name or text in a table is folded to
DUMB = ("dumb", "unknown")  # values of TERM: such terminals move no cursor
_EDGES = 2  # a blank to either side of a table
_BELOW = "     "  # before what stands below a row


def room(stream: TextIO) -> int | None:
    """Columns of the terminal that a stream leads to; None: to none. COLUMNS, where it is set, knows better."""
    if not stream.isatty():
        return None
    asked = os.environ.get("COLUMNS", "")
    if asked.isdigit() and int(asked):
        return int(asked)
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def make_console(*, stderr: bool = False) -> "Console":
    """For stdout; or, to draw live on it, for stderr. No colour or style at all with NO_COLOR."""
    from rich.console import Console

    # rich (15) leaves bold and dim in with NO_COLOR.
    colours = None if os.environ.get("NO_COLOR") else "auto"
    if stderr:  # not live in a log because of a FORCE_COLOR, nor where no cursor moves
        is_live = sys.stderr.isatty() and os.environ.get("TERM", "").lower() not in DUMB
        return Console(stderr=True, highlight=False, force_terminal=is_live, color_system=colours)  # type: ignore[arg-type]
    # rich would take the width of any terminal there is, be it that of stdin; the height is asked for by nobody.
    width = room(sys.stdout) or WHOLE
    return Console(highlight=False, width=width, height=25, color_system=colours)  # type: ignore[arg-type]


def print_text(console: "Console", text: str, *, style: str = "", hang: int = 2, marks: Mapping[str, str] = {}) -> None:
    """In lines as wide as the console; see `wrapped`. marks: a word -> its style, where it stands first."""
    from rich.text import Text

    shown = Text(wrapped(text, console.width, hang), style=style)
    for word, its_style in marks.items():
        start = shown.plain.find(word)
        if start >= 0:
            shown.stylize(its_style, start, start + len(word))
    console.print(shown, soft_wrap=True)


def wrapped(text: str, width: int, hang: int = 2) -> str:
    """Each line of the text in as many as it takes, broken between words; all but the first `hang` columns further in.

    A word that is longer, such as a path, stays whole.
    """
    lines: list[str] = []
    for line in text.split("\n"):
        if len(line) <= width:
            lines.append(line)
            continue
        indent = " " * (len(line) - len(line.lstrip()) + hang)
        lines += textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


def fitting(pieces: Iterable[str], width: int) -> str:
    """As many of the pieces, from the first, as fit, with commas between them."""
    line = ""
    for piece in filter(None, pieces):
        longer = f"{line}, {piece}" if line else piece
        if len(longer) > width:
            break
        line = longer
    return line


@dataclass(frozen=True)
class Column:
    """Of a `Table`: a header, whose lines are apart, and a cell for each row."""

    header: str
    cells: Sequence[str]
    is_text: bool = False  # to the left, and folded where there is not room enough; numbers stand to the right
    is_long: bool = False  # text that stands below its row where it does not fit beside it
    is_extra: bool = False  # left out where it would not fit

    @property
    def width(self) -> int:
        return max(_width(line) for text in (self.header, *self.cells) for line in text.split("\n"))


@dataclass(frozen=True)
class Table:
    """To be printed on a console. The first column says what a row is about: a second table begins with it, too."""

    columns: Sequence[Column]
    is_next: bool = False  # right below another one, which ends with a blank line

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.text import Text

        blank = not self.is_next
        for header, rule, body in _parts(self.columns, options.max_width):
            text = Text("\n".join([*[""] * blank, *header, rule, *body]), no_wrap=True, overflow="ignore")
            text.stylize("bold", 0, blank + len("\n".join(header)))
            yield text
            blank = True
        yield Text("")


_Part = tuple[list[str], str, list[str]]


def _parts(columns: Sequence[Column], width: int) -> Iterator[_Part]:
    """The tables that it takes, each as lines of its header, a rule and lines of its body."""
    if _total(columns) <= width:
        yield _drawn(columns, (), width)
        return
    first, *others = columns
    rest = [column for column in others if not (column.is_long or column.is_extra)]
    below = [column for column in others if column.is_long]
    widest = max((max(map(_width, column.cells), default=0) for column in rest), default=0)
    first = _narrowed(first, width - _EDGES - 1 - widest)
    while True:
        taken = [first]
        while rest and (len(taken) == 1 or _total([*taken, rest[0]]) <= width):
            column = rest.pop(0)
            taken.append(_narrowed(column, width - _total(taken) - 1) if len(taken) == 1 else column)
        if not rest:
            for column in others:
                if column.is_extra and _total([*taken, column]) <= width:
                    taken.append(column)
        yield _drawn(taken, () if rest else below, width)
        if not rest:
            return


def _total(columns: Sequence[Column]) -> int:
    return _EDGES + sum(column.width for column in columns) + len(columns) - 1


def _narrowed(column: Column, width: int) -> Column:
    """Its text and its header folded, as far as there is need for it; numbers stay."""
    width = max(width, NARROWEST)
    if column.width <= width:
        return column
    cells = [_folded(cell, width) for cell in column.cells] if column.is_text else column.cells
    width = max(width, *map(_width, cells)) if not column.is_text and cells else width
    header = "\n".join(_folded(line, width) for line in column.header.split("\n"))
    return replace(column, header=header, cells=cells)


def _folded(text: str, width: int) -> str:
    """Between words, and a word that is longer than the width within it."""
    return "\n".join(textwrap.wrap(text, width, break_on_hyphens=False))


def _drawn(columns: Sequence[Column], below: Sequence[Column], width: int) -> _Part:
    widths = [column.width for column in columns]

    def line(texts: Iterable[str]) -> str:
        cells = zip(texts, widths, columns, strict=True)
        return f" {' '.join(_padded(text, width, column.is_text) for text, width, column in cells)}".rstrip()

    headers = [column.header.split("\n")[::-1] for column in columns]
    header = [line(texts) for texts in zip_longest(*headers, fillvalue="")][::-1]  # they stand on the rule
    body = []
    for row in range(len(columns[0].cells)):
        cells = (column.cells[row].split("\n") for column in columns)
        body += [line(texts) for texts in zip_longest(*cells, fillvalue="")]
        for column in below:
            if column.cells[row]:
                folded = _folded(column.cells[row], width - len(_BELOW))
                body += [_BELOW + text for text in folded.split("\n")]
    return header, f" {'─' * (_total(columns) - _EDGES)}", body


def _padded(text: str, width: int, is_text: bool) -> str:
    blanks = " " * (width - _width(text))
    return text + blanks if is_text else blanks + text


def _width(text: str) -> int:
    """In columns: some characters take two."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)
