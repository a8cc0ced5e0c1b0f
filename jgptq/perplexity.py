"""Perplexity of a language model on a token stream, and how far a quantized model is from its float model.

Protocol. The stream is cut into consecutive windows without overlap, and each is read on its own. A window is
seq_len tokens of the stream, or BOS and seq_len - 1 of them. The first of its stream tokens is not scored, with BOS
neither: inside a document, BOS promises a beginning that does not come. Every other token is scored, once, given all
that precedes it in its window. The last window may be shorter: padding fills it and is not scored. Perplexity is exp
of the mean negative log-likelihood over scored tokens. Log-likelihoods are float32, their sums float64.

With a stride, each window begins that many tokens after the one before, as in Hugging Face's guide "Perplexity of
fixed-length models", and only what no earlier window held is scored: every token but the first of the stream, and after
the first window with at least the window's length less the stride in front of it. A stride of the whole window is the
protocol above.

The GPTQ paper's figure [Frantar et al. 2023] is the perplexity of the windows of `jgptq.calibration.gptq_windows`: the
whole text as one, 2048 tokens a window, no BOS put in front of any, no shorter last window. The paper takes the mean of
the windows' mean losses, which is that over tokens, since all windows score equally many.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Tokens = Sequence[int] | np.ndarray | Array
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A model beside its reference on the same tokens.

    tokens: how many were scored.
    kl: mean over scored positions of KL(reference || model) between next-token distributions, in nats a token.
    top1_agreement: share of scored positions where both find the same token most likely.
    """

    tokens: int
    perplexity: float
    reference_perplexity: float
    kl: float
    top1_agreement: float


def perplexity(
    model: Any,
    params: Any,
    token_ids: Tokens,
    *,
    seq_len: int | None = None,
    stride: int | None = None,
    bos_token_id: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> float:
    """Perplexity of `model.apply(params, tokens)` on `token_ids` by the protocol above.

    token_ids: one stream, or (n, length) windows cut already. Windows are scored as rows: with BOS in front (then
        length is seq_len - 1) if `bos_token_id` is given, else as they are (then length is seq_len).
    seq_len: tokens in a window, BOS included; None: the model's context for a stream.
    stride: tokens from one window of a stream to the next, BOS not counted; None: windows do not overlap.
    progress: called after each batch with the number of windows done and of all windows.
    NaN or infinity in the logits shows as a perplexity of nan or inf.
    """
    windows, scored = _windows(model, token_ids, seq_len, stride, bos_token_id)
    total = 0.0
    for batch, mask in _batches(windows, scored, batch_size, progress):
        total += np.asarray(_losses(model, params, batch), np.float64)[mask].sum()
    return _exp(total / scored.sum())


def next_token_loss(logits: Float[Array, "*batch length vocabulary"], inputs: tuple) -> Float[Array, ""]:
    """The loss of a language model on its own input tokens, the first of `inputs`, in nats, summed over tokens.

    What `quantize` and `allocate` take as loss= for a function whose result is logits.
    """
    scores = jax.nn.log_softmax(logits[..., :-1, :].astype(jnp.float32))
    return -jnp.sum(jnp.take_along_axis(scores, inputs[0][..., 1:, None], axis=-1))


def count_scored(
    model: Any,
    token_ids: Tokens,
    *,
    seq_len: int | None = None,
    stride: int | None = None,
    bos_token_id: int | None = None,
) -> int:
    """How many tokens `perplexity` and `compare` score with these options."""
    return int(_windows(model, token_ids, seq_len, stride, bos_token_id)[1].sum())


def compare(
    model: Any,
    params: Any,
    reference_model: Any,
    reference_params: Any,
    token_ids: Tokens,
    *,
    seq_len: int | None = None,
    stride: int | None = None,
    bos_token_id: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexities of a model and of its reference, and the distance between their distributions.

    Pass one model twice to compare two sets of parameters. The options are those of `perplexity`.
    """
    if model.config.vocab_size != reference_model.config.vocab_size:
        raise ValueError(
            f"the model has {model.config.vocab_size} tokens in its vocabulary and the reference "
            f"{reference_model.config.vocab_size}; distributions are compared between models of one vocabulary"
        )
    _windows(
        reference_model, token_ids, seq_len, stride, bos_token_id
    )  # the reference's context must hold a window too
    windows, scored = _windows(model, token_ids, seq_len, stride, bos_token_id)
    totals = np.zeros(4)
    for batch, mask in _batches(windows, scored, batch_size, progress):
        rows = _distances(model, params, reference_model, reference_params, batch)
        totals += np.stack([np.asarray(row, np.float64)[mask].sum() for row in rows])
    loss, reference_loss, kl, agreement = totals / scored.sum()
    return Evaluation(
        tokens=int(scored.sum()),
        perplexity=_exp(loss),
        reference_perplexity=_exp(reference_loss),
        kl=float(kl),
        top1_agreement=float(agreement),
    )


@functools.partial(jax.jit, static_argnames="model")
def _losses(model: Any, params: Any, windows: Int[Array, "batch seq"]) -> Float[Array, "batch seq-1"]:
    """Negative log-likelihood of every token but the first of each window, in nats."""
    return _token_losses(_log_probabilities(model, params, windows), windows)


@functools.partial(jax.jit, static_argnames=("model", "reference_model"))
def _distances(
    model: Any, params: Any, reference_model: Any, reference_params: Any, windows: Int[Array, "batch seq"]
) -> tuple[Array, Array, Array, Array]:
    """Loss, reference's loss, KL and agreement at every token but the first of each window, each (batch, seq - 1)."""
    log_q = _log_probabilities(model, params, windows)
    log_p = _log_probabilities(reference_model, reference_params, windows)
    p = jnp.exp(log_p)
    # 0 * log 0 is 0: a token that the reference rules out adds nothing.
    kl = jnp.sum(jnp.where(p > 0, p * (log_p - log_q), 0.0), axis=-1)
    agreement = jnp.argmax(log_p, axis=-1) == jnp.argmax(log_q, axis=-1)
    return _token_losses(log_q, windows), _token_losses(log_p, windows), kl, agreement


def _log_probabilities(model: Any, params: Any, windows: Int[Array, "batch seq"]) -> Float[Array, "batch seq-1 vocab"]:
    return jax.nn.log_softmax(model.apply(params, windows)[:, :-1].astype(jnp.float32), axis=-1)


def _token_losses(
    log_probabilities: Float[Array, "batch scored vocab"], windows: Int[Array, "batch seq"]
) -> Float[Array, "batch scored"]:
    return -jnp.take_along_axis(log_probabilities, windows[:, 1:, None], axis=-1)[..., 0]


def _windows(
    model: Any, token_ids: Tokens, seq_len: int | None, stride: int | None, bos_token_id: int | None
) -> tuple[Int[np.ndarray, "n seq"], Bool[np.ndarray, "n seq-1"]]:
    """Windows with BOS in front, padded, and which of their tokens after the first are scored."""
    token_ids = np.asarray(token_ids)
    bos = [] if bos_token_id is None else [bos_token_id]
    _check_tokens(token_ids, bos, model.config.vocab_size)
    content = _window_length(token_ids, seq_len, len(bos), model.config.max_position_embeddings) - len(bos)
    if stride is not None and token_ids.ndim == 2:
        raise ValueError(f"stride={stride}, but windows were given; give one stream of tokens, or leave stride out")
    if stride is not None and not 1 <= stride <= content:
        raise ValueError(f"stride={stride}; give between 1 and {content}, what a window holds of the stream")
    step = stride or content
    count = 1 + max(0, -(-(token_ids.size - content) // step))
    offsets = np.arange(content)
    places = step * np.arange(count)[:, None] + offsets
    tokens = np.where(places < token_ids.size, token_ids.ravel()[np.minimum(places, token_ids.size - 1)], 0)
    windows = np.concatenate([np.full((count, len(bos)), bos), tokens], axis=1).astype(np.int32)
    new = (places < token_ids.size) & ((offsets >= content - step) | (places == offsets))  # all of the first window
    scored = np.pad(new[:, 1:], ((0, 0), (len(bos), 0)))
    if not scored.any():
        raise ValueError("a single token has nothing before it to be predicted from; give more")
    return windows, scored


def _window_length(token_ids: np.ndarray, seq_len: int | None, bos: int, context: int) -> int:
    """Tokens in a window, `bos` of them BOS."""
    if token_ids.ndim == 2:
        length = token_ids.shape[1] + bos
        if seq_len is not None and seq_len != length:
            raise ValueError(f"seq_len={seq_len}, but the windows given are {length} tokens long; leave seq_len out")
    else:
        length = context if seq_len is None else seq_len
    if not 2 + bos <= length <= context:
        raise ValueError(
            f"a window has {length} tokens{', BOS included' if bos else ''}; give between {2 + bos} and the "
            f"model's context, {context}"
        )
    return length


def _check_tokens(token_ids: np.ndarray, bos: list[int], vocab_size: int) -> None:
    if token_ids.size == 0:
        raise ValueError("there are no tokens to evaluate on; give a text or ids")
    if token_ids.ndim not in (1, 2) or not np.issubdtype(token_ids.dtype, np.integer):
        raise ValueError(
            f"token ids are {token_ids.dtype}{list(token_ids.shape)}; give integers, one stream or (n, length) windows"
        )
    low, high = int(min(token_ids.min(), *bos, np.inf)), int(max(token_ids.max(), *bos, -np.inf))
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"token ids (and BOS) lie in {low} .. {high}, but the model's vocabulary is 0 .. {vocab_size - 1}; "
            f"encode the text with this model's own tokenizer"
        )


def _batches(
    windows: np.ndarray, scored: np.ndarray, batch_size: int, progress: Progress | None
) -> Iterator[tuple[Array, np.ndarray]]:
    """(tokens, scored) of one shape, so that one program serves all; padding rows are not scored."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; give a positive integer")
    size, count = min(batch_size, len(windows)), len(windows)
    for start in range(0, count, size):
        rows = slice(start, start + size)
        missing = ((0, size - len(windows[rows])), (0, 0))
        yield jnp.asarray(np.pad(windows[rows], missing)), np.pad(scored[rows], missing)
        if progress is not None:
            progress(min(start + size, count), count)


def _exp(mean_loss: float) -> float:
    try:
        return math.exp(mean_loss)
    except OverflowError:
        return math.inf
