import contextlib
import http.server
import json
import multiprocessing
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import publisher_process
import pytest
import torch
from model_support import VISION, check_content, classify, images, offline, tiny, vision
from publisher_process import ENTRIES

from serve_app.core.contract import TensorSpec
from serve_app.core.task import ImageInput
from serve_app.errors import DownloadFailed
from serve_app.models.builders.registry import build, metadata
from serve_app.models.loader import ModelLoader
from serve_app.models.profiling import measure
from serve_app.models.publishing.publish_catalog import PublishEvent, publish
from serve_app.models.sources.download_cache import OnBytes, ignore_bytes
from serve_app.models.sources.fetcher import Fetcher
from serve_app.models.sources.pretrained import Pretrained, WeightSource
from serve_app.models.sources.probe import url_reachable
from serve_app.models.torchvision_compat import import_torchvision
from serve_app.store.model_store import ModelStore

pytestmark = pytest.mark.slow

models = import_torchvision().models
#: Forks processes from one that has imported torch, which takes longer than all they do.
FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(["serve_app.models.publishing.publish_catalog"])


def start_publisher(store: ModelStore, model_id: str = "-", moment: str = "-") -> BaseProcess:
    process = FORK_SERVER.Process(target=publisher_process.main, args=(store.root, model_id, moment))
    process.start()
    return process


def never(url: str) -> bool:
    raise AssertionError(f"{url} must not be asked for")


def test_published_model_describes_itself(shared: ModelStore) -> None:
    manifest = shared.manifest("mobilenet_v3_small")
    model, profile = manifest.model, manifest.model.profile
    assert model.inputs == (TensorSpec(name="input", datatype="FP32", shape=(-1, 3, 224, 224)),)
    assert model.outputs == (TensorSpec(name="logits", datatype="FP32", shape=(-1, 1000)),)
    assert len(model.labels) == 1000
    assert profile.accuracy == 0.67668
    assert 10_000_000 < model.weights_bytes < 10_400_000
    assert profile.size_bytes == model.weights_bytes
    assert 1_000_000 < model.workspace_bytes < 5_000_000
    assert 0 < profile.load_s < profile.exec_s
    assert not model.fallback


def test_progress_names_every_step_in_order(store: ModelStore) -> None:
    events: list[PublishEvent] = []
    publish(store, ENTRIES[:2], on_progress=events.append, reachable=offline)
    stages = ["building", "writing", "verifying", "measuring", "published"]
    assert [(event.model_id, event.stage) for event in events] == [
        (name, stage) for name in ("first", "second") for stage in stages
    ]
    assert {(event.index, event.total) for event in events} == {(0, 2), (1, 2)}
    assert events[-1].bytes == store.manifest("second").model.weights_bytes
    events.clear()
    report = publish(store, ENTRIES[:2], on_progress=events.append, reachable=never)
    assert [event.stage for event in events] == ["skipped", "skipped"]
    assert (report.published, report.skipped, report.warning) == ((), ("first", "second"), None)


def test_store_with_nothing_to_do_is_only_read(store: ModelStore) -> None:
    publish(store, ENTRIES, reachable=offline)
    with ModelStore(store.root).exclusive():  # a lock of another instance would make a second writer wait
        assert publish(store, ENTRIES, reachable=never).skipped == ("first", "second", "third")


@pytest.mark.parametrize("moment", ["building", "half-written", "verifying", "measuring", "published"])
def test_publisher_killed_at_any_moment_is_resumed_by_the_next(store: ModelStore, moment: str) -> None:
    process = start_publisher(store, "second", moment)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert store.published() == (("first", "second") if moment == "published" else ("first",))
    check_content(store, "first")
    if moment == "half-written":
        assert list((store.root / "tmp").iterdir())
    (first,) = store.manifest_keys("first")
    committed = store.manifest_path(first).stat().st_mtime_ns
    report = publish(store, ENTRIES, reachable=offline)
    assert report.published == ENTRIES_AFTER[moment]
    assert store.manifest_path(first).stat().st_mtime_ns == committed
    for entry in ENTRIES:
        check_content(store, entry.model_id)
    assert len(list((store.root / "blobs").iterdir())) == len(ENTRIES)


ENTRIES_AFTER = dict.fromkeys(["building", "half-written", "verifying", "measuring"], ("second", "third")) | {
    "published": ("third",)
}


def test_concurrent_publishers_do_not_disturb_each_other(store: ModelStore) -> None:
    processes = [start_publisher(store), start_publisher(store)]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    for entry in ENTRIES:
        check_content(store, entry.model_id)
    assert len(list((store.root / "blobs").iterdir())) == len(ENTRIES)


@pytest.mark.parametrize(
    ("factory", "complaint"),
    [
        ("PlainTensor", r"keeps the tensor 'table' as a plain attribute.*register_buffer"),
        ("HiddenState", "differs from the built one"),
        ("Tuple", "is not a classifier"),
        ("NotFinite", "not finite"),
        ("broken", "OSError: the factory's own file is missing"),
        ("not_a_module", "returned a int"),
    ],
)
def test_model_that_cannot_be_served_is_reported_and_the_others_are_published(
    store: ModelStore, factory: str, complaint: str
) -> None:
    report = publish(store, [tiny("odd", factory), tiny("tied")], reachable=offline)
    assert report.published == ("tied",)
    assert [failure.model_id for failure in report.failures] == ["odd"]
    assert re.search(complaint, report.failures[0].message)
    assert not store.has("odd")
    assert len(list((store.root / "blobs").iterdir())) == 1, "weights of the failed model must be swept"


def test_last_bits_of_very_large_logits_do_not_keep_a_model_from_being_published(store: ModelStore) -> None:
    assert publish(store, [tiny("large", "LastBits")], reachable=offline).published == ("large",)


def test_constructor_that_reads_values_is_served(store: ModelStore) -> None:
    assert publish(store, [tiny("reads", "ReadsValues")], reachable=offline).published == ("reads",)
    model = ModelLoader(store).load("reads")
    with torch.inference_mode():
        expected = build(tiny("reads", "ReadsValues"), "random:3")(torch.from_numpy(images(1, 32))).numpy()
    np.testing.assert_allclose(classify(model, images(1, 32)), expected, atol=1e-6)
    model.unload()


def test_changed_weights_builder_or_crop_are_published_again(store: ModelStore) -> None:
    publish(store, [tiny("tied")], reachable=offline)
    blobs = set((store.root / "blobs").iterdir())
    assert publish(store, [tiny("tied", family="toys", accuracy=0.5)], reachable=never).skipped == ("tied",)
    assert publish(store, [tiny("tied", weights="random:4")], reachable=offline).published == ("tied",)
    assert blobs < set((store.root / "blobs").iterdir()), "who else has published them may serve them"
    assert publish(store, [tiny("tied", "ReadsValues", "random:4")], reachable=offline).published == ("tied",)


def test_model_of_an_older_format_is_left_out_until_it_is_published_again(store: ModelStore) -> None:
    publish(store, [tiny("tied")], reachable=offline)
    path = store.manifest_path(store.manifest_keys("tied")[0])
    older = json.loads(path.read_bytes()) | {"format": 1}
    del older["execution"]
    path.write_text(json.dumps(older))
    assert "tied" not in store.catalog([tiny("tied")])
    assert publish(store, [tiny("tied")], reachable=never).published == ("tied",)
    assert "tied" in store.catalog([tiny("tied")])


def test_input_of_the_entry_decides_the_shape(store: ModelStore) -> None:
    small = ImageInput(resize_px=64, crop_px=64)
    publish(store, [vision("squeezenet1_1", input=small)], reachable=offline)
    assert store.manifest("squeezenet1_1").model.inputs[0].shape == (-1, 3, 64, 64)
    entry = vision("squeezenet1_1")
    assert "squeezenet1_1" not in store.catalog([entry])
    publish(store, [entry], reachable=offline)
    assert store.catalog([entry])["squeezenet1_1"].task.image == metadata(entry).task.image


PRETRAINED = [vision("squeezenet1_1", "pretrained"), vision("shufflenet_v2_x0_5", "pretrained")]


@pytest.mark.usefixtures("hub")
def test_unreachable_weights_fall_back_loudly_after_one_probe(
    store: ModelStore, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[str] = []
    report = publish(store, PRETRAINED, reachable=lambda url: bool(asked.append(url)))
    assert len(asked) == 1
    assert report.fallbacks == report.published == ("squeezenet1_1", "shufflenet_v2_x0_5")
    assert report.warning is not None
    assert "2 of 2 models serve seeded random weights" in report.warning
    assert report.warning in caplog.text
    model = store.catalog(PRETRAINED)["squeezenet1_1"]
    assert (model.weights_requested, model.weights_actual, model.fallback) == ("pretrained", "random:0", True)
    again = publish(store, PRETRAINED, reachable=offline)
    assert (again.published, again.fallbacks) == ((), report.fallbacks)
    assert again.warning == report.warning


def test_fallback_weights_are_replaced_once_the_real_ones_are_there(store: ModelStore, hub: Path) -> None:
    publish(store, PRETRAINED, reachable=offline)
    source = build(PRETRAINED[0], "random:5")
    torch.save(source.state_dict(), hub / models.SqueezeNet1_1_Weights.DEFAULT.url.rpartition("/")[2])
    report = publish(store, PRETRAINED, reachable=offline)
    assert report.published == ("squeezenet1_1",)
    assert report.fallbacks == ("shufflenet_v2_x0_5",)
    assert not store.catalog(PRETRAINED)["squeezenet1_1"].fallback
    model = ModelLoader(store).load("squeezenet1_1")
    with torch.inference_mode():
        expected = source(torch.from_numpy(images())).numpy()
    np.testing.assert_allclose(classify(model, images()), expected, atol=1e-5)
    model.unload()


class BrokenFetcher(Fetcher):
    def __init__(self, cache: Path) -> None:
        super().__init__(cache)
        self.tried: list[str] = []

    def fetch(self, reference: str, on_bytes: OnBytes = ignore_bytes) -> Path:
        self.tried.append(reference)
        raise DownloadFailed("the connection broke")


@pytest.mark.usefixtures("hub")
def test_download_that_fails_after_the_probe_falls_back_and_is_not_tried_again(
    store: ModelStore, tmp_path: Path
) -> None:
    fetcher = BrokenFetcher(tmp_path)
    report = publish(store, PRETRAINED, reachable=lambda url: True, fetcher=fetcher)
    assert len(fetcher.tried) == 1
    assert report.fallbacks == ("squeezenet1_1", "shufflenet_v2_x0_5")


@pytest.mark.usefixtures("hub")
def test_no_random_weights_stand_in_where_real_ones_are_required(store: ModelStore) -> None:
    entries = [*PRETRAINED, tiny("tied")]
    report = publish(store, entries, reachable=offline, require_weights=True)
    assert report.refused == ("squeezenet1_1", "shufflenet_v2_x0_5")
    assert (report.published, report.fallbacks, report.failures) == (("tied",), (), ())
    assert store.published() == ("tied",)


def test_weights_of_a_factory_need_no_download(store: ModelStore) -> None:
    entry = tiny("tied", weights="pretrained")
    assert not publish(store, [entry], reachable=never).fallbacks
    assert store.manifest("tied").model.weights_actual == "pretrained"


def test_every_host_is_probed_once(tmp_path: Path) -> None:
    asked: list[str] = []
    source = WeightSource(Fetcher(tmp_path), lambda url: bool(asked.append(url)) or "good" in url)
    good, bad = (Pretrained(references=(f"https://{name}.example/a",)) for name in ("good", "bad"))
    for _ in range(2):
        assert source.choose("pretrained", good) == "pretrained"
        assert source.choose("pretrained", bad) == "random:0"
        assert source.choose("pretrained", Pretrained(references=bad.references, file=tmp_path)) == "pretrained"
        assert source.choose("pretrained", Pretrained(references=bad.references + good.references)) == "pretrained"
        assert source.choose("random:4", bad) == "random:4"
    assert asked == ["https://good.example/a", "https://bad.example/a"]


class Answer(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(200 if self.path == "/there" else 404)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def web_server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_probe_distinguishes_what_can_be_fetched() -> None:
    with web_server() as address:
        assert url_reachable(f"{address}/there")
        assert not url_reachable(f"{address}/elsewhere")


def test_probe_of_a_refused_connection_answers_at_once() -> None:
    with socket.socket() as bound:  # bound, but not listening
        bound.bind(("127.0.0.1", 0))
        started = time.perf_counter()
        assert not url_reachable(f"http://127.0.0.1:{bound.getsockname()[1]}/")
        assert time.perf_counter() - started < 1


def test_probe_of_a_silent_host_gives_up_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.perf_counter()
        assert not url_reachable(f"http://127.0.0.1:{silent.getsockname()[1]}/", timeout_s=0.2)
        assert time.perf_counter() - started < 1


def test_peak_growth_sees_memory_that_is_already_given_back() -> None:
    growth = measure.peak_growth_bytes(lambda: np.ones(8_000_000))
    assert growth is not None
    assert 60_000_000 < growth < 80_000_000


def test_workspace_is_the_same_whenever_it_is_measured(shared: ModelStore) -> None:
    loader = ModelLoader(shared)

    def workspace_bytes() -> int:
        contract = shared.manifest("squeezenet1_1").model.contract
        return measure.measure(lambda: loader.prepare("squeezenet1_1"), contract, [(1,)]).workspace_bytes

    first = workspace_bytes()
    # Freed heap of other sizes is what the allocator would hand out instead of asking the kernel for more.
    kept = [np.ones(size) for size in range(10_000, 40_000)[::100]]
    del kept[::2]
    assert workspace_bytes() == pytest.approx(first, rel=0.05)


def test_workspace_is_estimated_where_the_kernel_cannot_tell(shared: ModelStore, tmp_path: Path) -> None:
    loader = ModelLoader(shared)
    model = loader.load("squeezenet1_1")
    workspace = measure.workspace_bytes(lambda: classify(model, images()), proc=tmp_path)
    model.unload()
    assert 2_000_000 < workspace < 50_000_000


def test_measuring_restores_the_number_of_threads(shared: ModelStore) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    loader = ModelLoader(shared)
    measure.measure(lambda: loader.prepare("tied"), shared.manifest("tied").model.contract, [(1,)])
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_catalog_of_the_store_is_complete(shared: ModelStore) -> None:
    assert [model.model_id for model in shared.catalog(VISION).models] == [entry.model_id for entry in VISION]
