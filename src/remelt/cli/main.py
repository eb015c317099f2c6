"""The command `remelt`: its subcommands by name, its exit codes, and how an error is told."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence

import click

from remelt.core.collection import collection_rare
from remelt.core.nearest import nearest_hint
from remelt.errors import CheckError, RemeltError
from remelt.version import __version__

COMMANDS = {
    "merge": "Merge a recipe, or models by one method, to a file.",
    "plan": "Tell what a merge would read, write and hold, and whether it would be refused.",
    "convert": "Write a model in another layout of keys, such as a folder of diffusers.",
    "extract-lora": "Write what a model was tuned by as an adapter of its base.",
    "merge-lora": "Write several LoRAs as one.",
    "resize-lora": "Write a LoRA at another rank.",
    "permute": "Write a model or an adapter with permuted axes.",
    "rebasin": "Align models by permutations that keep their function, and merge them.",
    "router": "Write a router for a mixture of experts, made of prompts.",
    "compose": "Fill a recipe's parameters with models or other recipes.",
    "recipe": "Convert, format or draw recipes.",
    "info": "List archs and merge methods, or describe one.",
    "inspect": "Tell what a checkpoint is, from its header.",
    "verify": "Tell whether a checkpoint is what it should be.",
    "hash": "Tell a checkpoint's hashes.",
    "lock": "Write the hashes of its models into a recipe.",
    "doctor": "Tell what this machine and this installation have.",
}
DONE, FAILED, INTERRUPTED = 0, 4, 130


class Commands(click.Group):
    """Subcommands that are imported when they are called; their summaries are known without that."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"remelt.cli.{cmd_name.replace('-', '_')}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            near = nearest_hint(args[0], COMMANDS)
            ctx.fail(f"no command is named {args[0]!r}. {near or 'The commands: ' + ', '.join(COMMANDS) + '.'}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="remelt %(version)s")
def cli() -> None:
    """Merge neural-network checkpoints from recipes.

    Exit codes: 0 done, 2 usage, 3 refused before writing, 4 failed while running, 130 interrupted.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    with collection_rare():
        code = run(sys.argv[1:] if arguments is None else list(arguments))
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run the command line; the exit code."""
    debug, as_json = "--debug" in arguments, "--json" in arguments
    try:
        result = cli.main(args=arguments, prog_name="remelt", standalone_mode=False)
        return result if isinstance(result, int) else DONE
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        cause = error if isinstance(error, KeyboardInterrupt) else error.__cause__
        published = str(cause) if isinstance(cause, KeyboardInterrupt) else ""
        _tell(f"interrupted: {published or 'nothing was published'}; the same command continues", INTERRUPTED, as_json)
        return INTERRUPTED
    except click.ClickException as error:
        if as_json:
            _tell(error.format_message(), error.exit_code, as_json)
        else:
            error.show()
        return error.exit_code
    except RemeltError as error:
        if debug:
            traceback.print_exc()
        _tell_error(error, as_json)
        return error.exit_code
    except BrokenPipeError:
        return FAILED
    except Exception as error:
        if debug:
            traceback.print_exc()
        hint = "this is a fault of remelt; --debug shows where"
        _tell(f"failed: {type(error).__name__}: {error}", FAILED, as_json, hint)
        return FAILED


def _tell(message: str, exit_code: int, as_json: bool, hint: str | None = None) -> None:
    """Say why the command ends as it does, on standard error or as JSON."""
    if as_json:
        from remelt.cli.output import echo_json

        echo_json({"error": message, "hint": hint, "exit_code": exit_code})
    else:
        click.echo(message if hint is None else f"{message}\nhint: {hint}", err=True)


def _tell_error(error: RemeltError, as_json: bool) -> None:
    if not as_json:
        click.echo(str(error) if error.span else f"error: {error}", err=True)
        return
    from remelt.cli.output import echo_json

    told: dict[str, object] = {"error": error.message, "hint": error.hint, "exit_code": error.exit_code}
    if error.span is not None:
        told["place"] = str(error.span)
    if isinstance(error, CheckError):
        told["problems"] = [
            {
                "subject": problem.subject,
                "message": problem.message,
                "hint": problem.hint,
                "place": None if problem.span is None else str(problem.span),
            }
            for problem in error.problems
        ]
    echo_json(told)
