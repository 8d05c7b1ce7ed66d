"""Write the outputs of layers and networks on the backend of `KERAS_BACKEND`.

python backend_outputs.py FILE.npz NAME...    # names of networks, or "layers"
"""

import functools
import sys

import keras
import numpy as np

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
        boxes = np.random.default_rng(2).uniform(-2, 15, (2, 13 * 9 * 2, 4)).astype("float32")
        layer = kr.layers.AlignedConvolution(2, 5)
        layer.build([x.shape, boxes.shape])
        randomize(layer, 0)
        outputs["AlignedConvolution"] = keras.ops.convert_to_numpy(layer([x, boxes]))
        continue
    model = kr.create_backbone(name, include_top=False)
    randomize(model, 1)
    network = keras.Model(model.input, model.pyramid_outputs)
    if keras.backend.backend() == "jax":
        import jax

        # One compilation instead of one per operation and shape.
        levels = jax.jit(functools.partial(network, training=False))(image)
    else:
        levels = network(image, training=False)
    for level, value in levels.items():
        outputs[f"{name} {level}"] = keras.ops.convert_to_numpy(value)
np.savez(path, **outputs)
print(keras.backend.backend())
