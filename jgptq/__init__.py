"""jgptq: functional GPTQ quantization for JAX."""

from jgptq.grid import Grid
from jgptq.hessian import Hessian, init_hessian, merge_hessians, update_hessian
from jgptq.kernels.matmul import matmul
from jgptq.solvers import GPTQ, METHODS, OBQ, RTN, Info, gptq, obq, rtn
from jgptq.tensor import QuantizedTensor, dequantize

__version__ = "0.1.0"

__all__ = [
    "GPTQ",
    "METHODS",
    "OBQ",
    "RTN",
    "Grid",
    "Hessian",
    "Info",
    "QuantizedTensor",
    "dequantize",
    "gptq",
    "init_hessian",
    "matmul",
    "merge_hessians",
    "obq",
    "rtn",
    "update_hessian",
]
