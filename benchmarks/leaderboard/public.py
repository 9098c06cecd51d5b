"""Our rows of bergson's public leaderboard: the LDS of GPT-2 on WikiText, at removals of 1 %, mean over 50 queries.

    python benchmarks/leaderboard/public.py BANK TRAIN QUERY [--other-seed 43=FOLDER] [--out FOLDER] [--only ekfac]

BANK     a folder of bergson's with the bank, and the trained model in retrained/base (examples/compare_wikitext there,
         `save_models: true`); see `headwater.evaluate.bergson` for its files
TRAIN    the rows in the bank's order, a line of JSON each, {"input_ids": [...]}, as `datasets` writes with `to_json`:
         EleutherAI/bergson-wikitext-512-chunks, split "train", 4608 rows
QUERY    the same of the queries: "test[0:50]"

It prints a table of ours between the figures that were published. Intervals of ours are 95 %, subsets resampled, as
theirs. What each method found goes to --out, in their files too (OUT/METHOD/scores): their `validate` trains without
the first rows of it (`filter-proponents`), which is their other column. A stopped run goes on where it was.

Nothing is downloaded, and GPT-2 on 4608 rows of 512 tokens wants a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import headwater as hw
from headwater.evaluate import Bank, Interval, lds
from headwater.evaluate.bergson import read_bank, write_scores
from headwater.tables import table

METHODS: Mapping[str, tuple[Any, str | None]] = {
    "grad-dot": (hw.GradDot(), None),
    "grad-cos": (hw.GradCos(), None),
    "kfac, factored": (hw.Kfac(damping_form="factored"), None),
    "ekfac": (hw.Ekfac(), None),
    "ekfac, train side": (hw.Ekfac(), "train"),
    "ekfac, both sides": (hw.Ekfac(), "both"),
    "logra, 64": (hw.LoGra(dimension=64), None),
    "logra, 64, both sides": (hw.LoGra(dimension=64), "both"),
}
PUBLISHED = {
    "MAGIC": (0.931, 0.925, 0.936),
    "MAGIC (cross-seed)": (0.829, 0.815, 0.840),
    "Shampoo": (0.517, 0.491, 0.539),
    "EK-FAC": (0.454, 0.426, 0.479),
    "TrackStar (projection 64)": (0.270, 0.240, 0.295),
    "BM25": (0.220, 0.185, 0.252),
    "TRAK (projection 32)": (0.215, 0.184, 0.244),
    "SOURCE": (0.165, 0.138, 0.191),
    "Activation similarity": (0.110, 0.070, 0.149),
    "Gradient cosine similarity": (0.019, -0.008, 0.045),
}
"""LDS of bergson's LEADERBOARD.md (commit 1b8d41e) and, for TRAK, examples/compare_wikitext/README.md (01130ee)."""
LEVEL, RESAMPLES = 0.95, 1000


@dataclass(frozen=True)
class Line:
    """A row of the table."""

    name: str
    lds: Interval
    by_query: Sequence[float] = ()
    other_seed: str = ""
    cost: str = ""

    @property
    def cells(self) -> list[str]:
        spread = [f"{f(self.by_query):.3f}" if len(self.by_query) else "" for f in (np.median, min, max)]
        return [self.name, str(self.lds), *spread, self.other_seed, self.cost]


def read_rows(file: Path) -> list[dict[str, list[int]]]:
    """Token ids of each line. Errors: SystemExit, naming the line."""
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            ids = json.loads(line)["input_ids"]
        except (ValueError, KeyError, TypeError):
            ids = None
        if not isinstance(ids, list) or len(ids) < 2 or not all(type(token) is int for token in ids):
            raise SystemExit(f'{file}, line {number}: expected {{"input_ids": [...]}} with two tokens or more.')
        found.append({"input_ids": ids})
    if not found:
        raise SystemExit(f"{file} has no rows.")
    return found


def layers(model: nn.Module) -> dict[str, list[str]]:
    """Each linear layer as a block of its own, the head left out: it is the vocabulary's table, often tied."""
    head = model.get_output_embeddings()
    found = [name for name, part in model.named_modules() if isinstance(part, (nn.Linear, Conv1D)) and part is not head]
    return {name: [name] for name in found}


def scores_of(name: str, model: nn.Module, train: list, query: list, out: Path, batch: int) -> hw.Scores:
    method, normalise = METHODS[name]
    influence = hw.Influence(model, method=method, blocks=layers(model), batch_size=batch)
    return influence.fit(train, progress=True).attribute(
        train, query, normalise=normalise, store=out / "kept", progress=True
    )


def measured(name: str, scores: np.ndarray, bank: Bank, cost: str) -> Line:
    """The LDS for the runs of the first seed, and for those of the others."""
    own, *others = (
        lds(scores, bank.keep, bank.outputs[:, run : run + 1], level=LEVEL, resamples=RESAMPLES)
        for run in range(bank.outputs.shape[1])
    )
    return Line(name, own.raw, own.by_query, "; ".join(str(other.raw) for other in others), cost)


def run(bank: Bank, model: nn.Module, train: list, query: list, out: Path, names: Sequence[str], batch: int) -> str:
    """Score, measure, write what bergson reads; the table."""
    if (len(query), len(train)) != (bank.queries, bank.keep.shape[1]):
        raise SystemExit(
            f"There are {len(query)} queries and {len(train)} rows; the bank has {bank.queries}, {bank.keep.shape[1]}."
        )
    lines = [Line(f"{name} (published)", Interval(*figures, LEVEL)) for name, figures in PUBLISHED.items()]
    for name in names:
        folder, start = out / name, time.process_time()
        found = np.asarray(scores_of(name, model, train, query, folder, batch), dtype=np.float64)
        cost = f"{time.process_time() - start:.0f}"
        if not (folder / "scores" / "info.json").exists():
            write_scores(folder / "scores", found)
        lines.append(measured(f"headwater, {name}", found, bank, cost))
    lines.sort(key=lambda line: -line.lds.value)
    head = ["method", "LDS (95 %)", "median", "least", "most", "other seed", "CPU s"]
    return table([head, *(line.cells for line in lines)], left=(0,))


def main(arguments: Sequence[str] | None = None) -> None:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("bank", "train", "query"):
        given.add_argument(name, type=Path)
    given.add_argument("--model", type=Path, help="a folder of transformers'; BANK/retrained/base otherwise")
    given.add_argument("--other-seed", metavar="SEED=FOLDER", help="the bank's subsets, trained with another seed")
    given.add_argument("--out", type=Path, default=Path(".public-bank"))
    given.add_argument("--only", nargs="*", default=[], help="methods whose name contains one of these")
    given.add_argument("--batch", type=int, default=8, help="rows at once")
    given.add_argument("--device", default="cpu")
    asked = given.parse_args(arguments)
    train, query = read_rows(asked.train), read_rows(asked.query)
    seed, _, folder = (asked.other_seed or "").partition("=")
    if asked.other_seed and not (seed.isdecimal() and folder):
        raise SystemExit(f"--other-seed is {asked.other_seed!r}; expected SEED=FOLDER.")
    folders = {42: asked.bank} | ({int(seed): Path(folder)} if folder else {})
    bank = read_bank(folders, asked.out / "bank", rows=len(train))
    model = AutoModelForCausalLM.from_pretrained(
        asked.model or asked.bank / "retrained" / "base", local_files_only=True
    )
    names = [name for name in METHODS if not asked.only or any(part in name for part in asked.only)]
    print(run(bank, model.to(asked.device).eval(), train, query, asked.out, names, asked.batch))


if __name__ == "__main__":
    sys.exit(main())
