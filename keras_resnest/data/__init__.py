"""Data: images, annotated datasets, augmentation, and a dataset that needs no download.

TensorFlow Datasets and the `tf.data` code are imported at the first use of a name that needs them.
"""

import importlib

from keras_resnest.data.dataset import AnnotationReport, DetectionDataset, ImageRecord
from keras_resnest.data.readers.coco import read_coco
from keras_resnest.data.readers.csv import read_csv
from keras_resnest.data.readers.detect_format import (
    find_splits,
    read_detection,
    read_train_test,
)
from keras_resnest.data.readers.tfds import read_tfds
from keras_resnest.data.readers.voc import read_voc
from keras_resnest.data.readers.yolo import read_yolo
from keras_resnest.images import center_crop_image, find_images, load_image, resize_image

_LAZY = {
    "Shapes": "shapes",
    "ShapesConfig": "shapes",
    "read_shapes": "readers.tfds",
    "MixUp": "augmentation.mixing",
    "Mosaic": "augmentation.mixing",
    "PhotometricDistortion": "augmentation.detection",
    "RandomExpand": "augmentation.detection",
    "RandomFlip": "augmentation.detection",
    "RandomIoUCrop": "augmentation.detection",
    "RandomRotate90": "augmentation.detection",
    "Resize": "augmentation.detection",
    "TrainingAugmentation": "augmentation.detection",
    "CLASSIFICATION_AUGMENTATIONS": "classification",
    "ClassificationAugmentation": "classification",
    "ClassificationDataset": "classification",
    "ClassificationReport": "classification",
    "LabeledImage": "classification",
    "RandAugment": "augmentation.rand_augment",
    "classification_batches": "classification",
    "evaluation_batches": "batches",
    "mix_up": "classification",
    "read_image_folder": "classification",
    "read_tfds_classification": "classification",
    "set_epoch": "epochs",
    "training_batches": "batches",
}

__all__ = [
    "AnnotationReport",
    "DetectionDataset",
    "ImageRecord",
    "center_crop_image",
    "find_images",
    "find_splits",
    "load_image",
    "read_coco",
    "read_csv",
    "read_detection",
    "read_tfds",
    "read_train_test",
    "read_voc",
    "read_yolo",
    "resize_image",
    *_LAZY,
]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
