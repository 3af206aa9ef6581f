"""What models cost: read from tables of several origins, and given to the models of a trace."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from serve_app.core.catalog import ModelProfile
from serve_app.errors import TraceError
from serve_app.workload.profiles import DEFAULT_PROFILES, assign, read_profiles

MODELS = tuple(f"f{number}" for number in range(2_000))


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(*lines: str) -> Path:
        path = tmp_path / "models.csv"
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    return write


def test_sizes_are_bytes_or_millions_of_bytes(write: Callable[..., Path]) -> None:
    wanted = (ModelProfile(model_id="a", size_bytes=1_500_000, load_s=0.5, exec_s=0.25),)
    assert read_profiles(write("name,size_bytes,load_s,exec_s", "a,1500000,0.5,0.25")) == wanted
    assert read_profiles(write("exec_s,load_s,size_mb,name,more", "0.25,0.5,1.5,a,x")) == wanted


def test_accuracy_may_be_left_out_of_some_rows(write: Callable[..., Path]) -> None:
    rows = read_profiles(write("name,size_mb,load_s,exec_s,accuracy", "a,1,1,1,0.7", "b,1,1,1,"))
    assert [row.accuracy for row in rows] == [0.7, None]


def test_columns_of_the_keras_measurements_are_known(write: Callable[..., Path]) -> None:
    header = "name,keras_weights_mb,parameters,imagenet_top1,m5_load_s,m5_exec_s,m5_unload_s"
    assert read_profiles(write(header, "VGG16,528,138357544,0.713,4.589,0.4546,0.0142")) == (
        ModelProfile(model_id="VGG16", size_bytes=528_000_000, load_s=4.589, exec_s=0.4546, accuracy=0.713),
    )


def test_the_recorded_keras_measurements_are_read(traces: Path) -> None:
    rows = read_profiles(traces / "keras26_profiles.csv")
    assert len(rows) == 26
    assert max(rows, key=lambda row: row.size_bytes).model_id == "VGG19"


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ((), "models.csv: is empty"),
        (("name,size_mb,load_s,exec_s",), "models.csv: has no models"),
        (("size_mb,load_s,exec_s", "1,1,1"), "line 1: there is no column name"),
        (("name,load_s,exec_s", "a,1,1"), "line 1: there is no column size_bytes or size_mb or keras_weights_mb"),
        (("name,size_mb,exec_s", "a,1,1"), "line 1: there is no column load_s or m5_load_s"),
        (("name,size_mb,size_bytes,load_s,exec_s", "a,1,1,1,1"), "the columns size_bytes and size_mb mean the same"),
        (("name,size_mb,load_s,exec_s", "a,big,1,1"), "line 2, column size_mb (2): 'big' is not a finite number"),
        (("name,size_mb,load_s,exec_s", "a,1,-1,1"), "line 2, column load_s (3): '-1' is not a finite number"),
        (("name,size_mb,load_s,exec_s", "a,1,1,inf"), "line 2, column exec_s (4): 'inf' is not a finite number"),
        (
            ("name,size_bytes,load_s,exec_s", "a,0,1,1"),
            "line 2, column size_bytes (2): '0' is not between 1 byte and 1 PB",
        ),
        (("name,size_mb,load_s,exec_s", "a,1e305,1,1"), "line 2, column size_mb (2): '1e305' is not between 1 byte"),
        (("name,size_mb,load_s,exec_s", "a,1,1,1", "a,2,2,2"), "line 3, column name (1): the same model as in line 2"),
        (("name,size_mb,load_s,exec_s", ",1,1,1"), "line 2, column name (1): is empty"),
        (("name,size_mb,load_s,exec_s,accuracy", "a,1,1,1,71"), "line 2, column accuracy (5): '71' is not from 0 to 1"),
    ],
)
def test_a_mistake_is_named_with_its_place(write: Callable[..., Path], lines: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(TraceError, match=re.escape(complaint)):
        read_profiles(write(*lines))


def test_every_model_has_the_numbers_of_some_row_under_its_own_name() -> None:
    given = assign(MODELS, DEFAULT_PROFILES, seed=1)
    numbers = {(row.size_bytes, row.load_s, row.exec_s, row.accuracy) for row in DEFAULT_PROFILES}
    assert [profile.model_id for profile in given.values()] == list(given) == list(MODELS)
    assert {(row.size_bytes, row.load_s, row.exec_s, row.accuracy) for row in given.values()} == numbers


def test_all_rows_are_given_equally_often() -> None:
    given = Counter(profile.size_bytes for profile in assign(MODELS, DEFAULT_PROFILES, seed=1).values())
    expected = len(MODELS) / len(DEFAULT_PROFILES)
    # 52.6 is the 99.9th percentile with 25 degrees of freedom.
    assert sum((count - expected) ** 2 / expected for count in given.values()) < 52.6


def test_a_models_row_depends_on_the_seed_and_its_name_alone() -> None:
    everything, few = assign(MODELS, DEFAULT_PROFILES, seed=1), assign(MODELS[7:3:-1], DEFAULT_PROFILES, seed=1)
    assert all(everything[model] == profile for model, profile in few.items())
    assert everything != assign(MODELS, DEFAULT_PROFILES, seed=2)


def test_models_that_are_rows_keep_their_numbers() -> None:
    names = tuple(row.model_id for row in DEFAULT_PROFILES[3:6])
    assert tuple(assign(names, DEFAULT_PROFILES, seed=1, keep=True).values()) == DEFAULT_PROFILES[3:6]


def test_models_that_are_no_rows_are_listed() -> None:
    with pytest.raises(TraceError, match="lacks f0, f1, f2, f3, f4 and 1995 more, which the trace asks for"):
        assign(MODELS, DEFAULT_PROFILES, seed=1, keep=True)
    with pytest.raises(TraceError, match="lacks bert, which the trace asks for"):
        assign(("resnet50", "bert"), DEFAULT_PROFILES, seed=1, keep=True)


def test_the_default_table_is_of_real_networks() -> None:
    assert len(DEFAULT_PROFILES) == 26
    by_name = {row.model_id: row for row in DEFAULT_PROFILES}
    # Weights alone: 25.6 million parameters of four bytes.
    assert by_name["resnet50"].size_bytes > 102_000_000
    assert all(row.load_s > 0 and row.exec_s > 0 and row.accuracy for row in DEFAULT_PROFILES)
