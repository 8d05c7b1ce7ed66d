"""Mixed precision follows float32; compiled, eager and several steps at once are the same."""

import keras
import numpy as np
import pytest
from detectors import WHOLE, rectangles, small_backbone, small_detector

from keras_resnest.backbones import ResNet
from keras_resnest.detection.decoding import DetectionDecoder

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="JAX compiles for minutes on a CPU"
)
SHAPE = (64, 64, 3)
MIXED = ["mixed_bfloat16", "mixed_float16"]


class Losses(keras.callbacks.Callback):
    """The loss of every step; Keras logs the mean since the epoch began."""

    def __init__(self):
        super().__init__()
        self.means = []

    def on_train_batch_end(self, batch, logs=None):
        self.means.append(float(logs["loss"]))

    def windows(self):
        sums = np.array(self.means) * np.arange(1, 101)
        return np.diff(sums, prepend=0.0).reshape(10, 10).mean(1)


def train_100_steps(model, images, truth, start, batch=4):
    """Mean losses of ten steps each, on the same batches from the same weights."""
    import tensorflow as tf

    model.set_weights(start)
    losses = Losses()
    batches = tf.data.Dataset.from_tensor_slices((images, truth)).batch(batch).repeat()
    model.fit(batches, steps_per_epoch=100, verbose=0, callbacks=[losses])
    return losses.windows()


def check_curve(got, want):
    assert want[-1] < 0.6 * want[0]  # it does train
    np.testing.assert_allclose(got, want, rtol=0.02)


# === Detector ===


@pytest.fixture(scope="module")
def truth():
    return rectangles(16, SHAPE, objects=1)


@pytest.fixture(scope="module")
def start():
    return detector("float32").get_weights()


def detector(dtype):
    # Batches of 4 at 64 x 64 pixels have four numbers per channel on P6: normalized by their own
    # statistics, any rounding error would grow, in float32 as well.
    model = small_detector(
        SHAPE, WHOLE, backbone=small_backbone(dtype=dtype), dtype=dtype, freeze_batch_norm=True
    )
    # Three times this rate, and weights that are changed by 2^-9 move the float32 curve by 1 %.
    model.compile(keras.optimizers.SGD(1e-4, momentum=0.9, global_clipnorm=10.0))
    return model


@pytest.fixture(scope="module")
def float32(truth, start):
    model = detector("float32")
    return model, train_100_steps(model, *truth, start)


@pytest.fixture(scope="module", params=[MIXED[0], pytest.param(MIXED[1], marks=pytest.mark.slow)])
def mixed(request, truth, start):
    model = detector(request.param)
    return model, train_100_steps(model, *truth, start)


def test_detector_learns_as_in_float32(mixed, float32):
    check_curve(mixed[1], float32[1])


def test_only_float16_scales_the_loss(mixed):
    model, _ = mixed
    scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (model.dtype_policy.name == "mixed_float16")
    assert int(model.optimizer.iterations) == 100  # no step was lost


def test_losses_and_boxes_are_float32(mixed, truth):
    model, _ = mixed
    half = model.dtype_policy.compute_dtype
    images, boxes = truth[0][:4], {k: v[:4] for k, v in truth[1].items()}
    outputs = model(images, training=True)
    assert {keras.backend.standardize_dtype(v.dtype) for v in outputs.values()} == {half}
    assert {w.dtype for w in model.weights} == {"float32"}
    exact = {name: keras.ops.cast(value, "float32") for name, value in outputs.items()}
    got = model.detection_loss(outputs, boxes["boxes"], boxes["labels"], model.anchors)
    want = model.detection_loss(exact, boxes["boxes"], boxes["labels"], model.anchors)
    for name, value in got.items():
        assert keras.backend.standardize_dtype(value.dtype) == "float32"
        assert float(value) == float(want[name]) > 0, name
    total = model.compute_loss(images, boxes, outputs)
    assert keras.backend.standardize_dtype(total.dtype) == "float32"
    decoded = model.decode(outputs)
    assert decoded["boxes"].dtype == decoded["confidence"].dtype == "float32"
    for name, value in model.decode(exact).items():
        np.testing.assert_array_equal(decoded[name], value)


def test_candidates_are_those_of_float32(mixed, float32, truth):
    """All anchors, before filter and NMS, whose sides are up to 124 pixels.

    How far the worst one is off depends on the weights, which no two trainings share to the last
    bit; a bfloat16 has 8 bits. The means are the sharper test: 0.06 pixels and 0.0016 were seen.
    """
    model, reference = mixed[0], float32[0]
    weights = model.get_weights()
    model.set_weights(reference.get_weights())
    candidates = []
    for m in (model, reference):
        outputs = m(truth[0][:4], training=False)
        # Without the filter: else anchors at the threshold would come and go.
        decoder = DetectionDecoder(negative_anchor_filtering=False)
        candidates.append(decoder.candidates(outputs, m.anchors))
    model.set_weights(weights)
    (boxes, confidence), (want_boxes, want_confidence) = candidates
    for got, want, mean, most in (
        (boxes, want_boxes, 0.2, 2.0),
        (confidence, want_confidence, 0.005, 0.03),
    ):
        difference = np.abs(np.asarray(got) - np.asarray(want))
        assert difference.mean() < mean and difference.max() < most


def test_a_saved_model_keeps_its_precision_and_state(mixed, truth, tmp_path):
    model, _ = mixed
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.dtype_policy.name == again.backbone.dtype_policy.name == model.dtype_policy.name
    assert type(again.optimizer) is type(model.optimizer)
    for a, b in zip(again.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(a, b)
    want = model.predict(truth[0][:2], verbose=0)
    for name, value in again.predict(truth[0][:2], verbose=0).items():
        assert value.dtype == want[name].dtype and np.isfinite(value).all()
        np.testing.assert_array_equal(value, want[name])


def test_an_overflow_skips_the_step_and_halves_the_scale(truth):
    model = detector("mixed_float16")
    optimizer = keras.optimizers.SGD(3e-4)
    model.compile(keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0**40))
    before = [np.array(w) for w in model.trainable_weights]
    images, boxes = truth[0][:8], {k: v[:8] for k, v in truth[1].items()}
    logs = model.fit(images, boxes, batch_size=4, verbose=0).history
    assert np.isfinite([values[-1] for values in logs.values()]).all()
    assert float(model.optimizer.dynamic_scale) == 2.0**38 and int(optimizer.iterations) == 0
    for old, new in zip(before, model.trainable_weights, strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("dtype", MIXED)
def test_the_global_policy_is_as_the_argument(dtype):
    former = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        model = small_detector(SHAPE, WHOLE)
        model.compile("sgd")
    finally:
        keras.config.set_dtype_policy(former)
    by_argument = detector(dtype)
    policies = [
        {
            layer.name: layer.dtype_policy.name
            for layer in m._flatten_layers()
            if layer.weights and not isinstance(layer, keras.Model)
        }
        for m in (model, by_argument)
    ]
    assert policies[0] == policies[1] and model.dtype_policy.name == dtype
    assert type(model.optimizer).__name__ == (
        "LossScaleOptimizer" if dtype == "mixed_float16" else "SGD"
    )


# === Classifier ===


def classifier(dtype):
    keras.utils.set_random_seed(3)
    model = ResNet(
        stackwise_num_filters=[8, 8, 16, 16],
        stackwise_num_blocks=[1, 1, 1, 1],
        block_type="basic",
        include_top=True,
        include_rescaling=True,
        classes=3,
        image_shape=SHAPE,
        dtype=dtype,
    )
    model.compile(
        keras.optimizers.SGD(3e-4, momentum=0.9),
        "sparse_categorical_crossentropy",
        jit_compile=False,
    )
    return model


# float16 is slow on processors without its instructions.
@pytest.mark.parametrize("dtype", [MIXED[0], pytest.param(MIXED[1], marks=pytest.mark.slow)])
def test_classifier_learns_as_in_float32(dtype, colored, classifier_curve):
    start = classifier("float32").get_weights()
    model = classifier(dtype)
    check_curve(train_100_steps(model, *colored, start, batch=16), classifier_curve)
    scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (dtype == "mixed_float16")
    probability = model.predict(colored[0], verbose=0)
    assert probability.dtype == "float32"
    np.testing.assert_allclose(probability.sum(1), 1.0, atol=1e-6)  # no softmax in half precision


@pytest.fixture(scope="module")
def colored():
    """Noise, in which one color is stronger: the class."""
    rng = np.random.default_rng(0)
    labels = np.arange(48) % 3
    images = rng.uniform(0, 200, (48, *SHAPE)) + 40 * np.eye(3)[labels][:, None, None]
    return images.astype("float32"), labels


@pytest.fixture(scope="module")
def classifier_curve(colored):
    model = classifier("float32")
    return train_100_steps(model, *colored, model.get_weights(), batch=16)


# === Ways to run a step ===


def flat_weights(model):
    return np.concatenate([w.ravel() for w in model.get_weights()])


def trained(truth, **options):
    model = small_detector(SHAPE)
    model.compile(keras.optimizers.SGD(1e-3, momentum=0.9, global_clipnorm=10.0), **options)
    start = flat_weights(model)
    images, boxes = truth[0][:20], {k: v[:20] for k, v in truth[1].items()}
    loss = model.fit(images, boxes, batch_size=4, verbose=0).history["loss"]
    return model, flat_weights(model) - start, loss


@pytest.fixture(scope="module")
def step_by_step(truth):
    return trained(truth)


@pytest.mark.parametrize(
    "options",
    [
        {"steps_per_execution": 5},
        {"run_eagerly": True},
        pytest.param({"jit_compile": True}, marks=pytest.mark.slow),  # compiles for a minute
    ],
    ids=lambda options: next(iter(options)),
)
def test_trains_as_step_by_step(options, step_by_step, truth):
    reference, want_change, want_loss = step_by_step
    assert not reference.jit_compile  # "auto" is no XLA here
    model, change, loss = trained(truth, **options)
    assert all(getattr(model, name) == value for name, value in options.items())
    # The batches of 4 have four numbers per channel on P6, which magnifies what XLA rounds.
    error, length = np.linalg.norm(change - want_change), np.linalg.norm(want_change)
    assert error < 0.01 * length and length > 0.1
    rtol = 1e-3 if "jit_compile" in options else 1e-4
    np.testing.assert_allclose(loss, want_loss, rtol)
    assert model.predict(truth[0][:2], verbose=0)["boxes"].shape == (2, 200, 4)
