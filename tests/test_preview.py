"""The picture of the views."""

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import UserError
from pipeline.preview import GAP_PX, HEADER_PX, PreviewConfig, main


def test_the_picture_shows_views_and_no_difference(small_beton, tmp_path, capsys):
    main(PreviewConfig(data=small_beton, out=tmp_path / "views.png", images=3, resolution=160))
    assert "3 images, largest difference to Pillow 0 of 255" in capsys.readouterr().out
    sheet = np.asarray(Image.open(tmp_path / "views.png"))
    step = 160 + GAP_PX
    assert sheet.shape == (HEADER_PX + 3 * step, 7 * step + GAP_PX, 3)

    def cell(row, column):
        top, left = HEADER_PX + row * step, GAP_PX + column * step
        return sheet[top : top + 160, left : left + 160]

    for row in range(3):
        for view in range(2):
            ours, pillows, difference = (cell(row, 1 + 3 * view + k) for k in range(3))
            assert np.array_equal(ours, pillows)
            assert not difference.any()
            assert ours.std() > 0


def test_user_errors(small_beton, tmp_path):
    with pytest.raises(UserError, match="at least 1"):
        main(PreviewConfig(data=small_beton, images=0))
    with pytest.raises(UserError, match="cannot be written"):
        main(PreviewConfig(data=small_beton, images=1, out=tmp_path / "nowhere" / "views.png"))
    with pytest.raises(UserError, match="missing"):
        main(PreviewConfig(data=tmp_path))
