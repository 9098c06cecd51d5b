"""Claims about the vectorised trainer."""

from itertools import pairwise

import pytest

torch = pytest.importorskip("torch")

from headwater.errors import BatchMismatch, InvalidInput, InvalidSetting, NonFiniteValue, ShapeMismatch  # noqa: E402
from headwater.retraining.torch.trainer import batches, refit_heads, train_mlps, training_loss  # noqa: E402

WIDTHS = (5, 8, 6, 3)


def rows(n=50, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 5, generator=generator, dtype=dtype)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 1).long()


def subsets(models, n=50):
    return torch.rand(models, n, generator=torch.Generator().manual_seed(1)) < 0.6


def train(x, y, keep, seeds, **options):
    return train_mlps(x, y, keep, seeds, **({"widths": WIDTHS, "steps": 60, "batch_size": 16} | options))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_model_is_the_same_alone_and_in_a_stack(dtype):
    (x, y), keep = rows(dtype=dtype), subsets(4)
    together = train(x, y, keep, [3, 1, 4, 1]).logits(x)
    alone = torch.cat([train(x, y, keep[j : j + 1], [seed]).logits(x) for j, seed in enumerate([3, 1, 4, 1])])
    in_pairs = train(x, y, keep, [3, 1, 4, 1], side_by_side=3).logits(x)
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
    torch.testing.assert_close(in_pairs, together, rtol=0, atol=1e-5)


def test_a_model_equals_a_plain_torch_loop():
    """The slow truth: one nn.Sequential, one batch after the other, torch's own SGD and cosine schedule."""
    (x, y), keep = rows(), subsets(1)
    trained = train(x, y, keep, [7], lr=0.05, momentum=0.8, l2=1e-3)

    generator = torch.Generator().manual_seed(7)
    layers = []
    for i, o in pairwise(WIDTHS):
        linear = torch.nn.Linear(i, o, dtype=torch.float64)
        for parameter in (linear.weight, linear.bias):
            draw = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = (2 * draw - 1) / i**0.5
        layers += [linear, torch.nn.ReLU()]
    slow = torch.nn.Sequential(*layers[:-1])
    order = []
    while len(order) < 60 * 16:
        order += [row for row in torch.randperm(50, generator=generator).tolist() if keep[0, row]]
    optimizer = torch.optim.SGD(slow.parameters(), lr=0.05, momentum=0.8, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    for step in range(60):
        batch = order[16 * step : 16 * (step + 1)]
        optimizer.zero_grad()
        training_loss(slow(x[batch]), y[batch]).backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(trained.model(0)(x), slow(x))


def test_model_j_is_an_ordinary_module_that_agrees_with_the_stack():
    (x, y), keep = rows(), subsets(3)
    stack = train(x, y, keep, [0, 1, 2])
    module = stack.model(1)
    assert not module.training
    assert [tuple(p.shape) for p in module.parameters()] == [(8, 5), (8,), (6, 8), (6,), (3, 6), (3,)]
    torch.testing.assert_close(module(x), stack.logits(x)[1])
    torch.testing.assert_close(module[:-1](x), stack.features(x)[1])
    torch.testing.assert_close(training_loss(module(x), y, reduction="none"), stack.losses(x, y)[1])
    module[0].weight.data.zero_()
    assert stack.weights[0][1].abs().sum() > 0


def test_rows_that_are_not_kept_have_no_effect():
    (x, y), keep = rows(), subsets(1)
    elsewhere = x.clone()
    elsewhere[~keep[0]] = 1e3
    torch.testing.assert_close(train(x, y, keep, [0]).logits(x), train(elsewhere, y, keep, [0]).logits(x))


def test_equal_seeds_start_equal_whatever_rows_are_kept():
    (x, y), keep = rows(), subsets(2)
    first, second = train(x, y, keep, [5, 5], steps=1, lr=0.0).weights[0]
    assert torch.equal(first, second)
    first, second = train(x, y, keep, [5, 6], steps=1, lr=0.0).weights[0]
    assert not torch.equal(first, second)


def test_training_fits_the_rows():
    x, y = rows()
    trained = train(x, y, torch.ones(2, 50), [0, 1], steps=400)
    assert ((trained.logits(x).argmax(-1) == y).double().mean(1) > 0.9).all()


def test_numpy_arrays_train_like_tensors():
    (x, y), keep = rows(), subsets(2)
    expected = train(x, y, keep, [0, 1]).logits(x)
    assert torch.equal(train(x.numpy(), y.numpy(), keep.numpy(), [0, 1]).logits(x.numpy()), expected)


def test_progress_counts_every_step_of_every_model():
    (x, y), keep = rows(), subsets(5)
    counts = []
    train(x, y, keep, range(5), side_by_side=2, progress=counts.append)
    assert sum(counts) == 5 * 60


def test_batches_can_be_read_twice_and_keep_the_order():
    x, y = rows()
    loader = batches(x.numpy(), y.numpy(), 16)
    assert [len(labels) for _, labels in loader] == [16, 16, 16, 2]
    assert torch.equal(torch.cat([part for part, _ in loader]), x)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"keep": torch.ones(2, 49)}, BatchMismatch, r"keep \[2, 49\] and 2 seeds"),
        ({"keep": torch.tensor([[1] * 50, [0] * 50])}, BatchMismatch, "model 1 keeps none"),
        ({"widths": (4, 3)}, ShapeMismatch, r"expected x \[n, 4\], got \[50, 5\]"),
        ({"widths": (5, 2)}, InvalidInput, "from 0 to 2, but there are 2 classes"),
        ({"lr": 1e8}, NonFiniteValue, "Lower lr"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_the_reason(change, error, said):
    x, y = rows()
    with pytest.raises(error, match=said):
        train(**({"x": x, "y": y, "keep": torch.ones(2, 50), "seeds": [0, 1]} | change))


def test_checkpoints_lie_on_the_way_and_do_not_change_it():
    (x, y), keep = rows(), subsets(5)
    trained = train(x, y, keep, range(5), checkpoints=[45, 0, 15], side_by_side=2)
    assert torch.equal(trained.logits(x), train(x, y, keep, range(5), side_by_side=2).logits(x))
    assert [point.step for point in trained.checkpoints] == [0, 15, 45]
    assert [point.rate for point in trained.checkpoints] == pytest.approx(
        [0.1, 0.1 * (2 + 2**0.5) / 4, 0.1 * (2 - 2**0.5) / 4]
    )
    start = train(x, y, keep, range(5), lr=0.0, side_by_side=2)
    assert torch.equal(trained.checkpoints[0].models.logits(x), start.logits(x))
    losses = [float(models.losses(x, y).mean()) for models in (*(p.models for p in trained.checkpoints), trained)]
    assert losses == sorted(losses, reverse=True)


def test_a_checkpoint_outside_the_training_is_refused():
    (x, y), keep = rows(), subsets(1)
    with pytest.raises(InvalidSetting, match="from 0 to 59"):
        train(x, y, keep, [0], checkpoints=[60])


def test_refitted_heads_are_where_their_regularised_loss_is_stationary():
    (x, y), keep = rows(), subsets(2)
    plain = train(x, y, keep, [0, 1])
    refitted = refit_heads(plain, x, y, l2=1e-2)
    assert torch.equal(refitted.features(x), plain.features(x))
    for index in range(2):
        head = refitted.model(index)[-1].requires_grad_()
        training_loss(head(plain.features(x)[index]), y).backward()
        for p in head.parameters():
            torch.testing.assert_close(p.grad, -1e-2 * p.detach(), rtol=1e-4, atol=1e-7)


def test_a_head_without_regularisation_is_not_refitted():
    (x, y), keep = rows(), subsets(1)
    with pytest.raises(InvalidSetting, match="l2 is 0"):
        refit_heads(train(x, y, keep, [0]), x, y, l2=0.0)


def test_counts_that_mean_nothing_are_refused():
    (x, y), keep = rows(), subsets(2)
    for name in ("steps", "batch_size", "side_by_side"):
        with pytest.raises(InvalidSetting, match=f"{name} is 0"):
            train(x, y, keep, [0, 1], **{name: 0})
    with pytest.raises(InvalidSetting, match="seeds is empty"):
        train(x, y, keep[:0], [])
