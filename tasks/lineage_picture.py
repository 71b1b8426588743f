"""A lineage as a picture in a file: SVG, PNG or HTML, by the ending of its name."""

from __future__ import annotations

from pathlib import Path

from regrow.infra.artifacts import Record
from regrow.tasks import lineage
from regrow.tasks.stage import StageError


def draw(record: Record, lookup: lineage.Lookup, file: Path) -> None:
    """Write what `record` was made from into `file`.

    Raises:
        StageError: for another ending, or where the file cannot be written.
    """
    if file.suffix == ".svg":
        content = lineage.drawing(record, lookup).encode()
    elif file.suffix == ".html":
        content = lineage.html(record, lookup).encode()
    elif file.suffix == ".png":
        from regrow.tasks import figures  # matplotlib takes a second to import

        content = figures.boxes_and_lines(lineage.boxes(record, lookup))
    else:
        raise StageError(f"--picture {file}: the name must end in .svg, .png or .html")
    try:
        file.write_bytes(content)
    except OSError as error:
        raise StageError(f"--picture {file}: {error.strerror or error}") from error
