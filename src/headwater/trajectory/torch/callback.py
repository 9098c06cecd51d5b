"""Records a training of Hugging Face's Trainer.

    dataset = dataset.add_column("row_ids", list(range(len(dataset))))
    arguments = TrainingArguments(..., remove_unused_columns=False)
    Trainer(model, arguments, train_dataset=dataset, callbacks=[RecordCallback("folder")]).train()

The rows' numbers come with the batches, and are taken out before the model sees them. Where there is dropout, what it
drew is kept: batches are padded to one length (padding="max_length"), and on a GPU attn_implementation="eager".
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from headwater.errors import InvalidInput
from headwater.hf.losses import IGNORED
from headwater.hf.model import task_of
from headwater.trajectory.torch.recorder import TorchRecorder


class _Seen(NamedTuple):
    """A batch that went into the model."""

    ids: torch.Tensor
    tokens: Any
    """With a label, of each row; None for models with one label a row."""
    total: Any
    """What the Trainer has the loss divided by; None where that is the model's affair."""


class RecordCallback(TrainerCallback):
    """For `callbacks=` of a Trainer; `hw.Influence(model, method=hw.Unrolled(folder))` reads what it wrote.

    ids: the column with the rows' names, whole numbers. keep: as of hw.record. Clipping is as the arguments say. Of
    models with a label for each token, whose batches' loss is a mean over tokens, a row counts with its tokens.
    """

    def __init__(self, folder: str | os.PathLike[str], *, ids: str = "row_ids", keep: str = "sqrt"):
        self.folder, self.ids, self.keep = folder, ids, keep
        self.recorder: TorchRecorder | None = None
        self._seen: list[_Seen] = []
        self._hook: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        model, optimizer = given["model"], given["optimizer"]
        self._task = task_of(model, None)
        plain = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper has the optimizer in it
        clip = args.max_grad_norm if args.max_grad_norm and args.max_grad_norm > 0 else None
        self.recorder = TorchRecorder(model, plain, self.folder, keep=self.keep, clip=clip)
        self.recorder.__enter__()
        self._hook = model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, model: Any, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """At a batch on its way into the model."""
        rest = dict(inputs)
        ids = rest.pop(self.ids, None)
        if model.training:
            if ids is None:
                raise InvalidInput(
                    f"The batch has no {self.ids!r}, which names its rows: give the data set such a column, and "
                    "TrainingArguments remove_unused_columns=False."
                )
            self._seen.append(_Seen(ids, self._tokens(rest.get("labels")), rest.get("num_items_in_batch")))
        return args, rest

    def _tokens(self, labels: torch.Tensor | None) -> torch.Tensor | None:
        if labels is None or not self._task.has_label_per_token:
            return None
        return (labels[:, int(self._task.ahead) :] != IGNORED).sum(1)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.recorder is not None
        ids, weights = [one.ids for one in self._seen], [one.tokens for one in self._seen]
        if any(tokens is None for tokens in weights):
            self.recorder.step(ids)
        elif any(one.total is None for one in self._seen):  # means over each batch's tokens, averaged
            self.recorder.step(ids, weights, total=[float(tokens.sum()) for tokens in weights])
        else:  # one sum over all of them, over what the Trainer counted
            total = float(self._seen[0].total) / len(ids)  # each batch's share of an average is that of the sum
            self.recorder.step(ids, weights, total=[total] * len(ids))
        self._seen = []

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.recorder is not None
        self._hook.remove()
        self.recorder.__exit__(None, None, None)
