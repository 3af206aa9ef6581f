"""The first process of a host: it sets up what only this host sees, starts sshd, and buries the dead.

Run by path, as process 1 of new process, mount, hostname, IPC and cgroup namespaces, with one argument: the host's
folder. What ``Testbed`` has put there says the rest (``disk.py``).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def main(folder: Path) -> int:
    """Run the host until its sshd ends."""
    plan = json.loads((folder / "plan.json").read_text())
    socket.sethostname(plan["hostname"])
    _mounts(folder, plan)
    # The counters of a host's interface are compared with what it was sent, and IPv6 talks by itself.
    Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")
    os.chdir(plan["home"])
    server = subprocess.Popen(plan["sshd"], stdin=subprocess.DEVNULL)
    while True:
        pid, status = os.wait()
        if pid == server.pid:
            return os.waitstatus_to_exitcode(status)


def _mounts(folder: Path, plan: dict[str, Any]) -> None:
    # What is shared may lie in what is about to be covered.
    shared = {folder / "shared" / str(number): Path(path) for number, path in enumerate(plan["shared"])}
    for place, covered in shared.items():
        place.mkdir(parents=True, exist_ok=True)
        _mount("--bind", str(covered), str(place))
    _mount("-t", "sysfs", "sysfs", "/sys")
    if plan["cgroup"] == "1":
        _mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", "/sys/fs/cgroup")
        Path("/sys/fs/cgroup/memory").mkdir()
        _mount("-t", "cgroup", "-o", "memory", "cgroup", "/sys/fs/cgroup/memory")
    elif plan["cgroup"] == "2":
        _mount("-t", "cgroup2", "cgroup2", "/sys/fs/cgroup")
    _mount("--bind", str(folder / "home"), plan["home"])
    for name in ("passwd", "hosts"):
        _mount("--bind", str(folder / name), f"/etc/{name}")
    for path, mode in {"/tmp": "1777", "/dev/shm": "1777", "/run": "755"}.items():
        _mount("-t", "tmpfs", "-o", f"mode={mode}", "tmpfs", path)
    for path in ("/run/sshd", "/run/lock"):
        Path(path).mkdir()
    for place, covered in shared.items():
        covered.mkdir(parents=True, exist_ok=True)
        _mount("--bind", str(place), str(covered))


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
