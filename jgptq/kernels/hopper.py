"""The product on an NVIDIA Hopper GPU: a Mosaic GPU kernel that decodes weights in registers, next to the tensor cores.

It computes yᵀ = Wᵀ xᵀ. Outputs are the rows of wgmma's left operand, which comes from registers, and tokens the
columns of its right operand, in shared memory; so a few tokens waste nothing. One warpgroup fetches blocks of codes and
inputs, two decode and multiply. Integers code - zero are exact in bfloat16 and float16; a group's product is
scaled in float32. Where there are too few outputs to fill the GPU, several programs share the inputs, and their
partial sums are added in a fixed order, so that results do not vary between runs; else the kernel writes the product
itself, tokens first and in the dtype asked for.
[Marlin: Frantar et al. 2024, for the regime and the idea of an order made for registers]
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from jgptq import tensor
from jgptq.kernels import mosaic
from jgptq.kernels.prepack import BLOCK, TILE, Prepacked, spread

MAX_TOKENS = 128  # of a tile; more rows are several products
PROCESSORS = 132  # of an H100 or H200
SHARED_MEMORY = 200 * 1024  # bytes of 227 KB that the stages of the pipeline may take
WARPGROUPS = 2
WRITTEN = ("float32", "bfloat16", "float16")  # dtypes that the kernel writes by itself


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How one product is divided.

    tokens: columns of a tile, a power of two; outputs: rows that one warpgroup decodes, in tiles of 64; split: programs
    that share the inputs; stages: blocks on their way from memory at a time.
    """

    tokens: int
    outputs: int
    split: int
    stages: int

    @classmethod
    def of(cls, rows: int, weight: Prepacked) -> "Plan":
        """The plan with the fewest steps of the busiest multiprocessor, a step of 128 outputs counting twice."""
        tokens = max(8, 1 << (rows - 1).bit_length())
        wide = tokens <= 32 and weight.outputs % (2 * TILE) == 0  # else its sums do not fit the registers

        def cost(choice: tuple[int, int]) -> tuple[int, int]:
            outputs, split = choice
            programs = weight.outputs // (WARPGROUPS * outputs) * split
            # 4 steps to fill the pipeline; 4 more for the launch that adds partial sums.
            steps = weight.blocks // split * (outputs // 64) + 4 + 4 * (split > 1)
            return -(-programs // PROCESSORS) * steps, split

        splits = [1] + [split for split in (2, 4, 8) if weight.blocks % split == 0 and weight.blocks >= 4 * split]
        outputs, split = min(((n, s) for n in ((64, 128) if wide else (64,)) for s in splits), key=cost)
        stage = WARPGROUPS * outputs * weight.stored_bits * BLOCK // 8 + 2 * tokens * BLOCK
        stage += WARPGROUPS * outputs * (4 + 1) * max(BLOCK // weight.slots, 1)  # scales and zeros
        stages = min(8, SHARED_MEMORY // stage, weight.blocks // split)
        return cls(tokens=tokens, outputs=outputs, split=split, stages=stages)


def matmul(
    x: Float[Array, "*batch in"], weight: Prepacked | tensor.Element, result_dtype: Any, *, operations: Any = mosaic
) -> Float[Array, "*batch out"]:
    """x @ weight with float32 accumulation. operations: the file `mosaic`, or another of what it defines."""
    lead = x.shape[:-1]
    x = x.reshape(-1, weight.in_features)
    order = weight.permutation
    if order is not None:
        x = jnp.take(x, order, axis=-1)
    rows, index = x.shape[0], None
    if isinstance(weight, tensor.Element):
        index, weight = weight.index, weight.stack
    # With 8 bits and several groups a block, the sums of 128 tokens spill from the registers (benchmarks/sass.py).
    most = MAX_TOKENS // 2 if weight.stored_bits == 8 and weight.slots < BLOCK else MAX_TOKENS
    written = result_dtype if jnp.dtype(result_dtype).name in WRITTEN else jnp.float32
    chunks = [_chunk(x[start : start + most], weight, index, written, operations) for start in range(0, rows, most)]
    product = chunks[0] if len(chunks) == 1 else jnp.concatenate(chunks)
    return product.astype(result_dtype).reshape(*lead, weight.out_features)


def _chunk(
    x: Array, weight: Prepacked, index: Array | None, result_dtype: Any, operations: Any
) -> Float[Array, "rows out"]:
    """index: which of a stack of weights it is that x is multiplied by; None: weight is no stack.

    The result is in result_dtype, or in float32 where partial sums were added.
    """
    plan = Plan.of(x.shape[0], weight)
    padded = jnp.pad(spread(x, weight), ((0, plan.tokens - x.shape[0]), (0, 0)))
    arrays = [array for array in (weight.codes, weight.scales, weight.zeros) if array is not None]
    rows = [array.reshape(-1, array.shape[-1]) for array in arrays]  # of a stack, one weight's after another's
    number = [] if index is None else [jnp.asarray(index, jnp.int32).reshape(1)]
    if plan.split == 1:
        out_type = jax.ShapeDtypeStruct((plan.tokens, weight.outputs), result_dtype)
    else:
        out_type = jax.ShapeDtypeStruct((plan.split, weight.outputs, plan.tokens), jnp.float32)
    product = _kernel(plan, weight, x.dtype, out_type, operations, stacked=index is not None)(*number, padded, *rows)
    if plan.split > 1:
        product = jnp.sum(product, axis=0).T
    return product[: x.shape[0], : weight.out_features]


def _kernel(
    plan: Plan, weight: Prepacked, dtype: Any, out_type: jax.ShapeDtypeStruct, operations: Any, *, stacked: bool
) -> Any:
    """([number in the stack,] inputs, codes, scales[, zeros]) -> what out_type says.

    That is the product, (tokens, outputs); or partial sums (split, outputs, tokens), if split is not 1.
    """
    bits, size = weight.stored_bits, min(weight.slots, BLOCK)
    parts, steps, tile = BLOCK // size, weight.blocks // plan.split, WARPGROUPS * plan.outputs
    midpoint = 2 ** (weight.bits - 1)

    def kernel(*references):
        *operands, result = references
        number = operands.pop(0)[0] if stacked else 0
        warpgroup, column, share = (lax.axis_index(name) for name in ("warpgroup", "outputs", "split"))
        own = pl.ds(warpgroup * plan.outputs, plan.outputs)

        def step(_, x, codes, scales, *rest):
            *zeros, sums = rest
            lows = [zeros[0].at[part, own] for part in range(parts)] if zeros else [midpoint] * parts
            weights = operations.read_weights(codes.at[own], lows, bits, dtype)
            for part in range(parts):
                product = operations.multiply(weights[part], x.at[:, pl.ds(part * size, size)])
                scale = operations.read_rows(scales.at[part, own]).astype(jnp.float32)
                sums = sums + product * lax.broadcast_in_dim(scale, product.shape, [0])
            plgpu.commit_smem()  # what was read lies behind before the next block is written over it
            return sums

        def around(pipeline):
            sums = pipeline(operations.zeros((plan.outputs, plan.tokens)))
            written = pl.ds(column * tile + warpgroup * plan.outputs, plan.outputs)
            if plan.split == 1:
                operations.write_transposed(result.at[:, written], sums.astype(result.dtype))
            else:
                result.at[share, written][...] = sums

        first = share * steps

        def by_group(k):
            return number * (weight.rows // parts) + (first + k) // max(weight.slots // BLOCK, 1), column

        per_group = plgpu.BlockSpec((parts, tile), by_group, memory_space=plgpu.SMEM)
        pipeline = plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(steps,),
            in_specs=[
                _swizzled((plan.tokens, BLOCK), lambda k: (0, first + k), bits=16, columns=size),
                _swizzled(
                    (tile, 4 * bits),
                    lambda k: ((number * weight.blocks + first + k) * (weight.outputs // tile) + column, 0),
                    bits=32,
                    columns=4 * bits,
                ),
                *([per_group] * (len(operands) - 2)),
            ],
            memory_registers=40,
            max_concurrent_steps=plan.stages,
            wg_axis="warpgroup",
            num_compute_wgs=WARPGROUPS,
            compute_context=around,
        )
        pipeline(*operands)

    return plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(weight.outputs // tile, plan.split),
        grid_names=("outputs", "split"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        kernel_name="jgptq_matmul",
    )


def _swizzled(shape: tuple[int, int], index_map: Any, *, bits: int, columns: int) -> plgpu.BlockSpec:
    """A block in shared memory that is read without bank conflicts, in parts of `columns`."""
    swizzle = plgpu.find_swizzle(columns * bits, "block")
    transforms = (plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle))
    return plgpu.BlockSpec(shape, index_map, transforms=transforms, memory_space=plgpu.SMEM)
