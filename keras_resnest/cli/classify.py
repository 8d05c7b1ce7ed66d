"""Classifies images.

    keras-resnest classify photo.jpg folder/ --model resnest50
    keras-resnest classify photo.jpg --model resnet50 --weights resnet50.safetensors
    keras-resnest classify "photos/*.jpg" --model my_classifier.keras --classes class_names.txt

Images are resized and cropped as for the network's published accuracy. Without --classes, the names
of ImageNet's classes are downloaded once.
"""

import json
from pathlib import Path

import numpy as np

import keras_resnest as kr
from keras_resnest.cli.common import (
    add_model_arguments,
    collect_images,
    find_crop,
    load_images,
    load_model,
    positive,
    printable,
    read_class_names,
    writing_results,
)


def add_arguments(parser, argv) -> None:
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="file, folder or pattern")
    add("--model", default="resnest50", help="network, .keras file or preset; default: %(default)s")
    add_model_arguments(parser)
    add("--classes", type=Path, help="text file with one class name per line")
    add("--top", type=positive(), default=5, help="classes per image; default: %(default)s")
    add("--batch-size", type=positive(), default=8, help="images at a time; default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="also write the classes to this file")


def run(arguments) -> int:
    paths = collect_images(arguments.images)
    names = read_class_names(arguments.classes) if arguments.classes else None
    model = load_model(arguments.model, arguments.weights, names and len(names))
    crop = find_crop(model, arguments)
    count, file = model.output_shape[-1], arguments.classes
    if names is None and count != 1000:
        raise ValueError(f"the model has {count} classes: name them with --classes")
    if names is not None and len(names) != count:
        raise ValueError(f"{file} holds {len(names)} names, the model has {count} classes")
    top = min(arguments.top, count)
    results = []
    for readable, images in load_images(paths, arguments.batch_size):
        crops = np.stack([kr.data.center_crop_image(image, *crop) for image in images])
        probabilities = model.predict(crops, verbose=0)
        decoded = kr.backbones.decode_predictions(probabilities, top, names)
        for path, classes in zip(readable, decoded, strict=True):
            text = ", ".join(f"{name} {p:.1%}" for _, name, p in classes)
            print(printable(f"{path}: {text}"))
            entries = [{"id": str(i), "name": n, "probability": float(p)} for i, n, p in classes]
            results.append({"file": str(path), "classes": entries})
    if arguments.json:
        with writing_results(arguments.json):
            arguments.json.write_text(json.dumps(results, indent=1))
    return 0 if results else 1
