"""Checkpoints of language models, float or packed: Hugging Face directories, GGUF files, Orbax directories."""

from jgptq.checkpoints.formats import FORMATS, PACKINGS
from jgptq.checkpoints.gguf_tokenizer import read_tokenizer
from jgptq.checkpoints.journal import Journal, fingerprint, size_and_hash
from jgptq.checkpoints.reading import load
from jgptq.checkpoints.writing import remove_partial, save

__all__ = [
    "FORMATS",
    "PACKINGS",
    "Journal",
    "fingerprint",
    "load",
    "read_tokenizer",
    "remove_partial",
    "save",
    "size_and_hash",
]
