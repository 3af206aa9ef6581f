"""Parameters of an eviction policy as a user writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from serve_app.config.units import parse_duration
from serve_app.core.policies.registry import policy_parameters

_NUMBER = re.compile(r"-?\d{1,15}(?:\.\d{1,15})?", re.ASCII)


def parse_parameters(policy: str, written: Mapping[str, object]) -> dict[str, float]:
    """Parse the parameters of a policy for ``make_policy``.

    A parameter that ends in ``_s`` is a duration: ``short: 100s`` as a user writes it, or ``short_s: 100`` as in code.
    All others are numbers.

    Raises:
        ValueError: no such policy or parameter, or a bad value.
    """
    accepted = {parameter.removesuffix("_s"): parameter for parameter in policy_parameters(policy)}
    parameters: dict[str, float] = {}
    for key, value in written.items():
        in_code = key if key in accepted.values() else accepted.get(key)
        if in_code is None:
            raise ValueError(f"unknown key {key}; policy {policy} takes {', '.join(accepted) or 'no parameters'}")
        if in_code in parameters:
            raise ValueError(f"{key} stands twice")
        try:
            parameters[in_code] = parse_duration(value) if in_code != key else _parse_number(value)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    return parameters


def _parse_number(value: object) -> float:
    if isinstance(value, bool) or not _NUMBER.fullmatch(str(value)):
        raise ValueError(f"{value!r} is not a number")
    return float(str(value))
