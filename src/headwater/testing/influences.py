"""The contract of influence: scores do not depend on how they were asked for, and are a truth where one is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from headwater.arrays import working_memory
from headwater.attributor import Attributor
from headwater.errors import InvalidSetting, NotFittedError, UnsupportedInfluenceModeError
from headwater.methods.damping import Relative
from headwater.testing.contract import Contract, host
from headwater.types import Batch, InfluenceMode

Rows = tuple[Any, Any]
"""x and y."""


class InfluenceContract(Contract):
    """What every `Attributor` obeys: laws 1 and 2 of the contract, and how it refuses.

    A subclass fills `influence`, `train`, `queries`, and `slow_scores` where there is a truth; for inputs that have no
    derivatives it sets `modes` to ("up",).
    """

    rounding = 1e5
    modes: tuple[str, ...] = ("up", "perturbation")
    symmetric: bool = True
    """Whether score(a, b) is score(b, a): so for symmetric operators, if queries have no measurement of their own."""
    dampings: tuple[float, ...] = (1e-3, 1e-1, 1.0)
    """In mean eigenvalues; () for a method without damping."""

    def influence(self, damping: object = None) -> Attributor[Any]:
        """A hook: the implementation under test, not fitted, at this damping or (None) at its own choice."""
        raise NotImplementedError

    def train(self) -> Rows:
        """A hook: train rows, 5 or more, no two alike. 7 show an uneven last batch."""
        raise NotImplementedError

    def queries(self) -> Rows:
        """A hook: query rows, 2 or more, and not as many as train rows."""
        raise NotImplementedError

    def slow_scores(self, mode: str, damping: float) -> np.ndarray | None:
        """A hook: the scores at this damping (in mean eigenvalues) by an explicit formula; None if there is none."""
        return None

    def take(self, rows: Rows, index: Sequence[int]) -> Rows:
        """Some rows, in this order; x may be an array, or a tuple or dict of arrays."""
        x, y = (_take(part, self.array(np.asarray(index))) for part in rows)
        return x, y

    def loader(self, rows: Rows, batch_size: int) -> list[Rows]:
        n = len(rows[1])
        return [self.take(rows, range(start, min(start + batch_size, n))) for start in range(0, n, batch_size)]

    def fitted(self, damping: object = None, batch_size: int = 3) -> Attributor[Any]:
        """Asked for by every claim, and changed by none: a suite whose fits take long may keep them."""
        return self.influence(damping).fit(self.loader(self.train(), batch_size))

    # Shapes, and the truth ----------------------------------------------------------------------------------------

    def test_fit_gives_itself_and_knows_that_it_is_fitted(self) -> None:
        influence = self.influence()
        assert not influence.is_fitted
        assert influence.fit(self.loader(self.train(), 3)) is influence
        assert influence.is_fitted
        assert influence.n_train == len(self.train()[1])

    def test_there_is_a_factor_for_each_parameter(self) -> None:
        influence = self.fitted()
        factors = influence.influence_factors(*self.queries())
        assert tuple(factors.shape) == (len(self.queries()[1]), influence.n_parameters)

    def test_scores_have_a_row_for_each_query_and_a_column_for_each_train_row(self) -> None:
        for mode in self.modes:
            shape = self._scores(self.fitted(), mode).shape
            inputs = () if mode == "up" else tuple(self.train()[0].shape[1:])
            assert shape == (len(self.queries()[1]), len(self.train()[1]), *inputs)

    def test_scores_are_the_truth_at_every_damping(self) -> None:
        for damping in self.dampings or (0.0,):
            for mode in self.modes:
                truth = self.slow_scores(mode, damping)
                if truth is not None:
                    self.assert_same(self._scores(self.fitted(Relative(damping)), mode), truth)

    def _scores(self, influence: Attributor[Any], mode: str = "up") -> np.ndarray:
        return host(influence.influences(*self.queries(), *self.train(), mode=mode))

    # Every path gives the same number -----------------------------------------------------------------------------

    def test_factors_give_the_same_scores(self) -> None:
        influence, by_block = self.fitted(), self.fitted().influence_factors_by_block(*self.queries())
        assert [*by_block] == influence.block_names
        whole = influence.influence_factors(*self.queries())
        self.assert_same(np.concatenate([host(factor) for factor in by_block.values()], axis=1), whole)
        for mode in self.modes:
            for factors in (whole, by_block):
                self.assert_same(
                    influence.influences_from_factors(factors, *self.train(), mode=mode), self._scores(influence, mode)
                )

    def test_blocks_sum_to_the_whole(self) -> None:
        influence = self.fitted()
        factors = influence.influence_factors(*self.queries())
        for mode in self.modes:
            for shares in (
                influence.influences_by_block(*self.queries(), *self.train(), mode=mode),
                influence.influences_from_factors_by_block(factors, *self.train(), mode=mode),
            ):
                assert [*shares] == influence.block_names
                self.assert_same(sum(host(share) for share in shares.values()), self._scores(influence, mode))

    def test_scores_do_not_depend_on_the_batch_size_of_the_loader(self) -> None:
        for damping in self.dampings[:1] or (0.0,):
            for mode in self.modes:
                expected = self._scores(self.fitted(Relative(damping), len(self.train()[1])), mode)
                for size in (1, 2, len(self.train()[1]) - 1):
                    self.assert_same(self._scores(self.fitted(Relative(damping), size), mode), expected)

    def test_scores_do_not_depend_on_the_order_of_the_rows(self) -> None:
        influence, n = self.fitted(), len(self.train()[1])
        index = np.random.default_rng(0).permutation(n)
        shuffled = self.take(self.train(), index.tolist())
        other = self.influence().fit(self.loader(shuffled, 3))
        for mode in self.modes:
            expected = self._scores(influence, mode)
            self.assert_same(self._scores(other, mode), expected)
            self.assert_same(influence.influences(*self.queries(), *shuffled, mode=mode), expected[:, index])

    def test_scores_do_not_depend_on_how_many_queries_or_train_rows_are_asked_for(self) -> None:
        """One by one, and more queries than there are parameters and train rows."""
        influence, queries, train = self.fitted(), self.queries(), self.train()
        index = np.arange(max(influence.n_parameters, len(train[1])) + 3) % len(queries[1])
        for mode in self.modes:
            expected = self._scores(influence, mode)
            for k in range(len(queries[1])):
                self.assert_same(influence.influences(*self.take(queries, [k]), *train, mode=mode), expected[k : k + 1])
            self.assert_same(influence.influences(*queries, *self.take(train, [2]), mode=mode), expected[:, 2:3])
            many = influence.influences(*self.take(queries, index.tolist()), *train, mode=mode)
            self.assert_same(many, expected[index])

    def test_scores_do_not_depend_on_the_working_memory(self) -> None:
        with working_memory(1):
            tight = self.influence().fit(self.loader(self.train(), 3))
            shares = [self._scores(tight, mode) for mode in self.modes]
            labelled = tight.attribute(self.loader(self.train(), 4), self.loader(self.queries(), 2)).values
        for mode, share in zip(self.modes, shares, strict=True):
            self.assert_same(share, self._scores(self.fitted(), mode))
        self.assert_same(labelled, self._scores(self.fitted()))

    def test_a_loader_may_give_pairs_or_batches(self) -> None:
        loader: list[Batch[Any]] = [Batch(x, y) for x, y in self.loader(self.train(), 3)]
        influence = self.influence().fit(loader)
        np.testing.assert_array_equal(self._scores(influence), self._scores(self.fitted()))
        queries: list[Batch[Any]] = [Batch(*self.queries())]
        self.assert_same(influence.attribute(loader, queries).values, self._scores(influence))

    def test_without_train_rows_the_queries_are_scored_on_themselves(self) -> None:
        influence, queries = self.fitted(), self.queries()
        for mode in self.modes:
            expected = host(influence.influences(*queries, *queries, mode=mode))
            self.assert_same(influence.influences(*queries, mode=mode), expected)
            shares = influence.influences_by_block(*queries, mode=mode)
            self.assert_same(sum(host(share) for share in shares.values()), expected)

    def test_when_roles_swap_the_scores_are_transposed(self) -> None:
        if self.symmetric:
            swapped = self.fitted().influences(*self.train(), *self.queries())
            self.assert_same(swapped, self._scores(self.fitted()).T)

    def test_labelled_scores_are_the_same_numbers(self) -> None:
        influence, n = self.fitted(), len(self.train()[1])
        expected = self._scores(influence)
        for size in (2, n):
            loaders = self.loader(self.train(), size), self.loader(self.queries(), size)
            scores = influence.attribute(*loaders, by_block=True)
            self.assert_same(scores.values, expected)
            assert scores.by_block is not None
            self.assert_same(sum(scores.by_block.values()), expected)
            ends = influence.top(*loaders, k=3)
            self.assert_same(ends.helpful_scores, -np.sort(-expected, axis=1)[:, :3])
            self.assert_same(ends.harmful_scores, np.sort(expected, axis=1)[:, :3])
            self.assert_same(np.take_along_axis(expected, ends.helpful_ids, axis=1), ends.helpful_scores)

    def test_self_influence_is_the_diagonal(self) -> None:
        if self.symmetric:
            expected = np.diagonal(host(self.fitted().influences(*self.train())))
            self.assert_same(self.fitted().self_influence(self.loader(self.train(), 2)), expected)

    # Damping ------------------------------------------------------------------------------------------------------

    def test_another_damping_is_the_same_as_fitting_again(self) -> None:
        fitted = self.fitted()
        before = self._scores(fitted)
        for damping in self.dampings:
            again, reused = self.fitted(Relative(damping)), fitted.with_damping(Relative(damping))
            assert reused.absolute_damping == again.absolute_damping
            np.testing.assert_array_equal(self._scores(reused), self._scores(again))
            self.assert_same(self._scores(fitted.with_damping(again.absolute_damping)), self._scores(again))
        np.testing.assert_array_equal(self._scores(fitted), before)

    def test_damping_does_more_than_scale(self) -> None:
        """The operator is no multiple of the identity: the scores at two dampings are not proportional."""
        if self.dampings:
            least, most = (self._scores(self.fitted(Relative(f(self.dampings)))).ravel() for f in (min, max))
            cosine = least @ most / (np.linalg.norm(least) * np.linalg.norm(most))
            assert cosine < 1 - 1e-4, f"the scores are proportional (cosine {cosine})"

    def test_damping_of_unknown_or_missing_blocks_is_refused(self) -> None:
        influence, names = self.fitted(), self.influence().block_names
        for wrong in ({}, {name: 0.1 for name in names[1:]}, {name: 0.1 for name in [*names, "no such block"]}):
            with self.refuses(ValueError, names[0]):
                influence.with_damping(wrong)

    # Saved --------------------------------------------------------------------------------------------------------

    def test_a_saved_fit_gives_the_same_scores(self) -> None:
        """To rounding: what a fit knows only half of (eigenvectors, say) is found again."""
        fitted, loader = self.fitted(), self.loader(self.train(), 3)
        with TemporaryDirectory() as folder:
            path = Path(folder) / "fit"
            try:
                fitted.save(path)
            except InvalidSetting:
                assert not path.exists()
                return
            loaded = self.influence().load(path, loader)
            assert loaded.n_train == fitted.n_train
            assert loaded.absolute_damping == fitted.absolute_damping
            for mode in self.modes:
                self.assert_same(self._scores(loaded, mode), self._scores(fitted, mode))
            with self.refuses(FileExistsError, path):
                fitted.save(path)

    # Refusals -----------------------------------------------------------------------------------------------------

    def test_a_mode_may_be_a_string_or_a_member_and_nothing_else(self) -> None:
        influence, train = self.fitted(), self.train()
        factors = influence.influence_factors(*self.queries())
        for mode in self.modes:
            got = influence.influences(*self.queries(), *train, mode=InfluenceMode(mode))
            np.testing.assert_array_equal(host(got), self._scores(influence, mode))
        for wrong in ("UP", "down", None, 1):
            for ask in (influence.influences, influence.influences_by_block):
                with self.refuses(UnsupportedInfluenceModeError, repr(wrong), "up", "perturbation"):
                    ask(*self.queries(), *train, mode=wrong)  # type: ignore[arg-type]
            for ask_from in (influence.influences_from_factors, influence.influences_from_factors_by_block):
                with self.refuses(ValueError, repr(wrong)):
                    ask_from(factors, *train, mode=wrong)  # type: ignore[arg-type]

    def test_only_one_of_x_and_y_is_refused(self) -> None:
        influence, (x, y) = self.fitted(), self.train()
        for ask in (influence.influences, influence.influences_by_block):
            for pair in ({"x": x}, {"y": y}):
                with self.refuses(ValueError, *pair):
                    ask(*self.queries(), **pair)

    def test_x_and_y_of_different_lengths_are_refused(self) -> None:
        influence, (x, _), (_, y) = self.fitted(), self.train(), self.queries()
        with self.refuses(ValueError, len(self.train()[1]), len(y)):
            influence.influences(*self.queries(), x, y)
        with self.refuses(ValueError, len(self.train()[1]), len(y)):
            influence.influence_factors(x, y)

    def test_what_needs_a_fit_is_refused_before_it(self) -> None:
        influence, queries, train = self.influence(), self.queries(), self.train()
        factors = self.fitted().influence_factors(*queries)
        loaders = self.loader(train, 3), self.loader(queries, 3)
        for ask in (
            lambda: influence.influences(*queries, *train),
            lambda: influence.influences_by_block(*queries, *train),
            lambda: influence.influence_factors(*queries),
            lambda: influence.influence_factors_by_block(*queries),
            lambda: influence.influences_from_factors(factors, *train),
            lambda: influence.influences_from_factors_by_block(factors, *train),
            lambda: influence.attribute(*loaders),
            lambda: influence.self_influence(loaders[0]),
            lambda: influence.with_damping(0.1).influence_factors(*queries),
            lambda: influence.n_train,
        ):
            with self.refuses(NotFittedError, "fit"):
                ask()

    def test_factors_of_unknown_missing_or_mis_sized_blocks_are_refused(self) -> None:
        influence, train = self.fitted(), self.train()
        factors = influence.influence_factors_by_block(*self.queries())
        first = next(iter(factors))
        whole = influence.influence_factors(*self.queries())
        for mode in self.modes:
            for wrong in (
                factors | {"no such block": factors[first]},
                {name: factor for name, factor in factors.items() if name != first},
                factors | {first: factors[first][:, 1:]},
                whole[:, 1:],
                whole[0],
            ):
                with self.refuses(ValueError):
                    influence.influences_from_factors(wrong, *train, mode=mode)

    def test_a_loader_that_can_be_read_only_once_or_is_empty_is_refused(self) -> None:
        loaders: list[Any] = [iter(self.loader(self.train(), 3)), []]
        for loader in loaders:
            with self.refuses(ValueError, "loader"):
                self.influence().fit(loader)


def _take(part: Any, index: Any) -> Any:
    if isinstance(part, Mapping):
        return {name: _take(value, index) for name, value in part.items()}
    if isinstance(part, tuple):
        return tuple(_take(value, index) for value in part)
    return part[index]
