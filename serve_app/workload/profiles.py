"""Profiles of models (size, load time, execution time) for streams that only name the models.

A table is a CSV file with the columns ``name``, ``size_bytes`` or ``size_mb`` (10^6 bytes), ``load_s``, ``exec_s`` and,
if wanted, ``accuracy`` (0..1); others are ignored. ``keras_weights_mb``, ``m5_load_s``, ``m5_exec_s`` and
``imagenet_top1`` mean the same.

``default_profiles.csv`` has the 26 torchvision models of the catalog as ``edgeserve publish`` measured them on two
cores of an x86-64 machine with torch on the CPU. Sizes are weights and the workspace of one inference.

``default_forms.csv`` has the forms of 27 models, see ``read_forms``: as published, and compiled for ONNX Runtime, by
``edgeserve publish``, without workspace; those of OpenVINO were measured in turns with eager executions, and scaled by
these.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from serve_app.core.catalog import ModelProfile
from serve_app.errors import TraceError
from serve_app.workload.tables import Table, shown

_MB = 10**6
_LARGEST_BYTES = 10**15
_LONGEST_S = 86_400.0
_SIZE_BYTES, _SIZE_MB = ("size_bytes",), ("size_mb", "keras_weights_mb")
_LOAD_S, _EXEC_S = ("load_s", "m5_load_s"), ("exec_s", "m5_exec_s")
_ACCURACY = ("accuracy", "imagenet_top1")
_SHOWN_NAMES = 5

_Row = TypeVar("_Row")


@dataclass(frozen=True, slots=True, kw_only=True)
class FormProfile:
    """What a model costs in one of its forms, see ``core/forms.py``."""

    form: str
    profile: ModelProfile

    @property
    def model_id(self) -> str:
        """The name of the model."""
        return self.profile.model_id


def read_profiles(path: Path) -> tuple[ModelProfile, ...]:
    """Read the rows of a table, with the names of the rows as ``model_id``.

    Raises:
        TraceError: the file cannot be read, is malformed, names a model twice, or has no rows.
    """
    return tuple(form.profile for form in _rows(Table(path), form_at=None))


def read_forms(path: Path) -> tuple[tuple[FormProfile, ...], ...]:
    """Read a table that has, in the column ``form``, the name of one form of a model in each row.

    Returns:
        the forms of each model; the first is the model as it was published.

    Raises:
        TraceError: the file cannot be read, is malformed, names a form of a model twice, or has no rows.
    """
    table = Table(path)
    forms: dict[str, list[FormProfile]] = {}
    for form in _rows(table, form_at=table.column("form")):
        forms.setdefault(form.model_id, []).append(form)
    return tuple(map(tuple, forms.values()))


def _rows(table: Table, form_at: int | None) -> list[FormProfile]:
    name_at, load_at, exec_at = table.column("name"), _one_of(table, _LOAD_S), _one_of(table, _EXEC_S)
    size_at = _one_of(table, _SIZE_BYTES + _SIZE_MB)
    unit = 1 if table.columns[size_at] in _SIZE_BYTES else _MB
    accuracy_at = _one_of(table, _ACCURACY) if set(_ACCURACY) & set(table.columns) else None
    line_of: dict[tuple[str, str], int] = {}
    forms = []
    for line, cells in table.rows():
        name = table.text(line, cells, name_at)
        form = "" if form_at is None else table.text(line, cells, form_at)
        if (name, form) in line_of:
            table.fail(f"the same model as in line {line_of[name, form]}", line=line, column=name_at)
        line_of[name, form] = line
        size_bytes = table.number(line, cells, size_at) * unit
        if not 1 <= size_bytes <= _LARGEST_BYTES:
            table.fail(f"{shown(cells[size_at])} is not between 1 byte and 1 PB", line=line, column=size_at)
        profile = ModelProfile(
            model_id=name,
            size_bytes=round(size_bytes),
            load_s=_seconds(table, line, cells, load_at),
            exec_s=_seconds(table, line, cells, exec_at),
            accuracy=_accuracy(table, line, cells, accuracy_at),
        )
        forms.append(FormProfile(form=form, profile=profile))
    if not forms:
        table.fail("has no models")
    return forms


def assign(
    models: Iterable[str], rows: Sequence[ModelProfile], *, seed: int, keep: bool = False
) -> dict[str, ModelProfile]:
    """Assign a profile to every model of a trace, under the model's own name.

    Args:
        models: of the trace.
        rows: of the table, at least one.
        seed: every model has the numbers of a random row, which depends on the seed, its name and the rows alone.
        keep: the models are rows of the table.

    Raises:
        TraceError: with ``keep``, the table does not have all of the models.
    """
    if keep:
        return _by_name(tuple(models), {row.model_id: row for row in rows})
    return {model: _renamed(_random_row(model, rows, seed), model) for model in models}


def assign_forms(
    models: Iterable[str], rows: Sequence[tuple[FormProfile, ...]], *, seed: int, keep: bool = False
) -> dict[str, tuple[FormProfile, ...]]:
    """Assign the forms of a model of the table to every model of a trace; as ``assign`` does."""
    if keep:
        return _by_name(tuple(models), {row[0].model_id: row for row in rows})
    return {
        model: tuple(
            FormProfile(form=form.form, profile=_renamed(form.profile, model))
            for form in _random_row(model, rows, seed)
        )
        for model in models
    }


def _one_of(table: Table, names: Sequence[str]) -> int:
    there = [name for name in names if name in table.columns]
    if not there:
        table.fail(f"there is no column {' or '.join(names)}", line=table.header_line)
    if len(there) > 1:
        table.fail(f"the columns {' and '.join(there)} mean the same; leave one", line=table.header_line)
    return table.columns.index(there[0])


def _seconds(table: Table, line: int, cells: list[str], place: int) -> float:
    seconds = table.number(line, cells, place)
    if seconds > _LONGEST_S:
        table.fail(f"{shown(cells[place])} is more than a day in seconds", line=line, column=place)
    return seconds


def _accuracy(table: Table, line: int, cells: list[str], place: int | None) -> float | None:
    if place is None or not cells[place].strip():
        return None
    accuracy = table.number(line, cells, place)
    if accuracy > 1:
        table.fail(f"{shown(cells[place])} is not from 0 to 1", line=line, column=place)
    return accuracy


def _by_name(models: tuple[str, ...], row_of: Mapping[str, _Row]) -> dict[str, _Row]:
    missing = [model for model in models if model not in row_of]
    if missing:
        some = ", ".join(missing[:_SHOWN_NAMES])
        more = f" and {len(missing) - _SHOWN_NAMES} more" if len(missing) > _SHOWN_NAMES else ""
        raise TraceError(f"the table of models lacks {some}{more}, which the trace asks for")
    return {model: row_of[model] for model in models}


def _random_row(model: str, rows: Sequence[_Row], seed: int) -> _Row:
    return rows[int(random.Random(f"{seed}: profile of {model}").random() * len(rows))]


def _renamed(row: ModelProfile, model: str) -> ModelProfile:
    return ModelProfile(
        model_id=model, size_bytes=row.size_bytes, load_s=row.load_s, exec_s=row.exec_s, accuracy=row.accuracy
    )


#: Used where the user names no table.
DEFAULT_PROFILES: Final = read_profiles(Path(__file__).with_name("default_profiles.csv"))
#: The same for forms.
DEFAULT_FORMS: Final = Path(__file__).with_name("default_forms.csv")
