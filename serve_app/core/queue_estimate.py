"""An estimate of how long a request waits for an execution slot."""

from __future__ import annotations


class QueueEstimate:
    """Estimates how long the next inference at one worker waits, from those that run or wait there."""

    __slots__ = ("_backlog_s", "jobs")

    def __init__(self) -> None:
        self.jobs = 0
        self._backlog_s = 0.0

    def add(self, exec_s: float) -> None:
        """Add an inference of about ``exec_s`` seconds."""
        self.jobs += 1
        self._backlog_s += exec_s

    def remove(self, exec_s: float) -> None:
        """Remove one that has ended; ``exec_s`` is what it was added with."""
        self.jobs -= 1
        # Sums of floats do not come out even.
        self._backlog_s = max(0.0, self._backlog_s - exec_s) if self.jobs else 0.0

    def wait_s(self, slots: int) -> float:
        """Return the seconds until one of ``slots`` is free; inferences that run are half done, on average."""
        if self.jobs < slots:
            return 0.0
        return self._backlog_s / self.jobs * (self.jobs - slots + 0.5) / slots
