"""What the commands that measure and simulate share: consoles, and files that they write."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console

from serve_app.errors import EdgeServeError

#: Where no terminal says how wide it is, a table is not broken.
_WIDE = 200


def stdout() -> Console:
    """For results; a console that leaves the text as it is."""
    return _console(stderr=False)


def stderr() -> Console:
    """For progress and warnings."""
    return _console(stderr=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says on stderr that the file is written, or why it cannot be.

    Raises:
        EdgeServeError: the body met an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        raise EdgeServeError(f"{path}: cannot be written ({error.strerror or error})") from None
    stderr().print(f"wrote {path}", markup=False)


def check_writable(option: str, path: Path) -> None:
    """Says before a long run what would come to light only after it.

    Raises:
        click.BadParameter: the file named by ``option`` cannot be written.
    """
    if not path.absolute().parent.is_dir():
        raise click.BadParameter(f"{path}: there is no folder {path.parent}", param_hint=option)
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise click.BadParameter(f"{path}: cannot be written", param_hint=option)


def _console(*, stderr: bool) -> Console:
    made = Console(stderr=stderr, highlight=False, soft_wrap=True)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, soft_wrap=True, width=_WIDE)
