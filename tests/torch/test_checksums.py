"""Checksums on the device are zlib's, and parameters do not leave it."""

import zlib

import numpy as np
import pytest
import torch
from torch import nn

from headwater.torch import TorchGradientProvider, checksums

SIZES = (0, 1, 3, 4, 255, 256, 257, 511, 512, 1000, 5000, 12345)


def of_bytes(size, seed=0):
    return torch.as_tensor(np.random.default_rng((seed, size)).integers(0, 256, size, dtype=np.uint8))


@pytest.mark.parametrize("group", [1, 2, 7, 2**18])
def test_checksums_are_those_of_zlib(group, monkeypatch):
    monkeypatch.setattr(checksums, "GROUP", group)
    tensors = [of_bytes(size) for size in SIZES]
    assert checksums.crc32s(tensors) == tuple(zlib.crc32(t.numpy().tobytes()) for t in tensors)


def test_zeros_and_ones_in_every_place_are_told_apart():
    found = checksums.crc32s([torch.eye(600, dtype=torch.uint8)[k] for k in range(600)])
    assert len(set(found)) == 600


def test_no_tensors_have_no_checksums():
    assert checksums.crc32s([]) == ()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_fingerprint_is_the_same_wherever_it_is_computed(dtype, monkeypatch):
    model = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).to(dtype).eval()
    provider = TorchGradientProvider(model, nn.CrossEntropyLoss())
    on_the_host = provider.fingerprint()
    monkeypatch.setattr("headwater.torch.provider._is_on_host", lambda tensor: False)
    assert provider.fingerprint() == on_the_host
    with torch.no_grad():
        model[2].bias[1] += 1e-3
    assert provider.fingerprint() != on_the_host


def test_a_fingerprint_looks_at_the_device_once(monkeypatch):
    model = nn.Sequential(*(nn.Linear(9, 9) for _ in range(6)))
    provider = TorchGradientProvider(model, nn.CrossEntropyLoss())
    monkeypatch.setattr("headwater.torch.provider._is_on_host", lambda tensor: False)
    copied = []
    plain = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self, *args: copied.append(self.nbytes) or plain(self, *args))
    provider.fingerprint()
    assert len(copied) == 1 and copied[0] < sum(p.nbytes for p in model.parameters()) / 10
