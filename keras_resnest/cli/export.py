"""Exports a detector or a classifier for runtimes that need neither Keras nor this package.

    keras-resnest export runs/train/detector.keras serving/detector/1
    keras-resnest export detector.keras detector.onnx --precision float16
    keras-resnest export detector.keras detector.onnx --confidence runs/analyze/thresholds.json
    keras-resnest export detector.keras detector.tflite --precision int8 --raw --images photos/
    keras-resnest export resnest50 serving/resnest50/1

A preset is a folder of `save_to_preset`, or hf://user/name.

The suffix of TARGET determines the format: .onnx, .xml (OpenVINO), .tflite (LiteRT); otherwise a
SavedModel for TensorFlow Serving is written.
"""

from pathlib import Path

import numpy as np

import keras_resnest as kr
from keras_resnest.cli.common import (
    CLASSIFIER_OPTIONS,
    add_model_arguments,
    collect_images,
    confidence,
    find_crop,
    load_images,
    load_model,
    read_class_names,
    refuse_options,
)
from keras_resnest.serving.files import SUFFIXES

PRECISIONS = ("float32", "bfloat16", "float16", "int8")
FORMATS = {suffix: format for format, suffix in SUFFIXES.items()}


def add_arguments(parser, argv) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help=".keras file, preset, or name of a classification network")
    add("target", metavar="TARGET", type=Path, help="file or folder to write")
    add("--format", choices=("tf_saved_model", *FORMATS.values()), help="default: see above")
    add("--precision", choices=PRECISIONS, default="float32", help="default: %(default)s")
    add("--raw", action="store_true", help="without decoding of boxes and non-maximum suppression")
    text = "lowest of the detections, or the thresholds.json of `analyze`; default: the model's"
    add("--confidence", type=confidence, metavar="NUMBER|FILE", help=text)
    add("--freeze", action="store_true", help="a SavedModel of constants, see docs/serving.md")
    add("--images", nargs="+", metavar="IMAGE", help="a few dozen typical images, for int8")
    add_model_arguments(parser)
    add("--classes", type=Path, help="of a classifier: text file, one class name per line")


def run(arguments) -> int:
    if bool(arguments.images) != (arguments.precision == "int8"):
        raise ValueError("--precision int8 and --images belong together")
    format = arguments.format or FORMATS.get(arguments.target.suffix, "tf_saved_model")
    if format != "tf_saved_model":
        refuse_options(arguments, ["freeze"], "for SavedModels")
    model = load_model(arguments.model, arguments.weights)
    options = {"precision": arguments.precision, "freeze": arguments.freeze}
    if isinstance(model, kr.RefineDet):
        refuse_options(arguments, CLASSIFIER_OPTIONS, "for classifiers")
        options["decode"] = not arguments.raw
        if arguments.confidence is not None:
            settings = {**model.decoder.get_config(), "confidence_threshold": arguments.confidence}
            model.decoder = kr.detection.DetectionDecoder(**settings)
        fit_image, size = kr.data.resize_image, model.image_shape[:2]
    else:
        refuse_options(arguments, ["raw", "confidence"], "for detectors")
        crop = find_crop(model, arguments)
        fit_image, size = kr.data.center_crop_image, crop
        options |= {"image_shape": (crop.size, crop.size, 3), "crop_ratio": crop.ratio}
        if arguments.classes:
            options["class_names"] = read_class_names(arguments.classes)
    if arguments.images:
        batches = load_images(collect_images(arguments.images), 1)
        images = [fit_image(image, *size) for _, batch in batches for image in batch]
        options["representative_images"] = np.stack(images).astype("float32")
    kr.serving.export_model(model, arguments.target, format, verbose=True, **options)
    return 0
