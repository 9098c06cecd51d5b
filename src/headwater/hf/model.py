"""A pretrained model as a function from tokens to logits, and what it is for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast, get_args, runtime_checkable

import torch
from torch import nn
from transformers import PreTrainedModel

from headwater.errors import InvalidInput, InvalidSetting, UnsupportedModel
from headwater.settings import check_word
from headwater.torch.precision import wide

TaskName = Literal["causal-lm", "sequence-classification", "token-classification"]
Problem = Literal["single_label_classification", "multi_label_classification", "regression"]

ENDINGS: dict[str, TaskName] = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
}
"""How the names of classes end, and the task that says."""


@dataclass(frozen=True)
class Task:
    """What a model's head does."""

    name: TaskName
    classes: int
    """Outputs for each label: the vocabulary, or the number of labels."""
    problem: Problem | None = None
    """Of sequence classification."""
    padding: int | None = None
    """The id of the padding token."""

    @property
    def has_label_per_token(self) -> bool:
        return self.name != "sequence-classification"

    @property
    def ahead(self) -> bool:
        """Whether labels are one position ahead of outputs."""
        return self.name == "causal-lm"


@runtime_checkable
class Adapted(Protocol):
    """A model with adapters, as PEFT makes them, which is not imported for that."""

    peft_config: Mapping[str, Any]

    def get_base_model(self) -> Any: ...


def base_of(model: object) -> PreTrainedModel:
    """The pretrained model, inside its adapters if it has any. Errors: InvalidInput; UnsupportedModel."""
    if isinstance(model, str):
        raise InvalidInput(
            f"model is the name {model!r}; load it first, for example with "
            f"AutoModelForCausalLM.from_pretrained({model!r}). Without a network that needs a local folder, or a copy "
            "in the cache and local_files_only=True."
        )
    base = model.get_base_model() if isinstance(model, Adapted) else model
    if not isinstance(base, PreTrainedModel):
        raise InvalidInput(
            f"model is {type(model).__name__}; expected a transformers.PreTrainedModel, or one with PEFT adapters. For "
            "any other module use headwater.torch."
        )
    if isinstance(model, Adapted) and any(config.is_prompt_learning for config in model.peft_config.values()):
        raise UnsupportedModel(
            f"{type(model).__name__} learns a prompt, which makes its outputs longer than its inputs; only adapters "
            "inside the model, such as LoRA, are attributed."
        )
    return base


def task_of(model: object, name: str | None) -> Task:
    """What the model is for, by its class or as the user says. Errors: InvalidSetting if neither tells."""
    base = base_of(model)
    if name is not None:
        check_word("task", name, get_args(TaskName))
    kind = type(base).__name__
    found = name or next((task for ending, task in ENDINGS.items() if kind.endswith(ending)), None)
    if found is None:
        raise InvalidSetting(
            f"{kind} does not say by its name what it is for; give task= one of {', '.join(get_args(TaskName))}."
        )
    text = base.config.get_text_config()
    padding = getattr(text, "pad_token_id", None)
    if found == "causal-lm":
        return Task("causal-lm", text.vocab_size, padding=padding)
    labels, problem = int(base.config.num_labels or 0), None
    if found == "sequence-classification":
        usual = "regression" if labels == 1 else "single_label_classification"
        problem = cast(Problem, base.config.problem_type or usual)
    return Task(cast(TaskName, found), labels, problem, padding)


def takes(model: object) -> frozenset[str]:
    """The inputs that a model names."""
    return frozenset(inspect.signature(base_of(model).forward).parameters) - {"labels", "kwargs"}


class LogitsOf(nn.Module):
    """A pretrained model that gives its logits alone, without caches; the same parameters under the same names.

    Takes inputs by keyword, or one floating-point tensor of embeddings. Half-precision logits come as float32, so that
    losses are float32 too.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.__dict__["inner"] = (model,)  # no child of its own: names stay as they are
        self._parameters, self._buffers, self._modules = model._parameters, model._buffers, model._modules
        self.training = model.training
        wanted = inspect.signature(base_of(model).forward).parameters
        self.options = {name: value for name, value in (("use_cache", False), ("return_dict", True)) if name in wanted}

    def forward(self, embeddings: torch.Tensor | None = None, **inputs: Any) -> torch.Tensor:
        if embeddings is not None:
            inputs["inputs_embeds"] = embeddings
        (model,) = self.__dict__["inner"]
        try:
            return wide(model(**inputs, **self.options).logits)
        except ValueError as error:
            if "padding token" not in str(error):
                raise
            raise InvalidSetting(f"{error} Set model.config.pad_token_id to the id of your padding.") from None
