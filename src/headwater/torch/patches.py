"""The patches that a convolution sees, and sums of their products from the image alone.

A patch holds k pixels of each channel, and most pairs of pixels stand at the same distance in many patches: the sum
over positions p of x[p + i] x[p + j] depends on j - i only, but for the few pixels at the edges that offset i does not
reach. So the k^2 blocks of sum a a^T are cut from (2 kh - 1)(2 kw - 1) correlations of the image with itself, half of
which are the other half mirrored: for a 3 x 3 kernel 15 products of pixels in place of 81, and no patch is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Self

import torch
import torch.nn.functional as F  # noqa: N812

from headwater.arrays import Array
from headwater.gradients.outer import LARGE_PRODUCT, Outer


@dataclass(frozen=True)
class Frame:
    """Of a convolution with stride and dilation 1 that pads with zeros: its kernel, and the padding on each side."""

    kernel: tuple[int, int]
    """Height, width."""
    padding: tuple[int, int, int, int]
    """Left, right, above, below: in the order of `torch.nn.functional.pad`."""

    def suits(self, image: torch.Tensor) -> bool:
        """Whether correlations cost less than products of patches."""
        (kh, kw), (_, channels, height, width) = self.kernel, image.shape
        # Edges cost as much as the image itself where it is hardly larger than the kernel.
        large = min(height - 2 * kh, width - 2 * kw) >= 0 and height * width * (channels * kh * kw) ** 2 > LARGE_PRODUCT
        # A convolution of a GPU may compute in TF32, unasked.
        return large and kh * kw > 1 and max(self.padding[:2]) < kw and max(self.padding[2:]) < kh and image.is_cpu


@dataclass(frozen=True, eq=False)
class Patches(Outer):
    """Patches a [n, t, channels * kernel] and output-gradients b [n, t, o], beside the image that they are of."""

    image: Any = None
    """[n, channels, height, width]."""
    frame: Any = None
    """A `Frame`."""

    def take(self, index: slice | Array) -> Self:
        return replace(super().take(index), image=self.image[index])

    def inputs_gram(self, weights: Array | None) -> Array:
        # A weight for each position, as padding has it, does not come with convolutions.
        return patches_gram(self.image, None if weights is None else weights[:, :, :, None], self.frame)


def patches_gram(image: torch.Tensor, weights: Any, frame: Frame) -> torch.Tensor:
    """The sum over rows and positions of w a a^T, for patches a of an image [n, c, h, w]: [c kh kw, c kh kw].

    weights: [n, 1, 1, 1], or None for one.
    """
    (kh, kw), (left, right, above, below) = frame.kernel, frame.padding
    channels, height, width = image.shape[1:]
    weighted = image if weights is None else image * weights
    padded = F.pad(image, (kw - 1, kw - 1, kh - 1, kh - 1))
    every = range(height), range(width)

    @cache
    def correlated(rows: range, columns: range, down: range, along: range) -> torch.Tensor:
        """sum over u in this part of the image of x[c, u] x[c', u + d], for these distances d: [c, c', down, along]."""
        part = weighted[:, :, rows.start : rows.stop, columns.start : columns.stop]
        top, first = rows.start + down.start + kh - 1, columns.start + along.start + kw - 1
        seen = padded[:, :, top : top + len(rows) + len(down) - 1, first : first + len(columns) + len(along) - 1]
        return _correlation(seen, part)

    whole = _both_halves(correlated(*every, range(1 - kh, kh), range(kw)))
    found = image.new_empty((channels, kh, kw, channels, kh, kw))
    for i in range(kh):
        # Pixel u = p + i - above, for output positions p: these lines of the image it does not reach.
        lines = _ends(height, i - above, kh - 1 - below - i)
        for j in range(kw):
            columns = _ends(width, j - left, kw - 1 - right - j)
            # Distance d = i' - i of the second offset from the first.
            found[:, i, j] = whole[:, :, kh - 1 - i : 2 * kh - 1 - i, kw - 1 - j : 2 * kw - 1 - j]
            edges = [(-1, rows, every[1]) for rows in lines] + [(-1, every[0], some) for some in columns]
            edges += [(1, rows, some) for rows in lines for some in columns]  # corners were taken away twice
            for sign, rows, some in edges:
                # Farther away there is padding alone.
                down, along = _inside(rows, range(-i, kh - i), height), _inside(some, range(-j, kw - j), width)
                if len(down) and len(along):
                    at = slice(down.start + i, down.stop + i), slice(along.start + j, along.stop + j)
                    found[:, i, j, :, at[0], at[1]].add_(correlated(rows, some, down, along), alpha=sign)
    return found.reshape((channels * kh * kw, channels * kh * kw))


def _inside(pixels: range, distances: range, size: int) -> range:
    """The distances at which some pixel meets another of `size`."""
    return range(max(distances.start, 1 - pixels.stop), min(distances.stop, size - pixels.start))


def _ends(size: int, first: int, last: int) -> list[range]:
    """The first and the last so many of a range, where there are any."""
    return [part for part in (range(max(first, 0)), range(size - max(last, 0), size)) if len(part)]


def _both_halves(half: torch.Tensor) -> torch.Tensor:
    """Correlations [c, c', 2kh-1, kw] at distances to the right, with those to the left: x[u] x[u+d] = x[v] x[v-d]."""
    mirrored = half.transpose(0, 1).flip(2, 3)
    return torch.cat([mirrored[..., :-1], half], dim=3)


def _correlation(seen: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """sum over rows and pixels of part[c, u] seen[c', u + d]: [c, c', *distances].

    It is what a convolution's backward pass gives its weight.
    """
    kernel = [s - p + 1 for s, p in zip(seen.shape[2:], part.shape[2:], strict=True)]
    weight = seen.new_empty((part.shape[1], seen.shape[1], *kernel))
    backward: Callable[..., Any] = torch.ops.aten.convolution_backward
    ones, none = [1, 1], [0, 0]
    found: torch.Tensor = backward(part, seen, weight, None, ones, none, ones, False, none, 1, [False, True, False])[1]
    return found
