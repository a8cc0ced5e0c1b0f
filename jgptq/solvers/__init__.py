"""The quantization methods, one a file, and the table that names them."""

from jgptq.solvers.gptq import GPTQ, gptq
from jgptq.solvers.method import Info, Method
from jgptq.solvers.obq import OBQ, obq
from jgptq.solvers.rtn import RTN, nearest, rtn

METHODS: dict[str, Method] = {method.name: method for method in (RTN(), GPTQ(), OBQ())}

__all__ = ["GPTQ", "METHODS", "OBQ", "RTN", "Info", "Method", "gptq", "nearest", "obq", "rtn"]
