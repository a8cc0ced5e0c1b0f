"""Model directories in Hugging Face's layout, float or packed."""

from jgptq.checkpoints.formats import FORMATS
from jgptq.checkpoints.journal import Journal, fingerprint, size_and_hash
from jgptq.checkpoints.layout import ExpectedTensor, Format
from jgptq.checkpoints.reading import load
from jgptq.checkpoints.writing import remove_partial, save

__all__ = [
    "FORMATS",
    "ExpectedTensor",
    "Format",
    "Journal",
    "fingerprint",
    "load",
    "remove_partial",
    "save",
    "size_and_hash",
]
