"""Compiles every view kernel for sm_90, without a GPU, and prints what is wrong with its machine code, as JSON.

    PYTHONPATH=.:FOLDER_WITH_ANOTHER_TRITON python tests/audit_kernels.py

    fused      a fused multiply-add rounds once where Pillow rounds twice
    spilled    registers that went to memory
    registers  too many of them leave too few threads on a multiprocessor
    scattered  neighbouring lanes of a load or store are not neighbours in memory, so that it is done many times over

Triton's versions lay out the same kernel differently, so this runs with the installed one and with that of torch 2.11.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pipeline.views import augment_gpu, blur_gpu, colour_gpu, resample_gpu

SIDE = {"side": 224}
POINTERS = {"table": "*i64", "sums": "*i64", "first": "*i32", "coefficients": "*i32", "source": "*i32"}
POINTERS |= dict.fromkeys(("pixels", "planes", "exact_hues", "levels"), "*u8")
POINTERS |= {"between": "*i32", "colours": "*i32", "lut": "*bf16"}
KERNELS = [
    (resample_gpu.fill_coefficients, {"side": 224}, {}),
    (resample_gpu.resize_once, SIDE, {}),
    (colour_gpu.start_colours, SIDE, {}),
    (colour_gpu.finish_colours, SIDE, {"out": "*bf16"}),
    *(
        (blur_gpu.blur_lines, SIDE | {"RADIUS": radius, "LAST": last}, {"out": "*bf16" if last else "*u8"})
        for radius, last in ((1, False), (1, True), (8, True))
    ),
    (augment_gpu.look_up, {}, {"out": "*bf16"}),
]
MOST_REGISTERS = 168
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compiled(kernel, constants: dict, outputs: dict):
    settings = dict(augment_gpu.SETTINGS[kernel.__name__])
    options = augment_gpu.EXACT | {"num_warps": settings.pop("num_warps", 4)}
    constants = constants | settings
    types = POINTERS | outputs
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n not in constants}
    return triton.compile(
        ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", 90, 32), options=options
    )


def usage(cubin: bytes) -> dict[str, int]:
    """Registers of a thread; bytes of stack and local memory, where registers are spilled to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")}


def scattered(ttgir: str) -> list[str]:
    """Loads and stores whose lanes do not run along the last dimension, or take several elements in a row each."""
    layouts = {}
    for name, elements, lanes in re.findall(
        r"#(blocked\d*) = #ttg.blocked<\{sizePerThread = \[([\d, ]+)\], threadsPerWarp = \[([\d, ]+)\]", ttgir
    ):
        layouts[name] = [int(n) for n in elements.split(",")], [int(n) for n in lanes.split(",")]
    found = []
    for line in ttgir.splitlines():
        if not re.search(r"tt\.(load|store) ", line):
            continue
        for shape, layout in re.findall(r"tensor<([\dx]+)x!tt.ptr<[^>]*>, #(blocked\d*)>", line):
            sizes, (elements, lanes) = [int(n) for n in shape.split("x")], layouts[layout]
            along = elements[-1] * lanes[-1] >= min(sizes[-1], 32)
            if not along or (len(sizes) == 1 and elements[0] > 1):
                found.append(f"{shape}: {elements} elements, {lanes} lanes")
    return sorted(set(found))


def main() -> None:
    wrong = []
    for kernel, constants, outputs in KERNELS:
        code = compiled(kernel, constants, outputs)
        used = usage(code.asm["cubin"])
        faults = {
            "fused": "fma.rn" in code.asm["ptx"],
            "spilled": used["STACK"] + used["LOCAL"],
            "registers": used["REG"] if used["REG"] > MOST_REGISTERS else 0,
            # What look_up reads and writes lies in one row: several neighbours to a thread are one wide access.
            "scattered": [] if kernel is augment_gpu.look_up else scattered(code.asm["ttgir"]),
        }
        wrong += [f"{kernel.__name__} {constants}: {name} {fault}" for name, fault in faults.items() if fault]
        print(f"{kernel.__name__}: {used['REG']} registers", file=sys.stderr)
    kernels = [kernel.__name__ for kernel, *_ in KERNELS]
    print(json.dumps({"triton": triton.__version__, "kernels": kernels, "wrong": wrong}))


if __name__ == "__main__":
    main()
