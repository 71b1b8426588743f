"""The Markdown on MLflow's pages: what a run or model was made from, and what was made from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

_USED = "**Used by**"
_BREAK = "  \n"  # a new line within a paragraph
_MOST_LINKS = 20  # users named on one page; MLflow cuts a description at 8000 characters

# A page folds its description after about four lines: what people click on comes first.


def link(text: str, page: str) -> str:
    """A link in Markdown."""
    for character in "[]|":
        text = text.replace(character, f"\\{character}")
    return f"[{text}]({page})"


def lines(facts: Mapping[str, str]) -> str:
    """A paragraph with a line for each fact that is there."""
    return _BREAK.join(f"**{name}** {text}" for name, text in facts.items() if text)


def used_by(users: Sequence[str], everything: str = "") -> str:
    """The paragraph that names users, newest first; "" where there is none.

    Args:
        everything: a link to all of them, in case there are many.
    """
    if not users:
        return ""
    shown = [*users[:_MOST_LINKS]]
    if len(users) > len(shown):
        shown.append(f"and {len(users) - len(shown)} more")
    return _BREAK.join([f"{_USED} {everything}".strip(), *shown])


def with_use(description: str, use: str) -> str:
    """The description with its paragraph of users replaced, which is the second."""
    first, *rest = [p for p in description.split("\n\n") if p and not p.startswith(_USED)]
    return "\n\n".join([first, *([use] if use else []), *rest])


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    marks = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, marks, *rows))
