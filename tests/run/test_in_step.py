"""Claims about runs in a folder of a model that FSDP2 spreads over processes: two real ones, on gloo."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import headwater as hw
from headwater.store.info import info
from headwater.store.runs import check

pytestmark = pytest.mark.slow

START = """
    import sys
    from datetime import timedelta

    import numpy as np
    import torch, torch.distributed as dist
    from torch import nn
    from torch.distributed.fsdp import fully_shard

    import headwater as hw
    from headwater import rows
    from headwater.errors import HeadwaterError
    from headwater.run import attribute, plan, tiles
    from headwater.run.runners import shared
    from headwater.torch import TorchBatch, TorchComposableInfluence

    for module, name, value in ((rows, "FEW", 1), (shared, "ROWS", 8), (plan, "ROWS", 8), (plan, "FEWEST", 8)):
        setattr(module, name, value)
    rank, (meeting, *given) = int(sys.argv[1]), sys.argv[2:]
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    torch.manual_seed(0)
    x, y = torch.randn(44, 5, dtype=torch.float64), torch.arange(44) % 3
    x2 = x**2

    def batch(k):
        return TorchBatch(x[k : k + 4], y[k : k + 4], weights=1 + x2[k : k + 4, 0], ids=torch.arange(k, k + 4) + 100)

    train, queries = [batch(k) for k in range(0, 44, 4)], [(x[:3] + 0.1, y[:3])]
    groups = [[100, 143], [117, 118, 119]]

    def model():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()

    def spread():
        found = model()
        for layer in (found[0], found[2], found):
            fully_shard(layer)
        return found

    def influence(of):
        return TorchComposableInfluence(of, nn.CrossEntropyLoss(), hw.Ekfac(), damping=hw.relative(0.3))
"""


def both(folder, code, *given, times=[0]):  # noqa: B006
    """Two processes run this code: how each ended, and what each said."""
    times[0] += 1
    script, meeting = folder / "script.py", folder / f"meeting-{times[0]}"
    script.write_text(textwrap.dedent(START) + textwrap.dedent(code))
    started = [
        subprocess.Popen(
            [sys.executable, script, str(rank), meeting, *map(str, given)],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [each.communicate(timeout=300)[0] for each in started]
    return [each.returncode for each in started], said


ALL = """
    import os, signal
    from headwater.store.tiles import TileStore

    stage, who, when = given if given else ("", "-1", "0")
    seen, computed = {}, []

    class Mortal:
        '''The train rows; the process is killed on the way to one of them.'''
        def __init__(self, stage):
            self.stage = stage

        def __iter__(self):
            for one in train:
                seen[self.stage] = seen.get(self.stage, 0) + 1
                if (self.stage, rank, seen[self.stage]) == (stage, int(who), int(when)):
                    os.kill(os.getpid(), signal.SIGKILL)
                yield one

    whole = TileStore.write
    def written(self, tile):
        if (stage, rank, len(computed)) == ("write", int(who), int(when)):
            self.ledger.add = lambda line: os.kill(os.getpid(), signal.SIGKILL)  # the chunk is there, and no line
        computed.append(tile.start)
        whole(self, tile)
    TileStore.write = written

    found = influence(spread()).fit(Mortal("fit"), store="fit")
    scores = found.attribute(Mortal("scores"), queries, store="run", memory="4GiB", by_block=True)
    ends = found.top(Mortal("top"), queries, 3, store="ends")
    itself = found.self_influence(Mortal("self"), store="self")
    rows_gone = found.removal(Mortal("removal"), queries, store="removal")
    groups_gone = found.removal(Mortal("groups"), queries, groups, store="groups")
    print("computed", len(computed))
    assert scores.diagnosis.stationarity.gradient > 0
    np.savez(
        f"{rank}.npz", scores=scores.values, blocks=np.stack(list(scores.by_block.values())), ends=ends.helpful_scores,
        itself=itself, rows=rows_gone, groups=groups_gone, ids=scores.train_ids,
    )
    if not given:
        alone, same = influence(model()).fit(train), found
        expected = alone.attribute(train, queries, by_block=True)
        np.savez(
            f"alone-{rank}.npz", scores=expected.values, blocks=np.stack(list(expected.by_block.values())),
            ends=alone.top(train, queries, 3).helpful_scores, itself=alone.self_influence(train),
            rows=alone.removal(train, queries), groups=alone.removal(train, queries, groups), ids=expected.train_ids,
        )
    dist.destroy_process_group()
"""
FOLDERS = ("run", "ends", "self", "removal")


def bytes_of(folder, rank):
    with np.load(folder / f"{rank}.npz") as found:
        return {name: found[name].tobytes() for name in found.files}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    ended, said = both(folder, ALL)
    assert ended == [0, 0], said
    assert "computed 24" in said[0], said[0]  # six tiles in each of four folders; the groups are parts
    assert "computed 0" in said[1], said[1]  # the first alone writes
    return folder


def test_a_run_in_a_folder_has_the_numbers_of_the_plain_model(undisturbed):
    assert bytes_of(undisturbed, 0) == bytes_of(undisturbed, 1)
    with np.load(undisturbed / "0.npz") as found, np.load(undisturbed / "alone-0.npz") as expected:
        for name in expected.files:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-10, atol=1e-12, err_msg=name)
    for name in FOLDERS:
        assert check(undisturbed / name) == []
        assert len(list((undisturbed / name).glob("ledger-*.jsonl"))) == 1
    assert hw.Scores.open(undisturbed / "run").values.shape == (3, 44)
    assert not list(undisturbed.rglob("*.claim"))


@pytest.mark.parametrize(
    ("stage", "rank", "when"),
    [
        ("fit", 0, 14),
        pytest.param("scores", 0, 6, marks=pytest.mark.faults),
        ("scores", 1, 7),
        ("write", 0, 3),
        pytest.param("top", 0, 9, marks=pytest.mark.faults),
        pytest.param("self", 1, 9, marks=pytest.mark.faults),
        pytest.param("removal", 0, 5, marks=pytest.mark.faults),
        pytest.param("groups", 0, 9, marks=pytest.mark.faults),
    ],
)
def test_a_process_that_is_killed_loses_nothing_and_the_other_says_so(undisturbed, tmp_path, stage, rank, when):
    ended, said = both(tmp_path, ALL, stage, rank, when)
    assert ended[rank] == -signal.SIGKILL
    assert ended[1 - rank] == 1
    assert "ProcessLost" in said[1 - rank] and "one has ended" in said[1 - rank], said[1 - rank]
    ended, said = both(tmp_path, ALL, "", -1, 0)
    assert ended == [0, 0], said
    assert bytes_of(tmp_path, 0) == bytes_of(tmp_path, 1) == bytes_of(undisturbed, 0)
    if stage != "fit":
        assert int(said[0].split("computed ")[1].split()[0]) < 24, said[0]  # what was there is not computed again
    for name in FOLDERS:
        assert check(tmp_path / name) == []
    assert info(tmp_path / "fit", check=True).all_damage == ()
    assert not list(tmp_path.rglob("*.draft"))


FAILURES = """
    from headwater.errors import NotWritten
    from headwater.run.queries import PairScorer
    from headwater.store.tiles import TileStore

    found = influence(spread()).fit(train)

    def refused(name, call):
        try:
            call()
        except (HeadwaterError, OSError, ZeroDivisionError) as error:
            print(f"{name}: {type(error).__name__}: {error}")

    def attribute(store="run", loader=train, **options):
        return lambda: found.attribute(loader, queries, store=store, **options)

    def full(self, tile):
        raise NotWritten("no room")

    whole, TileStore.write = TileStore.write, full
    refused("write", attribute())
    TileStore.write = whole

    def broken(self, piece):
        return piece.start > 10 and rank == 1 and 1 / 0 or scores(self, piece)

    scores, PairScorer.scores = PairScorer.scores, broken
    refused("scores", attribute())
    PairScorer.scores = scores

    found.attribute(train, queries, store="run")
    refused("more rows", attribute(loader=[*train, batch(0)]))
    other = influence(spread()).fit(train[:8])
    refused("another", lambda: other.attribute(train, queries, store="run"))
    refused("fewer rows", attribute(loader=train[: 11 - 2 * rank], store="new"))
    refused("elsewhere", attribute(store=f"of-{rank}"))
    refused("worker", attribute(worker=(rank, 2)))
    refused("memory", attribute(store="little", memory=1))
    more = TorchBatch(x[:4] + 1, y[:4], ids=torch.arange(200, 204))
    print("appended", found.attribute([*train, more], queries, store="run", append=True).values.shape)
    dist.destroy_process_group()
"""


def test_what_fails_on_one_process_is_said_on_all(tmp_path):
    ended, said = both(tmp_path, FAILURES)
    assert ended == [0, 0], said
    found = [dict(line.split(": ", 1) for line in each.splitlines() if ": " in line) for each in said]
    assert found[0]["write"] == "NotWritten: no room"
    assert found[1]["write"].startswith("NotWritten: Process 0, which looks after the folder for all 2: no room")
    assert found[1]["scores"].startswith("ZeroDivisionError")
    assert "an error on [1]" in found[0]["scores"]
    for each in found:
        assert "append=True" in each["more rows"]
        assert each["another"].startswith("InvalidInput")
        assert "not in step" in each["fewer rows"]
        assert each["elsewhere"].startswith("NotSaved") and "one of the 2 processes" in each["elsewhere"]
        assert "Leave worker= out" in each["worker"]
        assert "too little" in each["memory"]
    assert all("appended (3, 48)" in each for each in said), said
