"""The two inner loops of a resize as LLVM vector code: weighted sums whose accumulators stay in registers.

LLVM's own vectorizer cannot keep a small block of sums in registers across a loop of unknown length, and that
costs it a factor of 1.5 to 10 here. So the loops are built from LLVM's portable vector instructions (llvmlite),
which become AVX-512, AVX2 or NEON, whichever the machine has. Numba inlines them like any other function.

Both are exact: every product and sum is a multiple of 2^-22 below 2^9, which int32 and float64 hold as they are.
"""

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

COEFFICIENT_BITS = 22  # a weight of 1.0 is 1 << 22 (Pillow's PRECISION_BITS)
HALF = 1 << (COEFFICIENT_BITS - 1)

LANES = 8  # output pixels of one block of sum_pixels
COLUMNS = 32  # values of one call of sum_rows
_features = llvmlite.binding.get_host_cpu_features()
# Rows that sum_pixels handles at once: as many as the vector registers hold sums for, 3 a row.
ROWS = 4 if _features.get("avx512f") else 2

_BYTE, _INT, _LONG, _REAL = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.DoubleType()


@intrinsic
def widest_vectors(typingctx):
    """At the head of a function: its loops may use vectors of 512 bits. A third faster here.

    LLVM avoids them because the first processors that had them slowed down; those with VBMI (Ice Lake, Zen 4 and
    later) do not. llvmlite lists the attributes it lets one add, and this is not on the list: hence set.add.
    """

    def generate(context, b, signature, arguments):
        if _features.get("avx512vbmi"):
            set.add(b.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), generate


def _constant(vector: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


def _splat(b: ir.IRBuilder, scalar: ir.Value, vector: ir.VectorType) -> ir.Value:
    """The scalar in every lane."""
    nothing = ir.Constant(vector, ir.Undefined)
    first = b.insert_element(nothing, scalar, ir.Constant(_INT, 0))
    return b.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(_INT, vector.count), [0] * vector.count))


def _load(b: ir.IRBuilder, kind: ir.Type, address: ir.Value, offset: ir.Value, align: int) -> ir.Value:
    value = b.load(b.inttoptr(b.add(address, offset), kind.as_pointer()))
    value.align = align
    return value


def _bytes(b: ir.IRBuilder, index: ir.Value, size: int) -> ir.Value:
    return b.mul(index, ir.Constant(_LONG, size))


def _sums(b: ir.IRBuilder, count: ir.Value, sums: int, half: ir.Constant, add_to) -> list[ir.Value]:
    """`sums` vectors that start at `half` and are replaced by add_to(k, vectors) for k = 0 … count - 1."""
    before, loop, after = b.block, b.append_basic_block("taps"), b.append_basic_block("summed")
    vector = half.type
    b.cbranch(b.icmp_signed(">", count, ir.Constant(_LONG, 0)), loop, after)

    b.position_at_end(loop)
    k = b.phi(_LONG)
    running = [b.phi(vector) for _ in range(sums)]
    added = add_to(k, running)
    following = b.add(k, ir.Constant(_LONG, 1))
    k.add_incoming(ir.Constant(_LONG, 0), before)
    k.add_incoming(following, loop)
    for phi, value in zip(running, added, strict=True):
        phi.add_incoming(half, before)
        phi.add_incoming(value, loop)
    b.cbranch(b.icmp_signed("<", following, count), loop, after)

    b.position_at_end(after)
    results = [b.phi(vector) for _ in range(sums)]
    for phi, value in zip(results, added, strict=True):
        phi.add_incoming(half, before)
        phi.add_incoming(value, loop)
    return results


def _store_clipped(b: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    """Whole numbers, int32, clipped to 0 … 255 and stored as bytes."""
    low, high = _constant(value.type, 0), _constant(value.type, 255)
    value = b.select(b.icmp_signed(">", value, low), value, low)
    value = b.select(b.icmp_unsigned("<", value, high), value, high)
    narrow = ir.VectorType(_BYTE, value.type.count)
    store = b.store(b.trunc(value, narrow), b.inttoptr(address, narrow.as_pointer()))
    store.align = 1


@intrinsic
def sum_pixels(typingctx, pixels, row_size, weights, count, out, out_row_size, out_channel_size):
    """LANES neighbouring output pixels of ROWS rows, each a weighted sum of the same `count` input pixels.

    pixels    address of float64 [ROWS][…][3], rows row_size values apart
    weights   address of float64 [count][LANES], multiples of 2^-22
    out       address of uint8: row r, channel c goes to out + r · out_row_size + c · out_channel_size + (0 … 7)
    """
    signature = types.void(*[types.intp] * 7)
    vector = ir.VectorType(_REAL, LANES)
    fuse = ("contract",)  # a multiply-add is one instruction; exact either way

    def generate(context, b, signature, arguments):
        pixels, row_size, weights, count, out, out_row_size, out_channel_size = arguments
        rows = [b.add(pixels, _bytes(b, _bytes(b, row_size, 8), r)) for r in range(ROWS)]

        def add_to(k, sums):
            weight = _load(b, vector, weights, _bytes(b, k, 8 * LANES), 8)
            added = []
            for n, total in enumerate(sums):
                at = b.add(_bytes(b, k, 24), ir.Constant(_LONG, 8 * (n % 3)))
                pixel = _splat(b, _load(b, _REAL, rows[n // 3], at, 8), vector)
                added.append(b.fadd(total, b.fmul(weight, pixel, flags=fuse), flags=fuse))
            return added

        for n, total in enumerate(_sums(b, count, 3 * ROWS, _constant(vector, 0.5), add_to)):
            to = b.add(_bytes(b, out_row_size, n // 3), _bytes(b, out_channel_size, n % 3))
            # Towards zero is not down, but below zero all is clipped to zero.
            _store_clipped(b, b.fptosi(total, ir.VectorType(_INT, LANES)), b.add(out, to))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def sum_rows(typingctx, values, row_size, weights, weight_size, count, out):
    """COLUMNS neighbouring values, each the weighted sum of `count` values above one another.

    values    address of uint8 [count][COLUMNS], rows row_size bytes apart
    weights   address of int32 [count], weight_size numbers apart, in units of 2^-22
    out       address of uint8 [COLUMNS]
    """
    signature = types.void(*[types.intp] * 6)
    vector, narrow_vector = ir.VectorType(_INT, 16), ir.VectorType(_BYTE, 16)

    def generate(context, b, signature, arguments):
        values, row_size, weights, weight_size, count, out = arguments
        offsets = range(0, COLUMNS, 16)

        def add_to(k, sums):
            weight = _splat(b, _load(b, _INT, weights, _bytes(b, b.mul(k, weight_size), 4), 4), vector)
            row = b.add(values, b.mul(row_size, k))
            loaded = [_load(b, narrow_vector, row, ir.Constant(_LONG, offset), 1) for offset in offsets]
            return [b.add(total, b.mul(b.zext(v, vector), weight)) for total, v in zip(sums, loaded, strict=True)]

        half, bits = _constant(vector, HALF), _constant(vector, COEFFICIENT_BITS)
        for offset, total in zip(offsets, _sums(b, count, len(offsets), half, add_to), strict=True):
            _store_clipped(b, b.ashr(total, bits), b.add(out, ir.Constant(_LONG, offset)))
        return context.get_dummy_value()

    return signature, generate
