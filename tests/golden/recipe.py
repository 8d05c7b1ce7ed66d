"""Draw the weights and inputs of the golden cases. Needs NumPy only.

Every tensor has a random stream of its own, keyed by `(seed, crc32(name))`: its values depend on
seed, name, shape and kind, not on the order of drawing. Names, shapes and layouts are PyTorch's.

Kinds (standard deviations after the mean; everything in float32):

| kind | shape | distribution |
| --- | --- | --- |
| conv | (out, in / groups, height, width) | N(0, sqrt(2 / fan_in)), each filter centered |
| conv_plain | the same, in networks without normalization | N(0, sqrt(2.9 / fan_in)), centered |
| deconv | (in, out, height, width) | N(0, sqrt(2.9 / in)), centered over `in` |
| linear | (out, in) | N(0, sqrt(1 / in)) |
| bias | (out,) | N(0, 0.05) |
| bn_weight | (channels,) | U(0.7, 1.2) |
| bn_weight_r | (channels,), last normalization of a residual branch | U(0.1, 0.3) |
| bn_weight_h | (channels,), before a hard swish | U(0.8, 1.3) |
| bn_bias, bn_mean | (channels,) | N(0, 0.1) |
| bn_var | (channels,) | U(0.5, 1.5) |
| l2norm | (channels,) | U(8, 12) |

Centered filters keep the offset that ReLU adds from hiding what depends on the input.
"""

import zlib

import numpy as np

NORMAL = {"bias": 0.05, "bn_bias": 0.1, "bn_mean": 0.1}
UNIFORM = {
    "bn_weight": (0.7, 1.2),
    "bn_weight_r": (0.1, 0.3),
    "bn_weight_h": (0.8, 1.3),
    "bn_var": (0.5, 1.5),
    "l2norm": (8.0, 12.0),
}


def generator(seed, name):
    return np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))


def weight_deviation(kind, shape):
    if kind == "conv":
        return np.sqrt(2.0 / np.prod(shape[1:]))
    if kind == "conv_plain":
        return np.sqrt(2.9 / np.prod(shape[1:]))
    if kind == "deconv":
        return np.sqrt(2.9 / shape[0])
    return np.sqrt(1.0 / shape[1])  # linear


def make_tensor(name, shape, kind, seed):
    """Return one float32 tensor of a network."""
    rng = generator(seed, name)
    if kind in UNIFORM:
        low, high = UNIFORM[kind]
        return np.float32(low) + np.float32(high - low) * rng.random(shape, dtype=np.float32)
    deviation = NORMAL[kind] if kind in NORMAL else weight_deviation(kind, shape)
    tensor = rng.standard_normal(shape, dtype=np.float32) * np.float32(deviation)
    if kind == "deconv":
        axes = (0,)
    elif kind.startswith("conv") and tensor[0].size > 1:
        axes = tuple(range(1, tensor.ndim))
    else:
        return tensor
    return tensor - tensor.mean(axis=axes, keepdims=True, dtype=np.float64).astype(np.float32)


def make_state_dict(manifest, seed):
    """Return the tensors of a network by name. `manifest` lists (name, shape, kind)."""
    return {name: make_tensor(name, shape, kind, seed) for name, shape, kind in manifest}


def make_split_attention_tensor(name, shape, seed):
    """Return a weight of the Split-Attention cases, such as "bn0.running_mean"."""
    module, kind = name.split(".")
    if module.startswith("bn"):
        kind = {"running_mean": "bn_mean", "running_var": "bn_var"}.get(kind, f"bn_{kind}")
    elif kind == "weight":
        kind = "conv"
    tensor = make_tensor(name, shape, kind, seed)
    # Larger logits; otherwise the attention of every radix group would be near 1 / radix.
    return np.float32(3) * tensor if name == "fc2.weight" else tensor


def make_input(shape, seed, name="input"):
    """Return float32 images, NCHW: white noise plus blocks of 16 x 16, which pooling keeps."""
    count, channels, height, width = shape
    rng = generator(seed, name)
    fine = rng.standard_normal(shape, dtype=np.float32)
    blocks = (count, channels, -(-height // 16), -(-width // 16))
    coarse = rng.standard_normal(blocks, dtype=np.float32)
    coarse = coarse.repeat(16, axis=2).repeat(16, axis=3)[:, :, :height, :width]
    return np.float32(0.6) * fine + np.float32(0.8) * coarse


def make_array(shape, seed, name, scale=1.0):
    """Return a standard normal float32 array times `scale`."""
    return generator(seed, name).standard_normal(shape, dtype=np.float32) * np.float32(scale)


def sample_indices(size, count):
    """Return `count` sorted flat indices into `size` values, or all if there are fewer."""
    if size <= count:
        return np.arange(size)
    return np.sort(generator(0, f"indices-{size}-{count}").choice(size, count, replace=False))


def sample(array, count):
    """Return `count` values of an array, spread over it at random."""
    return np.ravel(array)[sample_indices(np.size(array), count)]
