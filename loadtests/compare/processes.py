"""The processes of one side: started here, known by a mark in their environment, ended by their ids."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]

_MARK = "EDGESERVE_COMPARE_SIDE"
_STOP_S = 10.0
_KILL_ROUNDS = 10


class SideFailed(Exception):
    """A side cannot take part, in one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of a side's processes: ``serving`` are those on the way of a request, ``all`` also what manages them.

    Peaks are the sum of every process's own; pages that processes share count in each of them.
    """

    serving_peak_bytes: int
    serving_bytes: int
    all_bytes: int
    processes: int


class Processes:
    """What one side has started.

    Args:
        name: of the side.
        serving: how the titles of those begin that a request passes through; without any, all of them.
    """

    def __init__(self, name: str, serving: Sequence[str] = ()) -> None:
        self._name = name
        self._serving = tuple(serving)
        self._mark = f"{name}-{uuid.uuid4().hex}"
        # Ray's sockets live below it, and their paths must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="cmp-"))
        self._log = self.folder / "output.log"

    def environment(self, variables: Mapping[str, str]) -> dict[str, str]:
        """The user's, without what would lead Ray or EdgeServe elsewhere."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "EDGESERVE_"))}
        return {
            **inherited,
            "PYTHONPATH": str(ROOT),
            "RAY_TMPDIR": str(self.folder),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            _MARK: self._mark,
            **variables,
        }

    def start(self, command: Sequence[str], variables: Mapping[str, str], cwd: Path = ROOT) -> subprocess.Popen[bytes]:
        """Start a process whose output goes to a log."""
        with self._log.open("ab") as log:
            return subprocess.Popen(
                command,
                env=self.environment(variables),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def await_ready(self, process: subprocess.Popen[bytes], is_ready: Callable[[], bool], timeout_s: float) -> None:
        """Wait until it serves; raises ``SideFailed``."""
        deadline_s = time.monotonic() + timeout_s
        while not is_ready():
            if process.poll() is not None:
                raise SideFailed(f"it ended with code {process.returncode}: {self.last_words()}")
            if time.monotonic() > deadline_s:
                raise SideFailed(f"it did not serve within {timeout_s:.0f} s: {self.last_words()}")
            time.sleep(0.2)

    def last_words(self) -> str:
        """The last line of the log."""
        lines = self._log.read_text(errors="replace").split("\n") if self._log.is_file() else []
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "no output")

    def stop(self) -> None:
        """End all of them, and remove their folder."""
        family = self._family()
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        psutil.wait_procs(family, timeout=_STOP_S)
        # HAProxy replaces itself while it is shut down, so one look is not enough.
        for _ in range(_KILL_ROUNDS):
            left = self._family()
            if not left:
                break
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(left, timeout=1.0)
        shutil.rmtree(self.folder, ignore_errors=True)

    def cpu_s(self) -> float:
        """Seconds of processor time that they have used; of those that have ended, nothing is known."""
        used_s = 0.0
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                used_s += times.user + times.system
        return used_s

    def memory(self) -> Memory:
        """What they take now, and have taken at most."""
        family = self._family()
        known = [(self._is_serving(process), _status_bytes(process.pid)) for process in family]
        return Memory(
            serving_peak_bytes=sum(status.get("VmHWM", 0) for serving, status in known if serving),
            serving_bytes=sum(status.get("VmRSS", 0) for serving, status in known if serving),
            all_bytes=sum(status.get("VmRSS", 0) for _, status in known),
            processes=len(known),
        )

    def _is_serving(self, process: psutil.Process) -> bool:
        try:
            return not self._serving or " ".join(process.cmdline()).startswith(self._serving)
        except psutil.Error:
            return False

    def _family(self) -> list[psutil.Process]:
        """All inherit the mark; one that changes its title may lose it, so children of the others count as well."""
        family: dict[int, psutil.Process] = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(_MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    family |= {member.pid: member for member in (process, *process.children(recursive=True))}
        return list(family.values())


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _status_bytes(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {key: int(value.split()[0]) * 1024 for key, value in (line.split(":", 1) for line in lines) if "kB" in value}
