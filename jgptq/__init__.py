"""jgptq: functional GPTQ quantization for JAX."""

import importlib.metadata

from jgptq.checkpoints import load, save
from jgptq.generate import generate
from jgptq.grid import Grid
from jgptq.hessian import Hessian, init_hessian, merge_hessians, update_hessian
from jgptq.kernels.grouped import grouped_matmul
from jgptq.kernels.matmul import matmul
from jgptq.kernels.prepack import prepack, unprepack
from jgptq.modules import find_weights, quantize, quantized
from jgptq.perplexity import compare, perplexity
from jgptq.quantize import Options, QuantizationWarning, Report, Row
from jgptq.solvers import GPTQ, METHODS, OBQ, RTN, Info, gptq, obq, rtn
from jgptq.tensor import QuantizedTensor, dequantize

__version__ = importlib.metadata.version("jgptq")

__all__ = [
    "GPTQ",
    "METHODS",
    "OBQ",
    "RTN",
    "Grid",
    "Hessian",
    "Info",
    "Options",
    "QuantizationWarning",
    "QuantizedTensor",
    "Report",
    "Row",
    "__version__",
    "compare",
    "dequantize",
    "find_weights",
    "generate",
    "gptq",
    "grouped_matmul",
    "init_hessian",
    "load",
    "matmul",
    "merge_hessians",
    "obq",
    "perplexity",
    "prepack",
    "quantize",
    "quantized",
    "rtn",
    "save",
    "unprepack",
    "update_hessian",
]
