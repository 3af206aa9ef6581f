"""The router alone, with scripted workers: where it sends work, and what it does when that fails."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import httpx
import numpy as np
import pytest
from fakes import FakeLink, FakePool, done, make_router, published, report

from serve_app.config.edge import LimitSettings
from serve_app.core.catalog import Catalog, PublishedModel
from serve_app.core.cluster.reports import ViewDelta
from serve_app.core.contract import Axis, Contract, SizeCost, TensorSpec
from serve_app.core.vocabulary import Forwarding, Outcome
from serve_app.errors import DeadlineExceeded, InvalidRequest, NotFound, StoreError, Unavailable
from serve_app.serving.api.http_app import build_http_app
from serve_app.serving.api.request_reader import HttpSettings
from serve_app.serving.router.model_selection import times_longer
from serve_app.serving.router.request import InferenceRequest
from serve_app.serving.transport.messages import InferenceRejected, NotResident
from serve_app.serving.transport.worker_pool import WorkerLost
from serve_app.tasks.base import RawInput

BATCH = {"input": np.zeros((1, 3, 8, 8), np.float32)}


def query(name: str = "small", **changes) -> InferenceRequest:
    return InferenceRequest(**{"name": name, "location": "paris", "payload": BATCH, **changes})


async def test_a_held_model_runs_here_with_one_call() -> None:
    pool = FakePool(paris=[done("paris-1")])
    served = await make_router(pool, report("paris", "small"), report("tokyo")).serve(query())
    assert (served.outcome, served.location) == (Outcome.HIT, "paris")
    assert len(pool.calls) == 1


async def test_a_model_held_elsewhere_is_forwarded_and_asked_for_only_if_held() -> None:
    pool = FakePool(tokyo=[done("tokyo-1")])
    served = await make_router(pool, report("paris"), report("tokyo", "small")).serve(query())
    assert (served.outcome, served.location) == (Outcome.FORWARD, "tokyo")
    assert pool.calls[0][2].only_if_resident


async def test_a_stale_hint_costs_one_more_call_and_is_not_believed_again() -> None:
    pool = FakePool(
        tokyo=[NotResident(replica="tokyo-1", sequence=5)], paris=[done("paris-1", outcome=Outcome.LOAD)] * 2
    )
    router = make_router(pool, report("paris"), report("tokyo", "small"))
    served = await router.serve(query())
    assert (served.outcome, served.location) == (Outcome.LOAD, "paris")
    assert [location for location, *_ in pool.calls] == ["tokyo", "paris"]
    await router.serve(query())
    assert [location for location, *_ in pool.calls] == ["tokyo", "paris", "paris"]


async def test_a_request_whose_worker_dies_is_served_by_another() -> None:
    pool = FakePool(paris=[WorkerLost("gone")], tokyo=[done("tokyo-1", outcome=Outcome.LOAD)])
    served = await make_router(pool, report("paris", "small"), report("tokyo")).serve(query())
    assert (served.outcome, served.location) == (Outcome.FORWARD, "tokyo")


async def test_a_request_with_no_worker_left_goes_to_whatever_serve_finds_at_its_location() -> None:
    pool = FakePool(paris=[WorkerLost("gone"), done("paris-2")])
    served = await make_router(pool, report("paris", "small")).serve(query())
    assert served.location == "paris"
    assert [replica for _, replica, _ in pool.calls] == ["paris-1", None]


async def test_a_request_that_must_not_be_forwarded_stays_when_its_worker_dies() -> None:
    pool = FakePool(paris=[WorkerLost("gone"), done("paris-2")])
    router = make_router(pool, report("paris", "small"), report("tokyo", "small"))
    assert (await router.serve(query(forwarding=Forwarding.NEVER))).location == "paris"


async def test_workers_that_die_one_after_another_end_in_503() -> None:
    pool = FakePool(paris=[WorkerLost("gone")] * 9, tokyo=[WorkerLost("gone")] * 9)
    with pytest.raises(Unavailable, match="no worker"):
        await make_router(pool, report("paris"), report("tokyo")).serve(query())


async def test_a_rejection_that_no_other_worker_mends_is_passed_on() -> None:
    pool = FakePool(paris=[InferenceRejected(error=InvalidRequest("the image is no image"))])
    with pytest.raises(InvalidRequest, match="no image"):
        await make_router(pool, report("paris", "small"), report("tokyo", "small")).serve(query())


@pytest.mark.parametrize("error", [Unavailable("overrun"), StoreError("its file is cut short")])
async def test_what_one_worker_cannot_do_another_is_asked_for(error) -> None:
    pool = FakePool(paris=[InferenceRejected(error=error)], tokyo=[done("tokyo-1", outcome=Outcome.LOAD)])
    served = await make_router(pool, report("paris", "small"), report("tokyo")).serve(query())
    assert served.location == "tokyo"


async def test_what_no_worker_can_do_fails_as_it_failed_there() -> None:
    pool = FakePool(
        paris=[InferenceRejected(error=StoreError("cut short"))],
        tokyo=[InferenceRejected(error=StoreError("cut short"))],
    )
    with pytest.raises(StoreError, match="cut short"):
        await make_router(pool, report("paris", "small"), report("tokyo")).serve(query())
    assert len(pool.calls) == 2


async def test_a_location_without_workers_is_not_waited_for_until_the_deadline() -> None:
    router = make_router(FakePool(paris=[asyncio.Event()]), report("tokyo"), unknown_location_timeout_s=0.02)
    with pytest.raises(Unavailable, match="no worker of paris"):
        await router.serve(query(forwarding=Forwarding.NEVER))


async def test_of_a_family_that_must_stay_a_member_is_chosen_that_fits_here() -> None:
    pool = FakePool(paris=[done("paris-1")])
    catalog = Catalog((published("small", accuracy=0.5), published("huge", accuracy=0.9, size_bytes=5000)))
    workers = (report("paris", capacity_bytes=1000), report("tokyo", capacity_bytes=9000))
    router = make_router(pool, *workers, catalog=catalog)
    assert (await router.serve(query("digits", forwarding=Forwarding.NEVER))).model.model_id == "small"


async def test_a_load_under_way_is_joined_by_the_next_request() -> None:
    under_way = asyncio.Event()
    pool = FakePool(paris=[under_way, done("paris-1", outcome=Outcome.JOIN)])
    router = make_router(pool, report("paris", load_s={"small": 0.0005}), report("tokyo"))
    first = asyncio.create_task(router.serve(query()))
    await pool.called.wait()
    second = await router.serve(query())
    assert (second.outcome, second.location) == (Outcome.JOIN, "paris")
    under_way.set()
    await first


async def test_a_worker_that_does_not_answer_is_given_up_at_the_deadline() -> None:
    pool = FakePool(paris=[asyncio.Event()])
    with pytest.raises(DeadlineExceeded, match="deadline"):
        await make_router(pool, report("paris", "small")).serve(query(deadline_s=0.05))


async def test_a_request_at_a_worker_that_leaves_the_directory_is_served_by_another() -> None:
    pool = FakePool(paris=[asyncio.Event()], tokyo=[done("tokyo-1", outcome=Outcome.LOAD)])
    coordinator = FakeLink()
    router = make_router(pool, report("paris", "small"), report("tokyo"), coordinator=coordinator)
    request = asyncio.create_task(router.serve(query()))
    await pool.called.wait()
    coordinator.delta = ViewDelta(epoch="epoch", version=2, full=False, workers=(), gone=("paris-1",), rates={})
    await router.refresh()
    assert (await request).location == "tokyo"


async def test_a_new_coordinator_that_knows_no_worker_yet_ends_no_call() -> None:
    answer = asyncio.Event()
    pool = FakePool(paris=[answer])
    coordinator = FakeLink()
    router = make_router(pool, report("paris", "small"), report("tokyo"), coordinator=coordinator)
    request = asyncio.create_task(router.serve(query()))
    await pool.called.wait()
    coordinator.delta = ViewDelta(epoch="next", version=0, full=True, workers=(), gone=(), rates={})
    await router.refresh()
    answer.set()
    assert (await request).location == "paris"


def sized() -> PublishedModel:
    """Takes 10 ms for the shortest text, and 2 s for the longest."""
    tokens = TensorSpec(name="tokens", datatype="INT64", shape=(1, -1), axes=("", "length"))
    return replace(
        published("sized"),
        contract=Contract(
            inputs=(tokens,),
            outputs=(TensorSpec(name="logits", datatype="FP32", shape=(1, 3)),),
            axes=(Axis(name="length", most=512),),
        ),
        row_by_row=False,
        costs=(
            SizeCost(sizes=(1,), workspace_bytes=1, exec_s=0.01),
            SizeCost(sizes=(512,), workspace_bytes=1, exec_s=2.0),
        ),
    )


async def test_a_deadline_is_compared_with_what_the_size_of_the_request_takes() -> None:
    pool = FakePool(paris=[done("paris-1")])
    router = make_router(pool, report("paris", "sized"), catalog=Catalog((sized(),)))
    short, long = ({"tokens": np.zeros((1, length), np.int64)} for length in (1, 512))
    with pytest.raises(DeadlineExceeded, match="takes about 2000 ms"):
        await router.serve(query("sized", payload=long, deadline_s=0.5))
    assert (await router.serve(query("sized", payload=short, deadline_s=0.5))).model.model_id == "sized"


def test_a_batch_whose_rows_are_executed_one_after_another_takes_as_many_times_longer() -> None:
    rows = {"input": np.zeros((4, 3, 8, 8), np.float32)}
    assert times_longer(rows, published("small")) == 4
    assert times_longer({"input": rows["input"][:1]}, published("small")) == 1
    assert times_longer(RawInput(data=b"a photo"), published("small")) == 1


async def test_a_deadline_far_below_the_execution_time_is_rejected_untried() -> None:
    pool = FakePool()
    with pytest.raises(DeadlineExceeded, match="1000 ms"):
        await make_router(pool, report("paris", "big")).serve(query("big", deadline_s=0.1))
    assert not pool.calls


async def test_a_family_is_served_by_the_most_accurate_member_in_time() -> None:
    pool = FakePool(paris=[done("paris-1")] * 3)
    router = make_router(pool, report("paris", "small", "big"))
    assert (await router.serve(query("digits"))).model.model_id == "big"
    assert (await router.serve(query("digits", deadline_s=3.0))).model.model_id == "big"
    assert (await router.serve(query("digits", deadline_s=0.5))).model.model_id == "small"
    with pytest.raises(DeadlineExceeded, match="min_accuracy"):
        await router.serve(query("digits", deadline_s=0.5, min_accuracy=0.8))


async def test_a_member_with_real_weights_goes_before_a_more_accurate_one_that_lacks_its_own() -> None:
    fallback = replace(published("lacking", accuracy=0.9), weights_requested="pretrained")
    real = replace(published("real", accuracy=0.5), weights_requested="pretrained", weights_actual="pretrained")
    router = make_router(
        FakePool(paris=[done("paris-1")] * 2), report("paris", "lacking"), catalog=Catalog((fallback, real))
    )
    assert (await router.serve(query("digits"))).model.model_id == "real"
    assert (await router.serve(query("digits", min_accuracy=0.4))).model.model_id == "real"
    with pytest.raises(InvalidRequest, match=r"min_accuracy 0\.6 is out of reach: .* has 0\.500"):
        await router.serve(query("digits", min_accuracy=0.6))


async def test_a_member_that_no_worker_can_hold_is_passed_over() -> None:
    pool = FakePool(paris=[done("paris-1")])
    catalog = Catalog((published("small", accuracy=0.5), published("huge", accuracy=0.9, size_bytes=5000)))
    router = make_router(pool, report("paris", capacity_bytes=1000), catalog=catalog)
    assert (await router.serve(query("digits"))).model.model_id == "small"


async def test_unknown_names_are_not_found() -> None:
    router = make_router(FakePool(), report("paris"))
    with pytest.raises(NotFound, match="unheard"):
        await router.serve(query("unheard"))
    with pytest.raises(NotFound, match="atlantis"):
        await router.serve(query(location="atlantis"))


def client(router, token: str | None = None) -> httpx.AsyncClient:
    settings = HttpSettings(location="paris", default_location="paris", limits=LimitSettings(), token=token)

    async def scrape() -> str:
        return ""

    app = build_http_app(router, settings, scrape)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://edge")


IMAGE = {"Content-Type": "image/png"}


async def test_a_full_router_answers_503_and_says_when_to_come_back() -> None:
    router = make_router(FakePool(), report("paris"), max_inflight=0)
    async with client(router) as http:
        response = await http.post("/v1/classify?model=small", content=b"x", headers=IMAGE)
    assert response.status_code == 503
    assert int(response.headers["Retry-After"]) >= 1
    assert "try again" in response.json()["error"]


async def test_a_token_is_asked_for_and_checked_where_one_is_configured() -> None:
    router = make_router(FakePool(), report("paris"))
    async with client(router, token="secret") as http:
        assert (await http.get("/v2")).status_code == 401
        assert (await http.get("/v2")).headers["WWW-Authenticate"] == "Bearer"
        assert (await http.get("/v2", headers={"Authorization": "Bearer wrong"})).status_code == 403
        assert (await http.get("/v2", headers={"Authorization": "Basic secret"})).status_code == 403
        assert (await http.get("/v2", headers={"Authorization": "Bearer secret"})).status_code == 200
        assert (await http.get("/v2/health/live")).status_code == 200
        assert (await http.get("/v2/health/ready")).status_code == 200
        assert (await http.get("/v2/health/live/../../v1/locations")).status_code == 401
        assert (await http.get("/v2/models/x%2Fv2%2Fhealth%2Flive/ready")).status_code == 401
        assert "token" in (await http.get("/v2")).json()["error"]


async def test_a_fault_of_ours_is_500_with_an_id_and_without_details(caplog) -> None:
    pool = FakePool(paris=[ZeroDivisionError("inner detail")])
    async with client(make_router(pool, report("paris", "small"))) as http:
        response = await http.post(
            "/v1/classify?model=small", content=b"x", headers={**IMAGE, "X-Request-Id": "request-7"}
        )
    assert response.status_code == 500
    assert "request-7" in response.json()["error"]
    assert "inner detail" not in response.text
    assert "request-7" in caplog.text


# Links


async def test_a_location_that_does_not_answer_probes_gets_no_requests_until_it_does() -> None:
    pool = FakePool(paris=[done("paris-1", outcome=Outcome.LOAD)], tokyo=[done("tokyo-1")])
    router = make_router(pool, report("paris"), report("tokyo", "small"))
    pool.cut_off = {"tokyo"}
    for _ in range(2):
        await router.probe()
    assert (await router.serve(query())).outcome is Outcome.LOAD
    pool.cut_off = set()
    await router.probe()
    router.view.observe("paris-1", "small", None, 10)
    assert (await router.serve(query())).location == "tokyo"


async def test_requests_under_way_to_a_location_that_is_cut_off_are_served_elsewhere() -> None:
    pool = FakePool(paris=[done("paris-1", outcome=Outcome.LOAD)], tokyo=[asyncio.Event()])
    router = make_router(pool, report("paris"), report("tokyo", "small"))
    request = asyncio.create_task(router.serve(query()))
    await pool.called.wait()
    pool.cut_off = {"tokyo"}
    for _ in range(2):
        await router.probe()
    assert (await request).location == "paris"


async def test_the_own_location_is_never_cut_off() -> None:
    pool = FakePool(paris=[done("paris-1")])
    router = make_router(pool, report("paris", "small"))
    pool.cut_off = {"paris"}
    for _ in range(5):
        await router.probe()
    assert (await router.serve(query())).location == "paris"


async def test_a_router_that_only_stands_in_for_a_location_does_without_it_when_it_is_cut_off() -> None:
    pool = FakePool(tokyo=[done("tokyo-1")])
    router = make_router(pool, report("paris", "small"), report("tokyo"), stands_in=True)
    pool.cut_off = {"paris"}
    for _ in range(2):
        await router.probe()
    assert (await router.serve(query())).location == "tokyo"


async def test_links_that_probes_measure_are_sent_to_the_coordinator() -> None:
    coordinator = FakeLink()
    router = make_router(FakePool(), report("paris"), report("tokyo"), coordinator=coordinator)
    await router.probe()
    await router.refresh()
    assert set(coordinator.links) == {("paris", "paris"), ("paris", "tokyo")}


@pytest.mark.parametrize("count", [1, 3, 16, 17, 32, 64])
async def test_every_link_is_measured_with_a_payload_however_many_there_are(count: int) -> None:
    pool = FakePool()
    router = make_router(pool, *(report(f"location-{number}") for number in range(count)))
    for _ in range(32):
        await router.probe()
    for number in range(count):
        sizes = {size_bytes for location, size_bytes in pool.pinged if location == f"location-{number}"}
        assert len(sizes) == 2, f"location-{number}: {sizes}"


async def test_a_router_that_only_stands_in_for_a_location_does_not_say_how_far_it_is_from_there() -> None:
    coordinator = FakeLink()
    router = make_router(FakePool(), report("paris"), report("tokyo"), coordinator=coordinator, stands_in=True)
    await router.probe()
    await router.refresh()
    assert not coordinator.links


async def test_a_popular_model_is_forwarded_now_and_loaded_here_in_the_background() -> None:
    pool = FakePool(tokyo=[done("tokyo-1")])
    router = make_router(pool, report("paris", load_s={"small": 0.5}), report("tokyo", "small"))
    rates = {"paris": {"small": 100.0}}
    reports = (report("paris", load_s={"small": 0.5}, sequence=2), report("tokyo", "small", sequence=2))
    router.view.apply(ViewDelta(epoch="epoch", version=2, full=True, workers=reports, gone=(), rates=rates), 0.0)
    assert (await router.serve(query())).outcome is Outcome.FORWARD
    await asyncio.sleep(0)
    assert pool.preloads == [("paris", "paris-1", "small")]
