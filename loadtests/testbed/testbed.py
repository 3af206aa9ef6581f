"""A testbed and its hosts. What exists is read from the system, so that whatever a killed tool has left is found."""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from loadtests.testbed import machine
from loadtests.testbed.disk import PROXY_PORT, make_folder, write
from loadtests.testbed.host import BOOT_S, SCRIPTS, Host
from loadtests.testbed.machine import TestbedError, ip

#: The machine itself, as an end of a delay.
MACHINE = "machine"
DEFAULT_NAME = "lab"

_NAME = re.compile(r"[a-z][a-z0-9]{0,10}")
_HOST_NAME = re.compile(r"[a-z][a-z0-9-]{0,13}")
_BRIDGE = "lan"
_NUMBERS = range(10, 250)


class Testbed:
    """Hosts on a network of their own, on this machine. As a context manager it takes itself down at the end.

    The network is a namespace with a bridge, which the machine joins with the first address and which leads nowhere
    else. Hosts install packages through a proxy of the machine, with its pip configuration and its pip cache.
    """

    __test__ = False

    def __init__(self, name: str) -> None:
        """A testbed that is up; ``Testbed.up`` makes one.

        Raises:
            TestbedError: there is no such testbed.
        """
        lacks = machine.missing()
        if lacks:
            raise TestbedError(lacks)
        self.name = _checked(name)
        try:
            self._plan: dict[str, Any] = json.loads((self.folder / "testbed.json").read_text())
        except OSError:
            known = ", ".join(names()) or "none is"
            raise TestbedError(f"testbed {name} is not up ({known}); up starts it") from None

    @classmethod
    def up(
        cls,
        hosts: Sequence[str],
        *,
        name: str = DEFAULT_NAME,
        memory_bytes: int | None = None,
        rtt_s: float | None = None,
        network: str | None = None,
        shared: Sequence[Path] = (),
    ) -> Testbed:
        """Make a testbed and start its hosts.

        Args:
            hosts: their names; the first gets the address ending in .10, the others follow.
            name: several testbeds can be up at a time.
            memory_bytes: the limit of each host's memory; no limit if None.
            rtt_s: the round trip between any two hosts; as fast as the kernel if None.
            network: such as 10.213.0.0/24; a free one if None.
            shared: folders of the machine below ``/tmp`` or ``/run`` that the hosts are to see as well; they see all
                that lies elsewhere.

        Raises:
            TestbedError: the machine lacks something, the name is taken, a host does not start. Nothing is left then.
        """
        lacks = machine.missing(memory=memory_bytes is not None)
        if lacks:
            raise TestbedError(lacks)
        _check_hosts(hosts)
        with machine.alone():
            if _checked(name) in names():
                raise TestbedError(f"testbed {name} is up already; down stops it")
            chosen = _free_network(network)
            addresses = {host: str(chosen[number]) for host, number in zip(hosts, _NUMBERS, strict=False)}
            plan = {
                "network": str(chosen),
                "hosts": addresses,
                "memory_bytes": memory_bytes,
                "shared": [str(folder.resolve(strict=True)) for folder in shared],
            }
            try:
                make_folder(_folder(name), plan)
                testbed = cls(name)
                testbed._make_network()
            except BaseException:
                remove(name)
                raise
        try:
            for host in testbed.hosts.values():
                host.boot()
            if rtt_s is not None:
                testbed.delay(rtt_s)
        except BaseException:
            testbed.down()
            raise
        return testbed

    def __enter__(self) -> Testbed:
        """This testbed."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take it down."""
        self.down()

    def down(self) -> None:
        """End every process of every host and remove every trace of the testbed."""
        with machine.alone():
            remove(self.name)

    @property
    def namespace(self) -> str:
        """The network namespace with the ports of all hosts."""
        return _namespace(self.name)

    @property
    def folder(self) -> Path:
        """Where the machine keeps what belongs to the testbed."""
        return _folder(self.name)

    @property
    def key(self) -> Path:
        """The private key that every host lets in, as ``USER``."""
        return self.folder / "key"

    @property
    def home(self) -> str:
        """The home of ``USER``: the same path on every host, and another folder on each."""
        return str(self.folder / "home")

    @property
    def network(self) -> ipaddress.IPv4Network:
        """The addresses of the hosts; the first is the machine's."""
        return ipaddress.IPv4Network(self._plan["network"])

    @property
    def memory_bytes(self) -> int | None:
        """The limit of each host's memory."""
        limit = self._plan["memory_bytes"]
        return int(limit) if limit else None

    @property
    def shared(self) -> list[str]:
        """Folders of the machine that hosts see although something of theirs covers them."""
        return list(self._plan["shared"])

    @property
    def hosts(self) -> Mapping[str, Host]:
        """All hosts by name."""
        return {name: Host(name, address, self) for name, address in self._plan["hosts"].items()}

    def host(self, name: str) -> Host:
        """The host of that name.

        Raises:
            TestbedError: there is none.
        """
        try:
            return self.hosts[name]
        except KeyError:
            raise TestbedError(f"no host {name} in testbed {self.name}; there are {', '.join(self.hosts)}") from None

    def environment(self) -> dict[str, str]:
        """What every program on a host finds in its environment."""
        content: dict[str, str] = json.loads((self.folder / "environment.json").read_text())
        return content

    def delays(self) -> dict[tuple[str, str], float]:
        """Round trip in seconds by pair of hosts; empty if none has been asked for."""
        content: list[tuple[str, str, float]] = []
        with contextlib.suppress(FileNotFoundError):
            content = json.loads((self.folder / "delays.json").read_text())
        return {(one, other): rtt_s for one, other, rtt_s in content}

    def delay(self, rtt_s: float, *ends: str) -> None:
        """Set the round trip between two hosts, between one and all others, or between any two; while they run.

        From the first call on, a process of the testbed forwards all frames, in the place of the kernel's bridge.

        Args:
            rtt_s: in seconds; each direction takes half of it.
            ends: up to two hosts. The machine counts only if it is named: ``MACHINE``.

        Raises:
            TestbedError: an end does not exist.
        """
        for end in ends:
            if end != MACHINE:
                self.host(end)
        if len(ends) > 2 or len(set(ends)) < len(ends):
            raise TestbedError(f"a delay is between two hosts, not between {', '.join(ends)}")
        chosen = set(ends)
        among = set(self.hosts) | chosen
        pairs = {(one, other) for one in among for other in among if one < other and chosen <= {one, other}}
        merged = self.delays() | dict.fromkeys(sorted(pairs), rtt_s)
        write(self.folder / "delays.json", json.dumps([[*pair, rtt_s] for pair, rtt_s in merged.items()]))
        self.connect_ports()

    def connect_ports(self) -> None:
        """Put the ports of all hosts to the bridge, or to the switch once a delay has been asked for."""
        ports = {machine.mac(host.address): name for name, host in self.hosts.items()}
        there = machine.links(self.namespace)
        ports = {mac: name for mac, name in {**ports, machine.mac(self._address): MACHINE}.items() if name in there}
        delays = self.delays()
        for name in ports.values():
            master = ("nomaster",) if delays else ("master", _BRIDGE)
            ip("link", "set", "dev", name, *master, namespace=self.namespace)
        if not delays:
            return
        one_way = {
            one: {
                other: (delays.get((one, other)) or delays.get((other, one)) or 0.0) / 2
                for other in ports.values()
                if other != one
            }
            for one in ports.values()
        }
        serial = str(time.time_ns())
        write(self._switch_file, json.dumps({"serial": serial, "ports": ports, "delays": one_way}))
        running = self.switch()
        if running is not None:
            os.kill(running, signal.SIGHUP)
        else:
            script = [machine.python(), "-I", str(SCRIPTS / "switch.py"), str(self._switch_file)]
            machine.start([*machine.inside(self.namespace), *script], self.folder / "switch.log", self.environment())
        deadline_s = time.monotonic() + BOOT_S
        while not self._taken_over(serial):
            if time.monotonic() > deadline_s:
                said = " ".join((self.folder / "switch.log").read_text().split()[-40:])
                raise TestbedError(f"the switch does not answer: {said}")
            time.sleep(0.02)

    def switch(self) -> int | None:
        """The process that delays frames, if there is one."""
        return next(iter(machine.running("switch.py", str(self._switch_file))), None)

    def _taken_over(self, serial: str) -> bool:
        done = self._switch_file.with_suffix(".done")
        return done.is_file() and done.read_text() == serial

    @property
    def _address(self) -> str:
        return str(self.network[1])

    @property
    def _switch_file(self) -> Path:
        return self.folder / "switch.json"

    def _make_network(self) -> None:
        device = _device(self.name)
        ip("netns", "add", self.namespace)
        ip("link", "add", "name", _BRIDGE, "type", "bridge", namespace=self.namespace)
        ip("link", "set", "dev", _BRIDGE, "up", namespace=self.namespace)
        # fmt: off
        ip("link", "add", "name", device, "address", machine.mac(self._address), "type", "veth",
           "peer", "name", MACHINE, "netns", self.namespace)
        # fmt: on
        ip("link", "set", "dev", MACHINE, "master", _BRIDGE, "up", namespace=self.namespace)
        ip("address", "add", f"{self._address}/{self.network.prefixlen}", "dev", device)
        ip("link", "set", "dev", device, "up")
        upstream = urlsplit(os.environ.get("https_proxy") or os.environ.get("HTTPS_PROXY") or "")
        handed_on = [f"{upstream.hostname}:{upstream.port or 80}"] if upstream.hostname else []
        arguments = [self.namespace, f"{self._address}:{PROXY_PORT}", str(self.network), *handed_on]
        command = [machine.python(), "-I", str(SCRIPTS / "proxy.py"), *arguments]
        machine.start(command, self.folder / "proxy.log", dict(os.environ))


def names() -> list[str]:
    """Every testbed that is up, or of which something is left."""
    found = {namespace.split(".")[1] for namespace in machine.namespaces("edgeserve.")}
    parent = machine.state_folder()
    if parent.is_dir():
        found |= {folder.name for folder in parent.iterdir()}
    return sorted(found)


def remove(name: str) -> None:
    """Remove a testbed, or what is left of one after a crash; nothing happens if there is nothing."""
    namespace = _namespace(_checked(name))
    machine.kill(lambda: machine.running("proxy.py", namespace))
    # Hosts first: as long as there is a network, what is left of a testbed can be found by its name.
    for found in reversed(machine.namespaces(namespace)):
        if found == namespace or found.startswith(f"{namespace}."):
            machine.kill(functools.partial(machine.processes, found))
            ip("netns", "delete", found)
    if _device(name) in {path.name for path in Path("/sys/class/net").iterdir()}:
        ip("link", "delete", "dev", _device(name))
    machine.remove_cgroups(f"{namespace}.")
    shutil.rmtree(_folder(name), ignore_errors=True)
    with contextlib.suppress(OSError):
        machine.state_folder().rmdir()


def _namespace(name: str) -> str:
    return f"edgeserve.{name}"


def _device(name: str) -> str:
    return f"es-{name}"


def _folder(name: str) -> Path:
    return machine.state_folder() / name


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise TestbedError(f"{name!r} cannot name a testbed; take up to 11 small letters and digits")
    return name


def _check_hosts(names: Sequence[str]) -> None:
    if not 1 <= len(names) <= len(_NUMBERS):
        raise TestbedError(f"a testbed has 1 to {len(_NUMBERS)} hosts, not {len(names)}")
    for name in names:
        if not _HOST_NAME.fullmatch(name) or name in (MACHINE, _BRIDGE, "lo"):
            raise TestbedError(f"{name!r} cannot name a host; take up to 14 small letters, digits and '-'")
        if names.count(name) > 1:
            raise TestbedError(f"two hosts cannot both be {name}")


def _free_network(wanted: str | None) -> ipaddress.IPv4Network:
    if wanted is None:
        for number in range(256):
            network = ipaddress.IPv4Network(f"10.213.{number}.0/24")
            if not machine.in_use(network):
                return network
        raise TestbedError("every network from 10.213.0.0/24 to 10.213.255.0/24 is in use; choose another")
    try:
        network = ipaddress.IPv4Network(wanted)
    except ValueError as error:
        raise TestbedError(f"{wanted} is not a network ({error}); write it like 10.213.0.0/24") from None
    if network.num_addresses < 256:
        raise TestbedError(f"{wanted} is too small; take a /24")
    if machine.in_use(network):
        raise TestbedError(f"addresses of {wanted} are in use on this machine; choose another")
    return network
