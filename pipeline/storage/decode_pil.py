"""One stored image as Pillow decodes it: for the reference and for pictures that people look at."""

import io

import numpy as np
from PIL import Image

from pipeline.errors import BAD_BYTES, UserError
from pipeline.storage.beton import MODE_RAW, Stored, jpeg_bytes


def decode_pil(beton: Stored, sample: int) -> Image.Image:
    """The stored image as RGB. Raises UserError, with the file's name, if it is not the image the table says."""
    height, width = int(beton.heights[sample]), int(beton.widths[sample])
    stored = jpeg_bytes(beton, sample)
    try:
        if beton.modes[sample] == MODE_RAW:
            return Image.fromarray(np.asarray(stored).reshape(height, width, 3))
        image = Image.open(io.BytesIO(stored.tobytes()), formats=("JPEG",)).convert("RGB")
        if image.size != (width, height):
            raise ValueError(f"it is {image.size} px, the table says {(width, height)}")
    except (*BAD_BYTES, OSError, SyntaxError) as error:
        raise UserError(
            f"image {sample} of {beton.path} ({beton.file_names()[sample]}) cannot be decoded: {error};"
            " convert the dataset again"
        ) from None
    return image
