"""The command ``python -m loadtests.testbed``."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from loadtests.testbed import machine
from loadtests.testbed.machine import TestbedError
from loadtests.testbed.testbed import DEFAULT_NAME, Testbed, names, remove
from serve_app.config.units import parse_duration, parse_size

_EXIT_FAILED = 1
_EXIT_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; every error is one line on stderr, exit code 1, or 2 for bad usage."""
    try:
        result = cli.main(arguments, prog_name="python -m loadtests.testbed", standalone_mode=False)
        sys.exit(result if isinstance(result, int) else 0)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "python -m loadtests.testbed"
        _fail(f"{error.format_message()} ({command} --help says more)", _EXIT_USAGE)
    except TestbedError as error:
        _fail(str(error), _EXIT_FAILED)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", _EXIT_FAILED)


def _fail(message: str, code: int) -> None:
    click.echo(f"testbed: {' '.join(message.split())}", err=True)
    sys.exit(code)


def _written_as(parse: Callable[[object], float]) -> Callable[..., float | None]:
    """A callback that reads a size or a duration, written as in ``edge.yaml``."""

    def read(_context: click.Context, _parameter: click.Parameter, value: str | None) -> float | None:
        try:
            return None if value is None else parse(value)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None

    return read


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--name", default=DEFAULT_NAME, show_default=True, help="Which testbed; several can be up at a time.")
@click.pass_context
def cli(context: click.Context, name: str) -> None:
    """Several real hosts on this Linux machine, to try a cluster on. Needs root.

    \b
    up head paris tokyo         start three hosts, each with its address, processes, files in /tmp and sshd
    status                      addresses, states, memory, delays
    ssh paris                   log in; `exec paris -- command` works without the network as well
    delay paris tokyo 80ms      a round trip between the two takes 80 ms from now on
    cut paris                   off the network; heal puts it back
    kill paris                  as on loss of power; boot starts it again
    down                        leaves nothing behind, also after a crash of the testbed
    """
    context.obj = name


@cli.command()
@click.argument("hosts", nargs=-1, required=True)
@click.option(
    "--memory",
    metavar="SIZE",
    callback=_written_as(parse_size),
    help="Limit of each host's memory, such as 4GiB; none by default.",
)
@click.option(
    "--delay",
    metavar="TIME",
    callback=_written_as(parse_duration),
    help="Round trip between any two hosts, such as 20ms.",
)
@click.option("--network", help="Addresses, such as 10.213.0.0/24; a free one by default.")
@click.option(
    "--share",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder below /tmp or /run that the hosts are to see too.",
)
@click.pass_context
def up(
    context: click.Context,
    hosts: tuple[str, ...],
    memory: int | None,
    delay: float | None,
    network: str | None,
    share: tuple[Path, ...],
) -> None:
    """Start HOSTS: their names, or how many.

    The first gets the address that ends in .10. On each host the user edgeserve is root, with a home of its own; pip
    works as on this machine.
    """
    if len(hosts) == 1 and hosts[0].isdigit():
        hosts = tuple(f"host{number + 1}" for number in range(int(hosts[0])))
    _show(Testbed.up(hosts, name=context.obj, memory_bytes=memory, rtt_s=delay, network=network, shared=share))


@cli.command()
@click.pass_context
def down(context: click.Context) -> None:
    """End all hosts and remove everything; does nothing where nothing is up."""
    lacks = machine.missing()
    if lacks:
        raise TestbedError(lacks)
    with machine.alone():
        was_up = context.obj in names()
        remove(context.obj)
    click.echo("removed" if was_up else f"testbed {context.obj} is not up")


@cli.command()
@click.pass_context
def status(context: click.Context) -> None:
    """Show the hosts and how to reach them."""
    _show(Testbed(context.obj))


def _show(testbed: Testbed) -> None:
    for host in testbed.hosts.values():
        used_bytes = host.used_bytes()
        limit = f" of {testbed.memory_bytes / 2**20:.0f}" if testbed.memory_bytes else ""
        memory = f"  {used_bytes / 2**20:6.0f}{limit} MiB" if used_bytes is not None else ""
        click.echo(f"{host.name:<14} {host.address:<15} {host.state():<4} {len(host.processes()):4} processes{memory}")
    for (one, other), rtt_s in sorted(testbed.delays().items()):
        click.echo(f"{one} - {other}: {rtt_s * 1000:g} ms")
    if testbed.delays() and testbed.switch() is None:
        click.echo("the switch has died, so nothing gets through: set a delay to start it again", err=True)
    first = next(iter(testbed.hosts.values()))
    click.echo(f"the machine is {testbed.network[1]}; log in with: {shlex.join(first.ssh_command()[:3])} "
               f"{first.ssh_command()[-1]}")  # fmt: skip


@cli.command("exec", context_settings={"ignore_unknown_options": True})
@click.argument("host")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_context
def execute(context: click.Context, host: str, command: tuple[str, ...]) -> None:
    """Run COMMAND on HOST, with its exit code; write `--` before it."""
    _become(Testbed(context.obj).host(host).command(*command))


@cli.command(context_settings={"ignore_unknown_options": True})
@click.argument("host")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def ssh(context: click.Context, host: str, command: tuple[str, ...]) -> None:
    """Log in to HOST, or run COMMAND there."""
    _become(Testbed(context.obj).host(host).ssh_command(*command))


def _become(command: list[str]) -> None:
    sys.stdout.flush()
    os.execvp(command[0], command)


@cli.command()
@click.argument("host")
@click.pass_context
def cut(context: click.Context, host: str) -> None:
    """Take HOST off the network; it runs on."""
    Testbed(context.obj).host(host).cut()


@cli.command()
@click.argument("host")
@click.pass_context
def heal(context: click.Context, host: str) -> None:
    """Put HOST back on the network."""
    Testbed(context.obj).host(host).heal()


@cli.command()
@click.argument("host")
@click.pass_context
def kill(context: click.Context, host: str) -> None:
    """End all processes of HOST at once, as on loss of power; its home stays."""
    Testbed(context.obj).host(host).kill()


@cli.command()
@click.argument("host")
@click.pass_context
def boot(context: click.Context, host: str) -> None:
    """Start HOST again after it was killed."""
    Testbed(context.obj).host(host).boot()


@cli.command()
@click.argument("hosts", nargs=-1)
@click.argument("round_trip", callback=_written_as(parse_duration))
@click.pass_context
def delay(context: click.Context, hosts: tuple[str, ...], round_trip: float) -> None:
    """Set the ROUND_TRIP between two HOSTS, between one and all others, or, without HOSTS, between any two.

    Works while they run. `machine` is this machine, whose way to the hosts is not delayed unless it is named.
    """
    Testbed(context.obj).delay(round_trip, *hosts)


if __name__ == "__main__":
    main()
