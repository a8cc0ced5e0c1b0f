"""The text of the demo: source code of Python's standard library, which every machine with Python has.

A module belongs to the held-out part if the CRC-32 of its path says so. The split thus depends on no list, no seed
and no order of files, and a module that is held out in one Python version is held out in all of them.
"""

import sysconfig
import tokenize
import zlib
from pathlib import Path

ONE_IN = 20  # one module in so many is held out
# Installed packages, tests, programs and generated tables: not the library that a reader would call Python code.
# encodings and pydoc_data are excluded because their tables and prose would be a quarter of the text.
EXCLUDED_FOLDERS = frozenset(
    {
        "__phello__",
        "__pycache__",
        "dist-packages",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
    }
)
EXCLUDED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars")  # written when Python was built; differ between machines


def is_held_out(name: str) -> bool:
    """Whether the module at the relative path `name` ("email/header.py", with forward slashes) is kept out."""
    return zlib.crc32(name.encode()) % ONE_IN == 0


def module_names(root: Path) -> list[str]:
    """Relative paths of the modules below `root` that make up the text, sorted, with forward slashes."""
    names = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if EXCLUDED_FOLDERS.isdisjoint(relative.parts[:-1]) and not relative.name.startswith(EXCLUDED_PREFIXES):
            names.append(relative.as_posix())
    return sorted(names)


def read_modules(*, held_out: bool, root: Path | None = None) -> list[str]:
    """Source text of the training modules, or of the held-out ones, one string a module, in order of their paths.

    root: the folder of the library; None is this Python's own, `sysconfig.get_path("stdlib")`.
    Raises ValueError if the sources are not there: some distributions install compiled modules only.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    texts = []
    for name in module_names(root):
        if is_held_out(name) == held_out:
            with tokenize.open(root / name) as file:  # honours a module's coding line
                texts.append(file.read())
    texts = [text for text in texts if text.strip()]
    if not texts:
        part = "held-out" if held_out else "training"
        raise ValueError(
            f"{root} has no {part} modules of the standard library's source (*.py), which the demo reads; "
            f"use a Python that is installed with its sources, from python.org or conda for example"
        )
    return texts
