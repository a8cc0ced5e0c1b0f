"""Modules as their frameworks' own layers make them: Linen, NNX, Haiku, Equinox."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import equinox
import haiku
import jax
import jax.numpy as jnp
from bare import EXPERTS, HEADS, HIDDEN, LAYERS, WIDTH
from flax import linen, nnx
from jax import lax

KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Module:
    """make: of an example input, f(params, *inputs) and params; an NNX module stands for both.

    quantized, left, scans: as in `bare.Bare`, by full paths.
    """

    make: Callable[[jax.Array], Any]
    quantized: frozenset[str]
    left: Mapping[str, str] = dataclasses.field(default_factory=dict)
    inputs: str = "features"
    scans: int = 0


def paths(prefix: str, *names: str) -> frozenset[str]:
    return frozenset(f"{prefix}{name}" for name in names)


def one_hot(scores: jax.Array) -> jax.Array:
    return jax.nn.one_hot(jnp.argmax(scores, axis=-1), EXPERTS, dtype=scores.dtype)


def by_expert(chosen: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.einsum("bte,btd->ebtd", chosen, x)


# Linen.


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x, _=None):
        hidden = linen.relu(linen.Dense(HIDDEN, name="up")(x))
        return x + linen.Dense(WIDTH, name="down")(hidden), None


class LinenExpert(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(WIDTH, use_bias=False, name="down")(
            linen.relu(linen.Dense(HIDDEN, use_bias=False, name="up")(x))
        )


class LinenScan(linen.Module):
    remat: bool = False

    @linen.compact
    def __call__(self, x):
        block = linen.remat(LinenBlock, prevent_cse=False) if self.remat else LinenBlock
        layers = linen.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        return layers(name="layers")(x, None)[0]


class LinenExperts(linen.Module):
    @linen.compact
    def __call__(self, x):
        inputs = by_expert(one_hot(linen.Dense(EXPERTS, name="router")(x)), x)
        experts = linen.vmap(LinenExpert, variable_axes={"params": 0}, split_rngs={"params": True})
        return jnp.sum(experts(name="experts")(inputs), axis=0)


class LinenRemat(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.remat(LinenBlock)(name="block")(x)[0]


class LinenShared(linen.Module):
    @linen.compact
    def __call__(self, x):
        dense = linen.Dense(WIDTH, name="dense")
        return dense(jnp.tanh(dense(x)))


class LinenTied(linen.Module):
    @linen.compact
    def __call__(self, ids):
        embed = linen.Embed(60, WIDTH, name="embed")
        return embed.attend(jnp.tanh(linen.Dense(WIDTH, name="dense")(embed(ids))))


class LinenThis(linen.Module):
    def setup(this):
        this.dense = linen.Dense(HIDDEN)

    def __call__(this, x):
        return this.dense(x)


def of_linen(module: linen.Module) -> Callable:
    return lambda x: (module.apply, module.init(KEY, x))


BLOCK = ("up.kernel", "down.kernel")
ATTENTION = ("query.kernel", "key.kernel", "value.kernel", "out.kernel")

LINEN = {
    "dense layer": Module(make=of_linen(linen.Dense(HIDDEN)), quantized=paths("params.", "kernel")),
    "attention layer": Module(
        make=of_linen(linen.MultiHeadDotProductAttention(HEADS)), quantized=paths("params.", *ATTENTION)
    ),
    "scan of modules": Module(make=of_linen(LinenScan()), quantized=paths("params.layers.", *BLOCK), scans=1),
    "scan of modules, remat": Module(
        make=of_linen(LinenScan(remat=True)), quantized=paths("params.layers.", *BLOCK), scans=1
    ),
    "experts by vmap of modules": Module(
        make=of_linen(LinenExperts()), quantized=paths("params.", "router.kernel", *paths("experts.", *BLOCK))
    ),
    "remat of a module": Module(make=of_linen(LinenRemat()), quantized=paths("params.block.", *BLOCK)),
    "layer called twice": Module(make=of_linen(LinenShared()), quantized=paths("params.", "dense.kernel")),
    "tied embedding, attend": Module(
        make=of_linen(LinenTied()),
        quantized=paths("params.", "dense.kernel"),
        left={"params.embed.embedding": "gather"},
        inputs="tokens",
    ),
    "methods that name self otherwise": Module(make=of_linen(LinenThis()), quantized=paths("params.", "dense.kernel")),
    "recurrent layer": Module(
        make=of_linen(linen.RNN(linen.SimpleCell(WIDTH))),
        quantized=paths("params.cell.", "i.kernel", "h.kernel"),
        scans=1,
    ),
    "convolution layer, 1-D": Module(make=of_linen(linen.Conv(WIDTH, (3,))), quantized=paths("params.", "kernel")),
    "convolution layer, 2-D": Module(
        make=of_linen(linen.Conv(16, (3, 3), strides=2)), quantized=paths("params.", "kernel"), inputs="images"
    ),
    "convolution layer, depthwise": Module(
        make=of_linen(linen.Conv(8, (3, 3), feature_group_count=8)),
        quantized=paths("params.", "kernel"),
        inputs="images",
    ),
}


# NNX.


class NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(x)))


class NnxExpert(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(WIDTH, HIDDEN, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


class NnxScan(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, *, remat: bool = False):
        self.layers = nnx.vmap(NnxBlock)(rngs.split(LAYERS))
        self.remat = remat

    def __call__(self, x):
        def layer(x, block):
            return block(x)

        layer = nnx.remat(layer) if self.remat else layer
        return nnx.scan(layer, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


class NnxExperts(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.router = nnx.Linear(WIDTH, EXPERTS, rngs=rngs)
        self.experts = nnx.vmap(NnxExpert)(rngs.split(EXPERTS))

    def __call__(self, x):
        inputs = by_expert(one_hot(self.router(x)), x)
        return jnp.sum(nnx.vmap(lambda expert, x: expert(x))(self.experts, inputs), axis=0)


class NnxRemat(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.block = NnxBlock(rngs)

    def __call__(self, x):
        return nnx.remat(lambda block, x: block(x))(self.block, x)


class NnxShared(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.dense(jnp.tanh(self.dense(x)))


class NnxTied(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(60, WIDTH, rngs=rngs)
        self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, ids):
        return self.embed.attend(jnp.tanh(self.dense(self.embed(ids))))


class NnxThis(nnx.Module):
    def __init__(this, rngs: nnx.Rngs):
        this.dense = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)

    def __call__(this, x):
        return this.dense(x)


def of_nnx(module: Callable, *arguments: Any, **options: Any) -> Callable:
    return lambda x: module(*arguments, rngs=nnx.Rngs(0), **options)


NNX = {
    "dense layer": Module(make=of_nnx(nnx.Linear, WIDTH, HIDDEN), quantized=paths("", "kernel")),
    "attention layer": Module(
        make=of_nnx(nnx.MultiHeadAttention, HEADS, WIDTH, decode=False), quantized=paths("", *ATTENTION)
    ),
    "scan of modules": Module(make=of_nnx(NnxScan), quantized=paths("layers.", *BLOCK), scans=1),
    "scan of modules, remat": Module(make=of_nnx(NnxScan, remat=True), quantized=paths("layers.", *BLOCK), scans=1),
    "experts by vmap of modules": Module(
        make=of_nnx(NnxExperts), quantized=paths("", "router.kernel", *paths("experts.", *BLOCK))
    ),
    "remat of a module": Module(make=of_nnx(NnxRemat), quantized=paths("block.", *BLOCK)),
    "layer called twice": Module(make=of_nnx(NnxShared), quantized=paths("", "dense.kernel")),
    "tied embedding, attend": Module(
        make=of_nnx(NnxTied),
        quantized=paths("", "dense.kernel"),
        left={"embed.embedding": "gather"},
        inputs="tokens",
    ),
    "methods that name self otherwise": Module(make=of_nnx(NnxThis), quantized=paths("", "dense.kernel")),
    "recurrent layer": Module(
        make=lambda x: nnx.RNN(nnx.SimpleCell(WIDTH, WIDTH, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)),
        quantized=paths("cell.", "dense_i.kernel", "dense_h.kernel"),
        scans=1,
    ),
    "convolution layer, 1-D": Module(make=of_nnx(nnx.Conv, WIDTH, WIDTH, (3,)), quantized=paths("", "kernel")),
    "convolution layer, 2-D": Module(
        make=of_nnx(nnx.Conv, 8, 16, (3, 3), strides=2), quantized=paths("", "kernel"), inputs="images"
    ),
    "convolution layer, depthwise": Module(
        make=of_nnx(nnx.Conv, 8, 8, (3, 3), feature_group_count=8), quantized=paths("", "kernel"), inputs="images"
    ),
}


# Haiku.


def of_haiku(f: Callable) -> Callable:
    transformed = haiku.without_apply_rng(haiku.transform(f))
    return lambda x: (transformed.apply, transformed.init(KEY, x))


def haiku_block(x):
    return x + haiku.Linear(WIDTH, name="down")(jax.nn.relu(haiku.Linear(HIDDEN, name="up")(x)))


def haiku_shared(x):
    dense = haiku.Linear(WIDTH, name="dense")
    return dense(jnp.tanh(dense(x)))


def haiku_attention(x):
    return haiku.MultiHeadAttention(
        HEADS, WIDTH // HEADS, model_size=WIDTH, w_init=haiku.initializers.VarianceScaling(), name="attention"
    )(x, x, x)


def haiku_recurrent(x):
    core = haiku.VanillaRNN(WIDTH, name="cell")
    return haiku.dynamic_unroll(core, x, core.initial_state(x.shape[0]), time_major=False)[0]


HAIKU = {
    "dense layer": Module(make=of_haiku(lambda x: haiku.Linear(HIDDEN)(x)), quantized=paths("linear.", "w")),
    "attention layer": Module(
        make=of_haiku(haiku_attention),
        quantized=paths("attention/", "query.w", "key.w", "value.w", "linear.w"),
    ),
    "scan of modules": Module(
        make=of_haiku(lambda x: haiku.experimental.layer_stack(LAYERS, name="layers")(haiku_block)(x)),
        quantized=paths("layers/", "up.w", "down.w"),
        scans=1,
    ),
    "remat of a module": Module(
        make=of_haiku(lambda x: haiku.remat(haiku_block)(x)), quantized=paths("", "up.w", "down.w")
    ),
    "layer called twice": Module(make=of_haiku(haiku_shared), quantized=paths("dense.", "w")),
    "recurrent layer": Module(
        make=of_haiku(haiku_recurrent),
        quantized=paths("cell/", "linear.w", "linear_1.w"),
        scans=1,
    ),
    "convolution layer, 1-D": Module(
        make=of_haiku(lambda x: haiku.Conv1D(WIDTH, 3)(x)), quantized=paths("conv1_d.", "w")
    ),
    "convolution layer, 2-D": Module(
        make=of_haiku(lambda x: haiku.Conv2D(16, 3, stride=2)(x)), quantized=paths("conv2_d.", "w"), inputs="images"
    ),
    "convolution layer, depthwise": Module(
        make=of_haiku(lambda x: haiku.DepthwiseConv2D(1, 3)(x)),
        quantized=paths("depthwise_conv2_d.", "w"),
        inputs="images",
    ),
}


# Equinox: modules take one example, and may hold functions as leaves.


class EquinoxScan(equinox.Module):
    layers: equinox.nn.MLP

    def __init__(self):
        keys = jax.random.split(KEY, LAYERS)
        self.layers = equinox.filter_vmap(lambda key: equinox.nn.MLP(WIDTH, WIDTH, HIDDEN, 1, key=key))(keys)

    def __call__(self, x):
        stacks, static = equinox.partition(self.layers, equinox.is_array)

        def layer(x, arrays):
            return x + jax.vmap(equinox.combine(arrays, static))(x), None

        return lax.scan(layer, x, stacks)[0]


class EquinoxRecurrent(equinox.Module):
    cell: equinox.nn.GRUCell

    def __init__(self):
        self.cell = equinox.nn.GRUCell(WIDTH, WIDTH, key=KEY)

    def __call__(self, x):
        def step(state, x_t):
            state = self.cell(x_t, state)
            return state, state

        return lax.scan(step, jnp.zeros(WIDTH), x)[1]


def of_equinox(
    make: Callable[[], equinox.Module], call: Callable = lambda module, example: module(example)
) -> Callable:
    return lambda x: (lambda module, x: jax.vmap(lambda example: call(module, example))(x), make())


def each_token(module, x):
    return jax.vmap(module)(x)


EQUINOX = {
    "dense layer": Module(
        make=of_equinox(lambda: equinox.nn.Linear(WIDTH, HIDDEN, key=KEY), each_token), quantized=paths("", "weight")
    ),
    "attention layer": Module(
        make=of_equinox(lambda: equinox.nn.MultiheadAttention(HEADS, WIDTH, key=KEY), lambda m, x: m(x, x, x)),
        quantized=paths("", *(f"{name}_proj.weight" for name in ("query", "key", "value", "output"))),
    ),
    "MLP, its activation a leaf": Module(
        make=of_equinox(lambda: equinox.nn.MLP(WIDTH, WIDTH, HIDDEN, 1, key=KEY), each_token),
        quantized=paths("layers.", "0.weight", "1.weight"),
    ),
    "scan of modules": Module(
        make=of_equinox(EquinoxScan), quantized=paths("layers.layers.", "0.weight", "1.weight"), scans=1
    ),
    "remat of a module": Module(
        make=of_equinox(
            lambda: equinox.nn.MLP(WIDTH, WIDTH, HIDDEN, 1, key=KEY),
            lambda m, x: equinox.filter_checkpoint(each_token)(m, x),
        ),
        quantized=paths("layers.", "0.weight", "1.weight"),
    ),
    "layer called twice": Module(
        make=of_equinox(
            lambda: equinox.nn.Linear(WIDTH, WIDTH, key=KEY), lambda m, x: each_token(m, jnp.tanh(each_token(m, x)))
        ),
        quantized=paths("", "weight"),
    ),
    "recurrent layer": Module(
        make=of_equinox(EquinoxRecurrent), quantized=paths("cell.", "weight_ih", "weight_hh"), scans=1
    ),
    "convolution layer, 1-D": Module(
        make=of_equinox(lambda: equinox.nn.Conv1d(WIDTH, WIDTH, 3, key=KEY), lambda m, x: m(x.T)),
        quantized=paths("", "weight"),
    ),
    "convolution layer, 2-D": Module(
        make=of_equinox(lambda: equinox.nn.Conv2d(8, 16, 3, stride=2, key=KEY), lambda m, x: m(x.transpose(2, 0, 1))),
        quantized=paths("", "weight"),
        inputs="images",
    ),
    "convolution layer, depthwise": Module(
        make=of_equinox(lambda: equinox.nn.Conv2d(8, 8, 3, groups=8, key=KEY), lambda m, x: m(x.transpose(2, 0, 1))),
        quantized=paths("", "weight"),
        inputs="images",
    ),
}

FRAMEWORKS = {"Linen": LINEN, "NNX": NNX, "Haiku": HAIKU, "Equinox": EQUINOX}
