"""Training on many devices and processes equals training on one device."""

import inspect
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

from keras_resnest import trainer
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
    """Return codes and outputs of workers that run in parallel."""
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
    """In the detector's batches the last replicas have no objects."""
    run(tmp_path / "w", "--model", model, "--batch-norm", batch_norm, "--replicas", 1, *replicas)
    for count in replicas:
        assert_same_training(tmp_path / "w_1.npz", tmp_path / f"w_{count}.npz")


def test_gradients_are_clipped_after_they_are_summed():
    program = PROGRAM.with_name("clipped_gradients.py")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True)
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
def test_replicas_may_receive_no_rows(kind):
    """`evaluate`, `predict` and validation on two replicas equal those on one device."""
    program = PROGRAM.with_name("uneven_batches.py")
    done = subprocess.run([sys.executable, str(program), kind], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[0]) >= 5


class Batches(keras.utils.PyDataset):
    """Batches of 8, 8 and `last` rows."""

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
    sizes = trainer._batch_sizes(data, batch_size, split)
    trainer.check_global_batch(sizes, 1)
    if message is None:
        trainer.check_global_batch(sizes, 2)
        return
    with pytest.raises(ValueError, match=message):
        trainer.check_global_batch(sizes, 2)


class Model(trainer.DistributedTraining, keras.Model):
    """The trainer without a detector."""


@pytest.mark.parametrize("method", ["fit", "evaluate", "predict"])
def test_signatures_are_those_of_keras(method):
    own = inspect.signature(getattr(Model, method)).parameters
    assert list(own.values()) == list(
        inspect.signature(getattr(keras.Model, method)).parameters.values()
    )


class EpochCounter:
    """Records the epochs that `fit` sets."""

    def __init__(self):
        self.epochs = []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


def test_positional_arguments():
    """The sixth argument of `fit` is `callbacks`, to which the trainer adds its own."""
    inputs = keras.Input((3,))
    model = Model(inputs, keras.layers.Dense(1)(inputs))
    model.compile("sgd", "mse")
    batches = ROWS.batch(8)
    batches.epoch_counter = EpochCounter()
    seen = []
    callback = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(epoch))
    model.fit(batches, None, None, 3, 0, [callback], 0.0, None, True, None, None, 1)
    assert seen == [1, 2] and batches.epoch_counter.epochs == [1, 2]
    model.fit(TEN, TEN[:, :1], 2, 1, 0, callback)
    assert seen == [1, 2, 0]
    history = model.fit(TEN, TEN[:, :1], verbose=0, validation_data=(TEN, TEN[:, :1])).history
    assert set(history) == {"loss", "val_loss"}  # Keras passes an extra argument to `evaluate`
    loss = model.evaluate(TEN, TEN[:, :1], 5, 0)
    assert loss == pytest.approx(np.mean(model.predict(TEN, 3, 0) ** 2), abs=1e-6)


@pytest.mark.parametrize("method", ["fit", "train_on_batch"])
def test_a_step_is_traced_once(method):
    traces = []

    class Counted(Model):
        def train_step(self, *args):
            traces.append(args)
            return super().train_step(*args)

    inputs = keras.Input((3,))
    model = Counted(inputs, keras.layers.Dense(1)(inputs))
    model.compile("adam", "mse")
    getattr(model, method)(TEN, TEN[:, :1])
    assert len(traces) == 1 and int(model.optimizer.iterations) == 1


def test_a_worker_prints_for_whom_it_waits():
    """The other worker never starts; TensorFlow would wait silently."""
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
    assert "Waiting for all workers" in line and addresses[1] in line


def test_a_lost_worker_ends_the_run_which_resumes_from_its_checkpoint(tmp_path):
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
