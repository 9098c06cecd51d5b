"""The contract of block mappers: named blocks in order, scores by block, and factors that can be kept for later."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np

from headwater.arrays import Array
from headwater.errors import UnsupportedInfluenceModeError
from headwater.testing.contract import Contract, host
from headwater.types import Batch, BlockMapper, InfluenceMode, OperatorGradientComposition

Blocks = OrderedDict[str, Array]


class BlockMapperContract(Contract):
    """What every `headwater.types.BlockMapper` obeys. A subclass fills `mapper`, `left` and `right`.

    The truth comes from the mapper's own operators and providers, contracted by NumPy.
    """

    modes: tuple[str, ...] = ("up", "perturbation")
    """Without "perturbation" if the input has no derivatives."""

    def mapper(self) -> BlockMapper[Any, Any]:
        """A hook: the mapper under test, of at least two blocks, made anew; no operator a multiple of the identity."""
        raise NotImplementedError

    def left(self) -> Batch[Any]:
        """A hook: more rows than the right batch has."""
        raise NotImplementedError

    def right(self) -> Batch[Any]:
        """A hook."""
        raise NotImplementedError

    def slow_interactions(self, left: Batch[Any], right: Batch[Any], mode: str) -> dict[str, np.ndarray]:
        return {
            name: _contracted(block, host(block.op.apply(block.gp.flat_grads(left))), right, mode)
            for name, block in self.mapper().composable_block_dict.items()
        }

    def assert_same_blocks(self, got: Any, expected: dict[str, Any]) -> None:
        """An ordered dict of the same names in the same order, with the same numbers."""
        assert isinstance(got, OrderedDict)
        assert [*got] == [*expected]
        for name, value in got.items():
            self.assert_same(value, expected[name])

    def test_transformed_grads_are_the_mapped_gradients_of_each_block_in_order(self) -> None:
        blocks = self.mapper().composable_block_dict
        expected = {name: block.op.apply(block.gp.flat_grads(self.left())) for name, block in blocks.items()}
        self.assert_same_blocks(self.mapper().transformed_grads(self.left()), expected)

    def test_interactions_are_those_of_each_block_in_both_modes(self) -> None:
        for mode in self.modes:
            expected = self.slow_interactions(self.left(), self.right(), mode)
            self.assert_same_blocks(self.mapper().interactions(self.left(), self.right(), mode), expected)
            swapped = self.slow_interactions(self.right(), self.left(), mode)
            self.assert_same_blocks(self.mapper().interactions(self.right(), self.left(), mode), swapped)

    def test_a_mode_may_be_a_string_or_a_member(self) -> None:
        for mode in self.modes:
            expected = self.mapper().interactions(self.left(), self.right(), mode)
            member = InfluenceMode(mode)
            self.assert_same_blocks(self.mapper().interactions(self.left(), self.right(), member), expected)

    def test_no_right_batch_means_the_left_one(self) -> None:
        for mode in self.modes:
            expected = self.slow_interactions(self.left(), self.left(), mode)
            self.assert_same_blocks(self.mapper().interactions(self.left(), None, mode), expected)

    def test_factors_kept_for_later_give_the_same_interactions(self) -> None:
        """As a dict, as a dict in another order, and as one tensor."""
        factors = self.mapper().transformed_grads(self.left())
        for mode in self.modes:
            expected = self.slow_interactions(self.left(), self.right(), mode)
            for given in (factors, dict(reversed(factors.items())), self.side_by_side(factors)):
                got = self.mapper().interactions_from_transformed_grads(given, self.right(), mode)
                self.assert_same_blocks(got, expected)

    def side_by_side(self, factors: Blocks) -> Array:
        """A hook: factors by block as one tensor (N, sum of D)."""
        return self.array(np.concatenate([host(factor) for factor in factors.values()], axis=-1))

    def test_unknown_missing_and_mis_sized_blocks_are_refused(self) -> None:
        factors = self.mapper().transformed_grads(self.left())
        first = next(iter(factors))
        others = {name: value for name, value in factors.items() if name != first}
        whole = host(self.side_by_side(factors))
        for wrong, words in [
            (factors | {"no such block": factors[first]}, ["no such block"]),
            (others, [first]),
            (others | {"no such block": factors[first]}, ["no such block", first]),
            (factors | {first: factors[first][:, 1:]}, [first]),
            (factors | {first: factors[first][0, 0]}, [first]),
            (self.array(whole[:, 1:]), [whole.shape[1]]),
            (self.array(np.concatenate([whole, whole], axis=1)), [whole.shape[1]]),
        ]:
            for mode in self.modes:
                with self.refuses(ValueError, *words):
                    self.mapper().interactions_from_transformed_grads(wrong, self.right(), mode)

    def test_a_tensor_is_cut_by_the_blocks_sizes_along_any_axis(self) -> None:
        mapper = self.mapper()
        sizes = [block.op.input_size for block in mapper.composable_block_dict.values()]
        whole = self.random(2, sum(sizes), 3)
        cuts = np.cumsum(sizes)[:-1]
        for axis, dim in [(1, 1), (1, -2)]:
            pieces = dict(zip(mapper.composable_block_dict, np.split(whole, cuts, axis=axis), strict=True))
            self.assert_same_blocks(mapper._split_to_blocks(self.array(whole), dim=dim), pieces)
        last = np.moveaxis(whole, 1, -1).copy()
        pieces = dict(zip(mapper.composable_block_dict, np.split(last, cuts, axis=-1), strict=True))
        self.assert_same_blocks(mapper._split_to_blocks(self.array(last)), pieces)
        with self.refuses(ValueError, sum(sizes)):
            mapper._split_to_blocks(self.array(whole))

    def test_another_mode_is_refused_by_its_name(self) -> None:
        mapper, factors = self.mapper(), self.mapper().transformed_grads(self.left())
        for mode in ("Up", "down", None):
            with self.refuses(UnsupportedInfluenceModeError, repr(mode), "up", "perturbation"):
                mapper.interactions(self.left(), self.right(), mode)  # type: ignore[arg-type]
            with self.refuses(ValueError, repr(mode)):
                mapper.interactions_from_transformed_grads(factors, self.right(), mode)  # type: ignore[arg-type]

    def test_generators_give_what_the_others_give_one_block_at_a_time(self) -> None:
        """The first block comes although the last one cannot be computed."""
        for whole, lazy in self._verbs(self.mapper()):
            self.assert_same_blocks(OrderedDict(lazy), whole)
        mapper = self.mapper()
        last = next(reversed(mapper.composable_block_dict))
        mapper.composable_block_dict[last] = _Broken(mapper.composable_block_dict[last])
        for (whole, _), (_, lazy) in zip(self._verbs(self.mapper()), self._verbs(mapper, whole=False), strict=True):
            assert iter(lazy) is lazy
            name, value = next(lazy)
            assert name == next(iter(whole))
            self.assert_same(value, whole[name])

    def _verbs(self, mapper: BlockMapper[Any, Any], whole: bool = True) -> Iterator[tuple[Blocks, Iterator[Any]]]:
        """What each verb gives at once (if wanted), and what gives it block by block."""
        left, right = self.left(), self.right()
        factors = self.mapper().transformed_grads(left)
        none: Blocks = OrderedDict()
        yield mapper.transformed_grads(left) if whole else none, mapper.generate_transformed_grads(left)
        for mode in self.modes:
            both = left, right, mode
            yield mapper.interactions(*both) if whole else none, mapper.generate_interactions(*both)
            kept = factors, right, mode
            yield (
                mapper.interactions_from_transformed_grads(*kept) if whole else none,
                mapper.generate_interactions_from_transformed_grads(*kept),
            )


class _Broken(OperatorGradientComposition[Any, Any]):
    """A block that has its operator and its size, and cannot be computed."""

    def __init__(self, whole: OperatorGradientComposition[Any, Any]):
        super().__init__(whole.op, whole.gp)

    def transformed_grads(self, batch: Any) -> Any:
        raise AssertionError("a later block was computed before it was asked for")

    def interactions_from_transformed_grads(self, left_factors: Any, right_batch: Any, mode: Any) -> Any:
        raise AssertionError("a later block was computed before it was asked for")


def _contracted(block: Any, factors: np.ndarray, right: Batch[Any], mode: str) -> np.ndarray:
    grads = block.gp.flat_grads(right) if mode == "up" else block.gp.flat_mixed_grads(right)
    return np.einsum("nd,m...d->nm...", factors, host(grads))
