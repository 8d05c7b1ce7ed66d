"""Data: pictures, annotated data sets, augmentation, and a data set that needs no download.

TensorFlow Datasets and the `tf.data` code are imported at the first use of a name that needs them.
"""

import importlib

from keras_resnest.data.dataset import AnnotationReport, DetectionDataset, ImageRecord
from keras_resnest.data.images import (
    center_crop_image,
    find_images,
    load_image,
    resize_image,
)
from keras_resnest.data.readers import read_voc
from keras_resnest.data.tfds_reader import read_tfds
from keras_resnest.data.validation import check_ground_truth

_LAZY = {
    "Shapes": "shapes",
    "ShapesConfig": "shapes",
    "read_shapes": "shapes",
    "PhotometricDistortion": "augmentation",
    "RandomExpand": "augmentation",
    "RandomFlip": "augmentation",
    "RandomIoUCrop": "augmentation",
    "RandomRotate90": "augmentation",
    "Resize": "augmentation",
    "TrainingAugmentation": "augmentation",
    "evaluation_batches": "pipeline",
    "training_batches": "pipeline",
}

__all__ = [
    "AnnotationReport",
    "DetectionDataset",
    "ImageRecord",
    "center_crop_image",
    "check_ground_truth",
    "find_images",
    "load_image",
    "read_tfds",
    "read_voc",
    "resize_image",
    *_LAZY,
]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
