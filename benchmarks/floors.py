"""The least arithmetic that scores take, counted from shapes; and how fast this machine multiplies matrices.

    python benchmarks/floors.py W1        # one line of JSON, which run.py reads

Counted, two for each multiply-add: the model's forward pass of every row and as much again for its activations'
gradients; covariances, of which one half is the other's mirror image; eigendecompositions (in float64, at 10 n^3);
turns into an eigenbasis and back, on the cheaper side; and each layer's pairs of rows, by outer products or by dense
gradients, whichever is less. Not counted: what is read and written, nonlinearities, Python. So a floor is an
estimate of what perfect code of the same method could do, not a proof; nothing says that one is reached.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace


@dataclass(frozen=True)
class Layer:
    """A linear map with weight [outputs, inputs], its bias an input more, applied at so many positions a row."""

    inputs: int
    outputs: int
    positions: int

    @property
    def size(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Shapes:
    """Of a workload."""

    layers: tuple[Layer, ...]
    forward: float  # of one row through the whole model
    train: int
    query: int

    @property
    def rows(self) -> int:
        return self.train + self.query


@dataclass(frozen=True)
class Work:
    """Floating-point operations: two for each multiply-add."""

    single: float
    double: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.single + other.single, self.double + other.double)


@dataclass(frozen=True)
class Rates:
    """Of a plain product of matrices, in operations per CPU second on one thread."""

    single: float
    double: float

    def seconds(self, work: Work) -> float:
        return work.single / self.single + work.double / self.double


def gradients(shapes: Shapes, rows: int) -> float:
    """Forward, and backward to the layers' outputs."""
    return rows * 2 * shapes.forward


def covariances(shapes: Shapes) -> float:
    # Of a symmetric product one half is enough.
    return sum(shapes.train * each.positions * (each.inputs**2 + each.outputs**2) for each in shapes.layers)


def turned(layer: Layer, rows: int) -> float:
    """Rows' gradients into a basis of both sides, as outer products or dense."""
    i, o = layer.inputs, layer.outputs
    return 2 * rows * min(layer.positions * (i**2 + o**2), o**2 * i + o * i**2)


def dense(layer: Layer, rows: int) -> float:
    return 2 * rows * layer.positions * layer.size


def outer_pairs(layer: Layer, shapes: Shapes) -> float:
    """Dot products of all pairs, of gradients that are outer products."""
    t, pairs = layer.positions, shapes.train * shapes.query
    ghost = 2 * pairs * t**2 * (layer.inputs + layer.outputs + 1)
    return min(ghost, dense(layer, shapes.rows) + 2 * pairs * layer.size)


def cubes(shapes: Shapes) -> float:
    return sum(each.inputs**3 + each.outputs**3 for each in shapes.layers)


def grad_dot(shapes: Shapes) -> Work:
    return Work(gradients(shapes, shapes.rows) + sum(outer_pairs(each, shapes) for each in shapes.layers))


def kronecker(shapes: Shapes) -> Work:
    """Factors, and scores of queries that stay outer products."""
    fit = gradients(shapes, shapes.train) + covariances(shapes)
    return Work(fit + sum(turned(each, shapes.query) for each in shapes.layers)) + grad_dot(shapes)


def kfac_factored(shapes: Shapes) -> Work:
    return kronecker(shapes) + Work(0.0, 2 * cubes(shapes))


def kfac(shapes: Shapes) -> Work:
    # Into the eigenbasis and back. An inverse spectrum is a sum of outer products, of one at least: how many depends on
    # the data, and so does whether dense queries are less.
    return kronecker(shapes) + Work(sum(turned(each, shapes.query) for each in shapes.layers), 10 * cubes(shapes))


def ekfac(shapes: Shapes) -> Work:
    # Labels are drawn anew for the spectrum: a second pass.
    spectrum = sum(turned(each, shapes.train) + dense(each, shapes.train) for each in shapes.layers)
    return kfac(shapes) + Work(gradients(shapes, shapes.train) + spectrum)


FLOORS: dict[str, Callable[[Shapes], Work]] = {
    **dict.fromkeys(("kronfluence.identity", "captum.tracin_sw", "headwater.graddot", "headwater.tracin"), grad_dot),
    "headwater.kfac_factored": kfac_factored,
    **dict.fromkeys(("kronfluence.kfac", "headwater.kfac"), kfac),
    **dict.fromkeys(("kronfluence.ekfac", "kronfluence.ekfac_qb32", "kronfluence.ekfac_emp"), ekfac),
    **dict.fromkeys((f"headwater.ekfac{which}" for which in ("", "_empirical", "_rel", "_r4", "_r16")), ekfac),
}
"""By item. Others have none that is known: what a solver or a rank takes depends on the data."""


@dataclass(frozen=True)
class Floors:
    """What one round found out."""

    shapes: Shapes
    rates: Rates

    @classmethod
    def of(cls, row: dict) -> "Floors":
        """What `main` printed."""
        layers = tuple(Layer(**each) for each in row["shapes"]["layers"])
        return cls(Shapes(**row["shapes"] | {"layers": layers}), Rates(**row["rates"]))

    def seconds(self, item: str) -> float | None:
        """CPU seconds of fit and score; None for an item without a known floor."""
        name, _, option = item.partition("@")
        if name not in FLOORS:
            return None
        given = dict(setting.split("=") for setting in filter(None, option.split(",")))
        train, query = int(given.get("ntrain", self.shapes.train)), int(given.get("nq", self.shapes.query))
        return self.rates.seconds(FLOORS[name](replace(self.shapes, train=train, query=query)))


def shapes_of(workload) -> Shapes:
    """Of a workload of the peers' folder."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    layers: list[Layer] = []

    def seen(module, given, output) -> None:
        i = module.weight[0].numel() + (module.bias is not None)
        o = module.weight.shape[0]
        layers.append(Layer(i, o, output.numel() // o))

    hooks = [workload.model.get_submodule(name).register_forward_hook(seen) for name in workload.tracked]
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        workload.model(workload.x[:1])
    for hook in hooks:
        hook.remove()
    return Shapes(tuple(layers), float(counted.get_total_flops()), len(workload.x), len(workload.xq))


def rate(dtype, size: int, repeats: int = 5) -> float:
    """Operations per CPU second of a product [size, size] x [size, size], the median."""
    import torch

    a = torch.randn(size, size, dtype=dtype)
    out, found = a @ a, []
    for _ in range(repeats):
        start = time.process_time()
        torch.mm(a, a, out=out)
        found.append(2 * size**3 / (time.process_time() - start))
    return sorted(found)[repeats // 2]


def main() -> None:
    import torch
    import workloads

    torch.set_num_threads(1)
    rates = Rates(rate(torch.float32, 2048), rate(torch.float64, 1024))
    shapes = shapes_of(workloads.load(sys.argv[1]))
    print("JSON " + json.dumps({"shapes": asdict(shapes), "rates": asdict(rates)}))


if __name__ == "__main__":
    main()
