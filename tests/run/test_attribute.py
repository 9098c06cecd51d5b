"""Loaders in, labelled scores out: the same numbers as `influences`, with names, units and blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from models import language, mlp, sentences, signals, split_rows
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, TensorDataset
from truth import assert_close, fitted

import headwater as hw
from headwater.errors import BatchMismatch, InvalidInput, InvalidSetting, SingularOperator
from headwater.torch import TorchBatch, TorchComposableInfluence

METHODS = [hw.GradDot(), hw.GradCos(), hw.Direct("ggn"), hw.Kfac("factored"), hw.Ekfac(), hw.Ekfac(rank=1)]
METHODS_SELF = [*METHODS, hw.Direct("hessian", allow_indefinite=True), hw.Kfac()]


def queries(case: Any, size: int = 2) -> list[Any]:
    return split_rows(case.x_query, case.y_query, size)


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("make", [mlp, sentences, signals])
def test_attribute_gives_what_influences_gives_whatever_the_batches(make: Any, method: hw.methods.base.Method) -> None:
    case = make()
    influence = fitted(case, method, "layer", damping=hw.relative(0.1))
    expected = influence.influences_by_block(case.x_query, case.y_query, case.x, case.y)
    for train_size, query_size in ((4, 2), (11, 5), (1, 1)):
        scores = influence.attribute(case.loader(train_size), queries(case, query_size), by_block=True)
        assert list(scores.by_block) == list(expected)
        for block in expected:
            assert_close(scores.by_block[block], expected[block], 1e3)
        assert_close(np.asarray(scores), sum(expected.values()), 1e3)
        assert_close(sum(scores.by_block.values()), scores.values)
        whole = influence.attribute(case.loader(train_size), queries(case, query_size))
        assert_close(whole.values, scores.values, 1e3)
        assert whole.by_block is None


def test_few_and_many_train_rows_take_other_routes_to_the_same_scores() -> None:
    """Which side an eigenbasis is applied to depends on the numbers of rows; the scores do not."""
    case = mlp()
    influence = fitted(case, hw.Ekfac(), "layer", damping=hw.relative(0.1))
    whole = influence.influences(case.x_query, case.y_query, case.x, case.y)
    back = influence.influences(case.x, case.y, case.x_query[:1], case.y_query[:1])
    assert_close(back[:, 0], whole[0], 1e3)
    one = influence.influences(case.x_query, case.y_query, case.x[:1], case.y[:1])
    assert_close(one[:, 0], whole[:, 0], 1e3)


def test_scores_by_hand() -> None:
    """One weight w, output w x, loss (w x - y)^2: gradient 2 x (w x - y), curvature the mean of 2 x^2."""
    model = torch.nn.Linear(1, 1, bias=False).double().eval()
    with torch.no_grad():
        model.weight.fill_(3.0)
    x = torch.tensor([[1.0], [2.0], [-1.0]], dtype=torch.float64)
    y = torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64)
    # gradients: 2 * 1 * 2 = 4, 2 * 2 * 6 = 24, 2 * (-1) * (-3) = 6; curvature: (2 + 8 + 2) / 3 = 4
    influence = TorchComposableInfluence(model, torch.nn.MSELoss(), hw.Direct("ggn"), damping=1.0).fit([(x, y)])
    scores = influence.attribute([(x, y)], [(x[:2], y[:2])])
    assert_close(scores.values, np.array([[16.0, 96.0, 24.0], [96.0, 576.0, 144.0]]) / 5.0)
    removal = influence.attribute([(x, y)], [(x[:2], y[:2])], unit="removal")
    assert_close(removal.values, np.array([[16.0, 96.0, 24.0], [96.0, 576.0, 144.0]]) / 15.0)
    assert_close(influence.self_influence([(x, y)]), np.array([16.0, 576.0, 36.0]) / 5.0)


def test_scores_know_where_they_come_from() -> None:
    case = mlp()
    influence = fitted(case, hw.Ekfac(rank=2), "layer", damping={"first": 0.25, "second": 0.5})
    scores = influence.attribute(case.loader(), queries(case), unit="removal")
    assert (scores.unit, scores.n_train, scores.method) == ("removal", 11.0, repr(hw.Ekfac(rank=2)))
    assert scores.damping == {"first": 0.25, "second": 0.5}
    assert scores.query_ids.tolist() == list(range(5)) and scores.train_ids.tolist() == list(range(11))
    plain = influence.attribute(case.loader(), queries(case))
    assert_close(scores.values * 11.0, plain.values)


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_ids_follow_their_rows(kind: Any) -> None:
    case = mlp()
    influence = fitted(case, hw.Direct("ggn"), "layer")
    names, query_names = [50, 7, 3, 99, 12, 1, 0, 8, 60, 61, 5], [9, 4, 30, 2, 1]
    train = [
        TorchBatch(x, y, ids=kind(names[start : start + 4]))
        for start, (x, y) in zip((0, 4, 8), case.loader(), strict=True)
    ]
    asked = [
        TorchBatch(x, y, ids=kind(query_names[start : start + 2]))
        for start, (x, y) in zip((0, 2, 4), queries(case), strict=True)
    ]
    plain = influence.influences(case.x_query, case.y_query, case.x, case.y).numpy()
    scores = influence.attribute(train[::-1], asked)
    assert scores.train_ids.tolist() == names[8:] + names[4:8] + names[:4]
    assert scores.query_ids.tolist() == query_names
    column = [names.index(name) for name in scores.train_ids]
    assert_close(scores.values, plain[:, column], 1e3)
    best = influence.top(train[::-1], asked, 3)
    assert best.query_ids.tolist() == query_names
    expected = np.asarray(names)[np.argsort(-plain, axis=1)[:, :3]]
    assert (best.helpful_ids == expected).all()


@pytest.mark.parametrize("where", ["train", "query"])
@pytest.mark.parametrize("within", [True, False])
def test_ids_that_occur_twice_are_refused(where: str, within: bool) -> None:
    case = mlp()
    influence = fitted(case, hw.GradDot(), "layer")
    ids = [[5, 5], [6, 7]] if within else [[5, 6], [5, 7]]
    doubled = [
        TorchBatch(case.x[k : k + 2], case.y[k : k + 2], ids=torch.tensor(i)) for k, i in zip((0, 2), ids, strict=True)
    ]
    loaders = (doubled, queries(case)) if where == "train" else (case.loader(), doubled)
    with pytest.raises(BatchMismatch, match=rf"{where} rows have the ids \[5\] more than once"):
        influence.attribute(*loaders)


def test_equal_rows_keep_their_own_places() -> None:
    """Exact duplicates are two rows with two names and one score."""
    case = mlp()
    x, y = torch.cat([case.x, case.x[:2]]), torch.cat([case.y, case.y[:2]])
    influence = TorchComposableInfluence(case.model, case.loss, hw.Ekfac(), damping=0.1).fit(split_rows(x, y, 4))
    scores = influence.attribute(split_rows(x, y, 4), queries(case))
    assert scores.shape == (5, 13) and len(set(scores.train_ids.tolist())) == 13
    assert_close(scores.values[:, 11:], scores.values[:, :2])
    assert_close(influence.self_influence(split_rows(x, y, 4))[11:], influence.self_influence(split_rows(x, y, 4))[:2])


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_top_holds_both_ends_of_the_whole_ranking(method: Any) -> None:
    case = sentences()
    influence = fitted(case, method, "layer", damping=hw.relative(0.1))
    scores = influence.attribute(case.loader(4), queries(case)).values
    for k in (1, 3, 40):
        found = influence.top(case.loader(3), queries(case, 5), k)
        down, up = np.argsort(-scores, axis=1)[:, :k], np.argsort(scores, axis=1)[:, :k]
        assert_close(found.helpful_scores, np.take_along_axis(scores, down, axis=1), 1e3)
        assert_close(found.harmful_scores, np.take_along_axis(scores, up, axis=1), 1e3)
        for q in range(len(scores)):
            assert_close(scores[q, found.helpful_ids[q]], found.helpful_scores[q], 1e3)
            assert_close(scores[q, found.harmful_ids[q]], found.harmful_scores[q], 1e3)
    removal = influence.attribute if not method.predicts_removal else None
    if removal is None:
        best = influence.top(case.loader(), queries(case), 2, unit="removal").helpful_scores
        assert_close(best * 11.0, influence.top(case.loader(), queries(case), 2).helpful_scores, 1e3)


def test_ties_go_to_the_row_that_came_first() -> None:
    case = mlp()
    x, y = case.x[:1].repeat(6, 1), case.y[:1].repeat(6)
    influence = fitted(case, hw.GradDot(), "layer")
    found = influence.top(split_rows(x, y, 2), queries(case), 3)
    assert found.helpful_ids.tolist() == found.harmful_ids.tolist() == [[0, 1, 2]] * 5


@pytest.mark.parametrize("method", METHODS_SELF, ids=repr)
@pytest.mark.parametrize("make", [mlp, signals, sentences, language])
def test_self_influence_is_the_diagonal(make: Any, method: Any) -> None:
    case = make()
    influence = fitted(case, method, case.own_blocks, damping=0.1)
    diagonal = torch.diagonal(influence.influences(case.x, case.y, case.x, case.y))
    for size in (4, 11):
        assert_close(influence.self_influence(case.loader(size)), diagonal, 1e4)


def test_self_influence_is_of_the_loss_not_of_the_measurement() -> None:
    case = mlp()
    influence = fitted(case, hw.Direct("ggn"), "layer", damping=0.1)
    measured = fitted(case, hw.Direct("ggn"), "layer", damping=0.1, measurement=lambda o, t: o.square().sum())
    assert_close(measured.self_influence(case.loader()), influence.self_influence(case.loader()))


def test_a_data_loader_of_torch_is_taken() -> None:
    case = mlp()
    influence = fitted(case, hw.Direct("ggn"), "layer", damping=0.1)
    train = DataLoader(TensorDataset(case.x, case.y), batch_size=4)
    scores = influence.attribute(train, DataLoader(TensorDataset(case.x_query, case.y_query), batch_size=3))
    assert_close(scores.values, influence.influences(case.x_query, case.y_query, case.x, case.y))


def test_positions_count_across_batches_where_only_some_are_empty() -> None:
    case = mlp()
    influence = fitted(case, hw.GradDot(), "layer")
    empty = (case.x[:0], case.y[:0])
    scores = influence.attribute([empty, *case.loader(), empty], [*queries(case), empty])
    assert scores.train_ids.tolist() == list(range(11))
    assert_close(scores.values, influence.influences(case.x_query, case.y_query, case.x, case.y))


def test_working_memory_does_not_change_scores_or_ids() -> None:
    case = signals()
    influence = fitted(case, hw.Ekfac(), "layer", damping=0.1)
    whole, own = influence.attribute(case.loader(), queries(case)), influence.self_influence(case.loader())
    with hw.working_memory(1):
        pieces = influence.attribute(case.loader(), queries(case))
        assert_close(influence.self_influence(case.loader()), own, 1e3)
    assert_close(pieces.values, whole.values, 1e3)
    assert pieces.train_ids.tolist() == whole.train_ids.tolist()


def test_what_cannot_be_asked_is_refused() -> None:
    case = mlp()
    influence = fitted(case, hw.GradDot(), "layer")
    with pytest.raises(InvalidSetting, match="unit is 'loo'"):
        influence.attribute(case.loader(), queries(case), unit="loo")
    for method in (hw.GradDot(), hw.GradCos()):
        with pytest.raises(InvalidSetting, match="only similarity"):
            fitted(case, method, "layer").attribute(case.loader(), queries(case), unit="removal")
    with pytest.raises(InvalidSetting, match="k is 0"):
        influence.top(case.loader(), queries(case), 0)
    for loaders in (([], queries(case)), (case.loader(), [])):
        with pytest.raises(BatchMismatch, match="no rows"):
            influence.attribute(*loaders)
    for loaders in ((iter(case.loader()), queries(case)), (case.loader(), iter(queries(case)))):
        with pytest.raises(InvalidInput, match="read only once"):
            influence.top(*loaders, 1)


def test_removing_rows_by_units_adds_up() -> None:
    """Scores in units of removal are scores over n_train, where n_train counts weights."""
    case = mlp()
    weights = torch.tensor([2.0] + [1.0] * 10, dtype=torch.float64)
    influence = TorchComposableInfluence(case.model, case.loss, hw.Direct("ggn"), damping=0.1)
    influence.fit([TorchBatch(case.x, case.y, weights=weights)])
    one, other = (influence.attribute(case.loader(), queries(case), unit=u).values for u in ("influence", "removal"))
    assert_close(one / 12.0, other)
    rows = tree_map(lambda t: t[:3], (case.x, case.y))
    assert_close(influence.attribute([rows], queries(case)).values, one[:, :3])


def test_queries_of_different_lengths_meet_the_same_train_rows():
    """The sides of the operators are chosen once for a run, whatever comes first."""

    class Pooled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(6, 5)

        def forward(self, x):
            return self.layer(x.tanh()).mean(1)

    torch.manual_seed(0)
    model = Pooled().double()
    train, short, long = (
        (torch.randn(n, t, 6).double(), torch.randint(5, (n,))) for n, t in ((20, 4), (3, 1), (2, 40))
    )
    for method in (hw.Ekfac(), hw.Kfac(), hw.Ekfac(rank=1), hw.GradDot(), hw.Direct()):
        influence = TorchComposableInfluence(model, torch.nn.functional.cross_entropy, method).fit([train])
        for order in ([short, long], [long, short]):
            got = np.asarray(influence.attribute([train], order))
            expected = torch.cat([influence.influences(*query, *train) for query in order]).numpy()
            np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12 * abs(expected).max())


def test_a_measurement_gives_its_name_to_unit_and_sign():
    def negative_logit(output, target):
        return -output.gather(1, target[:, None])[:, 0]

    torch.manual_seed(0)
    model, batch = torch.nn.Linear(4, 3).double(), (torch.randn(9, 4).double(), torch.arange(9) % 3)
    influence = TorchComposableInfluence(
        model, torch.nn.functional.cross_entropy, hw.Ekfac(), measurement=negative_logit
    )
    scores = influence.fit([batch]).attribute([batch], [batch], unit="removal")
    assert scores.explained == "negative_logit"
    assert "increase of the query's negative_logit" in scores.unit_in_words
    assert "lowers the query's negative_logit" in scores.to_xarray().attrs["sign"]


def test_an_unused_layer_has_no_part_in_any_score():
    class WithSpare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)

        def forward(self, x):
            return self.used(x)

    torch.manual_seed(0)
    model, batch = WithSpare().double(), (torch.randn(9, 4).double(), torch.arange(9) % 3)
    for method in (hw.Ekfac(), hw.Kfac(), hw.Direct(), hw.Ekfac(rank=1)):
        influence = TorchComposableInfluence(model, torch.nn.functional.cross_entropy, method).fit([batch])
        scores = influence.attribute([batch], [batch], by_block=True)
        assert not scores.by_block["spare"].any()
        assert scores.by_block["used"].any()
        with pytest.raises(SingularOperator, match="Block 'spare'"):
            influence.with_damping({"used": 0.1, "spare": 0.0})


def test_sampled_ekfac_does_not_depend_on_the_batches_where_the_basis_is_not_determined():
    """More classes than rows: a factor has a null space, whose eigenvectors rounding chooses."""
    torch.manual_seed(0)
    model, x, y = torch.nn.Linear(4, 40).double(), torch.randn(30, 4).double(), torch.randint(40, (30,))
    order = torch.randperm(30)
    loaders = [
        *([(x[k : k + size], y[k : k + size]) for k in range(0, 30, size)] for size in (30, 7, 1)),
        [(x[order], y[order])],
    ]
    scores = [
        TorchComposableInfluence(model, torch.nn.functional.cross_entropy, hw.Ekfac(fisher="sampled"))
        .fit(loader)
        .influences(x[:3], y[:3], x, y)
        for loader in loaders
    ]
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], rtol=1e-8, atol=1e-9 * float(scores[0].abs().max()))


@pytest.mark.parametrize("role", ["train", "query"])
@pytest.mark.parametrize("others", [np.array(["a", "b"]), np.array(["0", "1"]), np.array([2.5, 3.5])])
def test_ids_of_several_kinds_are_refused_by_row(role: str, others: Any) -> None:
    model, loss = torch.nn.Linear(2, 2), torch.nn.CrossEntropyLoss()
    x, y = torch.randn(5, 2), torch.randint(0, 2, (5,))
    influence = TorchComposableInfluence(model, loss, hw.Direct(), damping=0.1).fit([(x, y)])
    mixed = [TorchBatch(x[:3], y[:3], ids=np.arange(3)), TorchBatch(x[3:], y[3:], ids=others)]
    pair = (mixed, [(x, y)]) if role == "train" else ([(x, y)], mixed)
    for verb in (influence.attribute, lambda *given: influence.top(*given, 2)):
        # Words that are numbers already given are the same name twice, in a ranking too.
        with pytest.raises(InvalidInput, match=f"The {role} rows have ids of several kinds: whole numbers.*row 3"):
            verb(*pair)


def test_ids_of_several_kinds_within_a_batch_are_refused() -> None:
    x, y = torch.randn(3, 2), torch.randint(0, 2, (3,))
    influence = TorchComposableInfluence(torch.nn.Linear(2, 2), torch.nn.CrossEntropyLoss(), hw.Direct(), damping=0.1)
    with pytest.raises(InvalidInput, match="several kinds: int, str"):
        influence.fit([(x, y)]).attribute([TorchBatch(x, y, ids=[0, "a", 2])], [(x, y)])
