"""Attention, and the positions it depends on. Every model's attention is this one."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jgptq.accelerators import runs_on
from jgptq.models import rotary
from jgptq.models.layers import Linear, precision, together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alibi:
    """Linear biases: what each head adds to a score for every token that the key is further on. [Press et al. 2022]

    dtype: slope times position is rounded to it; scale: multiplies the rounded product.
    """

    slopes: tuple[float, ...]
    dtype: str = "float32"
    scale: float = 1.0

    def bias(self, keys: Int[Array, " key"]) -> Float[Array, "heads key"]:
        """float32. Up to a constant for each query, which softmax does not see."""
        slopes = jnp.asarray(self.slopes, self.dtype)
        return self.scale * (slopes[:, None] * keys.astype(self.dtype)[None, :]).astype(jnp.float32)


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """2**(-8 k / n), k = 1 .. n, for the power of two n up to `heads`; the rest lie between the first of them."""
    power = 2 ** math.floor(math.log2(heads))
    between = [2 ** (-4 * k / power) for k in range(1, 2 * (heads - power), 2)]
    return (*(2 ** (-8 * k / power) for k in range(1, power + 1)), *between)


SEPARATE = ("q_proj", "k_proj", "v_proj", "o_proj")

# On a CPU: scores of a sequence from which on they are made in parts; the most of a part, 8 MB; its queries at least.
LARGE, PART, QUERIES = 2**18, 2**21, 256


# The keys and values of every layer, each (batch, kv_heads, capacity, head_dim), as attention multiplies them, in the
# order the layers run; of layers under a scan, those of the first period, stacked along a first axis.
Cache = tuple[tuple[Array, Array], ...]


def cache_length(cache: Cache) -> int:
    """Tokens that a cache has room for."""
    return cache[0][0].shape[-2]


class Positions:
    """Where the tokens of one pass through a model stand; what follows from it is made once and shared by the layers.

    queries: positions of the tokens given, a row for each sequence of the batch, or one for all.
    keys: positions of all the tokens that those may look at. length: of the whole sequence, known while tracing.
    capacity: the length of the cache to be made of this pass; None: there is none. cache: that of the tokens before.
    layer: where in the cache's stacks these layers are; None: it has no stacks.
    A token's place in the cache is its position. What lies at later places is never looked at.
    """

    def __init__(
        self,
        queries: Int[Array, "rows query"],
        keys: Int[Array, " key"],
        length: int,
        *,
        capacity: int | None = None,
        cache: Cache | None = None,
        layer: Int[Array, ""] | None = None,
    ):
        self.queries, self.keys, self.length = queries, keys, length
        self._capacity, self._old, self._layer = capacity, cache, layer
        self._new: list[tuple[Array, Array]] = []
        self._made = {}

    @classmethod
    def of_sequence(cls, length: int, capacity: int | None = None) -> "Positions":
        """Sequences from their beginning."""
        positions = jnp.arange(length)
        return cls(positions[None], positions, capacity or length, capacity=capacity)

    @classmethod
    def of_tokens(cls, positions: Int[Array, " batch"], cache: Cache) -> "Positions":
        """One token of each sequence, at a position of its own."""
        capacity = cache_length(cache)
        return cls(positions[:, None], jnp.arange(capacity), capacity, cache=cache)

    @property
    def from_beginning(self) -> bool:
        """Whether the tokens given are whole sequences: the same positions for all, and no tokens before."""
        return self._old is None

    @property
    def cache(self) -> Cache:
        """With the keys and values of this pass; complete when all layers have run."""
        return tuple(self._new)

    def inside(self, index: Int[Array, ""], old: Cache | None) -> "Positions":
        """For the layers of one step of a scan, with `old` as the stacks of their cache."""
        return Positions(self.queries, self.keys, self.length, capacity=self._capacity, cache=old, layer=index)

    def next_in_cache(self, count: int) -> Cache | None:
        """What the next `count` layers have in the cache of the tokens before."""
        return None if self._old is None else self._old[len(self._new) : len(self._new) + count]

    def extend_cache(self, entries: Cache) -> None:
        """What these layers have in the cache with this pass."""
        self._new.extend(entries)

    def remember(
        self, keys: Float[Array, "batch query kv_heads head_dim"], values: Float[Array, "batch query kv_heads head_dim"]
    ) -> tuple[Float[Array, "batch kv_heads key head_dim"], Float[Array, "batch kv_heads key head_dim"]]:
        """The next layer's keys and values of all tokens, given those of this pass."""
        new = jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2)
        if self._old is None:
            if self._capacity is not None:
                rest = self._capacity - keys.shape[1]
                self._new.append(tuple(jnp.pad(x, ((0, 0), (0, 0), (0, rest), (0, 0))) for x in new))
            return new
        old, places = self._old[len(self._new)], self.queries[:, 0]
        if self._layer is None:
            put = jax.vmap(functools.partial(lax.dynamic_update_slice_in_dim, axis=1))
            self._new.append(tuple(put(o, n, places) for o, n in zip(old, new, strict=True)))
            return self._new[-1]
        # The stacks are what the scan carries: written to in place, and read where they are.
        at = self._layer, jnp.arange(len(places)), slice(None), places
        self._new.append(tuple(o.at[at].set(n[:, :, 0]) for o, n in zip(old, new, strict=True)))
        return tuple(lax.dynamic_index_in_dim(stack, self._layer, keepdims=False) for stack in self._new[-1])

    def mask(self, window: int | None) -> Bool[Array, "rows query key"]:
        """True where the query sees the key: itself and what came before, at most `window` tokens in all."""
        return self._once(("mask", window), lambda: self._mask(window))

    def rotation(
        self, rope: rotary.Rope, head_dim: int, max_length: int
    ) -> tuple[Float[Array, "rows query half"], Float[Array, "rows query half"]]:
        """cos and sin by which the heads of these tokens turn."""
        return self._once(
            (rope, head_dim, max_length),
            lambda: rotary.rotation(rope, self.queries, head_dim=head_dim, length=self.length, max_length=max_length),
        )

    def _mask(self, window: int | None) -> Bool[Array, "rows query key"]:
        distance = self.queries[:, :, None] - self.keys[None, None, :]
        return distance >= 0 if window is None else (distance >= 0) & (distance < window)

    def _once(self, name: tuple, make: Callable):
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


class Attention(nnx.Module):
    """Causal attention; `kv_heads` heads of keys and values serve equal runs of query heads.

    names: the checkpoint's, of the projections to queries, keys, values and back; two where the first three are one,
        with their outputs side by side, or `interleaved`: (kv_heads, queries of the head + its key + its value).
    scale: of the scores; None: head_dim**-0.5. soft_cap: bounds them, as soft_cap * tanh(scores / soft_cap).
    rope: rotary positions; max_length: the longest sequence it was made for.
    window: how many tokens a query sees. norm: makes the norm on each query and key head, None: there are none.
    alibi: linear biases on the scores.
    """

    def __init__(
        self,
        features: int,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        bias: bool,
        output_bias: bool,
        std: float,
        rngs: nnx.Rngs,
        names: tuple[str, ...] = SEPARATE,
        interleaved: bool = False,
        scale: float | None = None,
        soft_cap: float | None = None,
        rope: rotary.Rope | None = None,
        max_length: int | None = None,
        window: int | None = None,
        norm: Callable[[], nnx.Module] | None = None,
        alibi: Alibi | None = None,
    ):
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.names, self.shared_input, self.interleaved = names, names[:-1], interleaved
        self.scale, self.soft_cap = head_dim**-0.5 if scale is None else scale, soft_cap
        self.rope, self.max_length, self.window = rope, max_length, window
        self.alibi = alibi
        widths = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        for name, width in zip(names[:-1], widths if len(names) == 4 else [sum(widths)], strict=True):
            setattr(self, name, Linear(features, width, bias=bias, std=std, rngs=rngs))
        setattr(self, names[-1], Linear(heads * head_dim, features, bias=output_bias, std=std, rngs=rngs))
        self.q_norm, self.k_norm = (None, None) if norm is None else (norm(), norm())

    def __call__(
        self, x: Float[Array, "batch query features"], positions: Positions
    ) -> Float[Array, "batch query features"]:
        queries, keys, values = self._project(x)
        if self.q_norm is not None:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        if self.rope is not None:
            rotation = positions.rotation(self.rope, self.head_dim, self.max_length)
            queries, keys = rotary.rotate(queries, *rotation), rotary.rotate(keys, *rotation)
        mixed = self._mix(queries, *positions.remember(keys, values), positions)
        return getattr(self, self.names[-1])(mixed)

    def _project(
        self, x: Float[Array, "batch token features"]
    ) -> tuple[
        Float[Array, "batch token heads head_dim"],
        Float[Array, "batch token kv_heads head_dim"],
        Float[Array, "batch token kv_heads head_dim"],
    ]:
        outputs = together(x, *(getattr(self, name) for name in self.shared_input))
        shape = (*x.shape[:-1], -1, self.head_dim)
        if len(outputs) == 3:
            queries, keys, values = outputs
        elif self.interleaved:
            heads = outputs[0].reshape(*x.shape[:-1], self.kv_heads, -1, self.head_dim)
            queries, keys, values = heads[..., :-2, :], heads[..., -2, :], heads[..., -1, :]
        else:
            ends = [self.heads * self.head_dim, (self.heads + self.kv_heads) * self.head_dim]
            queries, keys, values = jnp.split(outputs[0], ends, axis=-1)
        return queries.reshape(shape), keys.reshape(shape), values.reshape(shape)

    def _mix(
        self,
        queries: Float[Array, "batch query heads head_dim"],
        keys: Float[Array, "batch kv_heads key head_dim"],
        values: Float[Array, "batch kv_heads key head_dim"],
        positions: Positions,
    ) -> Float[Array, "batch query mixed"]:
        """softmax(scale q·k + what positions add) v, with scores and softmax in float32."""
        batch, count = queries.shape[:2]
        group = self.heads // self.kv_heads
        queries = jnp.moveaxis(queries.reshape(batch, count, self.kv_heads, group, self.head_dim), 1, 3)
        mask, bias = positions.mask(self.window), None
        if self.alibi is not None:
            bias = self.alibi.bias(positions.keys).reshape(self.kv_heads, group, 1, -1)
        attend = self._attend
        if positions.from_beginning and self.heads * count**2 >= LARGE and _on_one_cpu():
            attend = self._attend_in_parts
        mixed = attend(queries, keys, values, mask, bias)
        return jnp.moveaxis(mixed, 3, 1).reshape(batch, count, self.heads * self.head_dim)

    def _attend(
        self,
        queries: Float[Array, "batch kv_heads group query head_dim"],
        keys: Float[Array, "batch kv_heads key head_dim"],
        values: Float[Array, "batch kv_heads key head_dim"],
        mask: Bool[Array, "rows query key"],
        bias: Float[Array, "kv_heads group 1 key"] | None,
    ) -> Float[Array, "batch kv_heads group query head_dim"]:
        """With the heads in front: in another order the products take twice the time on a CPU."""
        shape, count, dtype = queries.shape, queries.shape[3], queries.dtype
        queries = queries.reshape(*shape[:2], -1, shape[-1])
        product = functools.partial(jnp.einsum, precision=precision(dtype), preferred_element_type=jnp.float32)
        if count == 1:
            # With the heads in front XLA would copy the cache once more for every token.
            scores = product("bqhd,bhkd->bhqk", jnp.swapaxes(queries, 1, 2), keys)
        else:
            scores = product("bhqd,bhkd->bhqk", queries, keys)
        scores = self.scale * scores.reshape(*shape[:4], -1)
        if self.soft_cap is not None:
            scores = self.soft_cap * jnp.tanh(scores / self.soft_cap)
        if bias is not None:
            scores = scores + bias[None]
        scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
        weights = jnp.exp(scores - lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights.astype(dtype).reshape(*queries.shape[:3], -1)
        return (product("bhqk,bhkd->bhqd", weights, values).reshape(shape) / total).astype(dtype)

    def _attend_in_parts(
        self,
        queries: Float[Array, "batch kv_heads group token head_dim"],
        keys: Float[Array, "batch kv_heads token head_dim"],
        values: Float[Array, "batch kv_heads token head_dim"],
        mask: Bool[Array, "1 token token"],
        bias: Float[Array, "kv_heads group 1 token"] | None,
    ) -> Float[Array, "batch kv_heads group token head_dim"]:
        """`_attend` for whole sequences, some heads of one after another, and queries with no more keys than they see.

        Scores then stay in a core's cache, and the half of them that are masked is mostly not made.
        """
        count, group = keys.shape[2], queries.shape[2]
        size = max(QUERIES, -(-count // 4))
        sizes = (n for n in range(self.kv_heads, 0, -1) if self.kv_heads % n == 0)
        heads = next(n for n in sizes if n == 1 or n * group * size * count <= PART)

        def by_heads(array):
            return None if array is None else array.reshape(-1, heads, *array.shape[1:])

        def attend_heads(part):
            queries, keys, values, bias = part
            mixed = []
            for start in range(0, count, size):
                here = slice(start, start + size)
                seen = slice(0 if self.window is None else max(0, start + 1 - self.window), start + size)
                own = queries[None, :, :, here], keys[None, :, seen], values[None, :, seen], mask[:, here, seen]
                mixed.append(self._attend(*own, None if bias is None else bias[..., seen])[0])
            return jnp.concatenate(mixed, axis=2)

        def attend_sequence(sequence):
            mixed = lax.map(attend_heads, (*map(by_heads, sequence), by_heads(bias)))
            return mixed.reshape(-1, *mixed.shape[2:])

        return lax.map(attend_sequence, (queries, keys, values))


def _on_one_cpu() -> bool:
    return jax.default_backend() == "cpu" and runs_on("cpu", ("cpu",))
