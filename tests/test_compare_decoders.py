"""The table of decoders: its arithmetic on known arrays, and every decoder of this machine on real images."""

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.storage.beton import open_beton
from scripts.bench import decoders


def test_differences_are_counted():
    grey = [np.full((2, 5, 3), 100, np.uint8), np.full((4, 1, 3), 250, np.uint8)]
    other = [grey[0].copy(), grey[1].copy()]
    other[1][2, 0] = (240, 250, 255)
    pairs = decoders.compare({"a": iter(grey), "b": iter(other), "c": iter(grey)})
    assert [row["decoders"] for row in pairs] == [["a", "b"], ["a", "c"], ["b", "c"]]
    found, same, _ = pairs
    assert (found["images"], found["images_that_differ"]) == (2, 1)
    assert (found["values"], found["values_that_differ"], found["largest_difference_255"]) == (42, 2, 10)
    assert found["mean_difference_255"] == pytest.approx(15 / 42, rel=1e-3)
    assert same["values_that_differ"] == same["largest_difference_255"] == same["mean_difference_255"] == 0


def test_the_decoders_of_this_machine(small_beton):
    """All on the CPU are libjpeg-turbos with the same settings: no value differs."""
    found = decoders.decoders(open_beton(small_beton))
    for row in decoders.compare(found):
        assert row["images"] == 48
        if "dali_mixed" not in row["decoders"]:
            assert row["largest_difference_255"] == 0
        else:
            assert row["mean_difference_255"] < 1


def test_user_errors(tmp_path):
    with pytest.raises(UserError, match="no class folders"):
        decoders.main(decoders.CompareConfig(tmp_path))
