"""The Hessian behind each weight, against NumPy in float64 that knows which inputs the weight met."""

import functools
import itertools
import warnings

import numpy as np
import pytest
import reference
from bare import CONVOLUTIONS, EXPERTS, LAYERS, WIDTH
from cases import CASES, Case

import jgptq
from jgptq import GPTQ, Grid, QuantizationWarning

GRID = Grid(bits=3, group_size=16)
PLAIN = GPTQ(act_order=False, scale_search=None, sweeps=0, targets=None)


def bare(name: str) -> Case:
    return next(case for case in CASES if case.framework == "bare" and case.name == name)


@functools.cache
def quantized(name: str, batches: int = 8):
    """Float weights, dequantized ones, the report and the calibration inputs, in float64."""
    case = bare(name)
    f, params, _ = case.build()
    inputs = case.calibration()[:batches]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuantizationWarning)
        packed, report = jgptq.quantize(f, params, inputs, grid=GRID, method=PLAIN)
    weights, approximations = (
        {path: np.asarray(leaf, np.float64) for path, leaf in tree.items()}
        for tree in (params, {path: leaf.dequantize() for path, leaf in packed.items()})
    )
    return weights, approximations, report, np.concatenate([np.asarray(x, np.float64) for (x,) in inputs])


def moment(x: np.ndarray) -> np.ndarray:
    rows = x.reshape(-1, x.shape[-1])
    return rows.T @ rows / len(rows)


def oracle(w: np.ndarray, h: np.ndarray) -> np.ndarray:
    """The dequantized (in, out) weight by algorithm 1."""
    return reference.gptq(w, h, bits=3, group_size=16, symmetric=False).weight


def assert_same(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal but for a near-tie now and then, which moves the rest of its output feature; a grid step is 0.1 and more.

    Another Hessian moves a third of the entries.
    """
    assert got.shape == expected.shape
    assert np.mean(abs(got - expected) > 1e-3) < 0.01


def relu(x):
    return np.maximum(x, 0)


# Layers in sequence.

PLAIN_ORDER = range(LAYERS)
LAYERED = {
    "scan over layers": (PLAIN_ORDER, lambda w, i: w[i]),
    "scan, remat inside": (PLAIN_ORDER, lambda w, i: w[i]),
    "scan, reverse": (PLAIN_ORDER[::-1], lambda w, i: w[i]),
    "scan, outputs collected": (PLAIN_ORDER, lambda w, i: w[i]),
    "scan, (out, in) layers": (PLAIN_ORDER, lambda w, i: w[i].T),
    "scan, layers on axis 1": (PLAIN_ORDER, lambda w, i: w[:, i]),
    "scan in a scan": (list(itertools.product(range(2), range(2))), lambda w, i: w[i]),
    "stack, Python loop by index": (PLAIN_ORDER, lambda w, i: w[i]),
}


@pytest.mark.parametrize("name", LAYERED)
def test_each_layer_is_solved_on_what_the_quantized_layers_before_it_give(name):
    order, layer = LAYERED[name]
    weights, approximations, report, x = quantized(name)
    for i in order:
        up, down = (layer(approximations[part], i) for part in ("up", "down"))
        assert_same(up, oracle(layer(weights["up"], i), moment(x)))
        hidden = relu(x @ up)
        assert_same(down, oracle(layer(weights["down"], i), moment(hidden)))
        x = x + hidden @ down
    assert len(report.rows) == 2 * len(order)


# Experts.

ROUTED = ("experts, ebtd,edf", "experts, one-hot dispatch", "experts, ragged_dot", "experts, vmap")


@pytest.mark.parametrize("batches", [8, 2])
@pytest.mark.parametrize("name", ROUTED)
def test_each_expert_is_solved_on_its_own_tokens_or_on_all_if_they_are_too_few(name, batches):
    weights, approximations, report, x = quantized(name, batches)
    tokens = x.reshape(-1, WIDTH)
    chosen = np.argmax(tokens @ approximations["router"], axis=-1)
    inputs = [tokens[chosen == expert] for expert in range(EXPERTS)]
    starved = []
    for part in ("up", "down"):
        w, approx = weights[part], approximations[part]
        everyone = moment(np.concatenate(inputs))
        starved.append({expert for expert in range(EXPERTS) if len(inputs[expert]) < w.shape[1]})
        for expert in range(EXPERTS):
            own = everyone if expert in starved[-1] else moment(inputs[expert])
            assert_same(approx[expert], oracle(w[expert], own))
        (row,) = [row for row in report.rows if row.path == part]
        named = f"of its {EXPERTS} matrices (experts), {', '.join(map(str, sorted(starved[-1])))} saw fewer tokens"
        assert any(named in note for note in row.notes) == bool(starved[-1])
        inputs = [relu(x_e @ approx[expert]) for expert, x_e in enumerate(inputs)]
    assert starved[1] if batches == 2 else not any(starved)


def test_a_layer_of_experts_in_a_scan_sees_the_quantized_layers_before_it():
    weights, approximations, _, x = quantized("scan of MoE layers")
    x = x.reshape(-1, WIDTH)
    for layer in range(2):
        router, up, down = (approximations[part][layer] for part in ("router", "up", "down"))
        assert_same(router, oracle(weights["router"][layer], moment(x)))
        chosen = np.argmax(x @ router, axis=-1)
        for expert in range(EXPERTS):
            mine = chosen == expert
            assert_same(up[expert], oracle(weights["up"][layer, expert], moment(x[mine])))
            hidden = relu(x[mine] @ up[expert])
            assert_same(down[expert], oracle(weights["down"][layer, expert], moment(hidden)))
            x[mine] += hidden @ down[expert]


# Convolutions.


def patches(x: np.ndarray, convolution) -> np.ndarray:
    """im2col: the window under each output position, (positions, *window, channels)."""
    window = convolution.kernel[:-2]
    reach = [(size - 1) * step + 1 for size, step in zip(window, convolution.dilation, strict=True)]
    if convolution.padding == "SAME":
        counts = [-(-n // stride) for n, stride in zip(x.shape[1:-1], convolution.strides, strict=True)]
        missing = [
            max((count - 1) * stride + size - n, 0)
            for count, stride, size, n in zip(counts, convolution.strides, reach, x.shape[1:-1], strict=True)
        ]
        x = np.pad(x, [(0, 0), *((total // 2, total - total // 2) for total in missing), (0, 0)])
    starts = [
        range(0, n - size + 1, stride)
        for n, size, stride in zip(x.shape[1:-1], reach, convolution.strides, strict=True)
    ]
    found = []
    for corner in itertools.product(*starts):
        index = tuple(
            slice(start, start + size, step)
            for start, size, step in zip(corner, reach, convolution.dilation, strict=True)
        )
        found.append(x[(slice(None), *index)])
    return np.concatenate(found)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_kernel_is_solved_on_the_windows_it_slides_over(name):
    """Inputs are ordered by channel, then by place in the window; each feature group has a Hessian of its own."""
    convolution = CONVOLUTIONS[name]
    weights, approximations, report, x = quantized(f"convolution, {name}")
    windows = patches(x, convolution)
    *_, channels, outputs = convolution.kernel
    for group in range(convolution.groups):
        ins = slice(group * channels, (group + 1) * channels)
        outs = slice(group * outputs // convolution.groups, (group + 1) * outputs // convolution.groups)
        rows = np.moveaxis(windows[..., ins], -1, 1).reshape(len(windows), -1)
        w, approx = (
            np.moveaxis(tree["w"][..., outs], -2, 0).reshape(rows.shape[1], -1) for tree in (weights, approximations)
        )
        assert_same(approx, oracle(w, moment(rows)))
    assert report.rows[0].tokens == len(windows) * convolution.groups


# Leaves with several uses, or in several parts.


def test_the_hessians_of_a_weight_used_twice_add_up():
    """Both inputs are the float function's: the weight is solved after its last use."""
    weights, approximations, report, x = quantized("used twice")
    x = x.reshape(-1, WIDTH)
    both = np.concatenate([x, np.tanh(x @ weights["w"])])
    assert_same(approximations["w"], oracle(weights["w"], moment(both)))
    assert report.rows[0].tokens == len(both)


def test_parts_along_the_inputs_are_solved_each_on_its_own_inputs():
    weights, approximations, report, x = quantized("sliced along its inputs")
    for part in (slice(0, 16), slice(16, 32)):
        assert_same(approximations["w"][part], oracle(weights["w"][part], moment(x[..., part])))
    assert [row.path for row in report.rows] == ["w[0:16]", "w[16:32]"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("fused qkv, sliced", ["qkv[:, 0:32]", "qkv[:, 32:64]", "qkv[:, 64:96]"]),
        ("fused qkv, jnp.split", ["qkv[:, 0:32]", "qkv[:, 32:64]", "qkv[:, 64:96]"]),
        ("fused qkv, uneven slices", ["qkv[:, 0:32]", "qkv[:, 32:48]", "qkv[:, 48:64]"]),
        ("fused qkv, (3, d, h, k) by index", ["qkv[0]", "qkv[1]", "qkv[2]"]),
    ],
)
def test_parts_along_the_outputs_share_a_hessian(name, parts):
    weights, approximations, report, x = quantized(name)
    w, approx = weights["qkv"], approximations["qkv"]
    if w.ndim == 4:
        w, approx = (np.moveaxis(leaf, 0, 1).reshape(WIDTH, -1) for leaf in (w, approx))
    assert_same(approx, oracle(w, moment(x)))
    assert [row.path for row in report.rows if row.path.startswith("qkv")] == parts


def test_a_recurrent_weight_is_solved_on_all_steps():
    weights, approximations, _, x = quantized("recurrent cell over time")
    assert_same(approximations["w"], oracle(weights["w"], moment(x)))
