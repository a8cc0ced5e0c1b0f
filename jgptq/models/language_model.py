"""LanguageModel: an architecture with its sizes, as a pure function of a parameter pytree and tokens."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Integer

from jgptq.kernels.prepack import unprepack
from jgptq.models import serving

ParameterPath = tuple[str | int, ...]


def tensor_name(path: ParameterPath) -> tuple[str, bool]:
    """("model", "layers", 0, "mlp", "up_proj", "kernel") -> ("model.layers.0.mlp.up_proj.weight", True).

    A parameter below `experts` is a stack, which checkpoints store as one tensor an expert.
    """
    *modules, leaf = path
    parts = [part for module in modules for part in ([module, "*"] if module == "experts" else [module])]
    return ".".join([*map(str, parts), "bias" if leaf == "bias" else "weight"]), leaf == "kernel"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a Hugging Face model_type stands for: a row of MODELS.

    parse_config: config.json as a dict -> the architecture's config, a frozen dataclass with
        `vocab_size`, `max_position_embeddings`, `bos_token_id`, `eos_token_id` and `to_dict()`; ValueError if it
        cannot be built.
    build: (config, rngs) -> the Flax NNX module, randomly initialized; called as module(tokens) -> logits.
    tensor_name: a parameter's path -> (name in the checkpoint, whether it is stored transposed). A `*` in the name:
        the parameter's first axis is a stack, of which the checkpoint stores each index as a tensor of its own.
    prefix: what a checkpoint of the model without its head leaves out at the start of every name.
    unused: regular expressions, matched in full, of checkpoint tensors that carry nothing the module needs.
    """

    model_type: str
    parse_config: Callable[[Mapping[str, Any]], Any]
    build: Callable[[Any, nnx.Rngs], nnx.Module]
    tensor_name: Callable[[ParameterPath], tuple[str, bool]] = tensor_name
    prefix: str = "model."
    unused: tuple[str, ...] = ()

    def stored_names(self, path: ParameterPath, shape: tuple[int, ...]) -> tuple[str, ...]:
        """The checkpoint's names of the tensors that make up a parameter: one, or one for each index of a stack."""
        name, _ = self.tensor_name(path)
        return tuple(name.replace("*", str(index)) for index in range(shape[0])) if "*" in name else (name,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A causal language model without its parameters: hashable, and usable as a constant inside `jax.jit`.

    Parameters are nested dicts of arrays, layer indices as int keys. Any linear kernel may be a QuantizedTensor.
    source: the directory it was loaded from, where its tokenizer lies; not part of equality.
    """

    architecture: Architecture
    config: Any
    source: Path | None = dataclasses.field(default=None, compare=False)

    def apply(
        self, params: Mapping | serving.Arranged, tokens: Integer[Array | np.ndarray, "batch seq"]
    ) -> Float[Array, "batch seq vocab"]:
        """Logits, float32, of the token after each position. Pure: jit it, differentiate it, vmap it."""
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens are {tokens.dtype}{list(tokens.shape)}; give integers of shape (batch, seq), "
                "a single sequence as tokens[None, :]"
            )
        return self._module(params)(jnp.asarray(tokens))

    def prefill(
        self,
        params: Mapping | serving.Arranged,
        tokens: Integer[Array, "batch seq"],
        lengths: Integer[Array, " batch"],
        capacity: int,
    ) -> tuple[Float[Array, "batch vocab"], Any]:
        """Logits of the token after each prompt, and a cache with room for `capacity` tokens.

        tokens: prompts, filled up at their ends with anything. lengths: of the prompts.
        """
        return self._module(params).prefill(tokens, lengths, capacity)

    def step(
        self,
        params: Mapping | serving.Arranged,
        tokens: Integer[Array, " batch"],
        positions: Integer[Array, " batch"],
        cache: Any,
    ) -> tuple[Float[Array, "batch vocab"], Any]:
        """Logits of the token after one more token of each sequence, which stands at `positions`; and the new cache."""
        return self._module(params).step(tokens, positions, cache)

    def arranged(
        self, params: Mapping | serving.Arranged, *, stack_floats: bool = False, donate: bool = False
    ) -> serving.Arranged:
        """The same parameters as decoding wants them; every method here takes them, and `jgptq.generate` does.

        Packed projections of the same inputs (q, k and v; gate and up) are joined to one product where their bits,
        groups, symmetry and order of inputs are the same. Layers that differ in nothing but values are stacked, and run
        under a scan, so that compiling takes no longer for a deep model than for a shallow one. On an NVIDIA Hopper GPU
        packed kernels of bfloat16 and float16 models come to the order of the kernel there, as by `jgptq.prepack`.
        stack_floats: stacks layers with large float matrices as well, at a copy of those for every token.
        donate: deletes arrays as soon as their place is taken, so that memory holds the model but once, and one leaf.
        """
        if isinstance(params, serving.Arranged):
            return params
        module = self._module(params)
        runs, prepacked = serving.arrange(module, stack_floats=stack_floats, donate=donate)
        return serving.Arranged(params=serving.keys_as_strings(_parameters(module)), runs=runs, prepacked=prepacked)

    def plain(self, params: Mapping | serving.Arranged) -> Mapping:
        """The exact inverse of `arranged`."""
        if not isinstance(params, serving.Arranged):
            return params
        arranged = self._module(params)
        graph, shapes, _ = self._graph_and_shapes
        module = nnx.merge(graph, shapes)
        for layer, values in zip(module.decoder_layers(), serving.ungrouped(arranged), strict=True):
            nnx.update(layer, nnx.state(values, nnx.Param))
        serving.group(arranged, ())
        nnx.update(module, nnx.state(arranged, nnx.Param))
        return unprepack(_parameters(module)) if params.prepacked else _parameters(module)

    @property
    def depth(self) -> int:
        """How many layers there are."""
        return self._graph_and_shapes[2]

    def init(self, key: Array) -> dict:
        """Random float32 parameters: normal with the config's initializer_range, norms the identity, biases 0."""
        # Not jitted: equal shapes share their small programs, where one for all layers would compile for minutes.
        return _parameters(self.architecture.build(self.config, nnx.Rngs(params=key)))

    @property
    def parameter_shapes(self) -> dict:
        """The parameter tree with a jax.ShapeDtypeStruct for every leaf; nothing is allocated."""
        return jax.tree.map(lambda leaf: leaf, self._graph_and_shapes[1])

    def _module(self, params: Mapping | serving.Arranged) -> nnx.Module:
        if isinstance(params, serving.Arranged):
            graph = _arranged_graph(self.architecture, self.config, params.runs)
            return nnx.merge(graph, serving.keys_as_numbers(params.params))
        return nnx.merge(self._graph_and_shapes[0], params)

    @property
    def _graph_and_shapes(self) -> tuple[nnx.GraphDef, dict, int]:
        return _graph_and_shapes(self.architecture, self.config)


@functools.lru_cache(maxsize=16)
def _graph_and_shapes(architecture: Architecture, config: Any) -> tuple[nnx.GraphDef, dict, int]:
    module = nnx.eval_shape(lambda: architecture.build(config, nnx.Rngs(params=0)))
    return nnx.graphdef(module), _parameters(module), len(module.decoder_layers())


@functools.lru_cache(maxsize=16)
def _arranged_graph(architecture: Architecture, config: Any, runs: serving.Runs) -> nnx.GraphDef:
    graph, shapes, _ = _graph_and_shapes(architecture, config)
    module = nnx.merge(graph, shapes)
    serving.group(module, runs)
    return nnx.graphdef(module)


def _parameters(module: nnx.Module) -> dict:
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))
