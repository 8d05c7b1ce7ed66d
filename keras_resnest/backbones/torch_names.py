"""Weights of PyTorch implementations in Keras models, every array accounted for."""

from collections.abc import Mapping, Sequence

import keras
import numpy as np

# What Keras calls a weight: what PyTorch calls it.
_WEIGHT_NAMES = {
    "kernel": "weight",
    "gamma": "weight",
    "bias": "bias",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
# PyTorch modules of the layers of VGG-16, as the ports of SSD and RefineDet number them.
VGG16_TORCH_NAMES = {
    "conv1_1": "vgg.0",
    "conv1_2": "vgg.2",
    "conv2_1": "vgg.5",
    "conv2_2": "vgg.7",
    "conv3_1": "vgg.10",
    "conv3_2": "vgg.12",
    "conv3_3": "vgg.14",
    "conv4_1": "vgg.17",
    "conv4_2": "vgg.19",
    "conv4_3": "vgg.21",
    "conv5_1": "vgg.24",
    "conv5_2": "vgg.26",
    "conv5_3": "vgg.28",
    "fc6": "vgg.31",
    "fc7": "vgg.33",
}

# State of random generators and counters, which have no counterpart on the other side.
_KERAS_ONLY = ("seed_generator_state",)
_TORCH_ONLY = ("num_batches_tracked",)


def load_torch_state_dict(
    model: keras.Model,
    state_dict: Mapping[str, np.ndarray],
    module_names: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
) -> None:
    """Copies a PyTorch `state_dict` into a Keras model: all of it or nothing.

    A module `layer1.0.conv2.conv` belongs to the layer `layer1_0_conv2_conv`, or to the layer
    `conv` inside of the layer `layer1_0_conv2`. Layouts of convolution, transposed convolution
    and dense kernels are converted.

    Args:
        model: a built Keras model, such as `ResNeSt50()`.
        state_dict: arrays by name in PyTorch's layout, `{"conv1.0.weight": array, ...}`.
        module_names: optional PyTorch name by Keras name, for modules whose names differ:
            `{"fc7": "vgg.33"}`.
        ignore: names of PyTorch modules that may be left over, such as `("fc",)` for a model
            without classifier.

    Raises:
        ValueError: if an array is missing, left over, of another shape or not finite. The
            message names every such array, and the model is unchanged.

    Example:
        >>> load_torch_state_dict(model, {"fc.weight": weight, "fc.bias": bias})
    """
    arrays = {
        name: np.asarray(array)
        for name, array in state_dict.items()
        if not name.endswith(_TORCH_ONLY) and not _in_modules(name, ignore)
    }
    torch_names = {name.replace(".", "_"): name for name in arrays}
    values, problems = [], []
    for keras_name, variable in _named_variables(model, module_names or {}):
        name = torch_names.pop(keras_name, None)
        if name is None:
            problems.append(f"missing: {keras_name}, for a weight of shape {variable.shape}")
            continue
        value = _to_keras_layout(arrays[name], variable)
        if value.shape != tuple(variable.shape):
            problems.append(
                f"wrong shape: {name} has {arrays[name].shape}, which gives {value.shape} in "
                f"Keras' layout, wanted {tuple(variable.shape)}"
            )
        elif not np.all(np.isfinite(value)):
            problems.append(f"not finite: {name}")
        values.append((variable, value))
    problems += [f"left over: {name}" for name in torch_names.values()]
    if problems:
        raise ValueError(
            f"The arrays do not fit the model {model.name!r}:\n  " + "\n  ".join(problems)
        )
    for variable, value in values:
        variable.assign(value)


def _in_modules(name, modules):
    return any(name.startswith(f"{module}.") for module in modules)


def _named_variables(model, module_names):
    """Yields (PyTorch name with "_" for ".", variable) for all weights of the model's layers."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _named_variables(layer, module_names)
            continue
        for variable in layer.variables:
            if variable.name in _KERAS_ONLY:
                continue
            # A path is "<scopes>/layer/sublayer/kernel": what counts starts at the layer.
            parts = variable.path.split("/")
            *modules, weight = parts[parts.index(layer.name) :]
            keras_name = "_".join(modules)
            torch_name = module_names.get(keras_name, keras_name).replace(".", "_")
            yield f"{torch_name}_{_WEIGHT_NAMES.get(weight, weight)}", variable


def _to_keras_layout(array, variable):
    if variable.name == "kernel" and array.ndim == 4:
        # (out, in, h, w) to (h, w, in, out); transposed: (in, out, h, w) to (h, w, out, in).
        return array.transpose(2, 3, 1, 0)
    if variable.name == "kernel" and array.ndim == 2:
        return array.T
    return array
