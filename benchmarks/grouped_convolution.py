"""Times a network with our grouped convolution against the same one with Keras' own.

Both networks run in one process on the same images, in turns, so that the ratio holds on a busy
machine too. TensorFlow only.

    python benchmarks/grouped_convolution.py --backbone resnest50 --image-size 160
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
    parser.add_argument("--backbone", default="resnest50", choices=list_backbones("resne*"))
    parser.add_argument("--image-size", type=int, default=224, help="side in pixels")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each kind")
    return parser.parse_args()


def keras_convolution():
    """While active, our layer does what Keras' Conv2D does."""
    return mock.patch.object(GroupedConv2D, "convolution_op", keras.layers.Conv2D.convolution_op)


def make_steps(arguments):
    """Returns compiled functions for one forward pass and one training step."""
    size = arguments.image_size
    images = tf.random.uniform((arguments.batch_size, size, size, 3), 0, 255, seed=0)
    labels = tf.zeros((arguments.batch_size,), "int32")
    model = create_backbone(arguments.backbone, classes=10)
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


def main():
    arguments = parse_arguments()
    networks = {"ours": make_steps(arguments)}
    with keras_convolution():
        networks["keras"] = make_steps(arguments)
    side = arguments.image_size
    print(f"{arguments.backbone}, {arguments.batch_size} images of {side} x {side}")
    print(f"{'':15}{'ours':>10}{'Keras':>10}{'Keras / ours':>15}")
    for kind in ("forward", "training step"):
        seconds = {name: [] for name in networks}
        for _ in range(arguments.steps):
            for name, steps in networks.items():
                seconds[name].append(measure(steps[kind]))
        ours, theirs = (statistics.median(seconds[name]) for name in ("ours", "keras"))
        print(f"{kind:15}{ours:9.3f}s{theirs:9.3f}s{theirs / ours:15.2f}")


if __name__ == "__main__":
    main()
