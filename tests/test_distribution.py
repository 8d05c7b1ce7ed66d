"""Many devices and many processes train what one device trains."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_resnest import trainer as distribution
from keras_resnest.cli.workers import free_addresses

PROGRAM = Path(__file__).with_name("distributed_training.py")


def run(*arguments, config=None, wait=True):
    environment = {k: v for k, v in os.environ.items() if k != "TF_CONFIG"}
    if config is not None:
        environment["TF_CONFIG"] = json.dumps(config)
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if not wait:
        return process
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return output


def run_workers(count, *arguments, outputs):
    """Return codes and printed texts of workers that run side by side."""
    addresses = free_addresses(count)
    processes = [
        run(
            outputs[i],
            *arguments,
            config={"cluster": {"worker": addresses}, "task": {"type": "worker", "index": i}},
            wait=False,
        )
        for i in range(count)
    ]
    texts = [process.communicate(timeout=300)[0] for process in processes]
    return [process.returncode for process in processes], texts


def assert_same_training(one, many):
    one, many = np.load(one), np.load(many)
    assert set(one) == set(many)
    moved = 0.0
    for name in one:
        tolerance = 1e-5 if name.startswith("weight") else 1e-4 * np.abs(one[name]).max()
        np.testing.assert_allclose(many[name], one[name], rtol=0, atol=tolerance, err_msg=name)
        moved += np.abs(one[name]).sum()
    assert np.isfinite(moved)


@pytest.mark.parametrize(
    ("model", "batch_norm", "replicas"),
    [
        ("detector", "frozen", (2,)),
        pytest.param("detector", "frozen", (4,), marks=pytest.mark.slow),
        pytest.param("detector", "synchronized", (2,), marks=pytest.mark.slow),
        pytest.param("classifier", "frozen", (2, 4), marks=pytest.mark.slow),
        ("classifier", "synchronized", (2,)),
    ],
)
def test_replicas_train_as_one_device(tmp_path, model, batch_norm, replicas):
    """In the detector's batches the last replicas have no object."""
    run(tmp_path / "w", "--model", model, "--batch-norm", batch_norm, "--replicas", 1, *replicas)
    for count in replicas:
        assert_same_training(tmp_path / "w_1.npz", tmp_path / f"w_{count}.npz")


CLIPPING = """
import sys
import keras, numpy as np, tensorflow as tf
from keras_resnest.training.strategies import DistributedTraining

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
two = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"], tf.distribute.ReductionToOneDevice())

class Model(DistributedTraining, keras.Model):
    pass

x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
y = np.random.default_rng(1).normal(size=(8, 2)).astype("float32")
y[4:] *= 9  # the second replica has the larger gradient

def weights(strategy, scaled, **clipping):
    with strategy.scope():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((3,))
        model = Model(inputs, keras.layers.Dense(2)(inputs))
        optimizer = keras.optimizers.SGD(1.0, **clipping)
        if scaled:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=64.0)
        model.compile(optimizer, "mse", jit_compile=False)
    start = model.get_weights()
    model.fit(tf.data.Dataset.from_tensors((x, y)).unbatch().batch(8, True), verbose=0)
    gradient = [a - b for a, b in zip(start, model.get_weights())]
    return start, gradient

def truth(start, clipping):
    "The gradient of the mean over the global batch by hand, then clipped."
    kernel, bias = start
    error = 2.0 * (x @ kernel + bias - y) / y.size
    g = [x.T @ error, error.sum(axis=0)]
    (kind, limit), = clipping.items()
    if kind == "clipvalue":
        return [np.clip(v, -limit, limit) for v in g]
    norms = [np.linalg.norm(v) for v in g]
    if kind == "global_clipnorm":
        norms = [np.linalg.norm(norms)] * 2
    assert min(norms) > limit
    return [v * limit / n for v, n in zip(g, norms)]

for clipping in ({"clipnorm": 0.05}, {"global_clipnorm": 0.05}, {"clipvalue": 0.02}):
    for strategy in (tf.distribute.get_strategy(), two):
        for scaled in (False, True):
            start, gradient = weights(strategy, scaled, **clipping)
            for got, want in zip(gradient, truth(start, clipping)):
                np.testing.assert_allclose(got, want, atol=1e-6, err_msg=str((clipping, scaled)))
"""


def test_gradients_are_clipped_after_they_are_added_up():
    """Against the formula; every kind of clipping, with and without loss scaling."""
    done = subprocess.run([sys.executable, "-c", CLIPPING], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("model", ["detector", pytest.param("classifier", marks=pytest.mark.slow)])
def test_two_processes_train_as_one(tmp_path, model):
    run(tmp_path / "w", "--model", model, "--replicas", 1)
    outputs = [tmp_path / "worker_0.npz", tmp_path / "worker_1.npz"]
    codes, texts = run_workers(2, "--model", model, outputs=outputs)
    assert codes == [0, 0], "\n".join(text[-2000:] for text in texts)
    for output in outputs:
        assert_same_training(tmp_path / "w_1.npz", output)


@pytest.mark.parametrize("kind", ["classifier", "detector"])
def test_a_replica_without_a_row_is_no_matter(kind):
    """`evaluate`, `predict` and validation on two replicas give what they give on one device."""
    program = PROGRAM.with_name("uneven_batches.py")
    done = subprocess.run([sys.executable, str(program), kind], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[0]) >= 5


class Batches(keras.utils.PyDataset):
    """Of 8, 8 and `last` rows."""

    def __init__(self, last):
        super().__init__()
        self.last = last

    def __len__(self):
        return 3

    def __getitem__(self, i):
        rows = self.last if i == 2 else 8
        return np.zeros((rows, 3)), np.zeros((rows, 1))


ROWS = tf.data.Dataset.from_tensors((tf.zeros(3), tf.zeros(1))).repeat(16)
TEN = np.zeros((10, 3), "float32")


@pytest.mark.parametrize(
    ("data", "batch_size", "split", "message"),
    [
        (ROWS.batch(8, drop_remainder=True), None, 0.0, None),
        (ROWS.batch(9, drop_remainder=True), None, 0.0, "a batch of 9"),
        (ROWS.batch(8), None, 0.0, "drop_remainder=True"),
        (TEN, 4, 0.0, None),
        (TEN, 5, 0.0, "a batch of 5"),
        (TEN[:9], 4, 0.0, "a batch of 1"),
        (TEN[:9], None, 0.0, "a batch of 9"),
        (TEN, 4, 0.3, "a batch of 3"),
        ({"images": TEN}, 4, 0.4, None),
        (Batches(8), None, 0.0, None),
        (Batches(3), None, 0.0, "a batch of 3"),
        ((row for row in [(TEN, TEN)]), None, 0.0, "not known beforehand"),
    ],
)
def test_batches_that_two_replicas_cannot_share(data, batch_size, split, message):
    sizes = distribution._batch_sizes(data, batch_size, split)
    distribution.check_global_batch(sizes, 1)
    if message is None:
        distribution.check_global_batch(sizes, 2)
        return
    with pytest.raises(ValueError, match=message):
        distribution.check_global_batch(sizes, 2)


def test_a_worker_says_for_whom_it_waits():
    """The other one never comes, and TensorFlow would wait in silence."""
    addresses = free_addresses(2)
    config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": 0}}
    code = "import keras_resnest as kr; kr.training.create_strategy()"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "TF_CONFIG": json.dumps(config)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        line = process.stdout.readline()
    finally:
        process.kill()
        process.wait()
    assert "Waiting until all workers are there" in line and addresses[1] in line


def test_a_lost_worker_ends_the_run_which_goes_on_from_its_checkpoint(tmp_path):
    options = ["--model", "classifier", "--epochs", 2]
    run(tmp_path / "w", *options, "--replicas", 1)
    outputs = [tmp_path / "worker_0.npz", tmp_path / "worker_1.npz"]
    options += ["--checkpoint", tmp_path / "checkpoint"]
    codes, texts = run_workers(2, *options, "--kill-at", 7, outputs=outputs)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, -signal.SIGKILL)
    assert "Another worker of this training was lost" in texts[0], texts[0][-2000:]
    assert [path.name[:12] for path in (tmp_path / "checkpoint").iterdir()] == ["epoch_000001"]
    codes, texts = run_workers(2, *options, outputs=outputs)
    assert codes == [0, 0], "\n".join(text[-2000:] for text in texts)
    for output in outputs:
        assert_same_training(tmp_path / "w_1.npz", output)
