"""Streams by name: every kind can be named, and a mistake in a name is reported in one line."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from trace_statistics import counts

from serve_app.errors import TraceError
from serve_app.workload.azure import read_azure
from serve_app.workload.azure_like import AzureLike
from serve_app.workload.csv_trace import read_csv
from serve_app.workload.sessions import Sessions
from serve_app.workload.spec import parse_trace
from serve_app.workload.trace import column
from serve_app.workload.zipf import ZipfWorkload


@pytest.fixture
def azure(tmp_path: Path) -> Path:
    path = tmp_path / "day?1.csv"
    calls = [f"o{n % 3},a,f{n},{'http' if n % 2 else 'timer'},{n % 5},{n % 7},{n}" for n in range(40)]
    path.write_text("\n".join(["HashOwner,HashApp,HashFunction,Trigger,1,2,3", *calls]), encoding="utf-8")
    return path


def test_a_file_may_have_options(azure: Path) -> None:
    spec = f"azure:{azure}?minutes=2-3&max_quantile=0.8&drop_one_hit=false&trigger=http"
    wanted = read_azure(azure, seed=5, minutes=(2, 3), max_quantile=0.8, drop_one_hit=False, trigger="http", name=spec)
    assert parse_trace(spec, seed=5) == wanted
    assert parse_trace(f"azure:{azure}?minutes=2", seed=5).arrival_s[-1] < 120
    # The file's own name has a question mark: the last one ends it.
    assert parse_trace(f"azure:{azure}?", seed=5) == read_azure(azure, seed=5, name=f"azure:{azure}?")


def test_a_csv_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "stream.csv"
    path.write_text("arrival_s,model\n1,a\n2,b\n", encoding="utf-8")
    assert parse_trace(f"csv:{path}", seed=1) == read_csv(path, name=f"csv:{path}")


def test_keys_of_the_generators_are_their_parameters() -> None:
    spec = "azure-like:functions=60&minutes=90&start_hour=3&rate_cap=50&max_quantile=1&drop_one_hit=false"
    wanted = AzureLike(
        functions=60, minutes=90, start_hour=3, rate_cap_per_min=50, max_quantile=1, drop_one_hit=False, seed=2
    )
    assert parse_trace(spec, seed=2) == wanted.trace(spec)
    spec = "sessions:?days=2&models=30&sessions_per_day=40.5&users=9"
    assert parse_trace(spec, seed=2) == Sessions(
        days=2, models=30, sessions_per_day=40.5, users=9, seed=2
    ).trace(spec)  # fmt: skip
    spec = "zipf:models=20&exponent=1.3&rate=7&requests=500&arrivals=gamma&cv=2&locations=3&location_skew=0.4"
    workload = ZipfWorkload(
        models=tuple(f"m{rank}" for rank in range(1, 21)), locations=("loc0", "loc1", "loc2"), exponent=1.3,
        rate_per_s=7, arrivals="gamma", cv=2, location_skew=0.4, seed=2,
    )  # fmt: skip
    assert parse_trace(spec, seed=2) == workload.trace(500, name=spec)


def test_without_keys_generators_have_their_defaults() -> None:
    assert parse_trace("sessions:", seed=2) == Sessions(seed=2).trace("sessions:")
    assert parse_trace("azure-like:", seed=2) == AzureLike(seed=2).trace("azure-like:")
    zipf = parse_trace("zipf:", seed=2)
    assert (len(zipf), zipf.locations, zipf.location) == (100_000, ("local",), None)
    assert counts(zipf)[0] / counts(zipf)[9] == pytest.approx(10, rel=0.1)
    assert np.diff(column(zipf.arrival_s)).mean() == pytest.approx(1, abs=0.02)


def test_the_seed_in_the_name_overrides_the_argument() -> None:
    for kind in ("sessions:days=1", "azure-like:functions=40&minutes=60", "zipf:requests=50"):
        fixed, other = (parse_trace(f"{kind}&seed=3", seed=seed) for seed in (1, 2))
        assert fixed == other
        assert fixed.model == parse_trace(kind, seed=3).model
        assert fixed.model != parse_trace(kind, seed=1).model


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("", "trace '' must begin with one of azure:FILE, csv:FILE, zipf:, azure-like:, sessions:"),
        ("zipf", "trace 'zipf' must begin with one of"),
        ("Zipf:", "trace 'Zipf:' must begin with one of"),
        ("trace.csv", "trace 'trace.csv' must begin with one of"),
        ("azure:", "trace 'azure:': no file is named; write azure:FILE"),
        ("csv:?", "no file is named; write csv:FILE"),
        ("csv:absent.csv", "absent.csv: cannot be read (No such file or directory)"),
        ("csv:~nobody-of-that-name/a.csv", "~nobody-of-that-name/a.csv: cannot be read"),
        ("csv:a.csv?minutes=3", "unknown key 'minutes'; there are none"),
        ("azure:a.csv?minute=3", "unknown key 'minute'; there are minutes, max_quantile, drop_one_hit, trigger, seed"),
        ("azure:a.csv?minutes=0", "minutes must be N (the first N minutes) or A-B (the minutes named A to B), not '0'"),
        ("azure:a.csv?minutes=1-", "minutes must be N (the first"),
        ("azure:a.csv?trigger=", "trigger must be a trigger or all, not ''"),
        ("azure:a.csv?drop_one_hit=yes", "drop_one_hit must be true or false, not 'yes'"),
        ("azure:a.csv?max_quantile=1.1", "max_quantile must be above 0 and at most 1, not 1.1"),
        ("zipf:model=3", "unknown key 'model'; there are models, exponent, rate, requests, arrivals, cv,"),
        ("zipf:models", "models must be a whole number from 1 to 1000000, not left out"),
        ("zipf:models=3&models=4", "key models stands twice"),
        ("zipf:models=3&", "unknown key ''"),
        ("zipf:models=0", "models must be a whole number from 1 to 1000000, not '0'"),
        ("zipf:models=1_0", "models must be a whole number"),
        ("zipf:requests=99999999999999999999", "requests must be a whole number from 1 to 100000000, not"),
        ("zipf:rate=0", "rate must be a positive number, not '0'"),
        ("zipf:rate=nan", "rate must be a positive number, not 'nan'"),
        ("zipf:rate=1e999", "rate must be a positive number, not '1e999'"),
        ("zipf:exponent=-1", "exponent must be finite and not negative, not -1.0"),
        ("zipf:exponent=inf", "exponent must be a number, not 'inf'"),
        ("zipf:exponent=1\n", r"exponent must be a number, not '1\n'"),
        ("zipf:cv=1e-200", "cv must be from 0.001 to 100, not 1e-200"),
        ("zipf:arrivals=late", "arrivals must be one of even, poisson, gamma, not 'late'"),
        ("zipf:seed=-1", "seed must be a whole number from 0 to"),
        ("azure-like:start_hour=24", "start_hour must be a whole number from 0 to 23, not '24'"),
        ("azure-like:rate_cap=none", "rate_cap must be a positive number, not 'none'"),
        ("azure-like:functions=1&minutes=1&seed=1", "no function is left"),
        ("sessions:days=0", "days must be a whole number from 1 to 3660, not '0'"),
        ("sessions:sessions_per_day=1e300", "more than 100000000 requests"),
    ],
)
def test_a_mistake_is_reported_in_one_line(spec: str, complaint: str) -> None:
    with pytest.raises(TraceError, match=re.escape(complaint)) as caught:
        parse_trace(spec, seed=0)
    assert "\n" not in str(caught.value)


def test_arrivals_that_are_never_reached_are_refused() -> None:
    with pytest.raises(TraceError, match="arrival_s must be finite"):
        parse_trace("zipf:requests=10&arrivals=even&rate=1e-320", seed=0)
    assert math.isfinite(parse_trace("zipf:requests=10&rate=1e-300", seed=0).arrival_s[-1])
