"""Model directories in Hugging Face's layout, float or packed."""

from jgptq.checkpoints.formats import FORMATS
from jgptq.checkpoints.journal import Journal, fingerprint
from jgptq.checkpoints.layout import ExpectedTensor, Format
from jgptq.checkpoints.reading import load
from jgptq.checkpoints.writing import save

__all__ = ["FORMATS", "ExpectedTensor", "Format", "Journal", "fingerprint", "load", "save"]
