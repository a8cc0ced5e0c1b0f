"""The command line."""

from jgptq.cli.commands import main

__all__ = ["main"]
