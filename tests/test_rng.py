"""Philox4x32-10 against the published vectors, and its two implementations against each other."""

import numpy as np
import pytest

from pipeline.choices.rng import DOMAIN_ORDER, DOMAIN_VIEWS, philox4x32, uniform4, words_array
from tests.philox import philox4x32_array

# Random123 1.14, tests/kat_vectors, "philox4x32 10": counter, key, expected.
ONES = 0xFFFFFFFF
PUBLISHED = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), PUBLISHED)
def test_published_vectors(counter, key, expected):
    assert tuple(int(word) for word in philox4x32(*counter, *key)) == expected
    assert tuple(philox4x32_array(np.array(counter, np.uint32), np.array(key, np.uint32))) == expected


def test_numba_and_numpy_give_the_same_bits():
    words = np.random.default_rng(0).integers(0, 2**32, (1000, 6), np.uint32)
    arrays = philox4x32_array(words[:, :4], words[:, 4:])
    for row, expected in zip(words, arrays, strict=True):
        assert tuple(philox4x32(*row)) == tuple(expected)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
def test_words_of_an_array(seed):
    """Every word of many samples, against NumPy's generator with the counter and key as rng.py describes them."""
    samples = np.concatenate([np.arange(1000), [2**31, 2**32 - 1]])
    counter = np.stack([np.full_like(samples, n) for n in (3, 1 | DOMAIN_ORDER << 16, 0, 5)], -1)
    counter[:, 2] = samples
    expected = philox4x32_array(counter, np.array([seed & ONES, seed >> 32]))
    assert np.array_equal(words_array(seed, DOMAIN_ORDER, 5, samples, 1, 3), expected)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
def test_uniforms_are_the_words_over_2_to_the_32(seed):
    samples = np.array([0, 1, 77, 2**31, 2**32 - 1])
    words = words_array(seed, DOMAIN_VIEWS, 5, samples, 1, 3)
    for sample, expected in zip(samples, words, strict=True):
        assert np.array_equal(np.array(uniform4(seed, DOMAIN_VIEWS, 5, sample, 1, 3)), expected / 2.0**32)


def test_every_coordinate_of_a_draw_changes_it():
    base = dict(seed=3, domain=DOMAIN_VIEWS, epoch=4, sample=5, view=0, block=6)
    changes = [{}, {"seed": 4}, {"seed": 3 + 2**32}, {"domain": DOMAIN_ORDER}, {"epoch": 5}, {"sample": 6}]
    changes += [{"view": 1}, {"block": 7}]
    draws = {tuple(uniform4(*(base | change).values())) for change in changes}
    assert len(draws) == len(changes)


def test_uniforms_lie_in_the_unit_interval_and_fill_it():
    words = words_array(0, DOMAIN_VIEWS, 0, np.arange(100_000), 0, 0) / 2.0**32
    assert words.min() >= 0 and words.max() < 1
    counts = np.stack([np.histogram(column, 100, (0, 1))[0] for column in words.T])
    chi_square = ((counts - 1000) ** 2 / 1000).sum(1)
    assert (chi_square < 99 + 4 * np.sqrt(2 * 99)).all()
    assert np.abs(np.corrcoef(words.T) - np.eye(4)).max() < 4 / np.sqrt(len(words))
