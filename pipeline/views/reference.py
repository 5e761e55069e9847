"""The definition of a view: torchvision's functions on Pillow images. All kernels are tested against it."""

import torchvision.transforms.functional as F
from PIL import Image, ImageFilter
from torchvision.transforms import InterpolationMode

from pipeline.choices.draws import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewParams
from pipeline.spec import SOLARIZE_THRESHOLD


def _apply_jitter_pil(image: Image.Image, p: ViewParams, b: int, v: int) -> Image.Image:
    for operation in p.jitter_order[b, v]:
        if operation == BRIGHTNESS:
            image = F.adjust_brightness(image, float(p.brightness[b, v]))
        elif operation == CONTRAST:
            image = F.adjust_contrast(image, float(p.contrast[b, v]))
        elif operation == SATURATION:
            image = F.adjust_saturation(image, float(p.saturation[b, v]))
        elif operation == HUE:
            image = F.adjust_hue(image, float(p.hue[b, v]))
    return image


def apply_view_pil(
    image: Image.Image, p: ViewParams, b: int, v: int, interpolation: str, resolution_px: int
) -> Image.Image:
    """View v of the RGB image that row b of the parameters was drawn for: the definition, on Pillow images."""
    if p.first_height[b, v]:
        size = [int(p.first_height[b, v]), int(p.first_width[b, v])]
        image = F.resize(image, size, InterpolationMode(interpolation))
    top, left, height, width = (int(a[b, v]) for a in (p.box_top, p.box_left, p.box_height, p.box_width))
    image = F.crop(image, top, left, height, width)
    size = [int(p.resized_height[b, v]), int(p.resized_width[b, v])]
    image = F.resize(image, size, InterpolationMode(interpolation))
    image = F.crop(image, int(p.window_top[b, v]), int(p.window_left[b, v]), resolution_px, resolution_px)
    if p.flip[b, v]:
        image = F.hflip(image)
    if p.jitter[b, v]:
        image = _apply_jitter_pil(image, p, b, v)
    if p.grey[b, v]:
        image = F.to_grayscale(image, 3)
    if p.sigma_px[b, v] > 0:
        image = image.filter(ImageFilter.GaussianBlur(float(p.sigma_px[b, v])))
    if p.solarize[b, v]:
        image = F.solarize(image, SOLARIZE_THRESHOLD)
    return image
