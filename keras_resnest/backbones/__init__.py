"""Networks that turn images into feature maps or classes."""

from keras_resnest.backbones.backbone import Backbone
from keras_resnest.backbones.torch_names import load_torch_state_dict
from keras_resnest.backbones.resnet import ResNet
from keras_resnest.backbones.variants import (
    VARIANTS,
    ResNeSt14,
    ResNeSt26,
    ResNeSt50,
    ResNeSt101,
    ResNeSt200,
    ResNeSt269,
    ResNet18,
    ResNet34,
    ResNet50,
    ResNet101,
    ResNet152,
    VGG16Reduced,
    create_backbone,
    list_backbones,
)
from keras_resnest.backbones.vgg import VGG

__all__ = [
    "VARIANTS",
    "VGG",
    "Backbone",
    "ResNeSt14",
    "ResNeSt26",
    "ResNeSt50",
    "ResNeSt101",
    "ResNeSt200",
    "ResNeSt269",
    "ResNet",
    "ResNet18",
    "ResNet34",
    "ResNet50",
    "ResNet101",
    "ResNet152",
    "VGG16Reduced",
    "create_backbone",
    "list_backbones",
    "load_torch_state_dict",
]
