"""The tables of checkpoint formats."""

from jgptq.checkpoints import awq, compressed_tensors, gptq
from jgptq.checkpoints.layout import Format

PACKINGS: dict[str, Format] = {
    packing.name: packing for packing in (gptq.FORMAT, awq.FORMAT, compressed_tensors.FORMAT)
}
"""How the modules of a Hugging Face directory are packed, by its quant_method."""

FORMATS = (*PACKINGS, "gguf", "orbax")
"""What `save` writes and `load` recognizes."""
