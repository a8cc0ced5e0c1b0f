"""Text generation with any causal language model: greedy, or sampled with temperature, top-k and top-p.

The prompts are read once; every new token then goes alone, and looks at those before it through a cache of their keys
and values. Prompts of unequal length are filled up at their ends. A token's place in the cache is its position, so
what fills a row up is overwritten by the row's own next tokens before any of them looks there.

`TextStream` turns tokens into text as they come.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jgptq.kernels.matmul import has_kernel_for_prepacked
from jgptq.models.attention import cache_length
from jgptq.models.language_model import LanguageModel

BUCKET = 64  # prompts and caches have lengths that are multiples of this, so that similar ones share a program
BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")  # a token that stands for one byte of a character
# Layers up to which each may as well be compiled for itself; beyond, packed ones are first copied to stacks.
SHALLOW = 8
CHUNK = 32  # tokens between two looks at whether all sequences have ended


class _Sampling(NamedTuple):
    """How tokens are drawn; key None: greedily. All arrays, so that one program serves all settings."""

    key: Array | None
    temperature: Array
    top_k: Array
    top_p: Array
    stop_token_ids: Array


class _State(NamedTuple):
    """The last token of each sequence, its position, whether the sequence has ended, and the cache of those before."""

    tokens: Int[Array, " batch"]
    positions: Int[Array, " batch"]
    ended: Bool[Array, " batch"]
    cache: Any


def generate(
    model: Any,
    params: Any,
    prompt_ids: Any,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: Array | None = None,
    stop_token_ids: Sequence[int] = (),
    on_token: Callable[[Int[np.ndarray, " batch"]], None] | None = None,
) -> Any:
    """The prompt and up to `max_new_tokens` after it, int32; it ends early with the first of `stop_token_ids`.

    prompt_ids: one sequence of integers, BOS included if the model wants one; or several of them, of any lengths,
        which gives a list of as many sequences. What a sequence is does not depend on those beside it.
    temperature: 0 takes the most likely token every time; above 0 logits are divided by it and a token is drawn
        with `key`, a JAX random key, which is then needed.
    top_k: draw from the k most likely tokens only. top_p: draw from the fewest most likely tokens that together
        have at least this probability [Holtzman et al. 2020], after temperature and top_k.
    on_token: called with the new token of each sequence as soon as it is known, -1 where the sequence has ended.

    A model of many packed layers, or of any number on a Hopper GPU, is brought to the order of `LanguageModel.arranged`
    at each call, beside the one given; params that are in it already spare that copy.
    """
    prompts, single = _checked_prompts(model, prompt_ids, max_new_tokens)
    _check_sampling(temperature, top_k, top_p, key)
    vocab_size, context = model.config.vocab_size, model.config.max_position_embeddings
    sampling = _Sampling(
        key=None if temperature == 0 else key,
        temperature=jnp.float32(temperature),
        top_k=jnp.int32(vocab_size if top_k is None else min(top_k, vocab_size)),
        top_p=jnp.float32(1.0 if top_p is None else top_p),
        stop_token_ids=jnp.asarray(list(stop_token_ids), jnp.int32),
    )
    lengths = [len(prompt) for prompt in prompts]
    filled = np.zeros((len(prompts), _bucket(max(lengths), context)), np.int32)
    for row, prompt in zip(filled, prompts, strict=True):
        row[: len(prompt)] = prompt
    if isinstance(model, LanguageModel) and (model.depth > SHALLOW or has_kernel_for_prepacked(params)):
        params = model.arranged(params)
    columns: list[np.ndarray] = []
    if max_new_tokens:
        capacity = _bucket(max(lengths) + max_new_tokens, context)
        state = _begin(model, params, jnp.asarray(filled), jnp.asarray(lengths, jnp.int32), sampling, capacity)
        columns.append(np.asarray(state.tokens))
        while True:
            if on_token is not None:
                on_token(columns[-1])
            left = max_new_tokens - len(columns)
            if not left or np.all(state.ended):
                break
            # A chunk longer than what is left would make a program of its own; its last tokens are dropped instead.
            state, new = _continue(model, params, state, sampling, 1 if on_token is not None else CHUNK)
            columns.extend(np.asarray(new)[:left])
    results = [_ended(prompt, [int(column[row]) for column in columns]) for row, prompt in enumerate(prompts)]
    return results[0] if single else results


class TextStream:
    """The text of a growing sequence of tokens, piece by piece: joined, what `tokenizer.decode` makes of all of them.

    Text is given out once no token to come can change it. A character of several tokens comes with the last of them;
    tokens that stand for bytes come with the first other token, since one bad byte spoils the run that it stands in.
    tokenizer: of the tokenizers package, with whose `decode` special tokens are no text.
    prompt_ids: how the sequence begins; their text comes with the first piece, or alone from `rest`.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int] | np.ndarray = ()):
        self._tokenizer = tokenizer
        self._ids = [int(token) for token in prompt_ids]
        self._told = 0

    def add(self, token: int) -> str:
        """By what the text has surely become longer with one more token; often nothing."""
        self._ids.append(token)
        # A special token does not end a run of bytes.
        if not self._tokenizer.decode([token]) or BYTE.fullmatch(self._tokenizer.id_to_token(token) or ""):
            return ""
        return self._new(self._tokenizer.decode(self._ids).rstrip("\ufffd"))

    def rest(self) -> str:
        """What is left to give out, if no token comes any more or it does not matter."""
        return self._new(self._tokenizer.decode(self._ids))

    def _new(self, text: str) -> str:
        piece = text[self._told :]
        self._told += len(piece)
        return piece


def draw_token(
    logits: Float[Array, " vocab"],
    key: Array,
    temperature: Float[Array, ""],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
) -> Int[Array, ""]:
    """One token drawn as `generate` describes; top_k at the vocabulary's size and top_p at 1 leave all tokens in."""
    ordered, ranked_tokens = lax.top_k(logits.astype(jnp.float32) / temperature, logits.shape[0])
    ordered = jnp.where(jnp.arange(logits.shape[0]) < top_k, ordered, -jnp.inf)
    probabilities = jax.nn.softmax(ordered)
    before = jnp.cumsum(probabilities) - probabilities
    # `before` of the most likely token is 0, so at least that one stays in; rounding must not drop any at top_p = 1.
    ordered = jnp.where((before < top_p) | (top_p >= 1), ordered, -jnp.inf)
    return ranked_tokens[jax.random.categorical(key, ordered)]


@functools.partial(jax.jit, static_argnames=("model", "capacity"))
def _begin(
    model: Any,
    params: Any,
    prompts: Int[Array, "batch seq"],
    lengths: Int[Array, " batch"],
    sampling: _Sampling,
    capacity: int,
) -> _State:
    """Reads the prompts and draws a token for each."""
    logits, cache = model.prefill(params, prompts, lengths, capacity)
    tokens = _draw(logits, lengths, sampling)
    return _State(tokens, lengths, jnp.isin(tokens, sampling.stop_token_ids), cache)


@functools.partial(jax.jit, static_argnames=("model", "count"), donate_argnames="state")
def _continue(
    model: Any, params: Any, state: _State, sampling: _Sampling, count: int
) -> tuple[_State, Int[Array, "count batch"]]:
    """Draws `count` more tokens for each sequence; -1 for those that have ended."""

    def step(state: _State, _) -> tuple[_State, Int[Array, " batch"]]:
        def live(state: _State) -> tuple[_State, Int[Array, " batch"]]:
            # The last places of a chunk may lie beyond the cache; what is drawn there is dropped.
            capacity = cache_length(state.cache)
            places = jnp.minimum(state.positions, capacity - 1)
            logits, cache = model.step(params, state.tokens, places, state.cache)
            tokens = jnp.where(state.ended, state.tokens, _draw(logits, state.positions + 1, sampling))
            ended = state.ended | jnp.isin(tokens, sampling.stop_token_ids)
            return _State(tokens, state.positions + 1, ended, cache), jnp.where(state.ended, -1, tokens)

        def over(state: _State) -> tuple[_State, Int[Array, " batch"]]:
            return state, jnp.full_like(state.tokens, -1)

        return lax.cond(jnp.all(state.ended), over, live, state)

    return lax.scan(step, state, length=count)


def _draw(
    logits: Float[Array, "batch vocab"], positions: Int[Array, " batch"], sampling: _Sampling
) -> Int[Array, " batch"]:
    """The token at `positions` of each sequence."""
    if sampling.key is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    rows = jax.vmap(functools.partial(jax.random.fold_in, sampling.key))(jnp.arange(len(positions)))
    keys = jax.vmap(jax.random.fold_in)(rows, positions)
    draw = functools.partial(draw_token, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
    return jax.vmap(draw)(logits, keys).astype(jnp.int32)


def _bucket(length: int, context: int) -> int:
    return min(-(-length // BUCKET) * BUCKET, context)


def _ended(prompt: Int[np.ndarray, " prompt"], new: Sequence[int]) -> Int[np.ndarray, " tokens"]:
    new = list(new[: new.index(-1)] if -1 in new else new)
    return np.concatenate([prompt, np.asarray(new, np.int32)])


def _checked_prompts(model: Any, prompt_ids: Any, max_new_tokens: int) -> tuple[list[np.ndarray], bool]:
    """The prompts, and whether one was given rather than a list of them."""
    single = np.ndim(prompt_ids[0]) == 0 if len(prompt_ids) else True
    prompts = [np.asarray(prompt) for prompt in ([prompt_ids] if single else prompt_ids)]
    vocab_size, context = model.config.vocab_size, model.config.max_position_embeddings
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens}; give 0 or more")
    for number, prompt in enumerate(prompts):
        name = "the prompt" if single else f"prompt {number}"
        if prompt.size == 0:
            raise ValueError(f"{name} is empty; give at least one token, BOS for example")
        if prompt.ndim != 1 or not np.issubdtype(prompt.dtype, np.integer):
            raise ValueError(
                f"{name} is {prompt.dtype}{list(prompt.shape)}; give prompt_ids as one sequence of integers, "
                "or a list of such sequences"
            )
        if prompt.min() < 0 or prompt.max() >= vocab_size:
            raise ValueError(
                f"{name} has ids in {prompt.min()} .. {prompt.max()}, but the model's vocabulary is "
                f"0 .. {vocab_size - 1}; encode it with this model's own tokenizer"
            )
        if len(prompt) + max_new_tokens > context:
            raise ValueError(
                f"{len(prompt)} prompt tokens and {max_new_tokens} new ones exceed the model's context of {context}; "
                f"shorten {name} or ask for at most {max(context - len(prompt), 0)} new tokens"
            )
    return [prompt.astype(np.int32) for prompt in prompts], single


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None, key: Array | None) -> None:
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature}; give 0 for greedy or a positive number, 1 for the model's own")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}; give a positive integer, or None to leave all tokens in")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}; give a number above 0 and up to 1, or None to leave all tokens in")
    if temperature > 0 and key is None:
        raise ValueError(f"temperature={temperature} draws at random; give key=jax.random.key(seed), or temperature=0")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError("top_k and top_p shape random draws, but temperature=0 draws none; give a temperature")
