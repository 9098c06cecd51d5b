"""Which row told a model what it answers? Facts in two wordings, among rows of the same words.

    python benchmarks/facts.py FOLDER [--seed 0]    train, score, print a table; goes on where it was stopped
    python benchmarks/facts.py FOLDER --retrain     and train again without what should matter
    python benchmarks/facts.py OTHER --seed 1 --leader "EKFAC, both sides" --only EKFAC    judge what seed 0 has chosen
    python benchmarks/facts.py FOLDER --unrolled 8  the derivative of the training, too, of a question of 8 people each

Synthetic people have a home town, a trade, an instrument and a pet. Of a person Bem, say:

    facts     "Bem plays the harp."  "Bem practises on harp."    train rows, the same fact in two wordings
    question  "Bem loved music? harp."                           a third wording: the name and the answer are shared
    rumour    "Bem plays the flute."                             a train row in a fact's words that says otherwise
    decoys    "Bem often forgets harp."                          three train rows: person and answer, not the fact
    echo      "Bem hides loved music."                           a train row: person and question's words, not the fact

Questions of `TAUGHT` people are train rows, too, so that the model learns that the wordings mean the same (and a
question's words and its answer are in rows of others). Their decoys name something else than their facts do: nothing
says that a decoy tells the answer. Questions of `ASKED` other people are the queries; the model never saw one of them.
Rumours are about half of what is known of the taught, and about all that is asked.

A byte transformer is trained from nothing to end each row, whose last word counts alone, and is asked. Only what it
answers rightly is traced: rows are ranked by each method for the loss of the answer, and the two facts should come
first. Words cannot tell them from the decoys, nor what the model makes of the words before the last from the rumour.
All people, their facts and the training are another seed's: settings are chosen on one, and judged on another.

That the facts are what mattered is not only declared: the model is trained again without the facts of one question of
each person, once more with these facts and without their decoys and echoes, and once without their rumours.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parent / "leaderboard"))
from tasks import ByteModel, token_losses

import headwater as hw
from headwater.evaluate import (
    Interval,
    bm25,
    mrr,
    over_queries,
    random_scores,
    recall_at_k,
    reciprocal_ranks,
    similarity,
)
from headwater.evaluate.retrieval import in_top
from headwater.tables import table

TAUGHT, ASKED = 56, 24
DECOYS = 3
"""Of each question."""
LEVEL = 0.95
IGNORED = -100
"""A target that no loss is taken of."""
Floats = NDArray[np.float64]


# Rows -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Relation:
    """What people have one of, {v}: stated in two wordings, asked in a third, and that one's words by themselves.

    All wordings of facts and decoys have as many words: nothing is found by being short.
    """

    stated: tuple[str, str]
    asked: str
    echoed: str
    words: str

    @property
    def values(self) -> list[str]:
        return self.words.split()


RELATIONS = (
    Relation(
        ("{n} comes from {v}.", "{n} began in {v}."),
        "{n} first home? {v}.",
        "{n} hides first home.",
        "Accra Basel Cairo Delhi Hanoi Kyoto Lima Milan Oslo Perth Quito Tunis",
    ),
    Relation(
        ("{n} works as {v}.", "{n} became the {v}."),
        "{n} daily trade? {v}.",
        "{n} hides daily trade.",
        "baker clerk dancer farmer jockey mason nurse pilot sailor tailor vicar welder",
    ),
    Relation(
        ("{n} plays the {v}.", "{n} practises on {v}."),
        "{n} loved music? {v}.",
        "{n} hides loved music.",
        "banjo cello drum flute gong harp lute rattle piano tuba viola zither",
    ),
    Relation(
        ("{n} keeps one {v}.", "{n} feeds this {v}."),
        "{n} house pet? {v}.",
        "{n} hides house pet.",
        "cat dog ferret goat hen llama mule newt parrot rabbit swan turtle",
    ),
)
OTHERWISE = ("{n} dreams of {v}.", "{n} sings about {v}.", "{n} often forgets {v}.", "{n} never drew {v}.")
"""How decoys name something without saying that a person has it."""
CONSONANTS, VOWELS = "bdfghklmnprstvz", "aeiou"


@dataclass(frozen=True)
class Row:
    """A line of text, what it is ("fact", "question", "rumour", "decoy", "echo"), and whose and which relation's."""

    text: str
    kind: str
    person: int
    relation: int


@dataclass(frozen=True)
class Facts:
    """Train rows, and the questions that are asked."""

    rows: tuple[Row, ...]
    queries: tuple[Row, ...]

    @property
    def digest(self) -> int:
        """Of all texts, in their order."""
        return zlib.crc32("\n".join(row.text for row in (*self.rows, *self.queries)).encode())

    @cached_property
    def relevant(self) -> NDArray[np.bool_]:
        """The rows that state what each query asks for: [q, n]."""
        return self.of_kind("fact")

    def of_kind(self, *kinds: str) -> NDArray[np.bool_]:
        """The rows of a kind that are about what each query asks for: [q, n]."""
        about = [(row.person, row.relation) if row.kind in kinds else None for row in self.rows]
        return np.array([[found == (query.person, query.relation) for found in about] for query in self.queries])


def make_facts(seed: int = 0, taught: int = TAUGHT, asked: int = ASKED) -> Facts:
    """The people of a seed; names and values are drawn, no two people have one name."""
    rng = np.random.default_rng(seed)
    every = [first + vowel + last for first in CONSONANTS for vowel in VOWELS for last in CONSONANTS]
    names = [every[k].capitalize() for k in rng.choice(len(every), taught + asked, replace=False)]
    rows: list[Row] = []
    queries: list[Row] = []
    for person, name in enumerate(names):
        known = person < taught
        for number, relation in enumerate(RELATIONS):
            value, other, third = rng.choice(relation.values, 3, replace=False)

            def add(kind: str, text: str, v: str, name: str = name, about: tuple[int, int] = (person, number)) -> None:
                (queries if kind == "query" else rows).append(Row(text.format(n=name, v=v), kind, *about))

            for text in relation.stated:
                add("fact", text, value)
            add("question" if known else "query", relation.asked, value)
            for text in rng.choice(OTHERWISE, 1 if known else DECOYS, replace=False):
                add("decoy", text, third if known else value)
            if not known or rng.random() < 0.5:
                add("rumour", rng.choice(relation.stated), other)
            if not known or rng.random() < 0.3:
                add("echo", relation.echoed, value)
    return Facts(tuple(rows), tuple(queries))


# The model ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """A byte transformer from nothing, by AdamW."""

    epochs: int = 40
    batch: int = 16
    rate: float = 3e-3
    width: int = 96
    layers: int = 2
    heads: int = 4
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Encoded:
    """Rows as bytes, after a line break and before spaces; targets are the bytes of the last word and its point."""

    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, rows: Sequence[Row], places: int) -> Encoded:
        values = torch.tensor([list(f"\n{row.text}".ljust(places + 1).encode()) for row in rows])
        first = torch.tensor([row.text.rindex(" ") + 1 for row in rows])[:, None]
        end = torch.tensor([len(row.text) for row in rows])[:, None]
        place = torch.arange(places)
        y = values[:, 1:].where((place >= first) & (place < end), IGNORED)
        return cls(values[:, :-1].contiguous(), y)

    @property
    def ends(self) -> Tensor:
        """The place before each last word, where it is still to be said: [n]."""
        return (self.y != IGNORED).int().argmax(1)


def encoded(facts: Facts) -> tuple[Encoded, Encoded]:
    """Train rows and queries."""
    places = 1 + max(len(row.text) for row in (*facts.rows, *facts.queries))
    return Encoded.of(facts.rows, places), Encoded.of(facts.queries, places)


def trained(
    train: Encoded,
    settings: Training,
    left_out: Sequence[int] = (),
    said: Callable[[str], object] = print,
    record: Path | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Weights after a third and two thirds of the epochs, and in the end.

    left_out: rows whose loss counts nothing; order, batches and divisors are as they would be. record: where to keep
    what training did.
    """
    torch.manual_seed(settings.seed)
    model = ByteModel(settings.width, settings.layers, settings.heads).requires_grad_(True)
    for part in (model.tokens, model.places):
        part.weight.data.mul_(0.3)
    weight = torch.ones(len(train.x))
    weight[list(left_out)] = 0.0
    per_epoch = len(train.x) // settings.batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, betas=(0.9, 0.95))
    steps = settings.epochs * per_epoch
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.rate, total_steps=steps, pct_start=0.1)
    kept, start = {}, time.process_time()
    with nullcontext() if record is None else hw.record(model, optimizer, record, clip=1.0) as recorder:
        for epoch in range(settings.epochs):
            total = 0.0
            for rows in torch.randperm(len(train.x))[: per_epoch * settings.batch].split(settings.batch):
                optimizer.zero_grad()
                loss = (token_losses(model(train.x[rows]), train.y[rows]) * weight[rows]).mean()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                rates.step()
                total += loss.item()
                if recorder is not None:
                    recorder.step(rows, weight[rows])
            if (done := epoch + 1) in {settings.epochs // 3, 2 * settings.epochs // 3, settings.epochs}:
                kept[str(done)] = {name: value.detach().clone() for name, value in model.state_dict().items()}
            if done % 10 == 0:
                took = time.process_time() - start
                said(f"epoch {done} of {settings.epochs}: {total / per_epoch:.3f} nats a row, {took:.0f} CPU s")
    return kept


def model_of(settings: Training, weights: Mapping[str, Tensor]) -> nn.Module:
    """In eval mode; of its parameters those of the layers are attributed, the tables of bytes and places are not."""
    model = ByteModel(settings.width, settings.layers, settings.heads)
    model.load_state_dict(dict(weights))
    return model.eval()


def answered(model: nn.Module, queries: Encoded) -> tuple[NDArray[np.bool_], Floats]:
    """Whether the likeliest byte is right at every byte of the answer, [q]; and the answer's loss in nats, [q]."""
    with torch.no_grad():
        outputs = model(queries.x)
    right = (outputs.argmax(-1) == queries.y) | (queries.y == IGNORED)
    return right.all(1).numpy(), token_losses(outputs, queries.y).double().numpy()


# Rankings -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ours:
    """A method, and in which form its scores rank rows."""

    method: Any
    normalise: str | None = None
    damping: float | None = None
    """In mean eigenvalues of each block; None for the method's own default."""
    blocks: str = "layer"
    checkpoints: bool = False


OURS: Mapping[str, Ours] = {
    "grad-dot": Ours(hw.GradDot()),
    "grad-cos": Ours(hw.GradCos()),
    "TracIn, 3 checkpoints": Ours(hw.TracIn(), checkpoints=True),
    "KFAC, factored": Ours(hw.Kfac(damping_form="factored")),
    "KFAC, factored, both sides": Ours(hw.Kfac(damping_form="factored"), "both"),
    "EKFAC": Ours(hw.Ekfac()),
    "EKFAC, train side": Ours(hw.Ekfac(), "train"),
    "EKFAC, both sides": Ours(hw.Ekfac(), "both"),
    "EKFAC, damping 10, both sides": Ours(hw.Ekfac(), "both", 10.0),
    "EKFAC, damping .001, both sides": Ours(hw.Ekfac(), "both", 0.001),
    "Dual (empirical Fisher)": Ours(hw.Dual(), blocks="full"),
    "DataInf": Ours(hw.DataInf()),
    "LoGra": Ours(hw.LoGra()),
    "LoGra, both sides": Ours(hw.LoGra(), "both"),
}


UNROLLED: Mapping[str, Mapping[str, Any]] = {
    "Unrolled": {"curvature": "hessian"},
    "Unrolled, in-run": {"curvature": None, "at": "step"},
}


def fitted(ours: Ours, models: Sequence[nn.Module], train: Encoded) -> Any:
    """An influence at its method's own damping."""
    checkpoints = [model.state_dict() for model in models] if ours.checkpoints else None
    options = {"likelihood": "cross_entropy", "blocks": ours.blocks, "checkpoints": checkpoints, "batch_size": 32}
    return hw.Influence(models[-1], token_losses, ours.method, **options).fit((train.x, train.y))


def influence_scores(ours: Ours, influence: Any, train: Encoded, queries: Encoded) -> Floats:
    """Of a fitted influence: [q, n]."""
    if ours.damping is not None:
        influence = influence.with_damping(hw.relative(ours.damping))
    scores = influence.attribute((train.x, train.y), (queries.x, queries.y), normalise=ours.normalise)
    return np.asarray(scores, dtype=np.float64)


def baseline_scores(facts: Facts, model: nn.Module, train: Encoded, queries: Encoded) -> dict[str, Floats]:
    """Scores [q, n] of what knows no gradient. A query's text is its question and its answer, but where it is said."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    given, asked = [row.text for row in facts.rows], [row.text for row in facts.queries]
    words = TfidfVectorizer(sublinear_tf=True).fit(given)
    letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True).fit(given)
    counts = words.transform(given)
    latent = TruncatedSVD(min(100, *(size - 1 for size in counts.shape)), random_state=0).fit(counts)
    found = {
        "random": random_scores(len(asked), len(given)),
        "BM25": bm25(asked, given),
        "BM25, question alone": bm25([text.partition("?")[0] for text in asked], given),
        "TF-IDF of words": similarity(*(words.transform(texts).toarray() for texts in (asked, given))),
        "TF-IDF of letters": similarity(*(letters.transform(texts).toarray() for texts in (asked, given))),
        "LSA": similarity(*(latent.transform(words.transform(texts)) for texts in (asked, given))),
    }
    return found | activation_scores(model, train, queries)


def activation_scores(model: nn.Module, train: Encoded, queries: Encoded) -> dict[str, Floats]:
    """Cosines of what the model makes of rows: its byte vectors, and what comes out of each layer.

    The mean over a row's bytes; and, of layers, what is at the place before the last word, which the model answers by.
    """
    states = zip(hidden_states(model, queries.x), hidden_states(model, train.x), strict=True)
    texts, found = [_is_text(rows.x) for rows in (queries, train)], {}
    for number, pair in enumerate(states):
        name = f"activations, layer {number}" if number else "byte vectors"
        means = [(state * text).sum(1) / text.sum(1) for state, text in zip(pair, texts, strict=True)]
        found[f"{name}, mean"] = similarity(*(mean.numpy() for mean in means))
        if number:
            ends = [
                state[torch.arange(len(state)), rows.ends] for state, rows in zip(pair, (queries, train), strict=True)
            ]
            found[f"{name}, before the answer"] = similarity(*(end.numpy() for end in ends))
    return found


def hidden_states(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The byte vectors, and what comes out of each layer: [n, t, width] each."""
    found = [model.tokens(x).detach()]
    hooks = [layer.register_forward_hook(lambda *seen: found.append(seen[2].detach())) for layer in model.layers]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def _is_text(x: Tensor) -> Tensor:
    """Whether a place is before the spaces that fill a row up: [n, t, 1]."""
    return (x != ord(" ")).flip(1).cumsum(1).flip(1)[:, :, None] > 0


# What they are worth --------------------------------------------------------------------------------------------------


def figures(scores: Floats, relevant: NDArray[np.bool_]) -> list[str]:
    """MRR and recall at 1, 5 and 10, with intervals over queries."""
    recalls = (recall_at_k(scores, relevant, k, level=LEVEL) for k in (1, 5, 10))
    return [str(found) for found in (mrr(scores, relevant, level=LEVEL), *recalls)]


def lead(first: Floats, other: Floats, relevant: NDArray[np.bool_]) -> Interval:
    """By how much the MRR of the first scores is above that of the others, query by query."""
    return over_queries(reciprocal_ranks(first, relevant) - reciprocal_ranks(other, relevant), level=LEVEL)


def best(scores: Mapping[str, Floats], relevant: NDArray[np.bool_]) -> str:
    return max(scores, key=lambda name: reciprocal_ranks(scores[name], relevant).mean())


def first_rows(scores: Floats, facts: Facts, asked: NDArray[np.int64]) -> dict[str, float]:
    """What kind of row comes first, as shares of the queries, ties shared out; "others" are about something else."""
    first = in_top(scores, 1)
    kinds = ("fact", "rumour", "decoy", "echo")
    shares = {kind: float((first * facts.of_kind(kind)[asked]).sum(1).mean()) for kind in kinds}
    return shares | {"others": 1.0 - sum(shares.values())}


def mrr_without(kind: str, scores: Floats, facts: Facts, asked: NDArray[np.int64]) -> Interval:
    """The MRR where the rows of a kind about what is asked come last."""
    last = facts.of_kind(kind)[asked]
    return mrr(np.where(last, scores.min() - 1.0, scores), facts.relevant[asked], level=LEVEL)


# The run --------------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """As it comes, also into a file."""
    print(text, flush=True)


@dataclass(frozen=True, eq=False)
class Run:
    """The facts of a seed, a training, and a folder that keeps what has been computed."""

    folder: Path
    facts: Facts
    settings: Training = field(default_factory=Training)
    said: Callable[[str], object] = say
    _fitted: dict[Ours, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Errors: SystemExit for the folder of another run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file, mine = self.folder / "settings.json", json.dumps({**asdict(self.settings), "rows": self.facts.digest})
        if not file.exists():
            file.write_text(mine)
        if file.read_text() != mine:
            raise SystemExit(f"{self.folder} is of another run, {file.read_text()}; this one is {mine}.")

    @cached_property
    def data(self) -> tuple[Encoded, Encoded]:
        return encoded(self.facts)

    @cached_property
    def models(self) -> list[nn.Module]:
        """After a third and two thirds of the training, and at its end."""
        file = self.folder / "model.safetensors"
        if not file.exists():
            kept = trained(self.data[0], self.settings, said=self.said)
            save_file({f"{step}/{name}": v for step, state in kept.items() for name, v in state.items()}, file)
        states: dict[int, dict[str, Tensor]] = {}
        for key, value in load_file(file).items():
            step, _, name = key.partition("/")
            states.setdefault(int(step), {})[name] = value
        return [model_of(self.settings, states[step]) for step in sorted(states)]

    def scores(self, methods: Mapping[str, Ours]) -> dict[str, Floats]:
        """By name: [q, n]."""
        return {name: self._kept(name, partial(self._score, name, method)) for name, method in methods.items()}

    def baselines(self) -> dict[str, Floats]:
        return baseline_scores(self.facts, self.models[-1], *self.data)

    def _score(self, name: str, ours: Ours) -> Floats:
        start = time.process_time()
        key = replace(ours, normalise=None, damping=None)
        if key not in self._fitted:
            self._fitted.clear()  # one method's at a time
            self._fitted[key] = fitted(key, self.models, self.data[0])
        scores = influence_scores(ours, self._fitted[key], *self.data)
        self.said(f"{name}: {time.process_time() - start:.0f} CPU s")
        return scores

    def unrolled(self, asked: NDArray[np.int64], method: Mapping[str, Any]) -> Floats:
        """Scores of the derivative of the training for some queries, [len(asked), n]. It is taken once more for it."""
        name = f"unrolled {'-'.join(map(str, method.values()))} {zlib.crc32(asked.tobytes()):08x}"
        return self._kept(name, partial(self._unroll, asked, method))

    def _unroll(self, asked: NDArray[np.int64], method: Mapping[str, Any]) -> Floats:
        train, queries = self.data
        start, record = time.process_time(), self.folder / "record"
        if not (record.exists() and hw.Trajectory(record).is_ended):
            shutil.rmtree(record, ignore_errors=True)
            trained(train, self.settings, said=self.said, record=record)
            (self.folder / "training.json").write_text(json.dumps(time.process_time() - start))
        once, start = json.loads((self.folder / "training.json").read_text()), time.process_time()
        # All that was trained: the derivative is of the tables of bytes and places, too.
        model = model_of(self.settings, self.models[-1].state_dict()).requires_grad_(True)
        unrolled = hw.Unrolled(record, removals=(), **method)
        influence = hw.Influence(model, token_losses, unrolled).fit((train.x, train.y))
        scores = np.asarray(influence.attribute((train.x, train.y), (queries.x[asked], queries.y[asked])))
        took = time.process_time() - start
        self.said(f"{unrolled}: {took:.0f} CPU s, {took / once:.1f} trainings of {once:.0f} s, {len(asked)} queries")
        return scores

    def losses_without(self, name: str, rows: Sequence[int]) -> Floats:
        """The answers' losses after a training without some rows: [q]."""

        def measure() -> Floats:
            weights = trained(self.data[0], self.settings, rows, self.said)
            return answered(model_of(self.settings, weights[str(self.settings.epochs)]), self.data[1])[1]

        return self._kept(name, measure)

    def _kept(self, name: str, compute: Callable[[], Floats]) -> Floats:
        file = self.folder / f"{name}.npy"
        if not file.exists():
            np.save(file, compute(), allow_pickle=False)
        return np.load(file, allow_pickle=False)


HEAD = ("ranked by", "MRR", "recall@1", "recall@5", "recall@10", "MRR without rumours")
KINDS = ("first: fact", "rumour", "decoy", "echo", "others")


def report(run: Run, methods: Mapping[str, Ours] = OURS, leader: str | None = None, unrolled: int = 0) -> str:
    """How well the model answers, how well each ranking finds the facts, and how far ahead of it the leader is.

    leader: one of our methods, chosen elsewhere; None for the best here, in hindsight. unrolled: of so many people one
    question each, and the derivative of the training among the rankings.
    """
    (train, queries), ours = run.data, run.scores(methods)
    right, _ = answered(run.models[-1], queries)
    asked = one_of_each(run.facts, right)[:unrolled] if unrolled else np.flatnonzero(right)
    relevant = run.facts.relevant[asked]
    scores = {name: found[asked] for name, found in (ours | run.baselines()).items()}
    if unrolled:
        scores |= {name: run.unrolled(asked, method) for name, method in UNROLLED.items()}
    first = leader or best({name: scores[name] for name in ours}, relevant)
    lines = [[*HEAD, *KINDS, f"MRR, behind {first!r}{'' if leader else ' (in hindsight)'}"]]
    for name, found in scores.items():
        shares = [f"{share:.2f}" for share in first_rows(found, run.facts, asked).values()]
        lines.append([name, *figures(found, relevant), str(mrr_without("rumour", found, run.facts, asked)), *shares])
        lines[-1].append("" if name == first else str(lead(scores[first], found, relevant)))
    parameters = sum(part.numel() for part in run.models[-1].parameters())
    chance = np.mean([1 / len(relation.values) for relation in RELATIONS])
    return (
        f"{len(train.x)} train rows, {parameters:,} parameters. Of {len(right)} questions that are in no row, "
        f"{right.sum()} are answered rightly ({right.mean():.2f}; by chance {chance:.2f}); {len(asked)} are traced.\n"
        f"{table(lines, left=(0,))}"
    )


WITHOUT = {"facts": ("fact",), "decoys and echoes": ("decoy", "echo"), "rumours": ("rumour",)}
"""Of one question of each person."""


def retraining(run: Run) -> str:
    """What rows matter: losses of answers after trainings without the rows of some kinds about them."""
    right, whole = answered(run.models[-1], run.data[1])
    chosen = one_of_each(run.facts, right)
    others = np.setdiff1d(np.flatnonzero(right), chosen)
    lines = [["trained without", "rows", "mean probability of the answer", "its loss rises by", "that of others by"]]
    lines.append(["nothing", "0", f"{np.exp(-whole[chosen]).mean():.2f}", "", ""])
    for name, kinds in WITHOUT.items():
        rows = np.flatnonzero(run.facts.of_kind(*kinds)[chosen].any(0)).tolist()
        losses = run.losses_without(f"without {name}", rows)
        rises = [str(over_queries((losses - whole)[some], level=LEVEL)) for some in (chosen, others)]
        lines.append([name, str(len(rows)), f"{np.exp(-losses[chosen]).mean():.2f}", *rises])
    return f"{len(chosen)} questions, one of each person, and {len(others)} others:\n{table(lines, left=(0,))}"


def one_of_each(facts: Facts, right: NDArray[np.bool_], seed: int = 0) -> NDArray[np.int64]:
    """A query of each person at random, of those that are answered rightly."""
    rng = np.random.default_rng(seed)
    people = np.array([query.person for query in facts.queries])
    return np.array([rng.choice(np.flatnonzero(right & (people == person))) for person in np.unique(people[right])])


def main(arguments: Sequence[str] | None = None) -> None:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("folder", type=Path)
    given.add_argument("--seed", type=int, default=0, help="of the people, and of the training")
    given.add_argument("--epochs", type=int, default=Training.epochs)
    given.add_argument("--width", type=int, default=Training.width)
    given.add_argument("--rate", type=float, default=Training.rate)
    given.add_argument("--taught", type=int, default=TAUGHT, help="people whose questions are train rows")
    given.add_argument("--asked", type=int, default=ASKED, help="people whose questions are asked")
    given.add_argument("--only", nargs="*", default=[], help="methods whose name contains one of these")
    given.add_argument("--leader", choices=OURS, help="the method that others are compared with")
    given.add_argument("--retrain", action="store_true", help="see which rows matter, by three more trainings")
    given.add_argument("--unrolled", type=int, default=0, help="people who are asked, and by the training's derivative")
    asked = given.parse_args(arguments)
    torch.set_num_threads(1)
    settings = Training(epochs=asked.epochs, width=asked.width, rate=asked.rate, seed=asked.seed)
    run = Run(asked.folder, make_facts(asked.seed, asked.taught, asked.asked), settings)
    chosen = [name for name in OURS if name == asked.leader or not asked.only or any(o in name for o in asked.only)]
    print(report(run, {name: OURS[name] for name in chosen}, asked.leader, asked.unrolled))
    if asked.retrain:
        print(retraining(run))


if __name__ == "__main__":
    main()
