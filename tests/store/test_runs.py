"""Claims about runs in folders: rows are added, deleted and gone, and what stays is as it was."""

from __future__ import annotations

import numpy as np
import pytest
import scripts
import torch
import xarray as xr

import headwater as hw
from headwater.errors import DamagedFile, InvalidInput, InvalidSetting
from headwater.store.info import info
from headwater.store.plan import Plan
from headwater.store.runs import check, compact, delete
from headwater.store.scores import Scores
from headwater.torch import TorchBatch, TorchComposableInfluence

torch.manual_seed(0)
X, Y = torch.randn(50, 4), torch.arange(50) % 3
NAMES = [f"row {n}" for n in range(50)]


def batches(rows, size=5):
    rows = np.asarray(rows)
    return [
        TorchBatch(X[rows[k : k + size]], Y[rows[k : k + size]], ids=[NAMES[n] for n in rows[k : k + size]])
        for k in range(0, len(rows), size)
    ]


QUERIES = [(X[:7] + 0.1, Y[:7])]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Eight rows a tile, three queries where memory is short."""
    monkeypatch.setattr("headwater.run.plan.FEWEST", 8)
    monkeypatch.setattr("headwater.run.plan.ROWS", 8)


@pytest.fixture(scope="module")
def influence():
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    return TorchComposableInfluence(model, torch.nn.CrossEntropyLoss(), hw.Ekfac()).fit(batches(range(50)))


@pytest.fixture
def spans_of_three(monkeypatch):
    from headwater.run import attribute
    from headwater.store.plan import Sizes

    monkeypatch.setattr(attribute, "tile_sizes", lambda *given: Sizes(8, 3))


@pytest.mark.parametrize("options", [{"by_block": True}, {"mode": "perturbation"}], ids=str)
def test_a_train_row_has_its_column_also_where_others_are_deleted(options, influence, tmp_path, spans_of_three):
    whole = influence.attribute(batches(range(50)), QUERIES, store=tmp_path / "run", **options).values
    delete(tmp_path / "run", [NAMES[0], NAMES[8], NAMES[31]])
    found = Scores.open(tmp_path / "run")
    for place, row in ((0, 1), (7, 9), (46, 49)):
        assert found.train_ids[place] == NAMES[row]
        np.testing.assert_array_equal(found.column(place), whole[:, row])
    assert "values" not in vars(found)


@pytest.mark.parametrize("options", [{}, {"by_block": True}, {"mode": "perturbation"}], ids=str)
def test_scores_stay_on_disk_and_are_those_of_memory(options, influence, tmp_path, spans_of_three):
    train, whole = batches(range(50)), influence.attribute(batches(range(50)), QUERIES, **options)
    found = influence.attribute(train, QUERIES, store=tmp_path / "run", **options)
    assert "values" not in vars(found)
    assert found.shape == whole.shape and found.train_ids.tolist() == NAMES
    np.testing.assert_allclose(found[2], whole.values[2], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[[6, 0, 4], 10:30], whole.values[[6, 0, 4], 10:30], rtol=1e-5, atol=1e-6)
    picked = found.sel(query=[5, 1], train=["row 40", "row 3"])
    np.testing.assert_allclose(picked.values, whole.values[[5, 1]][:, [40, 3]], rtol=1e-5, atol=1e-6)
    assert "values" not in vars(found)
    np.testing.assert_allclose(found.values, whole.values, rtol=1e-5, atol=1e-6)
    if "by_block" in options:
        assert list(found.by_block) == list(whole.by_block)
        for name, share in whole.by_block.items():
            np.testing.assert_allclose(found.by_block[name], share, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(picked.by_block[name], found.by_block[name][[5, 1]][:, [40, 3]])
    if "mode" in options:
        with pytest.raises(InvalidSetting, match="no ranking"):
            found.top(2)
    else:
        np.testing.assert_array_equal(found.top(4).harmful_ids, whole.top(4).harmful_ids)
    with xr.open_zarr(tmp_path / "run" / "tiles.zarr", consolidated=False) as data:
        np.testing.assert_array_equal(data["scores"].sum("block").values, found.values)
        assert data["train"].values.tolist() == NAMES
    with pytest.raises(InvalidInput, match="no train row 'row 77'"):
        found.sel(train="row 77")


def test_only_new_rows_are_computed_when_they_are_appended(influence, tmp_path, monkeypatch):
    from headwater.store.tiles import TileStore

    influence.attribute(batches(range(30)), QUERIES, store=tmp_path / "run")
    with pytest.raises(InvalidInput, match=r"more rows than the finished run.*has 30.*append=True"):
        influence.attribute(batches(range(50)), QUERIES, store=tmp_path / "run")
    with pytest.raises(InvalidInput, match="other rows at 0 to"):
        influence.attribute(batches([1, 0, *range(2, 50)]), QUERIES, store=tmp_path / "run", append=True)
    written, write = [], TileStore.write
    monkeypatch.setattr(TileStore, "write", lambda self, tile: (written.append(tile.start), write(self, tile))[1])
    found = influence.attribute(batches(range(50)), QUERIES, store=tmp_path / "run", append=True)
    assert written == [24, 32, 40, 48]  # the tile that was not full is made again
    np.testing.assert_allclose(found.values, influence.attribute(batches(range(50)), QUERIES).values, rtol=1e-5)
    with pytest.raises(InvalidInput, match=r"has 20 rows, the finished run .* 50"):
        influence.attribute(batches(range(20)), QUERIES, store=tmp_path / "run")
    with pytest.raises(InvalidSetting, match="give store="):
        influence.attribute(batches(range(20)), QUERIES, append=True)


GONE = [0, 3, 17, 24, 49]
LEFT = [n for n in range(50) if n not in GONE]


@pytest.mark.parametrize("options", [{}, {"by_block": True}], ids=str)
def test_deleted_rows_are_not_shown_and_compacted_ones_gone(options, influence, tmp_path, spans_of_three):
    run = tmp_path / "run"
    whole = influence.attribute(batches(range(50)), QUERIES, store=run, **options).values
    assert delete(run, ["row 0", "row 3"]) == 2 and delete(run, [NAMES[n] for n in GONE]) == 5
    found = hw.Scores.open(run)
    assert found.train_ids.tolist() == [NAMES[n] for n in LEFT]
    np.testing.assert_array_equal(found.values, whole[:, LEFT])
    compact(run)
    again = hw.Scores.open(run)
    assert again.train_ids.tolist() == [NAMES[n] for n in LEFT]
    np.testing.assert_array_equal(again.values, whole[:, LEFT])
    assert again.method == found.method and str(again.diagnosis) == str(found.diagnosis)
    assert check(run) == []
    kept = b"".join(file.read_bytes() for file in sorted(run.rglob("*")) if file.is_file())
    assert whole[4, 17].tobytes() not in kept and b"row 17" not in kept and "row 17".encode("utf-32-le") not in kept
    np.testing.assert_allclose(
        influence.attribute(batches(LEFT), QUERIES, store=run, **options).values, whole[:, LEFT], rtol=1e-4, atol=1e-6
    )
    with pytest.raises(InvalidInput, match="no train row 'row 3'"):
        delete(run, ["row 3"])


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from headwater.store import runs
    left = int(sys.argv[2])
    def counted(name, owner):
        real = getattr(owner, name)
        def call(*given, **options):
            global left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given, **options)
        setattr(owner, name, call)
    for name in ("replace", "link", "fsync", "unlink"):
        counted(name, os)
    counted("replace", Path)
    counted("unlink", Path)
    runs.compact(sys.argv[1])
    print("done")
"""


@pytest.mark.parametrize("moments", [(3, 29, 64), pytest.param(tuple(range(1, 120, 4)), marks=pytest.mark.slow)])
def test_a_compaction_that_is_killed_leaves_the_old_run_or_the_new(moments, influence, tmp_path):
    for moment in moments:
        run = tmp_path / str(moment)
        whole = influence.attribute(batches(range(50)), QUERIES, store=run).values
        delete(run, [NAMES[n] for n in GONE])
        status, said = scripts.run(KILLED, run, moment)
        assert status == -9 or "done" in said, said
        np.testing.assert_array_equal(hw.Scores.open(run).values, whole[:, LEFT])
        compact(run)
        np.testing.assert_array_equal(hw.Scores.open(run).values, whole[:, LEFT])
        assert check(run) == [] and not (run / "compacted").exists()


def test_a_check_names_every_file_that_is_damaged(influence, tmp_path):
    run = tmp_path / "run"
    influence.attribute(batches(range(50)), QUERIES, store=run)
    assert check(run) == []
    chunk, rows = run / "tiles.zarr/scores/c/0/0/2", run / "rows/4.npz"
    for file in (chunk, rows):
        content = bytearray(file.read_bytes())
        content[40] ^= 1
        file.write_bytes(content)
    (run / "tiles.zarr/scores/c/0/0/5").unlink()
    said = "\n".join(check(run))
    assert all(name in said for name in ("c/0/0/2 is damaged", "rows/4.npz", "c/0/0/5"))
    assert tuple(check(run)) == info(run, check=True).all_damage
    found = hw.Scores.open(run)
    with pytest.raises(DamagedFile, match="c/0/0/2 is damaged"):
        found.top(3)
    influence.attribute(batches(range(50)), QUERIES, store=run)
    assert check(run) == []


def test_a_budget_of_memory_decides_tiles_and_changes_no_number(influence, tmp_path, monkeypatch):
    monkeypatch.setattr("headwater.run.plan.LEAST", 1)
    monkeypatch.setattr("headwater.run.plan.resident_memory", lambda: 0)
    train, whole = batches(range(50)), influence.attribute(batches(range(50)), QUERIES)
    factors = influence.n_parameters * 4
    budget = 4 * 3 * factors * 3  # three queries' factors, in three forms, are a quarter of it
    found = influence.attribute(train, QUERIES, store=tmp_path / "run", memory=budget)
    assert {file.name for file in (tmp_path / "run/tiles.zarr/scores/c/0").iterdir()} == {"0", "1", "2"}
    np.testing.assert_allclose(found.values, whole.values, rtol=1e-5, atol=1e-7)
    monkeypatch.setattr("headwater.run.attribute.resident_memory", lambda: -(10**9))  # the scores are no matter
    in_memory = influence.attribute(train, QUERIES, memory=budget)
    np.testing.assert_allclose(in_memory.values, whole.values, rtol=1e-5, atol=1e-7)
    ends, expected = influence.top(train, QUERIES, 3, memory=budget), whole.top(3)
    np.testing.assert_array_equal(ends.helpful_ids, expected.helpful_ids)
    np.testing.assert_array_equal(ends.query_ids, expected.query_ids)
    for wrong in (0, "many", "2 XB", True):
        with pytest.raises(InvalidSetting, match="memory is"):
            influence.attribute(train, QUERIES, memory=wrong)


def test_too_little_memory_is_said_before_anything_is_computed(influence, tmp_path):
    with pytest.raises(InvalidSetting, match=r"is too little: the process holds .* MiB already"):
        influence.attribute(batches(range(50)), QUERIES, store=tmp_path / "run", memory="1MiB")


def test_self_influence_is_kept_and_goes_on(influence, tmp_path, monkeypatch):
    train, expected = batches(range(50)), influence.self_influence(batches(range(50)))
    for worker in ((0, 2), (1, 2)):
        found = influence.self_influence(train, store=tmp_path / "own", worker=worker)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    monkeypatch.setattr("headwater.store.tiles.TileStore.write", None)
    np.testing.assert_array_equal(influence.self_influence(train, store=tmp_path / "own"), found)
    with pytest.raises(InvalidInput, match="another run"):
        influence.attribute(train, QUERIES, store=tmp_path / "own")


def test_a_plan_is_plain_data_and_what_the_run_does(influence, tmp_path):
    train = batches(range(50))
    planned = influence.plan(train, QUERIES, memory="4GiB")
    planned.save(tmp_path / "plan.json")
    assert Plan.open(tmp_path / "plan.json") == planned == influence.plan(iter_again(train), QUERIES, memory="4GiB")
    assert (planned.train_rows, planned.query_rows) == (50, 7) and "4096 MiB" in str(planned)
    score = [tile for tile in planned.tiles() if tile.stage == "score"]
    assert [tile.train for tile in score] == [(start, min(start + 8, 50)) for start in range(0, 50, 8)]
    influence.attribute(train, QUERIES, store=tmp_path / "run", memory="4GiB")
    assert len(list((tmp_path / "run/rows").glob("*.npz"))) == len(score)
    assert [tile.train for tile in planned.tiles() if tile.stage == "fit"] == [(0, 50)]
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(DamagedFile, match=r"plan\.json"):
        Plan.open(tmp_path / "plan.json")


def iter_again(batches):
    class Loader:
        def __iter__(self):
            return iter(batches)

    return Loader()


# One number from every path ------------------------------------------------------------------------------------------

ROUTES = [
    hw.GradDot(),
    hw.GradCos(),
    hw.Direct("ggn"),
    hw.Dual(),
    hw.DataInf(),
    hw.Cg(tolerance=1e-10),
    hw.BlockKrylov(tolerance=1e-10),
    hw.Arnoldi(rank=4, curvature="ggn"),
    hw.Nystroem(rank=4),
    hw.Kfac(),
    hw.Ekfac(rank=2),
    hw.LoGra(dimension=2),
    hw.Trak(dimension=8),
]


@pytest.mark.parametrize("method", ROUTES, ids=lambda method: type(method).__name__)
def test_scores_do_not_depend_on_tiles_spans_or_where_they_are_kept(method, tmp_path, spans_of_three):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    train = [(X[k : k + 7].double(), Y[k : k + 7]) for k in range(0, 50, 7)]
    query = [(X[:7].double() + 0.1, Y[:7])]
    fitted = TorchComposableInfluence(model, torch.nn.CrossEntropyLoss(), method, damping=hw.relative(0.5)).fit(train)
    whole = fitted.attribute(train, query)
    size = 1e-6 * np.abs(whole.values).max()
    for found in (
        fitted.attribute(train, query, store=tmp_path / "run"),
        fitted.attribute(train, query, memory="64GiB"),
        fitted.attribute(batches_of_doubles(50), query),
        fitted.attribute(batches_of_doubles(1), query),
    ):
        np.testing.assert_allclose(found.values, whole.values, rtol=1e-6, atol=size)
        assert (found.residuals or {}).keys() == (whole.residuals or {}).keys()
    ends = fitted.top(train, query, 3, memory="64GiB")
    np.testing.assert_allclose(ends.helpful_scores, whole.top(3).helpful_scores, rtol=1e-6, atol=size)


def batches_of_doubles(size):
    return [(X[k : k + size].double(), Y[k : k + size]) for k in range(0, 50, size)]


def by_torch():
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    return TorchComposableInfluence(model, torch.nn.CrossEntropyLoss(), hw.Direct("ggn"), damping=0.3), torch.as_tensor


def by_jax():
    import jax.numpy as jnp

    from headwater.jax import JaxComposableInfluence
    from headwater.jax.losses import cross_entropy

    weights = np.random.default_rng(1).standard_normal((4, 3))
    return JaxComposableInfluence(
        lambda w, x: jnp.tanh(x @ w), weights, cross_entropy, hw.Ekfac(), damping=0.3
    ), np.asarray


def by_sklearn():
    from sklearn.linear_model import LogisticRegression

    from headwater.sklearn import SklearnComposableInfluence

    return SklearnComposableInfluence(LogisticRegression().fit(X.numpy(), Y.numpy()), hw.Direct()), np.asarray


@pytest.mark.parametrize("make", [by_torch, by_jax, by_sklearn], ids=lambda make: make.__name__)
@pytest.mark.parametrize("mode", ["up", "perturbation"])
def test_every_framework_has_one_number_in_memory_in_a_folder_and_as_tensors(make, mode, tmp_path, spans_of_three):
    influence, array = make()
    x, y = array(X.double().numpy()), array(Y.numpy())
    train, query = [(x[k : k + 7], y[k : k + 7]) for k in range(0, 50, 7)], [(x[:5] + 0.1, y[:5])]
    influence.fit(train)
    expected = np.asarray(influence.influences(*query[0], x, y, mode=mode))
    size = np.abs(expected).max()
    for options in (
        {},
        {"store": tmp_path / "run"},
        {"memory": "64GiB"},
        {"store": tmp_path / "blocks", "by_block": True},
    ):
        found = influence.attribute(train, query, mode=mode, **options)
        np.testing.assert_allclose(found.values, expected, rtol=1e-4, atol=1e-5 * size)


def test_a_run_of_a_loader_goes_on_from_kept_gradients_of_its_rows(influence, tmp_path, monkeypatch):
    """Rows have ids here: a row is known in one way, wherever it comes from."""
    train = batches(range(50))
    kept = influence.gradients(train, store=tmp_path / "kept")
    whole = influence.attribute(train, QUERIES, store=tmp_path / "run").values
    factors = influence.factors(QUERIES, store=tmp_path / "factors")
    monkeypatch.setattr("headwater.store.tiles.TileStore.write", None)  # nothing is computed
    for rows, queries in ((kept, QUERIES), (train, factors), (kept, factors)):
        np.testing.assert_array_equal(influence.attribute(rows, queries, store=tmp_path / "run").values, whole)


def test_self_influence_keeps_to_a_budget_without_a_folder_too(influence, monkeypatch):
    from headwater.arrays import working_memory_limit

    limits, of = [], type(influence).self_influence_of
    monkeypatch.setattr("headwater.run.plan.resident_memory", lambda: 0)
    monkeypatch.setattr(
        type(influence), "self_influence_of", lambda *given: limits.append(working_memory_limit()) or of(*given)
    )
    expected = influence.self_influence(batches(range(50)))
    found = influence.self_influence(batches(range(50)), memory="128MiB")
    assert limits[0] == 64 * 2**20 and limits[-1] <= 8 * 2**20
    np.testing.assert_array_equal(found, expected)


# Found by attacks -----------------------------------------------------------------------------------------------------


def linear(x, y):
    model = torch.nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        model.weight[:] = torch.arange(4.0)
    return TorchComposableInfluence(model, torch.nn.MSELoss(), hw.Direct("ggn"), damping=1e-2).fit([(x, y)])


def test_fits_of_other_rows_with_one_mean_eigenvalue_are_two_fits(tmp_path):
    x, y = X.double(), X[:, :1].double()
    one, two = linear(x, y), linear(x.flip(1), y)
    one.self_influence([(x, y)], store=tmp_path / "own")
    with pytest.raises(InvalidInput, match="fitted_rows was"):
        two.self_influence([(x, y)], store=tmp_path / "own")


def test_groups_of_other_rows_are_computed_again(tmp_path):
    x, y = X.double(), X[:, :1].double()
    influence, groups = linear(x, y), [[0, 1, 2], [5]]
    query = [(x[:3] + 0.1, y[:3])]
    influence.removal([(x, y)], query, groups, store=tmp_path / "groups")
    other = [(x.flip(0), y.flip(0))]
    found = influence.removal(other, query, groups, store=tmp_path / "groups")
    np.testing.assert_allclose(found, influence.removal(other, query, groups), rtol=1e-9)
    with pytest.raises(hw.errors.RowsNotFitted):
        influence.removal([(x + 1, y)], query, groups, store=tmp_path / "groups")


def test_an_append_that_is_refused_leaves_the_run_as_it_was(influence, tmp_path):
    whole = influence.attribute(batches(range(50)), QUERIES, store=tmp_path / "run").values
    for rows in (range(20), [1, 0, *range(2, 60 - 10)]):
        with pytest.raises(InvalidInput):
            influence.attribute(batches(rows), QUERIES, store=tmp_path / "run", append=True)
        np.testing.assert_array_equal(hw.Scores.open(tmp_path / "run").values, whole)


def test_numbers_without_names_are_refused_where_rows_are_deleted(influence, tmp_path):
    influence.self_influence(batches(range(50)), store=tmp_path / "own")
    delete(tmp_path / "own", ["row 3"])
    with pytest.raises(InvalidInput, match="are deleted"):
        influence.self_influence(batches(range(50)), store=tmp_path / "own")


def test_rows_without_ids_are_called_by_their_new_positions_once_others_are_gone(influence, tmp_path):
    train = [(X[:25], Y[:25]), (X[25:], Y[25:])]
    whole = influence.attribute(train, QUERIES, store=tmp_path / "run").values
    with pytest.raises(InvalidInput, match="no train row '5'"):
        delete(tmp_path / "run", ["5"])
    delete(tmp_path / "run", [3, 7])
    compact(tmp_path / "run")
    found = hw.Scores.open(tmp_path / "run")
    assert found.train_ids.tolist() == list(range(48))
    np.testing.assert_array_equal(found.sel(train=5).values[:, 0], whole[:, 6])


def test_nothing_of_stored_scores_is_nothing(influence, tmp_path):
    found = influence.attribute(batches(range(50)), QUERIES, store=tmp_path / "run")
    assert found[:0].shape == found.sel(query=[]).shape == (0, 50)


def test_memory_that_has_no_room_for_the_scores_asks_for_a_store(influence, monkeypatch):
    monkeypatch.setattr("headwater.run.attribute.resident_memory", lambda: 2**30 - 100)
    with pytest.raises(InvalidSetting, match=r"no room for the scores.*give store="):
        influence.attribute(batches(range(50)), QUERIES, memory=2**30)


def test_many_numbers_for_each_pair_make_fewer_queries_a_tile(influence, monkeypatch):
    from headwater.run.plan import tile_sizes

    rows = influence.train_rows(batches(range(50)))
    sizes = tile_sizes(influence.provider, rows, 2000, 3 * 512, None, 1.0)
    assert sizes.rows * sizes.queries * 3 * 512 * 8 <= 64 * 2**20
    with pytest.raises(InvalidSetting, match="One pair of rows takes"):
        tile_sizes(influence.provider, rows, 2000, 2**26, None, 1.0)


@pytest.mark.parametrize("worker", [3, None, ("0", "2"), (1, 2, 3), (0.5, 2), (True, 2)], ids=str)
def test_what_is_no_worker_is_said_to_be_none(worker, influence, tmp_path):
    with pytest.raises(InvalidSetting, match="worker is"):
        influence.attribute(batches(range(50)), QUERIES, store=tmp_path / "run", worker=worker)


def test_scores_in_hand_are_the_same_from_tiles_on_disk_and_from_memory(influence, tmp_path, spans_of_three):
    """Tables, groups, sums and summaries read a run tile by tile; and a ranking found without the matrix agrees."""
    pytest.importorskip("pandas")
    train, labels = batches(range(50)), {name: f"group {n % 4}" for n, name in enumerate(NAMES)}
    stored = influence.attribute(train, QUERIES, store=tmp_path / "run")
    plain = Scores(stored[:], stored.query_ids, stored.train_ids, n_train=stored.n_train, method=stored.method)
    for verb in (
        lambda scores: scores.group(labels).to_pandas(),
        lambda scores: scores.group(labels, of="mean").to_pandas(),
        lambda scores: scores.sum([1, 5, 2]).to_pandas(),
        lambda scores: scores.mean().to_pandas(),
        lambda scores: scores.to_pandas(),
        lambda scores: scores.to_pandas("long").sort_values(["query", "train"], ignore_index=True),
        lambda scores: scores.top(4).to_pandas(),
    ):
        one, other = verb(stored), verb(plain)
        assert list(one.columns) == list(other.columns) and len(one) == len(other)
        for name in one.columns:
            if one[name].dtype.kind == "f":
                np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=1e-6)
            else:
                assert one[name].tolist() == other[name].tolist()
    told, in_memory = stored.describe().to_dict(), plain.describe().to_dict()
    for name in ("mean", "std", "min", "max", "helpful", "half", "strongest_share"):
        assert told[name] == pytest.approx(in_memory[name], rel=1e-9, abs=1e-12), name
    assert told["strongest"] == in_memory["strongest"]
    for ends, direct in (
        (plain.group(labels).top(2), influence.top(train, QUERIES, 2, groups=labels)),
        (plain.mean().top(3), influence.top(train, QUERIES, 3, queries_as="mean")),
        (plain.sum().top(3), influence.top(train, QUERIES, 3, queries_as="sum")),
    ):
        assert ends.helpful_ids.tolist() == direct.helpful_ids.tolist()
        np.testing.assert_allclose(ends.harmful_scores, direct.harmful_scores, rtol=1e-4, atol=1e-5)
