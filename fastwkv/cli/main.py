"""The command ``fastwkv``, also ``python -m fastwkv``."""

import argparse

import torch

import fastwkv
from fastwkv import _startup
from fastwkv.cli import generate, info
from fastwkv.cli.arguments import Parser, UsageError
from fastwkv.cli.output import replace_unencodable, write
from fastwkv.nn import CheckpointError

_COMMANDS = {"generate": (generate, "continue a text"), "info": (info, "say what is in a checkpoint")}


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: the arguments of the command line, by default those of the process.

    Returns:
        The exit status: 0; 130 after Ctrl-C; 141 if the reader of the output is gone.

    Raises:
        SystemExit: the user has made an error: status 2 and one line on standard error. After --help and --version:
            status 0.

    """
    try:
        _startup.interrupt_as_usual()
        replace_unencodable()
        try:
            return _run(arguments)
        finally:
            write("")  # flushes the output of --help, which fails here if its reader is gone
    except BrokenPipeError:
        return 128 + 13  # the status of a process that SIGPIPE has ended; Python ignores that signal
    except KeyboardInterrupt:
        return 130


def _run(arguments: list[str] | None) -> int:
    parsed, parser = _parse(arguments)
    try:
        return int(parsed.run(parsed))
    except BrokenPipeError:
        raise
    except (CheckpointError, UsageError) as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error))
    except (MemoryError, RuntimeError) as error:
        parser.error(_advice(error))


def _advice(error: MemoryError | RuntimeError) -> str:
    """Return a message for an error that the user can mend, which only its words may tell; raise it if it is a bug."""
    first_line = (str(error).splitlines() or ["the process got no more"])[0]
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in first_line:
        return f"not enough memory: {first_line}"
    if "probability tensor" in first_line:
        return "the model's predictions are not finite: another --dtype or a larger --temperature may help"
    raise error


def _parse(arguments: list[str] | None) -> tuple[argparse.Namespace, Parser]:
    """Read the command line; return it with the parser of its command."""
    parser = Parser(prog="fastwkv", description="RWKV-4 language models: text in, text out.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"fastwkv {fastwkv.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    parsers = {}
    for name, (module, summary) in _COMMANDS.items():
        parsers[name] = commands.add_parser(
            name,
            help=summary,
            description=module.DESCRIPTION,
            epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_options(parsers[name])
        parsers[name].set_defaults(run=module.run)
    parsed = parser.parse_args(arguments)
    return parsed, parsers[parsed.command]
