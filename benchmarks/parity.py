"""Does headwater agree with kronfluence 1.0.1, and do both agree with the formula? Float64, same labels, same damping.

    python benchmarks/parity.py                        exits 1 where a relative difference exceeds 1e-6
    python benchmarks/parity.py --without-headwater    kronfluence against the plain formula only

Both libraries use the labels of the data (the empirical Fisher), since their random draws cannot be made to agree.
The plain formula is written below once more, dense and one row at a time, and shares no code with either:

1. for each row n and layer: a_n the layer's input with a 1 appended where there is a bias, [t, i]; g_n the gradient
   of the row's loss, summed over positions, with respect to the layer's output, [t, o]; G_n = g_n^T a_n, [o, i];
2. U_A and U_B: eigenvectors of the sums over rows and positions of a a^T and g g^T;
3. Lambda = mean over rows of (U_B^T G_n U_A)^2: the positions of a row are summed before the square;
   KFAC: the outer product of the two covariances' eigenvalues;
4. score(q, n) = sum over layers of < U_B^T G_q U_A / (Lambda + damping), U_B^T G_n U_A >.

Signs are checked with the loss itself: a small step of the weights against the preconditioned gradient of a train row
(which is what weighting that row up does) changes each query's loss by minus the step times the score.
"""

import argparse
import copy
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from peers import SOURCE, one_thread, peer_python, peerbench_folder

TOLERANCE = 1e-6  # between scores
STEP_TOLERANCE = 1e-3  # of a finite step, for the sign and the scale


def restart_with_peers(given: argparse.Namespace) -> None:
    """Replace this process by the peers' Python, unless it already is one."""
    if os.environ.get("HEADWATER_PARITY") == "inside":
        return
    python, environment = peer_python(given.python), one_thread(peerbench_folder(given.peers))
    os.execve(python, [python, __file__, *sys.argv[1:]], {**environment, "HEADWATER_PARITY": "inside"})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", help="folder of the peers' drivers")
    parser.add_argument("--python", help="a Python that has the peers installed")
    parser.add_argument("--without-headwater", action="store_true", help="check kronfluence against the formula only")
    parser.add_argument("--small", action="store_true", help="leave the digits network out")
    return parser.parse_args()


if __name__ == "__main__":
    GIVEN = arguments()
    restart_with_peers(GIVEN)

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

DOUBLE = torch.float64


@dataclass(frozen=True)
class Case:
    """A trained model with its rows; `model` is a chain of linear layers and activations, in float64."""

    name: str
    model: nn.Sequential
    x: Tensor  # [n, ..., i]
    y: Tensor  # [n, ...]
    xq: Tensor  # [q, ..., i]
    yq: Tensor  # [q, ...]
    batch: int  # does not divide n: the last batch is smaller
    dampings: tuple[float | None, ...]  # absolute; None: 0.1 times the layer's mean eigenvalue
    methods: tuple[str, ...] = ("identity", "kfac", "ekfac")


def row_loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of each row, summed over its positions: [n, ..., c], [n, ...] -> [n]."""
    each = nn.functional.cross_entropy(output.flatten(0, -2), target.flatten(), reduction="none")
    return each.reshape(len(output), -1).sum(1)


# ------------------------------------------------------------------------------------------------ the cases
def small_case(name: str, activation: type[nn.Module], positions: int | None = None) -> Case:
    """A random three-layer network on random data: 101 rows in batches of 32, more queries than classes."""
    draw = torch.Generator().manual_seed(7)
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(6, 9), activation(), nn.Linear(9, 8, bias=False), activation(), nn.Linear(8, 5)).to(
        DOUBLE
    )
    shape = () if positions is None else (positions,)

    def rows(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, *shape, 6, dtype=DOUBLE, generator=draw)
        return x, torch.randint(5, (count, *shape), generator=draw)

    # Averaged over positions, KFAC's scale is a matter of convention; EKFAC's is not.
    methods = ("identity", "kfac", "ekfac") if positions is None else ("identity", "ekfac")
    return Case(name, model, *rows(101), *rows(37), 32, (1e-2, 1e-4, None), methods)


def digits_case() -> Case:
    """The digits network of workload W1, in float64."""
    import workloads

    w = workloads.load("W1")
    model = nn.Sequential(w.model.fc1, nn.ReLU(), w.model.fc2, nn.ReLU(), w.model.fc3).to(DOUBLE)
    return Case("W1 digits", model, w.x.to(DOUBLE), w.y, w.xq.to(DOUBLE), w.yq, 256, (1e-2, 1e-4, None))


# ------------------------------------------------------------------------------------------------ the plain formula
@dataclass(frozen=True)
class Row:
    """One row's layer inputs, output gradients and weight gradients, one entry per layer."""

    inputs: list[Tensor]  # [t, i], a 1 appended where the layer has a bias
    output_gradients: list[Tensor]  # [t, o]
    weight_gradients: list[Tensor]  # [o, i], the bias as the last column


def read_row(model: nn.Sequential, x: Tensor, y: Tensor) -> Row:
    """Autograd on a single row; the weight gradients do not come from the other two."""
    hidden, inputs, outputs, parameters = x[None], [], [], []
    for layer in model:
        if isinstance(layer, nn.Linear):
            ones = [hidden.new_ones(*hidden.shape[:-1], 1)] if layer.bias is not None else []
            inputs.append(torch.cat([hidden, *ones], -1).detach().flatten(0, -2))
            hidden = layer(hidden)
            outputs.append(hidden)
            parameters.append([layer.weight] + ([layer.bias[:, None]] if layer.bias is not None else []))
        else:
            hidden = layer(hidden)
    wanted = [p for layer in model if isinstance(layer, nn.Linear) for p in layer.parameters()]
    gradients = iter(torch.autograd.grad(row_loss(hidden, y[None]).sum(), [*outputs, *wanted]))
    output_gradients = [next(gradients).flatten(0, -2) for _ in outputs]
    weight_gradients = [
        torch.cat([next(gradients).reshape(len(o.T), -1) for _ in p], 1)
        for o, p in zip(output_gradients, parameters, strict=True)
    ]
    return Row(inputs, output_gradients, weight_gradients)


@dataclass(frozen=True)
class Plain:
    """The formula, ready to score: per layer the bases, the spectrum, and every row's gradients."""

    bases: list[tuple[Tensor, Tensor]]  # U_B [o, o], U_A [i, i]
    spectra: list[Tensor]  # [o, i]
    train: list[Tensor]  # [n, o, i]
    query: list[Tensor]  # [q, o, i]

    def precondition(self, layer: int, gradient: Tensor, damping: float | None) -> Tensor:
        (left, right), spectrum = self.bases[layer], self.spectra[layer]
        added = 0.1 * spectrum.mean() if damping is None else damping
        return left @ ((left.T @ gradient @ right) / (spectrum + added)) @ right.T

    def scores(self, damping: float | None) -> Tensor:
        """[q, n], one query preconditioned at a time."""
        total = torch.zeros(len(self.query[0]), len(self.train[0]), dtype=DOUBLE)
        for layer, (queries, train) in enumerate(zip(self.query, self.train, strict=True)):
            for q, gradient in enumerate(queries):
                total[q] += train.flatten(1) @ self.precondition(layer, gradient, damping).flatten()
        return total


def read_rows(model: nn.Sequential, x: Tensor, y: Tensor) -> list[Row]:
    return [read_row(model, *row) for row in zip(x, y, strict=True)]


def covariance(rows: list[Tensor]) -> Tensor:
    """Mean over rows and positions of v v^T, one row [t, v] at a time."""
    return sum(row.T @ row for row in rows) / sum(len(row) for row in rows)


def fit_plain(rows: list[Row], queries: list[Row], method: str) -> Plain:
    layers = range(len(rows[0].inputs))
    train = [torch.stack([row.weight_gradients[k] for row in rows]) for k in layers]
    query = [torch.stack([row.weight_gradients[k] for row in queries]) for k in layers]
    bases, spectra = [], []
    for k in layers:
        eigen_a = torch.linalg.eigh(covariance([row.inputs[k] for row in rows]))
        eigen_b = torch.linalg.eigh(covariance([row.output_gradients[k] for row in rows]))
        left, right = eigen_b.eigenvectors, eigen_a.eigenvectors
        if method == "identity":
            left, right = torch.eye(len(left), dtype=DOUBLE), torch.eye(len(right), dtype=DOUBLE)
            spectrum = torch.ones(len(left), len(right), dtype=DOUBLE)
        elif method == "kfac":
            spectrum = torch.outer(eigen_b.eigenvalues, eigen_a.eigenvalues)
        else:
            spectrum = sum((left.T @ gradient @ right) ** 2 for gradient in train[k]) / len(rows)
        bases.append((left, right))
        spectra.append(spectrum)
    return Plain(bases, spectra, train, query)


def step_error(case: Case, plain: Plain, damping: float | None, scores: Tensor, train_row: int = 3) -> float:
    """Largest relative difference between a train row's scores and what a step along it does to the queries' losses."""
    moves = [plain.precondition(k, train[train_row], damping) for k, train in enumerate(plain.train)]
    step = float(1e-6 / torch.sqrt(sum((move**2).sum() for move in moves)))
    after = []
    for direction in (step, -step):
        model = copy.deepcopy(case.model)
        with torch.no_grad():
            for layer, move in zip((m for m in model if isinstance(m, nn.Linear)), moves, strict=True):
                layer.weight += direction * move[:, : layer.in_features]
                if layer.bias is not None:
                    layer.bias += direction * move[:, -1]
            after.append(row_loss(model(case.xq), case.yq))
    return relative((after[0] - after[1]) / (2 * step), scores[:, train_row])


# ------------------------------------------------------------------------------------------------ the libraries
def kronfluence_scores(case: Case, method: str) -> Callable[[float | None], Tensor]:
    """Fit kronfluence once; the result gives its scores [q, n] at a damping."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from torch.utils.data import TensorDataset

    class Summed(Task):
        def compute_train_loss(self, batch, model, sample=False):
            x, y = batch
            return row_loss(model(x), y).sum()

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

    task, folder = Summed(), tempfile.TemporaryDirectory()
    train, query = TensorDataset(case.x, case.y), TensorDataset(case.xq, case.yq)
    model = prepare_model(copy.deepcopy(case.model), task)
    analyzer = Analyzer("parity", model, task, cpu=True, output_dir=folder.name, disable_tqdm=True, log_level=50)
    names = ("activation_covariance", "gradient_covariance", "eigendecomposition", "per_sample_gradient", "lambda")
    factors = FactorArguments(method, use_empirical_fisher=True, **{f"{name}_dtype": DOUBLE for name in names})
    analyzer.fit_all_factors("factors", train, per_device_batch_size=case.batch, factor_args=factors)

    def scores(damping: float | None, keep=folder) -> Tensor:
        names = ("query_gradient_svd", "per_sample_gradient", "precondition", "score")
        args = ScoreArguments(damping_factor=damping, **{f"{name}_dtype": DOUBLE for name in names})
        sizes = {"per_device_query_batch_size": len(case.xq), "per_device_train_batch_size": case.batch}
        analyzer.compute_pairwise_scores(
            "scores", "factors", query, train, score_args=args, overwrite_output_dir=True, **sizes
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"]

    return scores


def headwater_scores(case: Case, method: str) -> Callable[[float | None], Tensor]:
    """Fit headwater once; the result gives its scores [q, n] at a damping."""
    import headwater as hw
    from headwater.torch import TorchComposableInfluence

    methods = {
        "identity": hw.GradDot(),
        "kfac": hw.Kfac(damping_form="exact", fisher="empirical"),
        "ekfac": hw.Ekfac(fisher="empirical"),
    }
    train = list(zip(case.x.split(case.batch), case.y.split(case.batch), strict=True))
    influence = TorchComposableInfluence(
        copy.deepcopy(case.model), row_loss, method=methods[method], likelihood="cross_entropy"
    ).fit(train)

    def scores(damping: float | None) -> Tensor:
        at = influence
        if method != "identity":
            at = influence.with_damping(hw.relative(0.1) if damping is None else damping)
        return torch.as_tensor(at.attribute(train, [(case.xq, case.yq)]).values)

    return scores


# ------------------------------------------------------------------------------------------------ the comparison
def relative(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|."""
    if a.shape != b.shape or a.dtype != b.dtype:
        raise SystemExit(f"Scores differ in kind: {tuple(a.shape)} {a.dtype} against {tuple(b.shape)} {b.dtype}.")
    return float((a - b).abs().max() / b.abs().max())


def compare(case: Case, with_headwater: bool) -> tuple[list[float], list[float]]:
    """Print a line for each method and damping; return every difference between scores, and every step's error."""
    rows, queries = read_rows(case.model, case.x, case.y), read_rows(case.model, case.xq, case.yq)
    differences, steps = [], []
    for method in case.methods:
        plain, peer = fit_plain(rows, queries, method), kronfluence_scores(case, method)
        own = headwater_scores(case, method) if with_headwater else None
        mean = sum(float(spectrum.mean()) for spectrum in plain.spectra) / len(plain.spectra)
        # Identity adds no damping: the formula's spectrum of ones stands for the unit matrix.
        for damping in (0.0,) if method == "identity" else case.dampings:
            formula, theirs = plain.scores(damping), peer(damping)
            found = [relative(theirs, formula)]
            if own is not None:
                ours = own(damping)
                found += [relative(ours, formula), relative(ours, theirs)]
            step = step_error(case, plain, damping, formula)
            shown = "none" if method == "identity" else "0.1 mean" if damping is None else f"{damping:g}"
            cells = [case.name, method, f"{mean:.1e}", shown, *(f"{value:.1e}" for value in found)]
            cells += ["-"] * (2 * (own is None)) + [f"{step:.0e}"]
            print("| " + " | ".join(cells) + " |", flush=True)
            differences += found
            steps.append(step)
    return differences, steps


def main(given: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module="kronfluence")
    sys.path.insert(0, str(SOURCE))
    cases = [small_case("MLP relu", nn.ReLU), small_case("MLP tanh", nn.Tanh), small_case("7 positions", nn.Tanh, 7)]
    if not given.small:
        cases.append(digits_case())
    print(
        "| case | method | mean eigenvalue | damping | kronfluence - formula | headwater - formula "
        "| headwater - kronfluence | step - score |\n|---|---|---|---|---|---|---|---|"
    )
    differences, steps = [], []
    for case in cases:
        of_case, of_steps = compare(case, not given.without_headwater)
        differences += of_case
        steps += of_steps
    agrees = all(value <= TOLERANCE for value in differences)  # a NaN does not
    follows = all(value <= STEP_TOLERANCE for value in steps)
    print(
        f"\nLargest relative difference between scores {max(differences):.1e}: "
        f"{'within' if agrees else 'ABOVE'} {TOLERANCE:.0e}; between a step's effect and the score {max(steps):.0e}: "
        f"{'within' if follows else 'ABOVE'} {STEP_TOLERANCE:.0e}."
    )
    return int(not (agrees and follows))


if __name__ == "__main__":
    sys.exit(main(GIVEN))
