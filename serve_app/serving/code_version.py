"""Which code this is, so that what runs on by other code can be told and replaced."""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest() -> str:
    """A digest of the whole package as it lies on the disk; takes milliseconds."""
    package = Path(__file__).parents[1]
    found = hashlib.sha256()
    for source in sorted(package.rglob("*.py")):
        found.update(source.read_bytes())
    return found.hexdigest()
