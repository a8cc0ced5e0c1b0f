"""Regular expressions of untrusted configs, matched in bounded time.

`re` tries one way after another, of which a pattern of twenty characters can have more than anyone waits for. Here each
part of a pattern is followed from each place in a name once, to all places where it can end; steps are counted.
"""

import re
import warnings
from collections.abc import Iterable, Sequence
from re import _constants as ops
from re import _parser as parser
from typing import Any

MAX_LENGTH = 10_000
MAX_STEPS = 100_000  # for one name: about 50 ms
REPEATS = (ops.MAX_REPEAT, ops.MIN_REPEAT)
CATEGORIES = {
    ops.CATEGORY_DIGIT: str.isdecimal,
    ops.CATEGORY_NOT_DIGIT: lambda character: not character.isdecimal(),
    ops.CATEGORY_SPACE: str.isspace,
    ops.CATEGORY_NOT_SPACE: lambda character: not character.isspace(),
    ops.CATEGORY_WORD: lambda character: character.isalnum() or character == "_",
    ops.CATEGORY_NOT_WORD: lambda character: not (character.isalnum() or character == "_"),
}
KNOWN = {
    *(ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN, ops.AT, ops.BRANCH, ops.SUBPATTERN, ops.FAILURE, *REPEATS),
    *(ops.ASSERT, ops.ASSERT_NOT),
}
PLACES = (ops.AT_BEGINNING, ops.AT_BEGINNING_STRING, ops.AT_END, ops.AT_END_STRING)


class FirstMatch:
    """Which of several patterns is the first to match a name at its start, as `re.match` does.

    ValueError, at once, for a pattern that is damaged, too long, or beyond characters, sets, groups, alternatives,
    repetitions, looking ahead, ^ and $; and when asked, for patterns that take too long.
    """

    def __init__(self, patterns: Sequence[str]):
        self.names: dict[str, int] = {}  # of patterns that are a name between ^ and $
        self.parsed: list[tuple[int, str, Any]] = []
        for number, pattern in enumerate(patterns):
            tree = _parse(pattern)
            name = _literal(tree)
            if name is None:
                self.parsed.append((number, pattern, tree))
            else:
                self.names.setdefault(name, number)

    def __call__(self, name: str) -> int | None:
        exact, walk = self.names.get(name), _Walk(name)
        for number, pattern, tree in self.parsed:
            if exact is not None and exact < number:
                break
            try:
                if walk.ends(tree, 0):
                    return number
            except (TimeoutError, RecursionError) as error:
                raise ValueError(f"the pattern {pattern[:80]!r} takes too long to match; write it simpler") from error
        return exact


def _parse(pattern: str) -> tuple:
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"a pattern of {len(pattern)} characters begins {pattern[:80]!r}; {MAX_LENGTH} are allowed")
    try:
        with warnings.catch_warnings(action="ignore"):  # of what later versions of Python may read differently
            tree = parser.parse(pattern)
        if tree.state.flags & ~re.UNICODE:
            raise ValueError(f"the pattern {pattern[:80]!r} has flags; write it without")
        return _frozen(tree)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern[:80]!r} is no regular expression ({error})") from error
    except KeyError as error:
        raise ValueError(f"the pattern {pattern[:80]!r} has {error.args[0]}, which is not understood here") from error


def _frozen(tree: Any) -> tuple:
    """A parsed pattern as tuples (what, its arguments); KeyError names what is not known."""
    return tuple((what, _arguments(what, given)) for what, given in tree)


def _arguments(what: Any, given: Any) -> Any:
    if what not in KNOWN:
        raise KeyError(str(what).lower())
    if what is ops.BRANCH:
        return tuple(_frozen(way) for way in given[1])
    if what is ops.SUBPATTERN:
        _, added, removed, body = given
        if added or removed:
            raise KeyError("flags")
        return _frozen(body)
    if what in REPEATS:
        least, most, body = given
        return int(least), int(most), _frozen(body)
    if what in (ops.ASSERT, ops.ASSERT_NOT):
        direction, body = given
        if direction < 0:
            raise KeyError("a look behind")
        return _frozen(body)
    if what is ops.AT and given not in PLACES:
        raise KeyError(str(given).lower())
    return tuple(given) if what is ops.IN else given


def _literal(tree: tuple) -> str | None:
    """The name that a pattern spells out between ^ and $; None for any other pattern."""
    if len(tree) < 2 or tree[0] != (ops.AT, ops.AT_BEGINNING) or tree[-1] != (ops.AT, ops.AT_END):
        return None
    inner = tree[1:-1]
    return "".join(chr(given) for _, given in inner) if all(what is ops.LITERAL for what, _ in inner) else None


class _Walk:
    """Where parts of patterns can end in one name, from each place they are asked for."""

    def __init__(self, name: str):
        self.name, self.steps, self.known = name, 0, {}

    def ends(self, sequence: tuple, start: int) -> frozenset[int]:
        self._count()
        key = (id(sequence), start)
        if key not in self.known:
            places = frozenset({start})
            for what, given in sequence:
                places = self._union(self._step(what, given, place) for place in places)
                if not places:
                    break
            self.known[key] = places
        return self.known[key]

    def _count(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise TimeoutError

    def _union(self, sets: Iterable[frozenset[int]]) -> frozenset[int]:
        return frozenset().union(*sets)

    def _step(self, what: Any, given: Any, place: int) -> frozenset[int]:
        self._count()
        here, nowhere = frozenset({place}), frozenset()
        if what is ops.SUBPATTERN:
            return self.ends(given, place)
        if what is ops.BRANCH:
            return self._union(self.ends(way, place) for way in given)
        if what in REPEATS:
            return self._repeated(*given, place)
        if what is ops.ASSERT:
            return here if self.ends(given, place) else nowhere
        if what is ops.ASSERT_NOT:
            return nowhere if self.ends(given, place) else here
        if what is ops.AT:
            # $ also stands before a last line end; names have none.
            return here if place == (0 if given in PLACES[:2] else len(self.name)) else nowhere
        if what is ops.FAILURE or place == len(self.name):
            return nowhere
        return frozenset({place + 1}) if _accepts(what, given, self.name[place]) else nowhere

    def _repeated(self, least: int, most: int, body: tuple, place: int) -> frozenset[int]:
        # More rounds than characters reach nothing new: one that is not empty takes a character.
        rounds = len(self.name) + 1
        new = frozenset({place})
        for _ in range(min(least, rounds)):
            new = self._union(self.ends(body, start) for start in new)
        reached = new
        for _ in range(min(most - least, rounds)):
            new = self._union(self.ends(body, start) for start in new) - reached
            if not new:
                break
            reached |= new
        return reached


def _accepts(what: Any, given: Any, character: str) -> bool:
    if what is ops.IN:
        negated = given[:1] == ((ops.NEGATE, None),)
        return negated != any(_accepts(kind, value, character) for kind, value in given[negated:])
    if what is ops.RANGE:
        return given[0] <= ord(character) <= given[1]
    if what is ops.CATEGORY:
        return CATEGORIES[given](character)
    if what is ops.ANY:
        return character != "\n"
    return (what is ops.LITERAL) == (ord(character) == given)
