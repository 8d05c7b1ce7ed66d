"""Measures what class weights and repeated images do for a rare class.

The training images are those of the synthetic dataset (`kr.data.read_shapes`), drawn without most
of their stars, so that stars are 2 % of the objects instead of 17 %. The test images keep all
stars. Every training has the same number of steps, also with repeated images. Each seed leaves
other stars and starts from other weights.

    OMP_NUM_THREADS=1 python benchmarks/rare_classes.py --seeds 1 2 3

Twelve trainings; one takes minutes on one core.
"""

import argparse
import dataclasses
import json
import statistics
from pathlib import Path

import bccd_accuracy
import keras
import numpy as np

import keras_resnest as kr
from keras_resnest.data.shapes import CLASS_NAMES, SPLITS, draw_scene, plan_scene

RARE, SHARE = "star", 0.02
THRESHOLD = 0.4  # the other classes are in about 40 % of the images each


def variants(train) -> dict[str, dict]:
    """Arguments of the loss and the batches that differ, by variant."""
    return {
        "nothing": {},
        "balanced weights": {"loss": {"class_weights": kr.data.class_weights(train)}},
        "effective weights": {"loss": {"class_weights": kr.data.class_weights(train, "effective")}},
        "repeated images": {"batches": {"repeat_threshold": THRESHOLD}},
    }


def draw(scenes, figures, split: str) -> kr.data.DetectionDataset:
    """Draws scenes with some of their figures only: an array of booleans for each scene."""
    records = []
    for i, (scene, chosen) in enumerate(zip(scenes, figures, strict=True)):
        kept = [figure for figure, keep in zip(scene.figures, chosen, strict=True) if keep]
        image = draw_scene(dataclasses.replace(scene, figures=kept))
        rows = scene.boxes[chosen], scene.labels[chosen], scene.difficult[chosen]
        records.append(kr.data.ImageRecord(image, f"{split}_{i}", *rows))
    return kr.data.DetectionDataset(records, CLASS_NAMES)


def plan(split: str, count: int, size: int) -> list:
    return [plan_scene((0, SPLITS.index(split), i), size) for i in range(count)]


def without_most(scenes, seed: int) -> list[np.ndarray]:
    """Which figures of each scene to draw, so that `SHARE` of them are of the class `RARE`."""
    rare = [scene.labels == CLASS_NAMES.index(RARE) for scene in scenes]
    counts, everything = [len(own) for own in rare], np.concatenate(rare)
    places = np.random.default_rng(seed).permutation(np.flatnonzero(everything))
    others = len(everything) - len(places)
    kept = ~everything
    kept[places[: round(SHARE / (1 - SHARE) * others)]] = True
    return np.split(kept, np.cumsum(counts)[:-1])


def parse_arguments() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[1], help="default: 1")
    add("--epochs", type=int, default=12, help="default: %(default)s")
    add("--images", type=int, default=1600, help="of the training set (default: %(default)s)")
    add("--image-size", type=int, default=64, metavar="PIXELS", help="default: %(default)s")
    add("--output", type=Path, default=Path("runs/rare_classes.json"), help="default: %(default)s")
    return parser.parse_args()


def main() -> None:
    own = parse_arguments()
    options = {"epochs": own.epochs, "image_size": own.image_size, "verbose": 0}
    arguments = bccd_accuracy.parse_arguments(["--data", "shapes"])
    vars(arguments).update(options)
    scenes = plan("train", own.images, own.image_size)
    tested = plan("test", 400, own.image_size)
    test = draw(tested, [np.ones(len(scene.figures), bool) for scene in tested], "test")
    runs = {}
    for seed in own.seeds:
        train = draw(scenes, without_most(scenes, seed), "train")
        print(train.report, flush=True)
        for name, switches in variants(train).items():
            figures, _ = bccd_accuracy.train_and_measure(arguments, train, test, switches, seed)
            runs.setdefault(name, []).append(figures)
            print(f"{name}, seed {seed}: {json.dumps(figures)}", flush=True)
            keras.backend.clear_session()
            own.output.parent.mkdir(parents=True, exist_ok=True)
            own.output.write_text(json.dumps({"arguments": vars(own), "runs": runs}, default=str))
    print(table(runs))


def table(runs: dict[str, list[dict]]) -> str:
    """Means over the seeds with standard deviations, as Markdown."""
    columns = {f"{kind} of {RARE}s": (kind, [RARE]) for kind in ("AP50", "AP")}
    others = [name for name in CLASS_NAMES if name != RARE]
    columns |= {f"{kind} of the others": (kind, others) for kind in ("AP50", "AP")}
    lines = ["| | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for name, figures in runs.items():
        cells = []
        for kind, classes in columns.values():
            values = [statistics.fmean(f[kind][c] for c in classes) for f in figures]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.3f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
