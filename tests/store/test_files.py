"""Files that lie: whatever happens to a file, the numbers are those from before, or a HeadwaterError names the file."""

import os
import resource
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripts
import torch
import xarray as xr
from damage import QUERY, TRAIN, X, Y, by_torch, damaged, exchanged, files_of, left_by_a_dead_process, network
from sklearn.linear_model import LogisticRegression

import headwater as hw
from headwater.errors import (
    AlreadySaved,
    DamagedFile,
    HeadwaterError,
    InvalidInput,
    InvalidSetting,
    NotSaved,
    NotWritten,
)
from headwater.evaluate import Bank, plan_subsets
from headwater.gradients.identity import identity_of
from headwater.jax import JaxComposableInfluence
from headwater.sklearn import SklearnComposableInfluence
from headwater.store import draft
from headwater.store.plan import Sizes
from headwater.store.tiles import TileStore
from headwater.torch import TorchBatch, TorchComposableInfluence

SUPPORT = str(Path(__file__).parents[1] / "support")
FEW, MANY = (0.3, 0.77), tuple(np.linspace(0, 1, 60))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Six rows a tile."""
    monkeypatch.setattr("headwater.run.plan.FEWEST", 6)
    monkeypatch.setattr("headwater.run.plan.ROWS", 6)


# Artefacts: how to write one (two of a kind for 0 and 1), and how to read its numbers ---------------------------------

Numbers = list[Any]


def scores(which: int = 0) -> hw.Scores:
    values = np.random.default_rng(which).normal(size=(2, 5)).astype(np.float32)
    values[:, 0] = 0
    names = np.array([9, 4]) if which else np.array([7, 0])
    ids = np.arange(5) + which
    shares = {"one": values / 4, "two": values * 3 / 4}
    return hw.Scores(values, names, ids, n_train=5.0 + which, method="Some()", damping={"one": 0.1}, by_block=shares)


def read_scores(path: Path) -> Numbers:
    found = hw.Scores.open(path)
    shares = list((found.by_block or {}).values())
    said = [found.unit, found.n_train, found.method, dict(found.damping), found.explained, found.coverage]
    return [found.values, found.query_ids, found.train_ids, *shares, said]


def by_jax() -> JaxComposableInfluence:
    def apply(w, x):
        return jnp.tanh(x @ w["in"]) @ w["out"]

    def loss(output, target):
        return -jax.nn.log_softmax(output)[target]

    weights = {"in": jnp.linspace(-1, 1, 12).reshape(4, 3), "out": jnp.linspace(1, -1, 9).reshape(3, 3)}
    return JaxComposableInfluence(apply, weights, loss, hw.Direct(), likelihood="cross_entropy")


def by_sklearn() -> SklearnComposableInfluence:
    return SklearnComposableInfluence(LogisticRegression(C=2.0).fit(X.numpy(), Y.numpy()), hw.Direct())


FITS = {
    "torch": (by_torch, (X, Y)),
    "jax": (by_jax, (jnp.asarray(X.numpy()), jnp.asarray(Y.numpy()))),
    "sklearn": (by_sklearn, (X.numpy(), Y.numpy())),
}


def fit_of(framework: str) -> tuple[Callable[[Path, int], None], Callable[[Path], Numbers]]:
    make, (x, y) = FITS[framework]
    made = cache(make)

    def write(path: Path, which: int = 0) -> None:
        made().fit([(x * (1 + which), y)]).save(path)

    def read(path: Path) -> Numbers:
        influence = made().load(path, [(x, y)])
        return [np.asarray(influence.influences(x[:2], y[:2], x, y)), influence.n_train]

    return write, read


PLAN = plan_subsets(6, subsets=3, repeated=1)


def measured(rows: np.ndarray, seed: int) -> np.ndarray:
    return np.array([rows.sum(), 1.0 + seed / 2**21])


def write_bank(path: Path, which: int = 0) -> None:
    Bank(path, PLAN, 2, {"recipe": which}).fill(lambda rows, seed: measured(rows, seed) + which)


def write_packed(path: Path, which: int = 0) -> None:
    write_bank(path, which)
    Bank.open(path).pack()


def read_bank(path: Path) -> Numbers:
    """A run that is missing is run again, as its owner would."""
    found = Bank.open(path)
    return [found.fill(measured).outputs, found.keep, found.plan.seeds, found.recipe]


def write_run(path: Path, which: int = 0) -> None:
    runner().attribute(TRAIN, QUERY if not which else [(X[2:4], Y[2:4])], store=path)


@cache
def runner() -> TorchComposableInfluence:
    return by_torch().fit(TRAIN)


def read_run(path: Path) -> Numbers:
    found = runner().attribute(TRAIN, QUERY, store=path)
    slope = found.diagnosis.stationarity
    return [found.values, found.train_ids, found.diagnosis.rows_seen, np.array([slope.gradient, slope.noise])]


KINDS: dict[str, tuple[Callable[..., None], Callable[[Path], Numbers]]] = {
    "scores": (lambda path, which=0: scores(which).save(path), read_scores),
    **{f"fit of {framework}": fit_of(framework) for framework in FITS},
    "bank": (write_bank, read_bank),
    "packed bank": (write_packed, read_bank),
    "run": (write_run, read_run),
}


def same(found: Numbers, expected: Numbers) -> bool:
    def near(a: Any, b: Any) -> bool:
        if not isinstance(a, np.ndarray) or a.dtype.kind not in "fc":
            return bool(np.all(a == b))
        return a.shape == b.shape and np.allclose(a, b, rtol=1e-5, atol=1e-6 * np.nanmax(np.abs(b)), equal_nan=True)

    return len(found) == len(expected) and all(map(near, found, expected))


def check(kind: str, folder: Path, places: tuple[float, ...], ways: int | None = None) -> int:
    """How often damage was refused."""
    write, read = KINDS[kind]
    write(folder / "one", 0)
    write(folder / "two", 1)
    expected, refused = read(folder / "one"), 0
    assert not same(read(folder / "two"), expected) if kind != "run" else True
    for done in damaged(folder / "one", places, ways):
        try:
            assert same(read(folder / "one"), expected), f"another number, and nothing was said: {done}"
        except HeadwaterError as error:
            refused += 1
            assert done.partition(":")[0].split("/")[0] in str(error), f"{done} is called {error}"
    for done in exchanged(folder / "one", folder / "two"):
        try:
            assert same(read(folder / "one"), expected), f"another number, and nothing was said: {done}"
        except HeadwaterError:
            refused += 1
    assert same(read(folder / "one"), expected)
    return refused


@pytest.mark.parametrize("kind", KINDS)
def test_damage_to_any_file_is_refused_by_name_or_mended(kind, tmp_path):
    """Of a run, whose reading takes longest, each file in two ways, and each way on several files."""
    assert check(kind, tmp_path, (0.6,), ways=2) > 4 if kind == "run" else check(kind, tmp_path, FEW) > 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_damage_at_many_places_is_refused_by_name_or_mended(kind, tmp_path):
    check(kind, tmp_path, MANY)


def test_a_file_that_was_not_there_is_refused_but_for_those_of_file_browsers(tmp_path):
    scores().save(tmp_path / "s")
    (tmp_path / "s" / "scores" / ".DS_Store").write_bytes(b"x")
    hw.Scores.open(tmp_path / "s")
    (tmp_path / "s" / "scores" / "c" / "0" / "1").write_bytes(b"x")
    with pytest.raises(DamagedFile, match="0/1 was not written with the rest"):
        hw.Scores.open(tmp_path / "s")


def test_others_who_read_scores_notice_a_flipped_bit_too(tmp_path):
    scores().save(tmp_path / "s")
    chunk = next(file for file in files_of(tmp_path / "s" / "scores") if "json" not in file.name)
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 4
    with xr.open_zarr(tmp_path / "s", consolidated=False) as data:  # no warning, of files that zarr does not know
        np.testing.assert_array_equal(data["scores"].values, scores().values)
    chunk.write_bytes(content)
    with xr.open_zarr(tmp_path / "s", consolidated=False) as data, pytest.raises(Exception, match="checksum"):
        data["scores"].values  # noqa: B018


def test_what_was_saved_before_there_were_seals_is_said_to_be(tmp_path):
    scores().to_xarray().drop_vars("block").to_zarr(tmp_path / "s", consolidated=False)
    with pytest.raises(DamagedFile, match=r"before there were any.*Save it again"):
        hw.Scores.open(tmp_path / "s")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "identity.json").write_text('{"method": "Ekfac()"}')
    with pytest.raises(DamagedFile, match=r"before there were any.*Choose another folder"):
        TileStore(tmp_path / "run", {"method": "Ekfac()"}, lambda: Sizes(3, 2))
    with pytest.raises(NotSaved, match="no scores at"):
        hw.Scores.open(tmp_path / "nowhere")


def test_names_that_are_not_distinct_are_not_saved(tmp_path):
    with pytest.raises(InvalidInput, match="train ids are not distinct: 3 rows have 2 names"):
        hw.Scores(np.ones((1, 3)), np.array([0]), np.array([4, 4, 5])).save(tmp_path / "s")
    assert not any(tmp_path.iterdir())


# Another run behind the same store ------------------------------------------------------------------------------------


class Halved(torch.nn.Module):
    def forward(self, x):
        return torch.tanh(x) / 2


class Doubled(torch.nn.Module):
    def forward(self, x):
        return torch.tanh(x) * 2


Halved.__qualname__ = Halved.__name__ = Doubled.__qualname__ = Doubled.__name__ = "Scaled"


OTHERS = {
    "loss": lambda: TorchComposableInfluence(
        network(),
        lambda output, target: 2 * torch.nn.functional.cross_entropy(output, target),
        hw.Ekfac(),
        damping=0.1,
        likelihood="cross_entropy",
    ),
    "architecture": lambda: by_torch(damping=0.1, activation=torch.nn.ReLU),
    "method": lambda: by_torch(hw.Kfac(), damping=0.1),
    "damping": lambda: by_torch(damping=0.101),
    "blocks": lambda: by_torch(damping=0.1, blocks="full"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_run_in_the_same_folder_is_refused_and_what_differs_is_named(what, tmp_path):
    """The first row, by which runs once were told apart, has no weight, and so no score."""
    weights = torch.ones(11)
    weights[0] = 0
    train = [TorchBatch(X, Y, weights=weights)]
    by_torch(damping=0.1).fit(TRAIN).attribute(train, QUERY, store=tmp_path / "run")
    with pytest.raises(InvalidInput, match=f"{what} was"):
        OTHERS[what]().fit(TRAIN).attribute(train, QUERY, store=tmp_path / "run")


@pytest.mark.parametrize("method", [hw.GradDot(), hw.Ekfac(), hw.Cg()], ids=lambda m: type(m).__name__)
def test_what_words_do_not_tell_is_told_by_the_probe(method, tmp_path, monkeypatch):
    """Two models of one name, the same weights, and fits whose curvature is taken to be the same."""
    from headwater.run import attribute

    weights = torch.ones(11)
    weights[:6] = 0
    train = [TorchBatch(X, Y, weights=weights)]
    told = attribute.fit_identity
    monkeypatch.setattr(attribute, "fit_identity", lambda *given: told(*given) | {"curvature": 0, "architecture": ""})
    one, two = (by_torch(method, damping=0.1, activation=kind).fit(TRAIN) for kind in (Halved, Doubled))
    one.attribute(train, QUERY, store=tmp_path / "run")
    with pytest.raises(InvalidInput, match="other scores than this call"):
        two.attribute(train, QUERY, store=tmp_path / "run")
    one.attribute(train, QUERY, store=tmp_path / "run")


@pytest.mark.parametrize("method", [hw.Ekfac(), hw.Kfac(), hw.Cg(), hw.Arnoldi(rank=5), hw.Trak(dimension=8)], ids=str)
def test_a_run_goes_on_after_a_fit_in_other_batches(method, tmp_path):
    batches = [[(x, y) for x, y in zip(X.split(n), Y.split(n), strict=True)] for n in (6, 4)]
    one, two = (by_torch(method).fit(loader) for loader in batches)
    expected = one.attribute(batches[0], QUERY, store=tmp_path / "run").values
    for loader in batches:
        got = two.attribute(loader, QUERY, store=tmp_path / "run").values
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_a_fit_of_another_architecture_is_not_loaded(tmp_path):
    by_torch(activation=Halved).fit(TRAIN).save(tmp_path / "fit")
    by_torch(activation=Halved).load(tmp_path / "fit")
    for other in (torch.nn.Tanh, torch.nn.ReLU, Doubled):
        with pytest.raises(InvalidSetting, match="fitted with architecture"):
            by_torch(activation=other).load(tmp_path / "fit")


def test_functions_that_differ_in_what_they_call_have_another_identity():
    pairs = [
        (lambda x: torch.tanh(x), lambda x: torch.relu(x)),
        (lambda x, p=1: x, lambda x, p=2: x),
        (lambda x: [torch.exp(v) for v in x], lambda x: [torch.log(v) for v in x]),
    ]
    for one, two in pairs:
        assert identity_of(one) == identity_of(one) != identity_of(two)


# Drafts, full disks, and what cannot be written -----------------------------------------------------------------------


@contextmanager
def small_disk(bytes_at_most: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes: writes fail half-way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_at_most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", ["scores", "fit of torch", "bank", "run"])
@pytest.mark.parametrize("room", [0, 150])
def test_a_full_disk_is_said_to_be_and_leaves_nothing_half_written(kind, room, tmp_path):
    write, read = KINDS[kind]
    with small_disk(room), pytest.raises(NotWritten, match=r"could not be written: .*make room") as raised:
        write(tmp_path / "one")
    assert str(tmp_path / "one") in str(raised.value)
    if kind in ("scores", "fit of torch"):
        assert not any(tmp_path.iterdir())
    write(tmp_path / "one")
    write(tmp_path / "two")
    assert same(read(tmp_path / "one"), read(tmp_path / "two"))
    assert not [file for file in files_of(tmp_path) if "draft" in str(file.relative_to(tmp_path))]


@pytest.mark.parametrize("kind", ["scores", "fit of torch", "bank", "run"])
def test_a_folder_that_cannot_be_written_to_is_said_to_be(kind, tmp_path):
    (tmp_path / "file").write_text("mine")
    write, _ = KINDS[kind]
    for path in (tmp_path / "file" / "one", Path("/proc/headwater")):
        with pytest.raises(NotWritten, match=f"{path} could not be written"):
            write(path)
    assert os.listdir(tmp_path) == ["file"]


def killed(code: str, *given: Path) -> None:
    status, said = scripts.run(f"import os, sys\n{textwrap.dedent(code)}", *given)
    assert status == -9, said


def test_drafts_of_killed_saves_are_removed_by_the_next(tmp_path):
    """Whichever name it saves under; those of living processes, and of other machines, are left alone."""
    code = """
        import numpy as np, headwater as hw
        import headwater.store.scores as scores
        scores.seal_folder = lambda *given: os.kill(os.getpid(), 9)
        hw.Scores(np.ones((2, 50)), np.arange(2), np.arange(50)).save(sys.argv[1])
    """
    killed(code, tmp_path / "s")
    assert len(os.listdir(tmp_path)) == 1
    ours = draft.draft_of(tmp_path / "other")
    living = tmp_path / f".x.{draft.HOST}-{os.getppid()}-00000000-00000000.draft"
    abroad = tmp_path / f".x.00000000-{os.getppid()}-00000000-00000000.draft"
    again = tmp_path / f".x.{draft.HOST}-{os.getpid()}-00000000-00000000.draft"  # a container that started again
    for file in (ours, living, abroad, again, left_by_a_dead_process(tmp_path / "y")):
        file.write_text("half")
    by_torch().fit(TRAIN).save(tmp_path / "fit")
    assert sorted(os.listdir(tmp_path)) == sorted([ours.name, living.name, abroad.name, "fit"])
    with pytest.raises(AlreadySaved, match="exists"):
        by_torch().fit(TRAIN).save(tmp_path / "fit")


def test_a_run_that_was_killed_while_it_wrote_goes_on_with_the_diagnosis_of_all_rows(tmp_path):
    code = """
        from damage import TRAIN, QUERY, by_torch
        from headwater.run import plan
        from headwater.store import draft
        plan.ROWS = plan.FEWEST = 6
        replace, seen = os.replace, []
        def stops(written, file):
            if "/c/0/0/" in str(file):
                seen.append(file)
            if len(seen) == 2:
                os.kill(os.getpid(), 9)
            replace(written, file)
        os.replace = stops
        by_torch().fit(TRAIN).attribute(TRAIN, QUERY, store=sys.argv[1])
    """
    killed(code, tmp_path / "run")
    (ledger,) = (tmp_path / "run").glob("ledger-*.jsonl")
    assert len(ledger.read_text().splitlines()) == 1
    assert not list((tmp_path / "run").glob("sums-*.npz"))
    write_run(tmp_path / "whole")
    expected = read_run(tmp_path / "whole")
    assert expected[2] == 11
    for _ in range(2):
        assert same(read_run(tmp_path / "run"), expected)
    assert not [file for file in files_of(tmp_path / "run") if "draft" in str(file)]


def test_sums_are_kept_now_and_then_for_runs_that_are_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("headwater.run.diagnosis.PAUSE", 0.0)
    monkeypatch.setattr("headwater.run.diagnosis.monotonic", iter(range(1000)).__next__)
    influence, kept = by_torch().fit(TRAIN), []
    monkeypatch.setattr(TileStore, "write_sums", lambda self, writer, tiles, sums: kept.append(len(tiles)))
    influence.attribute(TRAIN, QUERY, store=tmp_path / "run")
    assert kept == [1, 2]


def at_once(code: str, folder: Path, count: int = 3) -> list[str]:
    """What processes print that do this at the same moment; each knows its number `k`, and waits in `go()`."""
    script = f"""
import os, sys, time
from pathlib import Path
folder, k = Path(sys.argv[1]), int(sys.argv[2])
def go():
    (folder / f"ready{{k}}").touch()
    while not (folder / "go").exists():
        time.sleep(0.001)
{textwrap.dedent(code)}
"""
    folder.mkdir()
    running = [scripts.Script(script, folder, k) for k in range(count)]
    while len(list(folder.glob("ready*"))) < count and all(process.poll() is None for process in running):
        pass
    (folder / "go").touch()
    return [process.end()[1].strip() for process in running]


def test_of_several_runs_at_once_one_has_the_folder(tmp_path):
    code = """
        import numpy as np
        from headwater.errors import InvalidInput
        from headwater.evaluate.bank import Bank, Plan
        from headwater.store.base import Tile
        from headwater.store.plan import Sizes
        from headwater.store.tiles import TileStore
        keys = np.arange(3, dtype=np.uint64)
        def open_run():
            TileStore(folder / "run", {"run": k}, lambda: Sizes(3, 2))
        def probe():
            TileStore(folder / "probed", {"run": 0}, lambda: Sizes(3, 2)).probe(keys, np.full((1, 2, 3), k + 1.0))
        def bank():
            Bank(folder / "bank", Plan(np.eye(4, dtype=bool), np.arange(4)[:, None]), 1, {"k": k})
        go()
        for what in (open_run, probe, bank):
            try:
                what()
                print(1, end=" ")
            except InvalidInput as error:
                assert "another" in str(error) or "other scores" in str(error), error
                print(0, end=" ")
    """
    found = np.array([list(map(int, said.split())) for said in at_once(code, tmp_path / "f")])
    np.testing.assert_array_equal(found.sum(axis=0), [1, 1, 1])


def test_one_run_in_several_processes_at_once_is_one_run(tmp_path):
    code = """
        import numpy as np
        from headwater.store.base import Tile
        from headwater.store.plan import Sizes
        from headwater.store.tiles import TileStore
        import zarr
        go()
        store, keys = TileStore(folder / "run", {"run": 0}, lambda: Sizes(3, 2)), np.arange(3, dtype=np.uint64)
        for start in range(0, 12, 3):
            store.write(Tile(start, keys, keys + np.uint64(start), np.full((1, 2, 3), start, dtype=float)))
        print("done")
    """
    assert at_once(code, tmp_path / "f", 2) == ["done"] * 2
    store = TileStore(tmp_path / "f" / "run", {"run": 0}, lambda: Sizes(3, 2))
    for start in range(0, 12, 3):
        found = store.read(start // 3, 0)
        np.testing.assert_array_equal(found, np.full((1, 2, 3), start))
