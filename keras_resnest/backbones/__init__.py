"""Networks that turn images into feature maps or classes.

`import name as name` re-exports a name for type checkers.
"""

from keras_resnest.backbones.backbone import Backbone as Backbone
from keras_resnest.backbones.classification import decode_predictions as decode_predictions
from keras_resnest.backbones.classification import preprocess_input as preprocess_input
from keras_resnest.backbones.registry import VARIANTS as VARIANTS
from keras_resnest.backbones.registry import create_backbone as create_backbone
from keras_resnest.backbones.resnet import ResNet as ResNet
from keras_resnest.backbones.shufflenet import ShuffleNet as ShuffleNet
from keras_resnest.backbones.variants import *  # noqa: F403  (ResNet18, ResNeSt50, ...)
from keras_resnest.backbones.vgg import VGG as VGG
from keras_resnest.backbones.weights.fetching import load_pretrained as load_pretrained
from keras_resnest.backbones.weights.fetching import read_state_dict as read_state_dict
from keras_resnest.backbones.weights.table import PRETRAINED as PRETRAINED
from keras_resnest.backbones.weights.torch_names import (
    load_torch_state_dict as load_torch_state_dict,
)
from keras_resnest.backbones.zoo import count_multiply_adds as count_multiply_adds
from keras_resnest.backbones.zoo import list_models as list_models
