"""Times a training step of RefineDet on ResNeSt against the same network in PyTorch.

A step is forward pass, two-stage loss, backward pass and SGD with momentum. Each framework has its
own process; the two take turns, step by step, so that their ratio is valid on a busy machine too.
On a very busy machine, trust the CPU seconds. Both start from the same weights and batch, and their
losses must agree. Requires PyTorch and the authors' backbone: `pip install torch resnest`.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --image-size 128 --batch-size 2 --precision float32
    python benchmarks/training_step.py --onednn on off

Where TensorFlow disables oneDNN (on processors without AVX-512), set TF_ENABLE_ONEDNN_OPTS=1 for
the speed of the rows "oneDNN on". The first step of each, which traces and allocates, is not
counted. "peak" is the largest resident memory of the process (VmHWM), "step" its growth after the
model was built.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

NUM_CLASSES = 20
LEARNING_RATE = 1e-4
# Of the first step. Later ones differ more: batch normalization over the pooled maps of a small
# batch, inside of Split-Attention, magnifies the rounding of its gradient.
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
LATER_TOLERANCE = 0.15
MODELS = ("resnest50", "resnest101", "resnest200", "resnest269")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_step_options(parser)
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each (%(default)s)")
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=("float32", "bfloat16"),
        default=["float32", "bfloat16"],
        help="float32, or mixed bfloat16: float32 weights, loss and boxes (both)",
    )
    parser.add_argument(
        "--onednn",
        nargs="+",
        choices=("on", "off"),
        default=["on"],
        help="what to set TF_ENABLE_ONEDNN_OPTS to (%(default)s)",
    )
    parser.add_argument(
        "--memory-format",
        nargs="+",
        choices=("channels_first", "channels_last"),
        default=["channels_last"],
        help="PyTorch's layout of maps (%(default)s, which is the faster one)",
    )
    parser.add_argument("--worker", choices=sorted(WORKERS), help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    return parser.parse_args()


def add_step_options(parser):
    """Options that say which step is measured."""
    parser.add_argument("--model", default="resnest50", choices=MODELS, help="(%(default)s)")
    parser.add_argument("--image-size", type=int, default=320, help="side, pixels (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="images (%(default)s)")
    parser.add_argument("--objects", type=int, default=10, help="per image (%(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="(%(default)s)")


def make_batch(batch_size, image_size, objects):
    """Noise, and boxes of all sizes: images, boxes in pixels, labels."""
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 255, (batch_size, image_size, image_size, 3)).astype("float32")
    corners = rng.uniform(0, 0.7, (batch_size, objects, 2)) * image_size
    sizes = rng.uniform(0.03, 0.3, (batch_size, objects, 2)) * image_size
    boxes = np.concatenate([corners, corners + sizes], axis=-1).astype("float32")
    return images, boxes, rng.integers(0, NUM_CLASSES, (batch_size, objects)).astype("int32")


def memory(field):
    """A field of /proc/self/status, in MiB: VmRSS is memory now, VmHWM the most so far."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024


# --- The two sides ---------------------------------------------------------------------------


def make_keras_model(arguments, precision="float32"):
    """Our compiled model."""
    import keras
    import tensorflow as tf

    from keras_resnest import RefineDet

    tf.config.threading.set_intra_op_parallelism_threads(arguments.threads)
    tf.config.threading.set_inter_op_parallelism_threads(arguments.threads)
    keras.utils.set_random_seed(0)
    dtype = {"float32": "float32", "bfloat16": "mixed_bfloat16"}[precision]
    shape = (arguments.image_size, arguments.image_size, 3)
    model = RefineDet(NUM_CLASSES, arguments.model, shape, dtype=dtype)
    model.compile(keras.optimizers.SGD(LEARNING_RATE, momentum=0.9))
    return model


def keras_step(arguments):
    """Returns a function that takes a step and returns the four losses."""
    from keras_resnest.backbones import load_torch_state_dict
    from keras_resnest.detection.loss import LOSS_NAMES

    model = make_keras_model(arguments, arguments.precision[0])
    with np.load(arguments.weights) as weights:
        load_torch_state_dict(model, weights)
    batch = make_batch(arguments.batch_size, arguments.image_size, arguments.objects)
    images, truth = batch[0], {"boxes": batch[1], "labels": batch[2]}

    def step():
        model.reset_metrics()
        logs = model.train_on_batch(images, truth, return_dict=True)
        return [float(logs[name]) for name in LOSS_NAMES]

    return step, sum(int(np.prod(v.shape)) for v in model.trainable_variables)


def torch_step(arguments):
    """As `keras_step`; also writes the weights that both sides start from."""
    import torch
    import torch_refinedet

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = torch_refinedet.RefineDet(NUM_CLASSES, arguments.model).train()
    np.savez(arguments.weights, **{k: v.numpy() for k, v in model.state_dict().items()})
    images, boxes, labels = make_batch(
        arguments.batch_size, arguments.image_size, arguments.objects
    )
    images = torch.from_numpy(images).permute(0, 3, 1, 2)  # has the strides of channels_last
    if arguments.memory_format[0] == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    else:
        images = images.contiguous()
    boxes, labels = torch.from_numpy(boxes), torch.from_numpy(labels).long()
    anchors = torch_refinedet.make_anchors(arguments.image_size)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9)
    half = arguments.precision[0] == "bfloat16"

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            outputs = model(images)
        losses = torch_refinedet.two_stage_loss(outputs, boxes, labels, anchors)
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        return [loss.item() for loss in losses]

    return step, sum(p.numel() for p in model.parameters())


WORKERS = {"keras": keras_step, "torch": torch_step}


def work(arguments):
    """Runs a worker: takes a step for every line of input, and prints a line of JSON for each."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the lines
    step, parameters = WORKERS[arguments.worker](arguments)
    before = memory("VmRSS")
    print(json.dumps({"parameters": parameters}), file=channel, flush=True)
    for _ in sys.stdin:
        start, cpu_start = time.perf_counter(), time.process_time()
        losses = step()
        cpu_seconds = time.process_time() - cpu_start
        seconds = time.perf_counter() - start
        result = {"seconds": seconds, "cpu_seconds": cpu_seconds, "losses": losses}
        result |= {"peak": memory("VmHWM"), "before": before}
        print(json.dumps(result), file=channel, flush=True)


# --- The comparison --------------------------------------------------------------------------


class Worker:
    """A process that takes a training step when it is asked to."""

    def __init__(self, name, arguments, precision, onednn, memory_format, weights):
        options = [f"--{o}={getattr(arguments, o.replace('-', '_'))}" for o in STEP_OPTIONS]
        options += ["--worker", name, "--weights", weights, "--precision", precision]
        options += ["--memory-format", memory_format]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(arguments.threads),
            "TF_ENABLE_ONEDNN_OPTS": "1" if onednn == "on" else "0",
            "TF_CPP_MIN_LOG_LEVEL": "2",
            "KERAS_BACKEND": "tensorflow",
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if not os.environ.get("VERBOSE") else None,
            text=True,
            env=environment,
        )
        self.parameters = self._read()["parameters"]
        self.results = []

    def step(self):
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.results.append(self._read())

    def _read(self):
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise SystemExit(f"The worker ended:\n{self.process.stderr.read()}")
        return json.loads(line)

    def close(self):
        self.process.communicate()

    def timed(self, what):
        """Seconds, or CPU seconds, of all steps but the first."""
        return [result[what] for result in self.results[1:]]


STEP_OPTIONS = ("model", "image-size", "batch-size", "objects", "threads")


def compare(arguments, precision, onednn, memory_format):
    """Prints the rows of both frameworks."""
    with tempfile.TemporaryDirectory() as folder:
        weights = os.path.join(folder, "weights.npz")
        workers = {
            name: Worker(name, arguments, precision, onednn, memory_format, weights)
            for name in ("torch", "keras")
        }
    for _ in range(max(arguments.steps + 1, 3)):
        for worker in workers.values():
            worker.step()
    check(workers, precision)
    labels = {"torch": f"PyTorch, {memory_format}", "keras": f"keras_resnest, oneDNN {onednn}"}
    for name, worker in workers.items():
        report(precision, labels[name], worker, workers["torch"])
        worker.close()


def check(workers, precision):
    """Both sides have as many weights and the same losses, so they compute the same."""
    ours, theirs = workers["keras"], workers["torch"]
    if ours.parameters != theirs.parameters:
        raise SystemExit(f"{ours.parameters} and {theirs.parameters} parameters")
    tolerances = [LOSS_TOLERANCE[precision], LATER_TOLERANCE, LATER_TOLERANCE]
    for step, tolerance in enumerate(tolerances):
        np.testing.assert_allclose(
            ours.results[step]["losses"],
            theirs.results[step]["losses"],
            rtol=tolerance,
            err_msg=f"The losses of step {step} differ",
        )


def report(precision, label, worker, peer):
    columns = []
    for what in ("seconds", "cpu_seconds"):
        times = worker.timed(what)
        median = statistics.median(times)
        ratio = median / statistics.median(peer.timed(what))
        columns.append(f"{median:9.2f}{min(times):8.2f}{max(times):8.2f}{ratio:7.2f}")
    result = worker.results[-1]
    columns.append(f"{result['peak']:8.0f}{result['peak'] - result['before']:8.0f}")
    print(f"{precision:10}{label:28}{''.join(columns)}", flush=True)


def main():
    arguments = parse_arguments()
    if arguments.worker:
        return work(arguments)
    missing = [name for name in ("torch", "resnest") if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"Not installed: {', '.join(missing)}. Run: pip install torch resnest")
    size = arguments.image_size
    print(
        f"RefineDet-{arguments.model}, {arguments.batch_size} x {size} x {size}, "
        f"{arguments.objects} objects each, {arguments.threads} threads; seconds of a step, CPU "
        "seconds of all threads, ratios of the medians to PyTorch, MiB"
    )
    columns = (
        f"{'s':>9}{'min':>8}{'max':>8}{'ratio':>7}{'CPU s':>9}{'min':>8}{'max':>8}{'ratio':>7}"
    )
    print(f"{'':38}{columns}{'peak':>8}{'step':>8}")
    for precision in arguments.precision:
        for onednn in arguments.onednn:
            for memory_format in arguments.memory_format:
                compare(arguments, precision, onednn, memory_format)


if __name__ == "__main__":
    main()
