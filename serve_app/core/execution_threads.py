"""How many threads one execution uses."""

from __future__ import annotations

#: Shorter executions gain little: threads wait for each other at every operator. On two cores, of those that take 4 to
#: 8 ms two threads save 10 to 20 %, of those that take 30 ms and more 30 to 45 %.
_LONG_S = 0.005


def is_long(expected_s: float) -> bool:
    """Return whether an execution of so many seconds is worth several threads."""
    return expected_s >= _LONG_S


def threads_for(expected_s: float, *, others: int, machine_others: int, cores: int) -> int:
    """Return the threads of an execution that begins now: all cores of an idle machine, otherwise one.

    Executions side by side, one thread each, answer more requests than one after another on all cores.

    Args:
        expected_s: seconds that it probably takes in one thread.
        others: executions that run or wait in the same worker.
        machine_others: threads of whatever process that run on the machine or could.
        cores: of the machine, as far as the worker may use them.
    """
    if others or machine_others or not is_long(expected_s):
        return 1
    return cores
