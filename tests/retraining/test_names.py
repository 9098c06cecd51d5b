"""Names of models trained again: where they are, where the frameworks' packages offer them, and where they were."""

import subprocess
import sys
import warnings
from importlib import import_module

import numpy as np
import pytest

import headwater.retraining.sklearn
import headwater.retraining.torch
import headwater.sklearn
import headwater.torch
from headwater.gradients.likelihoods import OutputLoss

MOVED = {
    "headwater.torch.trainer": ("headwater.retraining.torch.trainer", "train_mlps"),
    "headwater.torch.many": ("headwater.retraining.torch.many", "train_many"),
    "headwater.torch.tail_patch": ("headwater.retraining.torch.tail_patch", "gradient_step"),
    "headwater.sklearn.retraining": ("headwater.retraining.sklearn.refit", "Refit"),
}


def test_the_frameworks_packages_offer_what_they_list():
    for package in (headwater.torch, headwater.sklearn):
        assert all(getattr(package, name) is not None for name in package.__all__)
    assert headwater.torch.pbrf is headwater.retraining.torch.pbrf
    assert headwater.sklearn.TrainingInfluence is headwater.retraining.sklearn.TrainingInfluence


def test_a_name_that_is_nowhere_is_refused():
    with pytest.raises(ImportError, match="cannot import name 'Trainer'"):
        from headwater.torch import Trainer  # noqa: F401
    with pytest.raises(AttributeError, match=r"module 'headwater\.sklearn' has no attribute 'nothing'"):
        headwater.sklearn.nothing  # noqa: B018


def test_gradients_are_there_without_what_trains_again():
    code = "import sys, headwater.torch, headwater.sklearn; print(*(n for n in sys.modules if 'retraining' in n))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == []


@pytest.mark.parametrize("old", MOVED)
def test_a_module_that_moved_works_under_its_old_name_and_says_so_where_it_is_imported(old):
    new, name = MOVED[old]
    sys.modules.pop(old, None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        exec(compile(f"from {old} import {name}", "user.py", "exec"), found := {})
    assert found[name] is getattr(import_module(new), name)
    assert [(str(w.message), w.category, w.filename) for w in said] == [
        (f"{old} is now {new}; the old name ends in 0.2.", DeprecationWarning, "user.py")
    ]


def test_a_class_of_another_name_works_under_the_old_one_and_says_so():
    with pytest.warns(DeprecationWarning, match=r"\.Extremes is now headwater\.TopK; the old name ends in 0\.2"):
        assert headwater.Extremes is headwater.TopK
    assert "Extremes" not in headwater.__all__


def test_an_output_loss_that_was_written_with_slope_works_and_says_so():
    with pytest.warns(DeprecationWarning, match=r"Half: OutputLoss\.slope is now gradient; the old name ends in 0\.2"):

        class Half(OutputLoss):
            name = "half"

            def slope(self, output, target):
                return output - target

            def hessian(self, output, target):
                return np.ones((len(output), 1, 1))

    assert Half().gradient(np.ones((2, 1)), 0.0).sum() == 2
