"""Times a training step under MirroredStrategy with one device against one without a strategy.

Two models with the same weights and batch take turns in one process, one `fit` each, so that their
ratio is valid on a busy machine too, especially that of the CPU seconds. Their losses must be
equal. The first `fit` of each, which traces, is not counted.

    python benchmarks/distribution_cost.py
    python benchmarks/distribution_cost.py --model resnest50 --image-size 320 --batch-size 8

Set TF_ENABLE_ONEDNN_OPTS=1 where TensorFlow disables oneDNN.
"""

import argparse
import contextlib
import time

import keras
import numpy as np
import tensorflow as tf
from training_step import LEARNING_RATE, NUM_CLASSES, make_batch

from keras_resnest import RefineDet
from keras_resnest.backbones import VARIANTS


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnest50", choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--image-size", type=int, default=128, help="side, pixels (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="images (%(default)s)")
    parser.add_argument("--objects", type=int, default=10, help="per image (%(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="per turn (%(default)s)")
    parser.add_argument("--turns", type=int, default=10, help="per model (%(default)s)")
    return parser.parse_args()


def make_turn(arguments, strategy):
    """Returns a function that fits a few steps: seconds and CPU seconds of a step, and the loss."""
    images, boxes, labels = make_batch(
        arguments.batch_size, arguments.image_size, arguments.objects
    )
    batch = (images, {"boxes": boxes, "labels": labels})
    batches = tf.data.Dataset.from_tensors(batch).repeat(arguments.steps).prefetch(2)
    with strategy.scope() if strategy else contextlib.nullcontext():
        keras.utils.set_random_seed(0)
        shape = (arguments.image_size, arguments.image_size, 3)
        model = RefineDet(NUM_CLASSES, arguments.model, shape)
        model.compile(keras.optimizers.SGD(LEARNING_RATE, momentum=0.9))

    def turn():
        start, cpu_start = time.perf_counter(), time.process_time()
        history = model.fit(batches, verbose=0)
        cpu_seconds = (time.process_time() - cpu_start) / arguments.steps
        seconds = (time.perf_counter() - start) / arguments.steps
        return seconds, cpu_seconds, history.history["loss"][0]

    return turn


def main():
    arguments = parse_arguments()
    device = "GPU:0" if tf.config.list_physical_devices("GPU") else "CPU:0"
    turns = {
        "no strategy": make_turn(arguments, None),
        f"MirroredStrategy, {device}": make_turn(
            arguments, tf.distribute.MirroredStrategy([device])
        ),
    }
    losses = [turn()[-1] for turn in turns.values()]
    np.testing.assert_allclose(*losses, rtol=1e-2, err_msg="The losses differ")
    results = np.array([[turn()[:2] for turn in turns.values()] for _ in range(arguments.turns)])
    size = arguments.image_size
    print(
        f"RefineDet-{arguments.model}, {arguments.batch_size} x {size} x {size}: seconds of a step"
    )
    print(f"{'':26}{'median':>9}{'min':>9}{'max':>9}{'CPU':>9}")
    for place, name in enumerate(turns):
        seconds, cpu_seconds = results[:, place].T
        columns = (np.median(seconds), seconds.min(), seconds.max(), np.median(cpu_seconds))
        print(f"{name:26}{''.join(f'{c:9.3f}' for c in columns)}")
    ratios = results[:, 1] / results[:, 0]  # of neighboring turns
    for what, values in zip(("seconds", "CPU seconds"), ratios.T, strict=True):
        low, middle, high = np.percentile(values, [25, 50, 75])
        print(f"ratio of {what}: median {middle:.2f}, quartiles {low:.2f} to {high:.2f}")


if __name__ == "__main__":
    main()
