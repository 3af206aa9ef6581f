"""Clients that keep asking every location for something while parts of its cluster break."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import httpx
import numpy as np
from PIL import Image

from loadtests.support.testbed_cluster import Lab

_PAUSE_S = 0.1
_TIMEOUT_S, _CONNECT_S = 5.0, 1.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One request: when it was sent and answered, where it was sent, what came back at the first and second address."""

    sent_s: float
    done_s: float
    location: str
    status: int
    outcome: str
    again: int | None
    problem: str

    @property
    def broken(self) -> bool:
        """Whether it failed at the first address."""
        return self.status != httpx.codes.OK

    @property
    def lost(self) -> bool:
        """Whether it failed at the second address as well."""
        return self.broken and self.again != httpx.codes.OK


class Clients:
    """One client for each location: sends an image, waits for the answer, pauses, and so on.

    A request that fails, or is not answered within 5 s, is tried once more at another location.

    Args:
        made: what they ask.
        paths: what they ask for, below the address of a location; in turns.
    """

    def __init__(self, made: Lab, paths: Sequence[str]) -> None:
        self._lab = made
        self._paths = tuple(paths)
        self._over = threading.Event()
        self._lock = threading.Lock()
        self.answers: list[Answer] = []
        pixels = np.random.default_rng(0).integers(0, 255, (224, 224, 3), dtype=np.uint8)
        file = BytesIO()
        Image.fromarray(pixels).save(file, "JPEG")
        self._photo = file.getvalue()
        self._threads = [threading.Thread(target=self._run, args=(name,), daemon=True) for name in made.locations]

    def __enter__(self) -> Clients:
        """Start them."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop them when their requests have ended."""
        self._over.set()
        for thread in self._threads:
            thread.join()

    def since(self, began_s: float) -> list[Answer]:
        """What was sent since."""
        with self._lock:
            return [answer for answer in self.answers if answer.sent_s >= began_s]

    def under_way(self, at_s: float) -> list[Answer]:
        """What was under way at a time."""
        with self._lock:
            return [answer for answer in self.answers if answer.sent_s <= at_s <= answer.done_s]

    def first_hit_s(self, location: str, after_s: float) -> float | None:
        """When a request that was sent to a location after that was answered there, from memory."""
        with self._lock:
            return next(
                (
                    answer.done_s
                    for answer in self.answers
                    if answer.location == location
                    and answer.sent_s > after_s
                    and not answer.broken
                    and answer.outcome == "hit"
                ),
                None,
            )

    def _run(self, location: str) -> None:
        others = list(self._lab.locations)
        others.remove(location)
        turn = 0
        limits = httpx.Timeout(_TIMEOUT_S, connect=_CONNECT_S)
        with httpx.Client(timeout=limits, headers={"Content-Type": "image/jpeg"}) as http:
            while not self._over.wait(_PAUSE_S):
                turn += 1
                path = self._paths[turn % len(self._paths)]
                sent_s = time.monotonic()
                status, outcome, problem = self._ask(http, self._lab.url(location) + path)
                again = None
                if status != httpx.codes.OK:
                    again, _, problem_again = self._ask(http, self._lab.url(others[turn % 2]) + path)
                    problem = f"{problem}; then {problem_again}" if problem_again else problem
                answer = Answer(sent_s, time.monotonic(), location, status, outcome, again, problem)
                with self._lock:
                    self.answers.append(answer)

    def _ask(self, http: httpx.Client, url: str) -> tuple[int, str, str]:
        try:
            answer = http.post(url, content=self._photo)
        except httpx.HTTPError as error:
            return 0, "", repr(error)
        problem = "" if answer.status_code == httpx.codes.OK else f"{answer.status_code} {answer.text[:120]}"
        ran_at = answer.headers.get("X-EdgeServe-Location", "")
        outcome = answer.headers.get("X-EdgeServe-Outcome", "")
        return answer.status_code, outcome if ran_at else "", problem
