"""ResNeSt backbones and the RefineDet detector for Keras 3."""

from keras_resnest import (
    backbones,
    data,
    detection,
    evaluation,
    layers,
    serving,
    training,
    visualization,
)
from keras_resnest.backbones import (
    ResNeSt14,
    ResNeSt26,
    ResNeSt50,
    ResNeSt101,
    ResNeSt200,
    ResNeSt269,
    create_backbone,
    list_models,
)
from keras_resnest.backbones.presets import upload_preset
from keras_resnest.detection import builders
from keras_resnest.detection.refinedet import RefineDet
from keras_resnest.training import callbacks, recipes
from keras_resnest.version import __version__

__all__ = [
    "RefineDet",
    "ResNeSt14",
    "ResNeSt26",
    "ResNeSt50",
    "ResNeSt101",
    "ResNeSt200",
    "ResNeSt269",
    "__version__",
    "backbones",
    "builders",
    "callbacks",
    "create_backbone",
    "data",
    "detection",
    "evaluation",
    "layers",
    "list_models",
    "recipes",
    "serving",
    "training",
    "upload_preset",
    "visualization",
]
