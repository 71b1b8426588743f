"""Jinja's sandbox with bounded work: a hostile chat template ends with an error, not with a hang.

Jinja keeps a template away from Python's insides (`ImmutableSandboxedEnvironment`). This adds
limits to how often loops turn, how large values grow and how much is printed. They are far above
what templates in use need and are the same on every machine, so they decide nothing else.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

# A stage does not read the clock: a template that prints today's date gets this day instead, the
# one that Llama 3's own template falls back to.
TODAY = datetime.datetime(2024, 7, 26, tzinfo=datetime.UTC)

MAX_STEPS = 1_000_000
"""Turns of all loops of one rendering; a dialogue of 1000 messages takes some 10 000."""
_CALL_STEPS = 10
"""What a call counts for: it takes about ten times as long as an empty turn of a loop."""
MAX_SIZE = 20_000_000
"""Characters or items of one value and of the whole text: 40 times a row of 128k tokens."""
_MAX_POWER = 1_000
_WIDENING = ("center", "indent", "round", "wordwrap", "format", "replace")
_WALKING = (
    *("batch", "dictsort", "groupby", "items", "join", "list", "map", "max", "min", "reject"),
    *("rejectattr", "reverse", "select", "selectattr", "slice", "sort", "sum", "unique"),
)
# Widths and precisions that formatting asks for; `*` and `{...{` take them from the arguments.
_PERCENT = re.compile(r"%(?:\(\w*\))?[-#0 +]*(\d+|\*)?(?:\.(\d+|\*))?")
_BRACES = re.compile(r"\{[^{}]*:[^{}]*?(\d+|\{)[^{}\d]*(\d+|\{)?")


class LimitError(jinja2.TemplateError):
    """The template does more than any chat template needs."""


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template. `steps` is set to 0 before each rendering."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        self.steps = 0
        self.filters["tojson"] = _tojson
        for name in (*_WIDENING, *_WALKING):
            self.filters[name] = self._limited(name, self.filters[name])
        self.filters["_counted"], self.filters["_bounded"] = self._counted, _bounded
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = TODAY.strftime
        del self.globals["lipsum"]

    def template(self, text: str) -> jinja2.Template:
        """The compiled template. Raises `jinja2.TemplateSyntaxError`."""
        tree = _Limits().visit(self.parse(text))
        return jinja2.Template.from_code(self, self.compile(tree), dict(self.globals))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """`*`, `**` and `%` where their result is of a reasonable size."""
        if operator == "*" and _size(left) * _size(right) > MAX_SIZE:
            raise LimitError("a product is too large")
        if operator == "**" and max(abs(left), abs(right)) > _MAX_POWER:
            raise LimitError("a power is too large")
        if operator == "%" and isinstance(left, str):
            _refuse_widths(_PERCENT, left)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, called: Any, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A call of a macro, a method or a function, counted."""
        self._step(_CALL_STEPS)
        if args or kwargs:
            _refuse_wide(*args, *kwargs.values())
        name = getattr(called, "__name__", "")
        if name in ("join", "replace"):
            _refuse_growth(called.__self__, *args)
        if name in ("format", "format_map"):  # of a text, as Jinja's sandbox wraps it
            _refuse_widths(_BRACES, called.__wrapped__.__self__)
        result = super().call(context, called, *args, **kwargs)
        if isinstance(result, range):
            self._step(len(result))
        return _bounded(result)

    def concat(self, pieces: Iterable[str]) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The text of the whole template or of a macro."""
        printed, size = [], 0
        for piece in pieces:
            printed.append(piece)
            size += len(piece)
            if size > MAX_SIZE:
                raise LimitError(f"it prints more than {MAX_SIZE} characters")
        return "".join(printed)

    def _step(self, count: int) -> None:
        self.steps += count
        if self.steps > MAX_STEPS:
            raise LimitError(f"its loops turn more than {MAX_STEPS} times")

    def _limited(self, name: str, function: Any) -> Any:
        """The filter, counting what it walks over and refusing to make a text very wide."""

        def limited(*args: Any, **kwargs: Any) -> Any:
            _refuse_wide(*args, *kwargs.values())
            if name in _WALKING:
                self._step(max((len(a) for a in args if hasattr(a, "__len__")), default=0))
            if name == "format":
                _refuse_widths(_PERCENT, str(args[0]))
            if name in ("join", "replace"):
                # The first is what Jinja passes for itself: its environment or context.
                _refuse_growth(*args[1:])
            return function(*args, **kwargs)

        # How Jinja knows what to pass to a filter.
        limited.jinja_pass_arg = getattr(function, "jinja_pass_arg", None)  # pyright: ignore[reportFunctionMemberAccess]
        return limited

    def _counted(self, items: Any) -> Any:
        if not hasattr(items, "__len__"):
            items = list(items)  # a generator made by one of Jinja's filters
        self._step(len(items))
        return items


class _Limits(NodeTransformer):
    """Counts what loops go over, and bounds what is put into variables."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filter(node.iter, "_counted")
        return node

    def visit_Assign(self, node: nodes.Assign) -> nodes.Node:
        self.generic_visit(node)
        node.node = _filter(node.node, "_bounded")
        return node


def _filter(value: nodes.Node, name: str) -> nodes.Filter:
    made = nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)
    made.environment = value.environment
    return made


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: its body, as if the marks were not there."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _size(value: Any) -> int:
    if isinstance(value, int):
        return abs(value)
    return len(value) if hasattr(value, "__len__") else 1


def _bounded(value: Any) -> Any:
    if isinstance(value, (str, list, tuple, dict)) and len(value) > MAX_SIZE:
        raise LimitError(f"a value is larger than {MAX_SIZE}")
    return value


def _refuse_wide(*values: Any) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_STEPS:
            raise LimitError(f"a number it calls something with is larger than {MAX_STEPS}")
        if isinstance(value, str) and len(value) > MAX_SIZE:
            raise LimitError(f"a value is larger than {MAX_SIZE}")


def _refuse_widths(asked: re.Pattern[str], text: str) -> None:
    """Refuses a text with format fields that would become too large together."""
    widths = [width for pair in asked.findall(text) for width in pair if width]
    if any(not width.isdigit() or len(width) > 8 for width in widths):
        raise LimitError("a text is made too wide")
    if sum(map(int, widths)) > MAX_SIZE:
        raise LimitError("a text is made too wide")


def _refuse_growth(*texts: Any) -> None:
    """Refuses what `join` and `replace` would make too large."""
    size = 1
    for text in texts:
        if isinstance(text, str):
            size *= max(len(text), 1)
        elif isinstance(text, (list, tuple)):
            size *= sum(len(item) for item in text if isinstance(item, str)) + len(text)
    if size > 50 * MAX_SIZE:
        raise LimitError("a text is made too large")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    _refuse_wide(indent)
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
