"""Training stops with an explanation, and with finite weights, when it diverges."""

import re
import threading

import keras
import numpy as np
import pytest
from detectors import rectangles, small_detector

from keras_resnest.boxes.offsets import decode_boxes, encode_boxes
from keras_resnest.trainer import DistributedTraining
from keras_resnest.training.callbacks import TerminateOnDivergence

needs_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="gradients are checked on TensorFlow only"
)


class Network(DistributedTraining, keras.Model):
    """The training step without a detector."""


def linear(optimizer, **compile_options):
    """y = w * x, starting from w = 1; the loss is the squared error."""
    x = keras.Input((1,))
    dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
    model = Network(x, dense(x))
    model.compile(optimizer, "mse", **{"jit_compile": False, **compile_options})
    return model


def fit(model, x, y, guard, epochs=1):
    x, y = (np.asarray(values, "float32")[:, None] for values in (x, y))
    return model.fit(x, y, batch_size=1, epochs=epochs, shuffle=False, verbose=0, callbacks=[guard])


def weights_are_finite(model):
    return all(np.isfinite(w).all() for w in model.get_weights())


@needs_tensorflow
def test_an_infinite_gradient_leaves_the_last_finite_weights(tmp_path):
    path = tmp_path / "new folder" / "last.weights.h5"
    model = linear(keras.optimizers.SGD(0.25))
    # Step 1: w = 1 - 0.25 * 2 * (1 * 1 - 3) * 1 = 2. Step 2: 2e20 squared overflows float32.
    with pytest.raises(FloatingPointError) as error:
        fit(model, [1, 1e20, 1], [3, 0, 3], TerminateOnDivergence(path))
    assert model.get_weights()[0].item() == 2.0
    for part in ("`loss`", "at step 2 of epoch 1", "rate is 0.25", "global_clipnorm", str(path)):
        assert part in str(error.value)
    again = linear("sgd")
    again.load_weights(path)
    assert again.get_weights()[0].item() == 2.0


@needs_tensorflow
def test_a_finite_loss_with_an_infinite_gradient_is_reported():
    # The loss is 1e36; its derivative by w, 2 * 1e18 * 1e18 * 1e3, overflows float32.
    x = keras.Input((1,))
    inner = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")(x)
    model = Network(x, inner * 1e3 - x * 999.0)
    model.compile(keras.optimizers.SGD(0.25, clipnorm=1.0), "mse", jit_compile=False)
    with pytest.raises(FloatingPointError, match=r"`loss` or its gradient.*step 1 of epoch 2") as e:
        for epoch, pixel in enumerate((0.0, 1e18)):
            data = np.full((1, 1), pixel, "float32")
            guard = [TerminateOnDivergence()]
            model.fit(data, data * 0, epochs=epoch + 1, initial_epoch=epoch, callbacks=guard)
    assert "clip" not in str(e.value)  # already clipped
    assert model.get_weights()[0].item() == 1.0


@needs_tensorflow
@pytest.mark.parametrize(
    "optimizer",
    [
        keras.optimizers.SGD(30.0, momentum=0.9),
        keras.optimizers.SGD(30.0, momentum=0.9, clipvalue=1e12),
        keras.optimizers.SGD(30.0, momentum=0.9, global_clipnorm=1e30),
    ],
    ids=["plain", "clipvalue", "global_clipnorm"],
)
def test_exploding_training_stops_with_finite_weights(optimizer):
    model = linear(optimizer)
    ones = np.ones(400)
    with pytest.raises(FloatingPointError, match="The model holds the last finite weights"):
        fit(model, ones, 3 * ones, TerminateOnDivergence(), epochs=20)
    assert weights_are_finite(model)


@needs_tensorflow
def test_huge_weights_stop_the_detector(tmp_path):
    path = tmp_path / "last.weights.h5"
    model = small_detector((64, 64, 3))
    model.compile(keras.optimizers.SGD(1e-3))
    kernel = model.get_layer("arm").box_convolutions[0].kernel
    kernel.assign(kernel * 0 + 1e30)  # its offsets make the loss or its gradients infinite
    stem = next(w for w in model.backbone.trainable_variables if w.name == "kernel")
    stem.assign(stem * 0 + 3e37)  # so do the sums in the first batch normalization
    before = model.get_weights()
    images, truth = rectangles(2, (64, 64, 3), objects=1)
    with pytest.raises(FloatingPointError) as error:
        model.fit(images, truth, verbose=0, callbacks=[TerminateOnDivergence(path)])
    # Which of the two depends on the order in which the processor adds.
    assert re.search("_loss` became|`loss` or its gradient became .*_loss`", str(error.value))
    for part in ("at step 1 of epoch 1", "learning rate is 0.001", str(path)):
        assert part in str(error.value)
    after = model.get_weights()
    assert all(np.isfinite(w).all() for w in after)
    for variable, old, new in zip(model.weights, before, after, strict=True):
        if variable.trainable:
            np.testing.assert_array_equal(old, new)
    model.load_weights(path)
    assert weights_are_finite(model)


# === Growth ===


def losses_of(curve, guard, epochs=1, **compile_options):
    """Trains so that the losses are those of `curve`: w stays 1, x = 0, y is their root."""
    model = linear(keras.optimizers.SGD(0.0), **compile_options)
    return fit(model, np.zeros(len(curve)), np.sqrt(curve), guard, epochs)


@pytest.mark.parametrize(
    "low, first_high, stops_at, steps_per_execution",
    [
        (12.0, 200, 250, 1),  # half of the last 100 steps are above 120
        (12.0, 5, 100, 1),  # not before step 100
        (0.0, 200, 250, 5),
    ],
)
def test_a_loss_that_stays_high_stops(low, first_high, stops_at, steps_per_execution):
    curve = np.where(np.arange(300) < first_high, low, 1000.0)
    text = f"grown from {low:.4g} at the first step.*at step {stops_at} of epoch 1"
    with pytest.raises(FloatingPointError, match=text):
        losses_of(curve, TerminateOnDivergence(), steps_per_execution=steps_per_execution)


STEPS = np.arange(300)


@pytest.mark.parametrize(
    "curve",
    [
        pytest.param(np.zeros(300), id="no objects at all"),
        pytest.param(np.where(STEPS < 150, 0.0, 60.0), id="images without objects first"),
        pytest.param(np.minimum(1e-3 * 1.05**STEPS, 30.0), id="fine-tuning with a warm-up"),
        pytest.param(np.where(STEPS % 100 < 40, 1e6, 5.0), id="peaks it recovers from"),
        pytest.param(np.where(STEPS == 150, 1e12, 5.0), id="one wild batch"),
        pytest.param(1e5 / (1 + STEPS), id="a bad start"),
    ],
)
def test_training_that_may_recover_continues(curve):
    history = losses_of(curve, TerminateOnDivergence(), epochs=2).history["loss"]
    np.testing.assert_allclose(history, np.mean(curve), rtol=1e-3)


def test_growth_is_checked_across_epochs_and_can_be_disabled():
    curve = [20.0] + 29 * [900.0]
    with pytest.raises(FloatingPointError, match="at step 10 of epoch 4"):
        losses_of(curve, TerminateOnDivergence(), epochs=5)
    losses_of(curve, TerminateOnDivergence(max_growth=None), epochs=5)
    losses_of(curve, TerminateOnDivergence(max_growth=50), epochs=5)


def test_a_metric_of_nan_does_not_stop_training():
    def undefined(y, y_pred):
        return keras.ops.sum(y_pred) * float("nan")

    history = losses_of([1.0, 2.0], TerminateOnDivergence(), metrics=[undefined]).history
    assert np.isnan(history["undefined"]).all() and history["loss"] == [1.5]


@pytest.mark.parametrize(
    "options, match",
    [
        ({"filepath": "last.keras"}, r"\.weights\.h5.*last\.keras"),
        ({"max_growth": 1.0}, "max_growth=1.0"),
        ({"patience": 0}, "patience=0"),
    ],
)
def test_bad_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        TerminateOnDivergence(**options)


# === Box arithmetic ===


def test_extreme_boxes_stay_finite_with_their_gradients():
    anchors = np.array([[0, 0, 32, 32], [5, 5, 5, 5], [7, 9, 6, 8]], "float32")
    for offset in (1e6, -1e6):
        boxes = keras.ops.convert_to_numpy(
            decode_boxes(np.full((3, 4), offset, "float32"), anchors)
        )
        assert np.isfinite(boxes).all()
        center = 16 + offset * 0.1 * 32  # the size is 62.5 times the anchor's, or 0
        side = 32 * 62.5 if offset > 0 else 0.0
        want = [center - side / 2] * 2 + [center + side / 2] * 2
        np.testing.assert_allclose(boxes[0], want, rtol=1e-5)
    boxes = np.array([[3, 3, 3, 3], [0, 0, 1e6, 1e6], [9, 9, 2, 2]], "float32")
    offsets = keras.ops.convert_to_numpy(encode_boxes(boxes[:, None], anchors[None]))
    assert np.isfinite(offsets).all()
    np.testing.assert_allclose(offsets[0, 0, 2:], np.log(1e-5) / 0.2, rtol=1e-5)


# === Threads ===


def end_step_in_a_thread(guard, batch, loss):
    thread = threading.Thread(target=guard.on_train_batch_end, args=(batch, {"loss": loss}))
    thread.start()
    thread.join()


def test_steps_reported_by_other_threads_in_any_order():
    """As Keras dispatches callbacks on JAX. Only the training thread touches the model."""
    guard = TerminateOnDivergence(patience=4)
    guard.set_model(linear("sgd"))
    guard.on_train_begin()
    for batch in (2, 0, 1):
        end_step_in_a_thread(guard, batch, 1.0)
    guard.on_train_batch_begin(3)
    for batch in (4, 3, 5):
        end_step_in_a_thread(guard, batch, float("nan"))
    with pytest.raises(FloatingPointError, match="at step 4 of epoch 1"):
        guard.on_train_batch_begin(6)
    guard.on_train_begin()
    for batch in (0, 9, 5):  # running means: the losses of the steps are 1, then 1000
        end_step_in_a_thread(guard, batch, (1.0 + batch * 1000.0) / (batch + 1))
    with pytest.raises(FloatingPointError, match=r"from 1 at .* to 1000, .* at step 10 of epoch 1"):
        guard.on_epoch_end(0)
