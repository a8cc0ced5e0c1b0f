"""What equations do with rows: how rows lie in a value, and in an equation's results.

Rows lie along an axis as (outer, row, inner): a reshape of (rows, tokens) to one axis has `tokens` as inner.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.extend.core as jex


class Rows(NamedTuple):
    """A value with rows along an axis. outer: how often all rows come one after another there."""

    axis: int
    outer: int = 1

    def at(self, axis: Any) -> "Rows":
        """axis: also a number of NumPy's, as equations may have them."""
        return self._replace(axis=int(axis))


COMMON, MIXED = "the same for all rows", "mixed or unknown"
State = Rows | str


# Rules: an equation of the small trace, the states of its operands, of which one has rows and none is MIXED, and the
# numbers of rows; they give the state of all results, or a list of each one's. What a rule says is held against the
# shapes of both traces.
Rule = Callable[[jex.JaxprEqn, Sequence[State], tuple[int, int]], State | list[State]]


def _along(states: Sequence[State]) -> State:
    """Where operands that lie alike have their rows: all that are no scalars, or none of them."""
    found = {state for state in states if isinstance(state, Rows)}
    return found.pop() if len(found) == 1 else MIXED


def _elementwise(equation, states, rows) -> State:
    """What is common to all rows is a scalar here, or of size 1 along the others' axis of rows."""
    return _along(states)


def _moved(place: Callable[[Mapping[str, Any], int], int | None]) -> Rule:
    """place: of the result's axis that has the rows, from an equation's parameters and the operands'; None: mixed."""

    def rule(equation, states, rows) -> State:
        state = _along(states)
        if state == MIXED or not isinstance(states[0], Rows):
            return MIXED
        axis = place(equation.params, state.axis)
        return MIXED if axis is None else state.at(axis)

    return rule


def _less(key: str) -> Rule:
    """An axis, or several, that the result does not have."""

    def of(params: Mapping[str, Any], axis: int) -> int | None:
        gone = _axes(params[key])
        return None if axis in gone else axis - sum(each < axis for each in gone)

    return _moved(of)


def _axes(value: Any) -> tuple[int, ...]:
    return tuple(map(int, value if isinstance(value, tuple | list) else (value,)))


def _apart(key: str) -> Rule:
    """An axis, or several, along which elements of all operands are mixed; the result lies as they do."""

    def of(params: Mapping[str, Any], axis: int) -> int | None:
        return None if axis in _axes(params[key]) else axis

    def rule(equation, states, rows) -> State:
        return _moved(of)(equation, states, rows) if COMMON not in states else MIXED

    return rule


def _reshape(equation, states, rows) -> State:
    state, shape, after = states[0], equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    if equation.params.get("dimensions") is not None:
        return MIXED
    before = math.prod(shape[: state.axis]) * state.outer
    ends = list(itertools.accumulate(after, lambda a, b: a * b))
    axis = next(axis for axis, end in enumerate(ends) if end > before)
    outer, rest = divmod(before, math.prod(after[:axis]))
    return MIXED if rest or after[axis] % (outer * rows[0]) else Rows(axis, outer)


def _top_k(equation, states, rows) -> State:
    axis = equation.params.get("axis", -1) % len(equation.invars[0].aval.shape)
    return MIXED if states[0].axis == axis else states[0]


def _slice(equation, states, rows) -> State:
    params, axis = equation.params, states[0].axis
    size = equation.invars[0].aval.shape[axis]
    whole = (params["start_indices"][axis], params["limit_indices"][axis]) == (0, size)
    return states[0] if whole and (params["strides"] is None or params["strides"][axis] == 1) else MIXED


def _dynamic_slice(equation, states, rows) -> State:
    state, *indices = states
    if not isinstance(state, Rows) or any(index != COMMON for index in indices):
        return MIXED
    # A slice of all there is begins at 0, whatever is asked for.
    return state if equation.outvars[0].aval.shape[state.axis] == equation.invars[0].aval.shape[state.axis] else MIXED


def _dynamic_update_slice(equation, states, rows) -> State:
    state, update, *indices = states
    if not isinstance(state, Rows) or update != state or any(index != COMMON for index in indices):
        return MIXED
    sizes = {atom.aval.shape[state.axis] for atom in equation.invars[:2]}
    return state if len(sizes) == 1 else MIXED


def _pad(equation, states, rows) -> State:
    state, value = states
    whole = isinstance(state, Rows) and tuple(equation.params["padding_config"][state.axis]) == (0, 0, 0)
    return state if whole and value == COMMON else MIXED


def _reduce(equation, states, rows) -> State:
    """Of several operands, each with the value it starts from."""
    half = len(states) // 2
    return _less("dimensions")(equation, states[:half], rows) if set(states[half:]) == {COMMON} else MIXED


def _reduce_window(equation, states, rows) -> State:
    params, (state, *starts) = equation.params, states
    if not isinstance(state, Rows) or any(start != COMMON for start in starts):
        return MIXED
    ones = all(
        params[key] is None or params[key][state.axis] == 1
        for key in ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    )
    return state if ones and tuple(params["padding"][state.axis]) == (0, 0) else MIXED


def _fft(equation, states, rows) -> State:
    ndim = len(equation.invars[0].aval.shape)
    return states[0] if states[0].axis < ndim - len(equation.params["fft_lengths"]) else MIXED


def _dot(equation, states, rows) -> State:
    contracted, batch = equation.params["dimension_numbers"]
    found = []
    for side, state in enumerate(states):
        if not isinstance(state, Rows):
            continue
        free = [_free(equation.invars[number].aval, contracted[number], batch[number]) for number in (0, 1)]
        if state.axis in batch[side]:
            if not isinstance(states[1 - side], Rows):
                return MIXED
            found.append(state.at(list(batch[side]).index(state.axis)))
        elif state.axis in free[side]:
            before = len(batch[0]) + (len(free[0]) if side else 0)
            found.append(state.at(before + free[side].index(state.axis)))
        else:
            return MIXED
    return _along(found)


def _free(aval: Any, *taken: Any) -> list[int]:
    return [axis for axis in range(len(aval.shape)) if not any(axis in axes for axes in taken)]


def _convolution(equation, states, rows) -> State:
    numbers, (state, weight) = equation.params["dimension_numbers"], states
    apart = weight == COMMON and state.axis == numbers.lhs_spec[0] and equation.params["batch_group_count"] == 1
    return state.at(numbers.out_spec[0]) if apart else MIXED


def _gather(equation, states, rows) -> State:
    numbers, (state, indices) = equation.params["dimension_numbers"], states
    ndim = len(equation.outvars[0].aval.shape)
    by_index = [axis for axis in range(ndim) if axis not in numbers.offset_dims]
    if isinstance(state, Rows) and not isinstance(indices, Rows):
        sliced = _free(equation.invars[0].aval, numbers.collapsed_slice_dims, numbers.operand_batching_dims)
        whole = equation.params["slice_sizes"][state.axis] == equation.invars[0].aval.shape[state.axis]
        if not whole or state.axis not in sliced or state.axis in numbers.start_index_map:
            return MIXED
        return state.at(numbers.offset_dims[sliced.index(state.axis)])
    if indices.axis >= len(by_index):
        return MIXED
    if isinstance(state, Rows):
        pairs = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
        if (state.axis, indices.axis) not in pairs or state.outer != indices.outer:
            return MIXED
    return indices.at(by_index[indices.axis])


def _scatter(equation, states, rows) -> State:
    numbers, (state, indices, updates) = equation.params["dimension_numbers"], states
    if not isinstance(state, Rows) or not isinstance(updates, Rows) or state.outer != updates.outer:
        return MIXED
    if not isinstance(indices, Rows):
        window = _free(equation.invars[0].aval, numbers.inserted_window_dims, numbers.operand_batching_dims)
        whole = equation.invars[0].aval.shape[state.axis] == equation.invars[2].aval.shape[updates.axis]
        if not whole or state.axis not in window or state.axis in numbers.scatter_dims_to_operand_dims:
            return MIXED
        return state if numbers.update_window_dims[window.index(state.axis)] == updates.axis else MIXED
    by_index = _free(equation.invars[2].aval, numbers.update_window_dims)
    pairs = zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True)
    apart = (state.axis, indices.axis) in pairs and by_index[indices.axis : indices.axis + 1] == [updates.axis]
    return state if apart and indices.outer == state.outer else MIXED


def _stack(equation, states, rows) -> State:
    state = _along(states)
    if state == MIXED or COMMON in states:
        return MIXED
    return state.at(state.axis + (equation.params["axis"] <= state.axis))


def _tile(equation, states, rows) -> State:
    axis, outer = states[0]
    return Rows(axis, outer * int(equation.params["reps"][axis]))


OF_NUMBERS = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e bitcast_convert_type cbrt ceil clamp
clz complex conj convert_element_type copy copy_p cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor
ge gt igamma igammac imag integer_pow is_finite le le_to lgamma log log1p log2 logistic lt lt_to max min mul mulhi
name ne neg nextafter not one_minus_square or polygamma population_count pow real reduce_precision rem round rsqrt
select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh
xor zeta
"""
REDUCTIONS = ("sum", "prod", "max", "min", "and", "or", "xor")
RULES: dict[str, Rule] = {
    **dict.fromkeys(OF_NUMBERS.split(), _elementwise),
    **{f"reduce_{name}": _less("axes") for name in REDUCTIONS},
    **dict.fromkeys(("argmax", "argmin"), _less("axes")),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _apart("axis")),
    **{f"reduce_window{name}": _reduce_window for name in ("", "_sum", "_max", "_min")},
    **dict.fromkeys((f"scatter{name}" for name in ("", "-add", "-sub", "-mul", "-min", "-max")), _scatter),
    "reduce": _reduce,
    "sort": _apart("dimension"),
    "concatenate": _apart("dimension"),
    "split": _apart("axis"),
    "rev": _apart("dimensions"),
    "squeeze": _less("dimensions"),
    "transpose": _moved(lambda params, axis: params["permutation"].index(axis)),
    "broadcast_in_dim": _moved(lambda params, axis: params["broadcast_dimensions"][axis]),
    "reshape": _reshape,
    "top_k": _top_k,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "pad": _pad,
    "fft": _fft,
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "gather": _gather,
    "stack": _stack,
    "unstack": _less("axis"),
    "tile": _tile,
}
