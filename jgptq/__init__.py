"""jgptq: functional GPTQ quantization for JAX."""

import importlib.metadata

from jgptq.checkpoints import load, save
from jgptq.estimate import Estimate
from jgptq.finetune import tune
from jgptq.generate import generate
from jgptq.grid import Grid
from jgptq.hessian import Hessian, init_hessian, merge_hessians, update_hessian
from jgptq.kernels.grouped import grouped_matmul
from jgptq.kernels.matmul import matmul
from jgptq.kernels.prepack import prepack, unprepack
from jgptq.modules import allocate, estimate, find_weights, quantize, quantized
from jgptq.perplexity import compare, next_token_loss, perplexity
from jgptq.quantize import QuantizationWarning, Report, Row
from jgptq.rules import Options
from jgptq.sharding import shard
from jgptq.solvers import AWQ, GPTQ, METHODS, OBQ, PRESETS, RTN, Info, Targets, awq_scales, gptq, obq, rtn
from jgptq.tensor import QuantizedTensor, dequantize

__version__ = importlib.metadata.version("jgptq")

__all__ = [
    "AWQ",
    "GPTQ",
    "METHODS",
    "OBQ",
    "PRESETS",
    "RTN",
    "Estimate",
    "Grid",
    "Hessian",
    "Info",
    "Options",
    "QuantizationWarning",
    "QuantizedTensor",
    "Report",
    "Row",
    "Targets",
    "__version__",
    "allocate",
    "awq_scales",
    "compare",
    "dequantize",
    "estimate",
    "find_weights",
    "generate",
    "gptq",
    "grouped_matmul",
    "init_hessian",
    "load",
    "matmul",
    "merge_hessians",
    "next_token_loss",
    "obq",
    "perplexity",
    "prepack",
    "quantize",
    "quantized",
    "rtn",
    "save",
    "shard",
    "tune",
    "unprepack",
    "update_hessian",
]
