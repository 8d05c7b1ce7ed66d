"""Compares backbones: latency, memory, parameters, GFLOPs and published accuracy.

    python examples/compare_backbones.py "resnest50*" resnet50 regnety_016
    python examples/compare_backbones.py "shufflenet_v2_?_?x" --batch-size 8 --plot accuracy.png

Each network runs in a process of its own, with random weights, so that its peak memory is its
own. Latency is the median over the runs of one batch; memory is the peak of the process above
what it used before the network was built. The plot shows published top-1 against latency.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # fewer messages of TensorFlow


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", help="names or shell patterns of networks")
    parser.add_argument("--size", type=int, help="side of the pictures; default: crop size")
    parser.add_argument("--batch-size", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--runs", type=int, default=10, help="timed batches (%(default)s)")
    parser.add_argument("--features", action="store_true", help="without classifier")
    parser.add_argument("--csv", type=Path, help="also write the table into this file")
    parser.add_argument("--plot", type=Path, help="draw top-1 against latency into this picture")
    parser.add_argument("--measure-here", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def peak_memory():
    """Largest memory of this process so far, in MB."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def measure(name, size, arguments) -> dict:
    """Times one network in this process."""
    import numpy as np
    import tensorflow as tf

    import keras_resnest as kr

    tf.constant(0)  # starts TensorFlow
    before = peak_memory()
    has_top = not arguments.features and name != "vgg16_reduced"
    model = kr.create_backbone(name, include_top=has_top, input_shape=(size, size, 3))
    run = tf.function(lambda x: model(x, training=False))
    pictures = tf.zeros((arguments.batch_size, size, size, 3))
    run(pictures)
    seconds = []
    for _ in range(arguments.runs):
        start = time.perf_counter()
        tf.nest.map_structure(np.asarray, run(pictures))
        seconds.append(time.perf_counter() - start)
    return {"latency": float(np.median(seconds)), "memory": peak_memory() - before}


def measure_apart(name, size, arguments) -> dict:
    """Times one network in a process of its own."""
    command = [sys.executable, __file__, name, "--measure-here", "--size", str(size)]
    command += ["--batch-size", str(arguments.batch_size), "--runs", str(arguments.runs)]
    command += ["--features"] if arguments.features else []
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{name} failed: {result.stderr.strip().splitlines()[-1]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


COLUMNS = ("name", "size", "latency_ms", "memory_mb", "parameters", "gflops", "top1")


def row_of(model, arguments) -> dict:
    size = arguments.size or model.crop_size
    measured = measure_apart(model.name, size, arguments)
    gflops = model.gflops * (size / model.crop_size) ** 2
    return {
        "name": model.name,
        "size": size,
        "latency_ms": round(measured["latency"] * 1e3, 1),
        "memory_mb": round(measured["memory"]),
        "parameters": model.parameters,
        "gflops": round(gflops, 2),
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
    if arguments.plot and any(row["top1"] is not None for row in rows):
        draw(rows, arguments.plot, arguments.batch_size)
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
