"""Make request streams by name, as ``--trace`` takes them: ``KIND:FILE?key=value&...`` or ``KIND:key=value&...``.

| kind | is | keys |
|---|---|---|
| `azure:FILE` | Azure Functions 2019, per minute | `minutes` (N: the first N, or A-B: those named A to B), |
| | | `max_quantile`, `drop_one_hit`, `trigger`, `seed` |
| `csv:FILE` | columns `arrival_s,model[,location][,user]` | |
| `zipf:` | independent draws | `models`, `exponent`, `rate` (per second), `requests`, `arrivals`, `cv`, |
| | | `locations`, `location_skew`, `seed` |
| `azure-like:` | serverless functions | `functions`, `minutes`, `start_hour`, `rate_cap` (calls per minute), |
| | | `max_quantile`, `drop_one_hit`, `seed` |
| `sessions:` | users of generative models | `days`, `models`, `sessions_per_day`, `users`, `seed` |

A file's name ends at the last question mark.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from serve_app.errors import TraceError
from serve_app.workload.azure import ALL_TRIGGERS, read_azure
from serve_app.workload.azure_like import AzureLike
from serve_app.workload.csv_trace import read_csv
from serve_app.workload.sessions import Sessions
from serve_app.workload.tables import shown
from serve_app.workload.trace import MAX_REQUESTS, Trace
from serve_app.workload.zipf import Arrivals, ZipfWorkload

_Options = dict[str, Any]
_Parser = Callable[[str], Any]
_MOST_NAMES = 1_000_000
_DEFAULT_ZIPF_MODELS = 100
_DEFAULT_ZIPF_REQUESTS = 100_000
_PLAIN_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)


def parse_trace(spec: str, *, seed: int) -> Trace:
    """Make the stream that a specification names; its own ``seed`` overrides the argument.

    Raises:
        TraceError: unknown kind or key, a bad value, or a file that cannot be read.
    """
    kind, colon, rest = spec.partition(":")
    if not colon or kind not in (*_FILES, *_GENERATORS):
        raise TraceError(f"trace {shown(spec)} must begin with one of {_list(_FILES, 'FILE')}, {_list(_GENERATORS)}")
    try:
        if kind in _FILES:
            return _from_file(spec, kind, rest, seed)
        keys, make = _GENERATORS[kind]
        return make(spec, {"seed": seed, **_options(rest.removeprefix("?"), keys)})
    except ValueError as error:
        raise TraceError(f"trace {shown(spec)}: {error}") from None


def _from_file(spec: str, kind: str, rest: str, seed: int) -> Trace:
    file, question, text = rest.rpartition("?")
    if not question:
        file, text = rest, ""
    if not file:
        raise ValueError(f"no file is named; write {kind}:FILE")
    keys, read = _FILES[kind]
    return read(_expand_home(file), spec, {"seed": seed, **_options(text, keys)})


def _expand_home(file: str) -> Path:
    try:
        return Path(file).expanduser()
    except RuntimeError:
        # There is no such user; the reader of the file reports what cannot be read.
        return Path(file)


def _options(text: str, keys: Mapping[str, _Parser]) -> _Options:
    options: _Options = {}
    for part in text.split("&") if text else ():
        key, equals, value = part.partition("=")
        if key not in keys:
            raise ValueError(f"unknown key {shown(key)}; there are {', '.join(keys) or 'none'}")
        if key in options:
            raise ValueError(f"key {key} stands twice")
        try:
            options[key] = keys[key](value)
        except ValueError as error:
            raise ValueError(f"{key} must be {error}, not {shown(value) if equals else 'left out'}") from None
    return options


def _integer(least: int, most: int) -> _Parser:
    def parse(text: str) -> int:
        if not re.fullmatch(r"\d{1,18}", text, re.ASCII) or not least <= int(text) <= most:
            raise ValueError(f"a whole number from {least} to {most}")
        return int(text)

    return parse


def _number(text: str) -> float:
    if not (_PLAIN_NUMBER.fullmatch(text) and math.isfinite(float(text))):
        raise ValueError("a number")
    return float(text)


def _positive(text: str) -> float:
    if not (_PLAIN_NUMBER.fullmatch(text) and 0 < float(text) < math.inf):
        raise ValueError("a positive number")
    return float(text)


def _boolean(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError("true or false")
    return text == "true"


def _one_of(*choices: str) -> _Parser:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return text

    return parse


def _name(text: str) -> str:
    if not text:
        raise ValueError(f"a trigger or {ALL_TRIGGERS}")
    return text


def _minutes(text: str) -> int | tuple[int, int]:
    match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text, re.ASCII)
    if match is None or (match[2] is None and int(match[1]) == 0):
        raise ValueError("N (the first N minutes) or A-B (the minutes named A to B)")
    return (int(match[1]), int(match[2])) if match[2] is not None else int(match[1])


def _azure(path: Path, name: str, options: _Options) -> Trace:
    return read_azure(path, name=name, **options)


def _csv(path: Path, name: str, options: _Options) -> Trace:
    return read_csv(path, name=name)


def _zipf(name: str, options: _Options) -> Trace:
    models = options.pop("models", _DEFAULT_ZIPF_MODELS)
    locations = options.pop("locations", 1)
    requests = options.pop("requests", _DEFAULT_ZIPF_REQUESTS)
    workload = ZipfWorkload(
        models=tuple(f"m{rank}" for rank in range(1, models + 1)),
        locations=tuple(f"loc{number}" for number in range(locations)) if locations > 1 else ("local",),
        rate_per_s=options.pop("rate", 1.0),
        **options,
    )
    return workload.trace(requests, name=name)


def _azure_like(name: str, options: _Options) -> Trace:
    return AzureLike(rate_cap_per_min=options.pop("rate_cap", math.inf), **options).trace(name)


def _sessions(name: str, options: _Options) -> Trace:
    return Sessions(**options).trace(name)


def _list(kinds: Mapping[str, Any], what: str = "") -> str:
    return ", ".join(f"{kind}:{what}" for kind in kinds)


_SEED = {"seed": _integer(0, 2**63)}
_FILTER: dict[str, _Parser] = {"max_quantile": _number, "drop_one_hit": _boolean}
_FILES: dict[str, tuple[dict[str, _Parser], Callable[[Path, str, _Options], Trace]]] = {
    "azure": ({"minutes": _minutes, **_FILTER, "trigger": _name, **_SEED}, _azure),
    "csv": ({}, _csv),
}
_GENERATORS: dict[str, tuple[dict[str, _Parser], Callable[[str, _Options], Trace]]] = {
    "zipf": (
        {
            "models": _integer(1, _MOST_NAMES),
            "exponent": _number,
            "rate": _positive,
            "requests": _integer(1, MAX_REQUESTS),
            "arrivals": _one_of(*get_args(Arrivals)),
            "cv": _positive,
            "locations": _integer(1, _MOST_NAMES),
            "location_skew": _number,
            **_SEED,
        },
        _zipf,
    ),
    "azure-like": (
        {
            "functions": _integer(1, _MOST_NAMES),
            "minutes": _integer(1, 366 * 1440),
            "start_hour": _integer(0, 23),
            "rate_cap": _positive,
            **_FILTER,
            **_SEED,
        },
        _azure_like,
    ),
    "sessions": (
        {
            "days": _integer(1, 3660),
            "models": _integer(1, _MOST_NAMES),
            "sessions_per_day": _positive,
            "users": _integer(1, 2**31),
            **_SEED,
        },
        _sessions,
    ),
}
