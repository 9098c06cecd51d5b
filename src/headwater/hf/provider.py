"""Per-sample gradients of a pretrained model: rows of tokens, whatever their padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from headwater.arrays import rows_within_memory, shape_of
from headwater.blocks import Structure
from headwater.errors import InvalidInput, UnsupportedModel
from headwater.gradients.provider import OutputFunction
from headwater.hf.losses import IGNORED, NextToken, PerToken, TokenLoss
from headwater.hf.model import LogitsOf, base_of, takes, task_of
from headwater.hf.rows import (
    IDS,
    MASK,
    Columns,
    check_padding_is_said,
    lengths,
    same_length_groups,
    without_spare_padding,
)
from headwater.random import row_keys
from headwater.torch.batch import TorchBatch, as_tensor
from headwater.torch.capture import detached_state, run
from headwater.torch.likelihoods import CrossEntropy, Likelihood
from headwater.torch.losses import Loss
from headwater.torch.measurements import negative_logit, negative_margin
from headwater.torch.precision import wide, wide_copy
from headwater.torch.products import jacobian_product
from headwater.torch.provider import TorchGradientProvider, undisturbed
from headwater.torch.surroundings import autograd_on, twice_differentiable
from headwater.torch.wrapped import unwrapped


class HfGradientProvider(TorchGradientProvider):
    """Per-sample gradients of a pretrained model, for one of three heads.

    model: a `transformers.PreTrainedModel`, or one with PEFT adapters; it is not changed. x: a dict of its inputs
    (input_ids, attention_mask, ...), a tensor of ids [n, t], or one of embeddings [n, t, d]. y: labels as the model
    takes them, -100 where there is none; for a causal language model they may be left out, and are the ids then.
    The loss of a row is the model's own on that row by itself:

    - causal-lm, token-classification: the cross entropy of its labels, their mean or sum (`per_token`);
    - sequence-classification: cross entropy, the mean binary cross entropy over the labels, or the mean squared error,
      as `config.problem_type` says (by default cross entropy, or squared error for a single output).

    task: found from the class's name if not given. measurement: a function of (logits, labels), or the name of one in
    `gradients.measurements`, in place of the loss for query rows. Numbers do not depend on how rows are padded: padding
    is moved behind the tokens, left out where a batch has more of it than need be, and counts nowhere.
    Errors: InvalidInput for a model that is not loaded, rows whose padding is not masked, and labels that do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        task: str | None = None,
        per_token: PerToken = "mean",
        blocks: Structure = "full",
        loss: Loss | None = None,
        measurement: Loss | str | None = None,
        likelihood: Likelihood | str | None = None,
        plain: bool = False,
    ):
        model = unwrapped(model)
        self.task = task_of(model, task)
        self.pretrained = model
        self.per_token = per_token
        own = self._own_loss()
        likelihood = self._own_likelihood() if loss is None and likelihood is None else likelihood
        self.takes = takes(model)
        super().__init__(
            LogitsOf(model),
            own if loss is None else loss,
            blocks=blocks,
            measurement=measurement,
            likelihood=likelihood,
            plain=plain,
        )

    def _whole_model(self, model: nn.Module) -> nn.Module:
        return self.pretrained

    def _own_loss(self) -> Loss:
        if self.task.has_label_per_token:
            return TokenLoss(self.task.ahead, self.per_token)
        kinds = {"regression": nn.MSELoss, "multi_label_classification": nn.BCEWithLogitsLoss}
        return kinds.get(str(self.task.problem), nn.CrossEntropyLoss)()

    def _own_likelihood(self) -> Likelihood | None:
        """Of labels for each token; the losses of whole rows are torch's own, whose likelihoods are known."""
        if not self.task.has_label_per_token:
            return None
        return NextToken() if self.task.ahead else CrossEntropy(IGNORED, class_axis=-1)

    @property
    def normalisation(self) -> str | None:
        """How a row's tokens are reduced; rows are never mixed."""
        return f"{self.per_token} per token" if isinstance(self.loss, TokenLoss) else super().normalisation

    def of_output(self, function: OutputFunction) -> HfGradientProvider:
        """Errors: UnsupportedModel for rows of several labels."""
        chosen: Loss = {"margin": negative_margin, "logit": negative_logit}[function]
        if self.task.has_label_per_token:
            raise UnsupportedModel(
                f"A row of several labels has no {function} of its own. For hw.Trak() give output='loss'; or give a "
                "measurement of (logits, labels)."
            )
        return type(self)(self.pretrained, task=self.task.name, blocks=self._structure, loss=chosen, plain=self.plain)

    def _wide(self, plain: bool) -> Self:
        loss = wide_copy(self.loss, "loss")
        found = type(self)(
            wide_copy(self.pretrained, "model"),
            task=self.task.name,
            per_token=self.per_token,
            blocks=self._structure,
            loss=loss,
            measurement=loss if self.measurement is self.loss else wide_copy(self.measurement, "measurement"),
            likelihood=self.likelihood,
            plain=plain,
        )
        return found._informed_by(self)

    # Batches ------------------------------------------------------------------------------------------------------

    def canonical(self, batch: TorchBatch) -> TorchBatch:
        """The batch as the model takes it: each row begins at its first token, on the model's device."""
        return self._ready(batch)

    def _made_ready(self, batch: TorchBatch) -> TorchBatch:
        x = batch.x
        if isinstance(x, Mapping) or len(shape_of(x) or ()) == 2:
            x, y = self._columns(x, batch.y)
            batch = TorchBatch(x, y, batch.weights, batch.ids)
        elif not isinstance(x, torch.Tensor):
            raise InvalidInput(
                f"x is {type(x).__name__}; expected a dict of tensors (input_ids, attention_mask, ...), ids [n, t], or "
                "embeddings [n, t, d]. Strings are made tokens of in loaders, with tokenizer=."
            )
        else:
            batch = TorchBatch(x, self._labels(batch.y, tuple(x.shape[:2])), batch.weights, batch.ids)
        return super()._made_ready(batch)

    def _columns(self, x: object, y: object) -> tuple[Columns, Any]:
        given = dict(x) if isinstance(x, Mapping) else {IDS: x}
        labels = given.pop("labels", None)
        if labels is not None and y is not None:
            raise InvalidInput("Labels are given twice: in x, and as y.")
        columns = {name: self._column(name, v) for name, v in given.items() if v is not None and name in self.takes}
        ids = columns.get(IDS, columns.get("inputs_embeds"))
        if ids is None:
            raise InvalidInput(f"x has the columns {list(given)}; expected input_ids or inputs_embeds.")
        if IDS in columns:
            columns[IDS] = self._checked_ids(columns[IDS])
        check_padding_is_said(columns, self.task.padding)
        y = self._labels(labels if y is None else y, tuple(ids.shape[:2]), columns)
        return without_spare_padding(columns, y, self.task.padding, self.task.has_label_per_token)

    def _column(self, name: str, values: object) -> torch.Tensor:
        """Errors: InvalidInput, naming a column that holds no numbers."""
        try:
            found = as_tensor(torch.as_tensor(values) if isinstance(values, (list, tuple)) else values, self.device)
        except (TypeError, ValueError, RuntimeError, InvalidInput) as error:
            raise InvalidInput(f"The column {name!r} holds no tensor of numbers: {error}") from None
        assert found is not None
        return found

    def _checked_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Errors: InvalidInput for an id that the model has no embedding for."""
        found, words = ids.long(), base_of(self.pretrained).get_input_embeddings()
        size = int(getattr(words, "num_embeddings", 2**62))
        wrong = (found < 0) | (found >= size)
        if bool(wrong.any()):
            row = int(wrong.reshape(len(wrong), -1).any(1).int().argmax())
            raise InvalidInput(f"Row {row} has the id {int(found[wrong][0])}; the model's go from 0 to {size - 1}.")
        return found

    def _labels(self, y: object, shape: tuple[int, ...], x: Columns | None = None) -> torch.Tensor:
        """Labels in the form that the loss takes. Errors: InvalidInput, naming what does not fit."""
        task, x = self.task, x or {}
        labels = None if y is None else self._column("labels", y)
        if labels is None and task.ahead and IDS in x:
            labels = x[IDS] if MASK not in x else x[IDS].masked_fill(x[MASK] == 0, IGNORED)
        if labels is None:
            raise InvalidInput("There are no labels: give y, or a column 'labels'.")
        if task.has_label_per_token:
            expected = shape
        elif task.problem == "single_label_classification":
            labels, expected = (labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels), shape[:1]
        else:
            labels, expected = (labels[:, None] if labels.ndim == 1 else labels), (shape[0], task.classes)
        if tuple(labels.shape) != expected:
            raise InvalidInput(f"Labels have shape {tuple(labels.shape)}; {self._wanted()} have {expected}.")
        if task.has_label_per_token or task.problem == "single_label_classification":
            return self._checked_classes(labels, x)
        return labels.to(wide(self._like).dtype)

    def _checked_classes(self, labels: torch.Tensor, x: Columns) -> torch.Tensor:
        if labels.is_floating_point():
            raise InvalidInput(
                f"Labels are {labels.dtype}; {self._wanted()} are whole numbers. For several labels of a row set "
                "model.config.problem_type='multi_label_classification', for numbers 'regression'."
            )
        labels, task = labels.long(), self.task
        seen = labels[:, task.ahead :] if task.has_label_per_token else labels
        wrong = (seen >= task.classes) | ((seen < 0) & (seen != IGNORED))
        if bool(wrong.any()):
            raise InvalidInput(
                f"There is a label {int(seen[wrong][0])}; {self._wanted()} are from 0 to {task.classes - 1}, or "
                f"{IGNORED} for none."
            )
        mask = x.get(MASK)
        if task.has_label_per_token and mask is not None and mask.ndim == 2:
            padded = ((mask == 0) & (labels != IGNORED)).any(1)
            if bool(padded.any()):
                raise InvalidInput(
                    f"Row {int(padded.int().argmax())} has labels at its padding. Where attention_mask is 0 a label is "
                    f"{IGNORED}: labels.masked_fill(attention_mask == 0, {IGNORED})."
                )
        return labels

    def _wanted(self) -> str:
        return f"labels for {self.task.problem or self.task.name}"

    def positions(self, batch: TorchBatch) -> torch.Tensor | None:
        ends = lengths(batch.x) if isinstance(batch.x, Mapping) else None
        if ends is None:
            return None
        return torch.arange(batch.x[MASK].shape[1], device=ends.device) < ends[:, None]

    def keys_by_content(self, batch: TorchBatch) -> np.ndarray:
        """By what the rows hold; their padding does not count."""
        if not isinstance(batch.x, Mapping):
            return super().keys_by_content(batch)
        return self._keys_of_ready(self._ready(batch))

    def _keys_of_ready(self, batch: TorchBatch) -> np.ndarray:
        if not isinstance(batch.x, dict):
            return super()._keys_of_ready(batch)
        found = np.zeros(len(batch), dtype=np.uint64)
        for rows, columns in same_length_groups(batch.x, batch.y, self.task.has_label_per_token):
            found[rows] = row_keys([wide(column.detach()).cpu().numpy() for column in columns])
        return found

    def content_keys(self, batch: TorchBatch) -> np.ndarray:
        if not isinstance(batch.x, Mapping):
            return super().content_keys(batch)
        columns = [self.keys_by_content(batch)]
        columns += [] if batch.weights is None else [np.asarray(torch.as_tensor(batch.weights).cpu())]
        return row_keys(columns if batch.ids is None else [*columns, self.row_keys(batch)])

    # Tokens -------------------------------------------------------------------------------------------------------

    @undisturbed
    def token_prod(self, batch: TorchBatch, factors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """`<factor_k, grad of a label's share of its row's loss>`: (K, N, T), T positions in canonical form.

        The sum over T is `<factor_k, grad l(row)>`. A derivative of the losses of all labels along each factor at once.
        Errors: UnsupportedModel where a row has one label.
        """
        loss = self.loss
        if not isinstance(loss, TokenLoss):
            raise UnsupportedModel(
                "Scores of tokens need labels of tokens; here a row has one label, or a loss of yours."
            )
        self._refuse_shards("scoring tokens")
        batch = self._prepare(batch)
        state = detached_state(self.model)
        names = [p.name for block in factors for p in self._block_parameters(block)]
        count, like = len(next(iter(factors.values()))), state[names[0]]

        def function(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
            output = run(self.model, {**state, **dict(zip(names, given, strict=True))}, batch.x)
            return (loss.terms(output, batch.y),)

        step = rows_within_memory(8 * (sum(state[name].numel() for name in names) + batch.y.numel() * 64), like)
        found = []
        with autograd_on(), twice_differentiable():
            leaves = [state[name].requires_grad_() for name in names]
            for start in range(0, count, step):
                chosen = {block: factor[start : start + step].to(like.dtype) for block, factor in factors.items()}
                tangents = [piece for block, factor in chosen.items() for piece in self._pieces(block, factor)]
                found += jacobian_product(function, leaves, tangents)
        tokens = torch.cat(found).detach()
        weights = self.row_weights(batch)
        return tokens if weights is None else tokens * weights[:, None]
