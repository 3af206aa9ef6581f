"""One setting from beginning to end: deploy every side, see that they answer alike, send the load, count."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from loadtests.compare.drive import FAILED, Sample, closed_loop, open_loop
from loadtests.compare.figures import Figures, figures, hits_of
from loadtests.compare.http import Reply, RequestFailed
from loadtests.compare.processes import Memory, SideFailed
from loadtests.compare.sides import OURS, SIDES, Side
from loadtests.compare.stream import Kind, Stream
from loadtests.compare.zoo import Zoo

KINDS: tuple[Kind, ...] = ("closed", "open")
_ALL_CLASSES = 1000
#: Probabilities may differ by this share between sides that compute in a different order; below the second, they are 0.
_SAME, _NOTHING = 0.02, 1e-6
#: The open loop sends this share of what the slowest side has served in the closed loop.
_BEARABLE = 0.5
_IMAGE_PX = (320, 240)
#: A side that answers for none of so many models is left out.
_TRIED = 3

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How long and how much: of each repeat, ``closed_s`` and ``open_s`` of load on every side, in turns.

    ``rate_per_s`` of the open loop; None: half of what the slowest side has served first in the closed loop.
    """

    repeats: int
    connections: int
    closed_s: float
    open_s: float
    rate_per_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One side: its figures by kind of load, one for each repeat, its samples of the open loop, and its memory.

    ``held_bytes`` are the weights that it held at most when it was looked, after every slice. ``cpu_s`` is processor
    time by request, of all its processes; ``idle_cpu`` the cores that they keep busy while it is the turn of others.
    """

    figures: Mapping[Kind, Sequence[Figures]]
    latencies_s: Mapping[Kind, Sequence[float]]
    problems: Sequence[str]
    memory: Memory
    held_bytes: int
    cpu_s: Mapping[Kind, Sequence[float]]
    idle_cpu: float


@dataclass(slots=True)
class Outcome:
    """One setting: what was measured, why what is missing is missing, and which sides answer otherwise."""

    rate_per_s: float = 0.0
    sides: dict[str, Measured] = field(default_factory=dict)
    gaps: dict[str, str] = field(default_factory=dict)
    differ: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Book:
    warm_up: list[Sample] = field(default_factory=list)
    slices: dict[Kind, list[list[Sample]]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    held_bytes: int = 0
    cpu_s: dict[Kind, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    busy_s: float = 0.0


def run(zoo: Zoo, names: Sequence[str], stream: Stream, load: Load, say: Say) -> Outcome:
    """Measure these sides on the same models, memory, image and requests."""
    outcome = Outcome()
    image = make_image()
    with _deployed(zoo, names, outcome, say) as sides:
        books = {name: _Book() for name in sides}
        answers: dict[str, dict[str, Reply]] = {}
        for name, side in list(sides.items()):
            say(f"{name} answers for every model, twice")
            try:
                answers[name] = _warm_up(side, zoo, image, books[name])
            except SideFailed as error:
                _leave_out(name, error, outcome, say)
                del sides[name], books[name]
        outcome.differ = _differences(answers)
        order = list(sides)
        began_s, cpu_began_s = time.perf_counter(), {name: side.cpu_s() for name, side in sides.items()}
        for repeat in range(load.repeats):
            for kind in KINDS:
                for name in order:
                    say(f"repeat {repeat + 1} of {load.repeats}: {kind} loop, {name}")
                    _turn(kind, sides[name], books[name], stream, repeat, load, outcome.rate_per_s, image)
                if kind == "closed" and not repeat:
                    outcome.rate_per_s = load.rate_per_s or _bearable(books)
            order = order[1:] + order[:1]
        lasted_s = time.perf_counter() - began_s
        for name in (name for name in names if name in sides):
            used_s = sides[name].cpu_s() - cpu_began_s[name]
            outcome.sides[name] = _measured(books[name], sides[name].memory(), used_s, lasted_s)
    return outcome


def make_image() -> bytes:
    """A JPEG of colored clouds, as large as a small photograph."""
    noise = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize(_IMAGE_PX, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


@contextmanager
def _deployed(zoo: Zoo, names: Sequence[str], outcome: Outcome, say: Say) -> Iterator[dict[str, Side]]:
    """The sides that come up, in the order of the names; all that were started are stopped."""
    made = {name: SIDES[name](zoo) for name in names}
    up: dict[str, Side] = {}
    try:
        say(f"starting {', '.join(names)}")
        with ThreadPoolExecutor(len(made)) as pool:
            starts = {name: pool.submit(side.start) for name, side in made.items()}
        for name, start in starts.items():
            try:
                start.result()
                up[name] = made[name]
            except (SideFailed, OSError) as error:
                _leave_out(name, error, outcome, say)
        yield up
    finally:
        say("stopping")
        with ThreadPoolExecutor(len(made)) as pool:
            for stop in [pool.submit(side.stop) for side in made.values()]:
                stop.result()


def _leave_out(name: str, error: Exception, outcome: Outcome, say: Say) -> None:
    outcome.gaps[name] = " ".join(str(error).split())
    say(f"{name} is left out: {outcome.gaps[name]}")
    if name == OURS:
        raise SideFailed(f"{OURS} cannot be measured: {outcome.gaps[name]}")


def _warm_up(side: Side, zoo: Zoo, image: bytes, book: _Book) -> dict[str, Reply]:
    """Every model twice: all files are in the page cache afterwards, and every model was hit once.

    Raises:
        SideFailed: none of the first few could be had.
    """
    answers: dict[str, Reply] = {}
    connection = side.connect()
    try:
        for number, model in enumerate(zoo.sizes):
            if number == _TRIED and not answers:
                raise SideFailed(f"it comes up, but does not answer: {book.warm_up[0].problem}")
            for _ in range(2):
                try:
                    reply = connection.classify(model, image, _ALL_CLASSES)
                except RequestFailed as error:
                    failed = Sample(model=model, due_s=0.0, done_s=0.0, outcome=FAILED, problem=str(error))
                    book.warm_up.append(failed)
                    continue
                answers[model] = reply
                book.warm_up.append(
                    Sample(
                        model=model,
                        due_s=0.0,
                        done_s=0.0,
                        outcome=reply.outcome,
                        wait_s=reply.wait_s,
                        queue_s=reply.queue_s,
                        exec_s=reply.exec_s,
                    )
                )
    finally:
        connection.close()
    return answers


def _differences(answers: Mapping[str, Mapping[str, Reply]]) -> dict[str, str]:
    """Sides whose answers are not ours, and for how many models."""
    differ = {}
    for name, mine in answers.items():
        wrong = [
            model
            for model, reply in answers[OURS].items()
            if model not in mine or not _is_same(reply.predictions, mine[model].predictions)
        ]
        if wrong:
            differ[name] = f"{len(wrong)} of {len(answers[OURS])} models: {', '.join(wrong[:3])}"
    return differ


def _is_same(ours: Mapping[int, float], theirs: Mapping[int, float]) -> bool:
    return ours.keys() == theirs.keys() and all(
        math.isclose(probability, theirs[index], rel_tol=_SAME, abs_tol=_NOTHING) for index, probability in ours.items()
    )


def _turn(
    kind: Kind, side: Side, book: _Book, stream: Stream, repeat: int, load: Load, rate_per_s: float, image: bytes
) -> None:
    cpu_began_s, began_s = side.cpu_s(), time.perf_counter()
    samples = _slice(kind, side, stream, repeat, load, rate_per_s, image)
    book.busy_s += time.perf_counter() - began_s
    book.cpu_s[kind].append(side.cpu_s() - cpu_began_s)
    book.slices[kind].append(samples)
    book.held_bytes = max(book.held_bytes, _held_bytes(side))


def _slice(
    kind: Kind, side: Side, stream: Stream, repeat: int, load: Load, rate_per_s: float, image: bytes
) -> list[Sample]:
    if kind == "open":
        return open_loop(side.connect, stream.arrivals(repeat, rate_per_s=rate_per_s, seconds=load.open_s), image)
    models = stream.models(repeat)
    return closed_loop(side.connect, models, image, connections=load.connections, seconds=load.closed_s)


def _bearable(books: Mapping[str, _Book]) -> float:
    slowest = min(
        (len([sample for sample in samples if not sample.is_failed]) / max(sample.done_s for sample in samples))
        for samples in (book.slices["closed"][0] for book in books.values())
    )
    return max(_BEARABLE * slowest, 0.5)


def _held_bytes(side: Side) -> int:
    try:
        return side.held_bytes()
    except RequestFailed:
        return 0


def _measured(book: _Book, memory: Memory, used_s: float, lasted_s: float) -> Measured:
    counted: dict[Kind, list[Figures]] = {}
    for kind, slices in book.slices.items():
        hits = hits_of((sample for samples in slices for sample in samples), book.warm_up)
        counted[kind] = [figures(samples, hits) for samples in slices]
    everything = [sample for slices in book.slices.values() for samples in slices for sample in samples]
    problems = {sample.problem: None for sample in (*book.warm_up, *everything) if sample.is_failed}
    return Measured(
        figures=counted,
        latencies_s={
            kind: [sample.latency_s for samples in slices for sample in samples if not sample.is_failed]
            for kind, slices in book.slices.items()
        },
        problems=tuple(problems),
        memory=memory,
        held_bytes=book.held_bytes,
        cpu_s={
            kind: [used / len(samples) for used, samples in zip(book.cpu_s[kind], slices, strict=True) if samples]
            for kind, slices in book.slices.items()
        },
        idle_cpu=max(0.0, used_s - sum(map(sum, book.cpu_s.values()))) / max(lasted_s - book.busy_s, 1e-9),
    )
