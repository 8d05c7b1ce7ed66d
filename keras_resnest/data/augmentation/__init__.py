"""Augmentation of images and their labels, as TensorFlow graph code for `tf.data`."""

from keras_resnest.data.augmentation.classification import (
    CLASSIFICATION_AUGMENTATIONS,
    ClassificationAugmentation,
    mix_up,
)
from keras_resnest.data.augmentation.detection import (
    DETECTION_AUGMENTATIONS,
    PhotometricDistortion,
    RandomExpand,
    RandomFlip,
    RandomIoUCrop,
    RandomRotate90,
    Resize,
    TrainingAugmentation,
)
from keras_resnest.data.augmentation.mixing import MixUp, Mosaic
from keras_resnest.data.augmentation.rand_augment import RandAugment

__all__ = [
    "CLASSIFICATION_AUGMENTATIONS",
    "DETECTION_AUGMENTATIONS",
    "ClassificationAugmentation",
    "MixUp",
    "Mosaic",
    "PhotometricDistortion",
    "RandAugment",
    "RandomExpand",
    "RandomFlip",
    "RandomIoUCrop",
    "RandomRotate90",
    "Resize",
    "TrainingAugmentation",
    "mix_up",
]
