"""Measures latency and memory of networks; plots published accuracy against latency.

    python benchmarks/networks.py resnest50 "resnet50*" --batch-size 8
    python benchmarks/networks.py "shufflenet_v2_?_?x" --csv networks.csv --plot networks.png

Each network runs with random weights in its own process. Latency is the median over the batches,
after two warm-up batches; memory is the peak of the process above its use before the network is
built. Parameters and GFLOPs are those of the measured network.
"""

import argparse
import csv
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

import keras_resnest as kr
from keras_resnest.backbones.zoo import count_multiply_adds, count_parameters

COLUMNS = ("name", "size", "latency_ms", "memory_mb", "parameters", "gflops", "top1")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="name or shell pattern")
    parser.add_argument("--size", type=int, help="image side in pixels; default: the crop size")
    parser.add_argument("--batch-size", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--runs", type=int, default=10, help="timed batches; default: %(default)s")
    parser.add_argument("--features", action="store_true", help="without classifier")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the table here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot top-1 against latency")
    arguments = parser.parse_args()
    models = {model.name: model for name in arguments.names for model in kr.list_models(name)}
    if not models:
        parser.error(f"no network matches {' '.join(arguments.names)}")
    print("".join(f"{column:>14}" if column != "name" else f"{column:28}" for column in COLUMNS))
    rows = []
    for model in models.values():
        size = arguments.size or model.crop_size
        try:
            measured = measure_in_new_process(
                model.name, size, arguments.batch_size, arguments.runs, arguments.features
            )
        except Exception as error:
            print(f"{model.name} failed: {error}", file=sys.stderr)
            continue
        # The published accuracy is valid for one image size only.
        top1 = model.top1 if size == model.crop_size else None
        rows.append({"name": model.name, "size": size, **measured, "top1": top1})
        cells = ("" if rows[-1][name] is None else rows[-1][name] for name in COLUMNS[1:])
        print(f"{model.name:28}" + "".join(f"{cell:>14}" for cell in cells), flush=True)
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    if arguments.plot:
        plot(rows, arguments.plot, arguments.batch_size)
    sys.exit(0 if rows else 1)


def measure_in_new_process(*arguments) -> dict:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, *arguments).result()


def measure(name: str, size: int, batch_size: int, runs: int, features: bool) -> dict:
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
    """Returns the peak memory of this process in MB."""
    status = Path("/proc/self/status")
    if status.exists():
        # On Linux, `ru_maxrss` starts with the peak of the parent process; VmHWM does not.
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


if __name__ == "__main__":
    main()
