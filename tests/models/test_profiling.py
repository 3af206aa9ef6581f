"""``edgeserve profile``: the command and its arithmetic."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from model_support import classify, images, offline

from serve_app.cli.main import main
from serve_app.config.catalog import load_catalog
from serve_app.models.loader import ModelLoader
from serve_app.models.profiling.model_profile import ColdProfile, Profile, Quartiles, as_json, summarize
from serve_app.models.publishing.publish_catalog import publish
from serve_app.store.forms import Refusal
from serve_app.store.manifest import Agreement
from serve_app.store.model_store import ModelStore

pytestmark = pytest.mark.slow

KEYS = {
    "model", "size_bytes", "workspace_bytes", "load_ms", "miss_ms", "hit_ms", "miss_over_hit", "cold_load_ms",
    "cold_miss_ms",
}  # fmt: skip

_TINY = {"builder": "tiny_models:Convolved", "weights": "random:3", "input": {"resize_px": 32, "crop_px": 32}}


@pytest.fixture
def edge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Settings whose catalog has two published models and one that is not."""
    monkeypatch.delenv("EDGESERVE_STORE", raising=False)
    models = {"small": _TINY, "other": _TINY | {"builder": "tiny_models:Tied"}}
    (tmp_path / "catalog.yaml").write_text(yaml.safe_dump({"models": models}, sort_keys=False))
    publish(ModelStore(tmp_path / "store"), load_catalog(tmp_path / "catalog.yaml"), reachable=offline)
    (tmp_path / "catalog.yaml").write_text(yaml.safe_dump({"models": models | {"absent": _TINY}}, sort_keys=False))
    (tmp_path / "edge.yaml").write_text(yaml.safe_dump({"store": "store", "locations": {"paris": {"memory": "64MiB"}}}))
    # The command changes both for its process.
    log, threads = logging.getLogger("serve_app"), torch.get_num_threads()
    level = log.level
    yield tmp_path / "edge.yaml"
    log.setLevel(level)
    torch.set_num_threads(threads)


def run(edge: Path, *arguments: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["profile", "--edge", str(edge), *arguments])
    assert caught.value.code == 0


def fails(edge: Path, capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["profile", "--edge", str(edge), *arguments])
    shown = capsys.readouterr()
    assert (caught.value.code, shown.out) == (code, "")
    assert shown.err.startswith("edgeserve: ")
    assert shown.err.count("\n") == 1
    return shown.err


def test_json_has_the_promised_keys_and_adds_up(edge: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(edge, "small", "--json")
    (row,) = json.loads(capsys.readouterr().out)
    assert row.keys() >= KEYS
    assert row["model"] == "small"
    store = ModelStore(edge.parent / "store")
    assert row["size_bytes"] == store.manifest("small").model.weights_bytes
    assert 0 < row["load_ms"] < row["miss_ms"]
    assert row["hit_ms"] > 0
    low, high = row["miss_over_hit_quartiles"]
    assert low <= row["miss_over_hit"] <= high
    assert row["workspace_bytes"] >= 0
    assert row["cold_load_ms"] is row["cold_miss_ms"] is row["cold_over_bound"] is None


def test_cold_rows_say_how_close_to_the_disk_they_are(edge: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = edge.parent / "rows.json"
    run(edge, "small", "other", "--cold", "--out", str(out))
    rows = json.loads(out.read_text())
    assert [row["model"] for row in rows] == ["small", "other"]
    for row in rows:
        assert 0 < row["cold_load_ms"] < row["cold_miss_ms"]
        assert row["cold_over_bound"] > 0
        assert row["disk_bytes_per_s"] == rows[0]["disk_bytes_per_s"] > 0
    shown = capsys.readouterr()
    for word in ("cold/bound", "geometric mean", "worst", "small", "other"):
        assert word in shown.out
    assert "wrote" in shown.err


def test_unpublished_models_of_the_catalog_are_left_out_with_a_warning(
    edge: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(edge)
    shown = capsys.readouterr()
    assert "left out: absent" in shown.err
    assert "absent" not in shown.out
    assert "small" in shown.out


def test_variants_are_compared_with_the_module_as_it_is_built(edge: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(edge, "small", "--variants", "--json")
    (row,) = json.loads(capsys.readouterr().out)
    assert row["model"] == "small"
    assert all(row[name] > 0 for name in ("eager_ms", "channels_last", "folded", "both", "bfloat16", "two_threads"))
    assert 0 <= row["bfloat16_agreement"] <= 1
    assert row["both_agreement"] == 1
    assert row["images"].endswith("of noise"), "the weights are random"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nobody",), "no model nobody"),
        (("absent",), "edgeserve publish"),
        (("small", "--cold", "--variants"), "choose one"),
        (("small", "--out", "/no/such/folder/rows.json"), "no folder"),
        (("small", "--nonsense"), "--nonsense"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    edge: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    assert words in fails(edge, capsys, 2, *arguments)


def test_broken_weights_are_one_line_and_exit_code_1(edge: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = ModelStore(edge.parent / "store")
    blob = store.blob_path(store.manifest("small").files[0].name)
    blob.chmod(0o644)
    blob.write_bytes(b"short")
    assert "publish it again" in fails(edge, capsys, 1, "small")


@pytest.mark.slow  # tries for two seconds
def test_weights_that_are_mapped_elsewhere_cannot_be_measured_cold(
    edge: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ModelLoader(ModelStore(edge.parent / "store")).load("small")
    classify(model, images(1, 32))
    assert "another process has them mapped" in fails(edge, capsys, 1, "small", "--cold")
    model.unload()


def measured(name: str, ratio: float, cold: ColdProfile | None = None) -> Profile:
    quartiles = Quartiles(median=ratio, low=ratio, high=ratio)
    return Profile(
        model_id=name, form="mapped", precision="float32", agreement=None, is_served=True, is_fastest=True,
        size_bytes=1000, workspace_bytes=1, load_s=0.1, first_s=0.2,
        miss_s=0.3, hit_s=0.25,
        miss_over_hit=quartiles, cpu_miss_over_hit=ratio, rounds=11, cold=cold,
    )  # fmt: skip


def test_summary_is_the_geometric_mean_and_the_worst() -> None:
    summary = summarize([measured("a", 1.0), measured("b", 4.0)])
    assert (summary.miss_over_hit, summary.worst, summary.read_bytes_per_s) == (pytest.approx(2.0), "b", None)
    assert summary.cold_over_bound == {}


def test_cold_bound_is_the_longer_of_hit_and_read_at_the_bandwidth_of_the_whole_run() -> None:
    rows = [
        measured("computes", 1.0, ColdProfile(load_s=0.1, rounds=((3.0, 2.0), (9.0, 6.0)), read_s=0.5)),
        measured("reads", 1.0, ColdProfile(load_s=0.1, rounds=((3.0, 0.1),), read_s=1.5)),
    ]
    summary = summarize(rows)
    assert summary.read_bytes_per_s == pytest.approx(1000)
    assert summary.cold_over_bound == {"computes": pytest.approx(1.5), "reads": pytest.approx(3.0)}
    shown: list[dict[str, Any]] = as_json(rows)
    assert [row["cold_over_bound"] for row in shown] == [1.5, 3.0]


def test_rows_say_what_lets_a_form_in_and_why_there_are_no_others() -> None:
    agreement = Agreement(share=0.995, probes=396, inputs="squares of 9 photographs", criterion="the same best class")
    half = replace(measured("a", 2.0), form="openvino-bfloat16", precision="bfloat16", agreement=agreement)
    published = replace(measured("a", 1.0), is_fastest=False)
    refused = {"a": {"onnxruntime-int8": Refusal(reason="it differs", agreement=replace(agreement, share=0.9))}}
    (row,) = as_json([published, replace(half, is_served=False)], refused)
    assert (row["served"], row["fastest"]) == ("mapped", "openvino-bfloat16")
    assert [(form["precision"], form["agreement"]) for form in row["forms"]] == [
        ("float32", None), ("bfloat16", asdict(agreement)),
    ]  # fmt: skip
    assert row["refused"][0]["reason"] == "it differs"
    assert row["refused"][0]["agreement"]["share"] == 0.9


def test_spread_is_the_median_and_the_quartiles() -> None:
    assert Quartiles.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Quartiles(median=3.0, low=2.0, high=4.0)
