"""The Flax Linen classes of transformers 4.57, small and with random parameters, and what becomes of their weights.

There is no code here for any of them beyond its sizes and its inputs.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import transformers

WIDTH, HIDDEN, LAYERS, HEADS, VOCABULARY = 32, 64, 2, 4, 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Port:
    """model: the class without its "Flax". inputs: a name in INPUTS.

    quantized: how many kernels of each name. left: paths of the other weights and a word of the reason.
    """

    model: str
    config: Any
    inputs: str = "text"
    quantized: Mapping[str, int]
    left: Mapping[str, str]

    def build(self) -> tuple[Callable, Any]:
        """f(params, *inputs) and params."""
        shape = {"input_shape": (1, 8, 64)} if self.inputs == "speech" else {}
        model = getattr(transformers, f"Flax{self.model}")(self.config, _do_init=False, **shape)
        names = INPUTS[self.inputs].names

        def f(params, *inputs):
            output = model(**dict(zip(names, inputs, strict=True)), params=params)
            return output.logits if "logits" in output else (output.text_embeds, output.image_embeds)

        return f, random_params(model.params_shape_tree)

    def batch(self, seed: int) -> tuple[np.ndarray, ...]:
        return INPUTS[self.inputs].draw(np.random.default_rng(seed))


@dataclasses.dataclass(frozen=True)
class Inputs:
    names: tuple[str, ...]
    draw: Callable[[np.random.Generator], tuple[np.ndarray, ...]]


def tokens(rng: np.random.Generator, length: int = 16) -> np.ndarray:
    return rng.integers(3, VOCABULARY, (8, length))


def smooth(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Noise summed along its last two axes, so that neighbours are alike."""
    x = np.cumsum(np.cumsum(rng.standard_normal(shape), -1), -2)
    return (x / x.std()).astype(np.float32)


INPUTS = {
    "text": Inputs(("input_ids",), lambda rng: (tokens(rng),)),
    "text to text": Inputs(("input_ids", "decoder_input_ids"), lambda rng: (tokens(rng), tokens(rng, 12))),
    "image": Inputs(("pixel_values",), lambda rng: (smooth(rng, 8, 3, 16, 16),)),
    "text and image": Inputs(("input_ids", "pixel_values"), lambda rng: (tokens(rng), smooth(rng, 8, 3, 16, 16))),
    "speech": Inputs(("input_features", "decoder_input_ids"), lambda rng: (smooth(rng, 8, 8, 64), tokens(rng, 12))),
}


def random_params(shapes: Any) -> Any:
    """Norms of 1, biases of 0, weights that keep the scale of their inputs, embeddings of rank WIDTH / 4 plus noise."""
    rng = np.random.default_rng(0)

    def leaf(path, like):
        name = path[-1].key
        if len(like.shape) == 1:
            return jnp.full(like.shape, 0.0 if name == "bias" else 1.0, jnp.float32)
        values = rng.standard_normal(like.shape) / np.sqrt(np.prod(like.shape[:-1]))
        if name == "embedding":
            values = rng.standard_normal((like.shape[0], WIDTH // 4)) @ rng.standard_normal((WIDTH // 4, like.shape[1]))
            values = 0.3 * values + 0.1 * rng.standard_normal(like.shape)
        return jnp.asarray(values, jnp.float32)

    return jax.tree.map_with_path(leaf, shapes)


@contextlib.contextmanager
def as_with_their_jax() -> Iterator[None]:
    """The ports broadcast across ranks, and T5's calls an argument of jnp.clip by a name that JAX has dropped."""
    clip = jnp.clip

    def old_clip(x, *arguments, a_max=None, **keywords):
        return clip(x, *arguments, **keywords, **({} if a_max is None else {"max": a_max}))

    with jax.numpy_rank_promotion("allow"), mock.patch.object(jnp, "clip", old_clip):
        yield


SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
ENCODER_DECODER = {
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": HIDDEN,
    "decoder_ffn_dim": HIDDEN,
    "vocab_size": VOCABULARY,
}
GPT = {
    "n_layer": LAYERS,
    "n_embd": WIDTH,
    "n_head": HEADS,
    "n_inner": HIDDEN,
    "n_positions": 64,
    "vocab_size": VOCABULARY,
}
IMAGE = {
    key: SIZES[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
} | {
    "image_size": 16,
    "patch_size": 4,
}


def each(count: int, *names: str) -> dict[str, int]:
    return dict.fromkeys(names, count)


def tied(*paths: str) -> dict[str, str]:
    return dict.fromkeys(paths, "also used in gather")


def tables(*paths: str) -> dict[str, str]:
    return dict.fromkeys(paths, "used in gather")


BERT_LIKE = each(LAYERS, "query", "key", "value") | {"dense": 3 * LAYERS + 1}
LLAMA_LIKE = each(LAYERS, "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BART_LIKE = each(3 * LAYERS, "q_proj", "k_proj", "v_proj", "out_proj") | each(2 * LAYERS, "fc1", "fc2")

PORTS = {
    "GPT-2": Port(
        model="GPT2LMHeadModel",
        config=transformers.GPT2Config(**GPT),
        quantized=each(LAYERS, "c_attn", "c_fc") | {"c_proj": 2 * LAYERS},
        left=tied("transformer.wte.embedding") | tables("transformer.wpe.embedding"),
    ),
    "GPT-Neo": Port(
        model="GPTNeoForCausalLM",
        config=transformers.GPTNeoConfig(
            **SIZES, num_layers=LAYERS, num_heads=HEADS, attention_types=[[["global", "local"], 1]]
        ),
        quantized=each(LAYERS, "q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"),
        left=tied("transformer.wte.embedding") | tables("transformer.wpe.embedding"),
    ),
    "GPT-J": Port(
        model="GPTJForCausalLM",
        config=transformers.GPTJConfig(**GPT, rotary_dim=4),
        quantized=each(LAYERS, "q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out") | {"lm_head": 1},
        left=tables("transformer.wte.embedding"),
    ),
    "OPT": Port(
        model="OPTForCausalLM",
        config=transformers.OPTConfig(**SIZES, ffn_dim=HIDDEN, word_embed_proj_dim=WIDTH),
        quantized=each(LAYERS, "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        left=tied("model.decoder.embed_tokens.embedding") | tables("model.decoder.embed_positions.embedding"),
    ),
    "BLOOM": Port(
        model="BloomForCausalLM",
        config=transformers.BloomConfig(hidden_size=WIDTH, n_layer=LAYERS, n_head=HEADS, vocab_size=VOCABULARY),
        quantized=each(LAYERS, "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        left=tied("transformer.word_embeddings.embedding"),
    ),
    "Llama": Port(
        model="LlamaForCausalLM",
        config=transformers.LlamaConfig(**GROUPED),
        quantized=LLAMA_LIKE | {"lm_head": 1},
        left=tables("model.embed_tokens.embedding"),
    ),
    "Mistral": Port(
        model="MistralForCausalLM",
        config=transformers.MistralConfig(**GROUPED),
        quantized=LLAMA_LIKE | {"lm_head": 1},
        left=tables("model.embed_tokens.embedding"),
    ),
    "Gemma": Port(
        model="GemmaForCausalLM",
        config=transformers.GemmaConfig(**GROUPED, head_dim=WIDTH // HEADS),
        quantized=LLAMA_LIKE,
        left=tied("model.embed_tokens.embedding"),
    ),
    "BERT": Port(
        model="BertForMaskedLM",
        config=transformers.BertConfig(**SIZES),
        quantized=BERT_LIKE,
        left=tied("bert.embeddings.word_embeddings.embedding")
        | tables("bert.embeddings.position_embeddings.embedding", "bert.embeddings.token_type_embeddings.embedding"),
    ),
    "RoBERTa": Port(
        model="RobertaForMaskedLM",
        config=transformers.RobertaConfig(**SIZES),
        quantized=BERT_LIKE,
        left=tied("roberta.embeddings.word_embeddings.embedding")
        | tables(
            "roberta.embeddings.position_embeddings.embedding", "roberta.embeddings.token_type_embeddings.embedding"
        ),
    ),
    "T5": Port(
        model="T5ForConditionalGeneration",
        config=transformers.T5Config(
            d_model=WIDTH,
            d_kv=WIDTH // HEADS,
            d_ff=HIDDEN,
            num_layers=LAYERS,
            num_heads=HEADS,
            vocab_size=VOCABULARY,
        ),
        inputs="text to text",
        quantized=each(3 * LAYERS, "q", "k", "v", "o") | each(2 * LAYERS, "wi", "wo"),
        left=tied("shared.embedding")
        | tables(
            *(
                f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.embedding"
                for side in ("encoder", "decoder")
            )
        ),
    ),
    "BART": Port(
        model="BartForConditionalGeneration",
        config=transformers.BartConfig(**ENCODER_DECODER, max_position_embeddings=64),
        inputs="text to text",
        quantized=BART_LIKE,
        left=tied("model.shared.embedding")
        | tables("model.encoder.embed_positions.embedding", "model.decoder.embed_positions.embedding")
        | {"final_logits_bias": "used in add"},
    ),
    "ViT": Port(
        model="ViTForImageClassification",
        config=transformers.ViTConfig(**IMAGE),
        inputs="image",
        quantized=each(LAYERS, "query", "key", "value") | {"dense": 3 * LAYERS, "projection": 1, "classifier": 1},
        left={"vit.embeddings.cls_token": "broadcast_in_dim", "vit.embeddings.position_embeddings": "used in add"},
    ),
    "CLIP": Port(
        model="CLIPModel",
        config=transformers.CLIPConfig(text_config=SIZES, vision_config=IMAGE, projection_dim=WIDTH),
        inputs="text and image",
        quantized=each(2 * LAYERS, "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
        | each(1, "patch_embedding", "text_projection", "visual_projection"),
        left=tables(
            "text_model.embeddings.token_embedding.embedding",
            "text_model.embeddings.position_embedding.embedding",
            "vision_model.embeddings.position_embedding.embedding",
        ),
    ),
    "Whisper": Port(
        model="WhisperForConditionalGeneration",
        config=transformers.WhisperConfig(
            **ENCODER_DECODER, num_mel_bins=8, max_source_positions=32, max_target_positions=32
        ),
        inputs="speech",
        quantized=BART_LIKE | each(1, "conv1", "conv2"),
        left=tied("model.decoder.embed_tokens.embedding")
        | tables("model.encoder.embed_positions.embedding", "model.decoder.embed_positions.embedding"),
    ),
}
