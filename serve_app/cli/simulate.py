"""``edgeserve simulate``: policies side by side on a request stream."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from serve_app.cli.console import check_writable, stderr, stdout, warn, writing
from serve_app.config.edge import WorkerSettings
from serve_app.core.policies.registry import ORACLES, POLICIES

# numpy, matplotlib and the simulator itself are imported when a command runs: --help should not wait for them.
if TYPE_CHECKING:
    from serve_app.simulator.discrete_event.settings import Coordination
    from serve_app.simulator.result_row import ResultRow
    from serve_app.simulator.runner import ExperimentPlan, TimeModel
    from serve_app.simulator.scenario import PolicyChoice, Workload

_DEFAULT_TRACE = "azure-like:"
_DEFAULT_POLICIES = ("lru", "gdsf", "belady-am-online", "edgeserve", "belady-am")
_DEFAULT_CAPACITIES = ("50%",)
_DEFAULT_SEEDS = 3
_PAPER_PLOT = Path("edgeserve-paper.png")
_PLOT_FORMATS = (".png", ".svg", ".pdf")

_Parsed = TypeVar("_Parsed")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """The command line as click has parsed it."""

    trace: str | None
    models: Path | None
    mapping: str
    policies: tuple[str, ...]
    forms: tuple[str, ...]
    capacities: tuple[str, ...]
    locations: int | None
    time_model: TimeModel
    coordination: Coordination | None
    seed: int
    jobs: int | None
    as_json: bool
    csv: Path | None
    plot: Path | None
    paper: bool
    seeds: int | None
    benchmark: bool
    data: Path | None

    def given(self) -> frozenset[str]:
        """The names of the options that are not at a default of nothing."""
        return frozenset(field.name for field in fields(self) if getattr(self, field.name) not in (None, (), False))

    def workload(self, trace: str, models: Path | None, *, seed: int) -> Workload:
        """Make the requests of a trace.

        Args:
            trace: as ``--trace`` takes it.
            models: the table of model profiles, None for the default one.
            seed: of everything random in it.
        """
        from serve_app.simulator.scenario import make_workload

        return make_workload(
            trace=trace, models=models, keep=self.mapping == "keep", locations=self.locations, seed=seed
        )


_WORKLOAD_OPTIONS = (
    click.option("--trace", metavar="T", help=f"The requests; see above.  [default: {_DEFAULT_TRACE}]"),
    click.option(
        "--models",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="What models cost, a CSV table: name,size_mb,load_s,exec_s.  [default: 26 torchvision models on a CPU]",
    ),
    click.option(
        "--map",
        "mapping",
        type=click.Choice(("random", "keep")),
        default="random",
        show_default=True,
        help="What a model of the trace costs: a random row of the table, or the row that has its name.",
    ),
)
_EXPERIMENT_OPTIONS = (
    click.option(
        "--policy",
        "policies",
        multiple=True,
        metavar="P",
        help=f"{', '.join((*POLICIES, *ORACLES))}, or all; several with commas.  "
        f"[default: {','.join(_DEFAULT_POLICIES)}]",
    ),
    click.option(
        "--capacity",
        "capacities",
        multiple=True,
        metavar="C",
        help="Memory of a location, 2GiB or 25% of what all models take; several with commas.  "
        f"[default: {','.join(_DEFAULT_CAPACITIES)}]",
    ),
    click.option(
        "--forms",
        multiple=True,
        metavar="F",
        help="The forms that models have: tiered, soonest, compiled, or the name of one, mapped; several with commas. "
        "The table of models needs a column form.  [default: models have one form]",
    ),
    click.option("--locations", type=click.IntRange(1, 10_000), help="Spread the requests over so many locations."),
    click.option(
        "--time",
        "time_model",
        type=click.Choice(("load-delay", "full")),
        default="load-delay",
        show_default=True,
        help="Count waiting for loads alone, or simulate queues, links and coordination as well.",
    ),
    click.option(
        "--coordination",
        type=click.Choice(("none", "forwarding", "full")),
        help="With --time full: locations on their own; that forward to each other; with models placed as well.  "
        "[default: full]",
    ),
    click.option("--seed", type=click.IntRange(0, 2**63), default=0, show_default=True, help="Of everything random."),
    click.option("--jobs", type=click.IntRange(1, 1024), help="Replays at the same time.  [default: one per core]"),
)
_OUTPUT_OPTIONS = (
    click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    click.option(
        "--csv", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write the rows there."
    ),
    click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.png", help="Draw them."),
)
_STUDY_OPTIONS = (
    click.option(
        "--paper", is_flag=True, help=f"Check the paper's claims on the reference workload; draws {_PAPER_PLOT}."
    ),
    click.option("--seeds", type=click.IntRange(1, 1000), help=f"With --paper: how many.  [default: {_DEFAULT_SEEDS}]"),
    click.option("--benchmark", is_flag=True, help="Measure how fast the decisions are."),
    click.option("--data", type=click.Path(path_type=Path), metavar="DIR", help="Folder of the reference files."),
)


def _all_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed((*_WORKLOAD_OPTIONS, *_EXPERIMENT_OPTIONS, *_OUTPUT_OPTIONS, *_STUDY_OPTIONS)):
        command = option(command)
    return command


@click.command()
@_all_options
def simulate(**parsed: Any) -> None:
    """Replay requests through caches with one eviction policy or several, and show what each makes of them.

    The figure to compare is load/exec: seconds that requests waited for loads, over seconds of execution; less is
    better. Seconds of background loads, for which no request waits, stand under preload/exec.

    \b
    edgeserve simulate --policy all --capacity 10%,25%,50% --plot policies.png
    edgeserve simulate --trace "zipf:models=50&rate=2" --policy lru --policy "modelmesh:churn_age=5min"
    edgeserve simulate --trace "azure:FILE?minutes=60" --models FILE --json
    edgeserve simulate --trace sessions:days=2 --capacity 25% --locations 4 --time full --coordination forwarding
    edgeserve simulate --trace sessions: --policy edgeserve --forms tiered,mapped,compiled --capacity 10%,25%,50%
    edgeserve simulate --paper

    \b
    T is one of these, with parameters KEY=VALUE joined by &; write azure:FILE?KEY=VALUE, zipf:KEY=VALUE
      azure:FILE    of Azure Functions 2019 (.csv, .csv.gz): minutes (N or A-B), trigger, max_quantile, drop_one_hit
      csv:FILE      with the columns arrival_s,model[,location][,user]
      zipf:         independent requests: models, exponent, rate, requests, arrivals, cv, locations, location_skew
      azure-like:   generated functions: functions, minutes, start_hour, rate_cap, max_quantile, drop_one_hit
      sessions:     generated users: days, models, sessions_per_day, users
    """
    options = _Options(**parsed)
    _check_compatible(options)
    if options.benchmark:
        _benchmark(options)
        return
    _check_writable(options)
    if options.paper:
        _paper(options)
    else:
        _compare(options)


def _check_compatible(options: _Options) -> None:
    """Refuse options that contradict each other.

    Raises:
        click.UsageError: some do.
    """
    given = options.given()
    is_full = options.time_model == "full"
    if given >= {"paper", "benchmark"}:
        raise click.UsageError("--paper and --benchmark are two commands; choose one")
    if given & {"paper", "benchmark"} and (is_full or given & {"policies", "capacities", "forms"}):
        raise click.UsageError(
            "--paper and --benchmark choose policies, capacities, forms and the model of time themselves"
        )
    if "benchmark" in given and given & {"trace", "models", "locations", "as_json", "csv", "plot"}:
        raise click.UsageError("--benchmark takes --data and --seed alone")
    if "data" in given and not given & {"paper", "benchmark"}:
        raise click.UsageError("--data is for --paper and --benchmark")
    if "data" in given and given & {"trace", "models"}:
        raise click.UsageError("--data names the reference files, --trace and --models others; choose one")
    if "seeds" in given and "paper" not in given:
        raise click.UsageError("--seeds is for --paper")
    if "coordination" in given and not is_full:
        raise click.UsageError("--coordination is for --time full")


def _compare(options: _Options) -> None:
    """Replay one workload with every policy and capacity."""
    from serve_app.simulator.result_table import as_table, summary
    from serve_app.simulator.runner import ExperimentPlan, ReplaySpec
    from serve_app.simulator.scenario import parse_capacities, parse_policies

    policies = _parsed(parse_policies, options.policies or _DEFAULT_POLICIES, "--policy")
    capacities = _parsed(parse_capacities, options.capacities or _DEFAULT_CAPACITIES, "--capacity")
    workloads = _workloads(options)
    workload = workloads[0]
    coordination = options.coordination or "full"
    if options.time_model == "full":
        _warn_of_overload(workload)
        if coordination != "none" and len(workload.trace.locations) > 1:
            policies = _without_oracles(policies)
    replays = tuple(
        ReplaySpec(workload=number, policy=policy, capacity=capacity)
        for capacity in capacities
        for policy in policies
        for number in range(len(workloads))
    )
    plan = ExperimentPlan(workloads=workloads, replays=replays, time=options.time_model, coordination=coordination)
    rows = _run(plan, options.jobs)
    _warn_of_rejections(rows, workload.largest_bytes)
    if not options.as_json:
        stdout().print(summary(rows), markup=False)
        stdout().print(as_table(rows, ORACLES))
    _write(rows, options)


def _workloads(options: _Options) -> tuple[Workload, ...]:
    """Make the workload of the options, once for each choice of forms."""
    from serve_app.simulator.scenario import make_workloads, parse_forms

    trace = options.trace or _DEFAULT_TRACE
    if not options.forms:
        return (options.workload(trace, options.models, seed=options.seed),)
    try:
        return make_workloads(
            trace=trace,
            choices=parse_forms(options.forms),
            models=options.models,
            keep=options.mapping == "keep",
            locations=options.locations,
            seed=options.seed,
        )
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--forms") from None


def _paper(options: _Options) -> None:
    """Replay the reference workload with several seeds, and check the paper's claims."""
    from serve_app.simulator.studies.paper import NOTES, PaperResults, claims_table, paper_plan, policies_table
    from serve_app.simulator.studies.reference_workload import Reference, find_reference

    if options.trace is None and options.models is None:
        reference = find_reference(options.data)
    else:
        trace = options.trace or _DEFAULT_TRACE
        reference = Reference(label=f"{trace}, as asked for", trace=trace, models=options.models)
    if reference.warning:
        stderr().print(reference.warning, style="bold yellow", markup=False)
    seeds = range(options.seed, options.seed + (options.seeds or _DEFAULT_SEEDS))
    workloads = [options.workload(reference.trace, reference.models, seed=seed) for seed in seeds]
    options = replace(options, plot=options.plot or _PAPER_PLOT)
    _check_writable(options)
    rows = _run(paper_plan(workloads), options.jobs)
    results = PaperResults(rows)
    # With --json, stdout is for programs.
    shown = stderr() if options.as_json else stdout()
    first = workloads[0].trace
    several = f"; seeds {seeds[0]} to {seeds[-1]}, least .. most" if len(seeds) > 1 else ""
    counts = f"{len(first):,} requests for {len(first.models):,} models"
    shown.print(f"{reference.label}: {counts} (seed {seeds[0]}){several}\n", markup=False)
    shown.print(policies_table(results))
    shown.print()
    shown.print(claims_table(results))
    shown.print(f"\n{NOTES}", markup=False)
    _write(rows, options, drawn=[row for row in rows if row.seed == seeds[0]])


def _benchmark(options: _Options) -> None:
    from serve_app.simulator.studies.reference_workload import find_reference
    from serve_app.simulator.studies.speed import benchmark

    benchmark(find_reference(options.data), seed=options.seed, out=stdout(), err=stderr())


def _run(plan: ExperimentPlan, jobs: int | None) -> tuple[ResultRow, ...]:
    from serve_app.simulator.runner import run

    # Terminated, the command ends its processes as well.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with _progress(plan.requests) as on_progress:
            return run(plan, jobs=jobs or _cores(), on_progress=on_progress)
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _progress(requests: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on stderr if that is a terminal."""
    console = stderr()
    if not console.is_terminal:
        yield lambda _: None
        return
    columns = (TextColumn("replaying"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=requests)
        yield lambda done: progress.update(task, completed=done)


def _without_oracles(chosen: Sequence[PolicyChoice]) -> tuple[PolicyChoice, ...]:
    """Leave out oracles: they know the requests of each location, but not those that others will forward to it."""
    left = tuple(policy for policy in chosen if not policy.is_oracle)
    why = "a policy that knows the future cannot know what locations will forward to each other"
    if not left:
        raise click.BadParameter(f"{why}; try --coordination none", param_hint="--policy")
    if len(left) < len(chosen):
        out = ", ".join(policy.label for policy in chosen if policy.is_oracle)
        warn(f"{out} left out: {why}")
    return left


def _warn_of_overload(workload: Workload) -> None:
    """Warn of queues that grow to the end of the trace: they hide the differences between policies."""
    slots = WorkerSettings().parallel_inferences * len(workload.trace.locations)
    if workload.executions_at_a_time > slots:
        warn(
            f"the requests take {workload.executions_at_a_time:.1f} executions at a time, and the locations run "
            f"{slots}: queues grow to the end, and latencies say little; try more --locations"
        )


def _warn_of_rejections(rows: Sequence[ResultRow], largest_bytes: int) -> None:
    # The last of each capacity has the most.
    rejecting = sorted((row for row in rows if row.rejected), key=lambda row: row.rejected)
    for row in {row.capacity_bytes: row for row in rejecting}.values():
        if row.capacity_bytes >= largest_bytes:
            warn(f"up to {row.rejected:,} requests found the wait queue full; they count as misses")
            continue
        what = "no model fits" if row.rejected == row.requests else "some models do not fit"
        warn(f"{what} into {row.capacity_bytes} bytes; their requests count as misses that load every time")


def _write(rows: Sequence[ResultRow], options: _Options, drawn: Sequence[ResultRow] = ()) -> None:
    from serve_app.simulator.result_table import as_csv, as_json

    if options.as_json:
        click.echo(as_json(rows))
    if options.csv:
        with writing(options.csv):
            options.csv.write_text(as_csv(rows), encoding="utf-8")
    if options.plot:
        # matplotlib takes a second.
        from serve_app.simulator.result_plot import plot

        with writing(options.plot):
            plot(drawn or rows, options.plot, oracles=ORACLES)


def _check_writable(options: _Options) -> None:
    """Refuse files that cannot be written, before the run whose results go there."""
    for option, path in (("--csv", options.csv), ("--plot", options.plot)):
        if path is not None:
            check_writable(option, path)
    if options.plot is not None and options.plot.suffix.lower() not in _PLOT_FORMATS:
        raise click.BadParameter(f"{options.plot}: must end in {', '.join(_PLOT_FORMATS)}", param_hint="--plot")


def _parsed(parse: Callable[[Sequence[str]], _Parsed], texts: Sequence[str], option: str) -> _Parsed:
    try:
        return parse(texts)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=option) from None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
