"""Pictures of a page: sample grids, evaluation pictures and attention maps, as data URIs of limited size."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from vca.report.page_run import PageRun

ALL_BYTES = 500_000  # of the pictures of a page
MAX_PICTURES = 24
SMALL_IMAGE = 64  # pixels of the samples, up to which their pixels stay sharp when a picture is scaled

T = TypeVar("T")


class Source(NamedTuple):
    """A picture file to show."""

    file: Path
    caption: str
    sharp: bool  # small images, enlarged


class Picture(NamedTuple):
    """A picture as a data URI, with its size in pixels."""

    uri: str
    width: int
    height: int
    caption: str
    sharp: bool


def sample_sources(runs: Sequence[PageRun], grids: Sequence[Path], records: Sequence[Path]) -> list[Source]:
    """Return up to four sample grids of each run over the steps, the grids of sample folders, and record pictures."""
    of_runs = [(run, sorted(run.path.glob("samples/step_*.png"))) for run in runs]
    of_runs = [(run, files) for run, files in of_runs if files]
    sharp = any(is_small(run.get("data.img_size")) for run in runs)
    each = max(1, min(4, MAX_PICTURES // max(1, len(of_runs) + len(grids))))
    sources = []
    for run, files in of_runs:
        for file in evenly(files, each):
            sources.append(
                Source(file, f"{run.label}, step {file.stem.removeprefix('step_').lstrip('0') or '0'}", sharp)
            )
    sources += [Source(grid, f"samples in {grid.parent}", sharp) for grid in grids]
    farthest = "farthest from the reference; nearest to it; their nearest neighbours"
    pictures = [record.with_suffix(".png") for record in records]
    return sources + [Source(file, f"{file.name} (rows: {farthest})", sharp) for file in pictures if file.is_file()]


def is_small(size: Any) -> bool:
    """Whether an image size, a number or height and width, is at most `SMALL_IMAGE`."""
    sides = size if isinstance(size, list) else [size]
    return all(isinstance(side, int) and side <= SMALL_IMAGE for side in sides)


def map_sources(runs: Sequence[PageRun]) -> list[Source]:
    """Return the first, middle and last layer of the attention maps of each run."""
    of_runs = [(run, sorted(run.path.glob("attention_maps/layer_*.png"))) for run in runs]
    of_runs = [(run, files) for run, files in of_runs if files]
    each = max(1, min(3, MAX_PICTURES // max(1, len(of_runs))))
    return [Source(file, run.label, False) for run, files in of_runs for file in evenly(files, each)]


def evenly(items: Sequence[T], count: int) -> list[T]:
    """Return at most `count` items at equal distances, the last one included."""
    if len(items) <= count:
        return list(items)
    if count == 1:
        return [items[-1]]
    return [items[round(number * (len(items) - 1) / (count - 1))] for number in range(count)]


def embed(sources: Sequence[Source], failures: list[str]) -> list[Picture]:
    """Read the first `MAX_PICTURES` pictures; each has the same share of `ALL_BYTES`."""
    pictures = []
    for source in sources[:MAX_PICTURES]:
        try:
            pictures.append(read_picture(source, ALL_BYTES // min(len(sources), MAX_PICTURES)))
        except (OSError, ValueError) as error:
            failures.append(f"{source.file} cannot be read ({error})")
    if len(sources) > MAX_PICTURES:
        failures.append(f"{len(sources) - MAX_PICTURES} more pictures are not shown")
    return pictures


def read_picture(source: Source, limit: int) -> Picture:
    """Return a PNG as it is, or as a smaller JPEG if it has more than `limit` bytes."""
    from PIL import Image

    content, kind = source.file.read_bytes(), "png"
    image = Image.open(io.BytesIO(content))
    width, height = image.size
    image.load()
    small = image.convert("RGB")
    while len(content) > limit and min(small.size) > 16:
        encoded = io.BytesIO()
        small.save(encoded, format="jpeg", quality=85)
        content, kind = encoded.getvalue(), "jpeg"
        small = small.resize((small.width * 4 // 5, small.height * 4 // 5), Image.Resampling.LANCZOS)
    uri = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return Picture(uri, width, height, source.caption, source.sharp)
