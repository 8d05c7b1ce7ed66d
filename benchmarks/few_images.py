"""Measures how accuracy on BCCD depends on the number of training images and on the start.

`refinedet_tiny` trains on parts of the training split, from random weights and from a detector that
this program has trained on synthetic shapes before, with the settings of examples/quickstart.py; of
it, all but the class head is kept. The test split is evaluated once, after training.

Every training has as many steps as `--epochs` epochs of all images have. With equal epochs, a tenth
of the images would get a tenth of the steps, and the length of the training would be measured too.
The pretraining is not counted: it is the same for all parts. Each seed draws other parts, of which
the smaller are in the larger, pretrains anew and starts from other weights. Anchors are fitted to
the part.

    python benchmarks/few_images.py --data bccd --seeds 1 2 3
"""

import argparse
import gc
import json
import statistics
from pathlib import Path

import bccd_accuracy
import keras
import numpy as np

import keras_resnest as kr

METRICS = {"mAP": "mAP@[.5:.95]", "mAP50": "mAP@0.5"}
STARTS = ("random weights", "pretrained on shapes")


def parse_arguments() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--data", required=True, metavar="FOLDER", help="BCCD in Pascal VOC layout")
    add("--percent", type=int, nargs="+", default=[10, 25, 50, 100], help="default: %(default)s")
    add("--seeds", type=int, nargs="+", default=[1], help="default: 1")
    add("--epochs", type=int, default=30, help="of all images (default: %(default)s)")
    add("--shapes-epochs", type=int, default=12, help="of the pretraining (default: %(default)s)")
    add("--output", type=Path, default=Path("runs/few_images"), help="folder; default: %(default)s")
    return parser.parse_args()


def pretrain(epochs: int, seed: int) -> kr.RefineDet:
    arguments = bccd_accuracy.parse_arguments(["--data", "shapes", "--verbose", "0"])
    arguments.epochs = epochs
    shapes, _ = bccd_accuracy.read_data(arguments)
    return bccd_accuracy.train_detector(arguments, shapes, {}, seed)


def part_of(dataset, percent: int, seed: int) -> kr.data.DetectionDataset:
    order = np.random.default_rng(seed).permutation(len(dataset))
    chosen = sorted(order[: round(len(dataset) * percent / 100)])
    return kr.data.DetectionDataset([dataset.records[i] for i in chosen], dataset.class_names)


def table(runs: list[dict]) -> str:
    """One row for each part, as Markdown: means over the seeds with standard deviations."""
    columns = [(start, metric) for metric in METRICS for start in STARTS]
    head = ["images", *(f"{METRICS[metric]}, {start}" for start, metric in columns)]
    lines = [head, ["---"] * len(head)]
    for images in sorted({run["images"] for run in runs}):
        cells = []
        for start, metric in columns:
            mean, spread = mean_and_spread(runs, images, start, metric)
            cells.append(f"{mean:.3f} ± {spread:.3f}" if spread else f"{mean:.3f}")
        lines.append([str(images), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean_and_spread(runs: list[dict], images: int, start: str, metric: str) -> tuple[float, float]:
    values = [run[metric] for run in runs if (run["images"], run["start"]) == (images, start)]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def plot(runs: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    sizes = sorted({run["images"] for run in runs})
    for axes, (metric, title) in zip(figure.subplots(1, 2), METRICS.items(), strict=True):
        for start in STARTS:
            rows = [mean_and_spread(runs, images, start, metric) for images in sizes]
            axes.errorbar(sizes, *zip(*rows, strict=True), marker="o", capsize=3, label=start)
        axes.set(title=title, xlabel="training images", xscale="log")
        axes.set_xticks(sizes, map(str, sizes), minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    own = parse_arguments()
    own.output.mkdir(parents=True, exist_ok=True)
    arguments = bccd_accuracy.parse_arguments(["--data", own.data, "--verbose", "0"])
    whole, test = bccd_accuracy.read_data(arguments)
    steps = own.epochs * (len(whole) // arguments.batch_size)
    runs = []
    for seed in own.seeds:
        starts = dict(zip(STARTS, (None, pretrain(own.shapes_epochs, seed)), strict=True))
        for percent in own.percent:
            train = part_of(whole, percent, seed)
            arguments.epochs = round(steps / max(1, len(train) // arguments.batch_size))
            for start, source in starts.items():
                options = arguments, train, test, {}, seed, source
                figures, _ = bccd_accuracy.train_and_measure(*options)
                runs.append({"images": len(train), "start": start, **figures})
                print(json.dumps(runs[-1]), flush=True)
                gc.collect()
                # After every training: a run that is stopped keeps what it has.
                result = {"arguments": vars(own), "steps": steps, "runs": runs}
                text = json.dumps(result, indent=2, default=str)
                (own.output / "result.json").write_text(text)
        keras.backend.clear_session()
    plot(runs, own.output / "few_images.png")
    (own.output / "table.md").write_text(table(runs) + "\n")
    print(f"{table(runs)}\nTable and plot are in {own.output}")


if __name__ == "__main__":
    main()
