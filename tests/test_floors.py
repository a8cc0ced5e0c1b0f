"""The house's map, as law: a room imports only from floors below, and rooms on one floor do not see each other."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "jgptq"
FLOORS = (
    ("slices",),
    ("grid", "packing", "accelerators", "cholesky", "panels", "partition", "phases"),
    ("tensor", "hessian"),
    ("solvers", "kernels", "reader"),
    ("tracing", "models", "chat"),
    ("executor", "sharding"),
    ("rules", "scaling", "solves"),
    ("quantize", "checkpoints", "documents"),
    ("allocate", "estimate"),
    ("calibration", "generate", "perplexity", "finetune", "modules", "report", "demo_text", "program_cache"),
    ("demo",),
    ("cli",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# The rooms of the floors up to the solvers' and kernels', and tracing.
CORE = {room for rooms in FLOORS[:4] for room in rooms} | {"tracing"}
CORE_IMPORTS = {"jax", "jaxlib", "numpy", "jaxtyping", "jgptq"} | set(sys.stdlib_module_names)
# Files of no room: they may see every room, and no room but the top two floors may see them.
FRONT = {"__init__", "__main__"}

FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST, file: Path) -> list[str]:
    """Every module a file imports, dotted and absolute; `from a import b` gives a.b, which may name an object."""
    package = ("jgptq", *file.relative_to(PACKAGE).parent.parts)
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (start, node.module) if part)
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


def complaints(source: str, file: Path) -> list[str]:
    """What is wrong with a file's imports; [] when nothing is."""
    room = room_of(file)
    if room in FRONT:
        return []
    if room not in FLOOR:
        return [f"{room} is on no floor: add it to the map in {Path(__file__).name}"]
    found = []
    for name in imports(ast.parse(source), file):
        parts = name.split(".")
        if room in CORE and parts[0] not in CORE_IMPORTS:
            found.append(f"{room} is core and imports {name}")
        if room != "tracing" and parts[:2] == ["jax", "extend"]:
            found.append(f"{room} imports {name}: only tracing touches jax.extend")
        if room in CORE and parts[0] == "jaxlib" and file.name != "mosaic.py":
            found.append(f"{room} imports {name}: only kernels/mosaic.py touches jaxlib")
        if parts[0] != "jgptq":
            continue
        other = parts[1] if len(parts) > 1 else "__init__"
        if other == room:
            continue
        if other not in FLOOR:
            if FLOOR[room] < FLOOR["demo"] and name != "jgptq.__version__":
                found.append(f"{room} imports {name} from the front door: import it from its own room")
        elif FLOOR[other] >= FLOOR[room]:
            found.append(f"{room} (floor {FLOOR[room]}) imports {other} (floor {FLOOR[other]})")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_every_import_goes_down(file):
    assert complaints(file.read_text(), file) == []


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("grid.py", "from jgptq import tensor", r"grid \(floor 1\) imports tensor \(floor 2\)"),
        ("hessian.py", "import jgptq.tensor", r"hessian \(floor 2\) imports tensor \(floor 2\)"),
        ("solvers/gptq.py", "def f():\n  from jgptq.kernels.matmul import matmul", "imports kernels"),
        ("solvers/gptq.py", "from ..quantize import quantize", "imports quantize"),
        ("solvers/gptq.py", "from jgptq import Grid", "front door"),
        ("kernels/xla.py", "import flax", "core and imports flax"),
        ("quantize.py", "from jax.extend import core", "only tracing touches jax.extend"),
        ("kernels/hopper.py", "from jaxlib.mlir import ir", "only kernels/mosaic.py touches jaxlib"),
        ("attic.py", "", "on no floor"),
    ],
)
def test_the_map_notices(file, source, complaint):
    with pytest.raises(AssertionError, match=complaint):
        assert not complaints(source, PACKAGE / file), complaints(source, PACKAGE / file)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("solvers/gptq.py", "from jgptq.solvers.method import Info\nfrom jgptq import grid as grids\nimport jax"),
        ("tracing/graph.py", "from jax.extend import core"),
        ("models/llama.py", "import flax"),
        ("cli/commands.py", "import jgptq"),
    ],
)
def test_the_map_allows(file, source):
    assert complaints(source, PACKAGE / file) == []
