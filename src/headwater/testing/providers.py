"""The contract of gradient providers: of any `GradientProvider`, and of those that speak the algebra."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from headwater.gradients.provider import Fisher, Kind, StructuredGradientProvider
from headwater.testing.contract import Contract, host
from headwater.types import Batch, GradientProvider

MANY, FEW = 40, 8
"""Parameters of a block beyond which curvature is checked along some directions in place of all; and how many."""


class GradientProviderContract(Contract):
    """What every `headwater.types.GradientProvider` obeys.

    A subclass fills `provider`, `batch`, `slow_grads` and `slow_mixed_grads`, and `array` if need be.
    """

    rows: int = 7
    """How many rows the data set behind `batch` has; at least 5."""

    def provider(self) -> GradientProvider[Any, Any]:
        """A hook: the provider under test."""
        raise NotImplementedError

    def batch(self, index: Sequence[int]) -> Batch[Any]:
        """A hook: these rows of a fixed data set, in this order; all rows differ."""
        raise NotImplementedError

    def slow_grads(self) -> np.ndarray:
        """A hook: the truth for all rows, (rows, D), by a formula or by autograd, one row at a time."""
        raise NotImplementedError

    def slow_mixed_grads(self) -> np.ndarray | None:
        """A hook: the truth for all rows, (rows, *x_shape, D); None if the input has no derivatives."""
        raise NotImplementedError

    def all_rows(self) -> Batch[Any]:
        return self.batch(range(self.rows))

    def test_flat_grads_are_a_row_of_all_parameters_for_each_row(self) -> None:
        self.assert_same(self.provider().flat_grads(self.all_rows()), self.slow_grads())

    def test_flat_mixed_grads_have_the_axes_of_an_input_between_rows_and_parameters(self) -> None:
        expected = self.slow_mixed_grads()
        if expected is not None:
            self.assert_same(self.provider().flat_mixed_grads(self.all_rows()), expected)

    def test_jacobian_prod_is_flat_grads_times_g_transposed(self) -> None:
        grads, size = self.slow_grads(), self.slow_grads().shape[1]
        for k in (1, 3, size + 2, 0):
            g = self.random(k, size)
            self.assert_same(self.provider().jacobian_prod(self.all_rows(), self.array(g)), grads @ g.T)

    def test_a_row_does_not_depend_on_the_others_in_its_batch(self) -> None:
        provider, g = self.provider(), self.random(2, self.slow_grads().shape[1])
        cuts = [range(1), range(1, self.rows)]
        for truth, verb in [
            (self.slow_grads(), provider.flat_grads),
            (self.slow_mixed_grads(), provider.flat_mixed_grads),
        ]:
            if truth is not None:
                self.assert_same(np.concatenate([host(verb(self.batch(cut))) for cut in cuts]), truth)
        got = np.concatenate([host(provider.jacobian_prod(self.batch(cut), self.array(g))) for cut in cuts])
        self.assert_same(got, self.slow_grads() @ g.T)

    def test_rows_come_in_the_order_of_the_batch_and_may_repeat(self) -> None:
        index = [*range(self.rows - 1, 1, -1), 0, 0]  # as many as there are: what is compiled is compiled for shapes
        self.assert_same(self.provider().flat_grads(self.batch(index)), self.slow_grads()[index])
        mixed = self.slow_mixed_grads()
        if mixed is not None:
            self.assert_same(self.provider().flat_mixed_grads(self.batch(index)), mixed[index])

    def test_a_second_look_gives_the_same_numbers(self) -> None:
        provider = self.provider()
        first, second = (host(provider.flat_grads(self.all_rows())) for _ in range(2))
        np.testing.assert_array_equal(first, second)


class StructuredProviderContract(GradientProviderContract):
    """What every `StructuredGradientProvider` obeys besides. A subclass may also fill `slow_curvature`."""

    fishers: tuple[Fisher, ...] = ("exact", "sampled", "empirical")
    """The Fisher informations that the provider under test has."""
    kinds: tuple[Kind, ...] = ("ggn", "hessian")
    """The curvatures whose products it has."""

    def provider(self) -> StructuredGradientProvider[Any, Any]:
        raise NotImplementedError

    def slow_curvature(self, kind: str) -> np.ndarray | None:
        """A hook: the Hessian ("hessian") or GGN ("ggn") of the sum over all rows, (D, D); None if unknown."""
        return None

    def _pieces(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        sizes = self.provider().sizes
        return dict(zip(sizes, np.split(flat, np.cumsum([*sizes.values()])[:-1], axis=-1), strict=True))

    def test_blocks_side_by_side_are_the_flat_gradients(self) -> None:
        provider, expected = self.provider(), self._pieces(self.slow_grads())
        grads = provider.grads(self.all_rows())
        assert [*grads] == [*provider.layouts] == [*expected]
        assert provider.n_parameters == self.slow_grads().shape[1]
        for name, value in grads.items():
            self.assert_same(value.flat(), expected[name])

    def test_one_block_is_a_provider_of_its_own(self) -> None:
        provider, mixed = self.provider(), self.slow_mixed_grads()
        for name, expected in self._pieces(self.slow_grads()).items():
            block, g = provider.block(name), self.random(3, expected.shape[1])
            self.assert_same(block.flat_grads(self.all_rows()), expected)
            self.assert_same(block.jacobian_prod(self.all_rows(), self.array(g)), expected @ g.T)
            if mixed is not None:
                self.assert_same(block.flat_mixed_grads(self.all_rows()), self._pieces(mixed)[name])

    def test_g_of_another_width_is_refused_and_both_numbers_are_said(self) -> None:
        provider, size = self.provider(), self.slow_grads().shape[1]
        for wrong in (size - 1, size + 1):
            with self.refuses(ValueError, size, wrong):
                provider.jacobian_prod(self.all_rows(), self.array(self.random(2, wrong)))
        for name, own in provider.sizes.items():
            with self.refuses(ValueError, own, own + 1):
                provider.block(name).jacobian_prod(self.all_rows(), self.array(self.random(2, own + 1)))

    def test_mixed_prod_contracts_the_mixed_gradients(self) -> None:
        provider, mixed = self.provider(), self.slow_mixed_grads()
        if mixed is None:
            return
        factors = self._pieces(self.random(self.rows + 2, provider.n_parameters))
        shares = {name: np.einsum("kd,n...d->kn...", factors[name], own) for name, own in self._pieces(mixed).items()}
        given = {name: self.array(factor) for name, factor in factors.items()}
        self.assert_same(provider.mixed_prod(self.all_rows(), given), sum(shares.values()))
        for name, expected in shares.items():
            self.assert_same(provider.mixed_prod(self.all_rows(), {name: given[name]}), expected)

    def test_curvature_products_are_those_of_the_sum_over_rows(self) -> None:
        provider = self.provider()
        for kind in self.kinds:
            for name, size in provider.sizes.items():
                batches = [self.all_rows(), self.batch(range(3)), self.batch(range(3, self.rows))]
                # Of a large block some directions at random: what is wrong anywhere shows in all of them.
                along = np.eye(size) if size <= MANY else self.random(FEW, size)
                whole, *parts = (
                    host(provider.curvature_product(batch, name, self.array(along), kind)) for batch in batches
                )
                self.assert_same(whole, sum(parts))
                within = whole @ along.T
                self.assert_same(within, within.T)
                if kind == "ggn":
                    lowest, highest = np.linalg.eigvalsh(within)[[0, -1]]
                    assert lowest >= -self.rounding * np.finfo(whole.dtype).eps * highest
                truth = self.slow_curvature(kind)
                if truth is not None:
                    self.assert_same(whole, along @ self._pieces(self._pieces(truth)[name].T)[name].T)

    def test_fisher_gradients_of_a_row_do_not_depend_on_its_batch(self) -> None:
        provider = self.provider()
        for fisher in self.fishers:
            options: dict[str, Any] = {"draws": range(2, 4), "seed": 5}
            together = provider.fisher_grads(self.all_rows(), fisher, **options)
            alone = provider.fisher_grads(self.batch([4]), fisher, **options)
            assert len(together) == len(alone)
            for whole, one in zip(together, alone, strict=True):
                for name, value in whole.items():
                    self.assert_same(one[name].flat(), host(value.flat())[4:5])

    def test_sampled_fisher_gradients_depend_on_the_seed_and_on_the_draw(self) -> None:
        if "sampled" not in self.fishers:
            return
        first, second, seeded = (self._summed(range(k, k + 4), seed=seed) for k, seed in [(0, 0), (4, 0), (0, 1)])
        assert not np.allclose(first, second)
        assert not np.allclose(first, seeded)

    def _summed(self, draws: range, seed: int) -> np.ndarray:
        """The Fisher information that the draws give, the diagonal."""
        found = self.provider().fisher_grads(self.all_rows(), "sampled", draws=draws, seed=seed)
        return sum(np.concatenate([host(v.flat()) for v in draw.values()], axis=1) ** 2 for draw in found)  # type: ignore[return-value]

    def test_the_empirical_fisher_is_that_of_the_gradients(self) -> None:
        if "empirical" in self.fishers:
            (draw,) = self.provider().fisher_grads(self.all_rows(), "empirical")
            expected = self.provider().grads(self.all_rows(), weighted=False)
            for name, value in draw.items():
                self.assert_same(value.flat(), expected[name].flat())

    def test_a_rows_key_is_its_own_in_every_batch(self) -> None:
        keys = self.provider().row_keys(self.all_rows())
        assert keys.dtype == np.uint64
        assert len(np.unique(keys)) == self.rows
        index = [4, 0, 4]
        np.testing.assert_array_equal(self.provider().row_keys(self.batch(index)), keys[index])

    def test_looking_does_not_change_the_fingerprint(self) -> None:
        provider = self.provider()
        before = provider.fingerprint()
        provider.grads(self.all_rows())
        assert provider.fingerprint() == before
