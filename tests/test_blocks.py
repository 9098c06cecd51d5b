"""Claims about named blocks of parameters."""

import numpy as np
import pytest

from headwater.blocks import Block, Layout, Parameter, Part, Piece, partition
from headwater.errors import BlockMismatch, InvalidSetting, ShapeMismatch

MODEL = [
    Parameter("scale", (2,)),
    Parameter("encoder.0.weight", (3, 4)),
    Parameter("encoder.0.bias", (3,)),
    Parameter("encoder.1.norm.weight", (3,)),
    Parameter("head.weight", (2, 3)),
    Parameter("header.weight", (5,)),
]


def names(blocks):
    return {name: [p.name for p in block.parameters] for name, block in blocks.items()}


def test_one_block_of_everything():
    assert names(partition(MODEL, "full")) == {"full": [p.name for p in MODEL]}
    assert partition(MODEL, "full")["full"].size == 2 + 12 + 3 + 3 + 6 + 5


def test_a_block_for_each_module_however_deep_and_for_the_models_own_parameters():
    blocks = partition(MODEL, "layer")
    assert [*blocks] == ["root", "encoder.0", "encoder.1.norm", "head", "header"]
    assert names(blocks)["encoder.0"] == ["encoder.0.weight", "encoder.0.bias"]


def test_a_block_for_each_parameter():
    assert names(partition(MODEL, "parameter")) == {p.name: [p.name] for p in MODEL}


def test_a_users_own_blocks_take_parameters_and_modules_in_the_order_given():
    own = {"late": ["head", "encoder.0.bias"], "early": ["scale"]}
    blocks = partition(MODEL, own)
    assert [*blocks] == ["late", "early"]
    assert names(blocks) == {"late": ["head.weight", "encoder.0.bias"], "early": ["scale"]}  # not header.weight
    assert names(partition(MODEL, {"all": ["encoder"]}))["all"] == [p.name for p in MODEL[1:4]]


def test_blocks_know_their_own_names():
    for structure in ("full", "layer", "parameter", {"mine": ["head"]}):
        assert all(block.name == name for name, block in partition(MODEL, structure).items())


@pytest.mark.parametrize("structure", ["Layer", "", None, 3, ["head"]])
def test_an_unknown_structure_is_refused(structure):
    with pytest.raises(InvalidSetting, match="'full', 'layer', 'parameter'"):
        partition(MODEL, structure)


@pytest.mark.parametrize("entry", ["no.such", "hea", "encoder.0.weigh", ""])
def test_a_name_that_no_parameter_has_is_refused(entry):
    with pytest.raises(BlockMismatch, match=f"'mine' asks for '{entry}'.*head.weight"):
        partition(MODEL, {"mine": ["scale", entry]})


@pytest.mark.parametrize("own", [{"a": ["head"], "b": ["head.weight"]}, {"a": ["encoder", "encoder.0.bias"]}])
def test_a_parameter_in_two_blocks_or_twice_in_one_is_refused(own):
    with pytest.raises(BlockMismatch, match="twice"):
        partition(MODEL, own)


def test_a_string_where_a_list_of_names_belongs_is_refused():
    with pytest.raises(InvalidSetting, match="'mine' is the string 'head'"):
        partition(MODEL, {"mine": "head"})


def test_a_block_without_parameters_is_refused():
    with pytest.raises(BlockMismatch, match="'nothing'"):
        partition(MODEL, {"mine": ["head"], "nothing": []})


# Layouts: the flat order and the order of the parts -------------------------------------------------------------------

LINEAR = Layout(
    Block("linear", (Parameter("weight", (2, 3)), Parameter("bias", (2,)))),
    (Part(Piece("weight", 0, (2, 3)), Piece("bias", 0, (2, 1))),),
)


def test_a_bias_is_the_last_column_of_its_part_and_comes_last_in_the_flat_vector():
    (matrix,) = LINEAR.split(np.arange(8.0)[None])
    np.testing.assert_array_equal(matrix[0], [[0, 1, 2, 6], [3, 4, 5, 7]])
    np.testing.assert_array_equal(LINEAR.merge([matrix])[0], np.arange(8.0))


def test_a_bias_below_its_weight_is_a_longer_column():
    norm = Layout(
        Block("norm", (Parameter("bias", (2,)), Parameter("weight", (2,)))),
        (Part(Piece("weight", 0, (2, 1)), Piece("bias", 0, (2, 1)), below=True),),
    )
    (matrix,) = norm.split(np.arange(4.0)[None])
    np.testing.assert_array_equal(matrix[0, :, 0], [2, 3, 0, 1])
    np.testing.assert_array_equal(norm.merge([matrix])[0], np.arange(4.0))


def test_a_weight_that_lies_the_other_way_is_the_same_matrix():
    other = Layout(
        Block("linear", (Parameter("weight", (3, 2)), Parameter("bias", (2,)))),
        (Part(Piece("weight", 0, (2, 3), transposed=True), Piece("bias", 0, (2, 1))),),
    )
    (matrix,) = other.split(np.arange(8.0)[None])
    np.testing.assert_array_equal(matrix[0], [[0, 2, 4, 6], [1, 3, 5, 7]])
    np.testing.assert_array_equal(other.merge([matrix])[0], np.arange(8.0))


def test_groups_are_cut_from_one_parameter_whatever_the_order_of_the_parts():
    grouped = Layout(
        Block("conv", (Parameter("weight", (4, 2)), Parameter("bias", (4,)))),
        tuple(Part(Piece("weight", 4 * g, (2, 2)), Piece("bias", 2 * g, (2, 1))) for g in (1, 0)),
    )
    last, first = grouped.split(np.arange(12.0)[None])
    np.testing.assert_array_equal(first[0], [[0, 1, 8], [2, 3, 9]])
    np.testing.assert_array_equal(last[0], [[4, 5, 10], [6, 7, 11]])
    np.testing.assert_array_equal(grouped.merge([last, first])[0], np.arange(12.0))


def test_split_and_merge_undo_each_other_for_any_number_of_rows():
    for rows in (0, 1, 5):
        flat = np.random.default_rng(0).standard_normal((rows, 8))
        np.testing.assert_array_equal(LINEAR.merge(LINEAR.split(flat)), flat)


@pytest.mark.parametrize("shape", [(1, 7), (1, 9), (2, 16), (8,), (1, 1, 8)])
def test_flat_vectors_of_another_shape_are_refused(shape):
    with pytest.raises(ShapeMismatch, match=r"'linear'.*8"):
        LINEAR.split(np.zeros(shape))


def test_sizes_add_up():
    assert LINEAR.size == LINEAR.block.size == sum(part.size for part in LINEAR.parts) == 8
    assert LINEAR.parts[0].shape == (2, 4)
    with pytest.raises(ShapeMismatch, match=r"'linear' hold 6 numbers, its parameters 8"):
        Layout(LINEAR.block, (Part(Piece("weight", 0, (2, 3))),))
