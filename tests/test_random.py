"""Claims about the counter-based random numbers: they are Philox, uniform, and belong to rows, never to batches."""

from hashlib import blake2b

import numpy as np
import pytest

from headwater.random import (
    PROJECTION_VERSION,
    normals,
    philox,
    row_keys,
    row_normals,
    row_uniforms,
    signs,
    words,
)

# Random123's known answers, tests/kat_vectors: philox4x32, 10 rounds.
KNOWN = {
    "zero": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


@pytest.mark.parametrize("counter, key, words", KNOWN.values(), ids=KNOWN)
@pytest.mark.parametrize("dtype", [np.uint32, np.uint64, np.int64])
def test_philox_gives_the_published_words(counter, key, words, dtype):
    got = philox(np.array(counter, dtype=dtype), key)
    assert got.dtype == np.uint32
    assert [*got] == [*words]


def test_philox_of_many_counters_is_that_of_each():
    counters = np.array([[counter] for counter, *_ in KNOWN.values()], dtype=np.uint64)
    got = philox(counters, (3, 4))
    assert got.shape == (3, 1, 4)
    for k in range(3):
        np.testing.assert_array_equal(got[k, 0], philox(counters[k, 0], (3, 4)))


KEYS = np.random.default_rng(0).integers(0, 2**64, size=2000, dtype=np.uint64)


def test_uniforms_have_the_moments_of_uniforms_and_no_correlations():
    u = row_uniforms(KEYS, 20, draw=0, seed=0)
    assert u.shape == (2000, 20, 2)
    assert (u > 0).all() and (u < 1).all()
    for power in (1, 2, 3, 4):
        deviation = np.sqrt(1 / (2 * power + 1) - 1 / (power + 1) ** 2)
        assert abs(np.mean(u**power) - 1 / (power + 1)) < 4 * deviation / np.sqrt(u.size)
    first, second, shifted = u[..., 0] - 0.5, u[..., 1] - 0.5, np.roll(u[..., 0], 1, axis=1) - 0.5
    for other in (second, shifted, np.roll(first, 1, axis=0)):
        assert abs(np.mean(first * other)) < 4 / 12 / np.sqrt(first.size)


def test_uniforms_fill_all_their_bits():
    """Each of the 52 leading bits is one half of the time."""
    bits = np.floor(row_uniforms(KEYS, 5, draw=0, seed=0).ravel() * 2.0**52).astype(np.uint64)
    shares = [float(np.mean((bits >> np.uint64(k)) & np.uint64(1))) for k in range(52)]
    assert max(abs(share - 0.5) for share in shares) < 4.5 * 0.5 / np.sqrt(bits.size)


def test_normals_have_the_moments_of_normals():
    z = row_normals(KEYS, 20, draw=0, seed=0)
    assert z.shape == (2000, 20)
    for power, mean, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(np.mean(z**power) - mean) < 4 * np.sqrt(variance / z.size)


@pytest.mark.parametrize("numbers", [row_uniforms, row_normals])
def test_numbers_depend_on_the_row_the_draw_the_seed_and_the_position_and_on_nothing_else(numbers):
    whole = numbers(KEYS[:50], 8, draw=3, seed=7)
    shuffled = np.random.default_rng(1).permutation(50)
    np.testing.assert_array_equal(numbers(KEYS[shuffled], 8, draw=3, seed=7), whole[shuffled])
    np.testing.assert_array_equal(numbers(KEYS[:50], 3, draw=3, seed=7), whole[:, :3])
    for other in ({"draw": 4, "seed": 7}, {"draw": 3, "seed": 8}, {"draw": 3, "seed": 7 + 2**32}):
        assert not (numbers(KEYS[:50], 8, **other) == whole).any()
    assert np.unique(whole).size == whole.size


@pytest.mark.parametrize("word", [0, 0xFFFFFFFF])
def test_the_least_and_the_largest_words_give_numbers_inside_the_open_interval(monkeypatch, word):
    """A uniform of zero or one would make a normal infinite."""
    monkeypatch.setattr("headwater.random.philox", lambda counter, key: np.full(counter.shape, word, dtype=np.uint32))
    u = row_uniforms(KEYS[:1], 1, draw=0, seed=0)
    assert (u > 0).all() and (u < 1).all()
    assert np.isfinite(row_normals(KEYS[:1], 1, draw=0, seed=0)).all()


def test_both_halves_of_a_key_count():
    keys = np.array([5, 5 + 2**32, 5 + 2**63], dtype=np.uint64)
    assert np.unique(row_uniforms(keys, 1, draw=0, seed=0)[:, 0, 0]).size == 3


# Keys of rows ---------------------------------------------------------------------------------------------------------


def columns(n=40):
    rng = np.random.default_rng(2)
    return [
        rng.standard_normal((n, 3, 2)),
        rng.standard_normal((n, 5)).astype(np.float32),  # 20 bytes a row: not a whole number of words
        rng.integers(0, 9, size=n),
        rng.integers(0, 2, size=(n, 3)).astype(bool),
    ]


def test_a_rows_key_is_the_same_in_every_batch_and_order():
    whole = row_keys(columns())
    assert whole.dtype == np.uint64
    for index in (slice(0, 1), slice(7, 20), slice(None, None, -1), np.array([3, 3, 0])):
        np.testing.assert_array_equal(row_keys([column[index] for column in columns()]), whole[index])


def test_rows_that_differ_in_one_number_have_other_keys():
    whole = row_keys(columns())
    assert np.unique(whole).size == len(whole)
    for k, column in enumerate(columns()):
        changed = columns()
        flat = changed[k].reshape(len(column), -1)
        flat[:, -1] = ~flat[:, -1] if flat.dtype == bool else flat[:, -1] + 1
        assert not (row_keys(changed) == whole).any()


def test_keys_tell_columns_and_positions_apart():
    a, b = np.arange(20.0), np.arange(20.0) + 0.5
    both = row_keys([a, b])
    assert not (row_keys([b, a]) == both).any()
    assert not (row_keys([np.stack([a, b], axis=1)]) == row_keys([np.stack([b, a], axis=1)])).any()
    assert not (row_keys([a]) == row_keys([a, np.zeros(20)])).any()


def test_equal_rows_have_equal_keys():
    column = np.array([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]])
    first, second, third = row_keys([column])
    assert first == third != second


def test_keys_of_similar_rows_look_random():
    """Consecutive integers: every bit of the keys is one half of the time."""
    keys = row_keys([np.arange(20_000)])
    shares = [float(np.mean((keys >> np.uint64(k)) & np.uint64(1))) for k in range(64)]
    assert max(abs(share - 0.5) for share in shares) < 4.5 * 0.5 / np.sqrt(keys.size)


# Numbers of named matrices --------------------------------------------------------------------------------------------


GOLDEN = {
    "signs": [[-1, 1, -1, 1, 1, 1, 1, 1], [1, -1, -1, -1, 1, 1, -1, -1]],
    "normals": [
        [0.6659964669690004, 0.4776071451064451, -1.100995669177836],
        [0.3394588133487111, 0.65047367339642, 1.182704262736339],
    ],
    "words": [[3013503040, 4051214642, 4099619102, 55052374], [3550161649, 3518997398, 256481174, 4234522620]],
}


def test_named_numbers_are_those_of_this_version_for_ever():
    """Stored runs depend on them: if this fails, PROJECTION_VERSION has to change."""
    assert PROJECTION_VERSION == 1
    assert signs("fc.weight", range(2), range(8), seed=0).tolist() == GOLDEN["signs"]
    np.testing.assert_allclose(normals("fc.weight", range(2), 3, seed=0), GOLDEN["normals"], rtol=1e-14)
    assert words("fc.weight", range(2), seed=0).tolist() == GOLDEN["words"]


def test_signs_are_the_bits_of_philox():
    """Entry (r, c): bit c % 32 of word (c % 128) // 32 of the block with the counter (c // 128, 0, r, 0)."""
    got = signs("a", range(3), range(400), seed=5)
    digest = blake2b(b"1/5/a", digest_size=8).digest()
    key = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
    for r, c in [(0, 0), (0, 31), (1, 32), (2, 127), (2, 128), (1, 399)]:
        word = int(philox(np.array([c // 128, 0, r, 0]), key)[(c % 128) // 32])
        assert got[r, c] == (1 if (word >> (c % 32)) & 1 else -1)


def test_any_cut_of_a_named_matrix_is_the_same():
    whole = signs("a", range(40), range(500), seed=1)
    assert whole.dtype == np.int8
    for rows, columns in [(range(3, 9), range(130, 260)), (range(1), range(1)), (range(39, 40), range(127, 500))]:
        cut = signs("a", rows, columns, seed=1)
        np.testing.assert_array_equal(cut, whole[rows.start : rows.stop, columns.start : columns.stop])
    numbers = normals("a", range(40), 9, seed=1)
    np.testing.assert_array_equal(normals("a", range(7, 20), 5, seed=1), numbers[7:20, :5])
    np.testing.assert_array_equal(words("a", range(7, 20), seed=1), words("a", range(40), seed=1)[7:20])


def test_many_blocks_are_drawn_as_each_is(monkeypatch):
    few = signs("a", range(5), range(700), seed=0), normals("a", range(50), 7, seed=0)
    monkeypatch.setattr("headwater.random._BLOCKS_AT_ONCE", 3)
    np.testing.assert_array_equal(signs("a", range(5), range(700), seed=0), few[0])
    np.testing.assert_array_equal(normals("a", range(50), 7, seed=0), few[1])


@pytest.mark.parametrize(
    "numbers",
    [
        lambda name, seed: signs(name, range(100), range(300), seed=seed).astype(float),
        lambda name, seed: normals(name, range(100), 300, seed=seed),
        lambda name, seed: words(name, range(10_000), seed=seed) / 2.0**31 - 1,
    ],
    ids=["signs", "normals", "words"],
)
def test_streams_of_other_names_and_seeds_and_other_entries_are_independent(numbers):
    first = numbers("a", 0)
    streams = [numbers("b", 0), numbers("a", 1), numbers("a", 2**40), np.roll(first, 1, 0), np.roll(first, 1, 1)]
    for other in streams:
        correlation = np.mean(first * other) / np.mean(first**2)
        assert abs(correlation) < 4.5 / np.sqrt(first.size)
    assert abs(np.mean(first)) < 4.5 * np.std(first) / np.sqrt(first.size)


def test_named_normals_have_the_moments_of_normals():
    z = normals("a", range(3000), 20, seed=0)
    for power, mean, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(np.mean(z**power) - mean) < 4 * np.sqrt(variance / z.size)
    pairs = np.corrcoef(z[:, 0::2].ravel() ** 2, z[:, 1::2].ravel() ** 2)[0, 1]
    assert abs(pairs) < 4.5 / np.sqrt(z.size / 2)
