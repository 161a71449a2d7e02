"""The pictures that exported models come with, as they stand in a page: inside it, small enough to be mailed."""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from search.results import Study
from search.storage import Location
from search.tables import TrialRow

SAMPLES, RECONSTRUCTIONS = "samples.png", "reconstructions.png"
MAX_BYTES, MAX_BYTES_LIGHT = 5_000_000, 80_000  # of all pictures of a page, before their encoding adds a third
LIGHT_PX, LIGHT_COLOURS = 300, 8


@dataclass(frozen=True, slots=True)
class Pictures:
    """Of one exported model, as data URLs; None: not there, or not a picture."""

    row: TrialRow
    samples: str | None
    reconstructions: str | None


def pictures(study: Study, leaders: Sequence[TrialRow], light: bool) -> tuple[list[Pictures], list[str]]:
    """Those of the best exported model of each activation, best first, and the activations whose would be too much.

    leaders: the ranked trials.
    """
    folders = {int(folder.name.rpartition("-")[2]): folder for folder in study.model_folders()}
    left = MAX_BYTES_LIGHT if light else MAX_BYTES
    found: dict[str, Pictures] = {}
    too_large: list[str] = []
    for row in leaders:
        if row.trial not in folders or row.activations in found or row.activations in too_large:
            continue
        contents = list(_contents(folders[row.trial], light))
        size = sum(len(content) for content in contents if content is not None)
        if size > left:
            too_large.append(row.activations)
        else:
            left -= size
            found[row.activations] = Pictures(row, *map(_url, contents))
    return list(found.values()), too_large


def _url(content: bytes | None) -> str | None:
    return None if content is None else f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _contents(folder: Location, light: bool) -> Iterator[bytes | None]:
    for name in (SAMPLES, RECONSTRUCTIONS):
        try:
            content = (folder / name).read_bytes()
            with Image.open(io.BytesIO(content)) as image:  # whatever is embedded is a picture
                image.load()
                yield _smaller(image) if light else content
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError):
            yield None


def _smaller(image: Image.Image) -> bytes:
    image.thumbnail((LIGHT_PX, 2 * LIGHT_PX))
    sink = io.BytesIO()
    image.convert("RGB").quantize(LIGHT_COLOURS).save(sink, format="PNG", optimize=True)
    return sink.getvalue()
