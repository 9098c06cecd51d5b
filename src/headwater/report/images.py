"""Pictures of a page: each once, as data URIs, together within a number of bytes.

A row may be shown beside many queries, and two rows may hold the same picture: it is kept once, by its content. If all
of them take more than there is room for, they are made coarser, all alike, in a few steps until they fit.
"""

from __future__ import annotations

import base64
import io
import struct
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headwater.arrays import is_array, to_numpy
from headwater.errors import NonFiniteValue, ShapeMismatch

Levels = NDArray[np.uint8]
STEPS = ((160, 256), (96, 256), (64, 256), (64, 32), (48, 32), (32, 32), (32, 16), (24, 16), (16, 16), (12, 8), (8, 8))
"""Largest side in pixels, and levels of each colour, from the finest to the coarsest."""
SAMPLE = 30
"""Pictures that tell how much all of them take."""
CHANNELS = (1, 3, 4)


@dataclass(frozen=True)
class Images:
    """Pictures in the order in which they were added first."""

    _levels: list[Levels] = field(default_factory=list)
    _places: dict[tuple[Any, ...], int] = field(default_factory=dict)

    def add(self, levels: Levels) -> int:
        """The picture's number."""
        key = (levels.shape, levels.tobytes())
        if key not in self._places:
            self._places[key] = len(self._levels)
            self._levels.append(small(levels, STEPS[0][0]))
        return self._places[key]

    def encoded(self, room: int) -> tuple[list[str], str]:
        """Data URIs, in `room` bytes if the coarsest step is coarse enough, and what was done to fit, in words."""
        for side, levels in STEPS:
            found = self._within(room, side, levels)
            if found is not None:
                return found, self._said(side, levels)
        side, levels = STEPS[-1]
        coarsest = [_encoded(small(image, side), levels) for image in self._levels]
        return coarsest, "Pictures are shown very small: there are many."

    def _within(self, room: int, side: int, levels: int) -> list[str] | None:
        """All of them at one step; None if that is too much."""
        # Of many a sample tells nearly always that a step is too fine, and spares the others.
        some = self._levels[:: max(1, len(self._levels) // SAMPLE)]
        size = sum(len(_encoded(small(image, side), levels)) for image in some)
        if size * len(self._levels) > 1.1 * room * len(some):
            return None
        found = [_encoded(small(image, side), levels) for image in self._levels]
        return found if sum(len(each) + 3 for each in found) <= room else None

    def _said(self, side: int, levels: int) -> str:
        fine = side == STEPS[0][0] or all(max(image.shape[:2]) <= side for image in self._levels)
        done = [*([] if fine else [f"at {side} pixels at most"]), *(["in coarser colours"] if levels < 256 else [])]
        return f"Pictures are shown {', '.join(done)}: there are many." if done else ""


def _encoded(image: Levels, levels: int) -> str:
    """Exact as PNG; coarser as WebP where Pillow is there and that is smaller."""
    exact = uri("png", png_bytes(coarser(image, levels)))
    if levels == 256 or image.ndim == 2 or find_spec("PIL") is None:
        return exact
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "WEBP", quality={32: 60, 16: 35, 8: 15}[levels], method=4)
    return min(exact, uri("webp", file.getvalue()), key=len)


def uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def small(image: Levels, side: int) -> Levels:
    """The mean over squares, so that neither side is longer than `side`."""
    step = -(-max(image.shape[:2]) // side)
    if step == 1:
        return image
    h, w = (max(1, size // step) for size in image.shape[:2])
    rows, columns = (
        np.minimum(np.arange(n * step), size - 1) for n, size in ((h, image.shape[0]), (w, image.shape[1]))
    )
    cells = image[rows][:, columns].reshape(h, step, w, step, *image.shape[2:])
    return cells.mean(axis=(1, 3)).round().astype(np.uint8)


def coarser(image: Levels, levels: int) -> Levels:
    if levels == 256:
        return image
    step = 255 / (levels - 1)
    found: Levels = (np.round(image / step) * step).round().astype(np.uint8)
    return found


# What an image may be -------------------------------------------------------------------------------------------------


def as_levels(value: Any) -> Levels | None:
    """[h, w] grey or [h, w, 3] colour, 0 to 255; None for what is no image.

    Takes [h, w], [h, w, 1 | 3 | 4], [1 | 3 | 4, h, w], in any framework, and Pillow's images. Integers of one byte are
    levels already; other numbers go from 0 to 1, or, where some are outside of that, from their smallest to their
    largest. A fourth channel is opacity, over white.
    Errors: NonFiniteValue.
    """
    pixels = _pixels(value)
    if pixels is None or pixels.dtype.kind not in "buif" or pixels.ndim not in (2, 3) or min(pixels.shape) == 0:
        return None
    if pixels.ndim == 2:
        return _levels(pixels) if min(pixels.shape) > 1 else None
    if pixels.shape[0] in CHANNELS and (pixels.shape[2] not in CHANNELS or pixels.shape[0] < pixels.shape[2]):
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.shape[2] not in CHANNELS:
        return None
    levels = _levels(pixels)
    if levels.shape[2] == 1:
        return levels[..., 0]
    if levels.shape[2] == 4:
        opacity = levels[..., 3:] / 255
        return np.round(levels[..., :3] * opacity + 255 * (1 - opacity)).astype(np.uint8)
    return levels


def _pixels(value: Any) -> NDArray[Any] | None:
    pillow = sys.modules.get("PIL.Image")  # whoever holds one has imported it
    if pillow is not None and isinstance(value, pillow.Image):
        return np.asarray(value if value.mode in ("L", "RGB", "RGBA") else value.convert("RGB"))
    if isinstance(value, np.ndarray):
        return value
    return np.asarray(to_numpy(value)) if is_array(value) else None


def _levels(pixels: NDArray[Any]) -> Levels:
    if pixels.dtype == np.uint8:
        return pixels
    values = pixels.astype(np.float64)
    if not np.isfinite(values).all():
        raise NonFiniteValue(f"{int((~np.isfinite(values)).sum())} of {values.size} pixels of an image are not finite.")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        values = (values - low) / ((high - low) or 1.0)
    return np.round(255 * values).astype(np.uint8)


# PNG ------------------------------------------------------------------------------------------------------------------


def png(image: ArrayLike) -> str:
    """A PNG as a data URI: [h, w] grey, or [h, w, 3] colour; values from 0 to 1, or bytes.

    Errors: ShapeMismatch for other shapes; NonFiniteValue.
    """
    found = as_levels(np.asarray(image))
    if found is None or np.shape(image) != found.shape:
        raise ShapeMismatch(f"An image is [h, w] or [h, w, 3]; got {list(np.shape(image))}.")
    return uri("png", png_bytes(found))


def png_bytes(image: Levels) -> bytes:
    """Of [h, w] or [h, w, 3]: with few colours as an index into a palette, else with each line's best filter."""
    height, width = image.shape[:2]
    # One number a colour: rows of a matrix are sorted fifty times slower.
    places = np.array([0] if image.ndim == 2 else [16, 8, 0], dtype=np.uint32)
    numbers = (image.reshape(height * width, -1).astype(np.uint32) << places).sum(-1)
    found, index = np.unique(numbers, return_inverse=True)
    plain = _filtered(image.reshape(height, -1), 1 if image.ndim == 2 else 3)
    forms = [_packed(width, height, 8, 0 if image.ndim == 2 else 2, plain)]
    if len(found) <= 16:
        forms.append(_palette(index.reshape(height, width), _colours(found, image.ndim == 2)))
    return min(forms, key=len)


def _colours(numbers: NDArray[Any], grey: bool) -> Levels:
    """[c, 3] of numbers in which red, green and blue are a byte each, or of levels of grey."""
    if grey:
        return np.stack([numbers] * 3, -1).astype(np.uint8)
    return np.stack([numbers >> 16, numbers >> 8 & 255, numbers & 255], -1).astype(np.uint8)


def _palette(index: NDArray[Any], colours: Levels) -> bytes:
    bits = next(b for b in (1, 2, 4) if len(colours) <= 2**b)
    height, width = index.shape
    padded = np.pad(index, ((0, 0), (0, -width % (8 // bits)))).astype(np.uint8)
    places = np.arange(8 // bits)[::-1] * bits
    lines = (padded.reshape(height, -1, 8 // bits) << places).sum(-1).astype(np.uint8)
    return _packed(width, height, bits, 3, np.pad(lines, ((0, 0), (1, 0))), colours.tobytes())


def _filtered(lines: Levels, channels: int) -> Levels:
    """Each line after the number of its filter: none, left or above, whichever leaves the smallest numbers."""
    left, above = np.zeros_like(lines), np.zeros_like(lines)
    left[:, channels:], above[1:] = lines[:, :-channels], lines[:-1]
    forms = np.stack([lines, lines - left, lines - above])
    sizes = np.abs(forms.astype(np.int8).astype(np.int32)).sum(-1)  # the usual guess of what packs best
    best = sizes.argmin(0)
    return np.concatenate([best[:, None].astype(np.uint8), forms[best, np.arange(len(lines))]], axis=1)


def _packed(width: int, height: int, bits: int, kind: int, lines: Levels, palette: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    chunks: Sequence[tuple[bytes, bytes]] = [
        (b"IHDR", header),
        *([(b"PLTE", palette)] if palette else []),
        (b"IDAT", zlib.compress(lines.tobytes(), 9)),
        (b"IEND", b""),
    ]
    packed = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + packed
