"""What a pretrained model predicts, as the label of a query: of rows and of tokens; of a text it generates, refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hf_cases import case_of

import headwater as hw
from headwater.errors import UnsupportedModel
from headwater.hf import HfComposableInfluence


def asked_and_by_hand(name: str) -> tuple[np.ndarray, np.ndarray, torch.Tensor, torch.Tensor]:
    case = case_of(name)
    influence = HfComposableInfluence(case.model, hw.GradDot())
    x, y = case.rows(range(5))
    influence.fit([(x, y)])
    with torch.no_grad():
        logits = case.model(**x).logits
    if name == "bert several labels":
        predicted = (logits > 0).to(y.dtype)
    else:
        predicted = torch.where(y == -100, y, logits.argmax(-1))
    assert not torch.equal(predicted, y)
    found = influence.attribute([(x, y)], [(x, y)], explain="prediction")
    return found.values, influence.attribute([(x, y)], [(x, predicted)]).values, predicted, y


@pytest.mark.parametrize("name", ["bert sequence", "bert tokens", "bert several labels"])
def test_rows_and_tokens_get_the_likeliest_label(name: str) -> None:
    asked, by_hand, _, _ = asked_and_by_hand(name)
    np.testing.assert_allclose(asked, by_hand, rtol=1e-12, atol=1e-14)


def test_a_language_models_text_is_no_label() -> None:
    case = case_of("gpt2")
    x, y = case.rows(range(3))
    influence = HfComposableInfluence(case.model, hw.GradDot()).fit([(x, y)])
    with pytest.raises(UnsupportedModel, match="Let it generate"):
        influence.attribute([(x, y)], [(x, y)], explain="prediction")


def test_a_regression_head_predicts_a_number() -> None:
    case = case_of("bert regression")
    x, y = case.rows(range(3))
    influence = HfComposableInfluence(case.model, hw.GradDot()).fit([(x, y)])
    with pytest.raises(UnsupportedModel, match="predicts a number"):
        influence.attribute([(x, y)], [(x, y)], explain="prediction")
