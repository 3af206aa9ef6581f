"""Digests of fetched files."""

from __future__ import annotations

from pathlib import Path

from serve_app.errors import StoreError
from serve_app.store.durable_files import sha256_of


def check_digest(path: Path, expected: str | None, reference: str) -> None:
    """Check that a file has the digest, of which ``expected`` is the start; None: any content is right.

    Raises:
        StoreError: it has another one, or is a folder.
    """
    if expected is None:
        return
    if path.is_dir():
        raise StoreError(f"{reference} is a folder, which has no digest; name a file, or leave #sha256= out")
    require_digest(sha256_of(path), expected, reference)


def require_digest(actual: str, expected: str, reference: str) -> None:
    """Refuse a digest that does not start as expected.

    Raises:
        StoreError: it does not.
    """
    if not actual.startswith(expected):
        raise StoreError(
            f"the content of {reference} has the digest sha256={actual[: max(16, len(expected))]}, not {expected}: it "
            "is another file than the one that the digest was taken of"
        )
