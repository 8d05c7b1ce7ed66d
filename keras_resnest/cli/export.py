"""Exports a detector or a classifier for a runtime that needs neither Keras nor this package.

    keras-resnest export runs/train/detector.keras serving/detector/1
    keras-resnest export detector.keras detector.onnx --precision float16
    keras-resnest export detector.keras detector.tflite --precision int8 --raw --images photos/
    keras-resnest export resnest50 serving/resnest50/1

The format follows from the suffix of TARGET: .onnx, .xml (OpenVINO), .tflite (LiteRT), else a
SavedModel for TensorFlow Serving.
"""

from pathlib import Path

import numpy as np

import keras_resnest as kr
from keras_resnest.cli.classify import read_class_names
from keras_resnest.cli.common import (
    add_model_arguments,
    collect_images,
    find_crop,
    given_options,
    load_images,
    load_model,
)

FORMATS = {".onnx": "onnx", ".xml": "openvino", ".tflite": "litert"}
CLASSIFIER_OPTIONS = ("weights", "crop_size", "classes")


def add_arguments(parser, argv) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help=".keras file, or the name of a classification network")
    add("target", metavar="TARGET", type=Path, help="file or folder to write")
    add("--format", choices=("tf_saved_model", *FORMATS.values()), help="default: see above")
    add("--precision", default="float32", help="bfloat16, float16, int8; default: %(default)s")
    add("--raw", action="store_true", help="without decoding and suppression of boxes")
    add("--no-freeze", action="store_true", help="SavedModel that takes less memory to load")
    add("--images", nargs="+", metavar="IMAGE", help="some tens of typical images, for int8")
    add_model_arguments(parser)
    add("--classes", type=Path, help="text file with one class name per line, of a classifier")


def run(arguments) -> int:
    model = load_model(arguments.model, arguments.weights)
    format = arguments.format or FORMATS.get(arguments.target.suffix, "tf_saved_model")
    options = {"precision": arguments.precision, "freeze": not arguments.no_freeze}
    if isinstance(model, kr.RefineDet):
        if wrong := given_options(arguments, CLASSIFIER_OPTIONS):
            raise ValueError(f"{', '.join(wrong)} of a classifier, but MODEL is a detector")
        options["decode"] = not arguments.raw
        height, width = model.image_shape[:2]

        def fit_image(image):
            return kr.data.resize_image(image, height, width)
    else:
        if arguments.raw:
            raise ValueError("--raw of a detector, but MODEL is a classifier")
        crop = find_crop(model, arguments)
        options |= {"image_shape": (crop.size, crop.size, 3), "crop_ratio": crop.ratio}
        if arguments.classes:
            options["class_names"] = read_class_names(arguments.classes)

        def fit_image(image):
            return kr.data.center_crop_image(image, *crop)

    if arguments.images:
        batches = load_images(collect_images(arguments.images), 1)
        images = [fit_image(image) for _, batch in batches for image in batch]
        options["representative_images"] = np.stack(images).astype("float32")
    kr.serving.export_model(model, arguments.target, format, verbose=True, **options)
    return 0
