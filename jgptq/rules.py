"""What is asked for each weight: grid and method, of the call or of the first rule that matches the weight's path."""

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jgptq.grid import Grid
from jgptq.solvers import METHODS, PRESETS, QUALITIES, Method
from jgptq.tracing.graph import Site


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a rule sets for the weights it matches; None keeps the setting of the call.

    tied: quantize also those used elsewhere than in products, such as an embedding that is the output head as well.
    """

    grid: Grid | None = None
    method: str | Method | None = None
    tied: bool = False

    def __post_init__(self):
        settings_of(self.grid or Grid(), self.method or "gptq", "balanced")


Rule = tuple[str | Callable[[Site], bool], Options | None]


def chosen_sites(
    sites, grid: Grid | None, method: Method, rules: Sequence[Rule]
) -> dict[int, tuple[Grid | None, Method]]:
    """Grid and method of each weight to quantize, by the leaf's number: two leaves may read as one path."""
    if not any(site.quantizable or (rules and site.tied) for site in sites):
        reasons = "; ".join(f"{site.path}: {site.reason}" for site in sites[:5]) or "it has no floating-point leaf"
        raise ValueError(f"the function has no weight that can be quantized ({reasons}); see jgptq.find_weights")
    plan = {site.leaf: (grid, method) for site in sites if site.quantizable}
    undecided = {site.leaf for site in sites}
    for pattern, options in rules:
        matches = pattern if callable(pattern) else lambda site, glob=pattern: fnmatch.fnmatchcase(site.path, glob)
        hits = [site for site in sites if matches(site)]
        if not hits:
            nearest = difflib.get_close_matches(str(pattern), [site.path for site in sites], n=3, cutoff=0.0)
            raise ValueError(f"no weight matches the rule {pattern!r}; the nearest paths are {', '.join(nearest)}")
        able = [site for site in hits if options and (site.quantizable or (site.tied and options.tied))]
        if options and not able:
            raise ValueError(
                f"the rule {pattern!r} sets options for {hits[0].path}, which cannot be quantized ({hits[0].reason}); "
                "remove the rule, or give None instead of options"
            )
        for site in hits:
            if site.leaf not in undecided:
                continue
            undecided.remove(site.leaf)
            if options is None:
                plan.pop(site.leaf, None)
            elif site in able:
                plan[site.leaf] = options.grid, options.method
    return plan


def checked_rules(rules: Any) -> list[Rule]:
    if isinstance(rules, str | dict) or not isinstance(rules, Iterable):
        raise TypeError(f"rules={rules!r}; give a sequence of (pattern, options) pairs")
    rules = list(rules)
    for rule in rules:
        if not isinstance(rule, tuple | list) or len(rule) != 2 or not (isinstance(rule[0], str) or callable(rule[0])):
            raise TypeError(f"{rule!r} in rules; give a pair of a glob on paths, or a predicate, and options")
        if not (rule[1] is None or isinstance(rule[1], Options)):
            raise TypeError(
                f"the rule for {rule[0]!r} has options {rule[1]!r}; give jgptq.Options(...), or None to leave alone"
            )
    return rules


def completed(options: Options | None, grid: Grid, method: Method, quality: str) -> Options | None:
    """A rule's options with what the call sets in the place of None."""
    if options is None:
        return None
    grid, method = settings_of(options.grid or grid, options.method or method, quality)
    return dataclasses.replace(options, grid=grid, method=method)


def settings_of(grid: Any, method: Any, quality: Any) -> tuple[Grid, Method]:
    """Grid and Method value, checked."""
    if not isinstance(grid, Grid):
        raise TypeError(f"grid={grid!r}; give a jgptq.Grid, such as Grid(bits=4, group_size=128)")
    if quality not in QUALITIES:
        raise ValueError(f"quality={quality!r}; choose one of {QUALITIES}")
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"method={method!r}; choose one of {tuple(METHODS)}, or give a Method value")
        return grid, PRESETS[method][quality]
    if not isinstance(method, Method):
        raise TypeError(f"method={method!r}; choose one of {tuple(METHODS)}, or give a Method value, such as GPTQ()")
    return grid, method
