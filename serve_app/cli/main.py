"""The ``edgeserve`` command: its subcommands, and one line for every error."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Mapping, Sequence

import click

from serve_app import __version__
from serve_app.errors import ConfigError, EdgeServeError, TraceError

_EXIT_FAILED = 1
_EXIT_USAGE = 2

#: Subcommand -> the module below ``serve_app.cli`` that has it under the same name; in the order of ``--help``.
COMMANDS = {
    "up": "deployment",
    "down": "deployment",
    "status": "deployment",
    "init": "init",
    "infer": "infer",
    "models": "client",
    "load": "client",
    "unload": "client",
    "publish": "publish",
    "versions": "versions",
    "rollback": "versions",
    "canary": "versions",
    "remove": "versions",
    "store": "versions",
    "profile": "profile",
    "simulate": "simulate",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; every error is one line on stderr, exit code 1, or 2 for bad usage."""
    # The commands themselves print what matters of the log.
    logging.getLogger("serve_app").setLevel(logging.ERROR)
    try:
        result = cli.main(arguments, prog_name="edgeserve", standalone_mode=False)
        sys.exit(result if isinstance(result, int) else 0)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "edgeserve"
        _fail(f"{error.format_message()} ({command} --help says more)", _EXIT_USAGE)
    except (ConfigError, TraceError) as error:
        _fail(error.message, _EXIT_USAGE)
    except EdgeServeError as error:
        _fail(error.message, _EXIT_FAILED)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", _EXIT_FAILED)
    except BrokenPipeError:
        # The reader of the output has closed it.
        sys.stderr.close()
        sys.exit(_EXIT_FAILED)
    except Exception as error:
        _fail(f"{type(error).__name__}: {error}", _EXIT_FAILED)


def _fail(message: str, code: int) -> None:
    click.echo(f"edgeserve: {' '.join(message.split())}", err=True)
    sys.exit(code)


class _CommandsByModule(click.Group):
    """Imports the module of a subcommand when the subcommand is used.

    The distribution ``edgeserve-sim`` has the same command without most of the modules.
    """

    def __init__(self, *, modules: Mapping[str, str], **options: object) -> None:
        # Placeholders, from whose names click suggests the one that was meant; ``get_command`` has the commands.
        super().__init__(commands={name: click.Command(name) for name in modules}, **options)  # type: ignore[arg-type]
        self._modules = modules

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all subcommands, installed or not."""
        return list(self._modules)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a subcommand; one that is not installed says what to install."""
        if cmd_name not in self._modules:
            return None
        module = f"serve_app.cli.{self._modules[cmd_name]}"
        try:
            command = getattr(importlib.import_module(module), cmd_name)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            return _not_installed(cmd_name)
        assert isinstance(command, click.Command)
        return command


def _not_installed(name: str) -> click.Command:
    """A stand-in for a subcommand of the distribution ``edgeserve`` where only ``edgeserve-sim`` is installed."""

    def fail() -> None:
        raise EdgeServeError(
            f"edgeserve {name} needs the package edgeserve, and edgeserve-sim is installed in its place; "
            "replace it with: pip uninstall edgeserve-sim && pip install edgeserve"
        )

    anything = {"ignore_unknown_options": True, "allow_extra_args": True}
    return click.Command(
        name,
        callback=fail,
        context_settings=anything,
        add_help_option=False,
        short_help="Needs the package edgeserve.",
    )


@click.group(
    cls=_CommandsByModule,
    modules=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__)
def cli() -> None:
    """Serve many deep-learning models from edge locations with little memory.

    \b
    edgeserve up                          start three locations on this machine
    edgeserve infer mobilenet_v2 cat.jpg  classify an image
    edgeserve status                      show the models in memory at every location
    edgeserve init                        write a configuration to edit
    edgeserve profile                     measure loads and inferences on this machine
    edgeserve simulate                    compare eviction policies on a request stream
    """
