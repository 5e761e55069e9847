"""Shows what the network sees: both views of a few samples, the fast kernels beside Pillow, as one PNG.

    python -m pipeline.preview --data data/imagenet --out views.png
    python -m pipeline.preview --data data/cifar10 --views cifar10 --resolution 32 --out views.png

A row is a sample: the stored image, then for every view the fast kernels' pixels, Pillow's, and their absolute
difference × 8, which is black where they agree. The largest difference is printed as well.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.choices.draws import draw_views
from pipeline.command import DATA, run_command
from pipeline.errors import UserError
from pipeline.spec import BARLOW_TWINS_VIEWS, CIFAR_VIEWS
from pipeline.storage.beton import Beton, open_beton
from pipeline.storage.decode_pil import decode_pil
from pipeline.views.augment_cpu import UNCHANGED, apply_view, make_scratch
from pipeline.views.reference import apply_view_pil

VIEWS = {"imagenet": BARLOW_TWINS_VIEWS, "cifar10": CIFAR_VIEWS}
CELL_PX = 160  # side of one picture of the grid at least; small views are shown enlarged, pixel by pixel
GAP_PX = 6
HEADER_PX = 30
GAIN = 8  # of the difference, so that one level of 255 can be seen


@dataclass(frozen=True)
class PreviewConfig:
    """Draws both views of a few samples as a picture."""

    data: Path = DATA / "imagenet"
    """A .beton file, or a folder that holds train.beton."""
    out: Path = Path("views.png")
    """The PNG to write."""
    views: Literal["imagenet", "cifar10"] = "imagenet"
    """The view table: as published, or for CIFAR-10 (no blur)."""
    resolution: int = 224
    """Side of the views, px."""
    images: int = 8
    """Samples to show, spread over the file."""
    seed: int = 0
    """Decides the views."""
    epoch: int = 0
    """The epoch whose views are shown."""


def views_of(
    beton: Beton, sample: int, config: PreviewConfig
) -> tuple[Image.Image, list[tuple[np.ndarray, np.ndarray]]]:
    """The stored image, and of each view the kernels' pixels and Pillow's, both (H, W, 3) uint8."""
    image, views, side = decode_pil(beton, sample), VIEWS[config.views], config.resolution
    heights, widths = beton.heights[[sample]], beton.widths[[sample]]
    params = draw_views(config.seed, config.epoch, np.array([sample]), heights, widths, views, side)
    scratch = make_scratch(int(heights[0]), int(widths[0]), side)
    made: list[tuple[np.ndarray, np.ndarray]] = []
    for v, view in enumerate(views):
        out = np.empty((side, side, 3), np.uint8)
        bicubic = view.interpolation == "bicubic"
        apply_view(np.ascontiguousarray(image), params, 0, v, bicubic, UNCHANGED, scratch, out)
        made.append((out, np.asarray(apply_view_pil(image, params, 0, v, view.interpolation, side))))
    return image, made


def draw_grid(rows: list[list[Image.Image]], titles: list[str], cell_px: int) -> Image.Image:
    """All pictures on one sheet, each fitted into its cell, the titles above their columns."""
    step = cell_px + GAP_PX
    sheet = Image.new("RGB", (len(titles) * step + GAP_PX, HEADER_PX + len(rows) * step), (28, 28, 30))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, title in enumerate(titles):
        pen.text((GAP_PX + column * step + cell_px // 2, HEADER_PX // 2), title, (235, 235, 235), font, anchor="mm")
    for row, cells in enumerate(rows):
        for column, cell in enumerate(cells):
            scale = cell_px / max(cell.size)  # enlarged, pixels stay what they are
            size = [max(1, round(side * scale)) for side in cell.size]
            shown = cell.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC)
            left = GAP_PX + column * step + (cell_px - shown.width) // 2
            sheet.paste(shown, (left, HEADER_PX + row * step + (cell_px - shown.height) // 2))
    return sheet


def main(config: PreviewConfig) -> None:
    """Writes the picture and prints the largest difference."""
    if config.images < 1 or config.resolution < 1:
        raise UserError(f"--images {config.images} --resolution {config.resolution}: both must be at least 1")
    beton = open_beton(config.data if config.data.suffix == ".beton" else config.data / "train.beton")
    rows, largest = [], 0
    for sample in np.unique(np.linspace(0, len(beton) - 1, config.images).astype(int)):
        image, made = views_of(beton, int(sample), config)
        rows.append([image])
        for ours, pillows in made:
            difference = np.abs(ours.astype(int) - pillows)
            largest = max(largest, int(difference.max()))
            cells = (ours, pillows, np.minimum(difference * GAIN, 255).astype(np.uint8))
            rows[-1] += [Image.fromarray(pixels) for pixels in cells]
    titles = ["stored"]
    for number in range(1, len(VIEWS[config.views]) + 1):
        titles += [f"view {number}", f"view {number}, Pillow", f"difference x{GAIN}"]
    try:
        draw_grid(rows, titles, max(CELL_PX, config.resolution)).save(config.out, "PNG")
    except OSError as error:
        raise UserError(f"{config.out} cannot be written ({error}); give another place with --out") from error
    print(f"{config.out}: {len(rows)} images, largest difference to Pillow {largest} of 255")


if __name__ == "__main__":
    run_command(PreviewConfig, main)
