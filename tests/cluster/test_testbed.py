"""The hosts themselves: what each has of its own, delays, loss of network and power, and that nothing stays behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_support import ROOT, until

import loadtests.testbed
from loadtests.testbed import MACHINE, Testbed
from loadtests.testbed.host import Host
from loadtests.testbed.machine import TestbedError

MIB = 1 << 20
NAME = f"t{os.getpid()}"
#: Answers whatever it gets, on port 7.
ECHO = """
import socket
server = socket.create_server(("", 7))
while True:
    connection, _ = server.accept()
    while said := connection.recv(1):
        connection.send(said)
"""
#: The shortest of twenty round trips to port 7 of a host.
ROUND_TRIP = """
import socket, sys, time
with socket.create_connection((sys.argv[1], 7)) as connection:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    shortest = 1e9
    for _ in range(20):
        began = time.perf_counter()
        connection.send(b"x")
        connection.recv(1)
        shortest = min(shortest, time.perf_counter() - began)
print(shortest)
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[Testbed]:
    with Testbed.up(("one", "two", "three"), name=NAME, memory_bytes=256 * MIB) as testbed:
        yield testbed


@pytest.fixture(scope="module")
def echo(hosts: Testbed) -> Iterator[Host]:
    host = hosts.host("two")
    with subprocess.Popen(host.command("python3", "-c", ECHO)) as server:
        until("two listens", lambda: listens(host), 20)
        yield host
        server.kill()


def listens(host: Host) -> bool:
    try:
        socket.create_connection((host.address, 7), timeout=1).close()
    except OSError:
        return False
    return True


def round_trip_s(host: Host, to: Host) -> float:
    return float(host.run("python3", "-c", ROUND_TRIP, to.address).stdout)


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "loadtests.testbed", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def traces(name: str) -> list[str]:
    """Everything on this machine that bears the name of a testbed."""
    folders = ("/run/netns", "/sys/class/net", "/sys/fs/cgroup/memory", "/sys/fs/cgroup", "/var/lib/edgeserve-testbed")
    found = [str(path) for folder in folders if Path(folder).is_dir() for path in Path(folder).glob(f"*{name}*")]
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = process.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if f"edgeserve-testbed/{name}" in line:
            found.append(line)
    return found


def test_each_host_has_its_own_name_address_home_and_folders(hosts: Testbed) -> None:
    seen = set()
    for host in hosts.hosts.values():
        said = host.run("sh", "-c", "hostname; hostname -I; whoami; ls -A /tmp /dev/shm ~; touch ~/a /tmp/b /dev/shm/c")
        name, addresses, user, *files = said.stdout.split("\n")
        assert (name, addresses.strip(), user) == (host.name, host.address, loadtests.testbed.disk.USER)
        assert not {"a", "b", "c"} & set(files)
        seen.add(host.run("readlink", "/proc/self/ns/net").stdout)
    assert len(seen) == 3


def test_a_host_sees_its_own_processes_only(hosts: Testbed) -> None:
    listed = hosts.host("three").run("ps", "ax", "-o", "args=").stdout.splitlines()
    assert len(listed) == 3
    assert "host_init.py" in listed[0]
    assert "sshd" in listed[1]


def test_ssh_and_exec_run_commands_in_the_same_home_and_environment(hosts: Testbed) -> None:
    host = hosts.host("one")
    command = "pwd; echo $PATH; command -v python3"
    by_ssh = subprocess.run(host.ssh_command(command), capture_output=True, text=True, timeout=30, check=True)
    assert by_ssh.stdout == host.run("sh", "-c", command).stdout
    login = subprocess.run(host.ssh_command(f"bash --login -c '{command}'"), capture_output=True, text=True, timeout=30)
    assert login.stdout == by_ssh.stdout


def test_a_host_that_takes_too_much_memory_loses_the_process_and_the_others_do_not_notice(hosts: Testbed) -> None:
    greedy = "bytearray(600 << 20)"
    assert hosts.host("one").run("python3", "-c", greedy, check=False).returncode in (137, -signal.SIGKILL)
    assert all(host.state() == "up" for host in hosts.hosts.values())


def test_a_delay_holds_for_its_pair_and_changes_while_the_hosts_run(hosts: Testbed, echo: Host) -> None:
    one, three = hosts.host("one"), hosts.host("three")
    assert round_trip_s(one, echo) < 0.02
    hosts.delay(0.04, "one", "two")
    assert 0.04 <= round_trip_s(one, echo) < 0.06
    assert round_trip_s(three, echo) < 0.02
    hosts.delay(0.08, "two")
    assert 0.08 <= round_trip_s(three, echo) < 0.1
    assert hosts.delays()["one", "two"] == 0.08
    hosts.delay(0.0)
    assert round_trip_s(one, echo) < 0.02


def test_the_machine_itself_is_delayed_only_if_named(hosts: Testbed, echo: Host) -> None:
    def connecting_s() -> float:
        began = time.perf_counter()
        socket.create_connection((echo.address, 7)).close()
        return time.perf_counter() - began

    hosts.delay(0.08)
    assert min(connecting_s() for _ in range(10)) < 0.06
    hosts.delay(0.08, "two", MACHINE)
    assert min(connecting_s() for _ in range(10)) >= 0.08
    hosts.delay(0.0, "two", MACHINE)
    hosts.delay(0.0)


def test_a_host_that_is_cut_off_runs_on_and_comes_back(hosts: Testbed, echo: Host) -> None:
    with socket.create_connection((echo.address, 7), timeout=20) as connection:
        echo.cut()
        assert echo.state() == "cut"
        connection.send(b"x")
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        assert echo.run("hostname").stdout == "two\n"
        echo.heal()
        connection.settimeout(20)
        assert connection.recv(1) == b"x"


def test_a_host_that_loses_power_tells_nobody_and_boots_with_its_home(hosts: Testbed) -> None:
    host = hosts.host("three")
    host.run("sh", "-c", "echo kept > ~/kept; echo lost > /tmp/lost")
    with subprocess.Popen(host.command("python3", "-c", ECHO)) as server:
        until("three listens", lambda: listens(host), 20)
        with socket.create_connection((host.address, 7)) as connection:
            connection.settimeout(0.3)
            host.kill()
            assert server.wait(timeout=20) != 0
            assert (host.state(), host.processes()) == ("off", [])
            with pytest.raises(TimeoutError):
                connection.recv(1)
            with pytest.raises(TestbedError, match="three is off; boot it first"):
                host.run("true")
            host.boot()
            assert host.run("sh", "-c", "cat ~/kept; ls /tmp").stdout == "kept\n"
            # It knows nothing of the connection, and says so when it is spoken to.
            connection.settimeout(20)
            connection.send(b"x")
            with pytest.raises(ConnectionResetError):
                connection.recv(1)


def test_hosts_reach_the_outside_through_the_machine_for_pip_alone(hosts: Testbed) -> None:
    host = hosts.host("one")
    with socket.create_server(("127.0.0.1", 0)) as server:
        asked: list[bytes] = []

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                asked.append(connection.recv(1 << 16))
                connection.send(b"HTTP/1.1 404 no\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        index = f"http://127.0.0.1:{server.getsockname()[1]}/simple"
        options = ("--no-cache-dir", "--retries=0", "--index-url", index, "--extra-index-url", "", "--find-links", "")
        done = host.run("python3", "-m", "pip", "download", *options, "nosuchthing", check=False)
        thread.join(timeout=20)
    assert done.returncode != 0
    assert asked
    assert asked[0].startswith(b"GET /simple/nosuchthing/ HTTP/1.1\r\n")
    assert {name for name in hosts.environment() if "proxy" in name.lower()} == {"PIP_PROXY"}


def test_two_testbeds_live_side_by_side(hosts: Testbed) -> None:
    with Testbed.up(("one",), name=f"{NAME}b") as other:
        assert other.network != hosts.network
        assert other.host("one").run("hostname").stdout == "one\n"
    assert not traces(f"{NAME}b")
    assert hosts.host("one").run("hostname").stdout == "one\n"


def test_the_command_says_what_is_wrong_in_one_line(hosts: Testbed) -> None:
    for arguments, code, message in (
        (("--name", NAME, "up", "3"), 1, f"testbed {NAME} is up already; down stops it"),
        (("--name", NAME, "exec", "nine", "--", "true"), 1, "no host nine in testbed"),
        (("--name", "nobody", "status"), 1, "testbed nobody is not up"),
        (("--name", "No", "up", "1"), 1, "'No' cannot name a testbed"),
        (("--name", NAME, "delay", "fast"), 2, "'fast' is not a duration; write it like 250ms"),
        (("--name", "x", "up", "1", "--network", "127.0.0.0/8"), 1, "are in use on this machine"),
        (("fly",), 2, "No such command 'fly'"),
    ):
        done = cli(*arguments)
        assert (done.returncode, done.stdout) == (code, "")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    assert not traces("nobody")


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert loadtests.testbed.machine.missing() == "a testbed needs root: it makes network namespaces"
    monkeypatch.undo()
    monkeypatch.setattr("shutil.which", lambda name, path: None if name == "sshd" else f"/bin/{name}")
    assert loadtests.testbed.machine.missing() == "a testbed needs sshd (package openssh-server)"


def test_exec_hands_on_exit_code_and_arguments(hosts: Testbed) -> None:
    done = cli("--name", NAME, "exec", "one", "--", "sh", "-c", 'echo "$1"; exit 7', "sh", "a  b")
    assert (done.returncode, done.stdout) == (7, "a  b\n")


def test_down_leaves_nothing_even_where_up_was_killed_halfway() -> None:
    name = f"{NAME}c"
    halfway = Path(f"/run/netns/edgeserve.{name}.host2")
    command = [
        sys.executable,
        "-m",
        "loadtests.testbed",
        "--name",
        name,
        "up",
        "3",
        "--memory",
        "64MiB",
        "--delay",
        "1ms",
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        until("it is halfway", halfway.exists, 20)
        process.send_signal(signal.SIGKILL)
    assert traces(name)
    down = cli("--name", name, "down")
    assert (down.returncode, down.stdout, down.stderr) == (0, "removed\n", "")
    assert not traces(name)
    again = cli("--name", name, "down")
    assert (again.returncode, again.stdout) == (0, f"testbed {name} is not up\n")
