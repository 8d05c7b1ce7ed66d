"""Measures top-1 and top-5 accuracy of a network, beside the published figure.

    python examples/verify_imagenet.py imagenet/val --model resnest50
    python examples/verify_imagenet.py tfds:imagenet_v2 --split test --model resnet50

DATA is a folder with a folder of images for each class, whose sorted names are the classes 0,
1, 2 ..., as in ImageNet's validation set; or `tfds:` and the name of a TensorFlow dataset with
"image" and "label". Images are resized and cut as when the figure was published.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
from classify import batches, load_classifier, positive

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # fewer messages of TensorFlow


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="folder, or tfds:NAME")
    parser.add_argument("--model", default="resnest50", help="name or .keras file (%(default)s)")
    parser.add_argument(
        "--weights", default="imagenet", help="tag or file of a named network (%(default)s)"
    )
    parser.add_argument("--split", default="validation", help="split of TFDS (%(default)s)")
    parser.add_argument("--data-dir", help="folder of TFDS; default: its own")
    parser.add_argument("--crop-size", type=positive, help="side of the crop in pixels")
    parser.add_argument("--batch-size", type=positive, default=32, help="(%(default)s)")
    parser.add_argument("--limit", type=positive, help="measure on so many images only")
    return parser.parse_args(argv)


def labeled_folder(folder):
    """Yields (image, label) of a folder of class folders, and the number of classes first."""
    from keras_resnest.data import find_images, load_image

    classes = sorted(path for path in Path(folder).iterdir() if path.is_dir())
    if not classes:
        raise ValueError(f"{folder} holds no folders of classes")
    files = [(path, label) for label, name in enumerate(classes) for path in find_images(name)]
    # Evenly mixed, so that --limit takes images of all classes.
    order = np.random.default_rng(0).permutation(len(files))
    return len(classes), ((load_image(files[i][0]), files[i][1]) for i in order)


def labeled_tfds(name, split, data_dir):
    import tensorflow_datasets as tfds

    from keras_resnest.data import load_image

    data, info = tfds.load(name, split=split, data_dir=data_dir, with_info=True)
    if "image" not in info.features or "label" not in info.features:
        raise ValueError(f"{name} has no image and label, but {', '.join(info.features)}")
    pairs = ((load_image(row["image"]), int(row["label"])) for row in tfds.as_numpy(data))
    return info.features["label"].num_classes, pairs


def measure(model, pairs, crop, batch_size, limit):
    """Returns (images, right at first, right among five)."""
    from keras_resnest.data import center_crop_image

    pairs = pairs if limit is None else (pair for pair, _ in zip(pairs, range(limit), strict=False))
    count = first = five = 0
    for batch in batches(pairs, batch_size):
        images = np.stack([center_crop_image(image, *crop) for image, _ in batch])
        labels = np.array([label for _, label in batch])
        ranks = np.argsort(-model.predict(images, verbose=0), axis=1, kind="stable")
        first += int((ranks[:, 0] == labels).sum())
        five += int((ranks[:, :5] == labels[:, None]).any(axis=1).sum())
        count += len(batch)
        print(f"\r{count} images, top-1 {first / count:.2%}", end="", flush=True)
    print()
    return count, first, five


def published_figure(name, weights) -> str:
    """What the publishers of the weights measured, with the size of their images."""
    import keras_resnest as kr

    tags = kr.backbones.PRETRAINED.get(name.lower(), {})
    row = tags.get(weights) or (next(iter(tags.values()), None) if weights == "imagenet" else None)
    if row is None or row.top1 is None:
        return "unknown"
    return f"{row.top1:.2f}% at {row.crop_size} pixels, crop {row.crop_ratio:.3g}"


def main(argv=None) -> int:
    arguments = parse_arguments(argv)
    try:
        if arguments.data.startswith("tfds:"):
            name = arguments.data.removeprefix("tfds:")
            classes, pairs = labeled_tfds(name, arguments.split, arguments.data_dir)
        else:
            classes, pairs = labeled_folder(arguments.data)
        model, crop = load_classifier(arguments.model, arguments.weights)
        if model.output_shape[-1] != classes:
            raise ValueError(
                f"{arguments.model} knows {model.output_shape[-1]} classes, the data has {classes}"
            )
        crop = (arguments.crop_size or crop[0], *crop[1:])
        count, first, five = measure(model, pairs, crop, arguments.batch_size, arguments.limit)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not count:
        print("error: no images", file=sys.stderr)
        return 1
    print(f"{arguments.model}, weights {arguments.weights}, {count} images at {crop[0]} pixels")
    print(f"top-1 {first / count:.2%}, top-5 {five / count:.2%}")
    print(f"published top-1: {published_figure(arguments.model, arguments.weights)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
