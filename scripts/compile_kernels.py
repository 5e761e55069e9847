"""Compiles the CPU's kernels of the loaders for this machine, so that no later program waits for it.

    python scripts/compile_kernels.py

Numba keeps the result beside the package (pipeline/compiled.py). Whatever is not there is compiled where it is first
needed, so this saves time and changes nothing else.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipeline.command import run_command
from pipeline.convert import ConvertConfig
from pipeline.convert import main as convert
from pipeline.loader import make_loader
from pipeline.loaders.parts import PartsLoader, TritonViews
from pipeline.loaders.resident import ResidentPixels
from pipeline.spec import BARLOW_TWINS_VIEWS, LoaderConfig


@dataclass(frozen=True)
class CompileConfig:
    """There is nothing to choose."""


def main(config: CompileConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "images" / "class" / "image.jpg"
        image.parent.mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(image)
        convert(ConvertConfig(Path(folder) / "one.beton", image.parents[1], workers=1))
        with make_loader(LoaderConfig(Path(folder) / "one.beton", BARLOW_TWINS_VIEWS, 32, 1, workers=1)) as loader:
            next(loader.epoch())
            assert isinstance(loader, PartsLoader)
            pixels = ResidentPixels(loader)  # decodes all at once
            TritonViews(loader).plan(0, loader.ids, pixels.starts)


if __name__ == "__main__":
    run_command(CompileConfig, main)
