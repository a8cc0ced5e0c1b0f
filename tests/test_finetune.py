"""Tuning scales and norms towards the float model's distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jgptq

WIDTH, VOCABULARY = 16, 24
GRID = jgptq.Grid(bits=2, group_size=8)


def network(params, tokens):
    x = params["embedding"][tokens]
    x = x + jnp.tanh(x @ params["up"]) @ params["down"]
    return (x * params["norm"][None, None]) @ params["head"]


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape).astype(np.float32) / np.sqrt(shape[0]))

    params = {
        "embedding": 4.0 * normal(VOCABULARY, WIDTH),
        "up": normal(WIDTH, 32),
        "down": normal(32, WIDTH),
        "norm": jnp.full(WIDTH, 2.0),
        "head": normal(WIDTH, VOCABULARY),
    }
    batches = [(rng.integers(0, VOCABULARY, (4, 12)),) for _ in range(9)]
    packed, _ = jgptq.quantize(network, params, batches, grid=GRID, method="rtn")
    return params, packed, batches


def divergence(params, packed, tokens):
    """KL(float || packed) in float64."""
    dense = jax.tree.map(
        lambda leaf: leaf.dequantize() if isinstance(leaf, jgptq.QuantizedTensor) else leaf,
        packed,
        is_leaf=lambda leaf: isinstance(leaf, jgptq.QuantizedTensor),
    )
    logs = []
    for values in (params, dense):
        logits = np.asarray(network(values, tokens), np.float64)
        logs.append(logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True)))
    return float(np.mean(np.sum(np.exp(logs[0]) * (logs[0] - logs[1]), axis=-1)))


def test_tuning_lowers_the_divergence_on_other_tokens_and_moves_no_code(model):
    params, packed, batches = model
    tuned, report = jgptq.tune(network, params, packed, batches, steps=60, learning_rate=5e-3)
    assert report.taken
    held_out = [batches[0], batches[8]]
    for value, tree in ((report.before, packed), (report.after, tuned)):
        assert value == pytest.approx(np.mean([divergence(params, tree, *batch) for batch in held_out]), rel=1e-3)
    fresh = np.random.default_rng(9).integers(0, VOCABULARY, (16, 12))
    assert divergence(params, tuned, fresh) < 0.9 * divergence(params, packed, fresh)
    for key in ("up", "down", "head"):
        np.testing.assert_array_equal(tuned[key].codes, packed[key].codes)
        assert tuned[key].scales.dtype == packed[key].scales.dtype == jnp.float16
    assert (np.asarray(tuned["norm"]) != 2.0).any()
    np.testing.assert_array_equal(tuned["embedding"], packed["embedding"])


def test_what_does_not_help_is_not_taken(model):
    params, packed, batches = model
    kept, report = jgptq.tune(network, params, packed, batches, steps=1, learning_rate=100.0)
    assert not report.taken
    assert kept is packed


def test_bad_input_is_named(model):
    params, packed, batches = model
    with pytest.raises(ValueError, match="at least two batches"):
        jgptq.tune(network, params, packed, batches[:1])
    with pytest.raises(ValueError, match="steps=0"):
        jgptq.tune(network, params, packed, batches, steps=0)
    bare = {"w": jnp.ones((4, 4))}
    with pytest.raises(ValueError, match="no QuantizedTensor"):
        jgptq.tune(lambda p, x: x @ p["w"], bare, bare, [jnp.ones((2, 4))] * 2)
