"""Shows what the network sees: both views of a few samples, the fast kernels beside Pillow, as one PNG.

    python -m pipeline.preview --data data/imagenet --out views.png
    python -m pipeline.preview --data data/cifar10 --views cifar10 --resolution 32 --out views.png

A row is a sample: the stored image, then for every view the fast kernels' pixels, Pillow's, and their absolute
difference × 8, which is black where they agree. The sums are printed as well.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.choices.draws import draw_views
from pipeline.command import DATA, run_command
from pipeline.errors import UserError
from pipeline.spec import BARLOW_TWINS_VIEWS, CIFAR_VIEWS, ViewSpec
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
    beton: Beton, sample: int, views: tuple[ViewSpec, ...], config: PreviewConfig
) -> tuple[Image.Image, list[np.ndarray], list[np.ndarray]]:
    """The stored image, and its views by the kernels and by Pillow, each (H, W, 3) uint8."""
    image = decode_pil(beton, sample)
    heights, widths = beton.heights[[sample]], beton.widths[[sample]]
    params = draw_views(config.seed, config.epoch, np.array([sample]), heights, widths, views, config.resolution)
    scratch = make_scratch(int(heights[0]), int(widths[0]), config.resolution)
    fast, reference = [], []
    for v, view in enumerate(views):
        out = np.empty((config.resolution, config.resolution, 3), np.uint8)
        bicubic = view.interpolation == "bicubic"
        apply_view(np.ascontiguousarray(image), params, 0, v, bicubic, UNCHANGED, scratch, out)
        fast.append(out)
        reference.append(np.asarray(apply_view_pil(image, params, 0, v, view.interpolation, config.resolution)))
    return image, fast, reference


def picture(pixels: np.ndarray | Image.Image, cell_px: int) -> Image.Image:
    """Fitted into a cell: views by whole enlargement, so that their pixels stay what they are; images shrunk."""
    if isinstance(pixels, Image.Image):
        scale = cell_px / max(pixels.size)
        size = [max(1, round(side * scale)) for side in pixels.size]
        return pixels.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC)
    image = Image.fromarray(pixels)
    return image.resize((cell_px, cell_px), Image.Resampling.NEAREST)


def draw_grid(rows: list[list[np.ndarray | Image.Image]], titles: list[str], cell_px: int) -> Image.Image:
    """All cells on one sheet, the titles above their columns."""
    step = cell_px + GAP_PX
    sheet = Image.new("RGB", (len(titles) * step + GAP_PX, HEADER_PX + len(rows) * step), (28, 28, 30))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, title in enumerate(titles):
        pen.text((GAP_PX + column * step + cell_px // 2, HEADER_PX // 2), title, (235, 235, 235), font, anchor="mm")
    for row, cells in enumerate(rows):
        for column, cell in enumerate(cells):
            shown = picture(cell, cell_px)
            left = GAP_PX + column * step + (cell_px - shown.width) // 2
            sheet.paste(shown, (left, HEADER_PX + row * step + (cell_px - shown.height) // 2))
    return sheet


def main(config: PreviewConfig) -> None:
    if config.images < 1 or config.resolution < 1:
        raise UserError(f"--images {config.images} --resolution {config.resolution}: both must be at least 1")
    beton = open_beton(config.data if config.data.suffix == ".beton" else config.data / "train.beton")
    views = VIEWS[config.views]
    samples = np.unique(np.linspace(0, len(beton) - 1, config.images).astype(int))
    rows, apart = [], []
    for sample in samples:
        image, fast, reference = views_of(beton, int(sample), views, config)
        cells: list[np.ndarray | Image.Image] = [image]
        for ours, pillows in zip(fast, reference, strict=True):
            difference = np.abs(ours.astype(int) - pillows)
            apart.append(difference)
            cells += [ours, pillows, np.minimum(difference * GAIN, 255).astype(np.uint8)]
        rows.append(cells)
    titles = ["stored"]
    for number in range(1, len(views) + 1):
        titles += [f"view {number}", f"view {number}, Pillow", f"difference x{GAIN}"]
    sheet = draw_grid(rows, titles, max(CELL_PX, config.resolution))
    try:
        sheet.save(config.out, "PNG")
    except OSError as error:
        raise UserError(f"{config.out} cannot be written ({error}); give another place with --out") from error
    largest = max(int(difference.max()) for difference in apart)
    print(f"{config.out}: {len(samples)} images, largest difference to Pillow {largest} of 255")


if __name__ == "__main__":
    run_command(PreviewConfig, main)
