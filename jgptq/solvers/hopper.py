"""The recursion over one block of inputs on an NVIDIA Hopper GPU, as one Mosaic GPU kernel.

A warpgroup has 64 outputs. The errors of the inputs so far stay in its registers, an output a row, so that an input
costs one product of a row with L_j and one select; what is read and written for each input lies in shared memory.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

OUTPUTS = 64  # of a warpgroup
PROCESSORS = 132  # of an H100 or H200


class Registers:
    """How values lie in the registers of a warpgroup, outputs as rows and inputs as columns."""

    @staticmethod
    def errors(inputs: int) -> Any:
        """(outputs, inputs) of zeros."""
        return plgpu.layout_cast(jnp.zeros((OUTPUTS, inputs), jnp.float32), plgpu.Layout.WGMMA)

    @staticmethod
    def numbers(inputs: int) -> Any:
        """(outputs, inputs): the number of each one's input."""
        return plgpu.broadcasted_iota(jnp.int32, (OUTPUTS, inputs), 1, layout=plgpu.Layout.WGMMA)

    @staticmethod
    def of_outputs(ref: Any) -> Any:
        return _load(ref, plgpu.Layout.WGMMA.reduce(1))

    @staticmethod
    def of_inputs(ref: Any) -> Any:
        return _load(ref, plgpu.Layout.WGMMA.reduce(0))


def _load(ref: Any, layout: Any) -> Any:
    if jax.__version_info__ >= (0, 11):
        return plgpu.load(ref, layout=layout, optimized=False)
    return plgpu.load(ref, (), layout=layout, optimized=False)


class Columns(NamedTuple):
    codes: Float[Array, "in out"]  # whole numbers
    errors: Float[Array, "in out"]
    loss: Float[Array, " out"]


def solve(
    w: Float[Array, "in out"],
    targets: Float[Array, "in out"],
    lower: Float[Array, "in in"],
    pivots: Float[Array, " in"],
    scale: Float[Array, " out"],
    zero: Float[Array, " out"],
    max_code: Float[Array, ""],
    *,
    registers: Any = Registers,
) -> Columns:
    """t_j = targets_j + Σ_{k<j} L_jk e_k; its code; e_j = w_j - q_j; Σ D_j (t_j - q_j)².

    lower: L, of which the diagonal and what lies above do not matter. registers: `Registers`, or what stands in for it
    in an interpreter.
    """
    out = w.shape[1]
    warpgroups = 1 if out <= OUTPUTS * PROCESSORS else 2
    padding = -out % (OUTPUTS * warpgroups)
    w, targets = (jnp.pad(array, ((0, 0), (0, padding))) for array in (w, targets))
    scale, zero = jnp.pad(scale, (0, padding), constant_values=1.0), jnp.pad(zero, (0, padding))
    kernel = _kernel(*w.shape, warpgroups, registers)
    codes, errors, loss = kernel(jnp.reshape(max_code, (1,)), w, targets, lower, pivots, scale, zero)
    return Columns(codes[:, :out], errors[:, :out], loss[:out])


def _kernel(inputs: int, outputs: int, warpgroups: int, registers: Any) -> Any:
    def kernel(
        max_code, w, targets, lower, pivots, scale, zero, codes_out, errors_out, loss_out, codes, errors, rows, barrier
    ):
        """In shared memory `codes` is w and `errors` the targets, until an input's own take their place."""
        warpgroup = lax.axis_index("warpgroup")
        own = pl.ds((lax.axis_index("outputs") * warpgroups + warpgroup) * OUTPUTS, OUTPUTS)
        codes, errors = codes.at[warpgroup], errors.at[warpgroup]
        share = pl.ds(warpgroup * (inputs // warpgroups), inputs // warpgroups)
        copies = (w.at[:, own], codes), (targets.at[:, own], errors), (lower.at[share], rows.at[share])
        for source, place in copies:
            plgpu.copy_gmem_to_smem(source, place, barrier)
        plgpu.barrier_wait(barrier)
        step, offset = registers.of_outputs(scale.at[own]), registers.of_outputs(zero.at[own])
        most, numbers = max_code[0], registers.numbers(inputs)

        def column(j, state):
            so_far, loss = state
            # Both are read before the sum, in which threads wait for each other, and written after it.
            own_w, t = registers.of_outputs(codes.at[j]), registers.of_outputs(errors.at[j])
            row = lax.broadcast_in_dim(registers.of_inputs(rows.at[j]), (OUTPUTS, inputs), [1])
            t += jnp.sum(so_far * row, axis=1)
            code = lax.round(t / step, lax.RoundingMethod.TO_NEAREST_EVEN) + offset
            code = jnp.minimum(jnp.maximum(code, 0.0), most)
            q = step * (code - offset)
            error = own_w - q
            codes[j], errors[j] = code, error
            so_far = jnp.where(numbers == j, lax.broadcast_in_dim(error, (OUTPUTS, inputs), [0]), so_far)
            return so_far, loss + pivots[j] * (t - q) * (t - q)

        start = registers.errors(inputs)
        loss = lax.fori_loop(0, inputs, column, (start, jnp.sum(start, axis=1)))[1]
        loss_out.at[own][...] = loss
        plgpu.commit_smem()
        for place, target in ((codes, codes_out.at[:, own]), (errors, errors_out.at[:, own])):
            plgpu.copy_smem_to_gmem(place, target)
        plgpu.wait_smem_to_gmem(0)

    own_inputs = plgpu.SMEM((warpgroups, inputs, OUTPUTS), jnp.float32)
    whole = jax.ShapeDtypeStruct((inputs, outputs), jnp.float32)
    return plgpu.kernel(
        kernel,
        out_type=(whole, whole, jax.ShapeDtypeStruct((outputs,), jnp.float32)),
        grid=(outputs // (OUTPUTS * warpgroups),),
        grid_names=("outputs",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        scratch_types=[
            own_inputs,
            own_inputs,
            plgpu.SMEM((inputs, inputs), jnp.float32),
            plgpu.Barrier(num_arrivals=3 * warpgroups),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        kernel_name="jgptq_columns",
    )
