"""The converter's benchmark: the programs it times write what it says, and its checks see a difference."""

import numpy as np
import pytest

from pipeline.errors import UserError
from scripts.bench import convert as bench


@pytest.mark.ffcv
@pytest.mark.slow
def test_the_programs_and_their_checks(imagenet_sample, tmp_path, monkeypatch):
    for path in imagenet_sample[:6]:
        (tmp_path / "few" / path.parent.name).mkdir(parents=True)
        (tmp_path / "few" / path.parent.name / path.name).symlink_to(path)
    images, out = tmp_path / "images", tmp_path / "out"
    out.mkdir()
    bench.copy_images(tmp_path / "few", images, 20)
    assert len({path.stat().st_ino for path in images.glob("*/*")}) == 20
    commands = bench.commands(images, out, bench.BenchConfig(tmp_path / "few"))
    assert set(commands) == {*bench.RATIOS, *bench.RATIOS.values()}
    monkeypatch.setattr(bench, "RATIOS", {"passthrough": "ffcv_jpg"})
    assert all(bench.run(commands[name]) > 0 for name in ("passthrough", "ffcv_jpg"))
    record = bench.check(images, out)
    assert record["images"] == 20 and record["passthrough"]["kept"] == 20
    assert 0 < record["passthrough"]["mean_difference_255"] < bench.ALIKE_255

    beton = bench.open_beton(out / "passthrough.beton")
    file = np.memmap(beton.path, np.uint8, "r+")
    file[beton.offsets[7] + 15] ^= 1  # JFIF's pixel density: the same pixels
    file.flush()
    with pytest.raises(AssertionError):
        bench.check(images, out)


def test_user_errors(tmp_path):
    for flags, expected in (({"repeats": 1}, "at least 2"), ({}, "no class folders")):
        with pytest.raises(UserError, match=expected):
            bench.main(bench.BenchConfig(tmp_path, **flags))
