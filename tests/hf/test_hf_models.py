"""Pretrained models of each head: gradients, curvature and scores are those of each row by itself, without padding."""

import oracle
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hf_cases import (
    MAKERS,
    QUERIES,
    ROWS,
    VOCABULARY,
    as_linear,
    case_of,
    damped_scores,
    gpt2,
    gpt2_config,
    is_close,
    language_case,
    llama,
    lora_gpt2,
    padded_left,
    replace_modules,
    shake,
)
from kept_fits import KeptFits
from models import Case
from torch.utils.checkpoint import checkpoint
from transformers import GPT2LMHeadModel
from truth import Truth

import headwater as hw
from headwater.errors import RowsInteract
from headwater.hf import HfComposableInfluence, HfGradientProvider
from headwater.testing import StructuredProviderContract
from headwater.torch import TorchBatch, TorchGradientProvider

each_case = pytest.mark.parametrize("name", MAKERS)


class ProviderOf(StructuredProviderContract):
    name: str
    blocks: object = "full"
    rows = ROWS

    @property
    def fishers(self):
        return case_of(self.name).fishers

    def array(self, values):
        return torch.as_tensor(values)

    def provider(self):
        return HfGradientProvider(case_of(self.name).model, blocks=self.blocks)

    def batch(self, index):
        return self.provider().as_batch(*case_of(self.name).rows(index))

    def slow_grads(self):
        return case_of(self.name).grads()[:ROWS]

    def slow_mixed_grads(self):
        return None

    def slow_curvature(self, kind):
        return case_of(self.name).curvature(kind) * ROWS


class TestProviderOfGpt2(ProviderOf):
    name, kinds = "gpt2", ("ggn",)


@pytest.mark.slow
class TestHessianOfGpt2(ProviderOf):
    name, kinds = "gpt2", ("hessian",)


class TestProviderOfLlama(ProviderOf):
    name, blocks, kinds = "llama", "layer", ("ggn",)


class TestProviderOfLora(ProviderOf):
    name, blocks = "lora", "layer"


class TestProviderOfBertSequence(ProviderOf):
    name, kinds = "bert sequence", ("ggn",)


class InfluenceOf(KeptFits):
    name: str
    method: object
    modes = ("up",)

    def array(self, values):
        return torch.as_tensor(values)

    def influence(self, damping=None):
        return HfComposableInfluence(case_of(self.name).model, self.method, blocks="full", damping=damping)

    def train(self):
        return case_of(self.name).rows(range(ROWS))

    def queries(self):
        return case_of(self.name).rows(range(ROWS, ROWS + QUERIES))


class TestInfluenceOfGpt2(InfluenceOf):
    name, method = "gpt2", hw.Ekfac()


# Every head -----------------------------------------------------------------------------------------------------------


@each_case
def test_gradients_are_those_of_each_row_by_itself(name):
    case = case_of(name)
    provider = HfGradientProvider(case.model)
    assert is_close(provider.flat_grads(provider.as_batch(case.x, case.y)), case.grads())


@each_case
def test_every_layer_keeps_its_structure(name):
    case = case_of(name)
    provider = HfGradientProvider(case.model)
    provider.grads(provider.as_batch(case.x, case.y))
    assert provider._plan.plain == ()


@each_case
def test_scores_equal_the_dense_formula(name):
    case = case_of(name)
    influence = HfComposableInfluence(case.model, hw.Direct(), blocks="full", damping=hw.relative(0.3), batch_size=3)
    train, query = case.rows(range(ROWS)), case.rows(range(ROWS, ROWS + QUERIES))
    got = influence.fit([train]).influences(*query, *train)
    grads = case.grads()
    assert is_close(got, damped_scores(case.curvature("ggn"), grads[ROWS:], grads[:ROWS], 0.3), 1e-8)


def in_turn():
    """All; the fast ones: each method with GPT-2, and each other model with one method."""
    for k, name in enumerate(MAKERS):
        for turn, method in enumerate((hw.Ekfac(), hw.LoGra(dimension=3), hw.GradCos())):
            fast = k == 0 or (k + turn) % 3 == 0
            yield pytest.param(
                name, method, id=f"{type(method).__name__}-{name}", marks=() if fast else pytest.mark.slow
            )


@pytest.mark.parametrize(("name", "method"), list(in_turn()))
def test_scores_do_not_depend_on_padding(name, method):
    case = case_of(name)
    train, query = case.rows(range(ROWS)), case.rows(range(ROWS, ROWS + QUERIES))
    influence = HfComposableInfluence(case.model, method)
    expected = influence.fit([train]).influences(*query, *train)
    singles = [case.rows([k]) for k in range(ROWS)]
    assert is_close(influence.fit(singles).influences(*query, *train), expected)
    left = padded_left(*train, extra=2)
    if name != "bert sequence" or "token_type_ids" in left[0]:
        assert is_close(influence.fit([left]).influences(*padded_left(*query, extra=1), *left), expected)


def test_the_sum_over_tokens_is_the_mean_times_their_number():
    case = case_of("gpt2")
    mean, total = (HfGradientProvider(case.model, per_token=how) for how in ("mean", "sum"))
    labels = (case.y[:, 1:] != -100).sum(1)
    got = total.flat_grads(total.as_batch(case.x, case.y))
    assert is_close(got, mean.flat_grads(mean.as_batch(case.x, case.y)) * labels[:, None])
    assert (mean.normalisation, total.normalisation) == ("mean per token", "sum per token")


def test_labels_of_a_language_model_are_its_tokens_if_none_are_given():
    case = language_case(gpt2(), 11)
    y = case.x["input_ids"].masked_fill(case.x["attention_mask"] == 0, -100)
    provider = HfGradientProvider(case.model)
    got, expected = (provider.flat_grads(provider.as_batch(case.x, labels)) for labels in (None, y))
    assert is_close(got, expected)


def test_losses_are_those_of_the_model():
    for name in MAKERS:
        case = case_of(name)
        provider = HfGradientProvider(case.model)
        got = provider.losses(provider.as_batch(case.x, case.y))
        own = []
        for k in range(len(case.y)):
            x, y = case.alone(k)
            own.append(float(case.model(**x, labels=y).loss.detach()))
        assert is_close(got, own, 1e-5), name  # the models compute their losses in float32


def test_embeddings_as_inputs_can_be_perturbed():
    case = case_of("gpt2")
    ids = case.x["input_ids"][case.x["attention_mask"].all(1)]
    x, y = case.model.get_input_embeddings()(ids).detach(), ids
    provider = HfGradientProvider(case.model, blocks={"head": ["transformer.h.0.mlp"]})
    expected = provider.flat_grads(provider.as_batch({"input_ids": ids}, y))
    assert is_close(provider.flat_grads(provider.as_batch(x, y)), expected)
    factors = {"head": torch.randn(2, provider.n_parameters, dtype=torch.float64)}
    mixed = provider.flat_mixed_grads(provider.as_batch(x, y))
    got = provider.mixed_prod(provider.as_batch(x, y), factors)
    assert is_close(got, torch.einsum("kd,n...d->kn...", factors["head"], mixed))


# Layers ---------------------------------------------------------------------------------------------------------------


class Bare(GPT2LMHeadModel):
    """GPT-2 with plain logits, one for each label but the first."""

    def forward(self, input_ids):
        return super().forward(input_ids=input_ids, use_cache=False).logits[:, :-1]


def of_equal_length(seed):
    ids = torch.randint(0, VOCABULARY, (14, 5), generator=torch.Generator().manual_seed(seed))
    return ids[:11], ids[11:]


def mean_loss(output, target):
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


@pytest.mark.parametrize(
    ("method", "tied"),
    [
        (hw.Direct(), True),
        (hw.Ekfac(), True),
        pytest.param(hw.Cg(preconditioner=None, tolerance=1e-12), True, marks=pytest.mark.slow),
        (hw.Kfac(), False),
        pytest.param(hw.Kfac(samples=2), False, marks=pytest.mark.slow),
        pytest.param(hw.Ekfac(samples=2), False, marks=pytest.mark.slow),
        (hw.Ekfac(fisher="empirical"), True),
    ],
    ids=str,
)
def test_gpt2_equals_the_dense_formula(method, tied):
    """Tied embeddings with their cross term; for Kronecker factors, against those of plain linear layers."""
    options = {"tie_word_embeddings": tied}
    twin, train, query = replace_modules(gpt2(**options), "Conv1D", as_linear), *of_equal_length(1)
    bare = replace_modules(Bare(gpt2_config(**options)).double().eval(), "Conv1D", as_linear)
    bare.load_state_dict(twin.state_dict())
    truth = Truth(
        Case(
            "gpt2", bare, mean_loss, {"input_ids": train}, train[:, 1:], {"input_ids": query}, query[:, 1:],
            likelihood="cross_entropy",
        )
    )  # fmt: skip
    absolute = truth.absolute(method, "layer", 0.2)
    expected, _ = truth.scores(method, "layer", absolute)
    for model in (twin, gpt2(**options)):
        influence = HfComposableInfluence(model, method, damping=hw.relative(0.2))
        influence.fit([TorchBatch(train, train, ids=torch.arange(len(train)))])
        assert influence.absolute_damping == pytest.approx(absolute, rel=1e-9)
        got = influence.influences_by_block(query, query, train, train)
        assert list(got) == list(expected)
        for block, scores in expected.items():
            assert is_close(got[block], scores, 1e-8), block


@pytest.mark.parametrize("method", [hw.LoGra(dimension=3), hw.Trak(output="loss"), hw.DataInf(), hw.Dual()])
def test_a_conv1d_is_a_linear_layer_for_other_methods_too(method):
    train, query = of_equal_length(2)
    plain, turned = replace_modules(gpt2(), "Conv1D", as_linear), gpt2()
    scores = [
        HfComposableInfluence(model, method, blocks="layer", damping=hw.relative(0.5))
        .fit([(train, train)])
        .influences(query, query, train, train)
        for model in (plain, turned)
    ]
    assert is_close(*scores, 1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_norms_that_compute_in_float32_keep_their_structure(dtype):
    exact, model = case_of("llama"), llama(exact=False).to(dtype)
    provider = HfGradientProvider(model)
    got = provider.flat_grads(provider.as_batch(exact.x, exact.y))
    assert provider._plan.plain == ()
    assert is_close(got, exact.grads(), 1e-4)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_bfloat16_models_are_near_their_float32_selves(make):
    case = language_case(make(), 12)
    coarse = make().to(torch.bfloat16)
    fine = make().to(torch.bfloat16).float()
    half, single = (HfComposableInfluence(m, hw.Ekfac(), damping=hw.relative(1.0)) for m in (coarse, fine))
    for influence in (half, single):
        influence.fit([(case.x, case.y)])
    batch = half.provider.as_batch(case.x, case.y)
    assert half.provider.flat_grads(batch).dtype is torch.float32
    assert half.provider.losses(batch).dtype is torch.float32
    got, expected = (i.influences(case.x, case.y).flatten() for i in (half, single))
    assert float(torch.corrcoef(torch.stack([got, expected]))[0, 1]) > 0.98


# The model is left alone, and in any state it may be in ---------------------------------------------------------------


@pytest.mark.parametrize("make", [gpt2, llama])
def test_gradient_checkpointing_changes_nothing(make):
    case, model = language_case(make(), 13), make()
    for dropout in (m for m in model.modules() if isinstance(m, torch.nn.Dropout)):
        dropout.p = 0.0
    expected = HfGradientProvider(case.model).flat_grads(TorchBatch(case.x, case.y))
    for reentrant in (True, False):
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        provider = HfGradientProvider(model)
        assert is_close(provider.flat_grads(TorchBatch(case.x, case.y)), expected)
        assert model.is_activation_checkpointing and model.training


class Forgetful(torch.nn.Module):
    """Recomputes its first layer, in eval mode too."""

    def __init__(self, reentrant):
        super().__init__()
        self.first, self.second, self.reentrant = torch.nn.Linear(3, 4), torch.nn.Linear(4, 3), reentrant

    def forward(self, x):
        return self.second(checkpoint(lambda t: torch.tanh(self.first(t)), x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_inside_any_module_changes_nothing(reentrant):
    model = shake(Forgetful(reentrant))
    plain = torch.nn.Sequential(model.first, torch.nn.Tanh(), model.second)
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0])
    got, expected = (
        TorchGradientProvider(m, torch.nn.CrossEntropyLoss()).flat_grads(TorchBatch(x, y)) for m in (model, plain)
    )
    assert is_close(got, expected)
    assert float(got[:, :12].norm()) > 0.1


def test_adapters_of_a_checkpointed_model_are_attributed():
    """`enable_input_require_grads` adds hooks that change embeddings as they come."""
    case, model = case_of("lora"), lora_gpt2()
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": False})
    for dropout in (m for m in model.modules() if isinstance(m, torch.nn.Dropout)):
        dropout.p = 0.0
    provider = HfGradientProvider(model.train())
    assert is_close(provider.flat_grads(TorchBatch(case.x, case.y)), case.grads())


def test_only_adapters_are_attributed_and_the_rest_is_counted():
    model = lora_gpt2()
    influence = HfComposableInfluence(model, hw.GradDot())
    adapters = [p.numel() for name, p in model.named_parameters() if "lora_" in name]
    coverage = influence.coverage
    assert coverage.attributed == coverage.trainable == sum(adapters) > 0
    assert coverage.frozen == sum(p.numel() for p in model.parameters()) - sum(adapters)
    assert all("lora_" in name for name in influence.block_names)
    assert influence.model is model


def test_a_merged_and_an_active_adapter_have_the_same_outputs_and_all_parameters_can_be_asked_for():
    model = lora_gpt2()
    for p in model.parameters():
        p.requires_grad_(True)
    case = case_of("lora")
    provider = HfGradientProvider(model)
    got = provider.flat_grads(TorchBatch(case.x, case.y))
    for k in range(len(case.y)):
        x, y = case.alone(k)
        truth = oracle.gradient(case.loss(model(**x).logits, y), [*model.parameters()])
        assert is_close(got[k], truth)


def test_dropout_in_train_mode_is_refused():
    model = gpt2().train()
    provider = HfGradientProvider(model)
    with pytest.raises(RowsInteract, match="eval"):
        provider.flat_grads(TorchBatch(case_of("gpt2").x, case_of("gpt2").y))


def test_the_model_is_left_as_it_was():
    case = case_of("gpt2")
    before = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    config = case.model.config.to_dict()
    influence = HfComposableInfluence(case.model, hw.Ekfac()).fit([(case.x, case.y)])
    influence.influences(case.x, case.y)
    assert all(torch.equal(before[name], tensor) for name, tensor in case.model.state_dict().items())
    assert case.model.config.to_dict() == config
    assert all(p.grad is None and p.requires_grad for p in case.model.parameters())
    assert not any(m._forward_hooks for m in case.model.modules())


def test_checkpoints_are_averaged():
    case, others = case_of("gpt2"), [gpt2(), gpt2()]
    with torch.no_grad():
        for p in others[1].parameters():
            p.mul_(0.9)
    ensemble = HfComposableInfluence(gpt2(), hw.GradDot(), checkpoints=[m.state_dict() for m in others])
    each = [HfComposableInfluence(m, hw.GradDot()) for m in others]
    got, *apart = (i.fit([(case.x, case.y)]).influences(case.x, case.y) for i in (ensemble, *each))
    assert is_close(got, sum(apart) / 2)


def test_verify_passes_on_rows_of_unequal_length():
    case = case_of("gpt2")
    train, query = case.rows(range(ROWS)), case.rows(range(ROWS, ROWS + QUERIES))
    blocks = {"mlp": ["transformer.h.0.mlp"], "norm": ["transformer.ln_f"]}
    influence = HfComposableInfluence(gpt2().float(), hw.Ekfac(), blocks=blocks).fit([train])
    found = influence.verify([train], [query], rows=3, queries=2)
    assert found.passed, str(found)
