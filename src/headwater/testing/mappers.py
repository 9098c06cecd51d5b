"""The contract of block mappers: named blocks in order, scores by block, and factors that can be kept for later."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
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

    def mapper(self) -> BlockMapper[Any, Any, Any]:
        """A hook: the mapper under test, of at least two blocks, made anew; no operator a multiple of the identity."""
        raise NotImplementedError

    def left(self) -> Batch[Any]:
        """A hook: more rows than the right batch has."""
        raise NotImplementedError

    def right(self) -> Batch[Any]:
        """A hook."""
        raise NotImplementedError

    def slow_interactions(self, left: Batch[Any], right: Batch[Any], mode: str) -> dict[str, np.ndarray]:
        """Contracted by NumPy; a block whose operator has a form of its own by that form, between gradients."""
        found = self.slow_from_factors(left, right, mode)
        for name, block in self.mapper().composable_block_dict.items():
            form = block.op.as_bilinear_form()
            if not form.is_default_of(block.op):
                found[name] = host(form.inner_prod(block.gp.flat_grads(left), _met(block, right, mode)))
        return found

    def slow_from_factors(self, left: Batch[Any], right: Batch[Any], mode: str) -> dict[str, np.ndarray]:
        """Contracted by NumPy."""
        found = {}
        for name, block in self.mapper().composable_block_dict.items():
            factors = host(block.op.apply(block.gp.flat_grads(left)))
            found[name] = np.einsum("nd,m...d->nm...", factors, host(_met(block, right, mode)))
        return found

    def assert_same_blocks(self, got: object, expected: dict[str, Any]) -> None:
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
            expected = self.slow_from_factors(self.left(), self.right(), mode)
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
            (factors | {first: self.array(host(factors[first])[:, 1:])}, [first]),
            (factors | {first: self.array(host(factors[first])[0])[0]}, [first]),
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
                mapper.interactions(self.left(), self.right(), mode)
            with self.refuses(ValueError, repr(mode)):
                mapper.interactions_from_transformed_grads(factors, self.right(), mode)

    def test_generators_give_the_blocks_tensors_in_order_one_at_a_time(self) -> None:
        """Tensors alone, without names; and the first block comes although the last one cannot be computed."""
        for whole, lazy in self._verbs(self.mapper()):
            tensors = list(lazy)
            assert len(tensors) == len(whole)
            for tensor, expected in zip(tensors, whole.values(), strict=True):
                self.assert_same(tensor, host(expected))
        mapper = self.mapper()
        last = next(reversed(mapper.composable_block_dict))
        mapper.composable_block_dict[last] = _Broken(mapper.composable_block_dict[last])
        for (whole, _), (_, lazy) in zip(self._verbs(self.mapper()), self._verbs(mapper, whole=False), strict=True):
            assert iter(lazy) is lazy
            self.assert_same(next(lazy), host(next(iter(whole.values()))))

    def test_what_gives_dicts_follows_an_overridden_generator(self) -> None:
        """Its tensors as they are, named in the order of the blocks by `_to_ordered_dict`."""
        verbs: dict[str, Callable[[Any], Any]] = {
            "transformed_grads": lambda mapper: mapper.transformed_grads(self.left()),
            "interactions": lambda mapper: mapper.interactions(self.left(), self.right(), "up"),
            "interactions_from_transformed_grads": lambda mapper: mapper.interactions_from_transformed_grads(
                self.left(), self.right(), "up"
            ),
        }
        for verb, asked in verbs.items():
            mapper, named = self.mapper(), list[Any]()
            given = [object() for _ in mapper.composable_block_dict]
            name_them = mapper._to_ordered_dict
            mapper._to_ordered_dict = lambda g, name_them=name_them, named=named: named.append(g) or name_them(g)  # type: ignore
            setattr(mapper, f"generate_{verb}", lambda *_, given=given: (tensor for tensor in given))
            got = asked(mapper)
            assert isinstance(got, OrderedDict)
            assert [*got] == [*mapper.composable_block_dict]
            assert all(one is other for one, other in zip(got.values(), given, strict=True))
            assert len(named) == 1, "the names do not come from _to_ordered_dict"
            with self.refuses(ValueError, len(given) + 1, *mapper.composable_block_dict):
                name_them(tensor for tensor in [*given, given[0]])

    def test_no_factors_give_no_rows_of_interactions(self) -> None:
        if not self.has_empty_arrays:
            return
        factors = self.mapper().transformed_grads(self.left())
        none = {name: self.array(host(factor)[:0]) for name, factor in factors.items()}
        for mode in self.modes:
            expected = {name: v[:0] for name, v in self.slow_from_factors(self.left(), self.right(), mode).items()}
            got = self.mapper().interactions_from_transformed_grads(none, self.right(), mode)
            self.assert_same_blocks(got, expected)

    def _verbs(self, mapper: BlockMapper[Any, Any, Any], whole: bool = True) -> Iterator[tuple[Blocks, Iterator[Any]]]:
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


class _Broken(OperatorGradientComposition[Any, Any, Any, Any]):
    """A block that has its operator and its size, and cannot be computed."""

    def __init__(self, whole: OperatorGradientComposition):
        super().__init__(whole.op, whole.gp)

    def transformed_grads(self, batch: Batch) -> Any:
        raise AssertionError("a later block was computed before it was asked for")

    def interactions_from_transformed_grads(self, left_factors: object, right_batch: Batch, mode: object) -> Any:
        raise AssertionError("a later block was computed before it was asked for")


def _met(block: Any, right: Batch[Any], mode: str) -> Any:
    """What the left side meets: gradients, or mixed ones."""
    return block.gp.flat_grads(right) if mode == "up" else block.gp.flat_mixed_grads(right)
