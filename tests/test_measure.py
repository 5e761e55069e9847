"""What the benchmarks share: turns, intervals, differences, the machine's name."""

import json
import platform

import numpy as np
import pytest
from measure import as_text, class_images, difference_summary, in_turn, interval, machine, write_json

from pipeline.errors import UserError


def test_interval_against_the_table_of_students_t():
    found = interval([10.0, 12.0, 14.0])
    assert found == {"mean": 12.0, "ci95": round(4.302653 * 2 / np.sqrt(3), 4)}
    assert interval([1.23456], 2) == {"mean": 1.23, "ci95": None}
    assert as_text(found, 1) == "12.0 ± 5.0" and as_text(interval([3.0])) == "3.000"


@pytest.mark.parametrize("warm_up", [True, False])
def test_candidates_run_in_turn(warm_up):
    """a, b, a, b, …; the first round is not counted, and each repeat shows what there is so far."""
    ran = []

    def work(name: str) -> int:
        ran.append(name)
        return len(ran)

    turns = in_turn({"a": lambda: work("a"), "b": lambda: work("b")}, repeats=2, warm_up=warm_up)
    first = 2 * warm_up
    assert next(turns) == {"a": [first + 1], "b": [first + 2]}
    (found,) = turns
    assert found == {"a": [first + 1, first + 3], "b": [first + 2, first + 4]}
    assert "".join(ran) == "ab" * (2 + warm_up)


def test_differences_of_known_values():
    counts = np.bincount([0, 0, 0, 10], minlength=256)
    found = difference_summary(counts)
    expected = {"values": 4, "values_that_differ": 1, "mean_difference_255": 2.5, "largest_difference_255": 10}
    assert found == expected


def test_files_records_and_the_machine(tmp_path):
    with pytest.raises(UserError, match="has no class folders with images"):
        class_images(tmp_path)
    for name in ("b/2.jpg", "a/1.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    assert class_images(tmp_path) == [tmp_path / "a" / "1.jpg", tmp_path / "b" / "2.jpg"]
    write_json(None, {})
    write_json(tmp_path / "record.json", {"machine": machine("numpy")})
    said = json.loads((tmp_path / "record.json").read_text())["machine"]
    assert said.endswith(f" CPUs, Python {platform.python_version()}, numpy {np.__version__}")
