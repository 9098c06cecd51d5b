"""Operator products per query against accuracy: how soon does each solver have the scores of the exact solve?

    python benchmarks/products.py W1 W4                     every row, at 0.1, 1 and 3 times the mean eigenvalue
    python benchmarks/products.py W3 --train 256 --queries 8

All solve (GGN + damping) x = g over all parameters as one block. For each number of products, and each solver that is
stopped there: the rank correlation with the reference's scores, mean over queries, and the Frobenius norm of the
difference, relative to the reference's. The reference is CG in float64 to a relative residual of 1e-6; the
solvers are in float32.
"""

import argparse
import sys
import warnings
from collections.abc import Callable

import numpy as np
from peers import SOURCE, peerbench_folder
from run import mean_of_known, spearman

REFERENCE_TOLERANCE = 1e-6


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", default=["W1"], metavar="WORKLOAD", help="W1 (default), W3, W4")
    parser.add_argument("--peers", help="folder with the workloads")
    parser.add_argument("--queries", type=int, help="the first so many queries (all)")
    parser.add_argument("--train", type=int, help="the first so many train rows (all)")
    parser.add_argument("--most", type=int, default=15, help="most products for each query (15)")
    parser.add_argument("--batch", type=int, default=256, help="rows in a batch (256)")
    parser.add_argument(
        "--dampings", type=float, nargs="+", default=[0.1, 1.0, 3.0], help="times the GGN's mean eigenvalue (0.1 1 3)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    GIVEN = arguments()
    sys.path[:0] = [str(SOURCE), str(peerbench_folder(GIVEN.peers))]

import torch  # noqa: E402
import workloads  # noqa: E402

import headwater as hw  # noqa: E402
from headwater.torch import TorchComposableInfluence  # noqa: E402


def cg(preconditioner: str | None, block: bool) -> Callable:
    return lambda k: hw.Cg(preconditioner=preconditioner, block=block, tolerance=0.0, max_iterations=k)


def krylov(preconditioner: str) -> Callable:
    return lambda k: hw.BlockKrylov(preconditioner=preconditioner, tolerance=0.0, max_products=k)


SOLVERS: dict[str, Callable] = {  # of the number of products
    "CG": cg(None, block=False),
    "CG, EKFAC": cg("ekfac", block=False),
    "block CG": cg(None, block=True),
    "block CG, EKFAC": cg("ekfac", block=True),
    "block Krylov, EKFAC": krylov("ekfac"),
    "CG, dual": cg("dual", block=False),
    "block Krylov, dual": krylov("dual"),
    "ASTRA": lambda k: hw.Astra(steps=k, rows=None),
}
NEAR = 0.9999  # where more products have nothing to show


class Problem:
    """A workload's model and rows in one precision."""

    def __init__(self, name: str, given: argparse.Namespace, dtype: torch.dtype):
        w = workloads.load(name)
        self.model = w.model.to(dtype)
        self.loss = w.loss_vec if w.seq else torch.nn.CrossEntropyLoss()
        self.train = self._batches(w.x[: given.train], w.y[: given.train], given.batch, dtype)
        self.query = self._batches(w.xq[: given.queries], w.yq[: given.queries], len(w.xq), dtype)

    @staticmethod
    def _batches(x: torch.Tensor, y: torch.Tensor, size: int, dtype: torch.dtype) -> list:
        x = x.to(dtype) if x.is_floating_point() else x
        return list(zip(x.split(size), y.split(size), strict=True))

    def fit(self, method) -> TorchComposableInfluence:
        influence = TorchComposableInfluence(
            self.model, self.loss, method=method, blocks="full", damping=hw.relative(1.0), likelihood="cross_entropy"
        )
        return influence.fit(self.train)

    def scores(self, influence: TorchComposableInfluence) -> np.ndarray:
        """[train, query], in float64."""
        return np.asarray(influence.attribute(self.train, self.query), dtype=np.float64).T


def references(problem: Problem, factors: list[float]) -> dict[float, tuple[dict[str, float], np.ndarray]]:
    """For each damping in units of the mean eigenvalue: the same in absolute units, and the exact scores."""
    exact = problem.fit(hw.Cg(curvature="ggn", tolerance=REFERENCE_TOLERANCE))
    found = {}
    for factor in factors:
        damped = exact.with_damping(hw.relative(factor))
        found[factor] = damped.absolute_damping, problem.scores(damped)
    return found


def compare(scores: np.ndarray, reference: np.ndarray) -> str:
    """Rank correlation and relative error, as a table's cell."""
    error = np.linalg.norm(scores - reference) / np.linalg.norm(reference)
    return f"{mean_of_known(spearman(scores, reference)):.5f} / {error:.1e}"


def measure(name: str, given: argparse.Namespace) -> dict[float, list[list[str]]]:
    """For each damping the rows of its table: one for each number of products, a cell for each solver."""
    warnings.simplefilter("default", hw.NotConverged)
    exact = references(Problem(name, given, torch.float64), given.dampings)
    problem = Problem(name, given, torch.float32)
    rows: dict[float, list[list[str]]] = {factor: [] for factor in exact}
    warnings.simplefilter("ignore", hw.NotConverged)  # to stop early is the point; the reference had its say above
    for k in range(1, given.most + 1):
        fitted = [problem.fit(make(k)) for make in SOLVERS.values()]
        for factor, (damping, reference) in exact.items():
            before = rows[factor][-1][1:] if rows[factor] else [""] * len(fitted)
            cells = [
                "-" if done(cell) else compare(problem.scores(influence.with_damping(damping)), reference)
                for influence, cell in zip(fitted, before, strict=True)
            ]
            rows[factor].append([str(k), *cells])
            print(f"{name} {factor:g} x mean, {k} products: {'; '.join(cells)}", file=sys.stderr, flush=True)
    return rows


def done(cell: str) -> bool:
    """Whether the cell above says that nothing more can be shown."""
    return cell == "-" or (bool(cell) and float(cell.split(" / ")[0]) >= NEAR)


def main() -> None:
    for name in GIVEN.workloads:
        for factor, rows in measure(name, GIVEN).items():
            print(f"\n### {name}, damping {factor:g} times the mean eigenvalue: Spearman / relative error\n")
            for line in (["products", *SOLVERS], ["---"] * (len(SOLVERS) + 1), *rows):
                print("| " + " | ".join(line) + " |", flush=True)


if __name__ == "__main__":
    main()
