"""Lists networks with parameters, GFLOPs, published accuracy and weights, and measures them.

    keras-resnest list
    keras-resnest list "resnest50*" resnet50 regnety_016
    keras-resnest list --kind detectors
    keras-resnest list "shufflenet_v2_?_?x" --measure --batch-size 8 --plot accuracy.png

With --measure, each network runs with random weights in a process of its own. Latency is the median
over the batches, after two that are not timed; memory is the peak of the process above what it used
before the network was built. Parameters and GFLOPs are those of what is timed. The plot shows
published top-1 accuracy against latency.
"""

import argparse
import fnmatch
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import keras_resnest as kr
from keras_resnest.backbones.zoo import ModelTable, count_multiply_adds, count_parameters
from keras_resnest.cli.common import Failure, given_options, positive

COLUMNS = ("name", "size", "latency_ms", "memory_mb", "parameters", "gflops", "top1")
MEASURE_OPTIONS = ("size", "batch_size", "runs", "features", "csv", "plot")


def add_arguments(parser, argv) -> None:
    add = parser.add_argument
    add("names", nargs="*", default=["*"], metavar="NAME", help="name or shell pattern")
    add("--kind", choices=("networks", "detectors", "recipes"), default="networks")
    add("--measure", action="store_true", help="measure latency and memory of networks")
    add("--size", type=positive(), help="side of the images; default: the crop size")
    add("--batch-size", type=positive(), help="default: 1")
    add("--runs", type=positive(), help="timed batches; default: 10")
    add("--features", action="store_const", const=True, help="without classifier")
    add("--csv", type=Path, metavar="FILE", help="also write the measures into this file")
    add("--plot", type=Path, metavar="FILE", help="draw top-1 against latency into this image")
    add("--in-process", action="store_true", help=argparse.SUPPRESS)  # prints one row as JSON


def run(arguments) -> int:
    if not arguments.measure and (unused := given_options(arguments, MEASURE_OPTIONS)):
        raise ValueError(f"{', '.join(unused)} need --measure")
    if arguments.kind != "networks":
        if arguments.measure:
            raise ValueError("--measure is for networks")
        print_rows(arguments)
        return 0
    models = find_networks(arguments.names)
    if not arguments.measure:
        print(models)
        return 0
    batch_size, runs = arguments.batch_size or 1, arguments.runs or 10
    if arguments.in_process:
        row = measure(models[0].name, arguments.size, batch_size, runs, arguments.features)
        print(json.dumps(row))
        return 0
    rows = measure_all(models, arguments.size, batch_size, runs, arguments.features)
    if arguments.csv:
        lines = [",".join(COLUMNS), *(",".join(map(str, row.values())) for row in rows)]
        arguments.csv.write_text("\n".join(lines).replace("None", "") + "\n")
    if arguments.plot:
        plot(rows, arguments.plot, batch_size)
    return 0 if rows else 1


def find_networks(names: list[str]) -> ModelTable:
    """The rows of `list_models` that match any of the names, each once."""
    models = {}
    for name in names:
        found = kr.list_models(name)
        if not found:
            raise ValueError(f"no network is called {name!r}")
        models.update({model.name: model for model in found})
    return ModelTable(models.values())


def print_rows(arguments) -> None:
    """The table of detectors or of recipes."""
    if arguments.kind == "detectors":
        rows = {
            name: f"{backbone:16} {side} x {side}"
            for name, (backbone, side, _) in kr.builders.BUILDERS.items()
        }
    else:
        rows = {name: recipe.source for name, recipe in kr.recipes.RECIPES.items()}
    for pattern in arguments.names:
        found = fnmatch.filter(rows, pattern)
        if not found:
            raise ValueError(f"no {arguments.kind[:-1]} is called {pattern!r}")
        for name in found:
            print(f"{name:24} {rows[name]}")


# === Measures ===


def measure_all(models, size: int | None, batch_size: int, runs: int, features) -> list[dict]:
    """Prints and returns a row per network; reports networks that fail."""
    print("".join(f"{column:>14}" if column != "name" else f"{column:28}" for column in COLUMNS))
    rows = []
    for model in models:
        try:
            rows.append(measure_in_subprocess(model, size, batch_size, runs, features))
        except Failure as failure:
            print(f"error: {failure}", file=sys.stderr)
            continue
        cells = ("" if value is None else value for value in list(rows[-1].values())[1:])
        print(f"{model.name:28}" + "".join(f"{cell:>14}" for cell in cells), flush=True)
    return rows


def measure_in_subprocess(model, size: int | None, batch_size: int, runs: int, features) -> dict:
    size = size or model.crop_size
    command = [sys.executable, "-m", "keras_resnest", "list", model.name, "--measure"]
    command += ["--in-process", "--size", size, "--batch-size", batch_size, "--runs", runs]
    command += ["--features"] if features else []
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Failure(f"{model.name} failed with exit status {done.returncode}: {last}")
    return {
        "name": model.name,
        "size": size,
        **json.loads(done.stdout.strip().splitlines()[-1]),
        # A published figure belongs to its size.
        "top1": model.top1 if size == model.crop_size else None,
    }


def measure(name: str, size: int, batch_size: int, runs: int, features) -> dict:
    """Times one network in this process."""
    import tensorflow as tf

    tf.constant(0)  # starts TensorFlow
    before = peak_memory()
    top = {"include_top": False} if features else {}
    model = kr.create_backbone(name, input_shape=(size, size, 3), **top)
    call = tf.function(lambda x: model(x, training=False))
    images = tf.zeros((batch_size, size, size, 3))
    for _ in range(2):
        call(images)
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        tf.nest.map_structure(np.asarray, call(images))
        seconds.append(time.perf_counter() - start)
    return {
        "latency_ms": round(float(np.median(seconds)) * 1e3, 1),
        "memory_mb": round(peak_memory() - before),
        "parameters": count_parameters(model),
        "gflops": round(count_multiply_adds(model, (size, size, 3)) / 1e9, 2),
    }


def peak_memory() -> float:
    """Largest memory of this process so far, in MB."""
    status = Path("/proc/self/status")
    if status.exists():
        # On Linux, `ru_maxrss` starts with the peak of the parent; this one does not.
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        if "VmHWM" in lines:
            return int(lines["VmHWM"].split()[0]) / 2**10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def plot(rows: list[dict], path: Path, batch_size: int) -> None:
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["top1"] is not None]
    if not rows:
        print("no plot: no network has a published top-1 at this size", file=sys.stderr)
        return
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.add_subplot()
    axes.scatter([row["latency_ms"] for row in rows], [row["top1"] for row in rows])
    for row in rows:
        place = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 8}
        axes.annotate(row["name"], (row["latency_ms"], row["top1"]), **place)
    axes.set_xlabel(f"latency of a batch of {batch_size}, ms")
    axes.set_ylabel("published ImageNet top-1, %")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
