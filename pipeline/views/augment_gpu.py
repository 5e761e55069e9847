"""The views on the GPU: (pixels, params) → normalized pixels, the same integers as Pillow's, a whole batch at once.

    fill_coefficients ─▶ resize_once ─▶ start_colours ─▶ finish_colours ─▶ blur_lines ─▶ blur_lines ─▶ views
                         (resample_gpu)  columns, flip,   contrast, the     rows ×3       columns ×3,
                                         jitter up to     rest, grey;       (blurred      solarize,
                                         the contrast     unblurred views   views only)   normalize
                                                          end here

Between kernels every value has 8 bits, since Pillow rounds there: a pixel's three in an int32, which is one load, until
the colours are finished; planes (V · B, 3, side, pitch) for the blur. Contrast needs the mean of the whole picture at
its place in the drawn order: that cuts the colour operations in two. A thread has one column and some rows of a view,
so that neighbours in a row are neighbours in a warp, whatever Triton's version. No randomness.

Bytes for one image with two 224 px views, bf16, from boxes of 300 × 300 px, 1.1 of the 2 views blurred:

    kernel               reads     writes        kernel               reads     writes
    resize_once          540 kB    538 kB        blur_lines, rows     166 kB    166 kB
    start_colours        538 kB    401 kB        blur_lines, columns  166 kB    331 kB
    finish_colours       401 kB    437 kB        coefficients         20 kB, written once, read twice

3.7 MB together, of which 1.1 MB (the boxes in, the views out) no design saves: 3.8 GB for 1024 images.
"""

from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from PIL import Image

from pipeline.spec import SOLARIZE_THRESHOLD, Normalization
from pipeline.views.augment_cpu import normalization_table
from pipeline.views.blur_gpu import blur_lines
from pipeline.views.colour_gpu import finish_colours, start_colours
from pipeline.views.gpu_plan import TILE_PX, ViewPlan
from pipeline.views.resample_gpu import fill_coefficients, resize_once

# How the kernels are launched: the size of what a program makes, how far loops are unrolled, warps.
SETTINGS = {
    "fill_coefficients": {"OUTPUTS": 128},
    "resize_once": {"ROWS": 4, "LANES": 128, "TAPS": 4},
    "start_colours": {"ROWS": 8, "LANES": 128, "TAPS": 4},
    "finish_colours": {"ROWS": 8, "LANES": 128},
    "blur_lines": {"LINES": 64, "num_warps": 2},
    "look_up": {"BLOCK": 1024},
}
EXACT = {"enable_fp_fusion": False}  # Pillow is compiled without fused multiply-add
STRIDES = 28  # programs of resize_once a view
READ_PAST = 128  # coefficients behind the last, which a tile that reaches beyond the views reads and nobody uses


@triton.jit
def look_up(levels, lut, out, count, BLOCK: tl.constexpr):
    """Grid (⌈count / BLOCK⌉,): 8-bit values, channels last → what the network gets."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(levels + at, mask=at < count, other=0)
    tl.store(out + at, tl.load(lut + at % 3 * 256 + value), mask=at < count)


@lru_cache(maxsize=8)
def _lut(normalization: Normalization, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What the network gets for every 8-bit value, (2, 3, 256): plain and solarized, by channel; rounded once."""
    plain = torch.from_numpy(normalization_table(normalization))
    values = torch.arange(256)
    solarized = plain[:, torch.where(values < SOLARIZE_THRESHOLD, values, 255 - values)]
    return torch.stack([plain, solarized]).to(dtype).to(device)


@lru_cache(maxsize=8)
def _exact_hues(device: torch.device) -> torch.Tensor:
    """Uint8 (256,): 1 if a hue of exactly k / 255 of the circle is k - 1 to Pillow, after its roundings."""
    sixths = 6 * np.arange(255)
    rest, full, none = sixths % 255, np.full(255, 255), np.zeros(255, int)
    ways = [(full, rest, none), (255 - rest, full, none), (none, full, rest)]
    ways += [(none, 255 - rest, full), (rest, none, full), (full, none, 255 - rest)]
    colours = np.stack([np.choose(sixths // 255, channel) for channel in zip(*ways, strict=True)], -1)
    hues = np.asarray(Image.fromarray(colours[None].astype(np.uint8)).convert("HSV"))[0, :, 0]
    return torch.from_numpy(np.append(np.arange(255) - hues, 0).astype(np.uint8)).to(device)


def make_views(
    pixels: torch.Tensor, plan: ViewPlan, normalization: Normalization, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, ...]:
    """All views of a batch: V tensors (B, 3, H, W), channels-last in memory, of `dtype`, on the device of `pixels`.

    `pixels` is the flat uint8 buffer that plan_views planned for; the plan's table must be on the same device.
    Everything is queued on the current stream and nothing waits. Raises ValueError for tensors of another kind,
    and on a CPU without Triton's interpreter.
    """
    device, side = pixels.device, plan.side_px
    if pixels.dtype != torch.uint8 or pixels.ndim != 1 or not pixels.is_contiguous():
        raise ValueError(f"pixels are {pixels.dtype} {tuple(pixels.shape)}: give one contiguous uint8 buffer")
    if plan.table.device != device:
        raise ValueError(f"pixels are on {device}, the plan on {plan.table.device}: use plan.to(pixels.device)")
    if device.type != "cuda" and isinstance(blur_lines, triton.JITFunction):
        raise ValueError(f"pixels are on {device}: the kernels need a CUDA device, or TRITON_INTERPRET=1")
    lut = _lut(normalization, dtype, device)
    out = torch.empty((len(plan.table), side, side, 3), dtype=dtype, device=device)
    with torch.cuda.device_of(pixels):
        _launch(pixels, plan, lut, out)
    return tuple(view.permute(0, 3, 1, 2) for view in out.split(plan.images))


def normalize_views(levels: torch.Tensor, normalization: Normalization, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Finished views as bytes, uint8 (V, B, H, W, 3) → V tensors (B, 3, H, W) as from make_views.

    By table: a GPU divides by a number where it multiplies by its reciprocal, which has other last bits than the CPU's.
    """
    out = torch.empty(levels.shape, dtype=dtype, device=levels.device)
    with torch.cuda.device_of(levels):
        count, lut, block = levels.numel(), _lut(normalization, dtype, levels.device), SETTINGS["look_up"]["BLOCK"]
        look_up[(triton.cdiv(count, block),)](levels, lut, out, count, block)
    return tuple(view.permute(0, 3, 1, 2) for view in out)


KERNELS = (fill_coefficients, resize_once, start_colours, finish_colours, blur_lines)


def _empty(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A buffer whose size differs from batch to batch: rounded up, so that the allocator finds the last one again."""
    return torch.empty(
        triton.cdiv(count, 2**24) * 2**24 if device.type == "cuda" else count, dtype=dtype, device=device
    )


def _launch(pixels: torch.Tensor, plan: ViewPlan, lut: torch.Tensor, out: torch.Tensor) -> None:
    """The six kernels, and the memory between them."""
    table, side, pitch = plan.table, plan.side_px, plan.pitch_px
    n, device = len(table), pixels.device
    first = torch.empty((n, 2, side), dtype=torch.int32, device=device)
    fill, resize, start, finish, blur = (EXACT | SETTINGS[k.__name__] for k in KERNELS)
    coefficients = _empty(plan.taps * side + READ_PAST, torch.int32, device)
    between = _empty(plan.between_px, torch.int32, device)
    colours = torch.empty((n, side, pitch), dtype=torch.int32, device=device)
    planes, turned = torch.empty((2, n, 3, side, pitch), dtype=torch.uint8, device=device)
    sums = torch.zeros(n, dtype=torch.int64, device=device)
    hues = _exact_hues(device)

    def tiles(settings: dict[str, int]) -> tuple[int, int]:
        return n, pitch // TILE_PX * triton.cdiv(side, settings["LANES"] // TILE_PX * settings["ROWS"])

    fill_coefficients[(n, 2, triton.cdiv(side, fill["OUTPUTS"]))](table, first, coefficients, side, **fill)
    resize_once[(n, STRIDES)](pixels, table, first, coefficients, between, side, **resize)
    start_colours[tiles(start)](between, table, first, coefficients, colours, sums, hues, side, **start)
    finish_colours[tiles(finish)](table, colours, sums, hues, lut, planes, out, side, **finish)
    if plan.blur_radius < 0:
        return
    lines = (n, triton.cdiv(3 * side, blur["LINES"]))
    blur["RADIUS"] = max(plan.blur_radius, 1)  # one kernel for all sigma up to 2.4 px
    for source, target, last in ((planes, turned, False), (turned, out, True)):
        blur_lines[lines](table, source.view(torch.int32), target, lut, side, LAST=last, **blur)
