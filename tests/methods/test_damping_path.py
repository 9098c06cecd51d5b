"""Several dampings at once are the same as each by itself, and block-Krylov pays for one of them only."""

import models
import pytest
import torch
from truth import assert_close, fitted

import headwater as hw

FACTORS = (0.1, 1.0, 10.0)
METHODS = {
    "direct": hw.Direct("ggn"),
    "ekfac": hw.Ekfac(),
    "cg": hw.Cg(tolerance=1e-12),
    "block-krylov": hw.BlockKrylov(tolerance=1e-12, preconditioner="ekfac"),
    "lorif": hw.LoRif(dimension=2),
}


@pytest.mark.parametrize("mode", ["up", "perturbation"])
@pytest.mark.parametrize("method", METHODS)
def test_a_path_of_dampings_is_each_damping_by_itself(method, mode):
    case = models.CASES["mlp"]()
    influence = fitted(case, METHODS[method], "layer", damping=hw.relative(1.0))
    rows = (case.x_query, case.y_query, case.x, case.y)
    path = influence.damping_path([hw.relative(f) for f in FACTORS], *rows, mode=mode)
    for factor, scores in zip(FACTORS, path, strict=True):
        assert_close(scores, influence.with_damping(hw.relative(factor)).influences(*rows, mode=mode), 1e6)


def test_block_krylov_pays_for_one_damping_only():
    case = models.CASES["mlp"]()
    influence = fitted(case, METHODS["block-krylov"], "full", damping=hw.relative(1.0))
    rows = (case.x_query, case.y_query, case.x, case.y)
    influence.influences(*rows)
    alone = influence.solves["full"].products
    path = influence.damping_path([hw.relative(f) for f in (1.0, 2.0, 4.0)], *rows)
    assert influence.solves["full"].products == alone, "the others take none"
    assert len(path) == 3
    assert not torch.allclose(path[0], path[2])


def test_no_dampings_give_no_scores():
    case = models.CASES["mlp"]()
    influence = fitted(case, hw.Ekfac(), "layer")
    assert influence.damping_path([], case.x_query, case.y_query) == []
