"""One stored image as Pillow decodes it: for the reference and for pictures that people look at."""

import io

import numpy as np
from PIL import Image

from pipeline.errors import UserError
from pipeline.storage.beton import MODE_RAW, Beton, jpeg_bytes


def decode_pil(beton: Beton, sample: int) -> Image.Image:
    """The stored image as RGB. Raises UserError, with the file's name, where it is not the image the table says."""
    height, width = int(beton.heights[sample]), int(beton.widths[sample])
    stored = jpeg_bytes(beton, sample)
    try:
        if beton.modes[sample] == MODE_RAW:
            return Image.fromarray(np.asarray(stored).reshape(height, width, 3))
        image = Image.open(io.BytesIO(stored)).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(_damaged(beton, sample, str(error))) from None
    if image.size != (width, height):
        raise UserError(_damaged(beton, sample, f"it is {image.size} px, the table says {(width, height)}"))
    return image


def _damaged(beton: Beton, sample: int, reason: str) -> str:
    name = beton.file_names()[sample]
    return f"image {sample} of {beton.path} ({name}) cannot be decoded: {reason}; convert the dataset again"
