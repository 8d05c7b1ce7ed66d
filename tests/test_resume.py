"""A resumed training ends with the same weights as an uninterrupted one."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from detectors import small_detector

from keras_resnest.data import (
    ClassificationDataset,
    DetectionDataset,
    ImageRecord,
    LabeledImage,
    classification_batches,
)
from keras_resnest.detection import AnchorGenerator, BoxMatcher, RefineDetLoss
from keras_resnest.images import ImageInfo
from keras_resnest.trainer import DistributedTraining
from keras_resnest.training.callbacks import ResumeTraining
from keras_resnest.training.strategies import create_strategy, read_tf_config

PROGRAM = Path(__file__).with_name("resumable_training.py")


def run(*arguments):
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


# Five steps per epoch: step 8 is inside the second one.
@pytest.mark.parametrize("every_steps", [pytest.param(None, marks=pytest.mark.slow), 2])
def test_resumed_run_is_bitwise_the_same(tmp_path, every_steps):
    options = [] if every_steps is None else ["--every-steps", every_steps]
    killed = run(tmp_path, "--kill-at", 8, *options)
    assert killed.returncode == -signal.SIGKILL
    again = run(tmp_path, *options)
    assert again.returncode == 0, again.stderr[-2000:]
    result, uninterrupted = (
        dict(np.load(tmp_path / f"{name}.npz")) for name in ("resumed", "uninterrupted")
    )
    assert (result.pop("first_epoch"), uninterrupted.pop("first_epoch")) == (1, 0)
    assert set(result) == set(uninterrupted) and len(result) > 100
    for name, value in result.items():
        np.testing.assert_array_equal(value, uninterrupted[name], err_msg=name)


# === Small models ===

X = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
Y = X[:, :1] * 2


def small_model(units=3):
    keras.utils.set_random_seed(0)
    layers = [keras.Input((4,)), keras.layers.Dense(units), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "mse")
    return model


def fit(model, callback, epochs, **kwargs):
    options = {"batch_size": 4, "shuffle": False, "verbose": 0, **kwargs}
    return model.fit(X, Y, epochs=epochs, callbacks=[callback], **options)


def weights_after(epochs):
    model = small_model()
    model.fit(X, Y, epochs=epochs, batch_size=4, shuffle=False, verbose=0)
    return model.get_weights()


def test_resumes_after_complete_epochs(tmp_path):
    fit(small_model(), ResumeTraining(tmp_path), 2)
    resume = ResumeTraining(tmp_path)
    assert resume.initial_epoch == 2
    model = small_model()
    history = fit(model, resume, 5)
    for one, other in zip(weights_after(5), model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert history.epoch == [0, 1, 2, 3, 4] and len(history.history["loss"]) == 5


class Crash(keras.callbacks.Callback):
    def __init__(self, at):
        super().__init__()
        self.at = at

    def on_train_batch_begin(self, batch, logs=None):
        if int(self.model.optimizer.iterations) == self.at:
            raise RuntimeError("crash")


@pytest.mark.parametrize("every_steps", [None, 1])
def test_metrics_of_compile_come_back(tmp_path, every_steps):
    """They do not exist before the first batch. Four steps per epoch: 6 is inside the second."""

    def train(folder, crash_at):
        model = small_model()
        model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae", "mse"])
        callbacks = [ResumeTraining(folder, every_steps=every_steps), Crash(crash_at)]
        options = {"batch_size": 4, "shuffle": False, "verbose": 0, "epochs": 3}
        return model.fit(X, Y, callbacks=callbacks, **options), model

    want, one = train(tmp_path / "whole", -1)
    with pytest.raises(RuntimeError, match="crash"):
        train(tmp_path / "crashed", 6)
    got, other = train(tmp_path / "crashed", -1)
    assert got.history == want.history and set(got.history) == {"loss", "mae", "mse"}
    for a, b in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_finished_training_does_nothing(tmp_path):
    fit(small_model(), ResumeTraining(tmp_path), 2)
    model = small_model()
    fit(model, ResumeTraining(tmp_path), 2)
    for one, other in zip(weights_after(2), model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_memory_of_other_callbacks(tmp_path):
    best = keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", "loss", save_best_only=True)
    model = small_model()
    resume = ResumeTraining(tmp_path / "c", callbacks=[best])
    model.fit(X, Y, epochs=2, verbose=0, callbacks=[best, resume])
    assert np.isfinite(best.best)
    fresh = keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", "loss", save_best_only=True)
    resume = ResumeTraining(tmp_path / "c", callbacks=[fresh])
    small_model().fit(X, Y, epochs=2, verbose=0, callbacks=[fresh, resume])
    assert fresh.best == best.best


@pytest.mark.parametrize("damage", ["truncated", "without state", "half written"])
def test_the_previous_checkpoint_replaces_a_damaged_one(tmp_path, damage):
    fit(small_model(), ResumeTraining(tmp_path), 3)
    newest = sorted(tmp_path.glob("epoch_*"))[-1]
    assert newest.name.startswith("epoch_000003")
    if damage == "truncated":
        data = (newest / "arrays.npz").read_bytes()
        (newest / "arrays.npz").write_bytes(data[: len(data) // 2])
    elif damage == "without state":
        (newest / "state.json").unlink()
    else:
        newest.rename(newest.with_name(f".{newest.name}.1a2b"))
    resume = ResumeTraining(tmp_path)
    assert resume.initial_epoch == 2
    model = small_model()
    fit(model, resume, 4)
    for one, other in zip(weights_after(4), model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not list(tmp_path.glob(".*"))


def test_only_two_checkpoints_are_kept(tmp_path):
    fit(small_model(), ResumeTraining(tmp_path, every_steps=1), 3)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_checkpoint_of_another_model(tmp_path):
    fit(small_model(), ResumeTraining(tmp_path), 1)
    with pytest.raises(ValueError, match="checkpoint of another model"):
        fit(small_model(units=5), ResumeTraining(tmp_path), 2)


def test_a_checkpoint_of_other_classes(tmp_path):
    def resume(*names):
        return ResumeTraining(tmp_path, metadata={"class_names": names})

    fit(small_model(), resume("cat", "dog"), 1)
    fit(small_model(), resume("cat", "dog"), 2)
    with pytest.raises(ValueError, match=r'class_names: \["cat", "dog"\], here \["dog", "cat"\]'):
        fit(small_model(), resume("dog", "cat"), 3)


# === What a checkpoint rests on ===


class Classifier(DistributedTraining, keras.Model):
    def __init__(self):
        images = keras.Input((8, 8, 3))
        features = keras.layers.GlobalAveragePooling2D()(images)
        super().__init__(images, keras.layers.Dense(2)(features))


def train_on_images(
    folder, names="abcdef", batch_size=2, seed=1, epochs=1, optimizer=None, labels=(0, 1) * 4
):
    """Trains on one gray image for each name."""
    pixels, info = np.full((8, 8, 3), 100, "uint8"), ImageInfo(8, 8)
    pairs = zip(names, labels, strict=False)
    records = [LabeledImage(pixels, name, label, info) for name, label in pairs]
    dataset = ClassificationDataset(records, ["cat", "dog"])
    batches = classification_batches(
        dataset, (8, 8), batch_size, training=True, augmentation=None, seed=seed
    )
    model = Classifier()
    model.compile(optimizer or keras.optimizers.SGD(1e-3, momentum=0.9), "mse")
    return model.fit(batches, epochs=epochs, verbose=0, callbacks=[ResumeTraining(folder)])


@pytest.fixture(scope="module")
def run_on_images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    train_on_images(folder)
    return folder


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("run. Its images: 6, here 7", {"names": "abcdefg"}),
        ('run. Its names of images: "checksum [0-9a-f]{8}", here', {"names": "abcdeg"}),
        (
            'run. Its annotations of images: "checksum [0-9a-f]{8}", here',
            {"labels": (0, 1, 1, 0, 0, 1)},
        ),
        ("run. Its steps_per_epoch: 3, here 2; batch_size: 2, here 3", {"batch_size": 3}),
        ("run. Its seed: 1, here 2", {"seed": 2}),
        ("run. Its seed: 1, here null", {"seed": None}),
        (
            "model. Its optimizer_settings: .*, here",
            {"optimizer": keras.optimizers.SGD(1e-3, momentum=0.8)},
        ),
        ("model. Its optimizer: ", {"optimizer": keras.optimizers.Adam(1e-3)}),
    ],
)
def test_a_checkpoint_of_another_run(run_on_images, message, options):
    with pytest.raises(ValueError, match=f"has a checkpoint of another {message}"):
        train_on_images(run_on_images, epochs=2, **options)


def test_boxes_and_labels_tell_data_from_other_data():
    def annotations(box=(0, 0, 4, 4), label=0, difficult=False):
        rows = {"boxes": [box], "labels": [label], "difficult": [difficult]}
        record = ImageRecord("a.png", "a", **rows, info=ImageInfo(8, 8))
        return DetectionDataset([record], ["cat", "dog"]).identity["annotations of images"]

    changes = [{}, {"box": (0, 0, 4, 5)}, {"label": 1}, {"difficult": True}]
    assert annotations() == annotations()
    assert len({annotations(**change) for change in changes}) == 4


def test_epochs_and_the_schedule_may_change(tmp_path):
    for epochs in (1, 2):
        schedule = keras.optimizers.schedules.CosineDecay(1e-3, 100 * epochs)
        history = train_on_images(tmp_path, epochs=epochs, optimizer=keras.optimizers.SGD(schedule))
    assert history.epoch == [0, 1]


def test_fewer_epochs_than_the_checkpoint_has(tmp_path):
    fit(small_model(), ResumeTraining(tmp_path), 2)
    with pytest.raises(ValueError, match="`epochs` must be at least those of the checkpoint"):
        fit(small_model(), ResumeTraining(tmp_path), 1)


@pytest.mark.parametrize("steps", [3, None])
def test_fewer_steps_than_the_checkpoint_has(tmp_path, steps):
    """Of a generator, the number of steps is not known beforehand."""

    def train(count, crash_at):
        def batches():
            for _ in range(3):
                yield from ((X[i : i + 1], Y[i : i + 1]) for i in range(count))

        data = (
            batches()
            if steps is None
            else tf.data.Dataset.from_generator(
                batches, output_signature=tuple(tf.TensorSpec((1, a.shape[1])) for a in (X, Y))
            )
        )
        callbacks = [ResumeTraining(tmp_path, every_steps=1), Crash(crash_at)]
        small_model().fit(data, verbose=0, callbacks=callbacks, steps_per_epoch=steps and count)

    with pytest.raises(RuntimeError, match="crash"):
        train(8, 6)
    message = (
        "steps_per_epoch: 8, here 3" if steps else "rests on 6 batches.* Received: data with 3"
    )
    with pytest.raises(ValueError, match=message):
        train(3 if steps else 1, -1)


def test_the_next_training_starts_at_the_first_epoch(tmp_path):
    model = small_model()
    fit(model, ResumeTraining(tmp_path), 1)
    fit(model, ResumeTraining(tmp_path), 3)
    assert model.fit(X, Y, epochs=2, verbose=0).epoch == [0, 1]


def test_early_stopping_keeps_its_state_and_the_best_weights(tmp_path):
    """Also in front of the other callback, and not the state of one that monitors another value."""

    def train(epochs, monitor="loss"):
        stop = keras.callbacks.EarlyStopping(
            monitor, mode="max", patience=9, restore_best_weights=True
        )
        model = small_model()
        resume = ResumeTraining(tmp_path, callbacks=[stop])
        model.fit(X, Y, epochs=epochs, verbose=0, shuffle=False, callbacks=[resume, stop, resume])
        return stop, model.get_weights()

    best, weights = train(1)  # the loss falls: the first epoch has the highest
    stop, after = train(3)
    assert stop.best == best.best and stop.best_epoch == 0 and stop.wait == 2
    for one, other in zip(weights, after, strict=True):
        np.testing.assert_array_equal(one, other)
    assert train(4, "other")[0].best is None


def begin_detector_training(folder, **options):
    model, resume = small_detector(**options), ResumeTraining(folder)
    model.compile(keras.optimizers.SGD(0.1))
    model.history = keras.callbacks.History()  # as in `fit`
    resume.set_model(model)
    resume.on_train_begin()
    return resume


@pytest.fixture(scope="module")
def detector_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector")
    begin_detector_training(folder).on_epoch_end(0)
    assert begin_detector_training(folder).initial_epoch == 1
    return folder


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("class_names", {"class_names": ["a", "b", "c"]}),
        ("image_shape", {"image_shape": (128, 64, 3)}),
        ("anchor_generator", {"anchor_generator": AnchorGenerator(sizes=(24, 48, 96, 192))}),
        ("detection_loss", {"switches": {"two_step_regression": False}}),
        ("detection_loss", {"detection_loss": RefineDetLoss(BoxMatcher(iou_threshold=0.6))}),
    ],
)
def test_a_checkpoint_of_another_detector(detector_checkpoint, name, options):
    """All of these have weights of the same shapes."""
    with pytest.raises(ValueError, match=f"checkpoint of another model. Its {name}: "):
        begin_detector_training(detector_checkpoint, **options)


def test_an_unwritable_folder_is_reported_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    model = small_model()
    before = model.get_weights()
    with pytest.raises(OSError, match="`folder` cannot be written"):
        fit(model, ResumeTraining(tmp_path / "file" / "checkpoint"), 1)
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_room_for_checkpoints_is_what_they_take(tmp_path, monkeypatch):
    """Three while the last is written; those that are there count."""

    def train(model, epochs, free):
        usage = shutil.disk_usage(tmp_path)._replace(free=int(free))
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: usage)
            fit(model, ResumeTraining(tmp_path / "run"), epochs)

    units = 5000
    fit(small_model(units), ResumeTraining(tmp_path / "other"), 1)
    (arrays,) = (tmp_path / "other").glob("*/arrays.npz")
    size = arrays.stat().st_size
    with pytest.raises(OSError, match="needs room for 2 checkpoints and the one"):
        train(small_model(units), 1, free=2.9 * size)
    train(small_model(units), 2, free=3.1 * size)
    with pytest.raises(OSError, match="needs room"):
        train(small_model(units), 3, free=0.9 * size)
    train(small_model(units), 3, free=1.1 * size)


def test_a_removed_folder_ends_the_training(tmp_path):
    def remove(epoch, logs):
        shutil.rmtree(tmp_path / "run")

    callbacks = [
        keras.callbacks.LambdaCallback(on_epoch_begin=remove),
        ResumeTraining(tmp_path / "run" / "checkpoint"),
    ]
    with pytest.raises(OSError, match="`folder` was removed during the training"):
        small_model().fit(X, Y, verbose=0, callbacks=callbacks)
    assert not list(tmp_path.iterdir())


def test_every_steps_with_steps_per_execution(tmp_path):
    model = small_model()
    model.compile(keras.optimizers.SGD(0.01), "mse", steps_per_execution=2)
    # Eight steps, two per execution: the first one at least three after a checkpoint is 4.
    fit(model, ResumeTraining(tmp_path, every_steps=3), 1, batch_size=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["epoch_000000_step_00000008", "epoch_000001_step_00000000"]


@pytest.mark.parametrize("every_steps", [0, -1, 1.5])
def test_every_steps_must_be_a_positive_integer(tmp_path, every_steps):
    with pytest.raises(ValueError, match="`every_steps` must be "):
        ResumeTraining(tmp_path, every_steps=every_steps)


# === TF_CONFIG ===


def config(address, index):
    task = {"type": "worker", "index": index}
    return json.dumps({"cluster": {"worker": [address]}, "task": task})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON"),
        ('{"cluster": {}}', "must be JSON"),
        (json.dumps({"cluster": {}, "task": {"type": "worker", "index": 0}}), "jobs of a cluster"),
        (
            json.dumps({"cluster": {"ps": ["a:1"]}, "task": {"type": "ps", "index": 0}}),
            "jobs of a cluster",
        ),
        (
            json.dumps({"cluster": {"worker": ["a"]}, "task": {"type": "worker", "index": 0}}),
            "addresses must be",
        ),
        (
            json.dumps(
                {"cluster": {"worker": ["a:1"] * 2}, "task": {"type": "worker", "index": 0}}
            ),
            "addresses must be",
        ),
        (
            json.dumps({"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}),
            "must be one of the cluster",
        ),
        *((config("a:1", index), "not a whole number") for index in (0.7, True, "first")),
        (config("a:1", -1), "must be one of the cluster"),
        *(
            (config(address, 0), "ports of 1 to 65535")
            for address in ("a:99999", "a:0", ":2222", "a:", 2222)
        ),
        (
            json.dumps(
                {"cluster": {"chief": ["a:1", "b:1"]}, "task": {"type": "chief", "index": 0}}
            ),
            'one "chief" only',
        ),
    ],
)
def test_an_invalid_tf_config_is_reported(monkeypatch, text, message):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(ValueError, match=message):
        create_strategy("auto")


def test_an_index_may_be_text(monkeypatch):
    text = '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": "1"}}'
    monkeypatch.setenv("TF_CONFIG", text)
    assert read_tf_config()["task"]["index"] == 1


def test_strategies(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    assert isinstance(create_strategy("mirrored"), tf.distribute.MirroredStrategy)
    assert create_strategy("none").num_replicas_in_sync == 1
    with pytest.raises(ValueError, match="needs the environment variable TF_CONFIG"):
        create_strategy("multi_worker")
    with pytest.raises(ValueError, match="must be one of"):
        create_strategy("parameter_server")
