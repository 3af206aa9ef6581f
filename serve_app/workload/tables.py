"""Read CSV files, plain or gzipped, strictly: every message names file, line and column."""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NoReturn, cast

from serve_app.errors import TraceError

_GZIP_MAGIC = b"\x1f\x8b"
_SHOWN_CHARACTERS = 40


class Table:
    """The rows of a CSV file under the names of its header.

    Blank lines are skipped, and so are blanks after a comma. The file is read while ``rows`` is iterated.

    Raises:
        TraceError: the file cannot be read, is empty, or its header names a column twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = _records(path)
        first = next(self._lines, None)
        if first is None:
            self.fail("is empty; the first line must name the columns")
        self.header_line, names = first
        self.columns = tuple(name.strip() for name in names)
        for number, name in enumerate(self.columns):
            if name in self.columns[:number]:
                self.fail("has this name for the second time", line=self.header_line, column=number)

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """Yield line number and cells of every row, as many cells as there are columns.

        Raises:
            TraceError: a line has another number of cells, or the file cannot be read to its end.
        """
        for line, cells in self._lines:
            if len(cells) != len(self.columns):
                self.fail(f"has {len(cells)} columns, but the header has {len(self.columns)}", line=line)
            yield line, cells

    def column(self, name: str) -> int:
        """Return the index of the column ``name``, counted from 0.

        Raises:
            TraceError: there is none.
        """
        if name not in self.columns:
            self.fail(f"there is no column {name}; there are {_names(self.columns)}", line=self.header_line)
        return self.columns.index(name)

    def number(self, line: int, cells: list[str], column: int) -> float:
        """Parse a cell as a finite number that is not negative.

        Raises:
            TraceError: the cell is something else.
        """
        text = cells[column]
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        # Digit separators are peculiar to Python.
        if not 0 <= value < math.inf or "_" in text:
            self.fail(f"{shown(text)} is not a finite number that is 0 or more", line=line, column=column)
        return value

    def text(self, line: int, cells: list[str], column: int) -> str:
        """Parse a cell as a name, without blanks around it.

        Raises:
            TraceError: it is empty.
        """
        text = cells[column].strip()
        if not text:
            self.fail("is empty", line=line, column=column)
        return text

    def fail(self, problem: str, *, line: int | None = None, column: int | None = None) -> NoReturn:
        """Raise ``TraceError`` with one sentence that says where the problem is; ``column`` is counted from 0."""
        if column is None:
            fail(self.path, problem, line)
        fail(self.path, f"column {_name(self.columns[column])} ({column + 1}): {problem}", line, separator=", ")


def shown(text: str) -> str:
    """Format a value for a message: quoted, on one line, and not too long."""
    return repr(text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}...")


def _records(path: Path) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(_lines(path), strict=True, skipinitialspace=True)
    try:
        for cells in reader:
            if cells:
                yield reader.line_num, cells
    except csv.Error as error:
        fail(path, f"is not CSV ({error})", max(1, reader.line_num))


def _lines(path: Path) -> Iterator[str]:
    number = 0
    try:
        with path.open("rb") as raw:
            # By its content and without seeking, so that a pipe can be read.
            zipped = raw.peek(2)[:2] == _GZIP_MAGIC
            file = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if zipped else raw
            for number, line in enumerate(file, start=1):
                if b"\0" in line:
                    fail(path, "has a NUL byte; this is not a text file", number)
                # Spreadsheets write a byte order mark at the beginning.
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError:
        fail(path, "is not text in UTF-8", number)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        fail(path, f"the gzip file is damaged or cut off after line {number} ({error})")
    except (OSError, ValueError) as error:
        # A path with a NUL character is a ValueError.
        fail(path, f"cannot be read ({getattr(error, 'strerror', None) or error})")


def fail(path: Path, problem: str, line: int | None = None, separator: str = ": ") -> NoReturn:
    """Raise ``TraceError`` with one sentence on a file."""
    where = _name(str(path)) if line is None else f"{_name(str(path))}, line {line}"
    raise TraceError(f"{where}{separator}{problem}") from None


def _name(text: str) -> str:
    return text if text and text.isprintable() else shown(text)


def _names(names: Sequence[str]) -> str:
    few = [_name(name) for name in names[:12]]
    return ", ".join(few) + (f" and {len(names) - len(few)} more" if len(names) > len(few) else "")
