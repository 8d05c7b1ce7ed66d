"""The house rules that a machine can check: floors, lazy imports, serialization, docstrings."""

import ast
import inspect
import json
from pathlib import Path

import keras
import pytest
from fresh_process import run_program

import keras_resnest as kr
from keras_resnest.version import __version__

PACKAGE = Path(kr.__file__).parent
# One row per folder, or file beside them. An import points to a lower floor or stays in its folder.
FLOORS = {
    "version": 0,
    "atomic": 0,
    "configurable": 0,
    "checks": 0,
    "replicas": 0,
    "images": 1,
    "boxes": 2,
    "divergence": 3,
    "trainer": 3,
    "layers": 3,
    "backbones": 4,
    "data": 4,
    "visualization": 5,
    "detection": 5,
    "evaluation": 6,
    "training": 7,
    "serving": 7,
    "": 8,  # the public face
    "cli": 9,
}


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.stem[0] != "_")


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def imports_of(path: Path, everywhere: bool = True) -> set[str]:
    """Modules of this package that a file imports, at the top or also inside functions."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {n if n in MODULES else node.module for n in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("keras_resnest")}


def folder_of(module: str) -> str:
    return module.partition(".")[2].split(".")[0]


MODULES = {name_of(path) for path in modules()}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    own = folder_of(name_of(path))
    # `export` is the one way up, and it is inside the method.
    exports = path.name in ("backbone.py", "refinedet.py")
    for name in imports_of(path):
        if exports and name == "keras_resnest.serving.export":
            assert name not in imports_of(path, everywhere=False)
        elif folder_of(name) != own:
            assert FLOORS[folder_of(name)] < FLOORS[own], f"{path.name} imports {name}"


def test_files_do_not_import_each_other_in_a_circle():
    above = {}
    graph = {name_of(p): imports_of(p, everywhere=False) & MODULES for p in modules()}

    def visit(module, path):
        assert module not in path, " -> ".join([*path, module])
        if module not in above:
            for name in graph.get(module, ()):
                visit(name, [*path, module])
            above[module] = True

    for module in graph:
        visit(module, [])


def test_importing_the_package_loads_nothing_heavy():
    """Nor does importing `keras_resnest.data`, but its `Shapes` is found."""
    assert run_program("import_the_package.py") == "[]"


def public_objects():
    found = {}
    for module in (kr, kr.layers, kr.backbones, kr.detection, kr.detection.builders):
        for name in getattr(module, "__all__", dir(module)):
            value = getattr(module, name)
            own = getattr(value, "__module__", "").startswith("keras_resnest")
            if own and not name.startswith("_") and callable(value):
                found[f"{module.__name__}.{name}"] = value
    return found


@pytest.mark.parametrize("name", sorted(public_objects()))
def test_public_objects_have_docstrings_with_an_example(name):
    text = inspect.getdoc(public_objects()[name]) or ""
    assert len(text) > 80, f"{name}: no real docstring"
    assert ">>>" in text or "```" in text, f"{name}: no example in the docstring"


OBJECTS = {
    "AnchorGenerator": {"sizes": ((16, 24), 64, 128, 256), "clip": True},
    "BoxMatcher": {"iou_threshold": 0.6},
    "RefineDetHeads": {"filters": 8, "use_residual_blocks": True},
    "DetectionDecoder": {"max_detections": 7, "clip_to_image": False},
}


@pytest.mark.parametrize("name", sorted(OBJECTS))
def test_config_equals_arguments_equals_attributes(name):
    cls = getattr(kr.detection, name)
    instance = cls(**OBJECTS[name])
    config = instance.get_config()
    arguments = set(inspect.signature(cls.__init__).parameters) - {"self"}
    assert set(config) == arguments
    for key, value in config.items():
        assert getattr(instance, key) == value
    serialized = keras.saving.serialize_keras_object(instance)
    again = keras.saving.deserialize_keras_object(serialized)
    assert type(again) is cls and again.get_config() == config


# An instance of every public class of `kr.layers`, and of every network.
LAYERS = [
    kr.layers.AlignedConvolution(3, 4, use_bias=False, kernel_initializer="zeros"),
    kr.layers.BatchNormalization(momentum=0.8, epsilon=1e-4),
    kr.layers.ChannelShuffle(4),
    kr.layers.DepthwiseConv2D(5, strides=2, padding="same", data_format="channels_first"),
    kr.layers.DropBlock2D(0.1, block_size=5, seed=3),
    kr.layers.GroupedConv2D(8, 3, groups=2, strides=2, kernel_initializer="he_normal"),
    kr.layers.L2Normalization(8.0, axis=1, epsilon=1e-5),
    kr.layers.RadixSoftmax(2, cardinality=4),
    kr.layers.SelectiveKernel(8, 2, groups=2, reduction_ratio=0.5, divisor=4, split_input=True),
    kr.layers.SplitAttention(
        8, kernel_size=5, radix=4, cardinality=2, dropblock_rate=0.1, data_format="channels_first"
    ),
    kr.layers.SqueezeExcitation(4, data_format="channels_first", name="se"),
    kr.layers.TransferConnectionBlock(16, use_batch_norm=True),
]
NETWORKS = {
    "ResNet": {
        "stackwise_num_filters": [8, 16],
        "stackwise_num_blocks": [2, 1],
        "stackwise_num_strides": [1, 2],
        "radix": 2,
        "cardinality": 2,
        "base_width": 32,
        "stem_width": 4,
        "deep_stem": True,
        "avg_down": True,
        "avd": "after",
        "zero_init_last_gamma": True,
        "dropblock_rate": 0.1,
        "dropout_rate": 0.2,
        "include_top": True,
        "classes": 5,
        "classifier_activation": None,
        "include_rescaling": False,
        "image_shape": (None, 64, 3),
        "dtype": "mixed_bfloat16",
        "name": "small",
    },
    "ShuffleNet": {
        "stackwise_num_filters": [16, 32],
        "stackwise_num_blocks": [2, 2],
        "channel_split": "alternate",
        "block_kinds": [5, "xception", 7, 3],
        "stackwise_activations": ["relu", "hard_swish"],
        "stackwise_se": [False, True],
        "stem_width": 8,
        "stem_activation": "hard_swish",
        "stem_pooling": False,
        "head_filters": 24,
        "head_units": 12,
        "use_classifier_bias": False,
        "trained_on_bgr": True,
        "dropout_rate": 0.2,
        "include_top": True,
        "classes": 5,
    },
    "VGG": {
        "stackwise_num_filters": [4, 8, 8],
        "stackwise_num_blocks": [1, 1, 1],
        "include_rescaling": False,
        "image_shape": (32, 32, 3),
    },
}


def check_config(instance):
    """Arguments are attributes and config, and the object survives serialization as JSON."""
    cls = type(instance)
    parameters = set(inspect.signature(cls.__init__).parameters) - {"self", "kwargs"}
    config = instance.get_config()
    assert set(config) == parameters | {"name", "trainable", "dtype"}
    assert all(hasattr(instance, name) for name in parameters)
    serialized = json.loads(json.dumps(keras.saving.serialize_keras_object(instance)))
    again = keras.saving.deserialize_keras_object(serialized)
    assert type(again) is cls and again.get_config() == config
    assert keras.saving.get_registered_name(cls).startswith("keras_resnest>")
    return again


def test_every_layer_and_network_is_in_the_config_tests():
    assert {type(layer) for layer in LAYERS} == {getattr(kr.layers, n) for n in kr.layers.__all__}
    networks = {v.__name__ for v in vars(kr.backbones).values() if inspect.isclass(v)}
    assert networks == {*NETWORKS, "Backbone"}


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_layer_config_equals_arguments_equals_attributes(layer):
    check_config(layer)


@pytest.mark.parametrize("name", NETWORKS)
def test_network_config_equals_arguments_equals_attributes(name):
    network = getattr(kr.backbones, name)(**NETWORKS[name])
    again = check_config(network)
    assert [w.shape for w in again.weights] == [w.shape for w in network.weights]


def test_no_lambda_layers_and_no_xla_convolution():
    source = "\n".join(p.read_text() for p in modules())
    assert "layers.Lambda" not in source


def test_version():
    assert kr.__version__ == __version__
