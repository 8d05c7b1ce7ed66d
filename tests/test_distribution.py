"""Training on many devices and processes equals training on one device."""

import inspect
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_resnest import trainer
from keras_resnest.cli.workers import free_addresses

WORKER = Path(__file__).with_name("distributed_training.py")


def run_on_many_devices(folder, *functions):
    """Call functions of test programs in one process with four CPU devices."""
    program = Path(__file__).with_name("many_devices.py")
    done = subprocess.run(
        [sys.executable, program, folder, *functions], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def assert_passed(folder, function):
    error = (folder / f"{function}.txt").read_text()
    assert not error, error[-3000:]


@pytest.fixture(scope="module")
def many_devices(tmp_path_factory):
    """The folder of what several programs find: importing TensorFlow once saves 20 s."""
    return run_on_many_devices(
        tmp_path_factory.mktemp("devices"),
        "distributed_training.main",
        "uneven_batches.main",
        "clipped_gradients.main",
        "evaluation_on_replicas.main",
    )


def line_of(process, text):
    """The next line of its output with a text, within two minutes."""
    timer = threading.Timer(120, process.kill)
    timer.start()
    line = next((line for line in process.stdout if text in line), "")
    timer.cancel()
    return line


def run_workers(*arguments):
    """Return codes and outputs of two workers that run in parallel."""
    addresses = free_addresses(2)
    processes = []
    try:
        for i in range(2):
            config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": i}}
            processes.append(
                subprocess.Popen(
                    [sys.executable, *map(str, (WORKER, *arguments))],
                    env={**os.environ, "TF_CONFIG": json.dumps(config)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
            if i == 0:  # TensorFlow would wait silently for the others, which do not run yet
                assert addresses[1] in line_of(processes[0], "Waiting for all workers")
        texts = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], texts


def assert_same_training(one, many, found=True):
    """Weights and losses are the same; so is what was `found`, which workers leave out."""
    one, many = dict(np.load(one)), dict(np.load(many))
    is_found = {name for name in one if name.startswith(("evaluate_", "predict_", "val_"))}
    assert len(is_found) >= 5
    assert set(many) == (set(one) if found else set(one) - is_found)
    moved = 0.0
    for name in many:
        if name.startswith("weight"):
            rtol, atol = 1e-5, 1e-5
        elif name in is_found:
            rtol, atol = 1e-4, 1e-4
        else:
            rtol, atol = 0.0, 1e-4 * np.abs(one[name]).max()
        assert np.shape(many[name]) == np.shape(one[name]), name
        np.testing.assert_allclose(many[name], one[name], rtol, atol, err_msg=name)
        moved += np.abs(one[name]).sum()
    assert np.isfinite(moved)


@pytest.mark.parametrize(
    "kind", ["frozen_detector", "synchronized_classifier", "frozen_classifier"]
)
def test_replicas_are_as_one_device(many_devices, kind):
    """They train, evaluate and predict the same. Replicas may receive no rows or no objects."""
    assert_passed(many_devices, "distributed_training.main")
    assert_same_training(many_devices / f"{kind}_1.npz", many_devices / f"{kind}_2.npz")


@pytest.mark.slow
def test_more_replicas_are_as_one_device(tmp_path):
    run_on_many_devices(tmp_path, "distributed_training.with_more_replicas")
    assert_passed(tmp_path, "distributed_training.with_more_replicas")
    for kind, count in (
        ("frozen_detector", 4),
        ("synchronized_detector", 2),
        ("frozen_classifier", 4),
    ):
        assert_same_training(tmp_path / f"{kind}_1.npz", tmp_path / f"{kind}_{count}.npz")


def test_rows_that_replicas_cannot_share_are_left_out(many_devices):
    assert_passed(many_devices, "uneven_batches.main")


def test_gradients_are_clipped_after_they_are_summed(many_devices):
    assert_passed(many_devices, "clipped_gradients.main")


def test_evaluation_on_two_replicas(many_devices):
    """Detections are neither doubled nor reordered under MirroredStrategy."""
    assert_passed(many_devices, "evaluation_on_replicas.main")


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """Folder of two workers of which one was killed, and of the next two, which train two models.

    With the names of the checkpoints of the first two, their return codes and outputs.
    """
    folder = tmp_path_factory.mktemp("workers")
    lost = run_workers(folder, "frozen_classifier", "--kill-at", 7)
    names = [path.name for path in (folder / "checkpoint").iterdir()]
    codes, texts = run_workers(folder, "frozen_classifier", "frozen_detector")
    assert codes == [0, 0], "\n".join(text[-2000:] for text in texts)
    return folder, names, *lost


def test_a_lost_worker_ends_the_run_which_resumes_from_its_checkpoint(many_devices, workers):
    folder, names, codes, texts = workers
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, -signal.SIGKILL)
    assert "Another worker of this training was lost" in texts[0], texts[0][-2000:]
    assert [name[:12] for name in names] == ["epoch_000001"]
    for worker in range(2):
        output = folder / f"frozen_classifier_{worker}.npz"
        assert_same_training(many_devices / "frozen_classifier_1.npz", output, found=False)


def test_two_processes_train_as_one(many_devices, workers):
    for worker in range(2):
        output = workers[0] / f"frozen_detector_{worker}.npz"
        assert_same_training(many_devices / "frozen_detector_1.npz", output, found=False)


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


def with_boxes(x, y):
    return x, {"boxes": x, "labels": y}


@pytest.mark.parametrize(
    ("data", "batch_size", "split", "want"),
    [
        (ROWS.batch(8, drop_remainder=True), None, 0.0, [8, 8]),
        (ROWS.batch(9, drop_remainder=True), None, 0.0, "a batch of 9"),
        (ROWS.batch(8), None, 0.0, [8, 8]),
        (ROWS.take(15).batch(4), None, 0.0, [4, 4, 4, 2]),
        (ROWS.take(13).batch(4), None, 0.0, [4, 4, 4, 2]),  # one row for each replica
        (ROWS.map(with_boxes).take(7).batch(4), None, 0.0, [4, 2]),
        (TEN, 4, 0.0, 10),
        (TEN, 5, 0.0, "a batch of 5"),
        (TEN[:9], 4, 0.0, 8),
        (TEN[:9], None, 0.0, 8),
        (TEN, 4, 0.3, 9),  # of which 6 are trained
        (TEN, 4, 0.4, 10),
        (Batches(8), None, 0.0, [8, 8, 8]),
        (Batches(3), None, 0.0, [8, 8, 2]),
        (Batches(1), None, 0.0, [8, 8]),
        ((row for row in [(TEN, TEN)]), None, 0.0, "not known beforehand"),
    ],
)
@pytest.mark.filterwarnings("ignore:The 2 replicas")
def test_batches_that_two_replicas_cannot_share(data, batch_size, split, want):
    """`want`: sizes of the batches, rows of the arrays, or an error."""
    others = {"validation_split": split, "y": data}
    if isinstance(want, str):
        with pytest.raises(ValueError, match=want):
            trainer._leave_out_rest(data, others, batch_size, 2)
        return
    x, others = trainer._leave_out_rest(data, others, batch_size, 2)
    if isinstance(want, int):
        assert len(x) == len(others["y"]) == want
        return
    # Of a dataset, Keras runs an empty step at the end if the number of batches is unknown.
    batches = [x[i] for i in range(len(x))] if hasattr(x, "num_batches") else list(x)
    assert hasattr(x, "num_batches") or len(x) == len(batches)
    assert [len(rows) for rows, _ in batches] == want


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
