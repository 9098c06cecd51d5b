"""What a call costs beyond the arithmetic, by counts: fingerprints, hooks, looks at the device, walks for keys."""

from collections import Counter
from itertools import chain

import array_api_compat
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import headwater as hw
from headwater import arrays, rows
from headwater.gradients import outer
from headwater.torch import TorchBatch, TorchComposableInfluence, TorchGradientProvider, capture

X, Y = torch.randn(640, 6, generator=torch.Generator().manual_seed(0)), torch.arange(640) % 3
TRAIN = [(X[k : k + 32], Y[k : k + 32]) for k in range(0, 640, 32)]
QUERY = [(X[:9], Y[:9])]


@pytest.fixture
def many(monkeypatch):
    """Joined as outside of tests."""
    monkeypatch.setattr(rows, "FEW", 256)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).eval()


def counted(monkeypatch, owner, name, found):
    plain = getattr(owner, name)

    def counting(*args, **kwargs):
        found[name] += 1
        return plain(*args, **kwargs)

    monkeypatch.setattr(owner, name, counting)


def test_small_batches_are_joined_and_weights_are_looked_at_twice_in_a_call(many, monkeypatch):
    influence = TorchComposableInfluence(model(), nn.CrossEntropyLoss(), hw.GradDot()).fit(TRAIN)
    influence.attribute(TRAIN, QUERY)  # the first rows are looked at
    found = Counter()
    counted(monkeypatch, TorchGradientProvider, "fingerprint", found)
    counted(monkeypatch, TorchGradientProvider, "grads", found)
    counted(monkeypatch, nn.Module, "register_forward_hook", found)
    influence.attribute(TRAIN, QUERY)
    # 20 batches of 32 are three calls of the model; each watches two layers for that call alone.
    assert found == {"fingerprint": found["fingerprint"], "grads": 4, "register_forward_hook": 8}
    assert found["fingerprint"] <= 2


class Looks(TorchDispatchMode):
    """Counts what waits for a device: numbers that Python reads."""

    def __init__(self):
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        said = str(function)
        self.found += any(name in said for name in ("_local_scalar_dense", "is_nonzero", "aten.nonzero", "aten.equal"))
        return function(*args, **(kwargs or {}))


def test_gradients_of_a_batch_look_at_the_device_once():
    provider = TorchGradientProvider(model(), nn.CrossEntropyLoss(), blocks="layer")
    batches = [TorchBatch(X[k : k + 40], Y[k : k + 40]) for k in range(0, 640, 40)]
    provider.grads(batches[0])  # compared with autograd, as the first of a pass
    provider._sampler._random.random = lambda: 1.0  # no later batch is
    for batch in batches[1:]:
        with Looks() as looks:
            provider.grads(batch)
        assert looks.found == 1


def test_a_comparison_with_autograd_looks_at_the_device_as_often_whatever_the_number_of_layers():
    found = []
    for depth in (1, 6):
        deep = nn.Sequential(*(nn.Linear(X.shape[1], X.shape[1]) for _ in range(depth)), nn.Linear(X.shape[1], 3))
        provider = TorchGradientProvider(deep.to(X.dtype), nn.CrossEntropyLoss(), blocks="layer")
        batch = TorchBatch(X[:40], Y[:40])
        provider.grads(batch)  # the first rows are looked at once for all
        provider.begin_pass()
        with Looks() as looks:
            provider.grads(batch)
        found.append(looks.found)
    assert found[0] == found[1] > 1


def test_rows_have_no_keys_where_no_label_is_drawn(monkeypatch):
    provider = TorchGradientProvider(model(), nn.CrossEntropyLoss())
    batch = TorchBatch(X[:40], Y[:40])
    found = Counter()
    counted(monkeypatch, TorchGradientProvider, "row_keys", found)
    provider.fisher_grads(batch, "exact")
    assert not found
    provider.fisher_grads(batch, "sampled", draws=range(3))
    assert found["row_keys"] == 1


def test_draws_of_a_batch_meet_in_one_product_for_each_factor(many, monkeypatch):
    influence = TorchComposableInfluence(model(), nn.CrossEntropyLoss(), hw.Kfac(fisher="exact"))
    found = Counter()
    counted(monkeypatch, outer, "_gram", found)
    influence.fit(TRAIN)
    assert found["_gram"] == 3 * 2 * 2  # pieces of rows, layers, and a factor on each side; not for each of 3 labels


def sequences(rows=12, positions=6, width=9):
    """A layer whose dense gradient is larger than its positions, though less than twice as large."""
    torch.manual_seed(0)
    x = torch.randn(rows, positions, width, dtype=torch.float64)
    y = torch.arange(rows) % 3
    model = nn.Sequential(nn.Linear(width, 16), nn.Tanh(), nn.Flatten(), nn.Linear(16 * positions, 3)).double()
    return model, x, y


def test_gradients_of_many_positions_are_made_dense_once_for_scores_and_diagnosis(monkeypatch):
    model, x, y = sequences()
    assert 6 * (16 + 10) > 16 * 10 / 2
    influence = TorchComposableInfluence(model, nn.CrossEntropyLoss(), hw.GradDot()).fit([(x, y)])
    monkeypatch.setattr(TorchGradientProvider, "_wrong_by_autograd", lambda *given: [])  # it makes rows dense, too
    rows_made = []
    dense = outer.Outer.dense
    monkeypatch.setattr(
        outer.Outer,
        "dense",
        lambda self: (self.positions > 1 and rows_made.append(self.rows)) or dense(self),
    )
    influence.attribute([(x, y)], [(x[:4], y[:4])])
    assert rows_made.count(12) == 1 and sum(rows_made) <= 12 + 4 + 1  # train rows, queries, and the first row's check


@pytest.mark.parametrize("method", [hw.GradDot(), hw.Ekfac(), hw.LoGra(dimension=2)], ids=lambda m: type(m).__name__)
def test_numbers_are_the_same_with_room_for_dense_gradients_and_without(method):
    model, x, y = sequences()
    batches = list(zip(x.split(5), y.split(5), strict=True))
    influence = TorchComposableInfluence(model, nn.CrossEntropyLoss(), method, damping=0.1).fit(batches)
    found = []
    for room in (2**26, 1):
        with hw.working_memory(room):
            scores = influence.attribute(batches, [(x[:4], y[:4])], by_block=True)
        found.append([scores.values, *scores.by_block.values()])
        found[-1] += [np.array(block.stationarity.ratio) for block in scores.diagnosis.blocks.values()]
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


def test_places_of_tied_and_shared_parameters_have_their_canonical_names_by_one_walk(monkeypatch):
    tied = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    tied[2].weight = tied[0].weight
    tied.append(tied[0])
    names = {id(t): name for name, t in chain(tied.named_parameters(), tied.named_buffers())}
    expected = {
        f"{prefix}.{role}": names[id(tensor)]
        for prefix, module in tied.named_modules()
        for role, tensor in chain(module._parameters.items(), module._buffers.items())
    }
    found = Counter()
    counted(monkeypatch, nn.Module, "named_modules", found)
    assert capture._slots(tied) == expected and expected["2.weight"] == "0.weight"
    assert found["named_modules"] == 1 + len(tied)  # of the model and, within it, of each child


@pytest.mark.parametrize("array", [torch.ones(2), np.ones(2), np.float64(1.0)], ids=lambda array: type(array).__name__)
def test_the_namespace_of_a_tensor_is_looked_up_once(array, monkeypatch):
    expected = array_api_compat.array_namespace(array)
    arrays.namespace(array)
    found = Counter()
    counted(monkeypatch, array_api_compat, "array_namespace", found)
    assert arrays.namespace(array) is arrays.namespace(array) is expected
    assert found["array_namespace"] == (0 if isinstance(array, torch.Tensor) else 2)
