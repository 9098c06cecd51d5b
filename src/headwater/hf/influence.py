"""Influence for pretrained models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from headwater.arrays import is_frame, to_numpy
from headwater.attributor import Attributor
from headwater.blocks import Structure
from headwater.errors import InvalidSetting, UnsupportedModel
from headwater.gradients.coverage import Coverage
from headwater.hf.losses import PerToken
from headwater.hf.provider import HfGradientProvider
from headwater.hf.rows import IDS, MASK, Collator, Rows, TableRows, lengths, put_back
from headwater.loaders.batches import Unpack, Unpacked, check_loader
from headwater.loaders.forms import Form, is_pair, pair
from headwater.loaders.texts import Text, are_texts, text_of
from headwater.methods.base import Method
from headwater.methods.damping import Damping
from headwater.torch.batch import TorchBatch
from headwater.torch.checkpoints import Checkpoint, Models
from headwater.torch.likelihoods import Likelihood
from headwater.torch.losses import Loss


@dataclass(frozen=True, eq=False)
class Labelled(Iterable[Any]):
    """A data frame, and which of its columns has the labels."""

    frame: Any
    target: str

    def __iter__(self) -> Iterator[Any]:
        return iter(TableRows(self.frame))


class HfComposableInfluence(Attributor[torch.Tensor]):
    """Which training rows made a pretrained model do this, and by how much.

    model, task, per_token, measurement, likelihood: see `HfGradientProvider`. method, blocks, damping, checkpoints: as
    for torch models. Only parameters with requires_grad=True are attributed: all of a model as it is loaded, the
    adapters alone of a model with PEFT adapters. `coverage` says how many are frozen.

    Where a loader is asked for, these will do: dicts of columns, batch by batch; a `datasets.Dataset`; a list of dicts,
    one for each row; a data frame, also (frame, "column") and (frame, labels); arrays of all rows, (x, labels); with a
    tokenizer, a list of strings, or (strings, labels). tokenizer: makes tokens of strings. collator: makes batches of
    rows, such as a DataCollatorWithPadding; without one, rows are padded on the right. batch_size: rows in such a
    batch; no number depends on it. target, ids: which columns are the labels (if not "labels" or "label") and the
    ids of the rows; a data frame's index names its rows otherwise. unpack: makes (x, y[, ids, weights]) of what a
    loader gives.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        *,
        task: str | None = None,
        per_token: PerToken = "mean",
        blocks: Structure = "layer",
        damping: Damping | Mapping[str, Damping] | None = None,
        measurement: Loss | str | None = None,
        likelihood: Likelihood | str | None = None,
        checkpoints: Sequence[Checkpoint] | None = None,
        tokenizer: Any = None,
        collator: Collator | None = None,
        batch_size: int = 8,
        unpack: Unpack | None = None,
        target: str | None = None,
        ids: str | None = None,
    ):
        def provide(model: nn.Module) -> HfGradientProvider:
            return HfGradientProvider(
                model,
                task=task,
                per_token=per_token,
                blocks=blocks,
                measurement=measurement,
                likelihood=likelihood,
            )

        self._models = Models.of(provide, model, checkpoints)
        form = Form(batch_size, target, ids)
        super().__init__(self._models.provider, method, damping=damping, unpack=unpack, form=form)
        self._rows = Rows(
            tokenizer,
            collator,
            batch_size,
            self._models.own.takes,
            self._models.own.task.padding,
            bool(self._models.own.task.ahead),
            target,
            ids,
        )

    def as_own(self, name: str, array: Any) -> Any:
        """As `TorchComposableInfluence`."""
        return self._models.as_own(array)

    @property
    def model(self) -> nn.Module:
        return self._models.own.pretrained

    @property
    def coverage(self) -> Coverage:
        """How many of the trainable parameters are attributed, and which are not."""
        return self._models.own.coverage

    def as_batches(self, held: Any, role: str) -> Iterable[object]:
        """(x, y) of all rows as batches; texts, frames and data sets are rows, which `as_loader` makes batches of."""
        if isinstance(held, tuple) and len(held) == 2 and (are_texts(held[0]) or is_frame(held[0])):
            x, y = held
            # The name of a column says the labels; a frame with labels beside it has them in a column of their own.
            return Labelled(x, y) if isinstance(y, str) else TableRows(x, y)
        if is_pair(held):
            x, y = held
            return pair(x, y, self._form.size, self.as_own)
        if self._unpack is not None and not is_frame(held):
            check_loader(held, role)
            return Unpacked(held, self._unpack, self._form.ids)
        found: Iterable[object] = held
        return found

    def as_loader(self, loader: Iterable[object]) -> Iterable[object]:
        """Rows or batches of any kind that the class takes, as batches."""
        if isinstance(loader, Labelled):
            return replace(self._rows, target=loader.target).batches(loader.frame, self._models.own)
        return self._rows.batches(loader, self._models.own)

    def token_scores(self, x_test: object, y_test: object, x: object = None, y: object = None) -> torch.Tensor:
        """What each label of a train row adds to the row's score: (N_test, N_train, T), as `influences` otherwise.

        The sum over T is the row's score, to rounding. T is that of the train rows as given; a number stands at its
        label's own position, and is zero where there is no label (-100, padding, a language model's first token).
        One factor of the size of the model is kept for each test row.
        Errors: InvalidSetting for a method that changes a row's gradient as a whole; UnsupportedModel where a row has
        one label; as `influences`.
        """
        _, _, test, train = self._asked(x_test, y_test, x, y, "up")
        given = x_test if x is None else x
        mask = given.get(MASK) if isinstance(given, Mapping) else None
        return put_back(self._token_scores(test, train), None if mask is None else torch.as_tensor(mask))

    def _token_scores(self, test: TorchBatch, train: TorchBatch) -> torch.Tensor:
        """Of batches in canonical form, whose positions T are."""
        mapper, provider = self.ready(), self._models.own
        with self._recorded():
            factors: Any = mapper.transformed_grads(test)
        first = provider.grads(train.take(slice(0, 1)))
        seen_whole = all(mapper.operators[n].seen(g) is g for n, g in first.items())
        if self.provider is not provider or mapper.own_forms or not seen_whole:
            raise InvalidSetting(
                f"{self.method.describe()} sees a train row as something else than the sum of its labels' gradients, "
                "or there are several models; token scores need a method that adds up."
            )
        step = provider.rows_at_once(train)
        pieces = [
            provider.token_prod(train.take(slice(start, start + step)), factors) for start in range(0, len(train), step)
        ]
        width = train.y.shape[1]
        padded = [nn.functional.pad(piece, (0, width - piece.shape[2])) for piece in pieces]
        return torch.cat(padded, dim=1)

    # Texts, for pages -------------------------------------------------------------------------------------------------

    def tokens_of(self, batch: Any) -> list[np.ndarray] | None:
        x = self._models.own.canonical(batch).x
        ids = x.get(IDS) if isinstance(x, Mapping) else None
        if self._rows.tokenizer is None or ids is None:
            return None
        values, ends = ids.cpu().numpy(), lengths(x)
        counts = [values.shape[1]] * len(values) if ends is None else ends.tolist()
        return [row[:count] for row, count in zip(values, counts, strict=True)]

    def text_of(self, tokens: np.ndarray) -> Text:
        """Errors: UnsupportedModel without a tokenizer."""
        tokenizer = self._rows.tokenizer
        if tokenizer is None:
            raise UnsupportedModel("There is no tokenizer that makes texts of tokens: give tokenizer=.")
        # Every token is shown, those that mean something to the model alone too.
        return text_of(tokens.tolist(), lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def token_scores_of(self, query: Any, train: Any) -> list[np.ndarray]:
        """As `token_scores`: of an own token that is predicted. Errors: likewise."""
        provider = self._models.own
        train = provider.canonical(train)
        scores = to_numpy(self._token_scores(provider.canonical(query), train)).astype(np.float64)
        ends = lengths(train.x) if isinstance(train.x, Mapping) else None
        counts = [scores.shape[2]] * len(train) if ends is None else ends.tolist()
        return [scores[:, row, :count] for row, count in enumerate(counts)]
