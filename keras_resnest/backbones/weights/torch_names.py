"""Loads weights with the names of PyTorch or Caffe into Keras models."""

import re
from collections.abc import Mapping, Sequence

import keras
import numpy as np

from keras_resnest.checks import checked

# Keras' name of a weight: PyTorch's name.
_WEIGHT_NAMES = {
    "kernel": "weight",
    "gamma": "weight",
    "bias": "bias",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
# Index of each convolution in PyTorch's sequence of convolutions, ReLUs and poolings.
_VGG16_PLACES = {
    **{0: "conv1_1", 2: "conv1_2", 5: "conv2_1", 7: "conv2_2"},
    **{10: "conv3_1", 12: "conv3_2", 14: "conv3_3", 17: "conv4_1", 19: "conv4_2", 21: "conv4_3"},
    **{24: "conv5_1", 26: "conv5_2", 28: "conv5_3", 31: "fc6", 33: "fc7"},
}


def _vgg16_layer(match):
    return f"{_VGG16_PLACES.get(int(match['place']), match['place'])}."


def _regnet_block(match):
    return f"layer{match['stage']}.{int(match['block']) - 1}."


def _shufflenet_block(match):
    # The stages have 4, 8 and 4 blocks.
    first = {"2": 0, "3": 4, "4": 12}[match["stage"]]
    return f"features.{first + int(match['block'])}."


def _tcb_layer(match):
    # PyTorch's lists, for each level: tcb0 convolution, ReLU, convolution; tcb1 upsampling;
    # tcb2 ReLU, convolution, ReLU.
    part, place = int(match["list"]), int(match["place"])
    if part == 1:
        return f"tcb_p{place + 3}.upsample."
    level, place = divmod(place, 3)
    return f"tcb_p{level + 3}.{'conv3' if part == 2 else 'conv1' if place == 0 else 'conv2'}."


# Levels of the maps that the ARM of Caffe's VGG-16 reads.
_CAFFE_VGG16_LEVELS = {"conv4_3_norm": 3, "conv5_3_norm": 4, "fc7": 5, "conv6_2": 6}


def _caffe_level(source):
    """Stage and level of the map before a head: "P3" is the ODM's, "res3b3_relu" the ARM's."""
    level = _CAFFE_VGG16_LEVELS.get(source) or int(re.search(r"\d", source)[0])
    return "odm" if source.startswith("P") else "arm", level


def _caffe_head(match):
    stage, level = _caffe_level(match["source"])
    return f"{stage}_{'boxes' if match['output'] == 'loc' else 'classes'}_{level - 3}."


def _caffe_tcb(match):
    level, is_norm = int(match["level"]), match["kind"] is not None
    if match["up"]:  # named after the block that it reads
        return f"tcb_p{level - 1}.upsample{'_bn' if is_norm else ''}."
    return f"tcb_p{level}.{'bn' if is_norm else 'conv'}{match['place'] or 3}."


def _caffe_block(match):
    block, branch, is_norm = match["block"], match["branch"], match["kind"] != "res"
    if block.endswith("_inter"):
        name = "{}_p{}".format(*_caffe_level(block.removesuffix("_inter")))
    elif block == "6":
        name = "res6"
    else:  # 4a, 4b, 4c or 4a, 4b1, 4b2
        name = f"layer{int(block[0]) - 1}_{block[2:] or ord(block[1]) - ord('a')}"
        if branch == "1":
            return f"{name}.downsample.{int(is_norm)}."
    if branch == "1":
        return f"{name}_shortcut{'_bn' if is_norm else ''}."
    return f"{name}_{'bn' if is_norm else 'conv'}{'abc'.index(branch[1]) + 1}."


_CAFFE_BLOCK = r"6|[2-5][a-z]\d*|(res\d\w*_relu|P\d)_inter"
_CONV_NORM = [(r"\.conv(\d)\.conv\.", r".conv\1."), (r"\.conv(\d)\.bn\.", r".bn\1.")]
# PyTorch implementations whose module names differ from our layer names: a pattern that
# identifies them by one of their names, and the replacements.
_FAMILIES = {
    "RegNet of timm": (
        r"^s1\.b1\.",
        [
            (r"^s(?P<stage>\d)\.b(?P<block>\d+)\.", _regnet_block),
            *_CONV_NORM,
            (r"^stem\.conv\.", "conv1."),
            (r"^stem\.bn\.", "bn1."),
            (r"\.downsample\.conv\.", ".downsample.0."),
            (r"\.downsample\.bn\.", ".downsample.1."),
            (r"^head\.fc\.", "fc."),
        ],
    ),
    "SKNet of timm": (r"\.paths\.0\.conv\.", _CONV_NORM),
    "ShuffleNet V2 of torchvision": (
        r"^stage2\.0\.branch1\.",
        [
            (r"^stage(?P<stage>\d)\.(?P<block>\d+)\.", _shufflenet_block),
            (r"\.branch1\.", ".branch_proj."),
            (r"\.branch2\.", ".branch_main."),
            (r"^conv1\.", "first_conv."),
            (r"^conv5\.", "conv_last."),
        ],
    ),
    "ShuffleNet of megvii": (r"^first_conv\.", [(r"^classifier\.0\.", "fc.")]),
    "VGG-16 of timm and torchvision": (
        r"^features\.28\.",
        [
            (r"^features\.(?P<place>\d+)\.", _vgg16_layer),
            (r"^pre_logits\.fc1\.|^classifier\.0\.", "fc6."),
            (r"^pre_logits\.fc2\.|^classifier\.3\.", "fc7."),
            (r"^head\.fc\.|^classifier\.6\.", "fc."),
        ],
    ),
    "RefineDet of PyTorch": (
        r"^arm_loc\.0\.",
        [
            (r"^vgg\.(?P<place>\d+)\.", _vgg16_layer),
            (r"^model\.", ""),
            (r"^extras\.0\.", "conv6_1."),
            (r"^extras\.1\.", "conv6_2."),
            (r"^conv4_3_L2Norm\.", "l2_normalization_p3."),
            (r"^conv5_3_L2Norm\.", "l2_normalization_p4."),
            (r"^(arm|odm)_loc\.", r"\1_boxes_"),
            (r"^(arm|odm)_conf\.", r"\1_classes_"),
            (r"^tcb(?P<list>\d)\.(?P<place>\d+)\.", _tcb_layer),
        ],
    ),
    "RefineDet of Caffe": (
        r"^(res)?P3_(inter_)?mbox_loc\.",
        [
            (
                r"^(res)?(?P<source>conv\d\w*|fc7|res\d\w*_relu|P\d)(_inter)?"
                r"_mbox_(?P<output>loc|conf)\.",
                _caffe_head,
            ),
            (r"^conv4_3_norm\.", "l2_normalization_p3."),
            (r"^conv5_3_norm\.", "l2_normalization_p4."),
            (
                r"^(TL(?=\d_)|P)(?P<level>\d)(_(?P<place>[12]))?(?P<up>-up)?(_(?P<kind>bn|scale))?\.",
                _caffe_tcb,
            ),
        ],
    ),
    "ResNet of Caffe": (
        r"^res2a_branch1\.",
        [
            (r"^(bn|scale)_conv1\.", "bn1."),
            (
                rf"^(?P<kind>res|bn|scale)(?P<block>{_CAFFE_BLOCK})_branch(?P<branch>1|2[abc])\.",
                _caffe_block,
            ),
            (r"^fc1000\.", "fc."),
        ],
    ),
    "VGG-16 with reduced dense layers": (r"^33\.", [(r"^(?P<place>\d+)\.", _vgg16_layer)]),
}

# States of random generators and counters, which the other framework lacks.
_KERAS_ONLY = ("seed_generator_state",)
_TORCH_ONLY = ("num_batches_tracked",)


@checked
def load_torch_state_dict(
    model: keras.Model,
    state_dict: Mapping[str, np.ndarray],
    module_names: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
) -> None:
    """Copies a PyTorch `state_dict` into a Keras model, all or nothing.

    A module `layer1.0.conv2.conv` matches the layer `layer1_0_conv2_conv`, or the sublayer `conv`
    of the layer `layer1_0_conv2`. Kernels are transposed to Keras' layout. The modules of timm's
    RegNet, SKNet and VGG-16, torchvision's VGG-16 and ShuffleNet V2, megvii's ShuffleNet, the
    RefineDet ports, and ResNet and RefineDet of Caffe are recognized and renamed.

    Args:
        model: a built Keras model, such as `ResNeSt50()`.
        state_dict: arrays by name in PyTorch's layout, `{"conv1.0.weight": array, ...}`.
        module_names: optional map from Keras to PyTorch names of modules that are named
            differently: `{"fc7": "vgg.33"}`.
        ignore: PyTorch modules to skip, such as `("fc",)` for a model without a classifier.

    Raises:
        ValueError: If an array is missing, left over, misshapen, not finite or not of
            floating-point numbers. The message lists all of them, and the model is unchanged.

    Example:
        >>> load_torch_state_dict(model, {"fc.weight": weight, "fc.bias": bias})
    """
    ignored = tuple(f"{module}." for module in ignore)
    arrays = {
        name: np.asarray(array)
        for name, array in state_dict.items()
        if not name.endswith(_TORCH_ONLY) and not name.startswith(ignored)
    }
    replacements = _replacements(arrays)
    torch_names, problems = {}, []
    for name in arrays:
        keras_name = name
        for pattern, replacement in replacements:
            keras_name = re.sub(pattern, replacement, keras_name)
        keras_name = keras_name.replace(".", "_")
        if keras_name in torch_names:
            problems.append(f"left over: {name}, beside {torch_names[keras_name]}")
        torch_names[keras_name] = name
    values = []
    for keras_name, variable in _named_variables(model, module_names or {}):
        name = torch_names.pop(keras_name, None)
        if name is None:
            problems.append(f"missing: {keras_name}, for a weight of shape {variable.shape}")
            continue
        value = _to_keras_layout(arrays[name], variable)
        if value.shape != tuple(variable.shape):
            problems.append(
                f"wrong shape: {name} has {arrays[name].shape}, {value.shape} in Keras' layout, "
                f"expected {tuple(variable.shape)}"
            )
        elif not keras.backend.is_float_dtype(value.dtype.name):
            problems.append(f"not floating-point numbers: {name} has {value.dtype}")
        elif not np.all(np.abs(value) <= np.finfo("float32").max):
            problems.append(f"not finite: {name}")
        values.append((variable, value))
    problems += [f"left over: {name}" for name in torch_names.values()]
    if problems:
        raise ValueError(
            f"The arrays do not fit the model {model.name!r}:\n  " + "\n  ".join(problems)
        )
    for variable, value in values:
        variable.assign(value)


def to_state_dict(model: keras.Model) -> dict[str, np.ndarray]:
    """Returns all weights of a model by name, as `load_torch_state_dict` reads them.

    Raises:
        ValueError: if there are weights that belong to none of the layers that are run.

    Example:
        >>> load_torch_state_dict(ResNeSt50(), to_state_dict(model))
    """
    named = dict(_named_variables(model, {}))
    found = {id(variable) for variable in named.values()}
    others = [v.path for v in model.variables if v.name not in _KERAS_ONLY and id(v) not in found]
    if others:
        raise ValueError(
            f"The weights of {model.name!r} must all be used to compute its outputs (build "
            f"backbones with include_top=False). Received others: {', '.join(others)}"
        )
    return {name: _to_torch_layout(variable) for name, variable in named.items()}


def _replacements(names):
    """Returns the replacements of all families that the names belong to."""
    return [
        replacement
        for pattern, replacements in _FAMILIES.values()
        if any(re.search(pattern, name) for name in names)
        for replacement in replacements
    ]


def _named_variables(model, module_names):
    """Yields (PyTorch name with "_" for ".", variable) for all weights of the layers."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _named_variables(layer, module_names)
            continue
        for variable in layer.variables:
            if variable.name in _KERAS_ONLY:
                continue
            # A path is "<scopes>/layer/sublayer/kernel"; skip the scopes.
            parts = variable.path.split("/")
            *modules, weight = parts[parts.index(layer.name) :]
            keras_name = "_".join(modules)
            torch_name = module_names.get(keras_name, keras_name).replace(".", "_")
            yield f"{torch_name}_{_WEIGHT_NAMES.get(weight, weight)}", variable


def _to_keras_layout(array, variable):
    if variable.name != "kernel":
        return array
    if array.ndim == 2 and variable.ndim == 4:
        # A dense layer over a flattened map, which is a convolution here.
        height, width, channels, _ = variable.shape
        if array.shape[1] == height * width * channels:
            array = array.reshape(-1, channels, height, width)
    if array.ndim == 4 and variable.shape[-1] == array.shape[1] == 1:
        return array.transpose(2, 3, 0, 1)  # depthwise: (channels, 1, h, w) to (h, w, channels, 1)
    if array.ndim == 4:
        # (out, in, h, w) to (h, w, in, out); transposed: (in, out, h, w) to (h, w, out, in)
        return array.transpose(2, 3, 1, 0)
    return array.T if array.ndim == 2 else array


def _to_torch_layout(variable):
    """The array from which `_to_keras_layout` makes the value of a variable."""
    array = keras.ops.convert_to_numpy(variable)
    if variable.name == "kernel" and array.ndim in (2, 4):
        array = array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)
    return np.ascontiguousarray(array)
