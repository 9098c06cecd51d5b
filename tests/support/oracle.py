"""The slow plain truth: one row at a time, dense matrices, np.kron, solve. Nothing of headwater is used here.

Letters: n rows, D parameters, k pseudo-targets. A pseudo-target is (targets like y, weight of each row [n]): the Fisher
information of the rows is the mean over rows of sum_k weight_kn g_kn g_kn^T, with g_kn the gradient at those targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

Loss = Callable[[Any, Any], torch.Tensor]
Pseudo = Sequence[tuple[torch.Tensor, np.ndarray]]


def call(model: Callable[..., Any], x: Any) -> Any:
    """The model on x; attention in plain operations, which can be differentiated twice."""
    with sdpa_kernel(SDPBackend.MATH):
        if isinstance(x, dict):
            return model(**x)
        return model(*x) if isinstance(x, tuple) else model(x)


def count(x: Any) -> int:
    return len(tree_leaves(x)[0])


def row(x: Any, k: int) -> Any:
    """Row k, still with a first axis."""
    return tree_map(lambda t: t[k : k + 1], x)


def trainable(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def parameters(model: nn.Module, names: Sequence[str]) -> list[torch.Tensor]:
    found = dict(model.named_parameters())
    return [found[name] for name in names]


def flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def row_loss(model: nn.Module, loss: Loss, x: Any, y: Any, k: int) -> torch.Tensor:
    return loss(call(model, row(x, k)), row(y, k)).sum()


def gradient(value: torch.Tensor, leaves: Sequence[torch.Tensor], **options: Any) -> torch.Tensor:
    return flat(torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True, **options))


def per_sample_grads(model: nn.Module, loss: Loss, x: Any, y: Any, names: Sequence[str]) -> np.ndarray:
    """[n, D]."""
    leaves = parameters(model, names)
    return np.stack([gradient(row_loss(model, loss, x, y, k), leaves).numpy() for k in range(count(x))])


def mixed_grads(
    model: nn.Module, loss: Loss, x: torch.Tensor, y: Any, names: Sequence[str], unit: bool = False
) -> np.ndarray:
    """The derivative of each row's gradient (over its length, for `unit`) by its input: [n, *x_shape, D]."""
    leaves, out = parameters(model, names), []
    for k in range(len(x)):
        point = x[k : k + 1].clone().requires_grad_()
        g = gradient(loss(call(model, point), row(y, k)).sum(), leaves, create_graph=True)
        g = g / g.norm() if unit else g
        columns = [
            torch.autograd.grad(g[d], point, retain_graph=True, allow_unused=True, materialize_grads=True)[0][0]
            for d in range(len(g))
        ]
        out.append(torch.stack(columns, dim=-1).numpy())
    return np.stack(out)


def _mean(rows: Sequence[np.ndarray], weights: np.ndarray | None) -> np.ndarray:
    weights = np.ones(len(rows)) if weights is None else np.asarray(weights, dtype=float)
    return sum(w * r for w, r in zip(weights, rows, strict=True)) / weights.sum()


def hessian(
    model: nn.Module, loss: Loss, x: Any, y: Any, names: Sequence[str], weights: np.ndarray | None = None
) -> np.ndarray:
    """Of the mean loss: [D, D]."""
    leaves, out = parameters(model, names), []
    for k in range(count(x)):
        g = gradient(row_loss(model, loss, x, y, k), leaves, create_graph=True)
        columns = [
            gradient(g[d], leaves, retain_graph=True) if g.requires_grad else torch.zeros_like(g) for d in range(len(g))
        ]
        out.append(torch.stack(columns).numpy())
    return _mean(out, weights)


def ggn(
    model: nn.Module, loss: Loss, x: Any, y: Any, names: Sequence[str], weights: np.ndarray | None = None
) -> np.ndarray:
    """J^T H J of each row, H the Hessian of its loss by its output; the mean: [D, D]."""
    leaves, out = parameters(model, names), []
    for k in range(count(x)):
        output = call(model, row(x, k))
        jacobian = torch.stack([gradient(value, leaves, retain_graph=True) for value in output.reshape(-1)])
        target, shape = row(y, k), output.shape
        curvature = torch.autograd.functional.hessian(
            lambda o, t=target, s=shape: loss(o.reshape(s), t).sum(), output.detach().reshape(-1)
        )
        out.append((jacobian.T @ curvature @ jacobian).numpy())
    return _mean(out, weights)


def every_class(model: nn.Module, x: Any, y: torch.Tensor) -> Pseudo:
    """One class for each row: all classes, with their probabilities."""
    with torch.no_grad():
        p = torch.cat([call(model, row(x, k)).softmax(-1) for k in range(count(x))])
    return [(torch.full_like(y, c), p[:, c].numpy()) for c in range(p.shape[1])]


def every_direction(model: nn.Module, x: Any, y: torch.Tensor) -> Pseudo:
    """For MSELoss over O outputs: targets off the output by sqrt(O / 2) along each axis, whose v v^T sum to 2 / O."""
    with torch.no_grad():
        output = torch.cat([call(model, row(x, k)) for k in range(count(x))])
    step = math.sqrt(output.shape[1] / 2)
    eye = torch.eye(output.shape[1], dtype=output.dtype)
    return [(output - step * e, np.ones(len(output))) for e in eye]


def sampled_classes(
    model: nn.Module, x: Any, y: torch.Tensor, uniforms: Sequence[np.ndarray], terms: int = 1
) -> Pseudo:
    """Labels by inverting the cumulative distribution over the last axis; one array of uniforms [n, targets] a draw.

    A loss that is the mean of `terms` negative log-likelihoods has gradients that count too little by that factor: the
    Fisher is the expected Hessian of the loss, so outer products of its gradients count `terms` times.
    """
    with torch.no_grad():
        p = torch.cat([call(model, row(x, k)).softmax(-1) for k in range(count(x))]).numpy()
    cumulative = p.cumsum(-1)
    draws = []
    for u in uniforms:
        labels = (cumulative < u.reshape(*y.shape, 1)).sum(-1).clip(max=p.shape[-1] - 1)
        draws.append((torch.as_tensor(labels), np.full(len(y), terms / len(uniforms))))
    return draws


def own_targets(y: torch.Tensor) -> Pseudo:
    """The empirical Fisher."""
    return [(y, np.ones(len(y)))]


def fisher(
    model: nn.Module,
    loss: Loss,
    x: Any,
    pseudo: Pseudo,
    names: Sequence[str],
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """[D, D]."""
    total = 0.0
    for target, w in pseudo:
        g = per_sample_grads(model, loss, x, target, names)
        total = total + _mean([w_n * np.outer(g_n, g_n) for w_n, g_n in zip(w, g, strict=True)], weights)
    return total


# Blocks and scores ----------------------------------------------------------------------------------------------------


def block_names(model: nn.Module, structure: str | Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Block name to its parameters, in order."""
    names, blocks = trainable(model), {}
    if isinstance(structure, Mapping):
        for block, wanted in structure.items():
            blocks[block] = [n for entry in wanted for n in names if n == entry or n.startswith(entry + ".")]
        return blocks
    for name in names:
        owner = name.rpartition(".")[0] or "root"
        blocks.setdefault({"full": "full", "layer": owner, "parameter": name}[structure], []).append(name)
    return blocks


def block_slices(model: nn.Module, blocks: Mapping[str, Sequence[str]]) -> dict[str, slice]:
    """Where each block is in the vector of all blocks' parameters."""
    sizes, cuts, start = {n: p.numel() for n, p in model.named_parameters()}, {}, 0
    for block, names in blocks.items():
        size = sum(sizes[n] for n in names)
        cuts[block] = slice(start, start + size)
        start += size
    return cuts


def damped_solve(curvature: np.ndarray, damping: float, grads: np.ndarray) -> np.ndarray:
    """(curvature + damping I)^-1 on every row of grads [q, D]."""
    return np.linalg.solve(curvature + damping * np.eye(len(curvature)), grads.T).T


def contract(factors: np.ndarray, grads: np.ndarray) -> np.ndarray:
    """Factors [q, D] with train gradients [n, ..., D]: [q, n, ...]."""
    return np.tensordot(factors, grads, axes=([1], [grads.ndim - 1]))


# Kronecker factors ----------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """A matrix of parameters: where its numbers are in the flat vector [o, i], and its Kronecker factors."""

    index: np.ndarray
    left: np.ndarray
    right: np.ndarray

    def matrix(self) -> np.ndarray:
        return np.kron(self.left, self.right)

    def inverse(self, damping: float) -> np.ndarray:
        return np.linalg.inv(self.matrix() + damping * np.eye(self.index.size))

    def factored_inverse(self, damping: float) -> np.ndarray:
        """Martens and Grosse 2015, section 6.3: A + pi sqrt(damping) I, G + sqrt(damping) / pi I."""
        o, i = self.index.shape
        pi = math.sqrt((np.trace(self.right) / i) / (np.trace(self.left) / o))
        left = self.left + math.sqrt(damping) / pi * np.eye(o)
        right = self.right + math.sqrt(damping) * pi * np.eye(i)
        return np.kron(np.linalg.inv(left), np.linalg.inv(right))


@dataclass
class EigenPart:
    """A matrix of parameters: where its numbers are, its eigenvectors in columns, and its spectrum [o, i]."""

    index: np.ndarray
    left: np.ndarray
    right: np.ndarray
    spectrum: np.ndarray

    def _with(self, spectrum: np.ndarray) -> np.ndarray:
        basis = np.kron(self.left, self.right)
        return basis @ np.diag(spectrum.ravel()) @ basis.T

    def matrix(self) -> np.ndarray:
        return self._with(self.spectrum)

    def inverse(self, damping: float) -> np.ndarray:
        return self._with(1.0 / (self.spectrum + damping))


def assemble(parts: Sequence[Any], size: int, matrix: Callable[[Any], np.ndarray]) -> np.ndarray:
    """A matrix for each part, put where its parameters are: [D, D]."""
    whole = np.zeros((size, size))
    for part in parts:
        where = part.index.ravel()
        whole[np.ix_(where, where)] = matrix(part)
    return whole


def kronecker_parts(
    model: nn.Module,
    loss: Loss,
    x: Any,
    pseudo: Pseudo,
    names: Sequence[str],
    weights: np.ndarray | None = None,
    tied_table: bool = False,
) -> list[Part]:
    """Kronecker factors of the parameters in `names`, in whose order the flat vector is.

    A weight and its bias are one matrix where both are in `names`. A linear map: the sum over rows and positions of
    g g^T per row, and the mean over rows and positions of a a^T. An embedding: a linear map of one-hot vectors, the
    other way round. Anything else: sums of G G^T and of G^T G over its trace. `tied_table`: a table that is also a
    linear map gets no left factor (the identity stands for it) and the sum of G^T G.
    """
    weights = np.ones(count(x)) if weights is None else np.asarray(weights, dtype=float)
    places, collected = _places(model, names), {}
    for target, w in pseudo:
        for k in range(count(x)):
            for key, value in _row_factors(model, loss, x, target, k, places).items():
                collected.setdefault(key, []).append((w[k], weights[k], value))
    draws = len(pseudo)
    return [
        _part(kind, index, collected[key], weights.sum(), draws, tied_table) for key, (kind, index) in places.items()
    ]


def _part(
    kind: str, index: np.ndarray, found: list[tuple[float, float, Any]], total: float, draws: int, tied_table: bool
) -> Part:
    o, _ = index.shape
    if kind in ("linear", "conv"):
        left = sum(w * u * (g.T @ g) for w, u, (a, g) in found) / total
        return Part(index, left, _input_moment([(u, a) for _, u, (a, _) in found], total, draws))
    if kind == "table":
        right = sum(w * u * (g.T @ g) for w, u, (_, g) in found) / total
        return Part(index, _input_moment([(u, a) for _, u, (a, _) in found], total, draws), right)
    left = sum(w * u * (g @ g.T) for w, u, g in found) / total
    right = sum(w * u * (g.T @ g) for w, u, g in found)
    if kind == "tied":
        assert tied_table, "a table that is also a linear map has no Kronecker factors"
        return Part(index, np.eye(o), right / np.trace(right))
    return Part(index, left, right / np.trace(right))


def _input_moment(found: list[tuple[float, np.ndarray]], total: float, draws: int) -> np.ndarray:
    """Every draw sees the same inputs: the mean over rows and positions."""
    return sum(u * (a.T @ a) / len(a) for u, a in found) / (total * draws)


def _places(model: nn.Module, names: Sequence[str]) -> dict[str, tuple[str, np.ndarray]]:
    """Key to (kind, positions of its numbers in the flat vector)."""
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    start, ranges = 0, {}
    for name in names:
        size = math.prod(shapes[name])
        ranges[name] = np.arange(start, start + size)
        start += size
    canonical = {id(p): n for n, p in model.named_parameters()}
    uses: dict[str, list[tuple[str, nn.Module]]] = {}
    for module in model.modules():
        for role in ("weight", "bias"):
            name = canonical.get(id(getattr(module, role, None)))
            if name is not None:
                uses.setdefault(name, []).append((role, module))
    places: dict[str, tuple[str, np.ndarray]] = {}
    for name in names:
        users = uses.get(name, [])
        role, module = users[0] if users else ("", None)
        kinds = {type(m) for _, m in users}
        if role == "bias" and f"{name[:-4]}weight" in names and _takes_bias(module) and len(users) == 1:
            continue
        if kinds == {nn.Embedding, nn.Linear}:
            places[name] = ("tied", ranges[name].reshape(shapes[name]))
        elif role == "weight" and kinds == {nn.Embedding}:
            places[name] = ("table", ranges[name].reshape(shapes[name]))
        elif role == "weight" and kinds == {nn.Linear}:
            places[name] = ("linear", _with_bias(module, name, ranges, len(users) == 1))
        elif role == "weight" and kinds <= {nn.Conv1d, nn.Conv2d}:
            groups = ranges[name].reshape(module.groups, module.out_channels // module.groups, -1)
            if module.groups == 1:
                places[name] = ("conv", _with_bias(module, name, ranges, True))
                continue
            for k, group in enumerate(groups):
                places[f"{name}#{k}"] = ("conv", group)
        elif role == "weight" and f"{name[:-6]}bias" in names:
            both = np.concatenate([ranges[name], ranges[f"{name[:-6]}bias"]])
            places[name] = ("plain", both[:, None])
        else:
            shape = shapes[name]
            places[name] = ("plain", ranges[name].reshape(shape[0] if shape else 1, -1))
    return places


def _takes_bias(module: nn.Module) -> bool:
    return not (isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.groups > 1)


def _with_bias(module: nn.Module, name: str, ranges: Mapping[str, np.ndarray], alone: bool) -> np.ndarray:
    weight = ranges[name].reshape(module.weight.shape[0], -1)
    bias = f"{name[:-6]}bias"
    return np.concatenate([weight, ranges[bias][:, None]], axis=1) if alone and bias in ranges else weight


def _row_factors(
    model: nn.Module, loss: Loss, x: Any, y: torch.Tensor, k: int, places: Mapping[str, tuple[str, np.ndarray]]
) -> dict[str, Any]:
    """For one row: inputs and output-gradients [t, i], [t, o] of layers, the gradient matrix of anything else."""
    canonical = {id(p): n for n, p in model.named_parameters()}
    calls: dict[str, list[tuple[nn.Module, torch.Tensor, torch.Tensor]]] = {}
    handles = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
            calls.setdefault(name, []).append((module, args[0] if args else kwargs["input"], output))
            return output.clone()  # what follows may change it in place

        return hook

    for module in model.modules():
        name = canonical.get(id(getattr(module, "weight", None)))
        if name is not None and isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)):
            handles.append(module.register_forward_hook(watch(name), with_kwargs=True))
    value = row_loss(model, loss, x, y, k)
    for handle in handles:
        handle.remove()
    leaves = dict(zip(canonical.values(), parameters(model, list(canonical.values())), strict=True))
    wanted = [n for n, p in leaves.items() if p.requires_grad]
    outputs = [o for uses in calls.values() for _, _, o in uses]
    grads = torch.autograd.grad(value, [leaves[n] for n in wanted] + outputs, allow_unused=True, materialize_grads=True)
    by_name = dict(zip(wanted, grads, strict=False))
    by_output = {id(o): g for o, g in zip(outputs, grads[len(wanted) :], strict=True)}
    found: dict[str, Any] = {}
    for key, (kind, index) in places.items():
        name, _, group = key.partition("#")
        if kind in ("plain", "tied"):
            other = f"{name[:-6]}bias"
            pieces = [by_name[name].reshape(-1)]
            if index.size > pieces[0].numel():
                pieces.append(by_name[other].reshape(-1))
            found[key] = torch.cat(pieces).reshape(index.shape).numpy()
            continue
        sides = [_sides(m, given, by_output[id(out)], int(group or 0)) for m, given, out in calls[name]]
        a, g = (torch.cat(side).detach().numpy() for side in zip(*sides, strict=True))
        if kind != "table" and a.shape[1] < index.shape[1]:
            a = np.concatenate([a, np.ones((len(a), 1))], axis=1)
        found[key] = (a, g)
    return found


def _sides(module: nn.Module, given: torch.Tensor, out: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One row's layer inputs [t, i] and output-gradients [t, o]."""
    if isinstance(module, nn.Linear):
        return given.reshape(-1, module.in_features), out.reshape(-1, module.out_features)
    if isinstance(module, nn.Embedding):
        ids = given.reshape(-1)
        values = out.reshape(len(ids), -1)
        if module.padding_idx is not None:
            values = values * (ids != module.padding_idx).unsqueeze(1)
        return F.one_hot(ids, module.num_embeddings).to(values.dtype), values
    if isinstance(module, nn.Conv1d):
        given, out = given.unsqueeze(2), out.unsqueeze(2)
        size, padding = (1, *module.kernel_size), (0, *module.padding)
        stride, dilation = (1, *module.stride), (1, *module.dilation)
    else:
        size, padding, stride, dilation = module.kernel_size, module.padding, module.stride, module.dilation
    edges = (padding[1], padding[1], padding[0], padding[0])
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    if mode != "constant" and isinstance(module, nn.Conv1d):
        given = F.pad(given.squeeze(2), edges[:2], mode=mode).unsqueeze(2)
    else:
        given = F.pad(given, edges, mode=mode)
    channels, outputs = given.shape[1] // module.groups, out.shape[1] // module.groups
    given = given[:, group * channels : (group + 1) * channels]
    out = out[:, group * outputs : (group + 1) * outputs]
    patches = F.unfold(given, size, dilation=dilation, stride=stride)[0].T
    return patches, out[0].reshape(outputs, -1).T


def eigen_parts(
    model: nn.Module,
    loss: Loss,
    x: Any,
    pseudo: Pseudo,
    names: Sequence[str],
    parts: Sequence[Part],
    weights: np.ndarray | None = None,
) -> list[EigenPart]:
    """The eigenvectors of `parts`, with the mean over rows of sum_k weight (L^T G R)^2 as the spectrum."""
    grads = [(w, per_sample_grads(model, loss, x, target, names)) for target, w in pseudo]
    found = []
    for part in parts:
        left, right = _basis(part.left), np.linalg.eigh(part.right)[1]
        spectrum = sum(
            _mean([w_n * (left.T @ g_n[part.index] @ right) ** 2 for w_n, g_n in zip(w, g, strict=True)], weights)
            for w, g in grads
        )
        found.append(EigenPart(part.index, left, right, spectrum))
    return found


def _basis(side: np.ndarray) -> np.ndarray:
    """Eigenvectors; a diagonal side keeps its axes."""
    if np.array_equal(side, np.diag(np.diag(side))):
        return np.eye(len(side))
    return np.linalg.eigh(side)[1]
