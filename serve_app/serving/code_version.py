"""The version of the code, by which processes that run other code are recognized and replaced."""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest() -> str:
    """Return a digest of the source files of the package; takes milliseconds."""
    package = Path(__file__).parents[1]
    content = hashlib.sha256()
    for source in sorted(package.rglob("*.py")):
        content.update(source.read_bytes())
    return content.hexdigest()
