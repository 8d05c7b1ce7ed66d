"""Says what is in images: the most probable classes of each.

    python examples/classify.py photo.jpg folder/ --model resnest50
    python examples/classify.py photo.jpg --model resnet50 --weights resnet50.safetensors
    python examples/classify.py photo.jpg --model my_classifier.keras --classes names.txt

MODEL is the name of a network (--list shows all, with their published weights) or a `.keras`
file. Images, folders or patterns such as "photos/*.jpg" are resized and cut as when the network
was measured. The names of ImageNet's classes are fetched once; with --classes, a text file of one
name a line, they are not needed.

Exit status: 0 if at least one image worked, 1 if none did, 2 if the command is wrong.
"""

import argparse
import glob
import json
import os
import sys
from pathlib import Path

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # fewer messages of TensorFlow


def positive(text: str) -> int:
    """A positive integer of the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return number


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="*", help="images, folders, patterns")
    parser.add_argument("--model", default="resnest50", help="name or .keras file (%(default)s)")
    parser.add_argument(
        "--weights", default="imagenet", help="tag or file of a named network (%(default)s)"
    )
    parser.add_argument(
        "--classes", "--classes-file", type=Path, help="text file with one class name a line"
    )
    parser.add_argument("--top", type=positive, default=5, help="classes an image (%(default)s)")
    parser.add_argument("--crop-size", type=positive, help="side of the crop in pixels")
    parser.add_argument(
        "--batch-size", type=positive, default=8, help="images at once (%(default)s)"
    )
    parser.add_argument("--json", type=Path, help="also write the result into this file")
    parser.add_argument("--list", action="store_true", help="show the networks and end")
    arguments = parser.parse_args(argv)
    if not arguments.images and not arguments.list:
        parser.error("give at least one image, or --list")
    return arguments


def load_classifier(name, weights, classes=None):
    """Returns the model and how images are cut for it: (size, share, interpolation)."""
    import keras

    import keras_resnest as kr

    crop = (224, 0.875, "bilinear")
    if name.endswith(".keras"):
        model = keras.saving.load_model(name)
    else:
        kwargs = {} if classes is None or weights == "imagenet" else {"classes": classes}
        model = kr.create_backbone(name, include_top=True, weights=weights, **kwargs)
        tags = kr.backbones.PRETRAINED.get(name.lower(), {})
        row = tags.get(weights) or next(iter(tags.values()), None)
        if row:
            crop = (row.crop_size, row.crop_ratio, row.interpolation)
    if len(model.output_shape) != 2 or len(model.input_shape) != 4:
        raise ValueError(f"{name} is no classifier of images: its output is {model.output_shape}")
    side = model.input_shape[1]
    return model, (side or crop[0], *crop[1:])


def collect(names):
    """Paths of all images that the command line names."""
    from keras_resnest.data import find_images

    found = []
    for name in names:
        # A file whose name looks like a pattern is that file.
        exists = Path(name).exists() or not glob.has_magic(name)
        paths = [name] if exists else sorted(glob.glob(name, recursive=True))
        if not paths:
            raise ValueError(f"nothing fits the pattern {name!r}")
        for path in map(Path, paths):
            found += find_images(path) if path.is_dir() else [path]
    return found


def read_names(path):
    return [name for name in path.read_text(encoding="utf-8").split("\n") if name.strip()]


def class_names(model, path):
    """Names of the model's classes, from a file; None for those of ImageNet."""
    classes = model.output_shape[-1]
    if path is None:
        if classes != 1000:
            raise ValueError(f"the model has {classes} classes: name them with --classes")
        return None
    names = read_names(path)
    if len(names) != classes:
        raise ValueError(f"{path} holds {len(names)} names, the model has {classes} classes")
    return names


def crops(paths, size, share, interpolation):
    """Yields (path, image); an image that cannot be read is named and left out."""
    from keras_resnest.data import center_crop_image, load_image

    for path in paths:
        try:
            yield path, center_crop_image(load_image(path), size, share, interpolation)
        except ValueError as error:
            print(f"{path}: {error}", file=sys.stderr)


def batches(items, size):
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def main(argv=None) -> int:
    arguments = parse_arguments(argv)
    import keras_resnest as kr

    if arguments.list:
        print(kr.list_models())
        return 0
    try:
        paths = collect(arguments.images)
        classes = len(read_names(arguments.classes)) if arguments.classes else None
        model, crop = load_classifier(arguments.model, arguments.weights, classes)
        names = class_names(model, arguments.classes)
        top = min(arguments.top, model.output_shape[-1])
        crop = (arguments.crop_size or crop[0], *crop[1:])
        results = []
        for batch in batches(crops(paths, *crop), arguments.batch_size):
            predictions = model.predict(np.stack([image for _, image in batch]), verbose=0)
            decoded = kr.backbones.decode_predictions(predictions, top, names)
            for (path, _), best in zip(batch, decoded, strict=True):
                results.append({"file": str(path), "classes": report(path, best)})
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if results else 1


def report(path, best):
    print(f"{path}: " + ", ".join(f"{name} {share:.1%}" for _, name, share in best))
    return [{"id": str(i), "name": name, "probability": float(p)} for i, name, p in best]


if __name__ == "__main__":
    sys.exit(main())
