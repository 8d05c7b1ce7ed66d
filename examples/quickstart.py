"""Train, evaluate, predict, save, export and reload a detector in minutes on a CPU.

The program trains a small RefineDet on synthetic images, measures mAP@0.5 on unseen images, plots,
saves the model, exports it for TensorFlow Serving, and checks in a new process with TensorFlow only
that the export returns the same detections. Results go to runs/quickstart (--output).

    python examples/quickstart.py             # about 5 minutes on two cores, mAP about 0.9
    python examples/quickstart.py --fast      # one minute, to see that everything works
"""

import argparse
import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # hide TensorFlow's start-up messages

import keras
import numpy as np

import keras_resnest as kr

# Runs in a new interpreter without Keras or keras_resnest.
RELOAD = """
import sys
import numpy as np
import tensorflow as tf
folder, images, result = sys.argv[1:]
detect = tf.saved_model.load(folder).signatures["serving_default"]
np.savez(result, **detect(images=tf.constant(np.load(images), tf.float32)))
assert "keras_resnest" not in sys.modules
"""


def parse_arguments() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder")
    parser.add_argument("--epochs", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="default: %(default)s")
    parser.add_argument("--size", type=int, default=128, help="side in pixels, a multiple of 64")
    parser.add_argument("--fast", action="store_true", help="few images and epochs")
    return parser.parse_args()


def read_data(arguments):
    """Returns the training set, and batches for training, validation and test."""
    counts = {"num_train": 96, "num_validation": 16, "num_test": 32} if arguments.fast else {}
    shape = (arguments.size, arguments.size, 3)
    sets = {
        split: kr.data.read_shapes(split, size=arguments.size, **counts)
        for split in ("train", "validation", "test")
    }
    kr.visualization.plot_dataset(sets["train"], path=arguments.output / "dataset.png")
    # With this many images, flipping is the only augmentation that helps.
    augmentation = kr.data.TrainingAugmentation(
        shape, photometric=None, expand=None, crop=None, flip=kr.data.RandomFlip(vertical=0.5)
    )
    size = arguments.batch_size
    train = kr.data.training_batches(sets["train"], shape, size, augmentation, seed=1)
    validation = kr.data.evaluation_batches(sets["validation"], shape, size)
    test = kr.data.evaluation_batches(sets["test"], shape, size)
    return sets["train"], train, validation, test


def build_model(train_set, arguments, steps_per_epoch: int, epochs: int) -> kr.RefineDet:
    shape = (arguments.size, arguments.size, 3)
    model = kr.builders.refinedet_tiny(
        class_names=train_set.class_names,
        image_shape=shape,
        anchor_generator=kr.detection.fit_anchors(train_set, shape),
    )
    recipe = dataclasses.replace(
        kr.recipes.RECIPES["detector_from_scratch"],
        learning_rate=arguments.learning_rate,
        batch_size=arguments.batch_size,
    )
    model.compile(recipe.scaled(arguments.batch_size, steps_per_epoch, epochs).optimizer())
    return model


def check_in_new_process(folder: Path, images: np.ndarray, expected: dict) -> None:
    """Compares the detections of the SavedModel, in a new process, with the expected ones."""
    np.save(folder.parent / "images.npy", images)
    files = [folder, folder.parent / "images.npy", folder.parent / "served.npz"]
    subprocess.run([sys.executable, "-c", RELOAD, *map(str, files)], check=True)
    served = np.load(files[2])
    shares = [share_equal(*pair) for pair in zip(split(served), split(expected), strict=True)]
    print(f"SavedModel in a new process: {np.mean(shares):.2%} of the detections are equal")
    if not np.mean(shares) > 0.99:
        sys.exit("The SavedModel and the model return different detections.")


def split(detections) -> list[tuple]:
    """Returns boxes, confidence and labels of each image."""
    return list(zip(*(detections[key] for key in ("boxes", "confidence", "labels")), strict=True))


def share_equal(served: tuple, expected: tuple) -> float:
    """Share of an image's expected detections that were served.

    Rounding may swap detections of equal confidence, of which a model that has hardly been trained
    has many, and so change which of two overlapping ones remains.
    """
    boxes, confidence, labels = (
        np.abs(wanted[:, None] - found[None])
        for wanted, found in zip(expected, served, strict=True)
    )
    equal = (boxes.max(axis=-1) < 1e-2) & (confidence < 1e-4) & (labels == 0)
    return equal.any(axis=1).mean()


def main() -> None:
    start = time.perf_counter()
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(1)
    epochs = 2 if arguments.fast else arguments.epochs

    train_set, train, validation, test = read_data(arguments)
    class_names = train_set.class_names
    model = build_model(train_set, arguments, len(train), epochs)
    print(f"RefineDet with {model.count_params():,} parameters for {', '.join(class_names)}")
    evaluation = kr.callbacks.DetectionEvaluation(validation, frequency=2)
    history = model.fit(train, epochs=epochs, callbacks=[evaluation])
    kr.visualization.plot_history([history, evaluation], path=arguments.output / "history.png")

    result = kr.evaluation.evaluate_detections(model, test)
    print(f"On unseen test images:\n{result}")
    images = next(iter(test))["images"].numpy()
    shown = list(images[:12])
    kr.visualization.plot_detections(
        shown, model.detect(shown), class_names, path=arguments.output / "detections.png"
    )

    model.save(arguments.output / "detector.keras")
    folder = arguments.output / "serving" / "1"
    model.export(folder)
    check_in_new_process(folder, images, model.predict(images, verbose=0))
    minutes = (time.perf_counter() - start) / 60
    print(f"mAP@0.5 {result.mAP:.3f} after {minutes:.1f} minutes")
    print(f"Plots, model and SavedModel are in {arguments.output}")


if __name__ == "__main__":
    main()
