"""The command line: one file per command, loaded only when it is called, and the one place that prints errors."""

from __future__ import annotations

import importlib
import signal
import sys
import traceback
from typing import Any

import click

from fragscope.errors import (
    EXIT_INTERNAL,
    EXIT_INTERRUPTED,
    EXIT_PASS,
    EXIT_USAGE,
    FragscopeError,
    printable,
)

_COMMANDS = {
    "init": "write a scenario, budgets and a workflow for a repository",
    "run": "run scenarios and write results, traces and a report",
    "gate": "hold results against budgets and the lock, and say pass or fail",
    "lock": "write the exact figures of every case to a file that the gate holds results against",
    "report": "one self-contained HTML page, or Markdown, from results",
    "record": "run any command and record the GPU memory of each of its processes",
    "replay": "decide a trace's requests under other settings, or verify the model against it",
    "tune": "the best allocator conf for traces, found by replaying them under many",
    "fit": "on which cards cases and traces run, or the smallest memory they need, and what fails below it",
    "cards": "the device profiles that --card takes, and where their figures come from",
    "thresholds": "how many tokens a launch of MoE kernels may have: grid, memory, and what is enough",
    "upstream": "whether the code that variants replay is what the installed packages have",
    "doctor": "what this machine can do: GPU, torch, allocator settings, recording",
}


class _LazyGroup(click.Group):
    """Imports a command's module when the command is asked for; the listing needs none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"fragscope.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(f"no command named {args[0]!r}; commands: {', '.join(_COMMANDS)}")
        return super().resolve_command(ctx, args)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(None, "--version", package_name="fragscope", message="fragscope %(version)s")
def group() -> None:
    """Say what code costs in GPU memory, byte for byte, mostly without a GPU, and gate merges on it."""


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit; errors end here as one line on stderr and an exit code."""
    sys.exit(run(argv))


def run(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    try:
        result: Any = group.main(args=argv, prog_name="fragscope", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else EXIT_PASS
    except click.exceptions.Exit as e:
        return e.exit_code
    except click.UsageError as e:
        context = f" (see '{e.ctx.command_path} --help')" if e.ctx is not None else ""
        _say(f"{e.format_message()}{context}")
        return EXIT_USAGE
    except (click.Abort, KeyboardInterrupt):
        _say("interrupted")
        return EXIT_INTERRUPTED
    except click.ClickException as e:
        _say(e.format_message())
        return EXIT_USAGE
    except FragscopeError as e:
        _say(str(e))
        return e.exit_code
    except BrokenPipeError:
        # The reader of our output went away (head, less); die as other tools do, without a traceback.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        sys.stderr.close()
        return 128 + signal.SIGPIPE
    except Exception:
        traceback.print_exc()
        _say("this is a bug in fragscope; please report it with the lines above")
        return EXIT_INTERNAL


def _say(message: str) -> None:
    print(f"fragscope: {printable(message.replace(chr(10), ' '), 2000)}", file=sys.stderr)
