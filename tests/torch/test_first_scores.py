"""What the first scores of a process cost beyond importing torch: what is imported, and what is done twice."""

import subprocess
import sys

import torch

from headwater.torch.products import rowwise_grads

HEAVY = {
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "numpy.random",
    "pandas",
    "scipy",
    "zarr",
    "rich",
    "matplotlib",
    "sklearn",
    "jax",
    "headwater.evaluate",
    "headwater.report",
    "headwater.curvature.model",
    "headwater.curvature.dual",
    "headwater.curvature.products",
    "headwater.methods.low_rank",
    "headwater.methods.iterative",
    "headwater.run.kept",
    "headwater.run.factors",
}

FIRST = """
import sys, torch, headwater as hw
from torch import nn

class Own(nn.Module):
    "A parameter that no layer rule fills, beside attention's, which is one, too."
    def __init__(self):
        super().__init__()
        self.w, self.attention = nn.Parameter(torch.randn(4, 6)), nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)
    def forward(self, x):
        z = (x @ self.w.T)[:, None].expand(-1, 3, -1)
        return self.head(self.attention(z, z, z)[0].mean(1))

x, y = torch.randn(30, 6), torch.randint(3, (30,))
for model in (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), Own()):
    for method in (hw.GradDot(), hw.Ekfac(), hw.Ekfac(fisher="sampled"), hw.Kfac(fisher="empirical")):
        influence = hw.Influence(model.eval(), nn.CrossEntropyLoss(), method, damping=0.1)
        influence.fit([(x, y)]).attribute([(x, y)], [(x[:7], y[:7])])
print(*sorted(set(sys.modules) & set(sys.argv[1:])))
"""


def test_first_scores_import_nothing_that_they_do_not_need():
    shown = subprocess.run([sys.executable, "-c", FIRST, *HEAVY], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == []


def test_gradients_by_row_are_those_of_torchs_public_transform():
    torch.manual_seed(0)
    chosen = {"w": torch.randn(4, 5, dtype=torch.float64), "idle": torch.randn(3, dtype=torch.float64)}
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)

    def loss(chosen, x, y):
        return (torch.tanh(x @ chosen["w"].T) * y).sum()

    found = rowwise_grads(loss, chosen, x, y)
    public = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(chosen, x, y)
    assert all(torch.equal(found[name], public[name]) for name in chosen)


def test_gradients_by_row_of_what_depends_on_nothing_are_zero():
    chosen = {"w": torch.randn(4)}
    found = rowwise_grads(lambda chosen, x, y: x.sum() * y.sum(), chosen, torch.randn(3, 2), torch.randn(3, 2))
    assert found["w"].shape == (3, 4) and not found["w"].any()


def test_a_model_without_vectorised_form_still_has_gradients_by_row():
    def loss(chosen, x, y):
        return chosen["w"].sum() * float(x.sum())  # a number of the host, which vmap refuses

    found = rowwise_grads(loss, {"w": torch.ones(2)}, torch.ones(3, 2), torch.ones(3, 2))
    assert torch.equal(found["w"], torch.full((3, 2), 2.0))
