"""The house rules that a machine can check: floors, lazy imports, serialisation, docstrings."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import keras
import pytest

import keras_resnest as kr
from keras_resnest.backbones import ResNet, create_backbone
from keras_resnest.version import __version__

PACKAGE = Path(kr.__file__).parent
# A file may import from its own folder and from floors below. First match counts.
FLOORS = {
    "version": 0,
    "layers": 1,
    "detection/boxes": 0,
    "detection/anchors": 1,
    "detection/matching": 1,
    "detection/losses": 1,
    "detection/checks": 1,
    "detection/voting": 1,
    "data/images": 1,
    "empty_batch": -1,
    "distribution": 0,
    "divergence": 1,
    "resume": 3,
    "backbones": 2,
    "detection/heads": 2,
    "detection/decoding": 2,
    "detection/pictures": 2,
    "detection/anchor_fit": 2,
    "detection/class_transfer": 2,
    "data": 2,
    "evaluation": 2,
    "visualization": 2,
    "serving": 1,
    "detection/blocks": 3,
    "detection/refinedet": 3,
    "detection/builders": 3,
    "detection/multi_scale": 3,
    "callbacks": 4,
    "recipes": 3,
    "training": 4,
}


def floor_of(module: str) -> int | None:
    path = module.removeprefix("keras_resnest.").replace(".", "/")
    for prefix, floor in FLOORS.items():
        if path == prefix or path.startswith(prefix + "/"):
            return floor
    return None  # a package's face: it may import from anywhere


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.startswith("keras_resnest.")}


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    module = ".".join(["keras_resnest", *path.relative_to(PACKAGE).with_suffix("").parts])
    own = floor_of(module)
    assert own is not None, f"{module} stands on no floor: add it to FLOORS"
    folder = module.rsplit(".", 1)[0]
    for name in imports_of(path):
        other = floor_of(name)
        # data/images and detection's arithmetic lie below the rest of their folders.
        neighbour = folder != "keras_resnest" and f"{name}.".startswith(f"{folder}.")
        if other is not None and not (neighbour and other <= own):
            assert other < own, f"{module} (floor {own}) imports {name} (floor {other})"


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import keras, sys; before = set(sys.modules); import keras_resnest;"
        "print([m for m in ('matplotlib.figure', 'pycocotools', 'tensorflow_datasets', 'keras_cv',"
        " 'PIL.Image', 'huggingface_hub') if m in set(sys.modules) - before])"
    )
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert output.strip() == "[]"


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
    "MultiBoxLoss": {"negative_ratio": 2.0},
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


def test_backbone_config_equals_arguments_equals_attributes():
    backbone = create_backbone("resnest14_tiny", include_top=False, input_shape=(64, 64, 3))
    config = backbone.get_config()
    arguments = set(inspect.signature(ResNet.__init__).parameters) - {"self", "kwargs"}
    assert arguments <= set(config) | {"dtype", "name"}
    for key in arguments & set(config) - {"dtype"}:
        assert hasattr(backbone, key)
    assert ResNet.from_config(config).get_config() == config


def test_no_lambda_layers_and_no_xla_convolution():
    source = "\n".join(p.read_text() for p in modules())
    assert "layers.Lambda" not in source


def test_version():
    assert kr.__version__ == __version__
