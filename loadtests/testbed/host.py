"""One host of a testbed: its processes, its network interface, its power."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import shlex
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from loadtests.testbed import machine
from loadtests.testbed.disk import USER
from loadtests.testbed.machine import TestbedError, ip


class Surroundings(Protocol):
    """What a host needs of the testbed that it belongs to."""

    @property
    def namespace(self) -> str:
        """The namespace that joins the hosts."""

    @property
    def folder(self) -> Path:
        """Where the testbed keeps its files."""

    @property
    def key(self) -> Path:
        """The private key that all hosts accept."""

    @property
    def home(self) -> str:
        """The home folder on every host."""

    @property
    def network(self) -> ipaddress.IPv4Network:
        """The addresses of the hosts."""

    @property
    def memory_bytes(self) -> int | None:
        """The memory of every host; None: unlimited."""

    @property
    def shared(self) -> list[str]:
        """Folders of the machine that hosts see as they are."""

    def environment(self) -> dict[str, str]:
        """Variables of every process on a host."""

    def connect_ports(self) -> None:
        """Join the ports of all hosts that are up."""


#: How long a host, or the switch, may take to answer.
BOOT_S = 20.0
#: Programs that run on hosts and in namespaces.
SCRIPTS = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Host:
    """One host of a testbed. ``address`` is its own; everything else of it ends with it, but for its home."""

    name: str
    address: str
    testbed: Surroundings

    @property
    def namespace(self) -> str:
        """Its network namespace, as ``ip netns`` knows it."""
        return f"{self.testbed.namespace}.{self.name}"

    @property
    def folder(self) -> Path:
        """Where the machine keeps its home (``home``) and the log of its sshd (``sshd.log``)."""
        return self.testbed.folder / "hosts" / self.name

    def command(self, *command: str, folder: str = "~") -> list[str]:
        """What to run on the machine so that ``command`` runs on this host, as after a login.

        It enters the host through the kernel, so it works where the network does not.

        Raises:
            TestbedError: the host is off.
        """
        first = machine.first_process(self.namespace) if self.namespace in machine.namespaces(self.namespace) else None
        if first is None:
            raise TestbedError(f"{self.name} is off; boot it first")
        environment = [f"{name}={value}" for name, value in self.testbed.environment().items()]
        where = folder if folder != "~" else self.testbed.home
        return [
            *self._joining(self._cgroup()),
            machine.program("nsenter"), f"--target={first}", "--pid", "--net", "--mount", "--uts", "--ipc", "--cgroup",
            "--", "env", "-i", *environment, "sh", "-c", 'cd "$0" && exec "$@"', where, *command,
        ]  # fmt: skip

    def run(
        self, *command: str, timeout_s: float = 60.0, check: bool = True, folder: str = "~"
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on this host and wait for it.

        Raises:
            TestbedError: the host is off; or ``check``, and the command failed.
            subprocess.TimeoutExpired: it took longer than ``timeout_s`` and was killed.
        """
        done = subprocess.run(
            self.command(*command, folder=folder),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        if check and done.returncode != 0:
            raise TestbedError(f"{self.name}: {shlex.join(command)}: {done.stderr.strip() or done.returncode}")
        return done

    def ssh_command(self, *command: str) -> list[str]:
        """What to run on the machine to log in to this host, or to run ``command`` on it."""
        return [
            machine.program("ssh"), "-i", str(self.testbed.key), "-o", "IdentitiesOnly=yes", "-o", "LogLevel=ERROR",
            "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", f"{USER}@{self.address}", *command,
        ]  # fmt: skip

    def processes(self) -> list[int]:
        """Every process of this host, its first one and its sshd included, as the machine numbers them."""
        return machine.processes(self.namespace) if self.namespace in machine.namespaces(self.namespace) else []

    def received_bytes(self) -> int:
        """What has come in through its network interface so far. What a host sends to itself never gets there."""
        return int(machine.links(self.namespace)["eth0"]["stats64"]["rx"]["bytes"])

    def sent_bytes(self) -> int:
        """What has gone out through its network interface so far."""
        return int(machine.links(self.namespace)["eth0"]["stats64"]["tx"]["bytes"])

    def used_bytes(self) -> int | None:
        """The memory that it uses, page cache included; None if the testbed sets no limits."""
        return machine.used_bytes(self.namespace)

    def state(self) -> str:
        """``up``, ``cut`` (off the network) or ``off``."""
        if self.namespace not in machine.namespaces(self.namespace) or not self.processes():
            return "off"
        return "up" if "UP" in machine.links(self.testbed.namespace)[self.name]["flags"] else "cut"

    def cut(self) -> None:
        """Take it off the network; it runs on, and can still talk to itself."""
        self._require_running()
        ip("link", "set", "dev", self.name, "down", namespace=self.testbed.namespace)

    def heal(self) -> None:
        """Put it back on the network."""
        self._require_running()
        ip("link", "set", "dev", self.name, "up", namespace=self.testbed.namespace)

    def kill(self) -> None:
        """End it at once, as on loss of power: nobody is told, not even by the ends of its connections."""
        if self.namespace not in machine.namespaces(self.namespace):
            return
        if self.name in machine.links(self.testbed.namespace):
            ip("link", "delete", "dev", self.name, namespace=self.testbed.namespace)
        machine.kill(self.processes)
        # Its connections go with it: the next one to boot knows nothing of them.
        ip("netns", "delete", self.namespace)

    def boot(self) -> None:
        """Start it, for the first time or after ``kill``: with its address and home, and an empty ``/tmp``.

        Raises:
            TestbedError: it runs already, or its sshd does not answer.
        """
        if self.processes():
            raise TestbedError(f"{self.name} is running; kill it first")
        self.kill()
        lan = self.testbed.namespace
        ip("netns", "add", self.namespace)
        mac = machine.mac(self.address)
        # fmt: off
        ip("link", "add", "name", self.name, "type", "veth",
           "peer", "name", "eth0", "address", mac, "netns", self.namespace, namespace=lan)
        # fmt: on
        address = f"{self.address}/{self.testbed.network.prefixlen}"
        ip("address", "add", address, "dev", "eth0", namespace=self.namespace)
        for device in ("lo", "eth0"):
            ip("link", "set", "dev", device, "up", namespace=self.namespace)
        ip("link", "set", "dev", self.name, "up", namespace=lan)
        self.testbed.connect_ports()
        self._start()
        self._await_ssh()

    def _start(self) -> None:
        group = self._cgroup()
        version = "" if group is None else "1" if group.parent.name == "memory" else "2"
        home = self.testbed.home
        plan = {
            "hostname": self.name,
            "home": home,
            "cgroup": version,
            "sshd": self._sshd(),
            "shared": self.testbed.shared,
        }
        (self.folder / "plan.json").write_text(json.dumps(plan))
        command = [
            *self._joining(group), *machine.inside(self.namespace),
            machine.program("unshare"), "--pid", "--fork", "--mount", "--uts", "--ipc", "--cgroup", "--mount-proc",
            machine.python(), "-I", str(SCRIPTS / "host_init.py"), str(self.folder),
        ]  # fmt: skip
        machine.start(command, self.folder / "sshd.log", self.testbed.environment())

    def _sshd(self) -> list[str]:
        """The command that runs the sshd of this host."""
        variables = " ".join(f'"{name}={value}"' for name, value in self.testbed.environment().items())
        options = {
            "HostKey": self.testbed.folder / "host_key",
            "AuthorizedKeysFile": self.testbed.folder / "key.pub",
            "PidFile": "none",
            "StrictModes": "no",
            "UsePAM": "no",
            "UseDNS": "no",
            "PasswordAuthentication": "no",
            "MaxStartups": "100",
            "SetEnv": variables,
        }
        (self.folder / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in options.items()))
        return [machine.program("sshd"), "-D", "-e", "-f", str(self.folder / "sshd_config")]

    def _await_ssh(self) -> None:
        deadline_s = time.monotonic() + BOOT_S
        started = False
        while True:
            with contextlib.suppress(OSError), socket.create_connection((self.address, 22), timeout=1.0) as connection:
                if connection.recv(4) == b"SSH-":
                    return
            running = bool(self.processes())
            if time.monotonic() > deadline_s or (started and not running):
                said = " ".join((self.folder / "sshd.log").read_text().split()[-40:])
                raise TestbedError(f"{self.name} does not answer: {said or 'its sshd says nothing'}")
            started = running
            time.sleep(0.05)

    def _cgroup(self) -> Path | None:
        memory_bytes = self.testbed.memory_bytes
        return machine.make_cgroup(self.namespace, memory_bytes) if memory_bytes else None

    @staticmethod
    def _joining(group: Path | None) -> list[str]:
        """What a command begins with that is to run in a cgroup, as its children will."""
        return ["sh", "-c", f'echo 0 > {shlex.quote(str(group / "cgroup.procs"))} && exec "$@"', "sh"] if group else []

    def _require_running(self) -> None:
        if self.state() == "off":
            raise TestbedError(f"{self.name} is off; boot it first")
