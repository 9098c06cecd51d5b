"""Curvature on the span of heavy gradients: what it inverts, how far scores are off, and what is said of that."""

import numpy as np
import pytest
import torch
from torch import nn

import headwater as hw
from headwater.curvature import span
from headwater.curvature.span import RowSpans, SpanInverse, SpanSolve
from headwater.methods import iterative
from headwater.torch import TorchBatch, TorchComposableInfluence

ROWS, CLASSES = 60, 4
X = torch.randn(ROWS, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(ROWS) % CLASSES
XQ = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
YQ = torch.arange(7) % CLASSES
DAMPING = 0.05


@pytest.fixture(autouse=True)
def small_spans(monkeypatch):
    """Sizes at which a network of 244 parameters and 240 gradients has several spans."""
    monkeypatch.setattr(span, "FIRST", 16)
    monkeypatch.setattr(span, "LARGEST", 150)
    monkeypatch.setattr(span, "PRECONDITIONER", 48)
    monkeypatch.setattr(span, "PROBES", 4)
    monkeypatch.setattr(span, "SOLVED_IN", 10**6)
    monkeypatch.setattr(iterative, "SPANNED", 0)


@pytest.fixture
def model():
    torch.manual_seed(0)
    found = nn.Sequential(nn.Linear(5, 24), nn.Tanh(), nn.Linear(24, CLASSES)).double()
    for parameter in found.parameters():
        parameter.data *= 2.0  # confident: few gradients are heavy
    return found


def batches(size, x=X, y=Y):
    return list(zip(x.split(size), y.split(size), strict=True))


def influence(model, tolerance, *, size=17, damping=DAMPING, method=None, **options):
    method = method or hw.Cg(curvature="ggn", tolerance=tolerance)
    made = TorchComposableInfluence(
        model, nn.CrossEntropyLoss(), method=method, blocks="full", damping=damping, **options
    )
    return made.fit(batches(size))


def flat(values):
    return np.concatenate([v.detach().numpy().reshape(-1) for v in values])


def jacobian(model, x):
    """By autograd, one output at a time: [classes, D]."""
    output = model(x[None])[0]
    parameters = list(model.parameters())
    return np.stack([flat(torch.autograd.grad(o, parameters, retain_graph=True)) for o in output])


def ggn(model):
    """The dense mean of J^T (diag p - p p^T) J: [D, D]."""
    total = 0.0
    for x in X:
        j, p = jacobian(model, x), torch.softmax(model(x[None])[0], 0).detach().numpy()
        total = total + j.T @ (np.diag(p) - np.outer(p, p)) @ j
    return total / ROWS


def gradients(model, x, y):
    """[n, D]."""
    parameters = list(model.parameters())
    losses = nn.CrossEntropyLoss(reduction="none")(model(x), y)
    return np.stack([flat(torch.autograd.grad(loss, parameters, retain_graph=True)) for loss in losses])


def exact(model, damping=DAMPING):
    """Scores of all pairs by a dense solve, and what each row scores on itself."""
    damped = ggn(model) + damping * np.eye(sum(p.numel() for p in model.parameters()))
    query, train = gradients(model, XQ, YQ), gradients(model, X, Y)
    own = [np.einsum("nd,nd->n", g, np.linalg.solve(damped, g.T).T) for g in (query, train)]
    return query @ np.linalg.solve(damped, train.T), *own


def solve_of(made):
    found = made.block_mapper.operators["full"]
    return found if isinstance(found, SpanSolve) else found.inner


@pytest.mark.parametrize("size", [16, 48])
def test_the_error_that_is_told_is_at_least_what_the_worst_pair_is_off(model, size):
    solve = solve_of(influence(model, 1e-2))
    inverse = solve.spans.span(size).inverse(DAMPING)
    query, train = gradients(model, XQ, YQ), gradients(model, X, Y)
    solved = np.linalg.solve(ggn(model) + DAMPING * np.eye(query.shape[1]), train.T)
    off = query @ (inverse.apply(torch.tensor(train)).numpy().T - solved)
    worst = np.abs(off / np.outer(np.linalg.norm(query, axis=1), np.linalg.norm(solved, axis=0))).max()
    queries = solve.spans.curvature.source.provider.grads(TorchBatch(XQ, YQ))["full"]
    assert solve.error(inverse, queries)[0] >= worst


@pytest.mark.parametrize("size", [16, 48, 96])
def test_it_is_the_inverse_of_the_curvature_projected_on_the_span(model, size):
    spans = influence(model, 1e-2).curvature["full"].approximation
    assert isinstance(spans, RowSpans)
    inverse = spans.span(size).inverse(DAMPING)
    assert isinstance(inverse, SpanInverse)
    kept = spans.span(size).dual.gradients_kept.flat().numpy()
    vectors = np.linalg.svd(kept, full_matrices=False)
    within = vectors[2][vectors[1] > 1e-7 * vectors[1][0]]
    projection = within.T @ within
    expected = np.linalg.inv(projection @ ggn(model) @ projection + DAMPING * np.eye(len(projection)))
    np.testing.assert_allclose(inverse.dense(torch.zeros(0, dtype=torch.float64)), expected, atol=2e-5 / DAMPING)


@pytest.mark.parametrize("tolerance", [0.3, 3e-2, 1e-3, 1e-6])
def test_scores_are_off_by_no_more_than_the_tolerance_and_no_more_than_is_said(model, tolerance):
    made = influence(model, tolerance)
    scores = made.attribute(batches(17), batches(3, XQ, YQ)).values
    expected, query, train = exact(model)
    off = np.abs(scores - expected) / np.sqrt(np.outer(query, train))
    assert off.max() <= tolerance
    assert max(report.residual.max() for report in made.solves.values()) <= tolerance


def test_a_span_costs_the_products_of_a_few_probes_and_no_pass_over_the_rows(model, monkeypatch):
    made = influence(model, 0.1)
    passes = []
    source = made.curvature["full"].exact.source
    monkeypatch.setattr(type(source), "drawn", lambda *_, **__: passes.append(1))
    made.influences(XQ, YQ, X, Y)
    (report,) = made.solves.values()
    assert not passes
    assert report.products <= 4 * span.PROBES
    assert (report.iterations == 0).all() and len(report.residual) == len(XQ)
    told = f"({len(XQ)} queries, on a span)"
    assert report.on_span and told in str(made.status)
    assert f"{len(XQ)} queries, on a span; error of a score, measured, up to" in str(made.solves)


def test_a_batch_that_is_projected_in_pieces_gives_the_same_scores(model, monkeypatch):
    weighted = [hw.Batch(x, y, weights=torch.linspace(0.5, 2.0, len(x), dtype=x.dtype)) for x, y in batches(17)]
    scores = {}
    for rows in (3, 1000):
        monkeypatch.setattr(span, "rows_within_memory", lambda *_, rows=rows: rows)
        made = TorchComposableInfluence(
            model, nn.CrossEntropyLoss(), method=hw.Cg(tolerance=0.1), blocks="full", damping=DAMPING
        ).fit(weighted)
        scores[rows] = made.attribute(weighted, batches(3, XQ, YQ)).values
        assert all(report.on_span for report in made.solves.values())
    np.testing.assert_allclose(scores[3], scores[1000], rtol=1e-9, atol=1e-12 * np.abs(scores[3]).max())


def test_where_no_span_serves_the_vectors_are_solved_for(model):
    made = influence(model, 1e-9)
    scores = made.influences(XQ, YQ, X, Y).numpy()
    (report,) = made.solves.values()
    assert report.iterations.min() > 0 and not report.on_span
    assert "solves; relative residual up to" in str(report)
    np.testing.assert_allclose(scores, exact(model)[0], rtol=1e-6, atol=1e-8 * np.abs(scores).max())


@pytest.mark.parametrize("size", [16, 96, 150])
def test_an_error_is_measured_on_gradients_outside_of_the_span_that_it_is_about(model, size):
    spans = influence(model, 1e-2).curvature["full"].approximation
    probes = spans.probes(size)
    assert probes.rows >= span.PROBES
    assert (spans.span(size).inverse(DAMPING).outside(probes) > 1e-6).all()


@pytest.mark.parametrize("damping", [1e-4, 0.05, 5.0])
@pytest.mark.parametrize("size", [16, 96])
def test_the_length_of_a_solution_is_bounded_from_below_however_far_the_span_misses_it(model, size, damping):
    made = influence(model, 1e-2, damping=damping)
    solve = solve_of(made)
    inverse = solve.spans.span(size).inverse(damping)
    vectors = torch.tensor(gradients(model, X, Y)[::7])
    found = solve._missed(inverse, vectors).solved(damping)
    damped = ggn(model) + damping * np.eye(vectors.shape[1])
    true = np.linalg.norm(np.linalg.solve(damped, vectors.numpy().T), axis=0)
    assert (found > 0).all()
    assert (found <= true * (1 + 1e-6)).all()


def test_a_thread_that_needs_a_larger_span_leaves_others_theirs(model, monkeypatch):
    made = influence(model, 1e-2)
    solve, inverse = solve_of(made), SpanSolve._inverse

    def meanwhile(self, size):
        solve._size = None  # another thread has found that no span serves its vectors
        solve._last = None
        return inverse(self, size)

    monkeypatch.setattr(SpanSolve, "_inverse", meanwhile)
    expected, query, train = exact(model)
    off = np.abs(made.influences(XQ, YQ, X, Y).numpy() - expected) / np.sqrt(np.outer(query, train))
    assert off.max() <= 1e-2


def test_less_damping_takes_a_larger_span(model):
    def size(damping):
        made = influence(model, 1e-2, damping=damping)
        made.influences(XQ, YQ, X, Y)
        return solve_of(made)._size

    assert size(100.0) == 16
    assert size(0.2) > size(100.0)


def test_no_span_is_made_that_costs_more_than_solving_would(model, monkeypatch):
    monkeypatch.setattr(span, "SOLVED_IN", 1)
    made = influence(model, 1e-3)
    made.influences(XQ, YQ, X, Y)
    spans = made.curvature["full"].approximation
    assert spans.affordable(len(XQ)) < span.LARGEST
    # The first is tried, and one stands for the curvature as a preconditioner.
    assert set(spans._made) <= {span.FIRST, span.PRECONDITIONER}


def test_the_span_of_all_gradients_is_exact(model, monkeypatch):
    monkeypatch.setattr(span, "LARGEST", ROWS * CLASSES)
    made = influence(model, 1e-9)
    scores = made.influences(XQ, YQ, X, Y).numpy()
    # Three of a row's four gradients are not zero: the output's Hessian has no curvature along ones.
    assert solve_of(made)._size >= ROWS * (CLASSES - 1)
    np.testing.assert_allclose(scores, exact(model)[0], rtol=1e-8, atol=1e-10 * np.abs(scores).max())


def test_every_damping_reads_the_rows_once(model, monkeypatch):
    made = influence(model, 0.5)
    counted = []
    images = span.Span._image_of
    monkeypatch.setattr(span.Span, "_image_of", lambda self, rows: counted.append(1) or images(self, rows))
    for damping in (1.0, 2.0, 3.0, 4.0):
        made.with_damping(damping).influences(XQ, YQ, X, Y)
    assert len(counted) == len(batches(17)) * len(made.curvature["full"].approximation._made)


def test_scores_do_not_depend_on_the_batches(model):
    one = influence(model, 0.1, size=60).attribute(batches(60), batches(7, XQ, YQ)).values
    other = influence(model, 0.1, size=7).attribute(batches(11), batches(7, XQ, YQ)).values
    np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-8)


def test_self_influence_is_within_the_tolerance(model):
    made = influence(model, 1e-2)
    found = np.asarray(made.self_influence(batches(17)))
    own = exact(model)[2]
    np.testing.assert_allclose(found, own, rtol=1e-2)


def test_duplicated_rows_leave_a_singular_gram_matrix_and_the_same_scores(model):
    method = hw.Cg(curvature="ggn", tolerance=1e-2)
    made = TorchComposableInfluence(model, nn.CrossEntropyLoss(), method=method, blocks="full", damping=DAMPING).fit(
        batches(17) + batches(17)
    )
    expected, query, train = exact(model)
    off = np.abs(made.influences(XQ, YQ, X, Y).numpy() - expected) / np.sqrt(np.outer(query, train))
    assert off.max() <= 1e-2


@pytest.mark.parametrize("damping", [1e-2, 1e-4, 1e-6, 1e-8])
def test_spans_of_few_dimensions_are_left_for_solves_where_rounding_hides_the_damping(monkeypatch, damping):
    monkeypatch.setattr(span, "FIRST", 64)
    torch.manual_seed(0)
    linear = nn.Linear(5, CLASSES).double()  # 15 dimensions of gradients
    made = influence(linear, 1e-3, damping=damping)
    expected, query, train = exact(linear, damping)
    off = np.abs(made.influences(XQ, YQ, X, Y).numpy() - expected) / np.sqrt(np.outer(query, train))
    assert off.max() <= 1e-3


def test_row_weights_count(model):
    weights = torch.linspace(0.5, 2.0, ROWS, dtype=torch.float64)
    loader = [TorchBatch(X[k : k + 20], Y[k : k + 20], weights=weights[k : k + 20]) for k in (0, 20, 40)]

    def scores(method):
        made = TorchComposableInfluence(
            model, nn.CrossEntropyLoss(), method=method, blocks="full", damping=DAMPING
        ).fit(loader)
        return made.influences(XQ, YQ, X, Y).numpy()

    expected = scores(hw.Direct(curvature="ggn"))
    _, query, train = exact(model)
    off = np.abs(scores(hw.Cg(curvature="ggn", tolerance=1e-2)) - expected) / np.sqrt(np.outer(query, train))
    assert off.max() <= 2e-2


def test_a_fit_is_saved_with_its_norms_and_makes_its_spans_again(model, tmp_path):
    made = influence(model, 0.1)
    scores = made.influences(XQ, YQ, X, Y)
    made.save(tmp_path / "fit")
    again = TorchComposableInfluence(
        model, nn.CrossEntropyLoss(), method=hw.Cg(curvature="ggn", tolerance=0.1), blocks="full", damping=DAMPING
    ).load(tmp_path / "fit", batches(17))
    found = again.influences(XQ, YQ, X, Y)
    assert all((report.iterations == 0).all() for report in again.solves.values())
    np.testing.assert_allclose(found, scores, rtol=1e-9, atol=1e-12)


def test_a_run_of_a_loose_tolerance_is_resumed_by_a_fit_that_was_loaded(model, tmp_path):
    made = influence(model, 0.1)
    made.save(tmp_path / "fit")
    scores = made.attribute(batches(17), batches(7, XQ, YQ), store=tmp_path / "run").values
    again = TorchComposableInfluence(
        model, nn.CrossEntropyLoss(), method=hw.Cg(curvature="ggn", tolerance=0.1), blocks="full", damping=DAMPING
    ).load(tmp_path / "fit", batches(17))
    more = [*batches(17), (X[:5] + 1.0, Y[:5])]
    found = again.attribute(more, batches(7, XQ, YQ), store=tmp_path / "run", append=True).values
    np.testing.assert_allclose(found[:, :ROWS], scores)


def test_a_query_whose_gradient_is_zero_scores_zero(model):
    made = influence(model, 0.1)
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.copy_(torch.tensor([100.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    made.fit(batches(17))
    scores = made.influences(XQ[:3], torch.zeros(3, dtype=torch.long), X, Y)
    assert torch.isfinite(scores).all() and scores.abs().max() < 1e-30


def test_rounding_counts_where_damping_is_small(model, monkeypatch):
    """In float32 the span of all gradients subtracts numbers that are far larger than their difference."""
    monkeypatch.setattr(span, "LARGEST", ROWS * CLASSES)
    small = model.float()
    made = TorchComposableInfluence(
        small, nn.CrossEntropyLoss(), method=hw.Cg(curvature="ggn"), blocks="full", damping=1e-2
    ).fit([(X.float(), Y)])
    every = made.curvature["full"].approximation.span(ROWS * CLASSES)
    gradients = made.provider.grads(made.provider.as_batch(XQ.float(), YQ), query=True)["full"]
    told = [solve_of(made.with_damping(d)).error(every.inverse(d), gradients)[0] for d in (1e-2, 1e-4)]
    assert 0 < told[0] < 1e-3
    assert told[1] > 10 * told[0]


def test_spans_of_jax_give_the_scores_of_torch_within_the_tolerance(model):
    jax = pytest.importorskip("jax")
    from headwater.jax import JaxComposableInfluence, cross_entropy

    weights = {name: jax.numpy.asarray(value.detach().numpy()) for name, value in model.named_parameters()}

    def apply(w, x):
        return jax.numpy.tanh(x @ w["0.weight"].T + w["0.bias"]) @ w["2.weight"].T + w["2.bias"]

    made = JaxComposableInfluence(
        apply, weights, cross_entropy, hw.Cg(curvature="ggn", tolerance=3e-2), blocks="full", damping=DAMPING
    ).fit([(X.numpy(), Y.numpy())])
    scores = np.asarray(made.attribute([(X.numpy(), Y.numpy())], [(XQ.numpy(), YQ.numpy())]).values)
    expected, query, train = exact(model)
    assert all(report.on_span for report in made.solves.values())
    assert np.abs(scores - expected).max() <= 3e-2 * np.sqrt(np.outer(query, train)).max()


def test_scores_in_a_folder_and_of_any_cut_of_the_queries_are_those_of_memory(model, tmp_path):
    made = influence(model, 3e-2)
    whole = made.attribute(batches(17), batches(7, XQ, YQ)).values
    stored = made.attribute(batches(17), batches(7, XQ, YQ), store=tmp_path / "run").values
    one_by_one = made.attribute(batches(17), batches(1, XQ, YQ)).values
    np.testing.assert_allclose(stored, whole, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(one_by_one, whole, rtol=1e-9, atol=1e-9)
