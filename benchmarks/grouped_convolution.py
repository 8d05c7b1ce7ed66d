"""Times networks with our grouped convolution against the same networks with Keras' own.

Both have the same weights and images and take turns in one process, so that their ratio is valid on
a busy machine too. Their losses must be equal. TensorFlow only.

    python benchmarks/grouped_convolution.py
    python benchmarks/grouped_convolution.py resnest50 --image-size 160 --batch-size 2

Keras' gradient of a convolution with many groups takes minutes. For such networks, batch and images
are smaller by default, and no turn starts after `--seconds`. The first step of each, which traces
and compiles, is not counted.

Where TensorFlow disables oneDNN (it prints a message at its start), set TF_ENABLE_ONEDNN_OPTS=1 to
use its grouped kernels; without them, our layer convolves group by group.
"""

import argparse
import contextlib
import statistics
import time
from unittest import mock

import keras
import numpy as np
import tensorflow as tf

from keras_resnest.backbones import VARIANTS, create_backbone
from keras_resnest.layers import GroupedConv2D

MANY_GROUPS = 8


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "networks",
        nargs="*",
        default=["resnest50", "resnext50_32x4d", "regnety_016"],
        help="names of networks (%(default)s)",
    )
    many = f"from {MANY_GROUPS} groups on"
    parser.add_argument("--image-size", type=int, help=f"side in pixels (224; {many} 128)")
    parser.add_argument("--batch-size", type=int, help=f"images of a step (8; {many} 2)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each kind")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="for the turns of each kind (%(default)s)"
    )
    arguments = parser.parse_args()
    unknown = set(arguments.networks) - set(VARIANTS)
    if unknown:
        parser.error(f"no such network: {', '.join(sorted(unknown))}")
    return arguments


def keras_convolution():
    """While active, our layer does what Keras' Conv2D does."""
    return mock.patch.object(GroupedConv2D, "convolution_op", keras.layers.Conv2D.convolution_op)


def groups_of(name):
    """The most channel groups that a convolution of the network has."""
    model = create_backbone(name)
    layers = model._flatten_layers(include_self=False)
    return max(layer.groups for layer in layers if isinstance(layer, GroupedConv2D))


def make_steps(name, images):
    """Returns compiled functions for one forward pass and one training step."""
    labels = tf.zeros((len(images),), "int32")
    keras.utils.set_random_seed(0)
    model = create_backbone(name, classes=10, classifier_activation=None)
    optimizer = keras.optimizers.SGD(1e-3)
    optimizer.build(model.trainable_variables)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function
    def forward():
        return model(images, training=False)

    @tf.function
    def train():
        with tf.GradientTape() as tape:
            value = loss(labels, model(images, training=True))
        variables = [v.value for v in model.trainable_variables]
        optimizer.apply(tape.gradient(value, variables), model.trainable_variables)
        return value

    return {"forward": forward, "training step": train}


def trace(name, networks):
    """Calls every step once, and checks that both networks have the same training loss."""
    losses = []
    for key, context in (("ours", contextlib.nullcontext()), ("keras", keras_convolution())):
        with context:
            # Not compared: without statistics for its norms a random network magnifies rounding.
            networks[key]["forward"]().numpy()
            losses.append(networks[key]["training step"]().numpy())
    np.testing.assert_allclose(*losses, rtol=1e-3, err_msg=name)


def measure(step):
    start = time.perf_counter()
    step().numpy()
    return time.perf_counter() - start


def compare(name, arguments):
    """Prints both times of one network, and their ratio."""
    many = groups_of(name) >= MANY_GROUPS
    size = arguments.image_size or (128 if many else 224)
    batch_size = arguments.batch_size or (2 if many else 8)
    images = np.random.default_rng(0).uniform(0, 255, (batch_size, size, size, 3))
    images = tf.constant(images, "float32")
    networks = {key: make_steps(name, images) for key in ("ours", "keras")}
    trace(name, networks)
    for kind in ("forward", "training step"):
        seconds = {key: [] for key in networks}
        start = time.perf_counter()
        for _ in range(arguments.steps):
            for key, steps in networks.items():
                seconds[key].append(measure(steps[kind]))
            if time.perf_counter() - start > arguments.seconds:
                break
        report(f"{name}, {batch_size} x {size} x {size}", kind, seconds)


def report(network, kind, seconds):
    medians = {key: statistics.median(times) for key, times in seconds.items()}
    shown = [f"{medians[key]:9.3f} {min(times):9.3f}" for key, times in seconds.items()]
    ratio = medians["keras"] / medians["ours"]
    count = len(seconds["ours"])
    print(f"{network:32}{kind:14}{shown[0]}  {shown[1]} {ratio:8.2f}{count:7}", flush=True)


def main():
    arguments = parse_arguments()
    print(f"{'seconds':46}{'ours':>9}{'min':>10}{'Keras':>11}{'min':>10}{'ratio':>9}{'steps':>7}")
    for name in arguments.networks:
        compare(name, arguments)
        keras.backend.clear_session()


if __name__ == "__main__":
    main()
