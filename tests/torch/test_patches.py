"""Sums of products of patches from the image alone: those of the patches themselves."""

import pytest
import torch
from torch import nn

import headwater as hw
from headwater.gradients import outer
from headwater.gradients.outer import Outer
from headwater.torch import layers
from headwater.torch.patches import Frame, Patches, patches_gram
from headwater.torch.plan import without_padding

SIZE = (19, 17)


def values(convolution, x, bias=True):
    g = torch.randn_like(convolution(x))
    return layers.CONVOLUTION.values(convolution, x, g, True, bias)[0]


def in_float64(kernel, padding, rows=5, channels=14):
    """In float64, where rounding does not hide a wrong edge; fits take sums of patches there."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(channels, 4, kernel, padding=padding).double()
    x = torch.randn(rows, channels, *SIZE, dtype=torch.float64)
    plain = values(convolution, x)
    assert type(plain) is Outer
    frame = Frame(tuple(convolution.weight.shape[2:]), tuple(convolution._reversed_padding_repeated_twice))
    return plain, Patches(plain.a, plain.b, plain.ones, image=x, frame=frame)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kernel", [(3, 3), (1, 3), (4, 2), (3, 4)])
@pytest.mark.parametrize("padding", [0, 1, "same"])
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_from_the_image_are_those_of_its_patches(kernel, padding, weighted):
    padding = padding if padding == "same" else tuple(min(padding, k - 1) for k in kernel)
    plain, found = in_float64(kernel, padding)
    weights = torch.rand(5, dtype=torch.float64) + 0.5 if weighted else None
    sums, truth = found.moments(weights).named(), plain.moments(weights).named()
    for mine, expected in zip(sums.values(), truth.values(), strict=True):
        torch.testing.assert_close(torch.as_tensor(mine), torch.as_tensor(expected), rtol=1e-12, atol=1e-10)
    a = found.a.reshape(-1, found.a.shape[2])
    scale = torch.ones(5, dtype=torch.float64) if weights is None else weights
    direct = torch.einsum("ni,nj,n->ij", a, a, scale.repeat_interleave(found.positions))
    image_weights = None if weights is None else weights[:, None, None, None]
    torch.testing.assert_close(patches_gram(found.image, image_weights, found.frame), direct, rtol=1e-12, atol=1e-10)


def test_some_of_the_rows_are_those_of_their_images():
    _, found = in_float64(3, 1, rows=6, channels=8)
    some = found.take(torch.tensor([4, 1]))
    expected = Outer(found.a[[4, 1]], found.b[[4, 1]], True).moments()
    torch.testing.assert_close(some.moments().right, expected.right, rtol=1e-12, atol=1e-10)


def test_what_is_left_of_a_bright_edge_is_not_its_rounding():
    """Offsets that miss the last line, which holds nearly all: taken away from the whole, it would leave noise."""
    torch.manual_seed(0)
    x = torch.randn(4, 16, 32, 32)
    x[:, :, -1] *= 1000
    found = values(nn.Conv2d(16, 4, 3), x)
    assert type(found) is Patches
    sums = found.inputs_gram(None).double()
    exact = patches_gram(x.double(), None, found.frame)
    size = exact.diagonal().sqrt()
    assert ((sums - exact).abs() / (size[:, None] * size)).max() < 1e-5


@pytest.mark.parametrize(
    "options",
    [{"stride": 2}, {"dilation": 2}, {"padding_mode": "circular", "padding": 1}, {"groups": 2}, {"padding": 5}],
    ids=str,
)
def test_other_convolutions_are_left_to_their_patches(options):
    found = values(nn.Conv2d(16, 4, 3, **options), torch.randn(2, 16, *SIZE), bias=False)
    assert type(found) is Outer


def test_small_images_are_left_to_their_patches():
    assert type(values(nn.Conv2d(64, 4, 3, padding=1), torch.randn(2, 64, 5, 5))) is Outer
    assert type(values(nn.Conv2d(8, 4, 3, padding=1), torch.randn(2, 8, *SIZE))) is Outer
    assert not Frame((1, 1), (0, 0, 0, 0)).suits(torch.randn(2, 64, 32, 32))


def test_float32_sums_are_as_exact_as_those_of_patches():
    torch.manual_seed(0)
    found = values(nn.Conv2d(16, 4, 3, padding=1), torch.randn(64, 16, 32, 32).relu())
    exact = patches_gram(found.image.double(), None, found.frame)
    errors = [
        (sums.double() - exact).abs().max() / exact.abs().max()
        for sums in (found.inputs_gram(None), Outer(found.a, found.b).inputs_gram(None))
    ]
    assert errors[0] <= max(1.5 * errors[1], 5e-7)


def test_no_rows_sum_to_nothing():
    found = values(nn.Conv2d(16, 4, 3, padding=1), torch.randn(3, 16, *SIZE)).take(slice(0, 0))
    assert not found.inputs_gram(None).any()


def test_a_mask_of_padding_leaves_a_plain_sum_of_products():
    found = values(nn.Conv2d(16, 4, 3, padding=1), torch.randn(3, 16, *SIZE))
    kept = torch.rand(3, found.positions) < 0.5
    masked = without_padding(found, kept)
    assert type(masked) is Outer
    a = found.a[kept]
    torch.testing.assert_close(masked.moments().right[:-1, :-1], a.T @ a, rtol=1e-4, atol=1e-3)


def test_a_fit_makes_no_products_of_patches(monkeypatch):
    """The work is counted: the inputs' sums of the convolution are of 15 distances, not of 9 x 9 pairs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 16 * 16, 3)).eval()
    x, y = torch.randn(12, 16, 16, 16), torch.arange(12) % 3
    grams = []
    gram = outer._gram
    monkeypatch.setattr(outer, "_gram", lambda total, rows, w, size: grams.append(size) or gram(total, rows, w, size))
    fitted = hw.Influence(model, "cross_entropy", hw.Ekfac(fisher="empirical")).fit([(x, y)])
    assert 144 not in grams and 4 in grams
    found = fitted.attribute((x, y), (x[:4], y[:4])).values
    monkeypatch.setattr(Frame, "suits", lambda self, image: False)
    plain = hw.Influence(model, "cross_entropy", hw.Ekfac(fisher="empirical")).fit([(x, y)])
    assert 144 in grams
    expected = plain.attribute((x, y), (x[:4], y[:4])).values
    assert abs(found - expected).max() <= 1e-4 * abs(expected).max()
