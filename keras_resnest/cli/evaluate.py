"""Measures a detector or a classifier on annotated data.

    keras-resnest evaluate runs/train/detector.keras my_folder --split test --output report
    keras-resnest evaluate resnest50 imagenet/val
    keras-resnest evaluate resnet50 tfds:imagenet_v2 --split test --limit 1000

A detector gives average precision per class, COCO's figures, precision-recall curves, and images
with detections: the first ones and those with the lowest precision. DATA is what `train` takes.

A classifier gives top-1 and top-5 accuracy, beside the published figure. DATA is a folder with one
folder of images per class, whose sorted names are the classes 0, 1, 2 ..., or tfds:NAME. Images
are resized and cropped as when the figure was published.

The measures are also written to OUTPUT/result.json.
"""

import json
from pathlib import Path

import numpy as np

import keras_resnest as kr
from keras_resnest.cli.common import (
    Failure,
    add_model_arguments,
    find_crop,
    given_options,
    load_model,
    positive,
    published_weights,
)
from keras_resnest.cli.train_detector import find_test_split, plot_examples

CLASSIFIER_OPTIONS = ("weights", "crop_size", "data_dir", "limit")
NUM_EXAMPLES = 6  # images in a plot


def add_arguments(parser, argv) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help=".keras file, or the name of a classification network")
    add("data", metavar="DATA", help="folder or file of annotated images, or tfds:NAME")
    add("--split", help="default: test, else val, where DATA has splits; of TFDS: validation")
    add("--skip-faulty", action="store_true", help="leave out images that cannot be used")
    add("--batch-size", type=positive(), default=16, help="images at a time; default: %(default)s")
    add("--output", type=Path, default=Path("runs/evaluate"), help="folder; default: %(default)s")
    add_model_arguments(parser)
    add("--data-dir", help="folder of TensorFlow Datasets for a classifier; default: its own")
    add("--limit", type=positive(), help="measure a classifier on this number of images only")


def run(arguments) -> int:
    # The data of a network that is named comes first: its weights may have to be downloaded.
    dataset = None if arguments.model.endswith(".keras") else read_labeled(arguments)
    model = load_model(arguments.model, arguments.weights)
    if isinstance(model, kr.RefineDet):
        if wrong := given_options(arguments, CLASSIFIER_OPTIONS):
            raise ValueError(f"{', '.join(wrong)} of a classifier, but MODEL is a detector")
        result = evaluate_detector(model, arguments)
    else:
        result = evaluate_classifier(model, dataset or read_labeled(arguments), arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    facts = {"model": arguments.model, "data": arguments.data, "split": arguments.split}
    text = json.dumps({**facts, **result}, indent=2)
    (arguments.output / "result.json").write_text(text)
    print(f"result.json is in {arguments.output}")
    return 0


# === Detector ===


def evaluate_detector(model, arguments) -> dict:
    dataset = read_annotated(model, arguments)
    print(f"Data: {dataset.report}")
    batches = kr.data.evaluation_batches(
        dataset, model.image_shape, arguments.batch_size, cache=False
    )
    truth, found = kr.evaluation.collect_detections(model, batches, bounding_box_format="xyxy")
    names = dataset.class_names
    voc = kr.evaluation.voc_average_precision(truth, found, names)
    coco = kr.evaluation.coco_average_precision(truth, found, names)
    if np.isnan(voc.mAP):
        raise Failure(f"{arguments.data} holds no object to find")
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    kr.visualization.plot_precision_recall(voc, path=output / "precision_recall.png")
    count = min(NUM_EXAMPLES, len(truth))
    plot_examples(model, dataset, range(count), output / "detections.png")
    plot_examples(model, dataset, find_worst(truth, found, names), output / "worst.png")
    print(f"{voc}\n{coco}\nmAP@0.5 {voc.mAP:.3f}, mAP@[.5:.95] {coco.metrics['AP']:.3f}")
    return {
        "images": len(truth),
        "mAP50": voc.mAP,
        "AP50": voc.per_class(),
        "COCO": {k: None if np.isnan(v) else v for k, v in coco.metrics.items()},
    }


def read_annotated(model, arguments):
    """The dataset with the classes of the model."""
    split, names = arguments.split, model.class_names
    if split is None:
        is_tfds = arguments.data.startswith("tfds:")
        split = "test" if is_tfds else find_test_split(kr.data.find_splits(arguments.data))
    arguments.split = split
    on_error = "skip" if arguments.skip_faulty else "raise"
    dataset = kr.data.read_detection(arguments.data, split, class_names=names, on_error=on_error)
    if len(dataset.class_names) != model.num_classes:
        raise ValueError(
            f"{arguments.model} knows {model.num_classes} classes, the data has "
            f"{len(dataset.class_names)}"
        )
    return dataset


def find_worst(truth, found, class_names) -> list[int]:
    """The numbers of the images with the lowest average precision."""
    means = [
        kr.evaluation.voc_average_precision([objects], [detections], class_names).mAP
        for objects, detections in zip(truth, found, strict=True)
    ]
    # Images without objects, whose precision is undefined, come last.
    return np.argsort(means, kind="stable")[:NUM_EXAMPLES].tolist()


# === Classifier ===


def evaluate_classifier(model, dataset, arguments) -> dict:
    crop = find_crop(model, arguments)
    classes = model.output_shape[-1]
    if len(dataset.class_names) != classes:
        raise ValueError(
            f"{arguments.model} knows {classes} classes, the data has {len(dataset.class_names)}"
        )
    # Mixed, so that --limit takes images of all classes.
    elements = dataset.as_dataset(shuffle=arguments.limit is not None, seed=0)
    if arguments.limit is not None:
        elements = elements.take(arguments.limit)
    batches = kr.data.classification_batches(
        elements,
        (crop.size, crop.size),
        arguments.batch_size,
        training=False,
        num_classes=classes,
        crop_ratio=crop.ratio,
        interpolation=crop.interpolation,
        cache=False,
    )
    count, first, five = count_hits(model, batches)
    weights = (
        "" if arguments.model.endswith(".keras") else f", weights {arguments.weights or 'imagenet'}"
    )
    print(f"{arguments.model}{weights}, {count} images at {crop.size} pixels")
    print(f"top-1 {first / count:.2%}, top-5 {five / count:.2%}")
    published = published_figure(arguments.model, arguments.weights)
    print(f"published top-1: {published}")
    return {
        "images": count,
        "top1": first / count,
        "top5": five / count,
        "crop_size": crop.size,
        "published_top1": published,
    }


def read_labeled(arguments):
    if arguments.data.startswith("tfds:"):
        arguments.split = arguments.split or "validation"
        name = arguments.data.removeprefix("tfds:")
        return kr.data.read_tfds_classification(name, arguments.split, data_dir=arguments.data_dir)
    on_error = "skip" if arguments.skip_faulty else "raise"
    return kr.data.read_image_folder(arguments.data, arguments.split, on_error=on_error)


def count_hits(model, batches) -> tuple[int, int, int]:
    """Images, and how often the label is the most probable class, or among the first five."""
    count = first = five = 0
    for images, one_hot in batches.as_numpy_iterator():
        labels = one_hot.argmax(axis=1)
        ranks = np.argsort(-model.predict_on_batch(images), axis=1, kind="stable")
        first += int((ranks[:, 0] == labels).sum())
        five += int((ranks[:, :5] == labels[:, None]).any(axis=1).sum())
        count += len(labels)
        print(f"\r{count} images, top-1 {first / count:.2%}", end="", flush=True)
    print()
    return count, first, five


def published_figure(name: str, weights: str | None) -> str:
    """What the publishers of the weights measured, with the size of their images."""
    tags = kr.backbones.PRETRAINED.get(name.lower(), {})
    is_published = weights in (None, "imagenet", *tags)
    row = published_weights(name, weights) if is_published else None
    if row is None or row.top1 is None:
        return "unknown"
    return f"{row.top1:.2f}% at {row.crop_size} pixels, crop {row.crop_ratio:.3g}"
