"""Deprecated: this module is `headwater.retraining.torch.tail_patch`."""

from headwater.moved import moved

__getattr__ = moved(__name__, "headwater.retraining.torch.tail_patch")
