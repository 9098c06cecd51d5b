"""Which label a query gets: `explain="prediction"` asks why the model said what it says, in every framework."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import jax_models
import models
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier, SGDClassifier
from torch import nn

import headwater as hw
from headwater.errors import InvalidInput, InvalidSetting, UnsupportedModel
from headwater.gradients.likelihoods import Bernoulli, CrossEntropy
from headwater.jax import JaxComposableInfluence
from headwater.sklearn import SklearnBatch, SklearnComposableInfluence, TrainingInfluence
from headwater.torch import TorchComposableInfluence

rng = np.random.default_rng(0)


def fitted_classifier(classes: Any, estimator: Any = None) -> tuple[SklearnComposableInfluence, Any, Any, Any]:
    """An estimator that is wrong about some rows, its influence, and its rows."""
    x = rng.normal(size=(40, 4))
    labels = np.asarray(classes)[
        (x[:, 0] + 1.5 * rng.normal(size=40) > 0).astype(int) + (len(classes) > 2) * (x[:, 1] > 0)
    ]
    estimator = (LogisticRegression(C=0.7) if estimator is None else estimator).fit(x, labels)
    influence = SklearnComposableInfluence(estimator, hw.Direct(), damping=1e-3)
    return influence.fit([(x, labels)]), estimator, x, labels


@pytest.mark.parametrize(
    ("classes", "estimator"),
    [
        (["denied", "paid"], None),
        ([-7, 12], None),
        (["a", "b", "c"], None),
        ([3, 10, 11], RidgeClassifier(alpha=2.0)),
        (["no", "yes"], SGDClassifier(loss="log_loss", alpha=0.1, random_state=0)),
    ],
)
def test_a_prediction_is_what_the_estimator_predicts(classes: list[Any], estimator: Any) -> None:
    influence, estimator, x, y = fitted_classifier(classes, estimator)
    predicted = estimator.predict(x)
    assert (predicted != y).any()
    asked = influence.attribute([(x, y)], [(x[:15], y[:15])], explain="prediction")
    np.testing.assert_array_equal(asked.values, influence.attribute([(x, y)], [(x[:15], predicted[:15])]).values)
    assert asked.explained == "loss under the predicted label"
    assert "loss under the predicted label" in asked.unit_in_words
    assert asked.sign_in_words == "positive: the train row helps (it lowers the query's loss under the predicted label)"


def test_the_default_is_the_rows_own_label() -> None:
    influence, _, x, y = fitted_classifier([0, 1])
    plain = influence.attribute([(x, y)], [(x, y)])
    assert plain.explained == "loss"
    np.testing.assert_array_equal(plain.values, influence.attribute([(x, y)], [(x, y)], explain="label").values)


def test_another_word_is_refused() -> None:
    influence, _, x, y = fitted_classifier([0, 1])
    with pytest.raises(InvalidSetting, match="explain is 'why'; expected one of 'label', 'prediction'"):
        influence.attribute([(x, y)], [(x, y)], explain="why")


def test_top_explains_predictions_too() -> None:
    influence, _, x, y = fitted_classifier([0, 1])
    whole = influence.attribute([(x, y)], [(x[:6], y[:6])], explain="prediction").top(4)
    found = influence.top([(x, y)], [(x[:6], y[:6])], 4, explain="prediction")
    np.testing.assert_array_equal(found.helpful_ids, whole.helpful_ids)
    np.testing.assert_array_equal(found.harmful_ids, whole.harmful_ids)


def test_scores_of_a_training_influence_explain_predictions_too() -> None:
    _, estimator, x, y = fitted_classifier(["denied", "paid"])
    whole = TrainingInfluence(estimator).fit(x, y)
    np.testing.assert_array_equal(
        whole.scores(x[:5], y[:5], explain="prediction").values, whole.scores(x[:5], estimator.predict(x[:5])).values
    )


def test_removal_explains_predictions_too(tmp_path: Path) -> None:
    """By one step, and exactly; a folder of it knows queries by the labels that they were given."""
    influence, estimator, x, y = fitted_classifier(["denied", "paid"])
    predicted, rows = estimator.predict(x[:6]), [[0, 1], [5]]
    assert (predicted != y[:6]).any()
    influence = influence.with_damping(0.0)
    train, query = [(x, y)], [(x[:6], y[:6])]
    expected = influence.removal(train, [(x[:6], predicted)], rows)
    np.testing.assert_array_equal(influence.removal(train, query, rows, explain="prediction"), expected)
    influence.removal(train, query, store=tmp_path / "run")
    with pytest.raises(InvalidInput, match="query_rows"):
        influence.removal(train, query, store=tmp_path / "run", explain="prediction")
    whole = TrainingInfluence(estimator).fit(x, y)
    for verb in (whole.remove, lambda groups, *rest, **options: whole.forecast(*rest, groups, **options)):
        np.testing.assert_array_equal(verb(rows, x[:6], y[:6], explain="prediction"), verb(rows, x[:6], predicted))
    np.testing.assert_array_equal(
        whole.leave_one_out(x[:6], y[:6], explain="prediction"), whole.leave_one_out(x[:6], predicted)
    )
    with pytest.raises(InvalidSetting, match="explain is 'why'"):
        whole.remove(rows, x[:6], y[:6], explain="why")


def test_a_folder_of_labels_refuses_predictions(tmp_path: Path) -> None:
    """Also where all predictions are the labels, so that the numbers are the same: they answer another question."""
    influence, estimator, x, y = fitted_classifier([0, 1])
    right = estimator.predict(x) == y
    for number, rows in enumerate((slice(0, 10), np.flatnonzero(right)[:8])):
        train, query, folder = [(x, y)], [(x[rows], y[rows])], tmp_path / str(number)
        influence.attribute(train, query, store=folder)
        with pytest.raises(InvalidInput, match="explained"):
            influence.attribute(train, query, store=folder, explain="prediction")
    with pytest.raises(InvalidInput, match="query_rows"):
        influence.attribute(train, [(x[:10], estimator.predict(x[:10]))], store=tmp_path / "0")


def test_a_stored_run_says_what_it_is_about(tmp_path: Path) -> None:
    influence, _, x, y = fitted_classifier([0, 1])
    train, query = [(x, y)], [(x[:10], y[:10])]
    influence.attribute(train, query, store=tmp_path / "run", explain="prediction")
    again = influence.attribute(train, query, store=tmp_path / "run", explain="prediction")
    assert hw.Scores.open(tmp_path / "run").explained == again.explained == "loss under the predicted label"


def test_query_ids_and_weights_stay() -> None:
    influence, estimator, x, y = fitted_classifier([0, 1])
    ids, weights = np.arange(100, 108), np.linspace(0.5, 2, 8)
    asked = influence.attribute([(x, y)], [SklearnBatch(x[:8], y[:8], weights, ids)], explain="prediction")
    by_hand = influence.attribute([(x, y)], [SklearnBatch(x[:8], estimator.predict(x[:8]), weights, ids)])
    np.testing.assert_array_equal(asked.query_ids, ids)
    np.testing.assert_array_equal(asked.values, by_hand.values)


def test_kept_factors_have_the_labels_of_their_rows(tmp_path: Path) -> None:
    influence, _, x, y = fitted_classifier([0, 1])
    kept = influence.factors([(x[:4], y[:4])], store=tmp_path / "factors")
    with pytest.raises(InvalidSetting, match="kept factors are of the labels"):
        influence.attribute([(x, y)], kept, explain="prediction")


def test_a_regression_has_no_label_to_predict() -> None:
    x = rng.normal(size=(20, 3))
    y = x @ [1.0, 2.0, 3.0] + rng.normal(size=20)
    influence = SklearnComposableInfluence(Ridge().fit(x, y), hw.Direct()).fit([(x, y)])
    with pytest.raises(UnsupportedModel, match=r'gradient of zero.*give measurement="output"'):
        influence.attribute([(x, y)], [(x[:3], y[:3])], explain="prediction")


def test_a_torch_classifier_is_asked_about_its_argmax() -> None:
    case = models.mlp()
    influence = TorchComposableInfluence(case.model, case.loss, hw.Ekfac(), damping=hw.relative(0.1))
    influence.fit([(case.x, case.y)])
    predicted = case.model(case.x).argmax(1)
    assert bool((predicted != case.y).any())
    asked = influence.attribute([(case.x, case.y)], [(case.x, case.y)], explain="prediction")
    by_hand = influence.attribute([(case.x, case.y)], [(case.x, predicted)])
    np.testing.assert_array_equal(asked.values, by_hand.values)


@pytest.mark.parametrize("loss", [nn.BCEWithLogitsLoss(), nn.BCELoss()])
def test_a_torch_model_of_one_output_is_asked_about_its_side_of_the_threshold(loss: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(3, 1), *([nn.Sigmoid()] if isinstance(loss, nn.BCELoss) else [])).double()
    x, y = torch.as_tensor(rng.normal(size=(12, 3))), torch.as_tensor(rng.integers(0, 2, (12, 1))).double()
    influence = TorchComposableInfluence(model, loss, hw.Direct(), damping=0.1).fit([(x, y)])
    output = model(x).detach()
    threshold = 0.5 if isinstance(loss, nn.BCELoss) else 0.0
    asked = influence.attribute([(x, y)], [(x, y)], explain="prediction")
    by_hand = influence.attribute([(x, y)], [(x, (output > threshold).double())])
    np.testing.assert_array_equal(asked.values, by_hand.values)


def test_a_torch_regression_and_an_unknown_loss_are_refused() -> None:
    x, y = torch.as_tensor(rng.normal(size=(12, 3))), torch.as_tensor(rng.normal(size=(12, 1)))
    for loss, said in ((nn.MSELoss(), "predicts a number"), (lambda o, t: ((o - t) ** 4).mean(), "likelihood=")):
        influence = TorchComposableInfluence(nn.Linear(3, 1).double(), loss, hw.Direct(), damping=0.1).fit([(x, y)])
        with pytest.raises(UnsupportedModel, match=said):
            influence.attribute([(x, y)], [(x, y)], explain="prediction")


def test_a_jax_classifier_is_asked_about_its_argmax() -> None:
    case = jax_models.mlp()
    influence = JaxComposableInfluence(case.apply, case.params, case.loss, hw.Direct(), damping=0.1)
    influence.fit([(case.x, case.y)])
    predicted = jnp.argmax(case.apply(case.params, case.x), axis=1)
    assert bool((predicted != case.y).any())
    asked = influence.attribute([(case.x, case.y)], [(case.x, case.y)], explain="prediction")
    by_hand = influence.attribute([(case.x, case.y)], [(case.x, predicted.astype(case.y.dtype))])
    np.testing.assert_array_equal(asked.values, by_hand.values)


def test_targets_keep_their_form() -> None:
    """Ignored labels stay ignored; probabilities go whole to the likeliest class; classes may be on axis 1."""
    logits = torch.as_tensor(rng.normal(size=(2, 5, 3)))
    target = torch.tensor([[0, -100, 2], [1, 1, -100]])
    found = CrossEntropy(-100, class_axis=1).predicted(logits, target)
    assert torch.equal(found, torch.where(target == -100, -100, logits.argmax(1)))
    masses = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.5, 0.0]])
    soft = CrossEntropy().predicted(torch.tensor([[3.0, 1.0, 2.0], [0.0, 0.0, 9.0]]), masses)
    torch.testing.assert_close(soft, torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    assert Bernoulli().predicted(np.array([[-1.0], [2.0]]), np.array([[0], [0]])).tolist() == [[0], [1]]


def test_models_of_an_ensemble_must_agree() -> None:
    case, other = models.mlp(), models.mlp()
    influence = TorchComposableInfluence(case.model, case.loss, hw.GradDot(), checkpoints=[case.model.state_dict()] * 2)
    influence.fit([(case.x, case.y)])
    alone = TorchComposableInfluence(case.model, case.loss, hw.GradDot()).fit([(case.x, case.y)])
    train = [(case.x, case.y)]
    np.testing.assert_allclose(
        influence.attribute(train, train, explain="prediction").values,
        alone.attribute(train, train, explain="prediction").values,
    )
    turned = {name: -value for name, value in other.model.state_dict().items()}
    differing = TorchComposableInfluence(
        case.model, case.loss, hw.GradDot(), checkpoints=[case.model.state_dict(), turned]
    ).fit(train)
    with pytest.raises(UnsupportedModel, match="the 2 models predict different labels"):
        differing.attribute(train, train, explain="prediction")
