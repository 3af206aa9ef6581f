"""The consoles of all commands, and the files that commands write."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console

from serve_app.errors import EdgeServeError

#: Width where the output is no terminal, so that tables are not broken.
_WIDE = 200


def stdout() -> Console:
    """Make the console for results; it does not highlight or wrap text."""
    return _console(stderr=False)


def stderr() -> Console:
    """Make the console for progress and warnings."""
    return _console(stderr=True)


def warn(text: str) -> None:
    """Print a warning on stderr."""
    stderr().print(f"warning: {text}", style="yellow", markup=False)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Report on stderr that the body has written ``path``.

    Raises:
        EdgeServeError: the body met an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        raise EdgeServeError(f"{path}: cannot be written ({error.strerror or error})") from None
    stderr().print(f"wrote {path}", markup=False)


def check_writable(option: str, path: Path) -> None:
    """Refuse a path that cannot be written, before the run whose results go there.

    Raises:
        click.BadParameter: the file named by ``option`` cannot be written.
    """
    if not path.absolute().parent.is_dir():
        raise click.BadParameter(f"{path}: there is no folder {path.parent}", param_hint=option)
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise click.BadParameter(f"{path}: cannot be written", param_hint=option)


def _console(*, stderr: bool) -> Console:
    # onnx:package:NAME has no emoji in it.
    console = Console(stderr=stderr, highlight=False, soft_wrap=True, emoji=False)
    if console.is_terminal:
        return console
    return Console(stderr=stderr, highlight=False, soft_wrap=True, emoji=False, width=_WIDE)
