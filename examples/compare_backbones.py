"""Compares backbones: latency, memory, parameters, GFLOPs and published accuracy.

    python examples/compare_backbones.py "resnest50*" resnet50 regnety_016
    python examples/compare_backbones.py "shufflenet_v2_?_?x" --batch-size 8 --plot accuracy.png

Each network runs in a process of its own, with random weights, so that its peak memory is its
own. Latency is the median over the runs of one batch, after two that are not timed; memory is the
peak of the process above what it used before the network was built. Parameters and GFLOPs are
those of what is timed. The plot shows published top-1 against latency.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from classify import positive

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # fewer messages of TensorFlow


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", help="names or shell patterns of networks")
    parser.add_argument("--size", type=positive, help="side of the images; default: crop size")
    parser.add_argument("--batch-size", type=positive, default=1, help="(%(default)s)")
    parser.add_argument("--runs", type=positive, default=10, help="timed batches (%(default)s)")
    parser.add_argument("--features", action="store_true", help="without classifier")
    parser.add_argument("--csv", type=Path, help="also write the table into this file")
    parser.add_argument("--plot", type=Path, help="draw top-1 against latency into this image")
    parser.add_argument("--measure-here", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def peak_memory():
    """Largest memory of this process so far, in MB."""
    status = Path("/proc/self/status")
    if status.exists():
        # Linux hands the parent's peak down in `ru_maxrss`; this one is the process's own.
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        if "VmHWM" in lines:
            return int(lines["VmHWM"].split()[0]) / 2**10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def measure(name, size, arguments) -> dict:
    """Times one network in this process."""
    import numpy as np
    import tensorflow as tf

    import keras_resnest as kr
    from keras_resnest.backbones.zoo import count_multiply_adds, count_parameters

    tf.constant(0)  # starts TensorFlow
    before = peak_memory()
    top = {"include_top": False} if arguments.features else {}
    model = kr.create_backbone(name, input_shape=(size, size, 3), **top)
    run = tf.function(lambda x: model(x, training=False))
    images = tf.zeros((arguments.batch_size, size, size, 3))
    for _ in range(2):
        run(images)
    seconds = []
    for _ in range(arguments.runs):
        start = time.perf_counter()
        tf.nest.map_structure(np.asarray, run(images))
        seconds.append(time.perf_counter() - start)
    return {
        "latency_ms": round(float(np.median(seconds)) * 1e3, 1),
        "memory_mb": round(peak_memory() - before),
        "parameters": count_parameters(model),
        "gflops": round(count_multiply_adds(model, (size, size, 3)) / 1e9, 2),
    }


def measure_apart(name, size, arguments) -> dict:
    """Times one network in a process of its own."""
    command = [sys.executable, __file__, name, "--measure-here", "--size", str(size)]
    command += ["--batch-size", str(arguments.batch_size), "--runs", str(arguments.runs)]
    command += ["--features"] if arguments.features else []
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{name} failed with exit status {result.returncode}: {last}")
    return json.loads(result.stdout.strip().splitlines()[-1])


COLUMNS = ("name", "size", "latency_ms", "memory_mb", "parameters", "gflops", "top1")


def row_of(model, arguments) -> dict:
    size = arguments.size or model.crop_size
    return {
        "name": model.name,
        "size": size,
        **measure_apart(model.name, size, arguments),
        # A published figure belongs to its size.
        "top1": model.top1 if size == model.crop_size else None,
    }


def draw(rows, path, batch_size):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["top1"] is not None]
    figure, axes = plt.subplots(figsize=(8, 6), layout="constrained")
    axes.scatter([row["latency_ms"] for row in rows], [row["top1"] for row in rows])
    for row in rows:
        axes.annotate(
            row["name"],
            (row["latency_ms"], row["top1"]),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=8,
        )
    axes.set_xlabel(f"latency of a batch of {batch_size}, ms")
    axes.set_ylabel("published ImageNet top-1, %")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main(argv=None) -> int:
    arguments = parse_arguments(argv)
    if arguments.measure_here:
        print(json.dumps(measure(arguments.names[0], arguments.size, arguments)))
        return 0
    import keras_resnest as kr

    models = {}
    for pattern in arguments.names:
        found = kr.list_models(pattern)
        if not found:
            print(f"error: no network is called {pattern!r}", file=sys.stderr)
            return 2
        models.update({model.name: model for model in found})
    print("".join(f"{column:>14}" if column != "name" else f"{column:28}" for column in COLUMNS))
    rows = []
    for model in models.values():
        try:
            rows.append(row_of(model, arguments))
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        cells = ("" if value is None else value for value in list(rows[-1].values())[1:])
        print(f"{model.name:28}" + "".join(f"{cell:>14}" for cell in cells), flush=True)
    if arguments.csv:
        lines = [",".join(COLUMNS), *(",".join(map(str, row.values())) for row in rows)]
        arguments.csv.write_text("\n".join(lines).replace("None", "") + "\n")
    if arguments.plot:
        if all(row["top1"] is None for row in rows):
            print("no plot: no network has a published top-1 at this size", file=sys.stderr)
        else:
            draw(rows, arguments.plot, arguments.batch_size)
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
