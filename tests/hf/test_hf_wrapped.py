"""Pretrained models in wrappers: in DDP, and spread by FSDP2 (in one process)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hf_cases import gpt2, llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import headwater as hw
from headwater.errors import UnsupportedModel
from headwater.hf import HfComposableInfluence

pytestmark = pytest.mark.slow
IDS = torch.randint(1, 11, (6, 5), generator=torch.Generator().manual_seed(0))
TRAIN = [{"input_ids": IDS[:4]}, {"input_ids": IDS[4:]}]
QUERIES = [{"input_ids": IDS[:2]}]


@pytest.fixture(scope="module", autouse=True)
def group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fitted(model, method):
    return HfComposableInfluence(model, method).fit(TRAIN)


@pytest.mark.parametrize("make", [gpt2, llama], ids=lambda make: make.__name__)
@pytest.mark.parametrize("method", [hw.GradDot(), hw.Ekfac()], ids=lambda method: method.describe())
def test_wrapped_models_have_the_scores_of_the_model_inside(make, method):
    plain, spread, mesh = fitted(make(), method), make(), init_device_mesh("cpu", (1,))
    for layer in spread.transformer.h if make is gpt2 else spread.model.layers:
        fully_shard(layer, mesh=mesh)
    expected = plain.attribute(TRAIN, QUERIES).values
    for model in (fully_shard(spread, mesh=mesh), DistributedDataParallel(make())):
        found = fitted(model, method)
        assert found.identity() == plain.identity()
        np.testing.assert_allclose(found.attribute(TRAIN, QUERIES).values, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(UnsupportedModel, match="scoring tokens"):
        fitted(spread, method).token_scores(QUERIES[0], IDS[:2], TRAIN[0], IDS[:4])
