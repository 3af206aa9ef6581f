"""What the testbed asks of the machine: commands, namespaces, processes, memory cgroups. It keeps no state."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from fcntl import LOCK_EX, flock
from pathlib import Path
from typing import Any

_NETNS = Path("/run/netns")
_CGROUPS = Path("/sys/fs/cgroup")
_STATE_PARENT = Path("/var/lib")
#: Where a user's PATH may not lead.
_SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin"
_PROGRAMS = {
    "ip": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setsid": "util-linux",
    "mount": "util-linux",
}
_COMMAND_S = 30.0


class TestbedError(Exception):
    """Something that the testbed cannot do, in one line."""

    __test__ = False


def missing(*, memory: bool = False) -> str | None:
    """What this machine lacks for a testbed, in one line; None if it has everything.

    Args:
        memory: whether hosts are to have memory limits.
    """
    if not Path("/proc/self/ns/net").exists():
        return "a testbed needs Linux"
    if os.geteuid() != 0:
        return "a testbed needs root: it makes network namespaces"
    absent = [f"{name} (package {package})" for name, package in _PROGRAMS.items() if _which(name) is None]
    if absent:
        return f"a testbed needs {', '.join(absent)}"
    tried = subprocess.run([program("unshare"), "--net", "--mount", "--pid", "--fork", "true"], capture_output=True)
    if tried.returncode != 0:
        return "a testbed needs namespaces, and this machine does not let even root make them (a container?)"
    if memory and _memory_controller() is None:
        return "limits of memory need the memory controller of cgroups at /sys/fs/cgroup"
    return None


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{_SYSTEM_PATH}")


def program(name: str) -> str:
    """Full path of a program; sshd insists on it."""
    found = _which(name)
    if found is None:
        raise TestbedError(f"a testbed needs {name} (package {_PROGRAMS[name]})")
    return found


def run(*command: str) -> str:
    """Output of a command of the system.

    Raises:
        TestbedError: it failed; the message is what it said.
    """
    done = subprocess.run(
        [program(command[0]), *command[1:]], capture_output=True, text=True, timeout=_COMMAND_S, check=False
    )
    if done.returncode != 0:
        raise TestbedError(f"{' '.join(command)}: {' '.join(done.stderr.split()) or done.returncode}")
    return done.stdout


def ip(*arguments: str, namespace: str | None = None) -> str:
    """Output of ``ip``, in a network namespace if one is given."""
    return run("ip", *(("-n", namespace) if namespace else ()), *arguments)


def links(namespace: str) -> dict[str, dict[str, Any]]:
    """The network interfaces in a namespace, as ``ip -json -statistics link`` shows them."""
    return {link["ifname"]: link for link in json.loads(ip("-json", "-statistics", "link", namespace=namespace))}


def namespaces(prefix: str) -> list[str]:
    """The named network namespaces that begin like that."""
    return sorted(path.name for path in _NETNS.glob(f"{prefix}*")) if _NETNS.is_dir() else []


def inside(namespace: str) -> list[str]:
    """What a command begins with that is to run in a network namespace."""
    return [program("nsenter"), f"--net={_NETNS / namespace}"]


def processes(namespace: str) -> list[int]:
    """Every process in a network namespace, whoever has started it."""
    return [int(pid) for pid in ip("netns", "pids", namespace).split()]


def first_process(namespace: str) -> int | None:
    """The process in a network namespace that is number 1 in a process namespace of its own."""
    for pid in processes(namespace):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            numbers = next(line.split()[1:] for line in status.splitlines() if line.startswith("NSpid:"))
            if len(numbers) > 1 and numbers[-1] == "1":
                return pid
    return None


def running(script: str, argument: str) -> list[int]:
    """The processes that run a script of that file name, wherever it lies, with that first argument."""
    wanted = (os.fsencode(script), os.fsencode(argument))
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
            if wanted in zip((os.path.basename(word) for word in words), words[1:], strict=False):  # noqa: PTH119
                found.append(int(entry.name))
    return found


def kill(find: Callable[[], list[int]]) -> None:
    """Kill what ``find`` finds until it finds nothing.

    Raises:
        TestbedError: something would not die.
    """
    deadline_s = time.monotonic() + _COMMAND_S
    while left := find():
        if time.monotonic() > deadline_s:
            raise TestbedError(f"processes {left} cannot be killed")
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def in_use(network: ipaddress.IPv4Network) -> bool:
    """Whether an address or a route of this machine, but for the default route, lies in ``network``."""
    routes = [route["dst"] for route in json.loads(ip("-json", "-4", "route", "show", "table", "all"))]
    known = [ipaddress.ip_network(route, strict=False) for route in routes if route != "default"]
    return any(network.overlaps(route) for route in known if isinstance(route, ipaddress.IPv4Network))


def _memory_controller() -> tuple[Path, str] | None:
    """Where memory cgroups are made, and which of their files holds the limit: version 1 or 2."""
    if (_CGROUPS / "memory" / "memory.limit_in_bytes").exists():
        return _CGROUPS / "memory", "memory.limit_in_bytes"
    with contextlib.suppress(OSError):
        if "memory" in (_CGROUPS / "cgroup.subtree_control").read_text().split():
            return _CGROUPS, "memory.max"
    return None


def make_cgroup(name: str, limit_bytes: int) -> Path:
    """A memory cgroup with a limit; what is written to its ``cgroup.procs`` joins it."""
    controller = _memory_controller()
    if controller is None:
        raise TestbedError("limits of memory need the memory controller of cgroups at /sys/fs/cgroup")
    group = controller[0] / name
    group.mkdir(exist_ok=True)
    (group / controller[1]).write_text(str(limit_bytes))
    return group


def used_bytes(name: str) -> int | None:
    """The memory that a cgroup uses, page cache included; None if it does not exist."""
    controller = _memory_controller()
    with contextlib.suppress(OSError):
        if controller is not None:
            used = "memory.usage_in_bytes" if controller[0] != _CGROUPS else "memory.current"
            return int((controller[0] / name / used).read_text())
    return None


def remove_cgroups(prefix: str) -> None:
    """Remove the empty memory cgroups that begin like that."""
    controller = _memory_controller()
    if controller is None:
        return
    for group in controller[0].glob(f"{prefix}*"):
        deadline_s = time.monotonic() + _COMMAND_S
        while True:
            # The last process of a group leaves it a moment after its death.
            try:
                group.rmdir()
                break
            except OSError as error:
                if time.monotonic() > deadline_s:
                    raise TestbedError(f"cannot remove {group}: {error.strerror}") from None
                time.sleep(0.02)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let no other testbed be made or removed meanwhile."""
    descriptor = os.open(_STATE_PARENT, os.O_RDONLY)
    try:
        flock(descriptor, LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def state_folder() -> Path:
    """Where testbeds keep keys, homes and logs."""
    return _STATE_PARENT / "edgeserve-testbed"


def mac(address: str) -> str:
    """Fixed, so that who knew a host before its reboot still does."""
    return "02:e5:" + ":".join(f"{byte:02x}" for byte in ipaddress.IPv4Address(address).packed)


def python() -> str:
    """An interpreter that is there on every host, unlike one in a virtual environment below /tmp."""
    return str(Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}")


def start(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
    """Start something that outlives this process."""
    with log.open("ab") as output:
        subprocess.run(
            [program("setsid"), "--fork", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            check=True,
        )
