"""Deprecated: this module is `headwater.retraining.sklearn.refit`."""

from headwater.moved import moved

__getattr__ = moved(__name__, "headwater.retraining.sklearn.refit")
