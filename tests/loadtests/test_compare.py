"""The pure parts of the comparison with other servers: what is counted, and what the client of MLServer decides."""

from __future__ import annotations

from itertools import islice

import pytest

from loadtests.compare.drive import FAILED, Sample
from loadtests.compare.figures import (
    Aim,
    Hits,
    Spread,
    Verdict,
    figures,
    hits_of,
    how_many_times,
    load_delay_s,
    models_at_once,
    percentile,
    spread,
)
from loadtests.compare.http import RequestFailed, timings_s
from loadtests.compare.lru import LruBooks
from loadtests.compare.stream import Stream
from serve_app.workload.spec import parse_trace

SIZES = {"a": 40, "b": 40, "c": 40, "large": 100}


def sample(
    outcome: str = "hit",
    *,
    model: str = "a",
    due_s: float = 0.0,
    latency_s: float = 0.1,
    wait_s: float = 0.0,
    queue_s: float = 0.0,
    exec_s: float = 0.01,
) -> Sample:
    return Sample(
        model=model,
        due_s=due_s,
        done_s=due_s + latency_s,
        outcome=outcome,
        wait_s=wait_s,
        queue_s=queue_s,
        exec_s=exec_s,
    )


def test_a_percentile_is_a_value_that_so_many_do_not_exceed() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, share) for share in (0.5, 0.99, 0.999)] == [50.0, 99.0, 100.0]
    assert percentile([3.0], 0.5) == 3.0
    assert percentile([], 0.5) is None


def test_a_spread_leaves_out_what_is_unknown() -> None:
    assert spread([3.0, None, 1.0, 2.0]) == Spread(least=1.0, median=2.0, most=3.0, count=3)
    assert spread([None]) is None


def test_hits_wait_for_no_load() -> None:
    samples = [sample(exec_s=0.5, queue_s=1.0), sample(exec_s=0.1)]
    assert load_delay_s(samples, hits_of(samples, ())) == 0.0


def test_the_load_delay_is_spread_over_all_requests() -> None:
    samples = [sample("load", wait_s=0.3), *[sample() for _ in range(2)]]
    assert load_delay_s(samples, hits_of(samples, ())) == pytest.approx(0.1)


def test_work_that_a_load_leaves_to_the_first_execution_counts() -> None:
    """A server that maps weights, and reads them as it executes, has not loaded them for nothing."""
    samples = [sample("load", wait_s=0.001, exec_s=0.06), sample(exec_s=0.01)]
    assert load_delay_s(samples, hits_of(samples, ())) == pytest.approx((0.001 + 0.05) / 2)


def test_a_queue_that_only_misses_stand_in_counts() -> None:
    samples = [sample("load", wait_s=0.001, queue_s=0.2), sample(queue_s=0.1)]
    assert load_delay_s(samples, hits_of(samples, ())) == pytest.approx((0.001 + 0.1) / 2)


def test_chance_does_not_make_a_load_delay_less_than_reported() -> None:
    samples = [sample("load", wait_s=0.02, exec_s=0.01), sample(exec_s=0.5)]
    assert load_delay_s(samples, hits_of(samples, ())) == pytest.approx(0.01)


def test_a_model_that_was_never_hit_is_compared_with_its_hit_before() -> None:
    samples = [sample("load", model="b", wait_s=0.0, exec_s=0.05)]
    hits = hits_of(samples, [sample(model="b", exec_s=0.01)])
    assert load_delay_s(samples, hits) == pytest.approx(0.04)


def test_failures_are_counted_apart() -> None:
    samples = [sample(latency_s=0.1), sample(FAILED, latency_s=9.0), sample("load", due_s=1.0, latency_s=0.3)]
    counted = figures(samples, Hits(exec_s={}, queue_s=0.0))
    assert (counted.requests, counted.failures, counted.failed_latency_s) == (3, 1, 9.0)
    assert counted.p99_s == pytest.approx(0.3)
    assert counted.miss_ratio == 0.5
    assert counted.throughput_per_s == pytest.approx(2 / 9)


def test_a_slice_in_which_all_failed_has_figures() -> None:
    counted = figures([sample(FAILED)], Hits(exec_s={}, queue_s=0.0))
    assert (counted.p50_s, counted.load_delay_s, counted.miss_ratio) == (None, None, None)
    assert counted.failures == 1


def test_latency_counts_from_when_a_request_was_due() -> None:
    assert sample(due_s=2.0, latency_s=0.5).latency_s == 0.5


def test_times_better_is_above_one_for_the_better() -> None:
    assert how_many_times(0.1, 0.5) == pytest.approx(5.0)
    assert how_many_times(50.0, 10.0, more_is_better=True) == pytest.approx(5.0)
    assert how_many_times(0.0, 0.5) is None
    assert how_many_times(0.1, None) is None


@pytest.mark.parametrize(("models", "share", "slots"), [(24, 0.25, 6), (25, 0.25, 7), (10, 0.3, 3), (3, 0.01, 1)])
def test_who_counts_models_gets_no_fewer_than_memory_has_room_for(models: int, share: float, slots: int) -> None:
    assert models_at_once(models, share) == slots


def test_there_is_no_memory_for_more_than_all_models() -> None:
    with pytest.raises(ValueError, match="share"):
        models_at_once(10, 1.5)


@pytest.mark.parametrize(("median", "said"), [(10.0, "met, 2 times over"), (4.0, "missed: 4 of 5, 80% of the aim")])
def test_a_verdict_says_by_how_much(median: float, said: str) -> None:
    aim = Aim(side="multiplexed", figure="p99_s", kind="open", least=5)
    came_out = Spread(least=1.0, median=median, most=20.0, count=3)
    assert str(Verdict(aim=aim, came_out=came_out)) == said
    assert str(Verdict(aim=aim, came_out=None)) == "not measured"


def test_server_timing_is_read_in_seconds() -> None:
    assert timings_s("load;dur=1.500, exec;dur=20") == {"load": 0.0015, "exec": 0.02}
    with pytest.raises(RequestFailed):
        timings_s("")


def test_every_side_and_repeat_gets_its_own_piece_of_the_same_stream() -> None:
    def stream() -> Stream:
        return Stream(parse_trace("zipf:models=3&requests=4000", seed=1), ["a", "b", "c"], repeats=2, seed=1)

    assert list(islice(stream().models(1), 50)) == list(islice(stream().models(1), 50))
    assert list(islice(stream().models(0), 50)) != list(islice(stream().models(1), 50))
    assert stream().arrivals(0, rate_per_s=5.0, seconds=9.0) == stream().arrivals(0, rate_per_s=5.0, seconds=9.0)


def test_the_open_loop_has_the_rate_that_was_asked_for() -> None:
    stream = Stream(parse_trace("zipf:models=9&rate=0.01&requests=4000", seed=1), ["a", "b"], repeats=1, seed=1)
    arrivals = stream.arrivals(0, rate_per_s=10.0, seconds=100.0)
    assert 900 < len(arrivals) < 1100
    assert arrivals[0][0] == 0.0
    assert arrivals[-1][0] < 100.0
    assert {model for _, model in arrivals} == {"a", "b"}


def test_a_stream_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        Stream(parse_trace("zipf:models=3&requests=5", seed=1), ["a"], repeats=3, seed=1)


def load(books: LruBooks, model: str) -> tuple[str, ...]:
    """A request that loads a model, from beginning to end; what it displaced."""
    step = books.ask(model)
    assert step.kind == "load"
    for victim in step.victims:
        books.unloaded(victim)
    books.loaded(model)
    books.done(model)
    return step.victims


def test_the_least_recently_used_model_leaves() -> None:
    books = LruBooks(100, SIZES)
    assert load(books, "a") == load(books, "b") == ()
    assert books.ask("a").kind == "hit"
    books.done("a")
    assert load(books, "c") == ("b",)
    assert books.models == ("a", "c")
    assert load(books, "large") == ("a", "c")
    assert books.used_bytes == 100


def test_a_model_in_use_is_not_displaced() -> None:
    books = LruBooks(100, SIZES)
    load(books, "a")
    load(books, "b")
    books.ask("a")
    assert load(books, "c") == ("b",)
    assert books.ask("large").kind == "wait"
    assert books.models == ("a", "c")
    books.done("a")
    assert books.ask("large").victims == ("a", "c")


def test_a_second_request_joins_a_load_and_uses_the_model() -> None:
    books = LruBooks(100, SIZES)
    assert books.ask("a").kind == "load"
    assert books.ask("a").kind == "join"
    assert books.is_ready("a") is False
    books.loaded("a")
    books.done("a")
    assert books.is_ready("a") is True
    assert books.ask("large").kind == "wait"
    books.done("a")
    assert books.ask("large").victims == ("a",)


def test_a_model_is_not_loaded_before_it_has_been_unloaded() -> None:
    books = LruBooks(100, SIZES)
    load(books, "a")
    assert books.ask("large").victims == ("a",)
    books.loaded("large")
    books.done("large")
    assert books.ask("a").kind == "wait"
    books.unloaded("a")
    assert books.ask("a").kind == "load"


def test_a_model_that_is_being_loaded_is_not_displaced() -> None:
    books = LruBooks(100, SIZES)
    books.ask("a")
    assert books.ask("large").kind == "wait"


def test_a_load_that_fails_leaves_nothing_behind() -> None:
    books = LruBooks(100, SIZES)
    books.ask("a")
    books.failed("a")
    assert books.is_ready("a") is None
    assert (books.used_bytes, books.models) == (0, ())


def test_a_model_that_can_never_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="large has 100 bytes"):
        LruBooks(99, SIZES)
