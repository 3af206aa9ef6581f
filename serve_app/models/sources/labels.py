"""Labels of classes, from a file with one a line."""

from __future__ import annotations

from pathlib import Path

from serve_app.errors import StoreError


def read_labels(path: Path) -> tuple[str, ...]:
    """Read one label a line.

    Raises:
        StoreError: the file cannot be read.
    """
    try:
        return tuple(path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"the labels {path} cannot be read ({error}); name a file with one label a line") from error
