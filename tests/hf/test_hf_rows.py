"""What users have as rows: dicts, data sets, collators, strings; token scores; and what is refused, with a reason."""

import importlib.util

import numpy as np
import oracle
import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict
from hf_cases import (
    LENGTHS,
    QUERIES,
    ROWS,
    VOCABULARY,
    bert_config,
    case_of,
    gpt2,
    gpt2_config,
    is_close,
    padded_left,
    shake,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
)

import headwater as hw
from headwater.errors import InvalidInput, InvalidSetting, UnsupportedModel
from headwater.hf import HfComposableInfluence, HfGradientProvider
from headwater.torch import TorchBatch

WORDS = ["[pad]", "[unk]", "the", "cat", "dog", "sat", "ran", "home", "and", "slept", "."]
TEXTS = ["the cat sat .", "the dog ran home .", "cat and dog slept", "the dog sat", "home .", "the cat ran and slept"]


def tokenizer():
    words = Tokenizer(WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="[unk]"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[pad]", unk_token="[unk]")


def influence_of(name, method=None, **options):
    return HfComposableInfluence(case_of(name).model, method or hw.GradDot(), **options)


def scores(influence, train, query):
    return influence.fit(train).attribute(train, query).values


def plain_rows(name):
    """The case's rows as dicts of lists, without padding, masks or anything of ours."""
    case = case_of(name)
    return [
        {key: column[0].tolist() for key, column in x.items()} | {"labels": y[0].tolist()}
        for x, y in map(case.alone, range(len(case.y)))
    ]


# Loaders --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "bert tokens", "bert sequence"])
def test_rows_come_as_anything(name):
    case, rows = case_of(name), plain_rows(name)
    train, query = case.rows(range(ROWS)), case.rows(range(ROWS, ROWS + QUERIES))
    expected = scores(influence_of(name), [train], [query])
    batches = [{**train[0], "labels": train[1]}]
    collators = {
        "gpt2": DataCollatorForTokenClassification(tokenizer()),
        "bert tokens": DataCollatorForTokenClassification(tokenizer()),
        "bert sequence": DataCollatorWithPadding(tokenizer()),
    }
    given = {
        "a list of dicts of columns": (influence_of(name), batches),
        "a list of rows": (influence_of(name, batch_size=3), rows[:ROWS]),
        "a data set": (influence_of(name, batch_size=4), Dataset.from_list(rows[:ROWS])),
        "a data set of tensors": (influence_of(name), Dataset.from_list(rows[:ROWS]).with_format("torch")),
        "a collator": (influence_of(name, collator=collators[name], batch_size=3), Dataset.from_list(rows[:ROWS])),
        "a DataLoader": (
            influence_of(name),
            DataLoader(Dataset.from_list(rows[:ROWS]), batch_size=3, collate_fn=collators[name]),
        ),
        "batches of ours": (influence_of(name), [TorchBatch(*train)]),
    }
    for what, (influence, loader) in given.items():
        assert is_close(scores(influence, loader, [query]), expected), what


def test_strings_are_rows_with_a_tokenizer():
    influence = influence_of("gpt2", tokenizer=tokenizer(), batch_size=4)
    rows = [{"input_ids": tokenizer()(text)["input_ids"]} for text in TEXTS]
    expected = scores(influence_of("gpt2"), rows, rows[:2])
    assert is_close(scores(influence, TEXTS, TEXTS[:2]), expected)
    assert is_close(scores(influence, Dataset.from_dict({"text": TEXTS}), TEXTS[:2]), expected)
    collator = DataCollatorForLanguageModeling(tokenizer(), mlm=False)
    collated = influence_of("gpt2", tokenizer=tokenizer(), collator=collator)
    assert is_close(scores(collated, TEXTS, TEXTS[:2]), expected)


def test_labels_of_whole_rows_have_the_names_that_data_sets_give_them():
    case, rows = case_of("bert sequence"), plain_rows("bert sequence")
    renamed = [{("label" if key == "labels" else key): value for key, value in row.items()} for row in rows]
    plain, collated = (
        influence_of("bert sequence"),
        influence_of("bert sequence", collator=DataCollatorWithPadding(tokenizer())),
    )
    expected = scores(plain, [case.rows(range(10))], rows[:2])
    extra = Dataset.from_list(renamed).add_column("text", ["never read"] * len(rows))
    assert is_close(scores(plain, extra, renamed[:2]), expected)
    assert is_close(scores(collated, extra, rows[:2]), expected)


def test_a_tensor_of_ids_and_arrays_of_numpy_are_inputs_too():
    ids = torch.randint(0, VOCABULARY, (4, 5), generator=torch.Generator().manual_seed(0))
    influence = influence_of("gpt2").fit([(ids, ids)])
    expected = influence.influences({"input_ids": ids}, ids)
    assert is_close(influence.influences(ids, ids), expected)
    assert is_close(influence.influences({"input_ids": ids.numpy()}, ids.numpy()), expected)


def test_runs_can_be_stored_and_continued(tmp_path):
    influence, rows = influence_of("gpt2", batch_size=3), plain_rows("gpt2")
    influence.fit(rows[:ROWS])
    first = influence.attribute(rows[:ROWS], rows[ROWS:], store=tmp_path / "scores").values
    again = influence.attribute(rows[:ROWS], rows[ROWS:], store=tmp_path / "scores").values
    assert np.array_equal(first, again)
    assert is_close(influence.top(rows[:ROWS], rows[ROWS:], 2).helpful_scores[:, 0], first.max(1))
    assert is_close(influence.self_influence(rows[:ROWS]), np.diag(scores(influence, rows[:ROWS], rows[:ROWS])))


# Random draws ---------------------------------------------------------------------------------------------------------


def test_sampled_labels_do_not_depend_on_padding():
    case = case_of("gpt2")
    provider = HfGradientProvider(case.model)
    plain, left = provider.as_batch(case.x, case.y), provider.as_batch(*padded_left(case.x, case.y, extra=3))
    first, second = (provider.fisher_grads(batch, "sampled", seed=3)[0]["full"].flat() for batch in (plain, left))
    assert is_close(second, first)
    alone = provider.fisher_grads(provider.as_batch(*case.alone(3)), "sampled", seed=3)[0]["full"].flat()
    assert is_close(alone[0], first[3])


def test_keys_are_of_tokens_and_labels_and_not_of_padding():
    case = case_of("gpt2")
    provider = HfGradientProvider(case.model)
    keys = provider.row_keys(provider.as_batch(case.x, case.y))
    assert len(set(keys.tolist())) == len(case.y)
    assert np.array_equal(provider.row_keys(provider.as_batch(*padded_left(case.x, case.y, extra=1))), keys)
    other = case.y.clone()
    other[1, 1] = -100
    changed = provider.row_keys(provider.as_batch(case.x, other)) != keys
    assert changed.tolist() == [k == 1 for k in range(len(case.y))]
    weighted = TorchBatch(case.x, case.y, weights=torch.arange(1.0, 11.0))
    assert (provider.content_keys(weighted) != provider.content_keys(TorchBatch(case.x, case.y))).all()


# Token scores ---------------------------------------------------------------------------------------------------------


def slow_token_grads(case, k):
    """The gradient of each label's share of the loss of row k: [t, D]."""
    x, y = case.alone(k)
    leaves, found = oracle.parameters(case.model, case.names), []
    counted = int((y[:, 1:] != -100).sum()) if case.loss.__name__ == "next_token_mean" else int((y != -100).sum())
    for t in range(y.shape[1]):
        one = torch.full_like(y, -100)
        one[0, t] = y[0, t]
        first = case.loss.__name__ == "next_token_mean" and t == 0
        if int(y[0, t]) == -100 or first:
            found.append(np.zeros(sum(leaf.numel() for leaf in leaves)))
        else:
            found.append((oracle.gradient(case.loss(case.model(**x).logits, one), leaves) / counted).numpy())
    return np.stack(found)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert tokens", "lora"])
@pytest.mark.parametrize("method", [hw.GradDot(), hw.Ekfac(), hw.LoGra(dimension=2)], ids=lambda m: type(m).__name__)
def test_token_scores_are_those_of_each_labels_own_loss(name, method):
    case = case_of(name)
    train, query = case.rows(range(ROWS)), case.rows(range(ROWS, ROWS + QUERIES))
    influence = influence_of(name, method, blocks="full").fit([train])
    got = influence.token_scores(*query, *train)
    assert got.shape == (QUERIES, *train[1].shape)
    assert is_close(got.sum(2), influence.influences(*query, *train))
    factors = influence.influence_factors(*query).numpy()
    for k in range(ROWS):
        assert is_close(got[:, k, : LENGTHS[k]], factors @ slow_token_grads(case, k).T)
        assert not got[:, k, LENGTHS[k] :].any()


def test_token_scores_stand_where_the_labels_do_whatever_the_padding():
    case = case_of("gpt2")
    train, query = case.rows(range(ROWS)), case.rows(range(ROWS, ROWS + QUERIES))
    influence = influence_of("gpt2").fit([train])
    left = padded_left(*train, extra=2)
    got, expected = influence.token_scores(*query, *left), influence.token_scores(*query, *train)
    for k in range(ROWS):
        assert is_close(got[:, k, -LENGTHS[k] :], expected[:, k, : LENGTHS[k]])
        assert not got[:, k, : -LENGTHS[k]].any()
    with hw.working_memory(1):
        assert is_close(influence.token_scores(*query, *train), expected)
    assert is_close(influence.token_scores(*train), influence.token_scores(*train, *train))


class OneWay(torch.autograd.Function):
    """Attention of a kind that has no forward-mode derivative: the identity."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g


def test_products_and_token_scores_do_without_forward_mode_derivatives():
    class Fused(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return OneWay.apply(self.inner(x))

    case, model = case_of("gpt2"), gpt2()
    block = model.transformer.h[0]
    block.mlp.act = Fused(block.mlp.act)
    train, query = case.rows(range(ROWS)), case.rows(range(ROWS, ROWS + QUERIES))
    expected, got = (
        HfComposableInfluence(m, hw.Direct(), damping=hw.relative(0.2)).fit([train]) for m in (case.model, model)
    )
    assert is_close(got.influences(*query, *train), expected.influences(*query, *train))
    assert is_close(got.token_scores(*query, *train), expected.token_scores(*query, *train))


def test_token_scores_that_would_not_add_up_are_refused():
    case = case_of("gpt2")
    for method in (hw.GradCos(), hw.LoRif(dimension=3)):
        influence = influence_of("gpt2", method, blocks="full").fit([(case.x, case.y)])
        with pytest.raises(InvalidSetting, match="token scores"):
            influence.token_scores(case.x, case.y)
    whole = case_of("bert sequence")
    influence = influence_of("bert sequence").fit([(whole.x, whole.y)])
    with pytest.raises(UnsupportedModel, match="one label"):
        influence.token_scores(whole.x, whole.y)


# What is refused, and why ---------------------------------------------------------------------------------------------


def test_padding_without_a_mask_is_refused():
    case = case_of("llama")  # its padding token is 0
    influence = influence_of("llama")
    with pytest.raises(InvalidInput, match=r"padding token \(0\).*no attention_mask.*input_ids != 0"):
        influence.fit([({"input_ids": case.x["input_ids"]}, case.y)])
    ones = torch.ones_like(case.x["input_ids"])
    influence.fit([({"input_ids": case.x["input_ids"], "attention_mask": ones}, case.y)])


def test_labels_at_padding_are_refused():
    case = case_of("gpt2")
    with pytest.raises(InvalidInput, match=r"Row 1 has labels at its padding.*masked_fill"):
        influence_of("gpt2").fit([(case.x, case.x["input_ids"])])


@pytest.mark.parametrize(
    ("name", "labels", "said"),
    [
        ("gpt2", lambda y: y.double(), "whole numbers"),
        ("gpt2", lambda y: y[:, :-1], r"\(10, 6\)"),
        ("gpt2", lambda y: torch.where(y > 2, 11, y), "label 11"),
        ("bert tokens", lambda y: torch.where(y == 2, 3, y), "from 0 to 2"),
        ("bert sequence", lambda y: y.double(), "multi_label_classification"),
        ("bert sequence", lambda y: y + 1, "label 3"),
        ("bert several labels", lambda y: y[:, :2], r"\(10, 3\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(name, labels, said):
    case = case_of(name)
    with pytest.raises(InvalidInput, match=said):
        influence_of(name).fit([(case.x, labels(case.y))])


def test_missing_and_doubled_labels_are_refused():
    case = case_of("bert sequence")
    with pytest.raises(InvalidInput, match="no labels"):
        influence_of("bert sequence").fit([case.x])
    with pytest.raises(InvalidInput, match="given twice"):
        influence_of("bert sequence").fit([({**case.x, "labels": case.y}, case.y)])


def test_a_row_without_tokens_or_labels_is_refused():
    case = case_of("gpt2")
    empty = case.x["attention_mask"].clone()
    empty[4] = 0
    with pytest.raises(InvalidInput, match="Row 4 has no token"):
        influence_of("gpt2").fit([({**case.x, "attention_mask": empty}, None)])
    with pytest.raises(ValueError, match="without any target"):
        unlabelled = [(case.x, torch.full_like(case.y, -100))]
        influence_of("gpt2").fit(unlabelled).self_influence(unlabelled)


def test_a_name_is_no_model():
    with pytest.raises(InvalidInput, match=r"load it first.*from_pretrained\('gpt2'\).*local_files_only"):
        HfComposableInfluence("gpt2", hw.GradDot())
    with pytest.raises(InvalidInput, match=r"Linear.*headwater\.torch"):
        HfComposableInfluence(nn.Linear(2, 2), hw.GradDot())


def test_other_heads_are_refused_and_a_task_can_be_given():
    model = shake(BertForMaskedLM(bert_config(3)))
    with pytest.raises(InvalidSetting, match=r"BertForMaskedLM.*causal-lm"):
        HfComposableInfluence(model, hw.GradDot())
    with pytest.raises(InvalidSetting, match="'summarise'"):
        HfComposableInfluence(model, hw.GradDot(), task="summarise")
    case = case_of("bert tokens")
    y = case.x["input_ids"].masked_fill(case.x["attention_mask"] == 0, -100)
    model.config.num_labels = VOCABULARY
    HfComposableInfluence(model, hw.GradDot(), task="token-classification").fit([(case.x, y)])


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(InvalidSetting, match="per_token is 'median'"):
        influence_of("gpt2", per_token="median")
    with pytest.raises(InvalidSetting, match="batch_size is 0"):
        influence_of("gpt2", batch_size=0)


def test_collections_that_are_no_rows_are_refused():
    influence, rows = influence_of("gpt2"), plain_rows("gpt2")
    with pytest.raises(InvalidInput, match="tokenizer="):
        influence.fit(["the cat"])
    with pytest.raises(InvalidInput, match="list of strings"):
        influence.fit("the cat")
    with pytest.raises(InvalidInput, match="choose one"):
        influence.fit(DatasetDict(train=Dataset.from_list(rows)))
    with pytest.raises(InvalidInput, match=r"one batch: pass \[it\]"):
        influence.fit({"input_ids": [[1, 2]]})
    with pytest.raises(InvalidInput, match="read only once"):
        influence.fit(iter(rows))
    with pytest.raises(InvalidInput, match="no input_ids"):
        influence.fit([{"words": [1, 2]}])
    with pytest.raises(InvalidInput, match="Strings are made tokens of in loaders"):
        influence.fit([(["the cat"], torch.zeros(1))])


def test_a_margin_of_several_labels_is_refused():
    with pytest.raises(UnsupportedModel, match="output='loss'"):
        influence_of("gpt2", hw.Trak())
    numbers = shake(BertForSequenceClassification(bert_config(2, problem_type="regression")))
    with pytest.raises(UnsupportedModel, match="output='loss'"):
        HfComposableInfluence(numbers, hw.Trak())
    case = case_of("bert sequence")
    influence_of("bert sequence", hw.Trak(dimension=8)).fit([(case.x, case.y)])


def test_several_labels_follow_the_models_configuration():
    model = BertForSequenceClassification(bert_config(2, problem_type="regression"))
    case = case_of("bert sequence")
    provider = HfGradientProvider(shake(model))
    y = torch.randn(len(case.y), 2, dtype=torch.float64)
    batch = provider.as_batch(case.x, y)
    with torch.no_grad():
        expected = [float(((model(**case.alone(k)[0]).logits - y[k]) ** 2).mean()) for k in range(len(y))]
    assert is_close(provider.losses(batch), expected)


def test_importing_the_room_needs_transformers_alone():
    assert importlib.util.find_spec("headwater.hf") is not None
    import headwater.hf as package

    assert set(package.__all__) == {name for name in vars(package) if name in package.__all__}


def test_what_stands_at_padding_has_no_part_in_a_classifier_that_looks_for_it():
    """GPT-2's classifier reads at the last id that is not the padding's: masked ids of another kind must not count."""
    model = GPT2ForSequenceClassification(gpt2_config(num_labels=2, pad_token_id=0)).double().eval()
    ids, labels = torch.tensor([[3, 4, 5, 2], [2, 5, 0, 0]]), torch.tensor([0, 1])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    provider = HfGradientProvider(model)
    expected = provider.flat_grads(TorchBatch({"input_ids": ids, "attention_mask": mask}, labels))
    other = ids.masked_fill(mask == 0, 4)
    assert is_close(provider.flat_grads(TorchBatch({"input_ids": other, "attention_mask": mask}, labels)), expected)
    alone = provider.flat_grads(TorchBatch({"input_ids": ids[1:, :2], "attention_mask": mask[1:, :2]}, labels[1:]))
    assert is_close(alone[0], expected[1])


def test_columns_and_ids_that_do_not_fit_are_named():
    provider = HfGradientProvider(gpt2())
    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(InvalidInput, match=f"Row 1 has the id {VOCABULARY}"):
        provider.flat_grads(TorchBatch({"input_ids": torch.stack([ids[0], ids[0] * VOCABULARY])}, None))
    with pytest.raises(InvalidInput, match="'labels' holds no tensor"):
        provider.flat_grads(TorchBatch({"input_ids": ids}, ["a", "b"]))
    with_text = {"input_ids": ids.tolist(), "text": ["one", "two"], "idx": torch.arange(2)}
    assert is_close(provider.flat_grads(provider.as_batch(with_text, None)), provider.flat_grads(TorchBatch(ids, ids)))
    without = GPT2ForSequenceClassification(gpt2_config(num_labels=2, pad_token_id=None)).double().eval()
    with pytest.raises(InvalidSetting, match="pad_token_id"):
        HfGradientProvider(without).flat_grads(TorchBatch({"input_ids": ids}, torch.tensor([0, 1])))


# Tables, pairs and ids ------------------------------------------------------------------------------------------------


def named_rows():
    """Rows of the sequence classifier, with names and another column of labels."""
    rows = plain_rows("bert sequence")
    return [{**row, "kind": row["labels"], "name": f"row {k}"} for k, row in enumerate(rows)]


def test_a_column_of_ids_names_the_rows_and_does_not_reach_the_model():
    case, rows = case_of("bert sequence"), named_rows()
    train, query = rows[:ROWS], rows[ROWS:]
    names, asked = [row["name"] for row in train], [row["name"] for row in query]
    expected = scores(influence_of("bert sequence"), [case.rows(range(ROWS))], query)
    unlabelled = [{name: v for name, v in row.items() if name != "labels"} for row in train]
    batch = {**case.rows(range(ROWS))[0], "kind": case.y[:ROWS], "name": names}
    frame = pd.DataFrame(unlabelled)
    for held in (unlabelled, Dataset.from_list(unlabelled), frame, [batch]):
        influence = influence_of("bert sequence", ids="name", target="kind", batch_size=3)
        found = influence.fit(held).attribute(held, query)
        assert is_close(found.values, expected)
        assert found.train_ids.tolist() == names and found.query_ids.tolist() == asked
        assert influence.top(held, query, 2).helpful_ids[0, 0] == names[int(found.values[0].argmax())]
    for column in ("name", "kind"):
        missing = [{name: v for name, v in row.items() if name != column} for row in train]
        with pytest.raises(InvalidInput, match=f"no column '{column}', which"):
            influence.fit(missing)
        with pytest.raises(InvalidInput, match=f"no column '{column}', which"):
            influence.fit([{name: v for name, v in batch.items() if name != column}])


def test_frames_and_texts_with_labels_beside_them_are_rows():
    words, labels = tokenizer(), [0, 1, 2, 0, 1, 2]
    rows = [{"input_ids": words(text)["input_ids"], "labels": y} for text, y in zip(TEXTS, labels, strict=True)]
    expected = scores(influence_of("bert sequence"), rows, rows[:2])
    index = [f"text {k}" for k in range(6)]
    frame = pd.DataFrame({"text": TEXTS, "kind": labels}, index=index)
    held = [
        (TEXTS, labels),
        (np.array(TEXTS), torch.tensor(labels)),
        (frame["text"], frame["kind"]),
        (frame[["text"]], frame["kind"]),
        (frame, "kind"),
        frame.rename(columns={"kind": "label"}),
        (frame.reset_index(drop=True), "kind"),
    ]
    for number, given in enumerate(held):
        influence = influence_of("bert sequence", tokenizer=words, batch_size=4)
        found = influence.fit(given).attribute(given, rows[:2])
        assert is_close(found.values, expected)
        assert found.train_ids.tolist() == (index if 2 <= number <= 5 else list(range(6)))


def test_all_rows_at_once_are_cut_into_batches():
    case = case_of("bert sequence")
    x, y = case.rows(range(ROWS))
    expected = scores(influence_of("bert sequence"), [(x, y)], [(x, y)])
    influence = influence_of("bert sequence", batch_size=3)
    for held in ((x, y), ({name: v.numpy() for name, v in x.items()}, y.numpy())):
        assert is_close(influence.fit(held).attribute(held, held).values, expected)
