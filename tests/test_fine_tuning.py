"""Frozen stages, slower backbones and a limit of time."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from detectors import WHOLE, rectangles, small_detector

from keras_resnest.trainer import DistributedTraining
from keras_resnest.training import pacing
from keras_resnest.training.callbacks import ResumeTraining, TimeLimit, UnfreezeStages
from keras_resnest.training.optimizers import AdamW, SGDWithL2

SHAPE = (64, 64, 3)
DATA = rectangles(4, SHAPE, objects=1)
FROZEN = ("conv1", "bn1", "layer1_", "layer2_")  # stem and two stages


def detector(frozen=2, optimizer=None, **options):
    """Without a graph, since that takes longer than a few steps."""
    model = small_detector(SHAPE, **options)
    model.freeze_stages(frozen)
    optimizer = optimizer or AdamW(1e-2, weight_decay=0.1, use_ema=True, ema_momentum=0.5)
    model.compile(optimizer, run_eagerly=True)
    return model


def fit(model, epochs=1, **options):
    options = {"batch_size": 2, "verbose": 0, "shuffle": False, **options}
    return model.fit(*DATA, epochs=epochs, **options)


def frozen_weights(model) -> dict:
    """Of stem and first two stages, by the names of the layers."""
    layers = [layer for layer in model.backbone.layers if layer.name.startswith(FROZEN)]
    return {w.path: keras.ops.convert_to_numpy(w) for layer in layers for w in layer.weights}


def trained_paths(model) -> set:
    return {w.path for w in model.trainable_weights}


# === Frozen stages ===


def test_a_frozen_stage_is_bitwise_unchanged_and_stays_frozen(tmp_path):
    model = detector(heads=WHOLE)
    before, start = frozen_weights(model), [np.array(w) for w in model.weights]
    assert any("moving" in path for path in before) and len(before) > 10
    assert trained_paths(model).isdisjoint(before)
    fit(model)
    others = [w for w in model.weights if w.path not in before]
    changed = [
        np.any(old != keras.ops.convert_to_numpy(w))
        for w, old in zip(model.weights, start, strict=True)
        if w.path not in before
    ]
    assert np.mean(changed) > 0.9 and len(others) == len(changed)

    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    other = loaded.replace_classes(["red", "new"])
    other.compile(SGDWithL2(0.1, weight_decay=0.1), run_eagerly=True)
    other.fit(DATA[0], {**DATA[1], "labels": DATA[1]["labels"] * 0}, verbose=0)
    fit(loaded)
    for copy in (model, loaded, other):
        after = frozen_weights(copy)
        for path, value in before.items():
            np.testing.assert_array_equal(after[path], value, err_msg=path)
        assert trained_paths(copy) == trained_paths(model)


def test_frozen_stages_of_backbones_and_batch_norm():
    model = small_detector(SHAPE, freeze_batch_norm=True)
    everything = trained_paths(model)
    counts = []
    for stages in (1, 2, 3, 4, None):
        model.freeze_stages(stages)
        counts.append(len(trained_paths(model)))
    assert counts[:4] == sorted(counts[:4], reverse=True) and len(set(counts)) == 5
    assert trained_paths(model) == everything  # batch normalization stays frozen
    model.freeze_stages(4)
    assert not {w.path for w in model.backbone.weights} & trained_paths(model)
    for stages, wanted in ((0, "None or one of 1, 2, 3, 4"), (5, "None or one"), ("1", "int")):
        with pytest.raises(ValueError, match=f"`num_stages` must be {wanted}"):
            model.freeze_stages(stages)


def test_other_trainable_layers_need_another_optimizer():
    model = detector()
    fit(model)
    model.freeze_stages(1)
    with pytest.raises(ValueError, match="call `compile` again"):
        fit(model)


class Small(DistributedTraining, keras.Model):
    """Two layers, of which the first can be frozen as the stages of a detector."""

    def __init__(self):
        keras.utils.set_random_seed(1)
        inputs = keras.Input((3,))
        self.first = keras.layers.Dense(4)
        super().__init__(inputs, keras.layers.Dense(1)(self.first(inputs)))

    def freeze_stages(self, num_stages):
        self.first.trainable = not num_stages


def test_unfreezing_goes_on_after_resuming(tmp_path):
    schedule = keras.optimizers.schedules.CosineDecay(1e-2, 8)
    x = np.random.default_rng(0).normal(size=(4, 3))

    def train(epochs, folder):
        model = Small()
        model.freeze_stages(1)
        model.compile(AdamW(schedule, use_ema=True, ema_momentum=0.5), "mse")
        rates, kernels = [], [np.asarray(model.first.kernel)]

        def log(*_):
            rates.append(float(model.optimizer.learning_rate))
            kernels.append(np.asarray(model.first.kernel))

        callbacks = [UnfreezeStages(after=1), ResumeTraining(folder)]
        callbacks.append(keras.callbacks.LambdaCallback(on_epoch_end=log))
        options = {"batch_size": 2, "shuffle": False, "verbose": 0, "callbacks": callbacks}
        model.fit(x, x[:, :1], epochs=epochs, **options)
        return rates, kernels, model.get_weights()

    rates, kernels, whole = train(4, tmp_path / "whole")
    assert rates == pytest.approx([float(schedule(2 * n)) for n in (1, 2, 3, 4)])
    is_same = [np.array_equal(kernel, kernels[0]) for kernel in kernels[1:]]
    assert is_same == [True, False, False, False]
    for last in (1, 2, 3):  # before and after unfreezing
        train(last, tmp_path / "parts")
    rates, _, parts = train(4, tmp_path / "parts")
    assert rates == pytest.approx([float(schedule(8))])
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


# === Slower backbones ===


@pytest.mark.parametrize("kind", [SGDWithL2, AdamW])
def test_the_backbone_moves_by_a_part_of_its_step(kind):
    """As parameter groups in PyTorch: the factor scales the whole step, weight decay included."""

    def step(factor):
        optimizer = kind(1e-2, weight_decay=0.1, backbone_learning_rate_factor=factor)
        optimizer = type(optimizer).from_config(optimizer.get_config())
        model = detector(None, optimizer, freeze_batch_norm=True)
        start = [np.array(w) for w in model.trainable_weights]
        fit(model, batch_size=4)
        moves = [np.array(w) - s for w, s in zip(model.trainable_weights, start, strict=True)]
        return model, moves

    model, full = step(1.0)
    _, part = step(0.25)
    backbone = {id(w) for w in model.backbone.weights}
    assert 0 < len(backbone & {id(w) for w in model.trainable_weights}) < len(full)
    for weight, one, other in zip(model.trainable_weights, full, part, strict=True):
        factor = 0.25 if id(weight) in backbone else 1.0
        np.testing.assert_allclose(other, factor * one, rtol=1e-3, atol=1e-6)


def test_a_factor_without_a_backbone():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(SGDWithL2(1e-2, backbone_learning_rate_factor=0.1), "mse")
    with pytest.raises(ValueError, match="`backbone_learning_rate_factor` needs a `RefineDet`"):
        model.fit(np.zeros((2, 2)), np.zeros(2), verbose=0)
    with pytest.raises(ValueError, match="backbone_learning_rate_factor"):
        AdamW(1e-3, backbone_learning_rate_factor=0)


# === Accumulation ===


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5, 0.0]])
def test_parts_of_a_batch_make_the_step_of_the_batch(tmp_path, weights):
    """The parts have different numbers of positives, one none at all."""
    images, truth = rectangles(4, SHAPE, objects=1)
    truth["labels"][3] = -1
    images[0] = images[0] * 0.5
    weights = weights and np.array(weights, "float32")

    def step(accumulate):
        model = small_detector(SHAPE, freeze_batch_norm=True)
        model.compile(keras.optimizers.SGD(0.1), run_eagerly=True, accumulate=accumulate)
        options = {"batch_size": 4, "verbose": 0, "sample_weight": weights}
        history = model.fit(images, truth, **options)
        return model, [w.numpy() for w in model.trainable_weights], history.history

    model, one, losses = step(1)
    untrained = small_detector(SHAPE, freeze_batch_norm=True)
    start = [w.numpy() for w in untrained.trainable_weights]
    moves = [np.abs(a - b).max() for a, b in zip(one, start, strict=True)]
    model, other, part_losses = step(4)
    for first, second in zip(one, other, strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-5 * max(moves))
    assert losses.keys() == part_losses.keys() and len(losses) == 5
    for name, values in losses.items():
        assert part_losses[name] == pytest.approx(values, rel=1e-5), name
    if weights is None:
        model.save(tmp_path / "model.keras")
        assert keras.saving.load_model(tmp_path / "model.keras").accumulate == 4


def test_a_batch_that_has_no_such_parts():
    model = small_detector(SHAPE)
    model.compile(run_eagerly=True, accumulate=3)
    with pytest.raises(Exception, match="`accumulate=3` must divide the batch"):
        fit(model)
    with pytest.raises(ValueError, match="`accumulate` must be a positive integer"):
        model.compile(accumulate=0)


# === Time ===


class Clock(keras.callbacks.Callback):
    """Each epoch takes so many seconds, the first one more to compile."""

    now = 0.0

    def __init__(self, seconds, compilation=0.0):
        super().__init__()
        self.seconds, self.compilation = seconds, compilation

    def on_train_batch_begin(self, batch, logs=None):
        Clock.now += self.compilation
        self.compilation = 0.0

    def on_train_batch_end(self, batch, logs=None):
        Clock.now += self.seconds / 4


@pytest.mark.parametrize("minutes, epochs", [(10, 11), (1, 1), (100, 20)])
def test_the_schedule_ends_in_time(monkeypatch, tmp_path, minutes, epochs):
    """20 epochs of 50 seconds, four steps each, and 20 seconds of compilation."""
    monkeypatch.setattr(pacing.time, "monotonic", lambda: Clock.now)
    schedule = keras.optimizers.schedules.CosineDecay(1.0, 80)

    def train(planned):
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(schedule), "mse")
        limit, rates = TimeLimit(minutes), []
        log = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda *_: rates.append(float(model.optimizer.learning_rate))
        )
        callbacks = [Clock(50.0, 20.0), log, limit, ResumeTraining(tmp_path, callbacks=[limit])]
        x = np.zeros((8, 2))
        model.fit(x, x[:, :1], batch_size=2, epochs=planned, callbacks=callbacks, verbose=0)
        return limit, rates

    limit, rates = train(20)
    assert len(rates) == epochs and limit.elapsed < 60 * minutes + 13  # a step
    assert limit.stopped == (epochs < 20)
    if epochs > 1:
        assert rates == sorted(rates, reverse=True) and rates[-1] == pytest.approx(0.0, abs=1e-3)
    assert train(20)[1] == []  # complete


def test_pace_under_a_strategy():
    """A strategy mirrors the numbers of the optimizer, even on one device."""
    schedule = keras.optimizers.schedules.CosineDecay(1.0, 80)
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        model = detector(
            optimizer=keras.optimizers.SGD(schedule, momentum=0.9), dtype="mixed_float16"
        )
    frozen, limit = len(model.trainable_weights), TimeLimit(10)
    fit(model, epochs=2, callbacks=[UnfreezeStages(1), limit])
    assert len(model.trainable_weights) > frozen and limit.elapsed > 0 and not limit.stopped
