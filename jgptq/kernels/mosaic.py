"""What the kernel asks of Mosaic GPU: the two spellings of JAX 0.10 and 0.11, and decoding in registers, in PTX."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

# Words of a tile of 64 outputs: a thread has 4 neighbouring words of two rows.
_WORDS = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 16), (16, 16), (8, 16), (4,))), warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1
)
_ROWS = plgpu.Layout.WGMMA.reduce(1)
# Bits of a float to which a code, put in its lowest bits, adds its value: 128 in bfloat16, 1024 in float16; and 2**23
# in float32, as 8 bits are too many for bfloat16.
_OFFSETS = {(4, "bfloat16"): 0x43004300, (4, "float16"): 0x64006400}
_OFFSETS |= {(8, "float16"): 0x64006400, (8, "bfloat16"): 0x4B000000}


def load(ref, layout):
    if jax.__version_info__ >= (0, 11):
        return plgpu.load(ref, layout=layout)
    return plgpu.load(ref, (), layout=layout)


def transpose(ref):
    return ref.T if jax.__version_info__ >= (0, 11) else plgpu.transpose_ref(ref, (1, 0))


def read_rows(ref):
    """(outputs,) of shared memory, each value with the threads that hold its output."""
    return load(ref, _ROWS)


def read_weights(codes, zeros, bits, dtype):
    """code - zero, exact in `dtype`, as left operands of wgmma; one (outputs, inputs / parts) array for each zero.

    codes: a (outputs, words) reference in shared memory, in the order of Prepacked; zeros: for each part of the inputs
    an (outputs,) uint8 reference or an integer.
    """
    name, parts = jnp.dtype(dtype).name, len(zeros)
    offset = _OFFSETS[bits, name]
    step = 1 if (bits, name) == (8, "bfloat16") else 0x00010001
    words = load(codes, _WORDS)
    outputs, columns = words.shape[0], words.shape[1] * 32 // bits // parts
    constant = isinstance(zeros[0], int)
    lows = () if constant else tuple(offset + step * read_rows(zero).astype(jnp.int32) for zero in zeros)
    decoded = plgpu.ShapeDtypeStruct((outputs, columns), dtype, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(_WORDS, *([_ROWS] * len(lows))), return_type=(decoded,) * parts)
    def decode(_, words, *lows):
        shape = mgpu.WGMMA_LAYOUT.registers_shape((outputs, columns))
        results = [np.empty(shape, dtype=object) for _ in range(parts)]
        pairs = 16 // bits
        for index, register in np.ndenumerate(words.registers):
            tile, block, row = index[0], index[1], index[4]
            for number in range(4):
                word = vector.extract(register, dynamic_position=[], static_position=[number])
                for q in range(pairs):
                    part, column = divmod((4 * block + number) * pairs + q, columns // 8)
                    low = None if constant else _scalar(lows[part], tile, row)
                    value = _decode(word, q, bits, name, offset, offset + step * zeros[part] if constant else low)
                    results[part][tile, column, 0, 0, row, 0, 0, 0, 0] = value
        return tuple(
            mgpu.FragmentedArray(_registers=result, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None) for result in results
        )

    return decode(plgpu.layout_cast(words, _WORDS), *lows)


def _scalar(rows, tile, row):
    """The value for one of a thread's rows, of an array in the layout of rows."""
    return vector.extract(rows.registers[tile, 0, row, 0, 0], dynamic_position=[], static_position=[0])


def _decode(word, q, bits, name, offset, low):
    """The pair of codes number q of a word, less `low`, as two floats in a register. low: a register or an integer."""
    kind, mask = {"bfloat16": "bf16", "float16": "f16"}[name], (2**bits - 1) * 0x00010001
    if (bits, name) == (8, "bfloat16"):
        # Each byte below the exponent of 2**23, then to bfloat16, which holds -255 .. 255 exactly.
        text = (
            f"prmt.b32 t, $1, {offset:#x}, {0x7440 + q:#x}; mov.b32 a, t; prmt.b32 t, $1, {offset:#x}, {0x7442 + q:#x};"
            " mov.b32 b, t; mov.b32 m, LOW; sub.f32 a, a, m; sub.f32 b, b, m; cvt.rn.bf16x2.f32 $0, b, a;"
        )
        registers = ".reg .b32 t; .reg .f32 a, b, m;"
    else:
        shift = f"shr.b32 t, $1, {bits * q};" if q else "mov.b32 t, $1;"
        text = f"{shift} lop3.b32 t, t, {mask:#x}, {offset:#x}, 0xEA; mov.b32 m, LOW; sub.{kind}x2 $0, t, m;"
        registers = ".reg .b32 t, m;"
    constant = isinstance(low, int)
    text = text.replace("LOW", f"{low:#x}" if constant else "$2")
    operands, constraints = ([word], "=r,r") if constant else ([word, low], "=r,r,r")
    value = llvm.inline_asm(ir.IntegerType.get_signless(32), operands, f"{{ {registers} {text} }}", constraints)
    element = ir.BF16Type.get() if name == "bfloat16" else ir.F16Type.get()
    return llvm.bitcast(ir.VectorType.get((2,), element), value)


def multiply(weights, x):
    """weights (outputs, inputs) times a (tokens, inputs) reference in shared memory: float32 (outputs, tokens)."""

    def product(sums):
        plgpu.wgmma(sums, weights, transpose(x))
        return sums[...]

    return pl.run_scoped(product, plgpu.ACC((weights.shape[0], x.shape[0]), jnp.float32))


def zeros(shape):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def write_transposed(ref, sums):
    """Sums (outputs, tokens) into a (tokens, outputs) reference in the GPU's memory."""
    # In this layout a thread has two neighbouring outputs, and not two tokens, so that it writes both at once.
    transpose(ref)[...] = plgpu.layout_cast(sums, plgpu.Layout.WGMMA_TRANSPOSED)
