"""The table of packed checkpoint formats."""

from jgptq.checkpoints import gptq
from jgptq.checkpoints.layout import Format

FORMATS: dict[str, Format] = {"gptq": gptq.FORMAT}
