"""Measures a detector or a classifier on annotated data.

    keras-resnest evaluate runs/train/detector.keras my_folder --split test --output report
    keras-resnest evaluate resnest50 imagenet/val
    keras-resnest evaluate detector.keras my_folder --tiles 320 320
    keras-resnest evaluate resnet50 tfds:imagenet_v2 --split test --limit 1000

A preset is a folder of `save_to_preset`, or hf://user/name.

For a detector: average precision per class, the COCO metrics, precision-recall curves, and plots of
detections in the first images and in those with the lowest precision. DATA is as for `train`.

For a classifier: top-1 and top-5 accuracy, and the published top-1. DATA is tfds:NAME, or a folder
with one folder of images per class, in the order of the model's classes. Images are resized and
cropped as for the published accuracy.

The results are also written to OUTPUT/result.json.
"""

import json
from pathlib import Path

import numpy as np

import keras_resnest as kr
from keras_resnest.atomic import atomic_file
from keras_resnest.checks import value_errors
from keras_resnest.cli.common import (
    CLASSIFIER_OPTIONS,
    READING_OPTIONS,
    add_model_arguments,
    add_reading_arguments,
    add_tile_arguments,
    check_output,
    figures,
    find_crop,
    is_saved_model,
    load_model,
    positive,
    print_figures,
    published_weights,
    reading_options,
    refuse_options,
    tile_options,
    writing_results,
)
from keras_resnest.cli.train_classifier import read_labeled
from keras_resnest.cli.train_detector import plot_examples
from keras_resnest.data.readers.detect_format import TEST_SPLITS, first_split

NUM_EXAMPLES = 6  # images per plot


def add_arguments(parser, argv) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help=".keras file, preset, or name of a classification network")
    add("data", metavar="DATA", help="folder or file of annotated images, or tfds:NAME")
    text = "default: test or val, else all images; validation for TFDS classifiers"
    add("--split", help=text)
    add_reading_arguments(parser)
    add("--batch-size", type=positive(), default=16, help="images at a time; default: %(default)s")
    add("--output", type=Path, default=Path("runs/evaluate"), help="folder; default: %(default)s")
    add_tile_arguments(parser)
    add_model_arguments(parser)
    add("--data-dir", help="for a classifier: folder of TFDS; default: that of TFDS")
    add("--limit", type=positive(), help="for a classifier: number of images")


def run(arguments) -> int:
    check_output(arguments.output)
    # Unusable data is reported before the weights of a named network are downloaded.
    dataset = None if is_saved_model(arguments.model) else read_classification(arguments)
    model = load_model(arguments.model, arguments.weights)
    if isinstance(model, kr.RefineDet):
        refuse_options(arguments, CLASSIFIER_OPTIONS, "for classifiers")
        result = evaluate_detector(model, arguments)
    else:
        refuse_options(arguments, (*READING_OPTIONS, "tiles", "overlap"), "for detectors")
        result = evaluate_classifier(model, dataset or read_classification(arguments), arguments)
    facts = {"model": arguments.model, "data": arguments.data, "split": arguments.split}
    with writing_results(arguments.output):
        arguments.output.mkdir(parents=True, exist_ok=True)
        with atomic_file(arguments.output / "result.json") as file:
            file.write_text(json.dumps({**facts, **result}, indent=2))
    print(f"result.json is in {arguments.output}")
    return 0


def check_num_classes(arguments, wanted: int, dataset) -> None:
    if (count := len(dataset.class_names)) != wanted:
        raise ValueError(f"{arguments.model} has {wanted} classes, the data has {count}")


# === Detector ===


def read_test_set(model, arguments):
    """Reads the data for a detector, and says what is measured."""
    arguments.split = arguments.split or find_test_split(arguments.data, arguments.format)
    options = {"class_names": model.class_names, **reading_options(arguments)}
    dataset = kr.data.read_detection(arguments.data, arguments.split, **options)
    check_num_classes(arguments, model.num_classes, dataset)
    if arguments.split is None:
        print(f"No split of {arguments.data} is for tests: all of its images are measured, also")
        print("those that the model was trained on")
    print(f"Data: {dataset.report}")
    if dataset.report.num_boxes == dataset.report.num_difficult:
        raise ValueError(f"{arguments.data} has no objects to compare detections with")
    return dataset


def evaluate_detector(model, arguments) -> dict:
    tiles = tile_options(arguments)
    dataset = read_test_set(model, arguments)
    size, batch_size = model.image_shape, arguments.batch_size
    if tiles:
        model = kr.detection.TiledDetector(model, **tiles, batch_size=batch_size)
        size, batch_size = None, 1
    batches = kr.data.evaluation_batches(
        dataset, size, batch_size, cache=False, include_source=True
    )
    truth, found = kr.evaluation.collect_detections(model, batches, bounding_box_format="xyxy")
    names = dataset.class_names
    voc = kr.evaluation.voc_average_precision(truth, found, names)
    coco = kr.evaluation.coco_average_precision(truth, found, names)
    output, first = arguments.output, range(min(NUM_EXAMPLES, len(truth)))
    with writing_results(output):
        kr.visualization.plot_precision_recall(voc, path=output / "precision_recall.png")
        plot_examples(model, dataset, first, output / "detections.png")
        plot_examples(model, dataset, find_worst(truth, found, names), output / "worst.png")
    print_figures(voc, coco)
    return {"images": len(truth), **figures(voc, coco)}


def find_test_split(data: str, format: str | None) -> str | None:
    """Returns the usual test split of `data`, or None if it has no splits."""
    if data.startswith("tfds:"):
        return "test"
    return first_split(TEST_SPLITS, kr.data.find_splits(data, format))


def find_worst(truth, found, class_names) -> list[int]:
    """Returns the indices of the images with the lowest average precision."""
    means = [
        kr.evaluation.voc_average_precision([objects], [detections], class_names).mAP
        for objects, detections in zip(truth, found, strict=True)
    ]
    # Images without objects, whose precision is NaN, come last.
    return np.argsort(means, kind="stable")[:NUM_EXAMPLES].tolist()


# === Classifier ===


def read_classification(arguments):
    if arguments.data.startswith("tfds:"):
        arguments.split = arguments.split or "validation"
    return read_labeled(arguments, arguments.split)


def evaluate_classifier(model, dataset, arguments) -> dict:
    crop = find_crop(model, arguments)
    classes = model.output_shape[-1]
    check_num_classes(arguments, classes, dataset)
    # Shuffled, so that --limit takes images of all classes.
    elements = dataset.as_dataset(shuffle=arguments.limit is not None, seed=0)
    if arguments.limit is not None:
        elements = elements.take(arguments.limit)
    shape = (crop.size, crop.size)
    options = {"num_classes": classes, "crop_ratio": crop.ratio, "training": False, "cache": False}
    batches = kr.data.classification_batches(
        elements, shape, arguments.batch_size, interpolation=crop.interpolation, **options
    )
    with value_errors():
        count, first, five = count_hits(model, batches)
    name, published = arguments.model, published_figure(arguments.model, arguments.weights)
    if not is_saved_model(name):
        name += f", weights {arguments.weights or 'imagenet'}"
    print(f"{name}, {count} images at {crop.size} pixels")
    print(f"top-1 {first / count:.2%}, top-5 {five / count:.2%}\npublished top-1: {published}")
    result = {"images": count, "top1": first / count, "top5": five / count}
    return {**result, "crop_size": crop.size, "published_top1": published}


def count_hits(model, batches) -> tuple[int, int, int]:
    """Counts images, and those with the label ranked first or among the first five."""
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
    """Returns the published top-1 accuracy and its image size, or "unknown"."""
    is_published = weights in (None, "imagenet", *kr.backbones.PRETRAINED.get(name.lower(), {}))
    row = published_weights(name, weights) if is_published else None
    if row is None or row.top1 is None:
        return "unknown"
    return f"{row.top1:.2f}% at {row.crop_size} pixels, crop {row.crop_ratio:.3g}"
