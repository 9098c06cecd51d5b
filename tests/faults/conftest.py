"""Small tiles, and folders with one of each artefact."""

import fault_job
import pytest


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    for module, name, value in fault_job.SIZES:
        monkeypatch.setattr(module, name, value)
