"""Batches cut anew: the same bits however rows were given, and batches as they are where rows meet."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jgptq
from jgptq import Grid
from jgptq.models import MODELS, LanguageModel
from jgptq.tracing import batching
from jgptq.tracing.batching import Room, largest
from jgptq.tracing.costs import costs
from jgptq.tracing.graph import trace

ROWS, TOKENS, WIDTH = 8, 8, 32
GRID = Grid(bits=4, group_size=16)
ROOM = Room(parameters=0)
SPLITS = ((8,), (4, 4), (1,) * 8, (3, 5), (7, 1))


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def llama():
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MODELS["llama"].parse_config({"model_type": "llama", "vocab_size": 64, **sizes})
    model = LanguageModel(architecture=MODELS["llama"], config=config)
    return model.apply, model.init(jax.random.key(0)), np.random.default_rng(0).integers(0, 64, (ROWS, TOKENS))


def perceptron():
    params = {"up": normal(1, WIDTH, 64) / 4, "down": normal(2, 64, WIDTH) / 4}
    return lambda p, x: x + jax.nn.gelu(x @ p["up"]) @ p["down"], params, normal(3, ROWS, TOKENS, WIDTH)


def of_linen():
    class Block(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = x + linen.MultiHeadDotProductAttention(num_heads=2)(linen.LayerNorm()(x))
            return linen.Dense(WIDTH)(linen.BatchNorm(use_running_average=True)(x))

    x = normal(4, ROWS, TOKENS, WIDTH)
    return Block().apply, Block().init(jax.random.key(0), x[:1]), x


def cut(rows, splits):
    return [(piece,) for piece in np.split(rows, np.cumsum(splits)[:-1])]


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def shapes(f, params, batches, room=ROOM):
    """Those of the first leaf of each batch that is run."""
    cuts = largest(f, params, batches, room)
    return [np.shape(jax.tree.leaves(batch)[0]) for cut in cuts for batch in cut.of(batches)]


def room_for(monkeypatch, f, params, batch):
    """Such a batch just fits."""
    monkeypatch.setattr(batching, "CPU_BATCH", costs(trace(f, params, *batch)).most)


@pytest.mark.parametrize("most", [8, 3], ids=["all at once", "three at once"])
@pytest.mark.parametrize(("made", "quality"), [(llama, "fast"), (perceptron, "balanced"), (of_linen, "fast")])
def test_any_split_gives_the_same_bits(made, quality, most, monkeypatch):
    f, params, rows = made()
    room_for(monkeypatch, f, params, (rows[:most],))
    results = []
    for splits in SPLITS:
        batches = cut(rows, splits)
        assert shapes(f, params, batches) == [(size, *rows.shape[1:]) for size in {8: [8], 3: [2, 2, 2, 2]}[most]]
        results.append(jgptq.quantize(f, params, batches, grid=GRID, quality=quality)[0])
    assert len({tuple(bits(packed)) for packed in results}) == 1


def test_of_a_prime_number_of_rows_the_last_batch_has_less(monkeypatch):
    f, params, _ = perceptron()
    rows = normal(5, 7, TOKENS, WIDTH)
    room_for(monkeypatch, f, params, (rows[:3],))
    batches = cut(rows, (2, 5))
    assert [shape[0] for shape in shapes(f, params, batches)] == [3, 3, 1]
    joined = [batch[0] for cut in largest(f, params, batches, ROOM) for batch in cut.of(batches)]
    np.testing.assert_array_equal(np.concatenate(joined), rows)


def test_batches_stay_as_they_are_where_rows_meet():
    def normalized(w, x):
        return (x - jnp.mean(x, axis=0, keepdims=True)) @ w

    w, given = normal(6, WIDTH, 4), cut(normal(7, 64, WIDTH), (24, 24, 16))
    assert shapes(normalized, w, given) == [(24, WIDTH), (24, WIDTH), (16, WIDTH)]
    packed, _ = jgptq.quantize(normalized, w, given, grid=GRID, method="gptq", quality="fast")
    centred = [(x - x.mean(0, keepdims=True),) for (x,) in given]
    expected, _ = jgptq.quantize(lambda w, x: x @ w, w, centred, grid=GRID, method="gptq", quality="fast")
    np.testing.assert_allclose(packed.dequantize(), expected.dequantize(), atol=1e-6)


def test_inputs_with_rows_and_inputs_without():
    def f(w, x, labels, mask, scale):
        return (x + labels[:, None, None] * mask[None, :, None] * scale) @ w

    w, mask = normal(6, WIDTH, 4), normal(8, TOKENS)
    x, labels = normal(7, ROWS, TOKENS, WIDTH), normal(9, ROWS)
    batches = [(x[:3], labels[:3], mask, 2.0), (x[3:], labels[3:], mask.copy(), 2.0)]
    assert shapes(f, w, batches) == [(ROWS, TOKENS, WIDTH)]
    (cut,) = largest(f, w, batches, ROOM)
    jax.tree.map(np.testing.assert_array_equal, cut.of(batches), [(x, labels, mask, 2.0)])
    for other in ((mask + 1, 2.0), (mask, 3.0)):
        apart = [batches[0], (*batches[1][:2], *other)]
        assert shapes(f, w, apart) == [(3, TOKENS, WIDTH), (5, TOKENS, WIDTH)]


def test_an_input_without_rows_may_be_as_long_as_a_batch():
    """x (4, 4, width) with a table (4, 4) of tokens: which of them has rows is seen by trying."""

    def f(w, table, x):
        return jnp.einsum("ts,bsd->btd", table, x) @ w

    w, table, rows = normal(6, WIDTH, 4), normal(8, 4, 4), normal(7, ROWS, 4, WIDTH)
    batches = [(table, rows[:4]), (table, rows[4:])]
    (cut,) = largest(f, w, batches, ROOM)
    jax.tree.map(np.testing.assert_array_equal, cut.of(batches), [(table, rows)])


def test_a_function_that_takes_no_single_row_gets_none(monkeypatch):
    def several(w, x):
        if x.shape[0] < 2:
            raise ValueError("give several rows")
        return x @ w

    w, batches = normal(6, WIDTH, 4), cut(normal(7, 7, WIDTH), (5, 2))
    monkeypatch.setattr(batching, "CPU_BATCH", 0)
    assert shapes(several, w, batches) == [(5, WIDTH), (2, WIDTH)]


def test_the_batches_given_are_looked_at_even_where_they_have_one_row(monkeypatch):
    """The first does something else for one row; the second takes another axis."""

    def branching(p, x):
        return x @ p["a"] if x.shape[0] == 1 else jnp.tanh(x @ p["a"]) @ p["b"]

    def squeezed(p, x):
        return jnp.cumsum(jnp.squeeze(x), axis=1) @ p["a"]

    p = {"a": normal(6, WIDTH, WIDTH), "b": normal(7, WIDTH, 4)}
    rows = normal(8, 4, TOKENS, WIDTH)
    for f in (branching, squeezed):
        assert [shape[0] for shape in shapes(f, p, cut(rows, (1,) * 4))] == [1] * 4
    assert shapes(branching, p, cut(rows, (2, 2))) == [rows.shape]
    monkeypatch.setattr(batching, "CPU_BATCH", 0)
    assert [shape[0] for shape in shapes(branching, p, cut(rows, (2, 2)))] == [2, 2]


def test_what_is_common_weighs_as_much_beside_rows_however_many_batches_there_are():
    def f(w, x, c):
        return x @ w + (c @ w)[None]

    w, c = normal(6, WIDTH, 4), normal(9, TOKENS, WIDTH)
    batches = [(x, c) for (x,) in cut(normal(7, ROWS, TOKENS, WIDTH), (3, 5))]
    assert shapes(f, w, batches) == [(3, TOKENS, WIDTH), (5, TOKENS, WIDTH)]
    assert shapes(lambda w, x, c: x @ w[0] + (c @ w[1])[None], (w, w), batches) == [(ROWS, TOKENS, WIDTH)]


def test_an_input_of_one_row_for_all_is_not_repeated():
    def f(w, mask, x):
        return jnp.einsum("ts,bsd->btd", mask[0], x) @ w

    w, mask, rows = normal(6, WIDTH, 4), normal(8, 1, TOKENS, TOKENS), normal(7, ROWS, TOKENS, WIDTH)
    for splits in ((1,) * 8, (4, 4), (8,)):
        (cut_anew,) = largest(f, w, [(mask, x) for (x,) in cut(rows, splits)], ROOM)
        ((common, joined),) = cut_anew.of([(mask, x) for (x,) in cut(rows, splits)])
        assert common.shape == mask.shape
        np.testing.assert_array_equal(joined, rows)


def test_weakly_typed_batches_stay_as_they_are():
    """A bfloat16 model multiplies them in bfloat16, but the same numbers in float32 in float32."""
    w = jnp.asarray(normal(6, WIDTH, 4), jnp.bfloat16)
    weak = [(jnp.ones((size, WIDTH), jnp.uint8) / 255.0,) for size in (3, 5)]
    assert weak[0][0].weak_type
    cuts = largest(lambda w, x: x @ w, w, weak, ROOM)
    assert [each.graph.equations[-1].outvars[0].aval.dtype for each in cuts] == [jnp.bfloat16] * 2


def test_batches_of_other_lengths_are_joined_with_their_like():
    f, params, rows = perceptron()
    batches = [(rows[:2],), (rows[:3, :4],), (rows[2:],), (rows[3:, :4],)]
    assert shapes(f, params, batches) == [rows.shape, (ROWS, 4, WIDTH)]


def test_arrays_on_the_device_and_on_the_host():
    f, params, rows = perceptron()
    batches = [(jnp.asarray(rows[:3]),), (rows[3:],)]
    (cut,) = largest(f, params, batches, ROOM)
    ((joined,),) = cut.of(batches)
    assert isinstance(joined, jax.Array)
    np.testing.assert_array_equal(joined, rows)


def test_a_function_for_batches_of_one_size_gets_these():
    w, rows = normal(6, WIDTH, 4), normal(7, ROWS, WIDTH)

    def four(w, x):
        return x.reshape(4, WIDTH) @ w

    assert shapes(four, w, cut(rows, (4, 4))) == [(4, WIDTH)] * 2
    with pytest.raises(TypeError, match="reshape"):
        largest(four, w, cut(rows, (5, 3)), ROOM)


def test_a_loss_is_of_the_batches_given():
    f, params, rows = perceptron()
    seen = set()

    def loss(outputs, inputs):
        seen.add(outputs.shape[0])
        return jnp.mean(outputs**2)

    jgptq.quantize(f, params, cut(rows, (3, 5)), grid=GRID, method="rtn", loss=loss)
    assert seen == {3, 5}


def test_an_accelerator_has_room_for_what_its_memory_leaves(monkeypatch):
    """Half of what is left by parameters, four Hessians, and the activations of both models between segments."""
    f, params, rows = perceptron()
    cost = costs(trace(f, params, rows))
    waiting = ROWS * TOKENS * (WIDTH + 64) * 4  # the stream and what is read
    assert (max(cost.waiting), cost.hessian) == (waiting, 4 * 64 * 64)
    monkeypatch.setattr(batching, "device_memory", lambda: 10_000_000)
    left = 10_000_000 - 1_000_000 - 4 * cost.hessian
    assert Room(parameters=1_000_000, models=2).of_batch(cost) == (left - 2 * waiting) // 2
    assert Room(parameters=1_000_000, on_host=True).of_batch(cost) == left // 2
    assert Room(parameters=20_000_000).of_batch(cost) == 0
    assert shapes(f, params, cut(rows, (8,)), Room(parameters=20_000_000)) == [(1, TOKENS, WIDTH)] * ROWS
    monkeypatch.setattr(batching, "device_memory", lambda: 1 << 50)
    assert ROOM.of_batch(cost) == batching.MOST


def test_shapes_are_cut_as_arrays_are(monkeypatch):
    f, params, rows = perceptron()
    room_for(monkeypatch, f, params, (rows[:3],))
    abstract = [(jax.ShapeDtypeStruct(x.shape, x.dtype),) for (x,) in cut(rows, (3, 5))]
    (one,), (other,) = (largest(f, params, batches, ROOM) for batches in (abstract, cut(rows, (3, 5))))
    assert one.pieces == other.pieces == [[(0, 0, 2)], [(0, 2, 3), (1, 0, 1)], [(1, 1, 3)], [(1, 3, 5)]]
