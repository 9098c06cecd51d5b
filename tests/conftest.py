"""One thread per process, so that sums have one order; hypothesis draws the same examples on every machine."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read once, when the first numerical library is loaded

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("headwater", deadline=None, derandomize=True)
settings.load_profile("headwater")
