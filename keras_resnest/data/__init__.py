"""Data: images, annotated datasets and their readers, augmentation, and batches.

Names that need TensorFlow or TensorFlow Datasets are imported on first use.
"""

import importlib
from typing import TYPE_CHECKING

from keras_resnest.data.dataset import (
    AnnotationReport,
    ClassificationDataset,
    ClassificationReport,
    DetectionDataset,
    ImageRecord,
    LabeledImage,
)
from keras_resnest.data.rare_classes import class_weights, repeat_factors
from keras_resnest.data.readers.coco import read_coco
from keras_resnest.data.readers.csv import read_csv
from keras_resnest.data.readers.detect_format import (
    find_splits,
    read_all_splits,
    read_detection,
    read_splits,
    read_train_test,
)
from keras_resnest.data.readers.image_folder import read_image_folder
from keras_resnest.data.readers.tfds import read_shapes, read_tfds, read_tfds_classification
from keras_resnest.data.readers.voc import read_voc
from keras_resnest.data.readers.yolo import read_yolo
from keras_resnest.data.writers import write_detection
from keras_resnest.images import center_crop_image, find_images, load_image, resize_image

if TYPE_CHECKING:
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
        RandomTile,
        Resize,
        TrainingAugmentation,
    )
    from keras_resnest.data.augmentation.mixing import MixUp, Mosaic
    from keras_resnest.data.augmentation.rand_augment import RandAugment
    from keras_resnest.data.batches import (
        classification_batches,
        evaluation_batches,
        training_batches,
    )
    from keras_resnest.data.epochs import set_epoch
    from keras_resnest.data.shapes import Shapes, ShapesConfig

__all__ = [
    "CLASSIFICATION_AUGMENTATIONS",
    "DETECTION_AUGMENTATIONS",
    "AnnotationReport",
    "ClassificationAugmentation",
    "ClassificationDataset",
    "ClassificationReport",
    "DetectionDataset",
    "ImageRecord",
    "LabeledImage",
    "MixUp",
    "Mosaic",
    "PhotometricDistortion",
    "RandAugment",
    "RandomExpand",
    "RandomFlip",
    "RandomIoUCrop",
    "RandomRotate90",
    "RandomTile",
    "Resize",
    "Shapes",
    "ShapesConfig",
    "TrainingAugmentation",
    "center_crop_image",
    "class_weights",
    "classification_batches",
    "evaluation_batches",
    "find_images",
    "find_splits",
    "load_image",
    "mix_up",
    "read_all_splits",
    "read_coco",
    "read_csv",
    "read_detection",
    "read_image_folder",
    "read_shapes",
    "read_splits",
    "read_tfds",
    "read_tfds_classification",
    "read_train_test",
    "read_voc",
    "read_yolo",
    "repeat_factors",
    "resize_image",
    "set_epoch",
    "training_batches",
    "write_detection",
]


_LAZY_MODULES = (
    "augmentation.classification",
    "augmentation.detection",
    "augmentation.mixing",
    "augmentation.rand_augment",
    "batches",
    "epochs",
    "shapes",
)


def __getattr__(name: str):
    """Imports the names under TYPE_CHECKING on first use."""
    if name in __all__:
        for module in _LAZY_MODULES:
            value = getattr(importlib.import_module(f"{__name__}.{module}"), name, None)
            if value is not None:
                return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
