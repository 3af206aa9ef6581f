"""The claims of "Many Models at the Edge" (ACSOS 2021), with its figures beside the measured ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table

from serve_app.core.policies.registry import ORACLES
from serve_app.simulator.result_row import ResultRow
from serve_app.simulator.result_table import figures_table, percent
from serve_app.simulator.runner import LIVE_PRELOADS, MAX_PRELOADS, ExperimentPlan, ReplaySpec
from serve_app.simulator.scenario import ALL_POLICIES, Capacity, PolicyChoice, Workload

#: The memory of the claims, and all memories that are compared, as shares of all models.
HALF = 0.50
SHARES = (0.10, 0.25, HALF)
#: The memories of the plot.
PLOT_SHARES = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.40, HALF, 0.60, 0.75, 0.90, 1.00)

#: The policy of the paper, which knows the future, and ours.
_OF_THE_PAPER, _OURS = "belady-am", "edgeserve"
#: Ours with the background loads that a live worker runs by default.
_OURS_LIVE = f"{_OURS}, preloads {LIVE_PRELOADS} at a time"
_CLAIMANTS = (_OF_THE_PAPER, "belady-am-online", _OURS, _OURS_LIVE)
_SHOWN = (*(policy for policy in ALL_POLICIES if policy not in ORACLES), _OURS_LIVE, *ORACLES)
#: Policies that use the times of requests only, neither sizes nor load times. `random` uses nothing, and `belady` the
#: future.
WORKLOAD_ONLY = ("fifo", "lru", "lfu", "modelmesh")
_OF_HALF, _OF_RANDOM, _LOWER_BY = 0.92, 0.36, 0.166


@dataclass(frozen=True, slots=True)
class SeedRange:
    """The least and the greatest value of a figure over several seeds."""

    least: float
    most: float

    def __str__(self) -> str:
        return self.formatted(percent)

    def formatted(self, one: Callable[[float], str]) -> str:
        """Format both, or one of them if they read the same."""
        least, most = one(self.least), one(self.most)
        return least if least == most else f"{least} .. {most}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperClaim:
    """One claim of the paper for one policy; it holds if it holds for every seed. ``ours`` is None if unknown."""

    text: str
    paper: str
    policy: str
    ours: SeedRange | None
    holds: bool


def paper_plan(workloads: Sequence[Workload]) -> ExperimentPlan:
    """Plan every policy on every workload, and ours also as it runs live; the first with the memories of the plot."""
    replays = []
    for number in range(len(workloads)):
        shares = sorted({*SHARES, *PLOT_SHARES}) if number == 0 else SHARES
        for share in shares:
            for name in ALL_POLICIES:
                policy = PolicyChoice(label=name, name=name)
                replays.append(ReplaySpec(workload=number, policy=policy, capacity=Capacity(given_share=share)))
            live = PolicyChoice(label=_OURS_LIVE, name=_OURS)
            capacity = Capacity(given_share=share)
            replays.append(ReplaySpec(workload=number, policy=live, capacity=capacity, max_preloads=LIVE_PRELOADS))
    return ExperimentPlan(workloads=tuple(workloads), replays=tuple(replays))


class PaperResults:
    """Load over exec of all replays, by seed, share of memory and policy."""

    def __init__(self, rows: Sequence[ResultRow]) -> None:
        self.rows = tuple(rows)
        self.seeds = tuple(dict.fromkeys(row.seed for row in rows))
        self._ratios = {(row.seed, row.capacity_share, row.policy): row.load_over_exec for row in rows}

    def load_over_exec(self, share: float, policy: str) -> SeedRange | None:
        """Return load over exec of a policy, over all seeds."""
        return self._range(lambda seed: self._ratios.get((seed, share, policy)))

    def compared(self, share: float, policy: str, other: str) -> SeedRange | None:
        """Return load over exec of ``policy`` in parts of that of ``other``, seed by seed."""
        return self._range(lambda seed: self._compared(seed, share, policy, other))

    def lower_by_up_to(self, policy: str, others: Sequence[str]) -> SeedRange | None:
        """Return by what share the load delay is below that of the best of ``others``, at the memory with the most."""

        def most(seed: int) -> float | None:
            found = [self._lower_by(seed, share, policy, others) for share in SHARES]
            return max((each for each in found if each is not None), default=None)

        return self._range(most)

    def preload_over_exec(self, share: float, policy: str) -> SeedRange | None:
        """Return seconds of background loads over those of executions, over all seeds."""
        mine = [row for row in self.rows if (row.capacity_share, row.policy) == (share, policy)]
        found = [row.preload_over_exec for row in mine if row.preload_over_exec is not None]
        return SeedRange(min(found), max(found)) if found else None

    def claims(self) -> Iterator[PaperClaim]:
        """Yield all claims, each for the paper's two policies and for ours."""
        for policy in _CLAIMANTS:
            ratio = self.load_over_exec(HALF, policy)
            yield _below("load over exec with 50 % of the memory", _OF_HALF, policy, ratio)
        for policy in _CLAIMANTS:
            ratio = self.compared(HALF, policy, "random")
            yield _below("the same as a share of that of random", _OF_RANDOM, policy, ratio)
        for policy, others in [*((each, WORKLOAD_ONLY) for each in _CLAIMANTS), (_OF_THE_PAPER, ("belady",))]:
            lower = self.lower_by_up_to(policy, others)
            named = f"the best of {', '.join(others)}" if len(others) > 1 else f"{others[0]} (knows the future)"
            yield PaperClaim(
                text=f"load delay below {named}, by up to (10, 25 or 50 % of the memory)",
                paper=f"{_LOWER_BY:.1%}",
                policy=policy,
                ours=lower,
                holds=lower is not None and lower.least >= _LOWER_BY,
            )

    def _compared(self, seed: int, share: float, policy: str, other: str) -> float | None:
        mine, theirs = self._ratios.get((seed, share, policy)), self._ratios.get((seed, share, other))
        return mine / theirs if mine is not None and theirs else None

    def _lower_by(self, seed: int, share: float, policy: str, others: Sequence[str]) -> float | None:
        compared = [self._compared(seed, share, policy, other) for other in others]
        # The best of the others is the one with the highest ratio to it.
        worst = max((each for each in compared if each is not None), default=None)
        return None if worst is None else 1 - worst

    def _range(self, of_seed: Callable[[int], float | None]) -> SeedRange | None:
        found = [each for each in map(of_seed, self.seeds) if each is not None]
        return SeedRange(min(found), max(found)) if found else None


def claims_table(results: PaperResults) -> Table:
    """Make a table of every claim with the paper's figure, the measured one, and whether it holds."""
    table = figures_table("claim of the paper", ["its figure", "measured here", "with policy", "verdict"])
    previous = ""
    for claim in results.claims():
        verdict = "[green]holds[/]" if claim.holds else "[red]does not hold[/]"
        text = "" if claim.text == previous else claim.text
        table.add_row(text, claim.paper, _formatted(claim.ours), _policy_name(claim.policy), verdict)
        previous = claim.text
    return table


def policies_table(results: PaperResults) -> Table:
    """Make a table of load over exec of every policy with every memory, background loads, and ratios to the oracle."""
    table = figures_table("load over exec", [f"{share:.0%} of the memory" for share in SHARES])
    for policy in _SHOWN:
        table.add_row(_policy_name(policy), *(_formatted(results.load_over_exec(share, policy)) for share in SHARES))
    compulsory = [row.compulsory_load_over_exec for row in results.rows if row.compulsory_load_over_exec is not None]
    floor = SeedRange(min(compulsory), max(compulsory)) if compulsory else None
    table.add_row("each model loaded once, on demand", *(_formatted(floor) for _ in SHARES), end_section=True)
    for policy in (_OURS, _OURS_LIVE):
        preloads = [_formatted(results.preload_over_exec(share, policy)) for share in SHARES]
        table.add_row(f"background loads of {policy}", *preloads)
    table.add_section()
    for policy in (_OURS, _OURS_LIVE):
        ratios = [results.compared(share, policy, _OF_THE_PAPER) for share in SHARES]
        shown = (ratio.formatted(lambda one: f"{one:.2f}") if ratio else "-" for ratio in ratios)
        table.add_row(f"{policy} / {_OF_THE_PAPER}", *shown, style="bold")
    return table


#: Explains the tables.
NOTES = f"""\
Load over exec: seconds that requests waited for loads, over seconds of execution. Less is better.
{_OURS} alone loads in the background as well: up to {MAX_PRELOADS} models at a time here, {LIVE_PRELOADS} in a live
worker by default. No request waits for these, and here they slow nothing, so they are not in the load over exec:
background loads are seconds of such loads over seconds of execution. All other policies load on demand only.
The paper makes its claims for its own policies, belady-am and belady-am-online; {_OURS} is held to the same figures.
A claim holds if it does for every seed."""


def _below(text: str, bound: float, policy: str, ours: SeedRange | None) -> PaperClaim:
    return PaperClaim(
        text=text,
        paper=f"< {bound:.0%}",
        policy=policy,
        ours=ours,
        holds=ours is not None and ours.most < bound,
    )


def _policy_name(policy: str) -> str:
    return f"{policy} (knows the future)" if policy in ORACLES else policy


def _formatted(figure: SeedRange | None) -> str:
    return "-" if figure is None else str(figure)
