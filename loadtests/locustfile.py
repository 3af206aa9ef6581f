"""Zipf load on a running deployment, and what came of it: outcomes, latencies, and whether memory stayed bounded.

    edgeserve up --detach
    locust -f loadtests/locustfile.py --headless -u 8 -t 30s --host http://127.0.0.1:8000

Models and locations are read from the deployment. Each user sends one request after the other: an image to a model
that is drawn by Zipf's law, at a location that is drawn evenly. Locust's own tables group the requests by outcome
(hit, join, load, forward); ours, printed last, adds hit ratios, shares and memory. The run ends by itself, with exit
code 1 if a request failed or a location used more memory than it has. One Locust process only: no --master, --worker
or --processes.

Options beside Locust's own, whose --help does not load this file:

    --exponent X       of Zipf's law; 0 makes all models equally popular (1)
    --location-skew X  how different the popularity is at the locations: 0 the same, 1 independent (0.5)
    --models M,M,...   only these models (all)
    --rate X           requests per second of all users together, with Poisson arrivals, as far as the users keep up
                       (0: each user sends as soon as the last answer is there)
    --seed N           of the requests and the images (0)
    --token T          if the deployment asks for one (the variable EDGESERVE_TOKEN)

Without -u, -r and -t, eight users run for 30 s.
"""

from __future__ import annotations

import io
import logging
import math
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, ClassVar, NoReturn
from urllib.parse import quote

import click
import gevent
import httpx
from locust import FastHttpUser, constant, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.runners import LocalRunner
from PIL import Image

from serve_app.workload.request import Request
from serve_app.workload.zipf import ZipfWorkload

#: What a deployment may answer; "failed" is everything that is no answer.
OUTCOMES = ("hit", "join", "load", "forward")
FAILED = "failed"

_DEFAULT_HOST = "http://127.0.0.1:8000"
_DEFAULT_USERS = 8
_DEFAULT_RUN_TIME = "30s"
#: At the end of a run, requests under way are waited for: to cut them off would be to lose them.
_STOP_TIMEOUT = "60s"

_IMAGES = 4
_IMAGE_PX = (640, 480)
_POLL_EVERY_S = 1.0
_TIMEOUT_S = 10.0
#: A user whose request failed rests, so that a deployment in trouble is not hammered.
_REST_S = 1.0


class Deployment:
    """What a deployment says about itself.

    Args:
        url: where its gateway answers.
        token: for deployments that ask for one.
    """

    def __init__(self, url: str, token: str | None) -> None:
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}
        # Proxies of the environment are not for a deployment under test.
        self._client = httpx.Client(base_url=url, headers=self.headers, timeout=_TIMEOUT_S, trust_env=False)

    def models(self) -> list[str]:
        """Every model of the catalog; raises ``httpx.HTTPError``."""
        return [model["name"] for model in self._json("POST", "/v2/repository/index")]

    def locations(self) -> list[dict[str, Any]]:
        """Every location with its memory; raises ``httpx.HTTPError``."""
        locations: list[dict[str, Any]] = self._json("GET", "/v1/locations")["locations"]
        return locations

    def _json(self, method: str, path: str) -> Any:
        return self._client.request(method, path).raise_for_status().json()


@dataclass(slots=True)
class Memory:
    """The most that a location was seen to use, in bytes, and how often that was more than it has."""

    used_bytes: int = 0
    capacity_bytes: int = 0
    breaches: int = 0


class Tally:
    """What a run has measured so far."""

    def __init__(self) -> None:
        self.latencies_ms: dict[str, list[float]] = defaultdict(list)
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.memory: dict[str, Memory] = defaultdict(Memory)
        self.polls = 0
        self.failed_polls = 0

    @property
    def requests(self) -> int:
        """Requests that came to an end."""
        return sum(map(len, self.latencies_ms.values()))

    @property
    def broken(self) -> list[str]:
        """Why the run counts as failed, one sentence each; empty if it does not."""
        reasons = {
            "no request came to an end": not self.requests,
            f"{len(self.latencies_ms[FAILED])} requests failed": bool(self.latencies_ms[FAILED]),
            f"{self.failed_polls} polls of /v1/locations failed": bool(self.failed_polls),
            "memory was never seen": not self.polls,
        }
        for name, memory in self.memory.items():
            reasons[f"{name} used more memory than it has in {memory.breaches} polls"] = bool(memory.breaches)
        return [reason for reason, applies in reasons.items() if applies]

    def add(self, location: str, outcome: str, latency_ms: float) -> None:
        """Count one request to ``location``."""
        self.latencies_ms[outcome].append(latency_ms)
        self.outcomes[location][outcome] += 1

    def see(self, locations: Iterable[dict[str, Any]]) -> None:
        """Count one look at the memory of all locations."""
        self.polls += 1
        for row in locations:
            memory = self.memory[row["name"]]
            memory.used_bytes = max(memory.used_bytes, row["used_bytes"])
            memory.capacity_bytes = max(memory.capacity_bytes, row["capacity_bytes"])
            memory.breaches += row["used_bytes"] > row["capacity_bytes"]


class Run:
    """One run of the load against one deployment, from the start of the first user to the end of the last."""

    def __init__(self, deployment: Deployment, workload: ZipfWorkload, *, paced: bool, seed: int) -> None:
        self.deployment = deployment
        self.workload = workload
        self.tally = Tally()
        self._paced = paced
        self._stream: Iterator[Request] = workload.requests()
        self._images = cycle(make_images(seed))
        self._began_s = time.monotonic()
        self._seconds: float | None = None
        self._poller = gevent.spawn(self._poll)

    def next(self) -> tuple[Request, bytes]:
        """The next request, when it is due, and its image."""
        request = next(self._stream)
        if self._paced:
            gevent.sleep(max(0.0, self._began_s + request.arrival_s - time.monotonic()))
        return request, next(self._images)

    def end(self) -> None:
        """Stop watching memory, after a last look."""
        if self._seconds is None:
            self._seconds = time.monotonic() - self._began_s
            self._poller.kill()
            self._look()

    def report(self) -> str:
        """The run as a table."""
        tally, workload = self.tally, self.workload
        total, seconds = tally.requests, self._seconds or 0.0
        hits = sum(len(tally.latencies_ms[outcome]) for outcome in ("hit", "join"))
        lines = [
            "",
            f"Zipf {workload.exponent:g}, location skew {workload.location_skew:g}, seed {workload.seed}: "
            f"{len(workload.models)} models, {len(workload.locations)} locations, {seconds:.1f} s",
            f"{total} requests ({_ratio(total, seconds):.1f} per second), {len(tally.latencies_ms[FAILED])} failures, "
            f"hit ratio {_ratio(hits, total):.3f} (hits and joins over requests)",
            "",
            f"{'outcome':<12}{'requests':>9}{'share':>8}{'p50 ms':>9}{'p95 ms':>9}{'p99 ms':>9}",
        ]
        for outcome in (*OUTCOMES, FAILED):
            lines.append(_latency_row(outcome, tally.latencies_ms[outcome], total))
        lines.append(_latency_row("all", [ms for many in tally.latencies_ms.values() for ms in many], total))
        lines += ["", f"{'location':<12}{'requests':>9}{'hit ratio':>11}{'most used / capacity':>26}"]
        lines += [self._location_row(name) for name in workload.locations]
        lines += ["", f"looked at memory {tally.polls} times: " + ("; ".join(tally.broken) or "never above capacity")]
        return "\n".join(lines)

    def _location_row(self, name: str) -> str:
        counts, memory = self.tally.outcomes[name], self.tally.memory[name]
        ratio = _ratio(counts["hit"] + counts["join"], counts.total())
        used = f"{memory.used_bytes / 2**20:.1f} / {memory.capacity_bytes / 2**20:.1f} MiB"
        return f"{name:<12}{counts.total():>9}{ratio:>11.3f}{used:>26}"

    def _poll(self) -> None:
        while True:
            self._look()
            gevent.sleep(_POLL_EVERY_S)

    def _look(self) -> None:
        try:
            self.tally.see(self.deployment.locations())
        except httpx.HTTPError:
            self.tally.failed_polls += 1


class ZipfUser(FastHttpUser):
    """Sends one request after the other, each the next of the run's stream."""

    host = _DEFAULT_HOST
    wait_time = constant(0)
    network_timeout = 90.0
    run_: ClassVar[Run]

    @task
    def classify(self) -> None:
        """Classify one image."""
        run = self.run_
        request, image = run.next()
        path = f"/{request.location}/v1/classify?model={quote(request.model_id)}"
        headers = {"Content-Type": "image/jpeg", **run.deployment.headers}
        body: Any = image  # Locust takes bytes but declares otherwise.
        with self.client.post(path, data=body, headers=headers, name=FAILED, catch_response=True) as response:
            problem = _problem(request, response.status_code, response.headers or {}, response.text)
            outcome = FAILED if problem else response.headers["x-edgeserve-outcome"]
            response.request_meta["name"] = outcome
            run.tally.add(request.location, outcome, response.request_meta["response_time"])
            if problem:
                response.failure(problem)
        if problem:
            gevent.sleep(_REST_S)


def make_images(seed: int) -> tuple[bytes, ...]:
    """A few JPEGs of colored clouds."""
    rng, images = random.Random(seed), []
    for _ in range(_IMAGES):
        small = Image.frombytes("RGB", (16, 12), rng.randbytes(16 * 12 * 3))
        buffer = io.BytesIO()
        small.resize(_IMAGE_PX, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        images.append(buffer.getvalue())
    return tuple(images)


def add_options(parser: LocustArgumentParser, **_: Any) -> None:
    """Our options, and defaults that bound the load where Locust has none."""
    parser.set_defaults(
        num_users=_DEFAULT_USERS, spawn_rate=_DEFAULT_USERS, run_time=_DEFAULT_RUN_TIME, stop_timeout=_STOP_TIMEOUT
    )
    parser.add_argument("--exponent", type=float, default=1.0, help="Of Zipf's law; 0: all models equally popular")
    parser.add_argument(
        "--location-skew", type=float, default=0.5, help="How different the locations are: 0 the same, 1 independent"
    )
    parser.add_argument("--models", default="", metavar="M,M,...", help="Only these models; without, all")
    parser.add_argument(
        "--rate", type=float, default=0.0, help="Requests per second of all users; 0: as fast as answers come"
    )
    parser.add_argument("--seed", type=int, default=0, help="Of the requests and the images")
    parser.add_argument(
        "--token", env_var="EDGESERVE_TOKEN", default="", is_secret=True, help="If the deployment asks for one"
    )


def begin(environment: Environment, **_: Any) -> None:
    """Read models and locations from the deployment and make the run; without them there is none."""
    if not isinstance(environment.runner, LocalRunner):
        _give_up(environment, "this load runs in one Locust process; leave out --master, --worker and --processes")
    options: Any = environment.parsed_options
    url = environment.host or _DEFAULT_HOST
    deployment = Deployment(url, options.token)
    try:
        models = deployment.models()
        locations = [location["name"] for location in deployment.locations()]
        workload = ZipfWorkload(
            models=_chosen(models, options.models, options.seed),
            locations=tuple(locations),
            exponent=options.exponent,
            location_skew=options.location_skew,
            rate_per_s=options.rate or 1.0,
            seed=options.seed,
        )
    except httpx.HTTPError as error:
        reason = str(error).partition("\n")[0]
        _give_up(environment, f"nothing answers as it should at {url} ({reason}); start it with: edgeserve up")
    except ValueError as error:
        _give_up(environment, str(error))
    ZipfUser.run_ = Run(deployment, workload, paced=options.rate > 0, seed=options.seed)


def finish(environment: Environment, **_: Any) -> None:
    """Judge the run, and print the table after Locust's own."""
    run = getattr(ZipfUser, "run_", None)
    if run is None:
        return
    run.end()
    if run.tally.broken:
        environment.process_exit_code = 1
    environment.events.quit.add_listener(lambda **_: click.echo(run.report()))


def _chosen(models: Sequence[str], wanted: str, seed: int) -> tuple[str, ...]:
    """The models to ask for, the most popular first, in an order that has nothing to do with their size."""
    names = [name.strip() for name in wanted.split(",") if name.strip()] or list(models)
    unknown = sorted(set(names) - set(models))
    if unknown:
        raise ValueError(f"the deployment has no model {', '.join(unknown)}; it has {', '.join(models)}")
    return tuple(random.Random(seed).sample(names, len(names)))


def _problem(request: Request, status: int, headers: Any, text: str | None) -> str | None:
    """What is wrong with an answer, if anything."""
    if status != httpx.codes.OK:
        return f"{status} {(text or '')[:200]}".strip() if status else "no answer"
    outcome, ran_at = headers.get("x-edgeserve-outcome"), headers.get("x-edgeserve-location")
    if outcome not in OUTCOMES:
        return f"the outcome is {outcome!r}"
    if headers.get("x-edgeserve-model") != request.model_id:
        return "another model answered"
    if (ran_at != request.location) != (outcome == "forward"):
        return f"a {outcome} for {request.location} ran at {ran_at}"
    return None


def _latency_row(name: str, latencies_ms: list[float], total: int) -> str:
    ordered = sorted(latencies_ms)
    shown = [f"{_percentile(ordered, share):9.1f}" if ordered else f"{'-':>9}" for share in (0.50, 0.95, 0.99)]
    return f"{name:<12}{len(ordered):>9}{_ratio(len(ordered), total):>8.1%}{''.join(shown)}"


def _percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of all values do not exceed."""
    return ordered[math.ceil(share * len(ordered)) - 1]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _give_up(environment: Environment, message: str) -> NoReturn:
    click.echo(f"locustfile: {message}", err=True)
    environment.process_exit_code = 1
    if environment.runner is not None:
        # From another greenlet, for it kills this one.
        gevent.spawn(environment.runner.quit)
    # Not Locust's own StopTest, which comes with a traceback of many lines.
    raise gevent.GreenletExit


# It would log every look at the memory.
logging.getLogger("httpx").setLevel(logging.WARNING)

events.init_command_line_parser.add_listener(add_options)
events.test_start.add_listener(begin)
events.test_stop.add_listener(lambda **_: ZipfUser.run_.end() if hasattr(ZipfUser, "run_") else None)
events.quitting.add_listener(finish)
