"""Deprecated: this module is `headwater.retraining.torch.many`."""

from headwater.moved import moved

__getattr__ = moved(__name__, "headwater.retraining.torch.many")
