"""The README's file map, from each file's first sentence; `python tests/file_map.py` writes it."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("flows", "tasks", "kernels", "configs", "infra")
BEGIN, END = "<!-- file map: `make reference` writes it -->", "<!-- end of file map -->"


def first_sentence(path: Path) -> str:
    """The first line of a module's docstring, without its full stop."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return text.splitlines()[0].rstrip(".") if text else ""


def file_map() -> str:
    """All source files in a code block, a line each, by folder."""
    lines = []
    for folder in FOLDERS:
        paths = [p for p in sorted((ROOT / folder).rglob("*.py")) if p.name != "__init__.py"]
        # Files of a folder before those of its sub-folders.
        for path in sorted(paths, key=lambda p: (p.parent.parts, p.name)):
            name = path.relative_to(ROOT).as_posix()
            lines.append(f"{name:<40} {first_sentence(path)}")
        lines.append("")
    return "```\n" + "\n".join(lines).rstrip() + "\n```"


def with_file_map(readme: str) -> str:
    """The README's text with the map as it is now."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + "\n" + file_map() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_file_map(path.read_text()))
