"""Runs the programs in `tests/programs` in fresh processes."""

import os
import subprocess
import sys
from pathlib import Path

import keras_resnest

PACKAGE = Path(keras_resnest.__file__).parents[1]


def run_program(name, *arguments, python=sys.executable, **environment) -> str:
    """Returns the last line that `tests/programs/<name>` prints."""
    program = Path(__file__).parent / "programs" / name
    result = subprocess.run(
        [python, str(program), *map(str, arguments)],
        env={
            **os.environ,
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "PYTHONPATH": str(PACKAGE),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip().splitlines()[-1]
