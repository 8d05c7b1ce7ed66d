"""Times `import keras_resnest` against `import keras`, each in fresh processes, in turns.

python benchmarks/import_time.py --runs 7
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def seconds_of(module: str) -> float:
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", f"import {module}"], check=True, stderr=subprocess.DEVNULL
    )
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7, help="pairs of runs (default: %(default)s)")
    runs = parser.parse_args().runs
    seconds_of("keras_resnest")  # fills the caches of the file system
    pairs = [(seconds_of("keras"), seconds_of("keras_resnest")) for _ in range(runs)]
    keras, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    print(f"import keras {keras:.2f} s, import keras_resnest {ours:.2f} s, ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
