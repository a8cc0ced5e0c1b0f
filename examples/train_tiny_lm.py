"""Trains the demo's language model on the source of Python's standard library and writes a Hugging Face directory.

    pip install "jgptq[train]"
    python examples/train_tiny_lm.py --out tiny-lm

A byte-level BPE of 1,024 pieces and a Llama of 1.6 million parameters; about 35 minutes on one CPU core. The package's
own copy, jgptq/demo_model, was made with the default options. The held-out modules of `jgptq.demo_text` are not seen.
"""

import argparse
import functools
import math
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from jgptq import demo_text
from jgptq.checkpoints import save
from jgptq.models import MODELS, LanguageModel
from jgptq.perplexity import perplexity

END_OF_TEXT = "<|endoftext|>"  # in front of every module and of every window: both BOS and EOS
CONFIG = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 160,
    "intermediate_size": 448,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 40,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE, trained on `texts`; encoding a text puts END_OF_TEXT (id 0) in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))]
    )
    return tokenizer


def token_stream(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts in one stream of token ids, each with END_OF_TEXT in front."""
    return np.concatenate([np.asarray(encoding.ids, np.int32) for encoding in tokenizer.encode_batch(texts)])


def random_windows(stream: np.ndarray, generator: np.random.Generator, *, batch_size: int, seq_len: int) -> np.ndarray:
    """Windows of `seq_len` stream tokens at random places, (batch, 1 + seq_len), with END_OF_TEXT in front."""
    starts = generator.integers(0, len(stream) - seq_len, size=batch_size)
    windows = stream[starts[:, None] + np.arange(seq_len)]
    return np.pad(windows, ((0, 0), (1, 0)), constant_values=CONFIG["bos_token_id"])


def consecutive_windows(stream: np.ndarray, *, seq_len: int) -> np.ndarray:
    """The stream's whole windows without overlap, (n, seq_len - 1): without the END_OF_TEXT in front."""
    count = len(stream) // (seq_len - 1)
    return stream[: count * (seq_len - 1)].reshape(count, seq_len - 1)


def next_token_loss(params: dict, windows: jax.Array, model: LanguageModel) -> jax.Array:
    """Mean negative log-likelihood of each token given those before it in its window, in nats."""
    logits = model.apply(params, windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


def make_optimizer(*, steps: int, learning_rate: float) -> optax.GradientTransformation:
    """AdamW on a warmed-up cosine; weight decay on matrices alone."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, warmup_steps=min(100, steps // 2), decay_steps=steps, end_value=0.02 * learning_rate
    )
    decayed = lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)  # noqa: E731
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.1, mask=decayed)
    )


def save_float16(directory: Path, model: LanguageModel, params: dict, tokenizer: Tokenizer) -> None:
    with tempfile.TemporaryDirectory() as tokenizer_directory:
        tokenizer.save(f"{tokenizer_directory}/tokenizer.json")
        half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), params)
        save(directory, model, half, tokenizer_from=tokenizer_directory)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write; must not exist")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=8, help="windows a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report-every", type=int, default=250, help="steps between held-out perplexities")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists; choose a new directory, or remove it first")
    return options


def main() -> None:
    options = parse_arguments()
    training, held_out = demo_text.read_modules(held_out=False), demo_text.read_modules(held_out=True)
    tokenizer = train_tokenizer(training)
    stream = token_stream(tokenizer, training)
    seq_len, bos = CONFIG["max_position_embeddings"], CONFIG["bos_token_id"]
    evaluation = consecutive_windows(token_stream(tokenizer, held_out), seq_len=seq_len)

    architecture = MODELS[CONFIG["model_type"]]
    model = LanguageModel(architecture=architecture, config=architecture.parse_config(CONFIG))
    params = model.init(jax.random.key(options.seed))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{len(stream):,} training tokens, {count:,} parameters", flush=True)
    optimizer = make_optimizer(steps=options.steps, learning_rate=options.learning_rate)
    state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params: dict, state: optax.OptState, windows: jax.Array) -> tuple[dict, optax.OptState, jax.Array]:
        loss, gradients = jax.value_and_grad(next_token_loss)(params, windows, model)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    generator = np.random.default_rng(options.seed)
    losses, start = [], time.perf_counter()
    for step in range(1, options.steps + 1):
        windows = random_windows(stream, generator, batch_size=options.batch_size, seq_len=seq_len)
        params, state, loss = train_step(params, state, jnp.asarray(windows))
        losses.append(float(loss))
        if step % options.report_every == 0 or step == options.steps:
            sample = evaluation if step == options.steps else evaluation[::10]
            held_out_perplexity = perplexity(model, params, sample, bos_token_id=bos)
            print(
                f"step {step}: training loss {np.mean(losses):.4f} nats a token; held-out loss "
                f"{math.log(held_out_perplexity):.4f} (perplexity {held_out_perplexity:.2f}) "
                f"on {sample.size:,} tokens; {time.perf_counter() - start:.0f} s",
                flush=True,
            )
            losses.clear()
    save_float16(options.out, model, params, tokenizer)


if __name__ == "__main__":
    main()
