"""``ModelManager`` carries out what the cache decides: one load per model, no pin lost, no request forgotten.

The backend's loads end when the test says so; between two steps of a test the event loop runs until nothing moves.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio
from core_support import assert_accounting_adds_up, profile
from manager_support import Bench, Preloads

from serve_app.core.cache.events import (
    ContentChanged,
    ExchangeSuggested,
    ForwardCostsChanged,
    ModelsKnown,
    UnloadRequested,
)
from serve_app.core.catalog import ModelProfile
from serve_app.core.vocabulary import ModelState, Outcome
from serve_app.errors import Conflict, DoesNotFit, NotFound, StoreError, Unavailable

A, B, C = profile("a", 50), profile("b", 50), profile("c", 50)
LARGE = profile("large", 100)


@pytest_asyncio.fixture
async def make_bench() -> AsyncIterator[Callable[..., Bench]]:
    """Makes benches; when the test ends, nothing may be in use, waiting, under way or unreported."""
    benches: list[Bench] = []
    loop = asyncio.get_running_loop()

    def make(**changed: Any) -> Bench:
        bench = Bench(**changed)
        loop.set_exception_handler(lambda _, context: bench.faults.append(context))
        benches.append(bench)
        return bench

    yield make
    for bench in benches:
        await bench.settle()
        assert all(request.done() for request in bench.requests), "a request is left waiting"
        assert not any(bench.uses().values()), "a pin is left"
        assert bench.cache.waiting == 0
        assert bench.loads.under_way == []
        assert all(model.state is ModelState.READY for model in bench.cache.models())
        assert_accounting_adds_up(bench.cache)
        held = dict(bench.manager._runnables)
        assert held.keys() == bench.uses().keys(), "what is in memory is what the cache counts"
        assert all(runnable.in_memory for runnable in held.values())
        assert not bench.manager._waiters
        assert not bench.manager._abandoned
    assert asyncio.all_tasks() == {asyncio.current_task()}, "a task is pending"
    assert [fault for bench in benches for fault in bench.faults] == []


@pytest.fixture
def bench(make_bench: Callable[..., Bench]) -> Bench:
    return make_bench()


# Hit, join, load


async def test_twenty_requests_at_once_cause_one_load(bench: Bench) -> None:
    requests = [await bench.acquire(A) for _ in range(20)]
    assert bench.loads.under_way == ["a"]
    runnable = await bench.end(A)
    assert [request.result().outcome for request in requests] == [Outcome.LOAD] + [Outcome.JOIN] * 19
    assert all(request.result().runnable is runnable for request in requests)
    assert bench.uses() == {"a": 20}
    assert bench.loads.loaded() == ["a"]
    bench.release(*requests)


async def test_a_hit_is_served_without_a_suspension(bench: Bench) -> None:
    runnable = await bench.hold(A)
    acquiring = bench.manager.acquire(A)
    # No suspension: the first step of the coroutine is the last.
    with pytest.raises(StopIteration) as ended:
        acquiring.send(None)
    lease = ended.value.value
    assert (lease.outcome, lease.runnable, lease.wait_s, lease.load_s) == (Outcome.HIT, runnable, 0.0, 0.0)
    bench.manager.release(lease)


async def test_a_lease_says_how_long_its_request_waited_and_loaded(bench: Bench) -> None:
    in_use = await bench.acquire(LARGE)
    await bench.end(LARGE)
    waiting = await bench.acquire(A)
    bench.now = 2.0
    bench.release(in_use)
    await bench.settle()
    bench.now = 5.0
    joining = await bench.acquire(A)
    bench.now = 6.0
    await bench.end(A)
    lease = waiting.result()
    assert (lease.outcome, lease.wait_s, lease.load_s, lease.evicted) == (Outcome.LOAD, 2.0, 4.0, ("large",))
    lease = joining.result()
    assert (lease.outcome, lease.wait_s, lease.load_s, lease.evicted) == (Outcome.JOIN, 0.0, 1.0, ())
    bench.release(waiting, joining)
    assert bench.observer.seen == [("loaded", "large", "0"), ("evicted", "large", "capacity"), ("loaded", "a", "4")]


async def test_different_models_load_at_the_same_time(bench: Bench) -> None:
    requests = [await bench.acquire(A), await bench.acquire(B)]
    assert bench.loads.under_way == ["a", "b"]
    await bench.end(B)
    assert [request.done() for request in requests] == [False, True]
    await bench.end(A)
    bench.release(*requests)


async def test_victims_are_out_of_memory_before_the_load_begins(bench: Bench) -> None:
    await bench.hold(A)
    await bench.hold(B)
    request = await bench.acquire(LARGE)
    assert bench.loads.events == ["load a", "load b", "unload a", "unload b", "load large"]
    await bench.end(LARGE)
    bench.release(request)


async def test_a_model_in_use_stays_in_memory(bench: Bench) -> None:
    using = await bench.acquire(A)
    runnable = await bench.end(A)
    await bench.hold(B)
    other = await bench.acquire(C)
    await bench.end(C)
    assert runnable.in_memory
    assert bench.uses() == {"a": 1, "c": 1}
    bench.release(using, other)


async def test_a_preloaded_model_is_in_memory_and_not_in_use(bench: Bench) -> None:
    preload = await bench.start(bench.manager.preload(A))
    await bench.end(A)
    assert preload.done()
    assert bench.uses() == {"a": 0}
    request = await bench.acquire(A)
    assert request.result().outcome is Outcome.HIT
    bench.release(request)


async def test_a_required_preload_for_which_there_is_no_room_says_so(bench: Bench) -> None:
    using = await bench.acquire(LARGE)
    await bench.end(LARGE)
    preload = await bench.start(bench.manager.preload(A))
    with pytest.raises(Unavailable, match="no room now to preload model a of 50 bytes"):
        preload.result()
    bench.release(using)


async def test_a_required_preload_that_can_never_begin_says_why(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = await bench.start(bench.manager.preload(profile("huge", 101)))
    with pytest.raises(DoesNotFit, match=r"huge needs 101 bytes.*more memory"):
        huge.result()

    def check(model_id: str) -> None:
        raise StoreError(f"{model_id} is not in the store")

    monkeypatch.setattr(bench.loads, "check", check)
    missing = await bench.start(bench.manager.preload(A))
    with pytest.raises(StoreError, match="a is not in the store"):
        missing.result()


async def test_a_model_that_cannot_fit_is_rejected_with_a_remedy(bench: Bench) -> None:
    request = await bench.acquire(profile("huge", 101))
    with pytest.raises(DoesNotFit, match=r"huge needs 101 bytes.*more memory"):
        request.result()


async def test_a_full_wait_queue_rejects_with_the_time_to_come_back(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(max_waiting=0)
    using = await bench.acquire(LARGE)
    await bench.end(LARGE)
    request = await bench.acquire(A)
    with pytest.raises(Unavailable, match="try again later") as caught:
        request.result()
    assert caught.value.retry_after_s == 1.0
    bench.release(using)


# Background loads


async def test_a_model_is_preloaded_in_the_background_and_a_later_request_hits(bench: Bench) -> None:
    await bench.want(A)
    assert bench.loads.events == ["preload a"]
    assert bench.uses() == {"a": 0}
    bench.now = 2.0
    runnable = await bench.end(A)
    request = await bench.acquire(A)
    assert (request.result().outcome, request.result().runnable) == (Outcome.HIT, runnable)
    bench.release(request)
    assert bench.observer.seen == [("preload started",), ("loaded", "a", "2")]
    assert (bench.cache.counters.preloads, bench.cache.counters.wasted_preloads) == (1, 0)


async def test_a_request_joins_a_preload_under_way(bench: Bench) -> None:
    await bench.want(A)
    bench.now = 1.0
    request = await bench.acquire(A)
    bench.now = 3.0
    await bench.end(A)
    assert (request.result().outcome, request.result().load_s) == (Outcome.JOIN, 2.0)
    assert bench.loads.events == ["preload a"]
    bench.release(request)


async def test_what_goes_for_a_preload_is_out_of_memory_before_and_counted_as_such(bench: Bench) -> None:
    await bench.hold(A)
    await bench.hold(B)
    await bench.want(C)
    assert bench.loads.events[-2:] == ["unload a", "preload c"]
    assert ("evicted", "a", "preload") in bench.observer.seen
    await bench.end(C)


async def test_a_request_takes_the_place_of_an_unjoined_preload_and_does_not_wait_for_it(bench: Bench) -> None:
    await bench.want(LARGE)
    request = await bench.acquire(A)
    assert bench.loads.under_way == ["large", "a"]
    await bench.end(A)
    assert request.result().evicted == ("large",)
    bench.release(request)
    assert bench.observer.seen[1:] == [("evicted", "large", "capacity"), ("loaded", "a", "0")]
    dropped = await bench.end(LARGE)
    assert not dropped.in_memory
    assert bench.uses() == {"a": 0}
    assert (bench.cache.counters.preloads, bench.cache.counters.wasted_preloads) == (1, 1)


async def test_a_request_for_a_model_whose_preload_was_abandoned_takes_that_load_back(bench: Bench) -> None:
    await bench.want(LARGE)
    displacing = await bench.acquire(A)
    await bench.end(A)
    bench.release(displacing)
    request = await bench.acquire(LARGE)
    # One load of a model at a time, and it has begun long ago.
    assert bench.loads.events == ["preload large", "load a", "unload a"]
    runnable = await bench.end(LARGE)
    assert (request.result().outcome, request.result().runnable) == (Outcome.LOAD, runnable)
    assert runnable.in_memory
    bench.release(request)


async def test_a_load_that_was_taken_back_fails_its_requests(bench: Bench) -> None:
    await bench.want(LARGE)
    displacing = await bench.acquire(A)
    await bench.end(A)
    bench.release(displacing)
    requests = [await bench.acquire(LARGE), await bench.acquire(LARGE)]
    await bench.fail(LARGE, OSError("disk gone"))
    assert all(isinstance(request.exception(), StoreError) for request in requests)
    assert bench.uses() == {}


@pytest.mark.parametrize("rounds", range(6))
async def test_a_preload_abandoned_in_the_moment_it_ends_leaves_nothing(bench: Bench, rounds: int) -> None:
    await bench.want(LARGE)
    runnable = bench.loads.end("large")
    for _ in range(rounds):
        await asyncio.sleep(0)
    request = await bench.acquire(A)
    assert not runnable.in_memory
    await bench.end(A)
    bench.release(request)
    assert bench.uses() == {"a": 0}


async def test_a_preload_that_was_abandoned_may_fail_unseen(bench: Bench) -> None:
    await bench.want(LARGE)
    request = await bench.acquire(A)
    await bench.end(A)
    bench.release(request)
    await bench.fail(LARGE, OSError("disk gone"))
    assert bench.cache.counters.load_failures == 0
    again = await bench.acquire(LARGE)
    await bench.end(LARGE)
    bench.release(again)


async def test_a_preload_behind_one_that_was_abandoned_does_not_begin_once_it_is_abandoned_too(bench: Bench) -> None:
    await bench.want(LARGE)
    first = await bench.acquire(A)
    await bench.end(A)
    await bench.want(B)
    assert bench.loads.under_way == ["large"]
    second = await bench.acquire(C)
    await bench.end(C)
    assert second.result().evicted == ("b",)
    await bench.end(LARGE)
    assert bench.loads.under_way == []
    assert "preload b" not in bench.loads.events
    bench.release(first, second)


async def test_a_request_does_not_wait_behind_a_preload_that_was_abandoned_before_it_began(bench: Bench) -> None:
    await bench.want(LARGE)
    first = await bench.acquire(A)
    await bench.end(A)
    await bench.want(B)
    second = await bench.acquire(C)
    await bench.end(C)
    bench.release(first, second)
    third = await bench.acquire(B)
    assert bench.loads.under_way == ["large", "b"]
    await bench.end(B)
    bench.release(third)
    await bench.end(LARGE)


async def test_preloads_leave_all_loaders_to_requests(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(max_loads=2, capacity_bytes=150)
    await bench.want(A)
    requests = [await bench.acquire(B), await bench.acquire(C)]
    assert bench.loads.events == ["preload a", "load b", "load c"]
    for model in (A, B, C):
        await bench.end(model)
    bench.release(*requests)


async def test_a_failed_preload_is_logged_once_and_remembered(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        for wait_s in (5.0, 10.0, 20.0):
            await bench.want(A)
            await bench.fail(A, OSError("disk gone"))
            bench.now += wait_s - 0.1
            await bench.want(A)
            assert bench.loads.under_way == [], "it is tried ever more rarely"
            bench.now += 0.1
    assert [record.getMessage() for record in caplog.records] == ["loading a failed"]
    assert bench.observer.seen.count(("failed", "a")) == 3
    request = await bench.acquire(A)
    await bench.end(A)
    bench.release(request)
    gc.collect()
    assert bench.faults == []


async def test_a_failed_preload_fails_the_requests_that_joined_it(bench: Bench) -> None:
    await bench.want(A)
    request = await bench.acquire(A)
    await bench.fail(A, OSError("disk gone"))
    with pytest.raises(StoreError, match="disk gone"):
        request.result()


async def test_a_preload_for_which_no_thread_starts_is_a_failed_one(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def submit(*_: Any) -> Future[Any]:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Preloads, "submit", submit)
    await bench.want(A)
    assert bench.uses() == {}
    assert bench.observer.seen == [("preload started",), ("failed", "a")]


async def test_the_next_preload_begins_when_one_has_ended(bench: Bench) -> None:
    await bench.want(A, B)
    assert bench.loads.under_way == ["a"]
    await bench.end(A)
    await bench.until(bench.now)
    assert bench.loads.under_way == ["b"]
    await bench.end(B)


async def test_the_policy_knows_what_can_be_asked_for(bench: Bench) -> None:
    bench.manager.handle(ModelsKnown([A, B]))
    assert bench.policy.told == [("know", "a"), ("know", "b")]


# The timer


async def test_the_timer_is_set_for_the_next_review_and_set_anew_after_it(bench: Bench) -> None:
    assert bench.timer is None
    bench.policy.next_review_s = 7.0
    bench.manager.handle(ModelsKnown([A]))
    assert bench.timer is not None
    assert bench.timer.when_s == 7.0
    bench.policy.wanted = [A]
    await bench.until(6.9)
    assert bench.loads.under_way == []
    await bench.until(7.0)
    assert bench.loads.under_way == ["a"]
    assert bench.timer is None, "a preload is under way, and there is one at a time"
    bench.policy.next_review_s = 9.0
    await bench.end(A)
    assert bench.timer is not None
    assert bench.timer.when_s == 9.0


@pytest.mark.parametrize("event", ["request", "release", "unload", "forward costs"])
async def test_whatever_brings_the_review_forward_brings_the_timer_forward(bench: Bench, event: str) -> None:
    held = await bench.acquire(A)
    await bench.end(A)
    bench.policy.next_review_s = 9.0
    bench.manager.handle(ModelsKnown([]))
    bench.policy.next_review_s = 5.0
    leases = [held]
    match event:
        case "request":
            leases.append(await bench.acquire(A))
        case "release":
            bench.release(leases.pop())
        case "unload":
            await bench.hold(B)
            bench.manager.handle(UnloadRequested("b"))
        case "forward costs":
            bench.manager.handle(ForwardCostsChanged({}))
    assert [timer.when_s for timer in bench.timers if timer.is_set] == [5.0]
    bench.release(*leases)


async def test_a_timer_that_goes_off_too_early_asks_nothing_and_is_set_anew(bench: Bench) -> None:
    bench.policy.next_review_s = 5.0
    bench.manager.handle(ModelsKnown([]))
    bench.policy.next_review_s = 9.0
    bench.manager.handle(ModelsKnown([]))
    assert [timer.when_s for timer in bench.timers] == [5.0]
    await bench.until(8.0)
    assert bench.policy.told == []
    await bench.until(9.0)
    assert bench.policy.told == [("review", "9")]


async def test_no_timer_is_set_where_nothing_may_be_preloaded(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(max_preloads=0)
    await bench.want(A)
    assert bench.timers == []
    assert bench.loads.events == []


# Failed loads


@pytest.mark.parametrize("error", [OSError("disk gone"), MemoryError("no memory"), StoreError("checksum")])
async def test_a_failed_load_reaches_every_request_that_waits_for_it(bench: Bench, error: Exception) -> None:
    requests = [await bench.acquire(A) for _ in range(5)]
    await bench.fail(A, error)
    for request in requests:
        with pytest.raises(StoreError, match=f"model a cannot be loaded: .*{error}"):
            request.result()
    assert bench.cache.used_bytes == 0
    assert bench.observer.seen == [("failed", "a")]


async def test_a_failed_load_is_remembered_for_a_while_and_then_tried_again(bench: Bench) -> None:
    await bench.acquire(A)
    await bench.fail(A, OSError("disk gone"))
    bench.now = 2.0
    remembered = await bench.acquire(A)
    with pytest.raises(StoreError, match=r"not tried for 3\.0 s: OSError: disk gone"):
        remembered.result()
    assert bench.loads.loaded() == ["a"]
    bench.now = 5.0
    again = await bench.acquire(A)
    await bench.end(A)
    bench.release(again)


async def test_a_load_by_hand_is_tried_at_once_whatever_failed_before(bench: Bench) -> None:
    await bench.acquire(A)
    await bench.fail(A, OSError("disk gone"))
    by_hand = await bench.start(bench.manager.load(A))
    await bench.end(A)
    assert by_hand.exception() is None


async def test_a_failed_load_lets_the_next_waiting_request_in(bench: Bench) -> None:
    failing = await bench.acquire(LARGE)
    waiting = await bench.acquire(A)
    await bench.fail(LARGE, OSError("disk gone"))
    assert isinstance(failing.exception(), StoreError)
    await bench.end(A)
    bench.release(waiting)


async def test_a_failed_load_takes_down_no_model_that_it_did_not_displace(bench: Bench) -> None:
    runnable = await bench.hold(A)
    await bench.acquire(B)
    await bench.fail(B, OSError("disk gone"))
    assert runnable.in_memory
    assert bench.uses() == {"a": 0}


async def test_a_model_that_cannot_be_unloaded_cleanly_does_not_stop_the_load(bench: Bench) -> None:
    runnable = await bench.hold(LARGE)
    runnable.in_memory = False  # its unload will raise
    request = await bench.acquire(A)
    await bench.end(A)
    assert request.result().evicted == ("large",)
    bench.release(request)


# The wait queue


async def test_waiting_requests_are_served_in_order_of_arrival(bench: Bench) -> None:
    using = await bench.acquire(LARGE)
    await bench.end(LARGE)
    waiting = [await bench.acquire(model) for model in (B, A, C)]
    assert bench.loads.under_way == []
    bench.release(using)
    await bench.settle()
    assert bench.loads.under_way == ["b", "a"]
    await bench.end(B)
    await bench.end(A)
    assert [request.done() for request in waiting] == [True, True, False]
    bench.release(waiting[0])
    await bench.settle()
    assert bench.loads.events[-2:] == ["unload b", "load c"]
    await bench.end(C)
    bench.release(*waiting[1:])


async def test_requests_that_wait_for_one_model_share_its_load(bench: Bench) -> None:
    using = await bench.acquire(LARGE)
    await bench.end(LARGE)
    waiting = [await bench.acquire(A) for _ in range(3)]
    bench.release(using)
    await bench.settle()
    assert bench.loads.under_way == ["a"]
    await bench.end(A)
    assert [request.result().outcome for request in waiting] == [Outcome.LOAD, Outcome.JOIN, Outcome.JOIN]
    bench.release(*waiting)


async def test_a_waiting_request_may_end_up_with_a_hit(bench: Bench) -> None:
    using = await bench.acquire(LARGE)
    await bench.end(LARGE)
    first = await bench.acquire(A)
    second = await bench.acquire(LARGE)
    await bench.cancel(first)
    assert second.result().outcome is Outcome.HIT
    bench.release(using, second)


async def test_loads_beyond_the_limit_wait_for_their_turn(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(max_loads=1)
    requests = [await bench.acquire(model) for model in (A, B)]
    assert bench.loads.under_way == ["a"]
    await bench.end(A)
    assert bench.loads.under_way == ["b"]
    await bench.end(B)
    bench.release(*requests)


# Cancellation


async def test_a_canceled_loader_gives_its_pin_back_and_the_load_goes_on(bench: Bench) -> None:
    request = await bench.acquire(A)
    await bench.cancel(request)
    assert bench.loads.under_way == ["a"]
    await bench.end(A)
    assert bench.uses() == {"a": 0}


async def test_the_joiners_of_a_canceled_loader_get_the_model(bench: Bench) -> None:
    loader = await bench.acquire(A)
    joiner = await bench.acquire(A)
    await bench.cancel(loader)
    await bench.end(A)
    assert bench.uses() == {"a": 1}
    bench.release(joiner)


async def test_a_canceled_joiner_gives_its_pin_back(bench: Bench) -> None:
    loader = await bench.acquire(A)
    joiners = [await bench.acquire(A) for _ in range(3)]
    await bench.cancel(*joiners)
    await bench.end(A)
    assert bench.uses() == {"a": 1}
    bench.release(loader)


async def test_a_load_without_requests_may_fail_unseen(bench: Bench) -> None:
    requests = [await bench.acquire(A) for _ in range(2)]
    await bench.cancel(*requests)
    await bench.fail(A, OSError("disk gone"))
    bench.now = 100.0
    await bench.hold(A)
    # If nothing had looked at the failure, asyncio would say so when the task is collected.
    gc.collect()
    assert bench.faults == []


async def test_a_request_canceled_in_the_moment_its_load_ends_gives_its_pin_back(bench: Bench) -> None:
    """However many rounds of the event loop lie between the end of the load and the cancellation."""
    for rounds in range(8):
        request = await bench.acquire(A)
        bench.loads.end("a")
        for _ in range(rounds):
            await asyncio.sleep(0)
        if request.cancel():
            await bench.cancel(request)
        else:
            bench.release(request)
        await bench.settle()
        assert bench.uses() == {"a": 0}
        bench.manager.handle(UnloadRequested("a"))


async def test_a_request_canceled_in_the_moment_its_load_fails_leaves_no_trace(bench: Bench) -> None:
    for rounds in range(8):
        bench.now += 100.0
        request = await bench.acquire(A)
        bench.loads.fail("a", OSError("disk gone"))
        for _ in range(rounds):
            await asyncio.sleep(0)
        request.cancel()
        await bench.settle()
        assert request.cancelled() or isinstance(request.exception(), StoreError)
        assert bench.uses() == {}


async def test_a_canceled_waiter_leaves_the_wait_queue(bench: Bench) -> None:
    using = await bench.acquire(LARGE)
    await bench.end(LARGE)
    first, second = await bench.acquire(A), await bench.acquire(B)
    await bench.cancel(first)
    assert bench.cache.waiting == 1
    bench.release(using)
    await bench.settle()
    assert bench.loads.under_way == ["b"]
    await bench.end(B)
    bench.release(second)


@pytest.mark.parametrize("rounds", range(6))
async def test_a_waiter_canceled_in_the_moment_its_load_begins_gives_its_pin_back(bench: Bench, rounds: int) -> None:
    using = await bench.acquire(LARGE)
    await bench.end(LARGE)
    waiter = await bench.acquire(A)
    joiner = await bench.acquire(A)
    bench.release(using)
    for _ in range(rounds):
        await asyncio.sleep(0)
    await bench.cancel(waiter)
    await bench.end(A)
    assert bench.uses() == {"a": 1}
    bench.release(joiner)


@pytest.mark.parametrize("rounds", range(6))
async def test_a_waiter_canceled_in_the_moment_of_its_hit_gives_its_pin_back(bench: Bench, rounds: int) -> None:
    using = await bench.acquire(LARGE)
    await bench.end(LARGE)
    first = await bench.acquire(A)
    waiter = await bench.acquire(LARGE)
    first.cancel()
    for _ in range(rounds):
        await asyncio.sleep(0)
    if waiter.cancel():
        await bench.cancel(waiter)
    else:
        bench.release(waiter)
    assert bench.uses() == {"large": 1}
    bench.release(using)


async def test_a_waiter_canceled_just_before_its_turn_gives_its_pin_back(bench: Bench) -> None:
    using = await bench.acquire(LARGE)
    await bench.end(LARGE)
    waiter = await bench.acquire(A)
    waiter.cancel()
    bench.release(using)
    await bench.settle()
    assert waiter.cancelled()
    # Its load has begun all the same; the next request can use it.
    await bench.end(A)
    assert bench.uses() == {"a": 0}


async def test_when_all_waiters_are_canceled_at_once_nothing_is_left(bench: Bench) -> None:
    using = await bench.acquire(LARGE)
    await bench.end(LARGE)
    waiters = [await bench.acquire(model) for model in (A, B, A, C, LARGE, profile("other", 100))]
    await bench.cancel(*waiters)
    assert bench.cache.waiting == 0
    assert bench.loads.under_way == []
    bench.release(using)


async def test_a_canceled_preload_leaves_no_pin(bench: Bench) -> None:
    preload = await bench.start(bench.manager.preload(A))
    await bench.cancel(preload)
    await bench.end(A)
    assert bench.uses() == {"a": 0}


# Unloading


async def test_unloading_by_hand_gives_the_memory_back(bench: Bench) -> None:
    runnable = await bench.hold(A)
    bench.manager.handle(UnloadRequested("a"))
    assert not runnable.in_memory
    assert bench.cache.used_bytes == 0
    assert bench.observer.seen[-1] == ("evicted", "a", "unload")


async def test_unloading_by_hand_does_not_disturb_the_wait_queue(bench: Bench) -> None:
    idle = await bench.hold(A)
    using = await bench.acquire(B)
    await bench.end(B)
    waiting = await bench.acquire(LARGE)
    bench.manager.handle(UnloadRequested("a"))
    assert not idle.in_memory
    assert not waiting.done()
    bench.release(using)
    await bench.settle()
    await bench.end(LARGE)
    assert waiting.result().evicted == ("b",)
    bench.release(waiting)


async def test_what_is_in_use_or_absent_cannot_be_unloaded(bench: Bench) -> None:
    request = await bench.acquire(A)
    with pytest.raises(Conflict):
        bench.manager.handle(UnloadRequested("a"))
    runnable = await bench.end(A)
    with pytest.raises(Conflict):
        bench.manager.handle(UnloadRequested("a"))
    with pytest.raises(NotFound):
        bench.manager.handle(UnloadRequested("b"))
    assert runnable.in_memory
    bench.release(request)


async def test_a_model_comes_back_after_it_was_unloaded(bench: Bench) -> None:
    first = await bench.hold(A)
    bench.manager.handle(UnloadRequested("a"))
    second = await bench.hold(A)
    assert second is not first
    assert second.in_memory


@pytest.mark.parametrize("fails", [False, True])
async def test_closing_ends_preloading(fails: bool) -> None:
    bench = Bench()
    idle = await bench.hold(A)
    bench.policy.next_review_s = 5.0
    await bench.want(B)
    bench.policy.next_review_s = 5.0
    bench.manager.close()
    assert not idle.in_memory
    assert bench.timer is None
    if fails:
        await bench.fail(B, OSError("disk gone"))
    else:
        assert not (await bench.end(B)).in_memory
    assert bench.timer is None
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_closing_cancels_the_timer() -> None:
    bench = Bench()
    bench.policy.next_review_s = 5.0
    bench.manager.handle(ModelsKnown([A]))
    bench.manager.close()
    assert bench.timer is None
    bench.manager.handle(ModelsKnown([A]))
    assert bench.timer is None


async def test_closing_unloads_everything() -> None:
    bench = Bench()
    runnables = [await bench.hold(A), await bench.hold(B)]
    bench.manager.close()
    assert not any(runnable.in_memory for runnable in runnables)


# Another form


async def exchange(bench: Bench, model: ModelProfile) -> str:
    """Suggest another form of a model; returns what is loaded for it."""
    bench.manager.handle(ExchangeSuggested(model))
    await bench.settle()
    (key,) = bench.loads.under_way
    return key


async def test_requests_use_the_other_form_as_soon_as_it_is_loaded_and_the_former_one_goes_after_them(
    bench: Bench,
) -> None:
    slow = await bench.hold(A)
    before = await bench.acquire(A)
    key = await exchange(bench, replace(A, size_bytes=12))
    during = await bench.acquire(A)
    assert (before.result().outcome, during.result().outcome) == (Outcome.HIT, Outcome.HIT)
    fast = bench.loads.end(key)
    await bench.settle()
    after = await bench.acquire(A)
    assert [each.result().runnable for each in (before, during, after)] == [slow, slow, fast]
    bench.release(before, after)
    await bench.settle()
    assert slow.in_memory, "a request still uses it"
    bench.release(during)
    await bench.settle()
    assert (slow.in_memory, fast.in_memory) == (False, True)
    assert bench.cache.used_bytes == 12


async def test_a_form_that_cannot_be_loaded_leaves_the_model_as_it_is(bench: Bench) -> None:
    slow = await bench.hold(A)
    key = await exchange(bench, replace(A, size_bytes=12))
    bench.loads.fail(key, StoreError("a file is missing"))
    await bench.settle()
    request = await bench.acquire(A)
    assert request.result().runnable is slow
    bench.release(request)
    assert bench.cache.used_bytes == A.size_bytes


async def test_a_form_that_is_loaded_after_the_end_is_unloaded() -> None:
    bench = Bench()
    slow = await bench.hold(A)
    key = await exchange(bench, replace(A, size_bytes=12))
    bench.manager.close()
    fast = bench.loads.end(key)
    await bench.settle()
    assert (slow.in_memory, fast.in_memory) == (False, False)


async def test_a_larger_form_goes_before_the_smaller_one_is_loaded_and_requests_join_that_load(bench: Bench) -> None:
    small = profile("a", 30)
    await bench.hold(small)
    bench.loads.end(await exchange(bench, replace(small, size_bytes=50, tier=1)))
    await bench.settle()
    other = await bench.acquire(profile("b", 60))
    joining = await bench.acquire(small)
    assert bench.loads.events[-3:] == ["unload a#1", "load a", "load b"]
    for model_id in ("b", "a"):
        bench.loads.end(model_id)
    await bench.settle()
    assert (other.result().outcome, joining.result().outcome) == (Outcome.LOAD, Outcome.JOIN)
    assert other.result().evicted == ()
    assert bench.cache.used_bytes == 90
    bench.release(other, joining)


async def test_requests_for_a_model_whose_files_have_changed_wait_for_the_new_ones(bench: Bench) -> None:
    before = await bench.hold(A)
    key = await exchange(bench, replace(A, size_bytes=12, tier=1))
    bench.manager.handle(ContentChanged("a"))
    request = await bench.acquire(A)
    assert not request.done()
    form = bench.loads.end(key)
    await bench.settle()
    after = bench.loads.end("a")
    await bench.settle()
    assert request.result().runnable is after
    assert (before.in_memory, form.in_memory) == (False, False)
    bench.release(request)
