"""kronfluence's self-influence, by the names of its strategies: a driver in the manner of the peers' own.

Each row's score on itself stands in every query's column, since drivers return scores [train, query].
"""

import tempfile
from collections.abc import Callable

import common
import numpy as np
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset


def self_scores(strategy: str) -> Callable[..., np.ndarray]:
    def run(w, meter, args) -> np.ndarray:
        class Summed(Task):
            def compute_train_loss(self, batch, model, sample=False):
                x, y = batch
                outputs = model(x)
                outputs, y = outputs.reshape(-1, outputs.shape[-1]), y.reshape(-1)
                if sample:
                    with torch.no_grad():
                        y = torch.multinomial(outputs.softmax(-1), 1).flatten()
                return cross_entropy(outputs, y, reduction="sum")

            def compute_measurement(self, batch, model):
                return self.compute_train_loss(batch, model)

            def get_influence_tracked_modules(self):
                return w.tracked

        task, train = Summed(), TensorDataset(w.x, w.y)
        model = prepare_model(w.model, task)
        with tempfile.TemporaryDirectory() as folder:
            analyzer = Analyzer("self", model, task, cpu=True, output_dir=folder, disable_tqdm=True, log_level=50)
            factors = FactorArguments(strategy=strategy, eigendecomposition_dtype=torch.float64)
            with meter("fit"):
                analyzer.fit_all_factors("f", train, per_device_batch_size=args.batch, factor_args=factors)
            with meter("score"):
                analyzer.compute_self_scores(
                    "s",
                    "f",
                    train,
                    per_device_train_batch_size=args.batch,
                    score_args=ScoreArguments(damping_factor=w.damping),
                )
                found = analyzer.load_self_scores("s")["all_modules"]
        return np.repeat(found.numpy()[:, None], len(w.xq), axis=1)

    return run


common.main("kronfluence", "kronfluence", {strategy: self_scores(strategy) for strategy in ("identity", "ekfac")})
