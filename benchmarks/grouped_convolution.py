"""Times networks with our grouped convolution against the same ones with Keras' own.

Both run in one process on the same images, in turns, so that the ratio holds on a busy machine
too. TensorFlow only. Keras' own gradient can take minutes where there are many groups: no step
is begun once `--seconds` have passed.

    python benchmarks/grouped_convolution.py
    python benchmarks/grouped_convolution.py resnest50 --image-size 160 --batch-size 2

On a processor for which TensorFlow leaves oneDNN off (it says so when it starts), set
TF_ENABLE_ONEDNN_OPTS=1 to have its grouped kernels; without them ours convolves group by group.
"""

import argparse
import statistics
import time
from unittest import mock

import keras
import tensorflow as tf

from keras_resnest.backbones import create_backbone, list_backbones
from keras_resnest.layers import GroupedConv2D


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "networks",
        nargs="*",
        default=["resnest50", "resnext50_32x4d", "regnety_016"],
        help="names of networks (%(default)s)",
    )
    parser.add_argument("--image-size", type=int, default=224, help="side in pixels")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each kind")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="for the steps of each kind (%(default)s)"
    )
    arguments = parser.parse_args()
    unknown = set(arguments.networks) - set(list_backbones())
    if unknown:
        parser.error(f"no such network: {', '.join(sorted(unknown))}")
    return arguments


def keras_convolution():
    """While active, our layer does what Keras' Conv2D does."""
    return mock.patch.object(GroupedConv2D, "convolution_op", keras.layers.Conv2D.convolution_op)


def make_steps(name, arguments):
    """Returns compiled functions for one forward pass and one training step."""
    size = arguments.image_size
    images = tf.random.uniform((arguments.batch_size, size, size, 3), 0, 255, seed=0)
    labels = tf.zeros((arguments.batch_size,), "int32")
    model = create_backbone(name, classes=10)
    optimizer = keras.optimizers.SGD(1e-3)
    optimizer.build(model.trainable_variables)
    loss = keras.losses.SparseCategoricalCrossentropy()

    @tf.function
    def forward():
        return tf.reduce_sum(model(images, training=False))

    @tf.function
    def train():
        with tf.GradientTape() as tape:
            value = loss(labels, model(images, training=True))
        variables = [v.value for v in model.trainable_variables]
        optimizer.apply(tape.gradient(value, variables), model.trainable_variables)
        return value

    steps = {"forward": forward, "training step": train}
    for step in steps.values():  # the first call traces, with the convolution now in place
        step().numpy()
    return steps


def measure(step):
    start = time.perf_counter()
    step().numpy()
    return time.perf_counter() - start


def compare(name, arguments):
    """Prints both times of one network, and their ratio."""
    networks = {"ours": make_steps(name, arguments)}
    with keras_convolution():
        networks["keras"] = make_steps(name, arguments)
    for kind in ("forward", "training step"):
        seconds = {key: [] for key in networks}
        start = time.perf_counter()
        for _ in range(arguments.steps):
            for key, steps in networks.items():
                seconds[key].append(measure(steps[kind]))
            if time.perf_counter() - start > arguments.seconds:
                break
        ours, theirs = (statistics.median(seconds[key]) for key in ("ours", "keras"))
        count = len(seconds["ours"])
        print(
            f"{name:18}{kind:15}{ours:9.3f}s{theirs:9.3f}s{theirs / ours:15.2f}{count:8}",
            flush=True,
        )


def main():
    arguments = parse_arguments()
    side = arguments.image_size
    print(f"{arguments.batch_size} images of {side} x {side}; medians")
    print(f"{'':33}{'ours':>10}{'Keras':>10}{'Keras / ours':>15}{'steps':>8}")
    for name in arguments.networks:
        compare(name, arguments)
        keras.backend.clear_session()


if __name__ == "__main__":
    main()
