"""Rules about regular expressions that name layers and parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from regrow.configs.faults import Path
from regrow.configs.recipe import Recipe
from regrow.configs.rules.rule import Breach, rule

_LONGEST = 10_000
"""Characters: compiled in some hundredths of a second."""

_SIGNS = re.compile(r"[\\^$*+?()\[\]|{}]")
"""What no layer's name holds."""


def is_pattern(name: str) -> bool:
    """Whether a text is a regular expression and no name."""
    return _SIGNS.search(name) is not None


def _faults(
    path: Path, patterns: Iterable[str], used: str, remedy: str, by_name: bool = False
) -> Iterator[Breach]:
    """A breach for each pattern that cannot be compiled in its place in `used`."""
    for pattern in patterns:
        where = (*path, pattern) if by_name else path
        if len(pattern) > _LONGEST:
            yield where, f"a pattern of more than {_LONGEST:,} characters", remedy
            continue
        try:
            re.compile(used.replace("PATTERN", pattern))
        except (re.error, RecursionError, OverflowError) as error:
            short = pattern if len(pattern) < 60 else f"{pattern[:57]}..."
            yield where, f"{short!r} is not a regular expression: {error}", remedy
        else:
            if _repeats_repetitions(pattern):
                yield where, "it repeats what repeats, and can take forever to match", remedy


_ESCAPED = re.compile(r"\\.|\[\^?\]?[^\]]*\]", re.DOTALL)
_INNERMOST = re.compile(r"\(([^()]*)\)([*+]|\{\d*,\})?")
_UNBOUNDED = re.compile(r"[*+]|\{\d*,\}")


_QUANTIFIER = r"(?:[*+?]|\{[\d,]*\})"
_ATOM = re.compile(rf"(\\.|\[[^\]]+\]|[^()\[\]|\\*+?{{}}])({_QUANTIFIER}*)", re.DOTALL)
_REPEATED = re.compile(
    rf"\\.|\[[^\]]+\]|\((?:\?:)?((?:{_ATOM.pattern})+)\)(?:[*+]|\{{\d*,\}})", re.DOTALL
)


def _has_an_end(atoms: list[tuple[str, str]]) -> bool:
    """Whether a group holds the sign it ends in a fixed number of times, as `(\\w+\\.)` does: then
    its repetitions fall apart in one way only."""
    *before, (end, quantifier) = atoms
    sign = end.removeprefix("\\")
    if quantifier or len(sign) != 1 or end in (".", "^", "$") or (end != sign and sign.isalnum()):
        return False
    others = [atom for atom, repeated in before if (atom, repeated) != (end, "")]
    try:
        return not any(re.fullmatch(atom, sign, re.IGNORECASE | re.DOTALL) for atom in others)
    except re.error:
        return False


def _once(match: re.Match[str]) -> str:
    """A repeated group with an end, as plain as `a+`."""
    ended = match[1] is not None and _has_an_end(_ATOM.findall(match[1]))
    return "a+" if ended else match[0]


def _repeats_repetitions(pattern: str) -> bool:
    """Whether a group that holds an unbounded repetition is itself repeated without bound, and
    could be so in many ways."""
    rest = _ESCAPED.sub("a", _REPEATED.sub(_once, pattern))
    while match := _INNERMOST.search(rest):
        repeats = _UNBOUNDED.search(match[1]) is not None
        if repeats and match[2]:
            return True
        inside = "a+" if repeats or match[2] else "a"
        rest = rest[: match.start()] + inside + rest[match.end() :]
    return False


@rule("lora_target_modules", "lora_exclude_modules", "optim_target_modules")
def target_patterns_are_valid(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """Each target is a name or a valid regular expression."""
    remedy = "Name layers, such as q_proj"
    for key in ("lora_target_modules", "lora_exclude_modules", "optim_target_modules"):
        yield from _faults((key,), getattr(recipe, key), "PATTERN", remedy)


@rule("lora_target_modules", "lora_exclude_modules")
def one_pattern_stands_alone(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """PEFT matches a list by the names' ends and a single text as a pattern: a pattern in a list of
    several would match nothing."""
    for key in ("lora_target_modules", "lora_exclude_modules"):
        names = getattr(recipe, key)
        odd = [name for name in names if is_pattern(name)]
        if odd and len(names) > 1:
            why = f"{odd[0]!r} is a pattern, and patterns do not work in a list of several"
            yield (key,), why, "Join them into one: (a|b)"


@rule("lora_target_modules", "lora_target_linear")
def a_pattern_excludes_all_linear_layers(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """A pattern cannot be joined with lora_target_linear."""
    if recipe.lora_target_linear and any(map(is_pattern, recipe.lora_target_modules)):
        why = "`lora_target_linear: true` takes every linear layer already"
        yield ("lora_target_modules",), why, "Keep one of the two"


@rule("lora_rank_pattern", "lora_alpha_pattern")
def rank_patterns_are_valid(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """PEFT reads each key as the end of a layer's name."""
    for key in ("lora_rank_pattern", "lora_alpha_pattern"):
        ends = r"(.*\.)?(PATTERN)$"
        yield from _faults((key,), getattr(recipe, key), ends, "Name layers, such as q_proj", True)


@rule("peft_layers_pattern", "peft_layers_to_transform")
def layers_are_counted_in_a_list(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """peft_layers_pattern is about peft_layers_to_transform, and names the list of layers."""
    key, patterns = ("peft_layers_pattern",), recipe.peft_layers_pattern
    if patterns and recipe.peft_layers_to_transform is None:
        yield key, "`peft_layers_to_transform` is missing", "Add it or remove this"
    yield from _faults(key, patterns, r".*\.PATTERN\.(\d+)\.", "Name the list, such as layers")


@rule("unfrozen_parameters")
def unfrozen_patterns_are_valid(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """Each is a regular expression, with rows behind it or without."""
    patterns = [re.sub(r"\[\d+:\d+\]$", "", pattern) for pattern in recipe.unfrozen_parameters]
    remedy = "Name parameters, such as ^lm_head"
    yield from _faults(("unfrozen_parameters",), patterns, "PATTERN", remedy)


RULES = (
    target_patterns_are_valid,
    one_pattern_stands_alone,
    a_pattern_excludes_all_linear_layers,
    rank_patterns_are_valid,
    layers_are_counted_in_a_list,
    unfrozen_patterns_are_valid,
)
