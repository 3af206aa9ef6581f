"""Configuration is strict: what is wrong is refused with file, key and what would be right; the shipped files are."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.config.catalog import load_catalog
from serve_app.config.default_files import find
from serve_app.config.edge import EdgeSettings, load_edge, load_token
from serve_app.config.environment import STORE_VARIABLE, preset, ray_address, state_dir
from serve_app.config.policy_parameters import parse_parameters
from serve_app.config.units import parse_duration, parse_size
from serve_app.config.yaml_files import load_yaml
from serve_app.core.contract import Axis, ValueRange
from serve_app.core.contract_declaration import TensorDeclaration
from serve_app.core.links import Link
from serve_app.core.task import ImageInput, TaskSpec
from serve_app.errors import ConfigError

DEPLOY = Path(__file__).parents[2] / "deploy"
EDGE = {"locations": {"paris": {"memory": "1GiB"}, "tokyo": {"memory": "512MiB", "workers": 2}}}
MODEL = {"builder": "torchvision:resnet18"}
Write = Callable[[str | dict[str, Any]], Path]


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (STORE_VARIABLE, "RAY_ADDRESS", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes text, or a mapping as YAML, into a file."""

    def write(content: str | dict[str, Any]) -> Path:
        path = tmp_path / "some.yaml"
        path.write_text(
            content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False), encoding="utf-8"
        )
        return path

    return write


def edge(**changed: Any) -> dict[str, Any]:
    return EDGE | changed


def refusal(load: Callable[[Path], object], path: Path) -> str:
    """The error line without the path that it must begin with."""
    with pytest.raises(ConfigError) as caught:
        load(path)
    message = caught.value.message
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert "Value error" not in message
    return message.removeprefix(f"{path}: ")


# Sizes and durations


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("512MiB", 512 * 2**20), ("1GiB", 2**30), ("2TiB", 2 * 2**40), ("3KiB", 3072), ("7B", 7), ("7", 7), (7, 7),
        ("1GB", 10**9), ("1kB", 1000), ("5 MB", 5_000_000), (" 1.5GiB ", 3 * 2**29), ("1gib", 2**30), ("0.5KB", 500),
        ("1TB", 10**12),
    ],
)  # fmt: skip
def test_a_size_is_read_in_bytes(text: object, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    ["", "MiB", "-1MiB", "1 parsec", "1MiB2", "1e9", "0x10", "1,5GiB", "1.GiB", ".5GiB", "٣MiB", None, True, [], "nan",
     "inf", "9" * 400],
)  # fmt: skip
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="is not a size; write it like 512MiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("250ms", 0.25), ("2s", 2.0), ("1.5 min", 90.0), ("10us", 1e-5), ("3h", 10800.0), ("1d", 86400.0), ("0s", 0.0)],
)
def test_a_duration_is_read_in_seconds(text: object, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5", 5, 0.25, "-1s", "1S", "1 m", "s", None, True, "inf", "9" * 400 + "s"])
def test_what_is_no_duration_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="is not a duration; write it like 250ms"):
        parse_duration(text)


# edge.yaml


def test_a_short_edge_file_gets_sensible_defaults(write: Write) -> None:
    settings = load_edge(write(edge()))
    assert settings.locations["paris"].memory == 2**30
    assert settings.locations["paris"].workers == 1
    assert settings.locations["tokyo"].workers == 2
    assert settings.policy.name == "edgeserve"
    assert settings.gateway_location == "paris"
    assert settings.token_file is None
    assert load_token(settings) is None


def test_an_edge_file_is_read_whole(write: Write) -> None:
    settings = load_edge(
        write(
            edge(
                default_location="tokyo",
                links=[{"between": ["paris", "tokyo"], "rtt": "120ms", "bandwidth": "10MB"}],
                default_link={"rtt": "5ms", "bandwidth": "1MB"},
                policy={"name": "edgeserve", "short": "2min", "margin": 3},
                worker={"parallel_loads": 3, "parallel_preloads": 0, "failure_memory": "1s"},
                coordinator={"horizon": "20s"},
                limits={"body": "1MiB", "batch": 4},
            )
        )
    )
    assert settings.gateway_location == "tokyo"
    assert settings.core_links() == {("paris", "tokyo"): Link(rtt_s=0.12, bytes_per_s=10_000_000)}
    assert settings.core_default_link() == Link(rtt_s=0.005, bytes_per_s=1_000_000)
    assert settings.policy.parameters == {"short_s": 120.0, "margin": 3.0}
    worker = settings.worker
    assert (worker.parallel_loads, worker.parallel_preloads, worker.failure_memory) == (3, 0, 1.0)
    assert settings.coordinator.horizon == 20.0
    assert (settings.limits.body, settings.limits.batch) == (2**20, 4)


def test_settings_are_frozen(write: Write) -> None:
    settings = load_edge(write(edge()))
    with pytest.raises(ValueError, match="frozen"):
        settings.default_location = "tokyo"


def test_paths_in_a_file_are_relative_to_its_folder(write: Write, tmp_path: Path) -> None:
    settings = load_edge(write(edge(catalog="models/all.yaml", store="/var/store", token_file="../token")))
    assert settings.catalog == tmp_path / "models/all.yaml"
    assert settings.store == Path("/var/store")
    assert settings.token_file == tmp_path / "../token"
    assert load_edge(write(edge(store="~/store"))).store == Path.home() / "store"


def test_the_store_can_be_moved_by_a_variable(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STORE_VARIABLE, "/elsewhere/store")
    assert load_edge(write(edge())).store == Path("/elsewhere/store")
    monkeypatch.setenv(STORE_VARIABLE, "~/store")
    assert load_edge(write(edge())).store == Path.home() / "store"


@pytest.mark.parametrize(
    ("content", "key", "beside"),
    [
        (edge(memory="1GiB"), "memory", "catalog, store, locations, "),
        ({"locations": {"paris": {"memory": "1GiB", "ram": "1GiB"}}}, "locations.paris.ram", "memory, workers, "),
        ({"locations": {"memory": {"memory": "1GiB", "ram": "1GiB"}}}, "locations.memory.ram", "memory, workers, "),
        (edge(links=[{"between": ["paris", "tokyo"], "rtt": "1ms", "loss": 1}]), "links.0.loss", "between, rtt, "),
        (edge(default_link={"latency": "1ms"}), "default_link.latency", "rtt, bandwidth"),
        (edge(worker={"threads": 1}), "worker.threads", "threads_per_inference, "),
        (edge(limits={"Body": "1MiB"}), "limits.Body", "body, image_pixels, "),
        (edge(coordinator={"half_life": "1s"}), "coordinator.half_life", "report_every, "),
    ],
)
def test_an_unknown_key_is_named_with_those_that_exist(
    write: Write, content: dict[str, Any], key: str, beside: str
) -> None:
    message = refusal(load_edge, write(content))
    assert message.startswith(f"unknown key {key}; there are {beside}")


def test_an_unknown_key_of_a_policy_is_named_with_those_that_exist(write: Write) -> None:
    assert refusal(load_edge, write(edge(policy={"name": "edgeserve", "shorts": "1s"}))) == (
        "policy: unknown key shorts; policy edgeserve takes short, long, margin, review_every"
    )
    assert refusal(load_edge, write(edge(policy={"name": "lru", "short": "1s"}))) == (
        "policy: unknown key short; policy lru takes no parameters"
    )


@pytest.mark.parametrize(
    "written",
    [{"short": "100s", "margin": 1.5}, {"short_s": 100, "margin": "1.5"}, {"short_s": "100.0", "margin": 1.5}],
)
def test_what_is_no_duration_of_a_policy_is_a_number(written: dict[str, Any]) -> None:
    assert parse_parameters("edgeserve", written) == {"short_s": 100.0, "margin": 1.5}


def test_a_policy_that_knows_the_future_cannot_serve(write: Write) -> None:
    assert refusal(load_edge, write(edge(policy={"name": "belady-am"}))) == (
        "policy: policy 'belady-am' knows the future: it exists in edgeserve simulate only; use edgeserve"
    )


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"locations": {}}, "locations: .*at least 1"),
        ({"locations": ["paris"]}, "locations: .*dict"),
        ({"locations": {"paris": {}}}, "key locations.paris.memory is missing"),
        ({"locations": {"paris": None}}, "locations.paris: "),
        ({"locations": {"paris": {"memory": "lots"}}}, "locations.paris.memory: 'lots' is not a size"),
        ({"locations": {"paris": {"memory": "0MiB"}}}, "locations.paris.memory: .*greater than 0"),
        ({"locations": {"paris": {"memory": "1GiB", "workers": "two"}}}, "locations.paris.workers: .*integer"),
        ({"locations": {"paris": {"memory": "1GiB", "workers": 0}}}, "locations.paris.workers: .*greater"),
        ({"locations": {"pa/ris": {"memory": "1GiB"}}}, "location 'pa/ris' must be letters"),
        ({"locations": {"": {"memory": "1GiB"}}}, "location '' must be letters"),
        ({"locations": {"v2": {"memory": "1GiB"}}}, "location 'v2' must be .* none of v1, v2"),
        ({"locations": {"metrics": {"memory": "1GiB"}}}, "location 'metrics' must be"),
        ({"locations": {1: {"memory": "1GiB"}}}, "locations.1"),
        ({"default_location": "rome"}, "unknown location 'rome'; there are paris, tokyo"),
        ({"links": [{"between": ["paris", "rome"], "rtt": "1ms"}]}, "unknown location 'rome'; there are paris, tokyo"),
        ({"links": [{"between": ["paris"], "rtt": "1ms"}]}, "key links.0.between.1 is missing"),
        ({"links": [{"between": ["paris", "tokyo"]}]}, "key links.0.rtt is missing"),
        ({"links": [{"between": ["paris", "paris"], "rtt": "1ms"}]}, "links: paris and paris must be two locations"),
        (
            {"links": [{"between": pair, "rtt": "1ms"} for pair in (["paris", "tokyo"], ["tokyo", "paris"])]},
            "links: tokyo and paris must .* once",
        ),
        ({"default_link": {"rtt": 2}}, "default_link.rtt: 2 is not a duration; write it like 250ms"),
        ({"default_link": {"bandwidth": "0B"}}, "default_link.bandwidth: .*greater than 0"),
        ({"policy": {"name": "lifo"}}, "policy: unknown policy 'lifo'; there are random, "),
        ({"policy": "lru"}, "policy: "),
        ({"policy": {"name": "edgeserve", "short": "soon"}}, "policy: short: 'soon' is not a duration"),
        ({"policy": {"name": "edgeserve", "short": 100}}, "policy: short: 100 is not a duration"),
        ({"policy": {"name": "edgeserve", "short": "0s"}}, "policy: short_s must be positive"),
        ({"policy": {"name": "edgeserve", "short_s": "100s"}}, "policy: short_s: '100s' is not a number"),
        ({"policy": {"name": "edgeserve", "margin": "2s"}}, "policy: margin: '2s' is not a number"),
        ({"policy": {"name": "edgeserve", "margin": True}}, "policy: margin: True is not a number"),
        ({"policy": {"name": "edgeserve", "margin": 0.5}}, "policy: margin must be at least 1"),
        ({"policy": {"name": "edgeserve", "short": "1s", "short_s": 1}}, "policy: short_s stands twice"),
        ({"worker": {"parallel_preloads": -1}}, "worker.parallel_preloads: "),
        ({"coordinator": {"report_every": "0s"}}, "coordinator.report_every: .*greater than 0"),
        ({"coordinator": {"report_every": "3s"}}, "coordinator: stale_after must be longer than report_every"),
        ({"limits": {"batch": 0}}, "limits.batch: "),
        ({"limits": {"request_time": "1 fortnight"}}, "limits.request_time: '1 fortnight' is not a duration"),
        ({"catalog": 5}, "catalog: .*path"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(write: Write, changed: dict[str, Any], says: str) -> None:
    assert_says(refusal(load_edge, write(edge(**changed))), says)


def assert_says(message: str, pattern: str) -> None:
    __tracebackhide__ = True
    assert re.match(pattern, message), f"{message!r} does not begin like {pattern!r}"


# catalog.yaml


def test_a_catalog_becomes_entries_in_its_order(write: Write, tmp_path: Path) -> None:
    path = write(
        {
            "models": {
                "b": MODEL | {"family": "fam", "accuracy": 0.7, "pinned": True},
                "a": MODEL | {"weights": "file:own/w.safetensors", "input": {"resize_px": 64, "crop_px": 32}},
            }
        }
    )
    assert [entry.model_id for entry in load_catalog(path)] == ["b", "a"]
    entries = {entry.model_id: entry for entry in load_catalog(path)}
    assert entries["b"].family == "fam"
    assert entries["b"].accuracy == 0.7
    assert entries["b"].pinned
    assert entries["b"].weights == "pretrained"
    assert entries["a"].weights == f"file:{tmp_path}/own/w.safetensors"
    assert entries["a"].input == ImageInput(resize_px=64, crop_px=32)
    assert entries["b"].input is None


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({}, "key models.m.builder is missing"),
        (MODEL | {"weight": "x"}, "unknown key models.m.weight; there are builder, weights, family"),
        (MODEL | {"input": {"resize": 3}}, "unknown key models.m.input.resize; there are resize_px, crop_px"),
        ({"builder": "resnet18"}, "models.m: builder 'resnet18' must look like 'torchvision:resnet50'"),
        (MODEL | {"weights": "random"}, "models.m: weights 'random' must be"),
        (MODEL | {"weights": "random:-1"}, "models.m: weights 'random:-1' must be"),
        (MODEL | {"accuracy": 76.1}, "models.m.accuracy: .*less than or equal to 1"),
        (MODEL | {"accuracy": float("nan")}, "models.m"),
        (MODEL | {"dtype": "int4"}, "models.m.dtype: .*float32"),
        (MODEL | {"family": "a/b"}, "models.m: family name 'a/b' must be letters"),
        (MODEL | {"family": "m"}, "models.m: family 'm' is the name of a model"),
        (MODEL | {"input": {"resize_px": 0, "crop_px": 1}}, "models.m.input.resize_px: .*greater than 0"),
        (
            MODEL | {"input": {"resize_px": 1, "crop_px": 1, "std": [0, 1, 1]}},
            r"models.m: std must be positive, not \(0.0, 1.0, 1.0\)",
        ),
        (
            MODEL | {"input": {"resize_px": 1, "crop_px": 1, "mean": [0.5]}},
            "models.m: mean and std must have one value",
        ),
        (MODEL | {"pinned": "perhaps"}, "models.m.pinned: .*boolean"),
        (MODEL | {"precision": "int4"}, "models.m.precision: .*float32"),
        (
            MODEL | {"precision": "auto", "dtype": "float32"},
            "models.m: precision is auto, and dtype, its former name, is float32; leave dtype out",
        ),
        (MODEL | {"precision": "bfloat16", "agreement": 0.9}, "models.m: agreement is of forms with lower precision"),
        (MODEL | {"precision": "auto", "agreement": 99}, "models.m.agreement: .*less than or equal to 1"),
        (
            MODEL | {"precision": "auto", "runtime": "torch"},
            "models.m: precision: auto chooses among runtimes; leave runtime: torch out",
        ),
        (
            {"builder": "onnx:m.onnx", "precision": "int8"},
            "models.m: precision: int8 is for modules",
        ),
        (MODEL | {"task": "classify"}, "models.m.task.kind: .*image-classification"),
        (MODEL | {"task": {"kind": "detection", "least": 1}}, "unknown key models.m.task.least; there are kind, image"),
        (MODEL | {"runtime": "tensorflow"}, "models.m.runtime: .*onnxruntime"),
        (MODEL | {"limits": {"batch": "1-4"}}, r"models.m.limits.batch: must be a number, .* or a range, .*'1-4'"),
        (MODEL | {"limits": {"batch": 0}}, "models.m.limits.batch.most: "),
        (
            MODEL | {"inputs": [{"name": "x", "values": "256"}]},
            r"models.m.inputs.0.values: must be a range, such as 0\.\.255, not '256'",
        ),
        (MODEL | {"inputs": [{"name": "x", "values": "3..2"}]}, r"models.m: values .* least <= most, not 3\.\.2"),
        (
            MODEL | {"limits": {"side": {"most": 2, "least": 3}}},
            r"models.m: axis 'side' must have limits .*",
        ),
        (MODEL | {"inputs": [{"name": "x", "shape": [1.5]}]}, "models.m.inputs.0.shape.0: an axis must be .* not 1.5"),
        (MODEL | {"inputs": [{"name": "x", "shape": [0]}]}, "models.m: shape of tensor 'x' must hold positive numbers"),
        (MODEL | {"inputs": [{"name": "x", "datatype": "FLOAT"}]}, "models.m: datatype of tensor 'x' must be one of"),
        ("torchvision:resnet18", "models.m: "),
    ],
)
def test_a_wrong_model_is_named(write: Write, model: Any, says: str) -> None:
    assert_says(refusal(load_catalog, write({"models": {"m": model}})), says)


@pytest.mark.parametrize("model_id", ["", "a b", "a/b", ".hidden", "x" * 129])
def test_a_model_needs_a_name_that_fits_into_an_address(write: Write, model_id: str) -> None:
    assert_says(refusal(load_catalog, write({"models": {model_id: MODEL}})), r"models\..*must be letters")


def test_a_catalog_without_models_is_refused(write: Write) -> None:
    assert_says(refusal(load_catalog, write({"models": {}})), "models: .*at least 1")
    assert_says(refusal(load_catalog, write("")), "must be a mapping with the keys models")


# Files


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("locations: {paris: {memory: 1GiB}}\nlocations: {}\n", "not valid YAML: key 'locations' stands twice"),
        ("locations: {paris: {memory: 1GiB, memory: 2GiB}}\n", "not valid YAML: key 'memory' stands twice"),
        ("locations: [\n", "not valid YAML: "),
        ("a: b: c\n", "not valid YAML: "),
        ("a: *nowhere\n", "not valid YAML: "),
        ("a: !!python/object:os.system {}\n", "not valid YAML: "),
        ("built: 2026-02-30\n", "not valid YAML: "),
        ("---\na: 1\n---\na: 2\n", "not valid YAML: "),
        ("", "must be a mapping with the keys catalog, store, locations"),
        ("- a\n- b\n", "must be a mapping with the keys catalog, store, locations"),
        ("just words\n", "must be a mapping with the keys catalog, store, locations"),
        ("1: 2\n", ""),
    ],
)
def test_a_file_that_holds_no_settings_is_refused(write: Write, text: str, says: str) -> None:
    assert_says(refusal(load_edge, write(text)), says)


def test_merged_keys_stand_once(write: Write) -> None:
    path = write("base: &base {x: 1, y: 2}\nmore: {<<: *base, x: 3}\n")
    assert load_yaml(path) == {"base": {"x": 1, "y": 2}, "more": {"x": 3, "y": 2}}


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image.yaml"
    path.write_bytes(b"\xff\xd8\xff")
    assert refusal(load_yaml, path) == "is not a text file in UTF-8"


# Tokens and the environment


def test_a_token_is_read_without_the_space_around_it(write: Write, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("\n secret \n")
    assert load_token(load_edge(write(edge(token_file="token")))) == "secret"


@pytest.mark.parametrize("content", [None, "", " \n"])
def test_a_missing_or_empty_token_file_is_refused(write: Write, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "token").write_text(content)
    settings = load_edge(write(edge(token_file="token")))
    with pytest.raises(ConfigError, match=f"{tmp_path}/token: "):
        load_token(settings)


def test_what_the_user_has_set_is_never_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESERVE_TEST_SET", "mine")
    monkeypatch.setenv("EDGESERVE_TEST_NOT_SET", "x")
    monkeypatch.delenv("EDGESERVE_TEST_NOT_SET")
    preset({"EDGESERVE_TEST_SET": "yours", "EDGESERVE_TEST_NOT_SET": "default"})
    assert (os.environ["EDGESERVE_TEST_SET"], os.environ["EDGESERVE_TEST_NOT_SET"]) == ("mine", "default")


def test_the_environment_says_where_ray_and_the_state_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert ray_address() is None
    assert state_dir() == Path.home() / ".cache/edgeserve"
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ray_address() == "auto"
    assert state_dir() == tmp_path / "edgeserve"


# The shipped files


def test_the_shipped_settings_are_valid_and_fit_together() -> None:
    settings = load_edge(DEPLOY / "edge.yaml")
    assert list(settings.locations) == ["paris", "tokyo", "virginia"]
    assert settings.catalog == DEPLOY / "catalog.yaml"
    entries = load_catalog(settings.catalog)
    assert len(entries) >= 20
    assert all(entry.family for entry in entries)


def test_the_shipped_serve_file_names_the_locations_of_the_shipped_settings() -> None:
    settings = load_edge(DEPLOY / "edge.yaml")
    applications = load_yaml(DEPLOY / "local.yaml")["applications"]
    served = {app["args"].get("location"): app["route_prefix"] for app in applications}
    assert served == {name: f"/{name}" for name in settings.locations} | {None: "/"}
    for app in applications:
        assert app["name"] == app["args"].get("location", "gateway")
        assert app["import_path"] == "serve_app.serving.app:build"
        assert find(Path(app["args"]["edge"])) == DEPLOY / "edge.yaml"


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_file_is_strict_yaml(path: Path) -> None:
    assert isinstance(load_yaml(path), dict)


@pytest.mark.parametrize(("written", "period_s"), [("off", None), (False, None), ("500ms", 0.5)])
def test_a_period_can_be_off(written: object, period_s: float | None) -> None:
    edge = {"locations": {"paris": {"memory": "1GiB"}}}
    settings = EdgeSettings.model_validate(
        edge | {"coordinator": {"placement_every": written}, "worker": {"idle_unload": written}}
    )
    assert (settings.coordinator.placement_every, settings.worker.idle_unload) == (period_s, period_s)
    with pytest.raises(ValueError, match="off turns it off"):
        EdgeSettings.model_validate(edge | {"coordinator": {"placement_every": "0s"}})


def test_the_defaults_are_valid_settings() -> None:
    """Pydantic does not validate defaults."""
    defaults = EdgeSettings(locations={"paris": {"memory": "1GiB"}})
    for part in ("default_link", "worker", "coordinator", "limits"):
        for key, value in getattr(defaults, part).model_dump().items():
            if (part, key) == ("worker", "idle_unload"):
                assert value is None
                continue
            if not isinstance(value, bool):
                assert isinstance(value, int | float), (part, key)
                assert value > 0, (part, key)
    assert defaults.coordinator.stale_after > 2 * defaults.coordinator.report_every


def test_settings_survive_json_whatever_their_units() -> None:
    written = EdgeSettings.model_validate(
        {
            "locations": {"paris": {"memory": "1.5GiB"}, "tokyo": {"memory": "1GB"}},
            "links": [{"between": ["paris", "tokyo"], "rtt": "1us", "bandwidth": "1MB"}],
            "policy": {"name": "edgeserve", "short": "100s", "margin": 3},
            "worker": {"failure_memory": "0.1ms"},
            "coordinator": {"placement_every": "off", "horizon": "90min"},
        }
    )
    for settings in (written, EdgeSettings.model_validate({"locations": {"paris": {"memory": "1GiB"}}})):
        assert EdgeSettings.model_validate(json.loads(json.dumps(settings.model_dump(mode="json")))) == settings


def test_a_model_declares_its_tensors_limits_and_task(tmp_path: Path) -> None:
    model = MODEL | {
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": ["batch", 3, "side", -1], "default": 0},
            {"name": "ids", "datatype": "INT32", "shape": ["batch"], "values": "0..256"},
            {"name": "gain", "datatype": "FP32", "shape": [], "values": {"least": -0.5, "most": 2}},
        ],
        "limits": {"batch": 8, "side": "32..512", "x_3": {"most": 64, "multiple": 8}},
        "task": "tensors",
        "precision": "bfloat16",
    }
    catalog = tmp_path / "catalog.yaml"
    catalog.write_text(yaml.safe_dump({"models": {"m": model}}))
    (entry,) = load_catalog(catalog)
    assert entry.inputs == (
        TensorDeclaration(name="x", datatype="FP32", shape=("batch", 3, "side", -1), default=0.0),
        TensorDeclaration(name="ids", datatype="INT32", shape=("batch",), values=ValueRange(least=0, most=256)),
        TensorDeclaration(name="gain", datatype="FP32", shape=(), values=ValueRange(least=-0.5, most=2)),
    )
    assert entry.limits == (
        Axis(name="batch", most=8),
        Axis(name="side", least=32, most=512),
        Axis(name="x_3", most=64, multiple=8),
    )
    assert entry.task == TaskSpec(kind="tensors")
    assert (entry.dtype, entry.lowered) == ("bfloat16", "no")


@pytest.mark.parametrize(
    ("given", "means"),
    [
        ({}, ("float32", "no", 0.99)),
        ({"dtype": "bfloat16"}, ("bfloat16", "no", 0.99)),
        ({"precision": "auto"}, ("float32", "auto", 0.99)),
        ({"dtype": "auto", "precision": "auto", "agreement": 0.97}, ("float32", "auto", 0.97)),
        ({"precision": "int8"}, ("float32", "int8", 0.99)),
    ],
    ids=str,
)
def test_precision_says_what_is_published_and_what_forms_may_have(
    tmp_path: Path, given: dict[str, object], means: tuple[str, str, float]
) -> None:
    catalog = tmp_path / "catalog.yaml"
    catalog.write_text(yaml.safe_dump({"models": {"m": MODEL | given}}))
    (entry,) = load_catalog(catalog)
    assert (entry.dtype, entry.lowered, entry.agreement) == means


def test_builders_of_files_are_relative_to_the_catalog_and_names_are_not(write: Write, tmp_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    models = {
        "program": {"builder": "export:unet.pt2"},
        "folder": {"builder": "transformers:bert"},
        "hub": {"builder": "transformers:prajjwal1/bert-tiny"},
        "own": {"builder": "package.module:factory", "example": "package.module:inputs"},
    }
    entries = {entry.model_id: entry for entry in load_catalog(write({"models": models}))}
    assert entries["program"].builder == f"export:{tmp_path / 'unet.pt2'}"
    assert entries["folder"].builder == f"transformers:{tmp_path / 'bert'}"
    assert entries["hub"].builder == "transformers:prajjwal1/bert-tiny"
    assert entries["own"].example == "package.module:inputs"


def test_an_example_must_be_a_function(write: Write) -> None:
    models = {"own": {"builder": "package.module:factory", "example": "inputs.npz"}}
    with pytest.raises(ConfigError, match=r"must name a function: package\.module:function"):
        load_catalog(write({"models": models}))
