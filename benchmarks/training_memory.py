"""Prints the memory of a training step of RefineDet by batch size and number of objects.

Each case runs in its own process, which builds the model and takes `--steps` steps. "peak" is the
largest resident memory of the process (VmHWM of /proc/self/status), "step" its growth after the
model was built: optimizer, graph, feature maps, loss. "pairs" is the size of an array with a
float32 for each pair of an object and an anchor: batch x anchors x boxes x 4 bytes. "growth" is the
additional memory relative to the case with the fewest boxes; since matching compares 16 objects at
a time, it does not grow with the number of boxes. Linux only.

    python benchmarks/training_memory.py
    python benchmarks/training_memory.py --image-size 128 --batch-sizes 1 2 --object-counts 10 1000
    python benchmarks/training_memory.py --loss-only

`--loss-only` measures matching and loss without the network, forward and backward, on random
outputs, so that the peak of the network's backward pass does not hide the growth.
"""

import argparse
import json
import os
import subprocess
import sys

from training_step import NUM_CLASSES, add_step_options, make_batch, make_keras_model, memory


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_step_options(parser)
    parser.set_defaults(batch_size=4)
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8], help="(%(default)s)"
    )
    parser.add_argument(
        "--object-counts",
        type=int,
        nargs="+",
        default=[10, 100, 1000],
        help="boxes of an image, at --batch-size images (%(default)s)",
    )
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=2, help="of each case (%(default)s)")
    parser.add_argument("--loss-only", action="store_true", help="matching and loss alone")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def whole_step(arguments):
    """Returns the anchors of an image, and a function that takes a step on a batch."""
    model = make_keras_model(arguments, arguments.precision)

    def step(images, boxes, labels):
        model.train_on_batch(images, {"boxes": boxes, "labels": labels})

    return len(model.anchors), step


def loss_step(arguments):
    """As `whole_step`, of the loss alone: no network is built."""
    import keras
    import tensorflow as tf

    from keras_resnest import RefineDet
    from keras_resnest.detection import RefineDetHeads

    side = arguments.image_size
    # The smallest network: only its anchors and its loss are used.
    model = RefineDet(NUM_CLASSES, "resnest14_tiny", (side, side, 3), heads=RefineDetHeads(8))
    rng = keras.random.SeedGenerator(0)

    @tf.function(reduce_retracing=True)
    def step(images, boxes, labels):
        batch, anchors = tf.shape(images)[0], len(model.anchors)
        widths = {"arm_boxes": 4, "arm_objectness": 2, "odm_boxes": 4, "odm_logits": 21}
        outputs = {
            name: keras.random.normal((batch, anchors, width), stddev=0.1, seed=rng)
            for name, width in widths.items()
        }
        with tf.GradientTape() as tape:
            tape.watch(outputs)
            loss = sum(model.detection_loss(outputs, boxes, labels, model.anchors).values())
        return tape.gradient(loss, outputs)

    return len(model.anchors), step


def work(arguments):
    """Measures one case, and prints it as a line of JSON."""
    anchors, step = (loss_step if arguments.loss_only else whole_step)(arguments)
    side = arguments.image_size
    before = memory("VmRSS")
    for _ in range(arguments.steps):
        step(*make_batch(arguments.batch_size, side, arguments.objects))
    print(json.dumps({"anchors": anchors, "before": before, "peak": memory("VmHWM")}))


def measure(arguments, batch_size, objects):
    """Starts a process for one case. Returns what it printed."""
    options = [
        f"--batch-size={batch_size}",
        f"--objects={objects}",
        f"--model={arguments.model}",
        f"--image-size={arguments.image_size}",
        f"--threads={arguments.threads}",
        f"--precision={arguments.precision}",
        f"--steps={arguments.steps}",
        *(["--loss-only"] if arguments.loss_only else []),
    ]
    result = subprocess.run(
        [sys.executable, __file__, "--worker", *options],
        capture_output=True,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", "KERAS_BACKEND": "tensorflow"},
    )
    if result.returncode:
        raise SystemExit(f"The case failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def report(batch_size, objects, case, least=None):
    """Prints a case. Returns its peak."""
    pairs = batch_size * case["anchors"] * objects * 4 / 2**20
    growth = "" if least is None else f"{case['peak'] - least:10.0f}"
    step = case["peak"] - case["before"]
    print(
        f"{batch_size:6}{objects:8}{case['peak']:10.0f}{step:10.0f}{pairs:10.1f}{growth}",
        flush=True,
    )
    return case["peak"]


def main():
    arguments = parse_arguments()
    if arguments.worker:
        return work(arguments)
    what = "Matching and loss" if arguments.loss_only else f"RefineDet-{arguments.model}"
    print(f"{what}, {arguments.image_size} pixels, {arguments.precision}; MiB.")
    header = f"{'batch':>6}{'boxes':>8}{'peak':>10}{'step':>10}{'pairs':>10}"
    print(header)
    for batch_size in arguments.batch_sizes:
        report(batch_size, arguments.objects, measure(arguments, batch_size, arguments.objects))
    print(f"{header}{'growth':>10}")
    least = None
    for objects in sorted(arguments.object_counts):
        case = measure(arguments, arguments.batch_size, objects)
        peak = report(arguments.batch_size, objects, case, least)
        least = peak if least is None else least


if __name__ == "__main__":
    main()
