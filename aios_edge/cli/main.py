"""``aios-edge``: the commands, and the one place where an error becomes a message and an exit code."""

from __future__ import annotations

import importlib
import os
import sys

import click

from aios_edge.errors import AiosEdgeError
from aios_edge.version import __version__

INTERRUPTED = 130  # the shell's code for Ctrl-C

#: Command name -> module under aios_edge.cli with a click command of the same name. Modules are imported when
#: used, so that ``aios-edge agent`` starts without anything the workshop needs.
COMMANDS = {
    "demo": "aios_edge.cli.demo.command",
    "doctor": "aios_edge.cli.doctor",
    "profiles": "aios_edge.cli.profiles",
    "export": "aios_edge.cli.export",
    "bundle": "aios_edge.cli.bundle",
    "bench": "aios_edge.cli.bench",
    "infer": "aios_edge.cli.infer",
    "power": "aios_edge.cli.power",
    "agent": "aios_edge.cli.agent",
    "policy": "aios_edge.cli.policy",
}


class LazyGroup(click.Group):
    """Imports a command's module only when the command is looked up."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of a job."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command object, or None for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(COMMANDS[cmd_name]), cmd_name)
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="aios-edge")
def cli() -> None:
    """A bundle is a model with a contract, and the agent keeps the contract.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 a promise was not kept, 130 interrupted.
    """


def main() -> None:
    """Run the command line; never returns."""
    try:
        code = cli(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except AiosEdgeError as error:
        click.echo(f"aios-edge: {error}", err=True)
        sys.exit(error.exit_code)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.exceptions.Abort):
        click.echo("aios-edge: interrupted; finished stages are kept, run the same command to go on", err=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # `aios-edge … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a full disk, a missing permission: the machine's no, said in one line
        where = f"{error.filename}: " if error.filename else ""
        click.echo(
            f"aios-edge: {where}{error.strerror or error}. Check the path, its permissions and free space", err=True
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
