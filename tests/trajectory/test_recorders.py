"""Our trainers, Hugging Face's Trainer, and checkpoints that are there, as records."""

import numpy as np
import pytest
import torch
from recorded_trainings import off
from small_trainings import adamw, draw, seeded, sgd, training
from torch import nn

import headwater as hw
from headwater.errors import AlreadySaved, BatchMismatch, InvalidInput, StaleFit
from headwater.retraining.torch import train_many
from headwater.torch.batch import TorchBatch
from headwater.trajectory.optimizers import AdamW, Sgd
from headwater.trajectory.replay import known_stretches
from headwater.trajectory.torch.importing import from_checkpoints
from headwater.trajectory.torch.trainer import train_recorded


def rows_loss(output, y):
    return torch.nn.functional.cross_entropy(output, y, reduction="none")


def test_our_trainer_is_recorded(tmp_path):
    x, y = draw("mlp", 20, 0)
    make, keep = seeded(training("mlp").make), torch.arange(20) != 4
    fields = {"steps": 12, "batch_size": 6, "lr": 0.2, "l2": 0.01}
    model = train_recorded(make, x, y, tmp_path / "r", loss=rows_loss, keep=keep, seed=3, **fields)
    many = train_many(make, x, y, keep[None], [3], loss=rows_loss, **fields)
    for name, p in model.named_parameters():
        np.testing.assert_allclose(p.detach().numpy(), many.parameters[name][0].numpy(), rtol=1e-10, atol=1e-13)
    influence = hw.Influence(model, "cross_entropy", hw.Unrolled(tmp_path / "r", removals=())).fit((x, y))
    scores = np.asarray(influence.attribute((x, y), draw("mlp", 2, 9)))
    assert (scores[:, 4] == 0).all() and (scores[:, 5] != 0).all()  # it never saw row 4
    with pytest.raises(AlreadySaved):
        train_recorded(make, x, y, tmp_path / "r", loss=rows_loss, **fields)
    with pytest.raises(BatchMismatch):
        train_recorded(make, x, y, tmp_path / "s", loss=rows_loss, keep=keep[:3], **fields)


@pytest.mark.parametrize("optimizer, settings", [(sgd, Sgd), (adamw, AdamW)])
def test_checkpoints_with_their_rows_are_a_record(optimizer, settings, tmp_path):
    what = training("mlp", optimizer, falling=False, steps=9)
    model = what.run(recorder=lambda m, o: hw.record(m, o, tmp_path / "r"))
    states, optimizers = {}, {}
    for stop in (0, 4, 9):
        part = what.changed(steps=9)
        kept = {}

        def recorder(m, o, stop=stop, kept=kept):
            kept.update(model=m, optimizer=o)
            return _Until(stop, kept)

        part.run(recorder=recorder)
        states[stop], optimizers[stop] = kept["weights"], kept["memory"]
    torch.save(states[4], tmp_path / "four.pt")
    states[4] = tmp_path / "four.pt"
    own = {Sgd: Sgd(0.2, 0.9, 0.01), AdamW: AdamW(0.01, weight_decay=0.1)}[settings]
    rows = [batches[0].numpy() for batches in what.ids()]
    from_checkpoints(tmp_path / "i", states, own, rows=rows, optimizer_states=optimizers)
    query = draw("mlp", 3, 9)
    found = [
        np.asarray(
            hw.Influence(model, "cross_entropy", hw.Unrolled(tmp_path / folder, removals=()))
            .fit((what.x, what.y))
            .attribute((what.x, what.y), query)
        )
        for folder in "ri"
    ]
    assert off(found[1], found[0]) < 1e-8

    blind = from_checkpoints(tmp_path / "j", states, own, optimizer_states=optimizers)
    assert len(blind.step(3).ids) == 0
    source = hw.Influence(model, "cross_entropy", hw.Source(blind, segments=2, checkpoints=1)).fit((what.x, what.y))
    assert np.isfinite(np.asarray(source.attribute((what.x, what.y), query))).all()
    unrolled = hw.Influence(model, "cross_entropy", hw.Unrolled(blind, removals=())).fit((what.x, what.y))
    with pytest.raises(StaleFit, match="replay"):
        unrolled.attribute((what.x, what.y), query)


@pytest.mark.parametrize("layer", [nn.Dropout(0.3), nn.BatchNorm1d(8)], ids=["dropout", "norm"])
@pytest.mark.parametrize("rows, replay", [(None, True), ([range(6)] * 4, False)], ids=["blind", "seeing"])
def test_source_asks_of_checkpoints_no_step_that_it_does_not_take(layer, rows, replay, tmp_path):
    """Whose steps could not be taken again."""
    x, y = draw("mlp", 6, 0)
    model = nn.Sequential(nn.Linear(6, 8), layer, nn.Linear(8, 3)).double().eval()
    names = [name for name, _ in model.named_parameters()]
    end = model.state_dict()
    begin = {name: value + 0.1 * (name in names) for name, value in end.items()}
    record = from_checkpoints(tmp_path / "r", {0: begin, 4: end}, Sgd(0.1), rows=rows, names=names)
    source = hw.Source(record, segments=1, checkpoints=1, replay=replay)
    influence = hw.Influence(model, "cross_entropy", source).fit((x, y))
    assert np.isfinite(np.asarray(influence.attribute((x, y), (x[:2], y[:2])))).all()


def test_adam_without_a_first_beta_still_remembers_squares(tmp_path):
    """Checkpoints that lack them cannot be replayed from."""
    states = {k: {"w": torch.full((2,), float(k))} for k in (0, 1, 2)}
    for number, (own, known) in enumerate([(AdamW(0.1, betas=(0.0, 0.9)), [(0, 1)]), (Sgd(0.1), [(0, 1), (1, 2)])]):
        record = from_checkpoints(tmp_path / str(number), states, own, rows=[[0], [0]])
        assert known_stretches(record) == known


class _Until:
    """Looks at a training after some of its steps."""

    start = 0

    def __init__(self, stop, kept):
        self.stop, self.kept, self.count = stop, kept, 0

    def __enter__(self):
        self._look()
        return self

    def __exit__(self, *_):
        pass

    def step(self, *_):
        self.count += 1
        self._look()

    def _look(self):
        import copy

        if self.count == self.stop:
            self.kept["weights"] = copy.deepcopy(self.kept["model"].state_dict())
            self.kept["memory"] = copy.deepcopy(self.kept["optimizer"].state_dict())


def test_one_checkpoint_is_no_training(tmp_path):
    with pytest.raises(InvalidInput, match="two or more"):
        from_checkpoints(tmp_path / "r", {3: {}}, Sgd(0.1))
    with pytest.raises(InvalidInput, match="step 1 has no a"):
        from_checkpoints(tmp_path / "r", {0: {"a": torch.ones(2)}, 1: {}}, Sgd(0.1))


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_trainer_of_hugging_face_is_recorded(dropout, tmp_path):
    transformers = pytest.importorskip("transformers")
    from headwater.trajectory.torch.callback import RecordCallback

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=13,
        n_positions=8,
        n_embd=8,
        n_layer=1,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )
    model = transformers.GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 13, (12, 7), generator=generator)
    labels = tokens.clone()
    labels[::2, 5:] = -100  # rows of different numbers of tokens
    rows = [{"input_ids": t, "labels": n, "row_ids": k} for k, (t, n) in enumerate(zip(tokens, labels, strict=True))]
    arguments = transformers.TrainingArguments(
        tmp_path / "out",
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        max_steps=4,
        learning_rate=0.01,
        weight_decay=0.1,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    callback = RecordCallback(tmp_path / "r", keep="all")
    transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    record = hw.Trajectory(tmp_path / "r")
    assert record.steps == 4 and len(record.step(0).ids) == 6 and record.header.clip == 1.0
    assert [call.rows for call in record.step(0).calls] == ([3, 3] if dropout else [])
    model.eval()
    batch = [TorchBatch({"input_ids": tokens}, labels, ids=np.arange(12))]
    influence = hw.Influence(model, method=hw.Unrolled(record, removals=())).fit(batch)
    query = [TorchBatch({"input_ids": tokens[:2]}, tokens[:2])]
    scores = np.asarray(influence.attribute(batch, query, unit="removal"))
    assert np.isfinite(scores).all() and (np.abs(scores) > 0).all()
