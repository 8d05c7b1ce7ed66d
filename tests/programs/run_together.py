"""Runs programs of this folder one after the other: importing Keras takes longer than most of them.

    KERAS_BACKEND=jax python run_together.py FOLDER '["export_elsewhere.py", "FOLDER"]' ...

Writes what each one prints, or its error, to FOLDER/PROGRAM.txt.
"""

import contextlib
import io
import json
import runpy
import sys
import traceback
from pathlib import Path

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for program, *arguments in map(json.loads, sys.argv[2:]):
        sys.argv, printed = [program, *arguments], io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                runpy.run_path(str(Path(__file__).with_name(program)), run_name="__main__")
        except Exception:
            printed.write(traceback.format_exc())
        (folder / f"{program}.txt").write_text(printed.getvalue())
