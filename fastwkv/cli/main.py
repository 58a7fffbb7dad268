"""The command ``fastwkv``, also ``python -m fastwkv``."""

import argparse

import torch

from fastwkv.cli import generate, info
from fastwkv.cli.arguments import Parser, UsageError
from fastwkv.cli.output import replace_what_cannot_be_encoded, write
from fastwkv.nn import CheckpointError

_COMMANDS = {"generate": (generate, "continue a text"), "info": (info, "say what is in a checkpoint")}


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: of the command line, by default those of the process.

    Returns:
        the exit status: 0; 130 after Ctrl-C; 141 where nobody reads the output any more.

    Raises:
        SystemExit: with status 2 and one line on standard error for whatever the user can do wrong; with 0 after
            --help.

    """
    replace_what_cannot_be_encoded()
    try:
        try:
            return _run(arguments)
        finally:
            write("")  # what --help left in the buffer: a reader that is gone is found out here
    except BrokenPipeError:
        return 128 + 13  # as if SIGPIPE had ended it, which Python ignores
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
        if not _is_lack_of_memory(error):
            raise
        parser.error(f"not enough memory: {(str(error).splitlines() or ['the process got no more'])[0]}")


def _is_lack_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Tell whether memory ran out; PyTorch says it of the CPU, and of files it maps, in words only."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def _parse(arguments: list[str] | None) -> tuple[argparse.Namespace, Parser]:
    """Read the command line; return it with the parser of its command."""
    parser = Parser(prog="fastwkv", description="RWKV-4 language models: text in, text out.", allow_abbrev=False)
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
