"""Claims about segments: numbers come back as they were rounded, others can read the file, damage is named."""

import damage
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.errors import DamagedFile, InvalidSetting
from headwater.store import segments
from headwater.store.segments import Segment, checked_dtype, from_bfloat16, to_bfloat16, to_int8, write_segment

RNG = np.random.default_rng(0)
VALUES = RNG.standard_normal((7, 5)).astype(np.float32)
CUBE = RNG.standard_normal((7, 2, 3)).astype(np.float32) * 10.0 ** RNG.integers(-6, 6, (7, 1, 1)).astype(np.float32)


def written(file, dtype="float32", **options):
    arrays = {"keys": np.arange(7, dtype=np.uint64) + 2**63, "weights": np.linspace(0, 1, 7)}
    about = {"rows": 7, "groups": options.get("groups", {})}
    numbers = {"flat": VALUES, "cube": CUBE}
    return write_segment(file, "here", about, arrays, numbers, dtype, options.get("groups"))


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40))
def test_bfloat16_is_the_nearest(values):
    given = np.array(values, dtype=np.float32)
    torch = pytest.importorskip("torch")
    found = from_bfloat16(to_bfloat16(given))
    np.testing.assert_array_equal(found, torch.from_numpy(given).bfloat16().float().numpy())


@given(
    n=st.integers(0, 5),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    scale=st.integers(-40, 30),
    seed=st.integers(0, 99),
)
def test_int8_is_off_by_half_a_scale_of_its_row_and_array(n, sizes, scale, seed):
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal((n, sum(sizes))) * 10.0**scale).astype(np.float32)
    values[: n // 2, : sizes[0]] = 0
    ends = np.cumsum(sizes).tolist()
    found, scales = to_int8(values, ends)
    spread = np.repeat(scales, sizes, axis=1).astype(np.float64)
    assert found.dtype == np.int8 and scales.shape == (n, len(sizes))
    tiny = np.finfo(np.float32).tiny
    assert (np.abs(found * spread - values) <= 0.5001 * spread + 127 * tiny).all()


@pytest.mark.parametrize("dtype, off", [("float32", 0), ("float64", 0), ("bfloat16", 2**-8), ("int8", 1 / 254)])
def test_what_is_read_is_what_was_written(dtype, off, tmp_path):
    file = tmp_path / "a.safetensors"
    checksum = written(file, dtype, groups={"flat": [2, 5]})
    found = Segment.open(file)
    assert found.checksum == checksum and found.rows == 7 and found.is_of("here") and not found.is_of("there")
    np.testing.assert_array_equal(found.raw("keys"), np.arange(7, dtype=np.uint64) + 2**63)
    np.testing.assert_array_equal(found.raw("weights"), np.linspace(0, 1, 7))
    for name, values in (("flat", VALUES), ("cube", CUBE)):
        largest = np.abs(values).max(axis=tuple(range(1, values.ndim)), keepdims=True)
        assert (np.abs(found.numbers(name) - values) <= off * largest * 1.0001).all()
        np.testing.assert_array_equal(found.numbers(name, slice(2, 5)), found.numbers(name)[2:5])
    queries = RNG.standard_normal((5, 3)).astype(np.float32)
    np.testing.assert_allclose(found.product("flat", queries), found.numbers("flat") @ queries, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        found.product("flat", queries, slice(1, 4)), (found.numbers("flat") @ queries)[1:4], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_others_read_it_as_safetensors(dtype, tmp_path):
    load = pytest.importorskip("safetensors.torch").load_file
    written(tmp_path / "a.safetensors", dtype)
    found, mine = load(tmp_path / "a.safetensors"), Segment.open(tmp_path / "a.safetensors")
    flat = found["flat"].float().numpy()
    flat = flat * found["flat.scale"].numpy() if dtype == "int8" else flat
    np.testing.assert_allclose(flat, mine.numbers("flat"), rtol=1e-6)


def test_rows_left_out_are_not_in_the_bytes(tmp_path):
    written(tmp_path / "a.safetensors")
    found = Segment.open(tmp_path / "a.safetensors")
    found.without([1, 4], tmp_path / "b.safetensors", "there", {"positions": np.arange(7)})
    rest = Segment.open(tmp_path / "b.safetensors")
    np.testing.assert_array_equal(rest.raw("positions"), [0, 2, 3, 5, 6])
    np.testing.assert_array_equal(rest.numbers("cube"), CUBE[[0, 2, 3, 5, 6]])
    assert rest.rows == 5 and VALUES[4].tobytes() not in (tmp_path / "b.safetensors").read_bytes()


def test_damage_anywhere_is_found_and_named(tmp_path):
    file = tmp_path / "a.safetensors"
    written(file)
    whole = file.read_bytes()
    for change in damage.damages(np.linspace(0, 0.9999, 60)).values():
        now = change(whole)
        file.unlink(missing_ok=True)
        if now is not None:
            file.write_bytes(now)
        with pytest.raises(DamagedFile, match=r"a\.safetensors"):
            Segment.open(file)
    for made_up in (b"\x10" + bytes(7) + b'{"a": [[[[[[[[[', (2).to_bytes(8, "little") + b"[]", b"\xff" * 40):
        file.write_bytes(made_up)
        with pytest.raises(DamagedFile, match=r"a\.safetensors"):
            Segment.open(file)


@pytest.mark.parametrize("change", ["two signs flipped", "two rows exchanged"])
def test_damage_that_keeps_sums_is_found(change, tmp_path):
    """A sum of 64-bit words is the same after either."""
    file, values = tmp_path / "a.safetensors", RNG.standard_normal((512, 4)).astype(np.float32)
    write_segment(file, "here", {"rows": 512}, {}, {"flat": values}, "float32")
    found = Segment.open(file)
    content, start = bytearray(file.read_bytes()), file.stat().st_size - found.nbytes
    flat = np.frombuffer(content, dtype=np.float32, offset=start).reshape(512, 4)
    if change == "two signs flipped":
        flat[7, 1] *= -1
        flat[9, 3] *= -1
    else:
        flat[[7, 9]] = flat[[9, 7]]
    file.write_bytes(content)
    with pytest.raises(DamagedFile, match="checksum"):
        Segment.open(file, check=True)


def test_the_first_product_of_a_process_uses_the_whole_buffer_of_blas_once(tmp_path):
    segments.warm_up_blas.cache_clear()
    file = tmp_path / "a.safetensors"
    written(file)
    for _ in range(3):
        Segment.open(file).product("flat", np.ones((5, 2), dtype=np.float32))
    assert segments.warm_up_blas.cache_info().misses == 1


def test_a_file_that_was_checked_is_checked_again_once_it_changes(tmp_path):
    file = tmp_path / "a.safetensors"
    written(file)
    Segment.open(file)
    content = bytearray(file.read_bytes())
    content[-1] ^= 4
    file.write_bytes(content)
    with pytest.raises(DamagedFile):
        Segment.open(file)
    with pytest.raises(InvalidSetting, match="'float16'"):
        checked_dtype("float16")
