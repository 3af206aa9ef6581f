"""Sizes (``512MiB``) and durations (``250ms``) in YAML and on the command line."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, Field, PlainSerializer

_SIZE_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_DURATION_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_QUANTITY = re.compile(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]*)\s*", re.ASCII)


def parse_size(value: object) -> int:
    """``512MiB`` in bytes.

    Raises:
        ValueError: not a size.
    """
    match = _QUANTITY.fullmatch(str(value)) if not isinstance(value, bool) else None
    if match is None or match[2].upper() not in _SIZE_UNITS:
        raise ValueError(f"{value!r} is not a size; write it like 512MiB")
    return int(float(match[1]) * _SIZE_UNITS[match[2].upper()])


def parse_duration(value: object) -> float:
    """``250ms`` in seconds.

    Raises:
        ValueError: not a duration.
    """
    match = _QUANTITY.fullmatch(str(value)) if not isinstance(value, bool) else None
    if match is None or match[2] not in _DURATION_UNITS:
        raise ValueError(f"{value!r} is not a duration; write it like 250ms")
    return float(match[1]) * _DURATION_UNITS[match[2]]


def parse_period(value: object) -> float | None:
    """``1s`` in seconds; None for ``off``, which YAML takes for a truth value.

    Raises:
        ValueError: neither.
    """
    if value is None or value is False or value == "off":
        return None
    period_s = parse_duration(value)
    if period_s <= 0:
        raise ValueError(f"{value!r} must be longer than nothing; off turns it off")
    return period_s


#: Written in JSON as they are in YAML, so that what one process has read another can read again.
Size = Annotated[int, BeforeValidator(parse_size), PlainSerializer(str, when_used="json"), Field(gt=0)]
_AS_WRITTEN = PlainSerializer(lambda value: "off" if value is None else f"{value:.9f}s", when_used="json")
Duration = Annotated[float, BeforeValidator(parse_duration), _AS_WRITTEN, Field(gt=0)]
Period = Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(parse_period), _AS_WRITTEN]
