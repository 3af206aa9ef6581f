"""The claims of "Many Models at the Edge" (ACSOS 2021), with its figures beside ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table

from serve_app.simulator.report import percent
from serve_app.simulator.rows import Row
from serve_app.simulator.runner import Cell, Plan
from serve_app.simulator.scenario import ALL_POLICIES, Capacity, PolicyChoice, Workload

#: The memory at which the claims are made, and those that are compared besides, as shares of all models.
HALF = 0.50
SHARES = (0.10, 0.25, HALF)
#: More of them, for the picture.
PLOT_SHARES = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.40, HALF, 0.60, 0.75, 0.90, 1.00)

#: The paper's policy, which knows the future, the paper's way of doing without, and ours.
_OF_THE_PAPER, _OURS = "belady-am", "edgeserve"
_CLAIMANTS = (_OF_THE_PAPER, "belady-am-online", _OURS)
#: They look at the workload only: at when models were asked for, and neither at their sizes nor at their load times.
#: `random` looks at nothing at all, and `belady` at what is to come.
WORKLOAD_ONLY = ("fifo", "lru", "lfu", "modelmesh")
_OF_HALF, _OF_RANDOM, _LOWER_BY = 0.92, 0.36, 0.166


@dataclass(frozen=True, slots=True)
class Range:
    """A figure over several seeds."""

    least: float
    most: float

    def __str__(self) -> str:
        return self.shown(percent)

    def shown(self, one: Callable[[float], str]) -> str:
        """Least and most, or the one figure if they read the same."""
        least, most = one(self.least), one(self.most)
        return least if least == most else f"{least} .. {most}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One claim of the paper for one policy. It holds if it does so for every seed; ``ours`` is ``None`` if unknown."""

    text: str
    paper: str
    policy: str
    ours: Range | None
    holds: bool


def paper_plan(workloads: Sequence[Workload]) -> Plan:
    """Every policy on every workload; on the first one with the memories of the picture, too."""
    cells = []
    for number in range(len(workloads)):
        shares = sorted({*SHARES, *PLOT_SHARES}) if number == 0 else SHARES
        for share in shares:
            for name in ALL_POLICIES:
                policy = PolicyChoice(label=name, name=name)
                cells.append(Cell(workload=number, policy=policy, capacity=Capacity(given_share=share)))
    return Plan(workloads=tuple(workloads), cells=tuple(cells))


class Results:
    """Load over exec of all replays, by seed, share of memory and policy."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = tuple(rows)
        self.seeds = tuple(dict.fromkeys(row.seed for row in rows))
        self._ratios = {(row.seed, row.capacity_share, row.policy): row.load_over_exec for row in rows}

    def load_over_exec(self, share: float, policy: str) -> Range | None:
        """Over all seeds."""
        return self._range(lambda seed: self._ratios[seed, share, policy])

    def compared(self, share: float, policy: str, other: str) -> Range | None:
        """Load over exec of ``policy`` over that of ``other``, seed by seed."""
        return self._range(lambda seed: self._compared(seed, share, policy, other))

    def lower_by(self, share: float, policy: str, others: Sequence[str]) -> Range | None:
        """By what share of it the load delay is below that of the best of ``others``, seed by seed."""
        return self._range(lambda seed: self._lower_by(seed, share, policy, others))

    def lower_by_up_to(self, policy: str, others: Sequence[str]) -> Range | None:
        """The same with the memory with which it is most, seed by seed."""

        def most(seed: int) -> float | None:
            found = [self._lower_by(seed, share, policy, others) for share in SHARES]
            return max((each for each in found if each is not None), default=None)

        return self._range(most)

    def preload_over_exec(self, share: float, policy: str) -> Range | None:
        """Seconds of background loads over those of executions, over all seeds."""
        # In the load-delay model a request takes its load and its execution, and nothing else.
        found = [
            row.preload_s_per_request / exec_s
            for row in self.rows
            if row.capacity_share == share
            and row.policy == policy
            and (exec_s := row.mean_latency_s - row.load_s_per_request) > 0
        ]
        return Range(min(found), max(found)) if found else None

    def claims(self) -> Iterator[Claim]:
        """All claims, each for the paper's two policies and for ours."""
        for policy in _CLAIMANTS:
            ratio = self.load_over_exec(HALF, policy)
            yield _below("load over exec with half the memory", _OF_HALF, policy, ratio)
        for policy in _CLAIMANTS:
            ratio = self.compared(HALF, policy, "random")
            yield _below("load over exec as a share of that of random, with half the memory", _OF_RANDOM, policy, ratio)
        for policy, others in [*((each, WORKLOAD_ONLY) for each in _CLAIMANTS), (_OF_THE_PAPER, ("belady",))]:
            lower = self.lower_by_up_to(policy, others)
            named = f"the best of {', '.join(others)}" if len(others) > 1 else f"{others[0]}, which knows the future"
            yield Claim(
                text=f"load delay lower than with {named}: with 10, 25 or 50 % of the memory by up to",
                paper=percent(_LOWER_BY),
                policy=policy,
                ours=lower,
                holds=lower is not None and lower.least >= _LOWER_BY,
            )

    def _compared(self, seed: int, share: float, policy: str, other: str) -> float | None:
        mine, theirs = self._ratios[seed, share, policy], self._ratios[seed, share, other]
        return mine / theirs if mine is not None and theirs else None

    def _lower_by(self, seed: int, share: float, policy: str, others: Sequence[str]) -> float | None:
        compared = [self._compared(seed, share, policy, other) for other in others]
        # The best of them is the one beside which this policy looks worst.
        worst = max((each for each in compared if each is not None), default=None)
        return None if worst is None else 1 - worst

    def _range(self, of_seed: Callable[[int], float | None]) -> Range | None:
        found = [each for each in map(of_seed, self.seeds) if each is not None]
        return Range(min(found), max(found)) if found else None


def claims_table(results: Results) -> Table:
    """Every claim with the paper's figure, ours, and whether it holds."""
    table = Table(box=None, header_style="bold", pad_edge=False, title_justify="left")
    table.add_column("claim", max_width=58)
    table.add_column("paper", justify="right", no_wrap=True)
    table.add_column("policy", no_wrap=True)
    table.add_column("ours", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    previous = ""
    for claim in results.claims():
        verdict = "[green]holds[/]" if claim.holds else "[red]does not hold[/]"
        oracle = " (oracle)" if claim.policy == _OF_THE_PAPER else ""
        text = "" if claim.text == previous else claim.text
        table.add_row(text, claim.paper, f"{claim.policy}{oracle}", _shown(claim.ours), verdict)
        previous = claim.text
    return table


def policies_table(results: Results) -> Table:
    """Load over exec of every policy with every memory, what ours loads besides, and ours over the paper's oracle."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("load over exec with", no_wrap=True)
    for share in SHARES:
        table.add_column(f"{share:.0%} of the memory", justify="right", no_wrap=True)
    for policy in ALL_POLICIES:
        table.add_row(policy, *(_shown(results.load_over_exec(share, policy)) for share in SHARES))
    compulsory = [row.compulsory_load_over_exec for row in results.rows if row.compulsory_load_over_exec is not None]
    floor = Range(min(compulsory), max(compulsory)) if compulsory else None
    table.add_row("compulsory", *(_shown(floor) for _ in SHARES), end_section=True)
    table.add_row(
        f"{_OURS}: background loads",
        *(_shown(results.preload_over_exec(share, _OURS)) for share in SHARES),
    )
    ratios = [results.compared(share, _OURS, _OF_THE_PAPER) for share in SHARES]
    table.add_row(
        f"{_OURS} / {_OF_THE_PAPER}",
        *(ratio.shown(lambda one: f"{one:.2f}") if ratio else "-" for ratio in ratios),
        style="bold",
    )
    return table


def _below(text: str, bound: float, policy: str, ours: Range | None) -> Claim:
    return Claim(
        text=text,
        paper=f"< {bound:.0%}",
        policy=policy,
        ours=ours,
        holds=ours is not None and ours.most < bound,
    )


def _shown(figure: Range | None) -> str:
    return "-" if figure is None else str(figure)
