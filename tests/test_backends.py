"""All networks give the same numbers on TensorFlow, JAX and PyTorch.

Every backend builds the networks in a process of its own, with weights from one recipe. A few
run always on JAX; `pytest -m slow` runs all of them, on PyTorch too where it is installed.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from keras_resnest.backbones import VARIANTS

PROGRAM = """
import sys
import keras, numpy as np
import keras_resnest as kr

def randomize(layer, seed):
    # Large enough that nothing vanishes, small enough that nothing overflows.
    for i, variable in enumerate(layer.variables):
        if variable.name == "seed_generator_state":
            continue
        rng = np.random.default_rng([seed, i])
        shape = tuple(variable.shape)
        if variable.name == "kernel":
            fan_in = max(np.prod(shape[:-1]), 1) if shape[-1] > 1 else np.prod(shape[:2])
            value = rng.normal(size=shape) * (2 / fan_in) ** 0.5
        elif variable.name in ("gamma", "moving_variance"):
            value = rng.uniform(0.5, 1.0, shape)
            if "bn3/gamma" in variable.path:
                # The end of a residual branch: a hundred of them would magnify rounding errors.
                value *= 0.2
        else:
            value = rng.normal(size=shape) * 0.1
        variable.assign(value.astype("float32"))

path, *names = sys.argv[1:]
image = np.random.default_rng(0).uniform(0, 255, (2, 65, 97, 3)).astype("float32")
outputs = {}
for name in names:
    if name == "layers":
        for layer in (
            kr.layers.GroupedConv2D(12, 3, strides=2, groups=3),
            kr.layers.SplitAttention(12, radix=2, cardinality=2),
            kr.layers.SelectiveKernel(12, strides=2, groups=2),
            kr.layers.SqueezeExcitation(4),
            kr.layers.ChannelShuffle(4),
            kr.layers.DepthwiseConv2D(5, strides=2),
        ):
            x = np.random.default_rng(1).normal(size=(2, 13, 9, 12)).astype("float32")
            layer.build(x.shape)
            randomize(layer, 0)
            outputs[type(layer).__name__] = keras.ops.convert_to_numpy(layer(x))
        continue
    model = kr.create_backbone(name, include_top=False)
    randomize(model, 1)
    network = keras.Model(model.input, model.pyramid_outputs)
    forward = lambda x: network(x, training=False)
    if keras.backend.backend() == "jax":
        import jax
        forward = jax.jit(forward)
    for level, value in forward(image).items():
        outputs[f"{name} {level}"] = keras.ops.convert_to_numpy(value)
    keras.backend.clear_session()
np.savez(path, **outputs)
print(keras.backend.backend())
"""


def run(backend, path, names):
    environment = {**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu"}
    # JAX compiles each operation of each shape: the less it optimizes, the sooner it is done.
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), *names],
        env=environment,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split()[-1] == backend
    return np.load(path)


def check_equal(backend, names, folder):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    want = run("tensorflow", folder / "tensorflow.npz", names)
    got = run(backend, folder / f"{backend}.npz", names)
    assert set(want) == set(got) and len(want) > 0
    for name, value in want.items():
        largest = np.abs(value).max()
        assert np.isfinite(largest) and largest > 1e-3, name
        assert np.abs(got[name] - value).max() < 1e-4 * largest, name


@pytest.mark.parametrize("name", ["layers", "resnest14_tiny", "resnet18"])
def test_jax_equals_tensorflow(name, tmp_path):
    check_equal("jax", [name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch"])
@pytest.mark.parametrize("name", ["layers", *VARIANTS])
def test_every_network_on_every_backend(backend, name, tmp_path):
    check_equal(backend, [name], tmp_path)
