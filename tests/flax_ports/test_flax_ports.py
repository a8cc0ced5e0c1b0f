"""The Flax classes of transformers 4.57 through `jgptq.quantize` on a bare function, with no code for any of them.

transformers 5 has no Flax classes: `make test` runs this file in an environment of its own.
"""

import collections

import jax
import numpy as np
import pytest

import jgptq
from jgptq import GPTQ, RTN, Grid, QuantizedTensor
from jgptq.tracing.graph import leaf_paths

transformers = pytest.importorskip("transformers")
if not hasattr(transformers, "FlaxGPT2LMHeadModel"):
    pytest.skip(
        "transformers without Flax classes; make test runs this in its own environment", allow_module_level=True
    )

from coverage_table import HEADINGS, ports_section, sections  # noqa: E402
from ports import PORTS, as_with_their_jax  # noqa: E402

METHODS = (RTN(), GPTQ(act_order=False, scale_search=None, sweeps=0, targets=None))


def is_packed(leaf):
    return isinstance(leaf, QuantizedTensor)


def dense(params):
    return jax.tree.map(lambda leaf: leaf.dequantize() if is_packed(leaf) else leaf, params, is_leaf=is_packed)


@pytest.mark.parametrize("name", PORTS)
def test_a_flax_port_is_quantized_and_served(name):
    port = PORTS[name]
    with as_with_their_jax():
        f, params = port.build()
        calibration = [port.batch(seed) for seed in range(8)]
        packed = {}
        for method in METHODS:
            packed[method.name], report = jgptq.quantize(
                f, params, calibration, grid=Grid(bits=3, group_size=32), method=method
            )
        assert collections.Counter(row.path.split(".")[-2] for row in report.rows) == port.quantized
        skipped = dict(report.skipped)
        for path, words in port.left.items():
            assert words in skipped.pop(path)
        assert all(np.ndim(leaf) < 2 for path, leaf in leaf_paths(params) if path in skipped)

        x = port.batch(99)
        compiled = jax.jit(f)
        served = jax.jit(jgptq.quantized(f))(packed["gptq"], *x)
        exact, expected, rounded = (compiled(p, *x) for p in (params, dense(packed["gptq"]), dense(packed["rtn"])))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), served, expected)
        assert sum(row.relative_error for row in report.rows) < sum(row.rtn_error for row in report.rows)
        assert 0 < squared_error(expected, exact) < squared_error(rounded, exact)


def squared_error(got, exact) -> float:
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True)
    return sum(float(np.sum((np.asarray(a) - np.asarray(b)) ** 2)) for a, b in pairs)


def test_the_table_of_ports_is_up_to_date():
    """Run `python tests/coverage_table.py` where this fails."""
    assert sections()[HEADINGS[1]] == ports_section()
