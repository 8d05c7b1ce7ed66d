"""Recipes against closed formulas, PyTorch's update rule written out, and real networks."""

import dataclasses
import math

import keras
import numpy as np
import pytest

import keras_resnest as kr
from keras_resnest.training.optimizers import AdamW, LinearWarmup, SGDWithL2
from keras_resnest.training.recipes import RECIPES, Recipe


def rates(recipe, steps):
    schedule = recipe.learning_rate_schedule()
    return np.array([float(schedule(step)) for step in steps])


# === Schedules ===


def test_refinedet_rates_by_the_scripts_numbers():
    # Caffe's "multistep": from iteration 80000 on a tenth, from 100000 on a hundredth.
    expected = {
        0: 0.0,
        1: 1e-6,
        500: 5e-4,
        999: 9.99e-4,
        1000: 1e-3,
        79_999: 1e-3,
        80_000: 1e-4,
        99_999: 1e-4,
        100_000: 1e-5,
        119_999: 1e-5,
    }
    np.testing.assert_allclose(
        rates(RECIPES["refinedet_voc"], expected), list(expected.values()), rtol=1e-5
    )
    coco = {279_999: 1e-3, 280_000: 1e-4, 359_999: 1e-4, 360_000: 1e-5, 399_999: 1e-5}
    np.testing.assert_allclose(
        rates(RECIPES["refinedet_coco"], coco), list(coco.values()), rtol=1e-5
    )


@pytest.mark.parametrize("batch_size", [64, 256, 8192])
def test_resnest_rates_by_the_authors_formula(batch_size):
    """`LR_Scheduler` of the authors' code, written out: 0.1 * batch / 256, 5 of 270 epochs."""
    per_epoch = 1_281_167 // batch_size
    recipe = RECIPES["resnest_imagenet"].scaled(batch_size, dataset_size=1_281_167)
    peak, warmup, total = 0.1 * batch_size / 256, 5 * per_epoch, 270 * per_epoch

    def formula(step):
        if step < warmup:
            return peak * step / warmup
        return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))

    steps = [0, 1, warmup // 2, warmup - 1, warmup, warmup + 1, total // 3, total // 2, total - 1]
    np.testing.assert_allclose(
        rates(recipe, steps), [formula(step) for step in steps], rtol=2e-4, atol=peak * 1e-6
    )
    assert recipe.duration == total and recipe.epochs == 270
    assert float(recipe.learning_rate_schedule()(total)) == pytest.approx(0.0, abs=1e-8)


def test_detector_from_scratch_by_the_formula():
    """AdamW, a twentieth of all steps of warm-up, then a cosine to 1 %; clipped at norm 10."""
    recipe = RECIPES["detector_from_scratch"]
    recipe = dataclasses.replace(recipe, learning_rate=4e-3, batch_size=16).scaled(16, 100, 12)
    optimizer = recipe.optimizer()
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, decay_steps=1140, alpha=0.01, warmup_target=4e-3, warmup_steps=60
    )
    expected = AdamW(schedule, weight_decay=0.05, global_clipnorm=10.0, name=optimizer.name)
    assert optimizer.get_config() == expected.get_config()


def test_final_ratio_is_the_last_rate():
    recipe = RECIPES["detector_from_scratch"].scaled(8, steps_per_epoch=10)
    assert rates(recipe, [30, 600]) == pytest.approx([1e-3, 1e-5], rel=1e-5)


def test_scaled_to_another_batch_sees_as_many_images():
    recipe = RECIPES["refinedet_voc"]
    for batch_size in (8, 16, 64):
        scaled = recipe.scaled(batch_size)
        assert scaled.duration * batch_size == 120_000 * 32
        assert [b * batch_size for b in scaled.boundaries] == [80_000 * 32, 100_000 * 32]
        assert scaled.warmup * batch_size == 1000 * 32
        # The linear rule: what one image moves the weights stays the same.
        assert scaled.learning_rate / batch_size == pytest.approx(1e-3 / 32)
        drop = scaled.boundaries[0]
        assert rates(scaled, [drop - 1, drop]) == pytest.approx(
            [1e-3 * batch_size / 32, 1e-4 * batch_size / 32], rel=1e-5
        )
    assert recipe.scaled(8).scaled(64) == recipe.scaled(64)


def test_the_square_root_rule_of_adam():
    recipe = RECIPES["detector_from_scratch"].scaled(32, steps_per_epoch=5)
    assert recipe.learning_rate == pytest.approx(2e-3)


def test_other_epochs_compress_in_proportion():
    full = RECIPES["resnest_imagenet"].scaled(256, steps_per_epoch=540)
    short = RECIPES["resnest_imagenet"].scaled(256, steps_per_epoch=540, epochs=27)
    assert (short.duration * 10, short.warmup * 10) == (full.duration, full.warmup)
    at = np.arange(0, full.duration, 5000)
    np.testing.assert_allclose(rates(short, at / 10), rates(full, at), rtol=1e-3, atol=1e-7)
    voc = RECIPES["refinedet_voc"].scaled(32, dataset_size=16_551, epochs=24)
    assert voc.duration == 24 * 517 and voc.epochs == 24
    assert voc.boundaries == (round(24 * 517 * 2 / 3), round(24 * 517 * 5 / 6))


def test_trainings_of_one_step_have_a_schedule():
    for recipe in RECIPES.values():
        scaled = recipe.scaled(4, steps_per_epoch=1, epochs=1)
        assert (scaled.duration, scaled.epochs) == (1, 1)
        assert np.isfinite(rates(scaled, range(4))).all()


def test_schedules_survive_saving():
    for recipe in RECIPES.values():
        schedule = recipe.scaled(8, steps_per_epoch=100).learning_rate_schedule()
        config = keras.optimizers.schedules.serialize(schedule)
        again = keras.optimizers.schedules.deserialize(config)
        steps = [0, 3, 700, 5000]
        assert [float(again(s)) for s in steps] == [float(schedule(s)) for s in steps]


# === Errors ===


@pytest.mark.parametrize(
    "change, words",
    [
        ({"unit": "weeks"}, "`unit`"),
        ({"duration": 0}, "`duration` must be positive"),
        ({"warmup": 200_000}, "`warmup`"),
        ({"boundaries": (3, 2)}, "`boundaries`"),
        ({"boundaries": ()}, "`boundaries`"),
        ({"algorithm": "lion"}, "`algorithm`"),
    ],
)
def test_invalid_recipes(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(RECIPES["refinedet_voc"], **change)


def test_arguments_of_scaled():
    imagenet = RECIPES["resnest_imagenet"]
    with pytest.raises(ValueError, match="`steps_per_epoch` or `dataset_size` is required"):
        imagenet.scaled(64)
    with pytest.raises(ValueError, match="Only one of"):
        imagenet.scaled(64, steps_per_epoch=3, dataset_size=3)
    with pytest.raises(ValueError, match="`batch_size` must be positive"):
        imagenet.scaled(0, steps_per_epoch=3)
    with pytest.raises(ValueError, match="use `scaled"):
        imagenet.optimizer()
    with pytest.raises(ValueError, match="needs the `steps_per_epoch`"):
        _ = RECIPES["refinedet_voc"].epochs
    with pytest.raises(ValueError, match="`warmup_steps`"):
        LinearWarmup(keras.optimizers.schedules.ExponentialDecay(1.0, 2, 0.5), 0)


# === Networks ===


def test_values_of_single_networks():
    recipe = RECIPES["resnest_imagenet"]
    sizes = {name: recipe.for_network(f"ResNeSt{name}").crop_size for name in (50, 101, 200, 269)}
    assert sizes == {50: 224, 101: 256, 200: 320, 269: 416}
    assert recipe.network_arguments("resnest50")["dropout_rate"] == 0.0
    assert recipe.network_arguments("resnest200") == {
        "dropblock_rate": 0.1,
        "dropout_rate": 0.2,
        "zero_init_last_gamma": True,
    }
    assert set(recipe.network_arguments("shufflenet_v2_1_0x")) == {"dropout_rate"}
    with pytest.raises(ValueError, match="resnest51"):
        recipe.network_arguments("resnest51")


def test_network_arguments_set_dropblock_and_zero_gammas():
    arguments = RECIPES["resnest_imagenet"].network_arguments("resnest14_tiny")
    model = kr.create_backbone("resnest14_tiny", classes=5, **arguments)
    dropping = {layer.name for layer in model.layers if isinstance(layer, kr.layers.DropBlock2D)}
    stages = {name.split("_")[0] for name in dropping}
    assert stages == {"layer3", "layer4"}  # the last two
    splits = {layer.name: layer for layer in model.layers if hasattr(layer, "radix")}
    assert splits["layer4_0_conv2"].dropblock_rate == 0.1
    assert splits["layer2_0_conv2"].dropblock_rate == 0.0
    gammas = [layer.gamma for layer in model.layers if layer.name.endswith("_bn3")]
    assert len(gammas) == 4 and all(not np.any(gamma.numpy()) for gamma in gammas)
    # With zero branches, every block outputs the positive part of its shortcut.
    images = np.random.default_rng(0).uniform(0, 255, (1, 64, 64, 3)).astype("float32")
    shortcut, block = keras.Model(
        model.input,
        [model.get_layer("layer4_0_downsample_2").output, model.get_layer("layer4_0_relu").output],
    )(images)
    np.testing.assert_array_equal(block, np.maximum(shortcut, 0))


# === Optimizers ===


def minimal(optimizer, names=("kernel", "bias"), value=1.0):
    variables = [keras.Variable(np.full(2, value, "float32"), name=name) for name in names]
    optimizer.build(variables)
    return variables


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_by_the_formula(nesterov):
    """Against PyTorch's rule: v = m v + (g + wd w); w -= lr v, or lr (g + wd w + m v)."""
    rng = np.random.default_rng(0)
    lr, m, wd = 0.1, 0.9, 0.05
    kernel, bias = minimal(
        optimizer := SGDWithL2(lr, momentum=m, nesterov=nesterov, weight_decay=wd)
    )
    w = {"kernel": np.ones(2), "bias": np.ones(2)}
    v = {"kernel": np.zeros(2), "bias": np.zeros(2)}
    for _ in range(20):
        g = rng.normal(size=2)
        optimizer.apply([keras.ops.convert_to_tensor(g, "float32")] * 2, [kernel, bias])
        for name, decay in (("kernel", wd), ("bias", 0.0)):
            d = g + decay * w[name]
            v[name] = m * v[name] + d
            w[name] = w[name] - lr * (d + m * v[name] if nesterov else v[name])
    np.testing.assert_allclose(kernel.numpy(), w["kernel"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(bias.numpy(), w["bias"], rtol=1e-5, atol=1e-6)


def test_sgd_equals_pytorch():
    torch = pytest.importorskip("torch")
    start = np.array([1.0, -2.0], "float32")
    kernel = keras.Variable(start, name="kernel")
    ours = SGDWithL2(0.1, momentum=0.9, weight_decay=0.05)
    ours.build([kernel])
    parameter = torch.nn.Parameter(torch.tensor(start))
    theirs = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, weight_decay=0.05)
    for i in range(30):
        gradient = np.array([math.sin(i), math.cos(i)], "float32")
        ours.apply([keras.ops.convert_to_tensor(gradient)], [kernel])
        parameter.grad = torch.tensor(gradient)
        theirs.step()
    np.testing.assert_allclose(kernel.numpy(), parameter.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_keras_sgd_decays_a_tenth_as_much():
    """The reason for `SGDWithL2`: Keras' decay bypasses the momentum."""
    shrunk = {}
    for optimizer_class in (keras.optimizers.SGD, SGDWithL2):
        kernel = minimal(optimizer := optimizer_class(0.1, momentum=0.9, weight_decay=1e-3))[0]
        for _ in range(200):
            optimizer.apply([keras.ops.zeros(2)], optimizer._trainable_variables[:1])
        shrunk[optimizer_class] = -math.log(float(kernel.numpy()[0]))
    assert shrunk[keras.optimizers.SGD] == pytest.approx(200 * 0.1 * 1e-3, rel=0.01)
    assert 9 < shrunk[SGDWithL2] / shrunk[keras.optimizers.SGD] < 10


def test_gradients_are_clipped_before_the_decay():
    lr, wd = 0.5, 0.1
    kernel, bias = minimal(optimizer := SGDWithL2(lr, weight_decay=wd, global_clipnorm=1.0))
    gradients = [np.array([30.0, 0.0], "float32"), np.array([0.0, 40.0], "float32")]
    optimizer.apply([keras.ops.convert_to_tensor(g) for g in gradients], [kernel, bias])
    np.testing.assert_allclose(kernel.numpy(), [1 - lr * (0.6 + wd), 1 - lr * wd], rtol=1e-6)
    np.testing.assert_allclose(bias.numpy(), [1.0, 1 - lr * 0.8], rtol=1e-6)


@pytest.mark.parametrize("optimizer_class", [SGDWithL2, AdamW])
def test_exclusions_survive_saving_and_compare_whole_names(optimizer_class):
    optimizer = optimizer_class(0.1, weight_decay=0.1, excluded_variables=["scale"])
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert type(again) is optimizer_class and again.get_config() == optimizer.get_config()
    for one in (optimizer, again):
        scale, rescale = minimal(one, ("scale", "rescale_kernel"))
        one.apply([keras.ops.zeros(2)] * 2, [scale, rescale])
        assert scale.numpy()[0] == 1.0 and rescale.numpy()[0] < 1.0


def decayed(model, optimizer):
    """Paths of the variables that a step with zero gradients changes."""
    optimizer.build(model.trainable_variables)
    before = [v.numpy().copy() for v in model.trainable_variables]
    # Variables of zero could not shrink.
    for v in model.trainable_variables:
        v.assign(np.ones(v.shape, "float32"))
    zeros = [keras.ops.zeros(v.shape) for v in model.trainable_variables]
    optimizer.apply(zeros, model.trainable_variables)
    changed = {v.path for v in model.trainable_variables if np.any(v.numpy() != 1.0)}
    for v, old in zip(model.trainable_variables, before, strict=True):
        v.assign(old)
    return changed


@pytest.fixture(scope="module")
def detector():
    backbone = kr.create_backbone("resnest14_tiny", include_top=False)
    return kr.RefineDet(3, backbone=backbone, image_shape=(64, 64, 3))


@pytest.mark.parametrize("name", ["refinedet_voc", "detector_from_scratch"])
def test_kernels_decay_and_nothing_else(detector, name):
    model = detector
    recipe = dataclasses.replace(RECIPES[name], warmup=0).scaled(8, steps_per_epoch=9)
    paths = {v.path for v in model.trainable_variables}
    kernels = {path for path in paths if path.split("/")[-1].endswith("kernel")}
    scales = {path for path in paths if "l2" in path.lower() or "normalization" in path.lower()}
    assert decayed(model, recipe.optimizer()) == kernels
    assert len(kernels) > 30 and len(paths - kernels) > 60 and scales and not scales & kernels


def test_decay_goes_by_name_inside_a_strategy():
    """There the optimizer gets TensorFlow's variables, whose names Keras does not choose."""
    import tensorflow as tf

    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="bias_of_scale")])
        optimizer = SGDWithL2(0.5, weight_decay=0.1)
        model.compile(optimizer, lambda y, p: keras.ops.sum(0.0 * p, axis=-1))
    kernel, bias = model.trainable_variables
    bias.assign([1.0, 1.0])
    before = kernel.numpy()
    model.fit(np.ones((4, 3)), np.ones((4, 2)), batch_size=4, epochs=1, verbose=0)
    np.testing.assert_allclose(kernel.numpy(), before * (1 - 0.5 * 0.1), rtol=1e-6)
    np.testing.assert_array_equal(bias.numpy(), [1.0, 1.0])


def test_loss_scaling_has_no_effect_and_skips_infinite_gradients():
    def trained(wrap):
        inner = SGDWithL2(0.1, momentum=0.9, weight_decay=0.05, global_clipnorm=1.0)
        optimizer = keras.optimizers.LossScaleOptimizer(inner, 1024.0) if wrap else inner
        kernel, bias = minimal(optimizer)
        for i in range(5):
            gradients = [np.array([i, 1.0]), np.array([-1.0, 2.0 * i])]
            scaled = [keras.ops.convert_to_tensor(g * (1024 if wrap else 1)) for g in gradients]
            optimizer.apply([keras.ops.cast(g, "float32") for g in scaled], [kernel, bias])
        if wrap:
            kept = kernel.numpy()
            optimizer.apply([keras.ops.full((2,), np.inf), keras.ops.ones(2)], [kernel, bias])
            np.testing.assert_array_equal(kernel.numpy(), kept)
        return [*kernel.numpy(), *bias.numpy()]

    np.testing.assert_allclose(trained(True), trained(False), rtol=1e-6)


def small_classifier(dtype="float32"):
    layers = [
        keras.Input((8, 8, 3)),
        keras.layers.Conv2D(4, 3, dtype=dtype),
        keras.layers.BatchNormalization(dtype=dtype),
        keras.layers.GlobalAveragePooling2D(dtype=dtype),
        keras.layers.Dense(2, activation="softmax", dtype="float32"),
    ]
    model = keras.Sequential(layers)
    model.dtype_policy = keras.dtype_policies.get(dtype)
    return model


def test_mixed_float16_trains_with_loss_scaling():
    images = np.random.default_rng(0).uniform(0, 1, (12, 8, 8, 3)).astype("float32")
    labels = np.eye(2, dtype="float32")[np.arange(12) % 2]
    recipe = RECIPES["resnest_imagenet"].scaled(256, steps_per_epoch=3, epochs=5)
    weights = {}
    for dtype in ("mixed_float16", "float32"):
        keras.utils.set_random_seed(1)
        model = small_classifier(dtype)
        model.compile(recipe.optimizer(), "categorical_crossentropy", jit_compile=False)
        model.fit(images, labels, batch_size=4, epochs=5, shuffle=False, verbose=0)
        wrapped = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        assert wrapped == (dtype == "mixed_float16")
        weights[dtype] = np.concatenate([w.numpy().ravel() for w in model.trainable_variables])
    np.testing.assert_allclose(weights["mixed_float16"], weights["float32"], atol=0.02)


def test_a_saved_model_resumes_its_recipe(tmp_path):
    images, labels = np.ones((4, 8, 8, 3), "float32"), np.eye(2)[[0, 1, 0, 1]]
    recipe = RECIPES["refinedet_voc"].scaled(4, dataset_size=4, epochs=4)
    model = small_classifier()
    model.compile(recipe.optimizer(), "categorical_crossentropy", jit_compile=False)
    model.fit(images, labels, epochs=2, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(again.optimizer, SGDWithL2)
    assert again.optimizer.excluded_variables == ("bias", "gamma", "beta")
    assert int(again.optimizer.iterations) == 2
    for one in (model, again):
        one.fit(images, labels, epochs=1, verbose=0)
    for mine, theirs in zip(model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_every_recipe_has_a_source():
    assert set(RECIPES) >= {"refinedet_voc", "refinedet_coco", "resnest_imagenet"}
    for name, recipe in RECIPES.items():
        assert isinstance(recipe, Recipe) and recipe.name == name and recipe.source
        assert recipe.warmup and recipe.global_clipnorm  # against NaN
        hash(recipe)


# === Averaged weights ===


class Network(kr.training.DistributedTraining, keras.Model):
    """One kernel whose outputs are batch normalized."""


def averaging_network(**changes):
    recipe = dataclasses.replace(RECIPES["detector_from_scratch"], **changes)
    inputs = keras.Input((3,))
    dense = keras.layers.Dense(2, use_bias=False)
    outputs = kr.layers.BatchNormalization(momentum=0.5)(dense(inputs))
    model = Network(inputs, keras.layers.Dense(1)(outputs))
    model.compile(recipe.scaled(8, steps_per_epoch=1, epochs=10).optimizer(), "mse")
    return model


class Record(keras.callbacks.Callback):
    """The weights after each step."""

    def on_train_begin(self, logs=None):
        self.steps = [self.model.get_weights()]

    def on_train_batch_end(self, batch, logs=None):
        self.steps.append(self.model.get_weights())


def average(values, momentum=0.8):
    """m * average + (1 - m) * value, from the first value on."""
    total = values[0]
    for value in values[1:]:
        total = momentum * total + (1 - momentum) * value
    return total


def test_fit_ends_with_averaged_weights_and_their_statistics(tmp_path):
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x, y = rng.normal(1.0, 1.0, (8, 3)).astype("float32"), rng.normal(size=(8, 1))
    model = averaging_network(ema_momentum=0.8, learning_rate=0.3)
    model.fit(x, y, batch_size=8, epochs=10, verbose=0, callbacks=[record := Record()])
    final, last = model.get_weights(), record.steps[-1]
    kinds = [w.name for w in model.weights]
    assert kinds == ["kernel", "gamma", "beta", "moving_mean", "moving_variance", "kernel", "bias"]
    for i, name in enumerate(kinds):
        if name.startswith("moving"):
            np.testing.assert_array_equal(final[i], last[i])
        else:
            np.testing.assert_allclose(final[i], average([s[i] for s in record.steps[1:]]), 1e-5)
            assert np.abs(final[i] - last[i]).max() > 1e-3
    # The mean of a linear layer is linear: that of the averaged kernels, each before its step.
    kernel = average([weights[0] for weights in record.steps[:-1]])
    np.testing.assert_allclose(final[3], (x @ kernel).mean(axis=0), rtol=1e-4)

    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras", {"Network": Network})
    again.train_on_batch(x, y)
    assert again.layers[2].ema_momentum == 0.8
    again.compile("sgd", "mse")
    again.train_on_batch(x, y)
    assert again.layers[2].ema_momentum == 0.0


def test_a_resumed_training_averages_the_same_weights(tmp_path):
    def trained(epochs, *folder):
        keras.utils.set_random_seed(0)
        model = averaging_network(ema_momentum=0.8)
        callbacks = [kr.callbacks.ResumeTraining(path) for path in folder]
        if folder:  # for callbacks that follow; the checkpoint has the weights of training
            callbacks.append(keras.callbacks.SwapEMAWeights(swap_on_epoch=True))
        x = np.arange(24.0).reshape(8, 3) / 24
        model.fit(x, x[:, :1], batch_size=8, epochs=epochs, verbose=0, callbacks=callbacks)
        return model.get_weights()

    expected = trained(10)
    trained(4, tmp_path)
    for _ in ("resumed", "finished"):
        for got, wanted in zip(trained(10, tmp_path), expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)


def test_momentum_of_the_average():
    recipe = RECIPES["detector_from_scratch"].scaled(8, steps_per_epoch=1)
    assert not recipe.optimizer().use_ema
    optimizer = dataclasses.replace(recipe, ema_momentum=0.99).optimizer()
    assert optimizer.use_ema and optimizer.ema_momentum == 0.99
    for value in (0.0, 1.0, -1, 2):
        with pytest.raises(ValueError, match="`ema_momentum` must be above 0"):
            dataclasses.replace(recipe, ema_momentum=value)
