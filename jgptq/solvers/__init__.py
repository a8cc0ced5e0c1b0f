"""The quantization methods, one a file, and the tables that name them."""

from jgptq.solvers.awq import AWQ, awq_scales
from jgptq.solvers.gptq import GPTQ, gptq
from jgptq.solvers.method import Info, Method
from jgptq.solvers.obq import OBQ, obq
from jgptq.solvers.rtn import RTN, nearest, rtn
from jgptq.solvers.targets import Targets

# With several scalings of the inputs, where these fold away, cheaper solves tell which is best; then several orders.
_JUDGE = GPTQ(scale_search="lp", sweeps=0)
_SOLVER = GPTQ(orders=4)
QUALITIES = ("fast", "balanced", "best")
# What a method's name stands for, by quality. "fast" looks at each weight once; "balanced" takes at most three times
# as long.
PRESETS: dict[str, dict[str, Method]] = {
    "rtn": {"fast": RTN(), "balanced": RTN(scale_search="lp"), "best": RTN(scale_search="lp")},
    "gptq": {
        "fast": GPTQ(scale_search=None, sweeps=0, targets=None),
        "balanced": GPTQ(),
        "best": AWQ(solver=_SOLVER, points=5, judge=_JUDGE, input_scales=False),
    },
    "awq": {
        "fast": AWQ(solver=RTN()),
        "balanced": AWQ(),
        "best": AWQ(solver=_SOLVER, points=5, judge=_JUDGE),
    },
    "obq": dict.fromkeys(QUALITIES, OBQ()),
}
METHODS: dict[str, Method] = {name: presets["balanced"] for name, presets in PRESETS.items()}

__all__ = [
    "AWQ",
    "GPTQ",
    "METHODS",
    "OBQ",
    "PRESETS",
    "QUALITIES",
    "RTN",
    "Info",
    "Method",
    "Targets",
    "awq_scales",
    "gptq",
    "nearest",
    "obq",
    "rtn",
]
