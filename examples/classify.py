"""Says what is in pictures: the most probable classes of each.

    python examples/classify.py photo.jpg folder/ --model resnest50
    python examples/classify.py photo.jpg --model resnet50 --weights resnet50.safetensors
    python examples/classify.py photo.jpg --model my_classifier.keras --classes names.txt

MODEL is the name of a network (--list shows all, with their published weights) or a `.keras`
file. Pictures are resized and cut as when the network was measured. The names of ImageNet's
classes are fetched once; with --classes, a text file of one name a line, they are not needed.

Exit status: 0 if at least one picture worked, 1 if none did, 2 if the command is wrong.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # fewer messages of TensorFlow


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", nargs="*", type=Path, help="pictures and folders of pictures")
    parser.add_argument("--model", default="resnest50", help="name or .keras file (%(default)s)")
    parser.add_argument(
        "--weights", default="imagenet", help="tag or file of a named network (%(default)s)"
    )
    parser.add_argument("--classes", type=Path, help="text file with one class name a line")
    parser.add_argument("--top", type=int, default=5, help="classes a picture (%(default)s)")
    parser.add_argument("--crop-size", type=int, help="side of the crop in pixels")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures at once (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the result into this file")
    parser.add_argument("--list", action="store_true", help="show the networks and end")
    arguments = parser.parse_args(argv)
    if not arguments.pictures and not arguments.list:
        parser.error("give at least one picture, or --list")
    return arguments


def load_classifier(name, weights, classes):
    """Returns the model and how pictures are cut for it: (size, share, interpolation)."""
    import keras

    import keras_resnest as kr

    if name.endswith(".keras"):
        model = keras.saving.load_model(name)
        size = next((side for side in model.input_shape[1:3] if side), 224)
        return model, (size, 0.875, "bilinear")
    kwargs = {} if classes is None or weights == "imagenet" else {"classes": len(classes)}
    model = kr.create_backbone(name, include_top=True, weights=weights, **kwargs)
    tags = kr.backbones.PRETRAINED.get(name.lower(), {})
    row = tags.get(weights) or next(iter(tags.values()), None)
    return model, (row[1:4] if row else (224, 0.875, "bilinear"))


def collect(paths):
    from keras_resnest.data import find_images

    found = []
    for path in paths:
        found += find_images(path) if path.is_dir() else [path]
    return found


def crops(paths, size, share, interpolation):
    """Yields (path, picture); a picture that cannot be read is named and left out."""
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
        names = arguments.classes and arguments.classes.read_text().split("\n")
        names = names and [name for name in names if name.strip()]
        model, crop = load_classifier(arguments.model, arguments.weights, names)
        crop = (arguments.crop_size or crop[0], *crop[1:])
        paths = collect(arguments.pictures)
        results = []
        for batch in batches(crops(paths, *crop), arguments.batch_size):
            predictions = model.predict(np.stack([picture for _, picture in batch]), verbose=0)
            decoded = kr.backbones.decode_predictions(predictions, arguments.top, names)
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
