"""Bare functions f(params, x): the ways in which JAX programs read a weight.

x is (batch, time, WIDTH) features unless an entry names other inputs. Every leaf is to be quantized but those in
`left`, whose reason must contain the words given.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

WIDTH, HIDDEN, HEADS, EXPERTS, LAYERS, CHANNELS = 32, 64, 4, 3, 3, 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bare:
    """scans: scans in the function, each of which must still be one when it is served."""

    f: Callable
    shapes: Mapping[str, tuple[int, ...]]
    left: Mapping[str, str] = dataclasses.field(default_factory=dict)
    inputs: str = "features"
    scans: int = 0


SQUARE = {"w": (WIDTH, WIDTH)}
WIDE = {"w": (WIDTH, HIDDEN)}
STACK = {"up": (LAYERS, WIDTH, HIDDEN), "down": (LAYERS, HIDDEN, WIDTH)}
LORA = {"w": (WIDTH, WIDTH), "lora_a": (WIDTH, 16), "lora_b": (16, WIDTH)}
MIXTURE = {
    "router": (WIDTH, EXPERTS),
    "up": (EXPERTS, WIDTH, HIDDEN),
    "down": (EXPERTS, HIDDEN, WIDTH),
}


# Products.

MESH = Mesh(np.array(jax.devices()[:1]), ("model",))


def sharded(p, x):
    return x @ lax.with_sharding_constraint(p["w"], NamedSharding(MESH, PartitionSpec(None, "model")))


def mapped_shards(p, x):
    product = jax.shard_map(
        lambda x, w: x @ w,
        mesh=MESH,
        in_specs=(PartitionSpec(), PartitionSpec(None, "model")),
        out_specs=PartitionSpec(None, None, "model"),
    )
    return product(x, p["w"])


def twice(p, x):
    return jnp.tanh(x @ p["w"]) @ p["w"]


def block(p, x):
    return x + jax.nn.relu(x @ p["up"]) @ p["down"]


def repeated(p, x):
    for _ in range(3):
        x = block(p, x)
    return x


@jax.jit
def jitted(x, w):
    return x @ w


# Parts of a leaf.


def attention(q, k, v):
    """Heads of WIDTH / HEADS features; a key and value head may serve several query heads."""
    q, k, v = (y.reshape(*y.shape[:2], -1, WIDTH // HEADS) for y in (q, k, v))
    k, v = (jnp.repeat(y, HEADS // y.shape[2], axis=2) for y in (k, v))
    scores = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
    return jnp.einsum("bhts,bshk->bthk", scores, v).reshape(*q.shape[:2], WIDTH)


def sliced(p, x):
    q, k, v = (x @ p["qkv"][:, start : start + WIDTH] for start in (0, WIDTH, 2 * WIDTH))
    return attention(q, k, v) @ p["out"]


def grouped_query(p, x):
    q, k, v = x @ p["qkv"][:, :32], x @ p["qkv"][:, 32:48], x @ p["qkv"][:, 48:]
    return attention(q, k, v) @ p["out"]


def split(p, x):
    return attention(*(x @ w for w in jnp.split(p["qkv"], 3, axis=1))) @ p["out"]


def indexed(p, x):
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p["qkv"][i]) for i in range(3))
    return attention(q, k, v) @ p["out"]


def unrolled(p, x):
    for i in range(LAYERS):
        x = x + jax.nn.relu(x @ p["up"][i]) @ p["down"][i]
    return x


# Loops.


def layer(x, w):
    return block(w, x), None


def scanned(p, x):
    return lax.scan(layer, x, p)[0]


def scanned_remat(p, x):
    return lax.scan(jax.checkpoint(layer), x, p)[0]


def scanned_reverse(p, x):
    return lax.scan(layer, x, p, reverse=True)[0]


def scanned_outputs(p, x):
    def body(x, w):
        x, _ = layer(x, w)
        return x, (x, jnp.mean(x))

    return lax.scan(body, x, p)


def scanned_in_scan(p, x):
    return lax.scan(lambda x, stack: lax.scan(layer, x, stack), x, p)[0]


def scanned_transposed(p, x):
    return lax.scan(lambda x, w: (x + jax.nn.relu(x @ w["up"].T) @ w["down"].T, None), x, p)[0]


def scanned_moved_axis(p, x):
    return lax.scan(layer, x, {name: jnp.moveaxis(w, 1, 0) for name, w in p.items()})[0]


def scanned_bfloat16(p, x):
    stack = {name: w.astype(jnp.bfloat16) for name, w in p.items()}
    return lax.scan(layer, x.astype(jnp.bfloat16), stack)[0].astype(jnp.float32)


def scanned_same_weight(p, x):
    return lax.scan(lambda x, _: layer(x, p), x, None, length=3)[0]


def scanned_mixture(p, x):
    return lax.scan(lambda x, w: (x + dispatched(w, x), None), x, p)[0]


def loop_by_index(p, x):
    return lax.fori_loop(0, LAYERS, lambda i, x: block({name: w[i] for name, w in p.items()}, x), x)


def recurrent(p, x):
    """A tanh cell over time: the hidden state's weight and the input's are the same at every step."""

    def cell(state, x_t):
        state = jnp.tanh(x_t @ p["w"] + state @ p["u"])
        return state, state

    return lax.scan(cell, jnp.zeros_like(x[:, 0]), x.swapaxes(0, 1))[1]


def scanned_in_blocks(p, x):
    """Layers taken two at a time, as for remat of every second layer."""
    blocks = {name: w.reshape(-1, 2, *w.shape[1:]) for name, w in p.items()}
    return scanned_in_scan(blocks, x)


def scanned_after_first(p, x):
    first, rest = ({name: w[part] for name, w in p.items()} for part in (0, slice(1, None)))
    return scanned(rest, block(first, x))


def scanned_slices(p, x):
    return lax.scan(lambda x, w: (x + sliced(w, x), None), x, p)[0]


def scanned_ragged(p, x):
    return lax.scan(jax.checkpoint(lambda x, w: (x + ragged(w, x), None)), x, p)[0]


def carried(p, x):
    """The weights are part of the carry, and the same at every step."""
    return lax.scan(lambda carry, _: ((block(carry[1], carry[0]), carry[1]), None), (x, p), None, length=3)[0][0]


def layers_of_cells(p, x):
    """Layers in a scan, each a recurrence in a scan over time."""
    return lax.scan(lambda x, w: (x + recurrent(w, x).swapaxes(0, 1), None), x, p)[0]


def branch(p, x):
    return lax.cond(jnp.sum(x) > 0, lambda x: x @ p["w"], lambda x: x, x)


def while_loop(p, x):
    return lax.while_loop(lambda state: state[1] < 2, lambda state: (state[0] @ p["w"], state[1] + 1), (x, 0))[0]


# Mixtures of experts.


def routes(p, x):
    """One-hot choice of an expert for each token, (batch, time, experts)."""
    return jax.nn.one_hot(jnp.argmax(x @ p["router"], axis=-1), p["up"].shape[0], dtype=x.dtype)


def dispatched(p, x):
    """Every token in its expert's batch, zero in the others'."""
    chosen = routes(p, x)
    inputs = jnp.einsum("bte,btd->ebtd", chosen, x)
    hidden = jax.nn.relu(jnp.einsum("ebtd,edf->ebtf", inputs, p["up"]))
    return jnp.sum(jnp.einsum("ebtf,efd->ebtd", hidden, p["down"]), axis=0)


def with_capacity(p, x):
    """Switch-style: the dispatch mask gives each token a place in its expert's buffer."""
    tokens = x.reshape(-1, WIDTH)
    chosen = routes(p, tokens)
    place = (jnp.cumsum(chosen, axis=0) * chosen - 1).astype(jnp.int32)
    mask = jax.nn.one_hot(place, tokens.shape[0], dtype=x.dtype)
    inputs = jnp.einsum("tec,td->ecd", mask, tokens)
    hidden = jax.nn.relu(jnp.einsum("ecd,edf->ecf", inputs, p["up"]))
    outputs = jnp.einsum("ecf,efd->ecd", hidden, p["down"])
    return jnp.einsum("tec,ecd->td", mask, outputs).reshape(x.shape)


def ragged(p, x):
    """Tokens sorted by expert, each expert's rows multiplied by its own weight."""
    tokens = x.reshape(-1, WIDTH)
    expert = jnp.argmax(tokens @ p["router"], axis=-1)
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=p["up"].shape[0]).astype(jnp.int32)
    hidden = jax.nn.relu(lax.ragged_dot(tokens[order], p["up"], sizes))
    outputs = lax.ragged_dot(hidden, p["down"], sizes)
    return jnp.zeros_like(outputs).at[order].set(outputs).reshape(x.shape)


def mapped(p, x):
    chosen = routes(p, x)
    inputs = jnp.einsum("bte,btd->ebtd", chosen, x)
    return jnp.sum(jax.vmap(lambda up, down, x: jax.nn.relu(x @ up) @ down)(p["up"], p["down"], inputs), axis=0)


def mapped_in_turn(p, x):
    chosen = routes(p, x)
    inputs = jnp.einsum("bte,btd->ebtd", chosen, x)
    return jnp.sum(lax.map(lambda e: jax.nn.relu(e[2] @ e[0]) @ e[1], (p["up"], p["down"], inputs)), axis=0)


def gathered(p, x):
    """Each token takes its own expert's matrix."""
    expert = jnp.argmax(x @ p["router"], axis=-1)
    return jnp.einsum("btf,btfd->btd", jax.nn.relu(jnp.einsum("btd,btdf->btf", x, p["up"][expert])), p["down"][expert])


def all_experts(p, x):
    """Every expert on every token, weighted by the router."""
    gates = jax.nn.softmax(x @ p["router"])
    hidden = jax.nn.relu(jnp.einsum("btd,edf->btef", x, p["up"]))
    return jnp.einsum("btef,bte,efd->btd", hidden, gates, p["down"])


# Convolutions.


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A kernel (*window, in, out) slid over (batch, *space, channels)."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    padding: str = "SAME"

    def apply(self, p, x):
        return lax.conv_general_dilated(
            x,
            p["w"],
            self.strides,
            self.padding,
            rhs_dilation=self.dilation,
            dimension_numbers=("NWC", "WIO", "NWC") if x.ndim == 3 else ("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
        )


IMAGE = (3, 3, CHANNELS, 2 * CHANNELS)
CONVOLUTIONS = {
    "1-D": Convolution((3, WIDTH, WIDTH), (1,), (1,)),
    "1-D, stride 2": Convolution((3, WIDTH, WIDTH), (2,), (1,)),
    "2-D": Convolution(IMAGE, (1, 1), (1, 1)),
    "2-D, stride 2": Convolution(IMAGE, (2, 2), (1, 1), padding="VALID"),
    "2-D, dilation 2": Convolution(IMAGE, (1, 1), (2, 2)),
    "2-D, two groups": Convolution((3, 3, CHANNELS // 2, 2 * CHANNELS), (1, 1), (1, 1), groups=2),
    "2-D, depthwise": Convolution((3, 3, 1, CHANNELS), (1, 1), (1, 1), groups=CHANNELS),
}

BARE = (
    {
        "x @ w": Bare(f=lambda p, x: x @ p["w"], shapes=WIDE),
        "x @ w.T": Bare(f=lambda p, x: x @ p["w"].T, shapes={"w": (HIDDEN, WIDTH)}),
        "jnp.dot": Bare(f=lambda p, x: jnp.dot(x, p["w"]), shapes=WIDE),
        "lax.dot_general": Bare(f=lambda p, x: lax.dot_general(x, p["w"], (((2,), (0,)), ((), ()))), shapes=WIDE),
        "einsum, weight first": Bare(
            f=lambda p, x: jnp.einsum("of,btf->bto", p["w"], x), shapes={"w": (HIDDEN, WIDTH)}
        ),
        "einsum over two axes": Bare(
            f=lambda p, x: jnp.einsum("bthk,hkd->btd", x.reshape(*x.shape[:2], HEADS, -1), p["w"]),
            shapes={"w": (HEADS, WIDTH // HEADS, WIDTH)},
        ),
        "inner jit": Bare(f=lambda p, x: jitted(x, p["w"]), shapes=WIDE),
        "remat": Bare(
            f=lambda p, x: jax.checkpoint(block)(p, x), shapes={"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
        ),
        "vmap over inputs": Bare(f=lambda p, x: jax.vmap(lambda row: row @ p["w"])(x), shapes=WIDE),
        "scaled by a number": Bare(f=lambda p, x: x @ (0.5 * p["w"]), shapes=WIDE),
        "scaled along its outputs": Bare(
            f=lambda p, x: x @ (p["w"] * p["gain"][None]), shapes=WIDE | {"gain": (HIDDEN,)}, left={"gain": "mul"}
        ),
        "scaled along its inputs": Bare(
            f=lambda p, x: x @ (p["w"] * p["gain"][:, None]),
            shapes=WIDE | {"gain": (WIDTH,)},
            left={"w": "scaling along its inputs", "gain": "mul"},
        ),
        "normalized before use": Bare(
            f=lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True)),
            shapes=WIDE,
            left={"w": "also used"},
        ),
        "cast to bfloat16": Bare(
            f=lambda p, x: (x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)).astype(jnp.float32), shapes=WIDE
        ),
        "sharding constraint": Bare(f=sharded, shapes=WIDE),
        "in a shard_map": Bare(f=mapped_shards, shapes=WIDE, left={"w": "shard_map"}),
        "used twice": Bare(f=twice, shapes=SQUARE),
        "block repeated three times": Bare(f=repeated, shapes={"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}),
        "used plain and transposed": Bare(
            f=lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, shapes=SQUARE, left={"w": "used"}
        ),
        "LoRA sum": Bare(
            f=lambda p, x: x @ (p["w"] + p["lora_a"] @ p["lora_b"]),
            shapes=LORA,
            left=dict.fromkeys(("lora_a", "lora_b"), "product of two weights"),
        ),
        "LoRA beside": Bare(f=lambda p, x: x @ p["w"] + (x @ p["lora_a"]) @ p["lora_b"], shapes=LORA),
        "tied embeddings": Bare(
            f=lambda p, ids: jnp.tanh(p["embedding"][ids] @ p["w"]) @ p["embedding"].T,
            shapes={"embedding": (60, WIDTH)} | SQUARE,
            left={"embedding": "gather"},
            inputs="tokens",
        ),
        "fused qkv, sliced": Bare(f=sliced, shapes={"qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH)}),
        "fused qkv, uneven slices": Bare(f=grouped_query, shapes={"qkv": (WIDTH, 2 * WIDTH), "out": (WIDTH, WIDTH)}),
        "fused qkv, jnp.split": Bare(f=split, shapes={"qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH)}),
        "fused qkv, (3, d, h, k) by index": Bare(
            f=indexed, shapes={"qkv": (3, WIDTH, HEADS, WIDTH // HEADS), "out": (WIDTH, WIDTH)}
        ),
        "sliced along its inputs": Bare(
            f=lambda p, x: x[..., :16] @ p["w"][:16] + x[..., 16:] @ p["w"][16:], shapes=WIDE
        ),
        "partly used": Bare(f=lambda p, x: x @ p["w"][:, :WIDTH], shapes=WIDE, left={"w": "leave some of it out"}),
        "concatenated before use": Bare(
            f=lambda p, x: x @ jnp.concatenate([p["q"], p["k"]], axis=1),
            shapes={"q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH)},
            left=dict.fromkeys("qk", "concatenate"),
        ),
        "stack, Python loop by index": Bare(f=unrolled, shapes=STACK),
        "scan over layers": Bare(f=scanned, shapes=STACK, scans=1),
        "scan, remat inside": Bare(f=scanned_remat, shapes=STACK, scans=1),
        "scan in remat": Bare(f=jax.checkpoint(scanned), shapes=STACK, scans=1),
        "scan, reverse": Bare(f=scanned_reverse, shapes=STACK, scans=1),
        "scan, outputs collected": Bare(f=scanned_outputs, shapes=STACK, scans=1),
        "scan in a scan": Bare(
            f=scanned_in_scan, shapes={"up": (2, 2, WIDTH, HIDDEN), "down": (2, 2, HIDDEN, WIDTH)}, scans=2
        ),
        "scan, (out, in) layers": Bare(
            f=scanned_transposed, shapes={"up": (LAYERS, HIDDEN, WIDTH), "down": (LAYERS, WIDTH, HIDDEN)}, scans=1
        ),
        "scan, layers on axis 1": Bare(
            f=scanned_moved_axis, shapes={"up": (WIDTH, LAYERS, HIDDEN), "down": (HIDDEN, LAYERS, WIDTH)}, scans=1
        ),
        "scan, stack cast to bfloat16": Bare(f=scanned_bfloat16, shapes=STACK, scans=1),
        "scan, layers in blocks of two": Bare(
            f=scanned_in_blocks, shapes={"up": (4, WIDTH, HIDDEN), "down": (4, HIDDEN, WIDTH)}, scans=2
        ),
        "scan, first layer apart": Bare(f=scanned_after_first, shapes=STACK, scans=1),
        "scan, one stack in two scans": Bare(
            f=lambda p, x: scanned(p, x) + scanned(p, jnp.tanh(x)), shapes=STACK, scans=2
        ),
        "scan, fused qkv, sliced": Bare(
            f=scanned_slices, shapes={"qkv": (2, WIDTH, 3 * WIDTH), "out": (2, WIDTH, WIDTH)}, scans=1
        ),
        "scan, weights in the carry": Bare(f=carried, shapes={"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}, scans=1),
        "scan, one weight for all steps": Bare(
            f=scanned_same_weight, shapes={"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}, scans=1
        ),
        "scan of MoE layers": Bare(
            f=scanned_mixture, shapes={name: (2, *shape) for name, shape in MIXTURE.items()}, scans=1
        ),
        "scan of MoE layers, ragged_dot and remat": Bare(
            f=scanned_ragged, shapes={name: (2, *shape) for name, shape in MIXTURE.items()}, scans=1
        ),
        "fori_loop, stack by index": Bare(f=loop_by_index, shapes=STACK, left=dict.fromkeys(STACK, "dynamic_slice")),
        "recurrent cell over time": Bare(f=recurrent, shapes={"w": (WIDTH, WIDTH), "u": (WIDTH, WIDTH)}, scans=1),
        "recurrent cells in layers": Bare(
            f=layers_of_cells, shapes={"w": (LAYERS, WIDTH, WIDTH), "u": (LAYERS, WIDTH, WIDTH)}, scans=2
        ),
        "cond": Bare(f=branch, shapes=SQUARE, left={"w": "cond"}),
        "while_loop": Bare(f=while_loop, shapes=SQUARE, left={"w": "while"}),
        "experts, ebtd,edf": Bare(f=dispatched, shapes=MIXTURE),
        "experts, btd,edf": Bare(f=all_experts, shapes=MIXTURE),
        "experts, one-hot dispatch": Bare(f=with_capacity, shapes=MIXTURE),
        "experts, ragged_dot": Bare(f=ragged, shapes=MIXTURE),
        "experts, vmap": Bare(f=mapped, shapes=MIXTURE),
        "experts, lax.map": Bare(f=mapped_in_turn, shapes=MIXTURE, scans=1),
        "experts, matrices gathered by token": Bare(
            f=gathered, shapes=MIXTURE, left={"up": "gather", "down": "gather"}
        ),
    }
    | {
        f"convolution, {name}": Bare(
            f=convolution.apply,
            shapes={"w": convolution.kernel},
            inputs="images" if len(convolution.strides) == 2 else "features",
        )
        for name, convolution in CONVOLUTIONS.items()
    }
    | {
        "convolution, 1-D, transposed": Bare(
            f=lambda p, x: lax.conv_transpose(x, p["w"], (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")),
            shapes={"w": (3, WIDTH, WIDTH)},
        )
    }
)
