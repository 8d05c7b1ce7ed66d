"""The program `keras-resnest` and its commands."""

import argparse
import os
import sys
import warnings

from keras_resnest.cli import (
    analyze,
    classify,
    convert,
    demo,
    evaluate,
    export,
    list_networks,
    predict,
    train,
)
from keras_resnest.cli.common import Failure, printable
from keras_resnest.version import __version__

COMMANDS = {
    "train": train,
    "evaluate": evaluate,
    "analyze": analyze,
    "predict": predict,
    "convert": convert,
    "export": export,
    "demo": demo,
    "classify": classify,
    "list": list_networks,
}


def main(argv=None) -> int:
    """Runs a command and prints errors to stderr.

    Args:
        argv: command line without the program's name. Default: `sys.argv[1:]`.

    Returns:
        Exit status: 0; 1 if training ended early or there is no usable result; 2 if data or
        arguments are unusable; 130 after Ctrl-C.

    Example:

    >>> main(["list", "resnest*"])
    """
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments([str(argument) for argument in argv])
    usual, warnings.formatwarning = warnings.formatwarning, format_warning
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # for the processes that a command starts
    try:
        return COMMANDS[arguments.command].run(arguments)
    except (Failure, ValueError, OSError, ImportError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1 if isinstance(error, Failure) else 2
    except KeyboardInterrupt as stop:
        how = str(stop) or "to start over, run the same command"
        print(f"\ninterrupted: {how}", file=sys.stderr)
        return 130
    finally:
        warnings.formatwarning = usual


def format_warning(text, *_) -> str:
    """A warning without a line of our code."""
    return f"warning: {printable(str(text))}\n"


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Writes "[options]" in the usage: they are up to thirty lines above description and errors."""

    def add_usage(self, usage, actions, groups, prefix=None):
        needed = [action for action in actions if action.required or not action.option_strings]
        super().add_usage(
            usage, [argparse.Action([], "", metavar="[options]"), *needed], [], prefix
        )


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Parses a command line; an invalid one ends the process with status 2."""
    parser = argparse.ArgumentParser(
        prog="keras-resnest",
        description="ResNeSt backbones and the RefineDet detector for Keras 3.",
        epilog="Exit status: 0; 1 if training ended early or there is no usable result; 2 if data "
        "or arguments are unusable; 130 after Ctrl-C.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(
            name,
            help=command.__doc__.split("\n", 1)[0],
            description=command.__doc__,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        command.add_arguments(subparser, argv)
    arguments = parser.parse_args(argv)
    arguments.argv = argv
    return arguments
