"""Times decoding and non-maximum suppression, and the network, on any Keras backend.

    KERAS_BACKEND=jax python benchmarks/decoding.py
    python benchmarks/decoding.py --classes 80 --batches 1 8 32

Two kinds of raw outputs: as after training (a few clusters of boxes per image), and crowded (every
anchor is a candidate of every class). Medians of compiled calls, data already on the device.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # hide TensorFlow's start-up messages

import keras
import numpy as np
from keras import ops

import keras_resnest as kr


def compiled(function):
    """Compiles a function of tensors as `predict` does on this backend."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.jit(function)
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(function)
    return function


def milliseconds(function, *inputs, runs: int) -> float:
    """Median time of a call, until its result is on the host."""
    times = []
    for _ in range(runs + 3):
        start = time.perf_counter()
        keras.tree.map_structure(ops.convert_to_numpy, function(*inputs))
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[3:])


def raw_outputs(batch: int, num_anchors: int, num_classes: int, crowded: bool) -> dict:
    """Random raw outputs; unless crowded, ten runs of 30 anchors per image have objects."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1, (batch, num_anchors, num_classes + 1)).astype("float32")
    logits[..., 0] += 0 if crowded else 12
    for image in range(0 if crowded else batch):
        for start in rng.integers(0, num_anchors - 30, 10):
            logits[image, start : start + 30, rng.integers(1, num_classes + 1)] += 12
    offsets = rng.normal(0, 0.5, (2, batch, num_anchors, 4)).astype("float32")
    objectness = np.zeros((batch, num_anchors, 2), "float32")
    return {
        "arm_boxes": offsets[0],
        "arm_objectness": objectness,
        "odm_boxes": offsets[1],
        "odm_logits": logits,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--runs", type=int, default=20)
    arguments = parser.parse_args()
    model = kr.builders.refinedet320_resnest50(arguments.classes)
    network = compiled(lambda images: model(images, training=False)["odm_logits"][:, 0])
    decode = compiled(model.decode)
    print(f"{keras.backend.backend()}, {model.name}, {arguments.classes} classes, ms per batch")
    print(f"{'batch':>6}{'network':>9}{'trained':>9}{'crowded':>9}{'trained / network':>19}")
    for batch in arguments.batches:
        images = ops.convert_to_tensor(np.zeros((batch, *model.image_shape), "float32"))
        times = [milliseconds(network, images, runs=arguments.runs)]
        for crowded in (False, True):
            outputs = raw_outputs(batch, len(model.anchors), arguments.classes, crowded)
            outputs = {name: ops.convert_to_tensor(value) for name, value in outputs.items()}
            times.append(milliseconds(decode, outputs, runs=arguments.runs))
        ratio = times[1] / times[0]
        print(f"{batch:6}" + "".join(f"{t:9.2f}" for t in times) + f"{ratio:19.2f}")


if __name__ == "__main__":
    main()
