"""The patches that a convolution sees, and sums of their products from the image alone.

A patch holds k pixels of each channel, and most pairs of pixels stand at the same distance in many patches: the sum
over positions p of x[p + i] x[p + j] depends on j - i only, but for the few pixels at the edges that offset i does not
reach. So the k^2 blocks of sum a a^T are cut from (2 kh - 1)(2 kw - 1) correlations of the image with itself, half of
which are the other half mirrored: for a 3 x 3 kernel 15 products of pixels in place of 81, and no patch is read.

Of an image of 5 lines, padded by one on each side, and a kernel 3 high: offset 0 meets lines -1 to 3, offset 1 lines 0
to 4, offset 2 lines 1 to 5. What an offset meets is the whole image, less the lines that it does not reach (the last
for offset 0, the first for offset 2), less such columns; and the corners, taken away twice, are added again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Self

import torch
import torch.nn.functional as F  # noqa: N812

from headwater.arrays import Array, summed
from headwater.gradients.outer import LARGE_PRODUCT, Outer

FEWEST = 16
"""Channels from which correlations were faster."""
LEFT = 16
"""How many times more the whole image may hold than the pixels that an offset meets."""


@dataclass(frozen=True)
class Frame:
    """Of a convolution with stride and dilation 1 that pads with zeros: its kernel, and the padding on each side."""

    kernel: tuple[int, int]
    """Height, width."""
    padding: tuple[int, int, int, int]
    """Left, right, above, below: in the order of `torch.nn.functional.pad`."""

    def suits(self, image: torch.Tensor) -> bool:
        """Whether correlations cost less than products of patches: in float32, of many channels."""
        (kh, kw), (_, channels, height, width) = self.kernel, image.shape
        # Edges cost as much as the image itself where it is hardly larger than the kernel; and small products are not
        # worth the calls: one row's take height x width for each of (channels kh kw)^2 pairs.
        large = min(height - 2 * kh, width - 2 * kw) > 0 and height * width * (channels * kh * kw) ** 2 > LARGE_PRODUCT
        # A convolution of a GPU may compute in TF32, unasked.
        fast = image.is_cpu and image.dtype == torch.float32 and channels >= FEWEST
        return fast and large and kh * kw > 1 and max(self.padding[:2]) < kw and max(self.padding[2:]) < kh


def frame_of(m: Any, x: torch.Tensor) -> Frame | None:
    """Where sums of products of patches are cheaper from the image itself; None elsewhere."""
    if x.ndim != 4 or m.padding_mode != "zeros" or {*m.stride, *m.dilation} != {1}:
        return None
    frame = Frame(tuple(m.weight.shape[2:]), tuple(m._reversed_padding_repeated_twice))
    return frame if frame.suits(x) else None


def patches(m: Any, x: torch.Tensor) -> torch.Tensor:
    """What each output position of a convolution sees: [n, t, channels * kernel], in memory [n, channels * kernel, t].

    So they are copied whole lines of the image at a time, and meet the output-gradients, which lie the same way, as
    they are.
    """
    dims = x.ndim - 2
    # The layer's own padding, also "same" and circular: what an output sees includes it.
    mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
    x = F.pad(x, m._reversed_padding_repeated_twice, mode=mode)
    for k, size in enumerate(m.weight.shape[2:]):
        # Unfold knows no dilation: windows of the whole span, of which every dilation-th number is taken.
        span = m.dilation[k] * (size - 1) + 1
        x = x.unfold(2 + k, span, m.stride[k])[..., :: m.dilation[k]]
    n, channels = x.shape[:2]
    space, kernel = x.shape[2 : 2 + dims], x.shape[2 + dims :]
    axes = (0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
    return x.permute(axes).reshape(n, channels * kernel.numel(), space.numel()).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class Patches(Outer):
    """Patches a [n, t, channels * kernel] and output-gradients b [n, t, o], beside the image that they are of."""

    image: torch.Tensor = field(kw_only=True)
    """[n, channels, height, width]."""
    frame: Frame = field(kw_only=True)

    def take(self, index: slice | Array) -> Self:
        rows: Any = index  # a tensor of torch
        return replace(super().take(index), image=self.image[rows])

    def inputs_gram(self, weights: Array | None) -> Array:
        # [n, 1, 1]: weights of positions are padding's, whose mask makes a plain `Outer` of this.
        each = None if weights is None else weights[:, :, :, None]
        found = patches_gram(self.image, each, self.frame)
        # Edges are taken away from the whole: where little is left beside them, what is left is their rounding.
        squares = self.image**2 if each is None else self.image**2 * each
        whole = squares.sum(dim=(0, 2, 3)).repeat_interleave(len(found) // self.image.shape[1])
        return super().inputs_gram(weights) if bool((found.diagonal() * LEFT < whole).any()) else found


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
    def correlated(lines: range, columns: range, down: range, along: range) -> torch.Tensor:
        """sum over u in this part of the image of x[c, u] x[c', u + d], for these distances d: [c, c', down, along]."""
        part = weighted[:, :, lines.start : lines.stop, columns.start : columns.stop]
        top, first = lines.start + down.start + kh - 1, columns.start + along.start + kw - 1
        seen = padded[:, :, top : top + len(lines) + len(down) - 1, first : first + len(columns) + len(along) - 1]
        return _correlation(seen, part)

    whole = _both_halves(correlated(*every, range(1 - kh, kh), range(kw)))
    found = image.new_empty((channels, kh, kw, channels, kh, kw))
    for i in range(kh):
        # Pixel u = p + i - above, for output positions p: these lines of the image it does not reach.
        missed = _ends(height, i - above, kh - 1 - below - i)
        for j in range(kw):
            across = _ends(width, j - left, kw - 1 - right - j)
            # Distance d = i' - i of the second offset from the first.
            found[:, i, j] = whole[:, :, kh - 1 - i : 2 * kh - 1 - i, kw - 1 - j : 2 * kw - 1 - j]
            edges = [(-1, some, every[1]) for some in missed] + [(-1, every[0], some) for some in across]
            edges += [(1, line, column) for line in missed for column in across]  # corners were taken away twice
            for sign, lines, columns in edges:
                # Farther away there is padding alone.
                down, along = _inside(lines, range(-i, kh - i), height), _inside(columns, range(-j, kw - j), width)
                if len(down) and len(along):
                    at = slice(down.start + i, down.stop + i), slice(along.start + j, along.stop + j)
                    found[:, i, j, :, at[0], at[1]].add_(correlated(lines, columns, down, along), alpha=sign)
    return found.reshape((channels * kh * kw, channels * kh * kw))


def _inside(pixels: range, distances: range, size: int) -> range:
    """The distances at which some pixel meets another of `size`."""
    return range(max(distances.start, 1 - pixels.stop), min(distances.stop, size - pixels.start))


def _ends(size: int, first: int, last: int) -> list[range]:
    """The `first` first and the `last` last of `size`, where there are any."""
    return [part for part in (range(max(first, 0)), range(size - max(last, 0), size)) if len(part)]


def _both_halves(half: torch.Tensor) -> torch.Tensor:
    """Correlations [c, c', 2kh-1, kw] at distances to the right, with those to the left: x[u] x[u+d] = x[v] x[v-d]."""
    mirrored = half.transpose(0, 1).flip(2, 3)
    return torch.cat([mirrored[..., :-1], half], dim=3)


PIXELS = 2048
"""Numbers up to which a float32 sum is exact enough as it is."""
AT_ONCE = 8
"""Images whose pixels one call adds up: float32 sums over more of them lose a digit beside products of patches."""


def _correlation(seen: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """sum over rows and pixels of part[c, u] seen[c', u + d]: [c, c', *distances].

    It is what a convolution's backward pass gives its weight.
    """
    kernel = [s - p + 1 for s, p in zip(seen.shape[2:], part.shape[2:], strict=True)]
    weight = seen.new_empty((part.shape[1], seen.shape[1], *kernel))
    backward: Callable[..., Any] = torch.ops.aten.convolution_backward
    ones, none = [1, 1], [0, 0]
    rows = max(len(part), 1)
    step = rows if rows * part.shape[2] * part.shape[3] <= PIXELS else AT_ONCE
    pieces = [slice(start, start + step) for start in range(0, rows, step)]
    return summed(
        backward(part[k], seen[k], weight, None, ones, none, ones, False, none, 1, [False, True, False])[1]
        for k in pieces
    )
