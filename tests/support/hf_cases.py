"""Tiny random pretrained models of each head, rows of unequal length for them, and the slow truth, row by row.

Nothing comes from a hub, and nothing of headwater is used: a row's truth is autograd on that row by itself, without
any padding.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import oracle
import torch
import torch.nn.functional as F  # noqa: N812
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    logging,
)
from transformers.pytorch_utils import Conv1D

logging.set_verbosity_error()

VOCABULARY, LONGEST, ROWS, QUERIES = 11, 6, 7, 3
LENGTHS = (6, 3, 5, 2, 6, 4, 3, 5, 6, 2)


def shake(model: nn.Module, seed: int = 0, size: float = 0.4) -> nn.Module:
    """Float64, eval mode, and parameters that are none of the initial zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.mean().round() + size * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


class ExactRMSNorm(nn.Module):
    """Llama's, which normalises in float32, in float64."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def replace_modules(model: nn.Module, kind: str, make: Callable[[Any], nn.Module]) -> nn.Module:
    """The model with every module whose class has this name replaced."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ == kind:
            owner, _, own = name.rpartition(".")
            setattr(model.get_submodule(owner), own, make(module))
    return model


def as_linear(layer: Conv1D) -> nn.Linear:
    """The same map with its weight the usual way round."""
    linear = nn.Linear(layer.nx, layer.nf, dtype=layer.weight.dtype)
    linear.load_state_dict({"weight": layer.weight.T, "bias": layer.bias})
    return linear.eval()


def gpt2_config(**options: Any) -> GPT2Config:
    sizes = {"n_positions": LONGEST, "n_embd": 4, "n_layer": 1, "n_head": 2, "n_inner": 5}
    return GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **{**sizes, **options})


def gpt2(**options: Any) -> GPT2LMHeadModel:
    return shake(GPT2LMHeadModel(gpt2_config(**options)), seed=1)


def llama(exact: bool = True) -> LlamaForCausalLM:
    """Two query heads share a key head; head and table are not tied."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=4,
        intermediate_size=5,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=LONGEST,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model = replace_modules(model, "LlamaRMSNorm", lambda old: ExactRMSNorm(len(old.weight))) if exact else model
    return shake(model, seed=2)


def bert_config(labels: int, **options: Any) -> BertConfig:
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 5}
    return BertConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=LONGEST,
        num_labels=labels,
        pad_token_id=0,
        **{**sizes, **options},
    )


def lora_gpt2() -> nn.Module:
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, lora_dropout=0.1)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning
        )  # peft asks for it
        model = get_peft_model(gpt2(), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2)
    return model.eval()


def token_mean(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[1, t, classes] and [1, t] to the mean over labels."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def next_token_mean(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return token_mean(logits[:, :-1], labels[:, 1:])


class Logits(nn.Module):
    """A model that gives its logits alone."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self.model(**inputs).logits


@dataclass
class HfCase:
    """A model; rows padded on the right, x with its mask and y; and the loss of a row by itself."""

    model: nn.Module
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    x: dict[str, torch.Tensor]
    y: torch.Tensor
    labels_of_tokens: bool
    fishers: tuple[str, ...] = ("sampled", "empirical")
    cache: dict[Any, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = oracle.trainable(self.model)

    def rows(self, index: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        index = torch.as_tensor(list(index))
        return {name: column[index] for name, column in self.x.items()}, self.y[index]

    def alone(self, k: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Row k without padding and without a mask."""
        length = LENGTHS[k]
        x = {name: column[k : k + 1, :length] for name, column in self.x.items() if name != "attention_mask"}
        return x, self.y[k : k + 1, :length] if self.labels_of_tokens else self.y[k : k + 1]

    def grads(self) -> np.ndarray:
        """[n + q, D]."""
        if "grads" not in self.cache:
            leaves = oracle.parameters(self.model, self.names)
            found = []
            for k in range(len(self.y)):
                x, y = self.alone(k)
                found.append(oracle.gradient(self.loss(self.model(**x).logits, y), leaves).numpy())
            self.cache["grads"] = np.stack(found)
        return self.cache["grads"]

    def curvature(self, kind: str) -> np.ndarray:
        """Of the mean loss of the train rows: [D, D]."""
        if kind not in self.cache:
            names = [f"model.{name}" for name in self.names]
            compute = {"hessian": oracle.hessian, "ggn": oracle.ggn}[kind]
            each = [compute(Logits(self.model), self.loss, *self.alone(k), names) for k in range(ROWS)]
            self.cache[kind] = np.mean(each, axis=0)
        return self.cache[kind]


def tokens(seed: int, lowest: int = 1) -> dict[str, torch.Tensor]:
    """Ids and mask of all rows, padded with zeros on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(lowest, VOCABULARY, (len(LENGTHS), LONGEST), generator=generator)
    mask = (torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def language_case(model: nn.Module, seed: int) -> HfCase:
    x = tokens(seed)
    y = x["input_ids"].masked_fill(x["attention_mask"] == 0, -100)
    y[0, :3] = -100  # a prompt
    return HfCase(model, next_token_mean, x, y, labels_of_tokens=True)


def bert_tokens() -> HfCase:
    x = tokens(4)
    y = torch.randint(0, 3, x["input_ids"].shape, generator=torch.Generator().manual_seed(5))
    y = y.masked_fill(x["attention_mask"] == 0, -100)
    y[:, 0] = -100
    return HfCase(shake(BertForTokenClassification(bert_config(3)), seed=4), token_mean, x, y, labels_of_tokens=True)


def bert_sequence() -> HfCase:
    x = tokens(6)
    x["token_type_ids"] = (torch.arange(LONGEST) > 2).long().expand(len(LENGTHS), -1) * x["attention_mask"]
    y = torch.tensor([0, 2, 1, 1, 0, 2, 2, 1, 0, 2])
    model = shake(BertForSequenceClassification(bert_config(3)), seed=5)
    return HfCase(model, F.cross_entropy, x, y, False, fishers=("exact", "sampled", "empirical"))


def bert_regression() -> HfCase:
    y = torch.linspace(-1, 1, len(LENGTHS), dtype=torch.float64)
    model = shake(BertForSequenceClassification(bert_config(1)), seed=6)
    return HfCase(
        model, lambda out, y: F.mse_loss(out[:, 0], y), tokens(7), y, False, fishers=("exact", "sampled", "empirical")
    )


def bert_several_labels() -> HfCase:
    y = torch.randint(0, 2, (len(LENGTHS), 3), generator=torch.Generator().manual_seed(8)).double()
    config = bert_config(3, problem_type="multi_label_classification")
    model = shake(BertForSequenceClassification(config), seed=7)
    return HfCase(
        model, F.binary_cross_entropy_with_logits, tokens(9), y, False, fishers=("exact", "sampled", "empirical")
    )


MAKERS: dict[str, Callable[[], HfCase]] = {
    "gpt2": lambda: language_case(gpt2(), 1),
    "llama": lambda: language_case(llama(), 2),
    "lora": lambda: language_case(lora_gpt2(), 3),
    "bert tokens": bert_tokens,
    "bert sequence": bert_sequence,
    "bert regression": bert_regression,
    "bert several labels": bert_several_labels,
}


@cache
def case_of(name: str) -> HfCase:
    return MAKERS[name]()


def padded_left(columns: dict[str, torch.Tensor], y: torch.Tensor, extra: int) -> tuple[dict[str, torch.Tensor], Any]:
    """The same rows with their padding on the left, and more of it."""

    def move(column: torch.Tensor, filling: int) -> torch.Tensor:
        out = column.new_full((len(column), column.shape[1] + extra), filling)
        for k, length in enumerate(columns["attention_mask"].sum(1).tolist()):
            out[k, out.shape[1] - length :] = column[k, :length]
        return out

    moved = {name: move(column, 7 if name == "input_ids" else 0) for name, column in columns.items()}
    return moved, move(y, -100) if y.ndim == 2 and y.shape == columns["input_ids"].shape else y


def damped_scores(curvature: np.ndarray, queries: np.ndarray, train: np.ndarray, factor: float) -> np.ndarray:
    damping = factor * np.trace(curvature) / len(curvature)
    return oracle.damped_solve(curvature, damping, queries) @ train.T


def is_close(got: Any, expected: Any, tolerance: float = 1e-10) -> bool:
    got, expected = (np.asarray(v.detach() if hasattr(v, "detach") else v, dtype=float) for v in (got, expected))
    size = max(float(np.abs(expected).max()), math.ulp(1.0))
    return got.shape == expected.shape and float(np.abs(got - expected).max()) <= tolerance * size
