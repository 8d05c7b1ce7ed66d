"""Small objects in large images: the image at several sizes, and in tiles.

    python examples/quickstart.py
    nice python benchmarks/tiles.py

Draws images of 1600 x 1200 pixels with 60 figures of 12 to 30 pixels, and detects them, on one
thread, with the quickstart's model: with the image stretched to the size of the model, to larger
sizes, and in tiles with the default overlap.
"""

import argparse
import dataclasses
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import keras_resnest as kr
from keras_resnest.data.shapes import Scene, draw_scene, plan_scene

HEIGHT, WIDTH = 1200, 1600
SIDES = (12, 30)  # of the objects, pixels
ONE_PASS = {"flip": False, "voting_iou": None, "max_detections": 400}
SPEC = {
    "images": tf.TensorSpec((HEIGHT, WIDTH, 3), tf.uint8),
    "bounding_boxes": {
        "boxes": tf.TensorSpec((None, 4), tf.float32),
        "labels": tf.TensorSpec((None,), tf.int32),
    },
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="runs/quickstart/detector.keras", help=".keras file")
    parser.add_argument("--images", type=int, default=6, help="default: %(default)s")
    parser.add_argument("--objects", type=int, default=60, help="per image; default: %(default)s")
    return parser.parse_args()


def draw_element(seed: int, count: int) -> dict:
    """An image with `count` figures that do not overlap."""
    rng, figures, boxes = np.random.default_rng(seed), [], np.zeros((0, 4))
    while len(figures) < count:
        for figure in plan_scene(rng.integers(2**31)).figures:
            low, high = figure.outlines[0].min(axis=0), figure.outlines[0].max(axis=0)
            scale = rng.uniform(*SIDES) / (high - low).max()
            corner = rng.uniform(0, (WIDTH, HEIGHT) - scale * (high - low))
            box = np.concatenate([corner, corner + scale * (high - low)])
            if (np.minimum(boxes[:, 2:], box[2:]) > np.maximum(boxes[:, :2], box[:2])).all(1).any():
                continue
            outlines = tuple(
                ((o - low) * scale + corner).astype("float32") for o in figure.outlines
            )
            figures.append(dataclasses.replace(figure, outlines=outlines))
            boxes = np.concatenate([boxes, [box]])
    figures, boxes = figures[:count], boxes[:count].astype("float32")
    image = draw_scene(Scene(WIDTH, seed, tuple(figures), np.zeros(count, bool)))[:HEIGHT]
    labels = np.array([figure.label for figure in figures], "int32")
    return {"images": image, "bounding_boxes": {"boxes": boxes, "labels": labels}}


def main() -> None:
    arguments = parse_arguments()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    model = keras.saving.load_model(arguments.model, compile=False)
    model.decoder.max_detections = 400
    elements = [draw_element(seed, arguments.objects) for seed in range(arguments.images)]
    dataset = tf.data.Dataset.from_generator(lambda: elements, output_signature=SPEC)
    batches = kr.data.evaluation_batches(dataset, None, 1)
    sides = model.image_shape[:2]
    detectors = {f"plain {sides}": kr.detection.MultiScaleDetector(model, [sides], **ONE_PASS)}
    for size in ((384, 512), (640, 832), (1216, 1600)):
        detectors[f"larger {size}"] = kr.detection.MultiScaleDetector(model, [size], **ONE_PASS)
    for size in (sides, (320, 320)):
        detectors[f"tiles {size}"] = kr.detection.TiledDetector(model, size)
    print(f"{'':>20} {'mAP@0.5':>8} {'CPU s/image':>12}")
    for name, detector in detectors.items():
        detector.detect(elements[0]["images"])  # compiles
        start = time.process_time()
        result = kr.evaluation.evaluate_detections(detector, batches)
        seconds = (time.process_time() - start) / arguments.images
        print(f"{name:>20} {result.mAP:8.3f} {seconds:12.2f}", flush=True)


if __name__ == "__main__":
    main()
