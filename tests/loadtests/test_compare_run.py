"""The course of a comparison, with sides that answer at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loadtests.compare import run as course
from loadtests.compare.drive import open_loop
from loadtests.compare.http import Reply, RequestFailed
from loadtests.compare.processes import Memory, SideFailed
from loadtests.compare.report import Result, as_json, ratio, verdicts
from loadtests.compare.run import Load, Outcome
from loadtests.compare.stream import Stream
from loadtests.compare.zoo import SETTINGS, Zoo
from serve_app.workload.spec import parse_trace

pytestmark = pytest.mark.slow

MODELS = {f"m{number}": 10 for number in range(5)}
LOAD = Load(repeats=2, connections=2, closed_s=0.05, open_s=0.05, rate_per_s=100.0)


class Fake:
    """A side and its clients in one: every second request of a model is a hit.

    Args:
        starts: whether it comes up.
        answers: whether it answers a request, by its number.
        likely: the class that it finds.
    """

    def __init__(
        self, *, starts: bool = True, answers: Callable[[int], bool] = lambda number: True, likely: int = 1
    ) -> None:
        self._starts, self._answers, self._likely = starts, answers, likely
        self._number = 0
        self.is_stopped = False

    def start(self) -> None:
        if not self._starts:
            raise SideFailed("no such\nport")

    def connect(self) -> Fake:
        return self

    def classify(self, model: str, image: bytes, top_k: int = 5) -> Reply:
        self._number += 1
        if not self._answers(self._number):
            raise RequestFailed("503 busy")
        outcome = "hit" if self._number % 2 else "load"
        wait_s = 0.0 if outcome == "hit" else 0.001
        return Reply(outcome=outcome, wait_s=wait_s, queue_s=0.0, exec_s=0.001, predictions={self._likely: 1.0})

    def close(self) -> None:
        pass

    def memory(self) -> Memory:
        return Memory(serving_peak_bytes=30, serving_bytes=20, all_bytes=40, processes=1)

    def cpu_s(self) -> float:
        return 0.0

    def held_bytes(self) -> int:
        return 20

    def stop(self) -> None:
        self.is_stopped = True


def compare(sides: dict[str, Fake], monkeypatch: pytest.MonkeyPatch) -> Result:
    monkeypatch.setattr(course, "SIDES", {name: lambda zoo, side=side: side for name, side in sides.items()})
    nowhere = Path("nowhere")
    zoo = Zoo(
        setting=SETTINGS["small"],
        folder=nowhere,
        store=nowhere,
        catalog=nowhere,
        mapped_catalog=nowhere,
        spec=nowhere,
        sizes=MODELS,
        memory_bytes=20,
        slots=2,
    )
    stream = Stream(parse_trace("zipf:models=5&requests=2000", seed=0), list(MODELS), repeats=LOAD.repeats, seed=0)
    outcome: Outcome = course.run(zoo, list(sides), stream, LOAD, lambda said: None)
    return Result(zoo=zoo, load=LOAD, outcome=outcome)


def test_sides_are_measured_in_every_repeat_and_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = {"edgeserve": Fake(), "multiplexed": Fake()}
    result = compare(sides, monkeypatch)
    for measured in result.outcome.sides.values():
        assert {kind: len(rows) for kind, rows in measured.figures.items()} == {"closed": 2, "open": 2}
        assert all(row.requests and not row.failures for rows in measured.figures.values() for row in rows)
        assert measured.held_bytes == 20
    assert not result.outcome.gaps
    assert not result.outcome.differ
    assert all(side.is_stopped for side in sides.values())
    found = ratio(result, "multiplexed", "closed", "throughput_per_s")
    assert found is not None
    assert found.count == 2
    assert as_json(result)["times_better"]["multiplexed"]["closed"]["p50_s"]["count"] == 2


def test_every_side_gets_the_same_requests_in_the_open_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    result = compare({"edgeserve": Fake(), "multiplexed": Fake()}, monkeypatch)
    ours, theirs = ([row.requests for row in measured.figures["open"]] for measured in result.outcome.sides.values())
    assert ours == theirs


def test_a_side_that_does_not_come_up_leaves_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = {"edgeserve": Fake(), "multiplexed": Fake(starts=False)}
    result = compare(sides, monkeypatch)
    assert result.outcome.gaps == {"multiplexed": "no such port"}
    assert list(result.outcome.sides) == ["edgeserve"]
    assert {str(verdict) for verdict in verdicts(result)} == {"not measured"}
    assert sides["multiplexed"].is_stopped


def test_a_side_that_answers_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    result = compare({"edgeserve": Fake(), "mlserver": Fake(answers=lambda number: False)}, monkeypatch)
    assert result.outcome.gaps == {"mlserver": "it comes up, but does not answer: 503 busy"}


def test_failed_requests_are_counted_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    result = compare({"edgeserve": Fake(), "mlserver": Fake(answers=lambda number: number % 4 != 0)}, monkeypatch)
    measured = result.outcome.sides["mlserver"]
    assert all(row.failures for row in measured.figures["closed"])
    assert measured.problems == ("503 busy",)


def test_an_interrupted_open_loop_ends() -> None:
    def arrivals() -> Iterator[tuple[float, str]]:
        yield 0.0, "m0"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_loop(Fake, arrivals(), b"")


def test_a_side_that_answers_otherwise_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    result = compare({"edgeserve": Fake(), "multiplexed": Fake(likely=2)}, monkeypatch)
    assert result.outcome.differ == {"multiplexed": "5 of 5 models: m0, m1, m2"}


def test_without_ours_there_is_nothing_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = {"edgeserve": Fake(starts=False), "multiplexed": Fake()}
    with pytest.raises(SideFailed, match="edgeserve cannot be measured: no such port"):
        compare(sides, monkeypatch)
    assert all(side.is_stopped for side in sides.values())
