"""Claims about models in wrappers: data parallel, compiled, spread by FSDP2; in one process (two: tests/run)."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import headwater as hw
from headwater.errors import UnsupportedModel
from headwater.torch import TorchBatch, TorchComposableInfluence, TorchGradientProvider

torch.manual_seed(0)
X, Y = torch.randn(24, 5), torch.arange(24) % 3
TRAIN = [TorchBatch(X[cut], Y[cut], weights=1.0 + X[cut, 0] ** 2) for cut in (slice(0, 7), slice(7, 14), slice(14, 24))]
QUERIES = [(X[:4] + 0.1, Y[:4])]


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Nested(nn.Module):
    """Has a buffer, and layers within a layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.LayerNorm(6))
        self.register_buffer("shift", torch.linspace(-0.1, 0.1, 6))
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.first(x) + self.shift)


class Scaled(Nested):
    """Has a parameter that no layer's rule fills, too."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 6))

    def forward(self, x):
        return self.last(self.first(x) * self.scale)


def model(kind=Nested):
    torch.manual_seed(1)
    return kind().eval()


def scaled():
    return model(Scaled)


def sharded(make=model):
    found, mesh = make(), init_device_mesh("cpu", (1,))
    for each in (*found.children(), found):
        fully_shard(each, mesh=mesh)
    return found


def influence(of, method=None, **options):
    damping = None if isinstance(method, hw.GradDot) else hw.relative(0.3)
    return TorchComposableInfluence(of, nn.CrossEntropyLoss(), method or hw.Ekfac(), damping=damping, **options)


def scores(fitted):
    return fitted.fit(TRAIN).attribute(TRAIN, QUERIES).values


def compiled(inner):
    return torch.compile(inner, backend="eager")


DDP = nn.parallel.DistributedDataParallel
WRAPPERS = [
    pytest.param(DDP, id="DDP"),
    pytest.param(nn.DataParallel, id="DataParallel"),
    pytest.param(compiled, id="compiled", marks=pytest.mark.slow),
    pytest.param(lambda inner: DDP(compiled(inner)), id="compiled, then DDP", marks=pytest.mark.slow),
    pytest.param(lambda inner: compiled(DDP(inner)), id="DDP, then compiled", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_model_is_the_module_inside(wrap, monkeypatch):
    bare = influence(model())
    expected = scores(bare)
    wrapped = wrap(model())
    before = {name: value.clone() for name, value in wrapped.state_dict().items()}
    for name in ("all_reduce", "broadcast", "all_gather", "_broadcast_coalesced"):
        monkeypatch.setattr(dist, name, None)  # no collective
    fitted = influence(wrapped)
    np.testing.assert_array_equal(scores(fitted), expected)
    assert fitted.block_names == bare.block_names
    assert fitted.identity() == bare.identity()
    assert list(wrapped.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in wrapped.state_dict().items())
    assert all(parameter.grad is None for parameter in wrapped.parameters())


def test_a_fit_of_the_wrapped_model_is_one_of_the_bare_model(tmp_path):
    expected = scores(influence(model()))
    influence(DDP(model())).fit(TRAIN).save(tmp_path / "fit")
    found = influence(model()).load(tmp_path / "fit").attribute(TRAIN, QUERIES).values
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_checkpoints_may_be_wrapped():
    other = model()
    with torch.no_grad():
        other.last.weight *= 1.1
    expected = scores(influence(model(), checkpoints=[model(), other]))
    wrapped = [DDP(each) for each in (model(), other)]
    np.testing.assert_array_equal(scores(influence(wrapped[0], checkpoints=wrapped)), expected)


# FSDP2 ----------------------------------------------------------------------------------------------------------------

QUICK = [hw.GradDot(), hw.Ekfac()]
MORE = [
    hw.Cg(),
    hw.Ekfac(fisher="empirical"),
    hw.Kfac(fisher="exact"),
    hw.Direct(),
    hw.Direct(curvature="hessian", allow_indefinite=True),
    hw.Cg(curvature="hessian", allow_indefinite=True),
    hw.Dual(),
    hw.LoGra(dimension=2),
    hw.Trak(dimension=8),
    hw.TracIn(0.1),
]
CASES = [pytest.param(model, method, id=method.describe()) for method in QUICK]
CASES += [pytest.param(model, method, id=method.describe(), marks=pytest.mark.slow) for method in MORE]
CASES += [
    pytest.param(scaled, method, id=f"{method.describe()}, plain gradients", marks=pytest.mark.slow)
    for method in (*QUICK, hw.Cg(), hw.Direct())
]


@pytest.mark.parametrize(("make", "method"), CASES)
def test_a_model_that_fsdp_spreads_has_the_scores_of_the_plain_one(make, method):
    expected = scores(influence(make(), method))
    spread = sharded(make)
    found = scores(influence(spread, method))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * abs(expected).max())
    assert all(type(p).__name__ == "DTensor" and p.grad is None for p in spread.parameters())


def test_its_fit_is_one_of_the_plain_model(tmp_path):
    plain, spread = influence(model()), influence(sharded())
    assert spread.fit(TRAIN).identity() == plain.fit(TRAIN).identity()
    spread.save(tmp_path / "fit")
    found = influence(model()).load(tmp_path / "fit").attribute(TRAIN, QUERIES).values
    np.testing.assert_allclose(found, scores(plain), rtol=1e-4, atol=1e-5)


def test_it_goes_on_training_as_if_nothing_had_been():
    def step(of):
        optimiser = torch.optim.SGD(of.parameters(), lr=0.1)
        nn.functional.cross_entropy(of(X), Y).backward()
        optimiser.step()
        return of.last.weight.detach()

    untouched, spread = sharded(), sharded()
    spread(X)  # whole parameters of a forward pass are still there
    scores(influence(spread, hw.Direct(curvature="hessian", allow_indefinite=True)))
    torch.testing.assert_close(step(spread).full_tensor(), step(untouched).full_tensor(), rtol=0, atol=0)
    groups = [each._get_fsdp_state()._fsdp_param_group for each in spread.modules() if isinstance(each, FSDPModule)]
    assert all(group is None or group.reshard_after_backward for group in groups)


class Odd(nn.Linear):
    """A layer whose rule does not hold: it doubles what it computes, and so its gradients."""

    def forward(self, x):
        return super().forward(x) * 2 + self.bias


def odd():
    torch.manual_seed(1)
    return nn.Sequential(Odd(5, 4), nn.Tanh(), nn.Linear(4, 3))


def test_rules_that_do_not_hold_are_found_and_replaced_there_too():
    expected = scores(influence(odd(), hw.GradDot()))
    np.testing.assert_allclose(scores(influence(sharded(odd), hw.GradDot())), expected, rtol=1e-5, atol=1e-6)


def test_losses_and_parameters_are_whole():
    plain, spread = (TorchGradientProvider(of, nn.CrossEntropyLoss(), blocks="layer") for of in (model(), sharded()))
    assert spread.fingerprint() == plain.fingerprint()
    for block in plain.layouts:
        torch.testing.assert_close(spread.parameters(block), plain.parameters(block), rtol=0, atol=0)
    torch.testing.assert_close(spread.losses(TRAIN[0]), plain.losses(TRAIN[0]))


def test_a_model_that_is_not_used_any_more_goes():
    spread = sharded()
    first, second = influence(spread, hw.GradDot()).fit(TRAIN), influence(spread, hw.GradDot())
    del first
    gc.collect()
    second.fit(TRAIN)  # still known to be spread
    gone = weakref.ref(spread)
    del second, spread
    gc.collect()
    assert gone() is None


# What is refused ------------------------------------------------------------------------------------------------------


def test_what_needs_a_model_in_one_process_is_refused_with_the_remedy():
    spread = sharded()
    fitted = influence(spread).fit(TRAIN)
    for ask in (
        lambda: fitted.influences(X[:2], Y[:2], X[:3], Y[:3], mode="perturbation"),
        lambda: influence(spread, checkpoints=[model()]),
        lambda: TorchGradientProvider(spread, nn.CrossEntropyLoss(), plain=True),
    ):
        with pytest.raises(UnsupportedModel, match=r"fully_shard \(FSDP2\)"):
            ask()


@pytest.mark.slow
def test_a_spread_model_is_verified_as_far_as_it_goes():
    assert "(FSDP2)" in str(influence(sharded()).fit(TRAIN).verify(TRAIN, QUERIES))


def test_tensor_parallel_models_are_refused():
    mesh = init_device_mesh("cpu", (1,))
    parallel = parallelize_module(model(), mesh, {"last": ColwiseParallel()})
    with pytest.raises(UnsupportedModel, match=r"last\.weight is a DTensor, .*full_tensor"):
        influence(parallel)


def test_tensor_parallel_models_within_fsdp_are_refused():
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "tensor"))
    parallel = parallelize_module(model(), mesh["tensor"], {"last": ColwiseParallel()})
    with pytest.raises(UnsupportedModel, match="tensor parallelism"):
        influence(fully_shard(parallel, mesh=mesh["data"]))


@pytest.mark.filterwarnings("ignore:FSDP is switching")
def test_fsdp1_is_refused():
    with pytest.raises(UnsupportedModel, match=r"FSDP1.*Wrap the model by fully_shard"):
        influence(FullyShardedDataParallel(model(), device_id=torch.device("cpu")))


@pytest.mark.slow  # imports a compiler
def test_a_stage_of_a_pipeline_is_refused():
    from torch.distributed.pipelining import PipelineStage

    with pytest.raises(UnsupportedModel, match="PipelineStage is one stage of a pipeline"):
        influence(PipelineStage(model(), 0, 1, torch.device("cpu")))


def test_wrappers_within_a_model_are_refused():
    nested = nn.Sequential(DDP(model()))
    with pytest.raises(UnsupportedModel, match="0 is wrapped in DistributedDataParallel within"):
        influence(nested)
