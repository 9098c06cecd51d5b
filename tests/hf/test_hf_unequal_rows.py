"""Rows of which only some have a column: the same numbers in every batch, whichever row comes first."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hf_cases import bert_config, shake
from transformers import BertForSequenceClassification, BertForTokenClassification, GPT2Config, GPT2LMHeadModel

import headwater as hw
from headwater.errors import InvalidInput
from headwater.hf import HfComposableInfluence

SIZES = (1, 2, 3)


def gpt2():
    torch.manual_seed(0)
    settings = {"vocab_size": 11, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    return shake(GPT2LMHeadModel(GPT2Config(**settings, bos_token_id=0, eos_token_id=0)))


def by_hand(model, x, y, ahead=1):
    """<g_a, g_b> of rows that are complete, one at a time: the truth. Their library's own loss is in float32."""
    grads = []
    for row, labels in zip(x, y, strict=True):
        model.zero_grad()
        logits = model(**{name: torch.tensor([v]) for name, v in row.items()}).logits[0]
        F.cross_entropy(logits[: len(logits) - ahead], torch.tensor(labels)[ahead:]).backward()
        grads.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
    stacked = torch.stack(grads)
    return (stacked @ stacked.T).numpy()


def dots(model, rows, size, **options):
    influence = HfComposableInfluence(model, hw.GradDot(), batch_size=size, **options).fit(rows)
    return influence.attribute(rows, rows).values


IDS = ([1, 2, 3, 4, 5], [7, 2, 9, 4], [6, 3, 8])
LABELS = ([1, 2, 3, 4, 5], [-100, -100, 9, 4], [6, 3, 8])


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_labels_in_some_rows_of_a_language_model(order):
    rows = [{"input_ids": IDS[k]} | ({"labels": LABELS[k]} if k == 1 else {}) for k in order]
    expected = by_hand(gpt2(), [{"input_ids": IDS[k]} for k in order], [LABELS[k] for k in order])
    for size in SIZES:
        np.testing.assert_allclose(dots(gpt2(), rows, size), expected, rtol=1e-9, atol=1e-12)


def test_masks_labels_of_other_names_and_none_in_some_rows():
    rows = [
        {"input_ids": [*IDS[0], 0], "attention_mask": [1] * 5 + [0]},
        {"input_ids": IDS[1], "label_ids": LABELS[1], "attention_mask": None},
        {"input_ids": IDS[2], "labels": LABELS[2], "position_ids": [0, 1, 2]},
    ]
    expected = by_hand(gpt2(), [{"input_ids": ids} for ids in IDS], LABELS)
    for size in SIZES:
        np.testing.assert_allclose(dots(gpt2(), rows, size), expected, rtol=1e-9, atol=1e-12)


def test_token_types_in_some_rows():
    model = shake(BertForTokenClassification(bert_config(3)), seed=4)
    x = [{"input_ids": ids, "token_type_ids": [0] * len(ids)} for ids in IDS]
    x[1] = {"input_ids": IDS[1], "token_type_ids": [0, 1, 1, 1]}
    y = [[0, 1, 2, 1, 0], [2, 1, -100, 0], [1, 1, 2]]
    expected = by_hand(model, x, y, ahead=0)
    rows = [row | {"labels": labels} for row, labels in zip(x, y, strict=True)]
    del rows[0]["token_type_ids"], rows[2]["token_type_ids"]
    for size in SIZES:
        np.testing.assert_allclose(dots(model, rows, size), expected, rtol=1e-9, atol=1e-12)


def test_a_row_whose_labels_are_all_ignored_is_the_same_in_every_batch():
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in zip(IDS, LABELS, strict=True)]
    rows[1]["labels"] = [-100] * 4

    def outcome(size):
        try:
            return dots(gpt2(), rows, size)
        except InvalidInput as error:
            return type(error).__name__

    found = [outcome(size) for size in SIZES]
    assert all(np.array_equal(f, found[0]) if isinstance(f, str) else np.allclose(f, found[0]) for f in found)


def test_a_column_that_means_nothing_where_it_is_missing_is_refused():
    model = shake(BertForSequenceClassification(bert_config(3)), seed=4)
    rows = [{"input_ids": ids, "label": k} for k, ids in enumerate(IDS)]
    del rows[1]["label"]
    for size in (2, 3):
        with pytest.raises(InvalidInput, match=r"Some rows have label, others have not: row 1 of its batch"):
            dots(model, rows, size)


def test_a_data_set_of_torch_gives_rows():
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, k):
            if k > 2:
                raise IndexError(k)
            return {"input_ids": IDS[k], "labels": LABELS[k]}

    expected = by_hand(gpt2(), [{"input_ids": ids} for ids in IDS], LABELS)
    np.testing.assert_allclose(dots(gpt2(), Rows(), 2), expected, rtol=1e-9, atol=1e-12)
