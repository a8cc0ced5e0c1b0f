"""Text generation with any causal language model: greedy, or sampled with temperature, top-k and top-p.

The whole sequence is read again for every new token. It lies in a buffer of fixed length, so one program serves all
steps; what stands to the right of a token cannot change a causal model's logits for it.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

BUCKET = 64  # buffer lengths are multiples of this, so that prompts of similar length share a program


def generate(
    model: Any,
    params: Any,
    prompt_ids: Sequence[int] | np.ndarray | Array,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: Array | None = None,
    stop_token_ids: Sequence[int] = (),
) -> Int[np.ndarray, " tokens"]:
    """The prompt and up to `max_new_tokens` after it, int32; it ends early with the first of `stop_token_ids`.

    temperature: 0 takes the most likely token every time; above 0 logits are divided by it and a token is drawn
        with `key`, a JAX random key, which is then needed.
    top_k: draw from the k most likely tokens only. top_p: draw from the fewest most likely tokens that together
        have at least this probability [Holtzman et al. 2020], after temperature and top_k.
    prompt_ids: one sequence, BOS included if the model wants one.
    """
    prompt = _checked_prompt(model, prompt_ids, max_new_tokens)
    _check_sampling(temperature, top_k, top_p, key)
    vocab_size, context = model.config.vocab_size, model.config.max_position_embeddings
    total = len(prompt) + max_new_tokens
    buffer = np.zeros(min(-(-total // BUCKET) * BUCKET, context), np.int32)
    buffer[: len(prompt)] = prompt
    tokens, length = _generate(
        model,
        params,
        jnp.asarray(buffer),
        jnp.int32(len(prompt)),
        jnp.int32(total),
        jnp.asarray(list(stop_token_ids), jnp.int32),
        None if temperature == 0 else key,
        jnp.float32(temperature),
        jnp.int32(vocab_size if top_k is None else min(top_k, vocab_size)),
        jnp.float32(1.0 if top_p is None else top_p),
    )
    return np.asarray(tokens)[: int(length)]


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


@functools.partial(jax.jit, static_argnames="model")
def _generate(
    model: Any,
    params: Any,
    buffer: Int[Array, " length"],
    start: Int[Array, ""],
    total: Int[Array, ""],
    stop_token_ids: Int[Array, " stops"],
    key: Array | None,
    temperature: Float[Array, ""],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
) -> tuple[Int[Array, " length"], Int[Array, ""]]:
    """Fills `buffer` from position `start`, to `total` or a stop token; returns it with the length reached."""

    def unfinished(state):
        _, length, stopped = state
        return (length < total) & ~stopped

    def step(state):
        tokens, length, _ = state
        logits = model.apply(params, tokens[None])[0, length - 1]
        if key is None:
            token = jnp.argmax(logits)
        else:
            token = draw_token(logits, jax.random.fold_in(key, length), temperature, top_k, top_p)
        token = token.astype(jnp.int32)
        return tokens.at[length].set(token), length + 1, jnp.any(stop_token_ids == token)

    tokens, length, _ = lax.while_loop(unfinished, step, (buffer, start, jnp.bool_(False)))
    return tokens, length


def _checked_prompt(model: Any, prompt_ids: Any, max_new_tokens: int) -> Int[np.ndarray, " tokens"]:
    prompt = np.asarray(prompt_ids)
    if prompt.size == 0:
        raise ValueError("the prompt is empty; give at least one token, BOS for example")
    if prompt.ndim != 1 or not np.issubdtype(prompt.dtype, np.integer):
        raise ValueError(f"prompt_ids are {prompt.dtype}{list(prompt.shape)}; give integers, one sequence at a time")
    vocab_size, context = model.config.vocab_size, model.config.max_position_embeddings
    if prompt.min() < 0 or prompt.max() >= vocab_size:
        raise ValueError(
            f"prompt_ids lie in {prompt.min()} .. {prompt.max()}, but the model's vocabulary is 0 .. {vocab_size - 1}; "
            f"encode the prompt with this model's own tokenizer"
        )
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens}; give 0 or more")
    if len(prompt) + max_new_tokens > context:
        raise ValueError(
            f"{len(prompt)} prompt tokens and {max_new_tokens} new ones exceed the model's context of {context}; "
            f"shorten the prompt or ask for at most {max(context - len(prompt), 0)} new tokens"
        )
    return prompt.astype(np.int32)


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
