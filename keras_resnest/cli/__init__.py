"""The program `keras-resnest`: train, evaluate, predict, export, classify and list."""

import argparse
import os
import sys

from keras_resnest.cli import classify, evaluate, export, list_networks, predict, train
from keras_resnest.cli.common import Failure
from keras_resnest.version import __version__

COMMANDS = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "export": export,
    "classify": classify,
    "list": list_networks,
}


def main(argv=None) -> int:
    """Runs one command.

    Args:
        argv: command line without the name of the program. Default: that of this process.

    Returns:
        Exit status: 0; 1 if a training ended early or there is no usable result; 2 if data or
        arguments cannot be used. Statuses 1 and 2 come with a sentence on stderr.

    Example:

    >>> main(["list", "resnest*"])
    """
    argv = [str(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    arguments = parse_arguments(argv)
    # Keras and TensorFlow are imported by the commands, after the arguments are known to be valid.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        return COMMANDS[arguments.command].run(arguments)
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Parses a command line; a wrong one ends the process with status 2."""
    parser = argparse.ArgumentParser(
        prog="keras-resnest",
        description="ResNeSt backbones and the RefineDet detector for Keras 3.",
        epilog="Exit status: 0; 1 if training ended early or there is no usable result; 2 if data "
        "or arguments cannot be used.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        summary = command.__doc__.split("\n", 1)[0]
        subparser = commands.add_parser(
            name,
            help=summary,
            description=command.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_arguments(subparser, argv)
    arguments = parser.parse_args(argv)
    arguments.argv = argv
    return arguments
