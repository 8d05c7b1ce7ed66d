"""Train a RefineDet on your own annotated pictures: model, mAP, plots and SavedModel.

DATA is a folder in Pascal-VOC layout (JPEGImages, Annotations, ImageSets/Main), a
folder with pictures and XML files side by side, or tfds:NAME for a data set of
TensorFlow Datasets.

    python examples/train_detector.py my_folder
    python examples/train_detector.py my_folder --train-split train --test-split test \\
        --epochs 60 --anchor-sizes 24 48 96 192
    python examples/train_detector.py tfds:voc/2007 --model refinedet320_resnest50 --batch-size 32

What is measured and where it went stands at the end of the output, in OUTPUT/result.json.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # hide TensorFlow's start-up messages

import keras
import tensorflow as tf

import keras_resnest as kr

AUGMENTATIONS = ("mild", "ssd", "flip")


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", help="VOC-layout folder, or tfds:NAME")
    add("--train-split", default="train", help="split file or TFDS split (default: %(default)s)")
    add("--test-split", default="test", help="split that is evaluated (default: %(default)s)")
    add("--skip-faulty", action="store_true", help="leave out pictures with faulty annotations")
    add(
        "--model",
        default="refinedet_tiny",
        choices=sorted(kr.builders.BUILDERS),
        help="default: %(default)s",
    )
    add("--image-size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="multiples of 64")
    add(
        "--anchor-sizes",
        type=float,
        nargs=4,
        default=(32, 64, 128, 256),
        metavar="PIXELS",
        help="anchor side at strides 8, 16, 32, 64 (default: 32 64 128 256)",
    )
    add("--epochs", type=int, default=60, help="default: %(default)s")
    add("--batch-size", type=int, default=8, help="default: %(default)s")
    add("--learning-rate", type=float, default=1e-3, help="highest (default: %(default)s)")
    add("--augmentation", choices=AUGMENTATIONS, default="mild", help="default: %(default)s")
    add("--vertical-flip", action="store_true", help="for pictures without up and down")
    add("--evaluate-every", type=int, default=10, metavar="EPOCHS", help="default: %(default)s")
    add("--seed", type=int, default=1, help="default: %(default)s")
    add("--output", type=Path, default=Path("runs/train"), help="folder (default: %(default)s)")
    return parser.parse_args(arguments)


def read_data(arguments):
    """The training and the test set, with the same classes."""
    if arguments.data.startswith("tfds:"):
        name = arguments.data.removeprefix("tfds:")
        train = kr.data.read_tfds(name, arguments.train_split)
        return train, kr.data.read_tfds(name, arguments.test_split, train.class_names)
    on_error = "skip" if arguments.skip_faulty else "raise"
    train = kr.data.read_voc(arguments.data, arguments.train_split, on_error=on_error)
    test = kr.data.read_voc(
        arguments.data, arguments.test_split, train.class_names, on_error=on_error
    )
    return train, test


def make_augmentation(arguments, image_shape) -> kr.data.TrainingAugmentation:
    flip = kr.data.RandomFlip(vertical=0.5 if arguments.vertical_flip else 0.0)
    options = {
        "ssd": {},  # as published: strong, for long trainings
        "mild": {
            "expand": kr.data.RandomExpand(max_ratio=1.5, probability=0.3),
            "crop": kr.data.RandomIoUCrop(min_ious=(None, 0.5, 0.7, 0.9), scale=(0.5, 1.0)),
        },
        "flip": {"photometric": None, "expand": None, "crop": None},
    }[arguments.augmentation]
    return kr.data.TrainingAugmentation(image_shape, flip=flip, **options)


def build_model(arguments, class_names, num_batches: int) -> kr.RefineDet:
    options = {"image_shape": (*arguments.image_size, 3)} if arguments.image_size else {}
    model = getattr(kr.builders, arguments.model)(
        num_classes=len(class_names),
        class_names=class_names,
        anchor_generator=kr.detection.AnchorGenerator(sizes=arguments.anchor_sizes),
        **options,
    )
    steps = arguments.epochs * num_batches
    model.compile(kr.training.adamw_with_warmup(arguments.learning_rate, steps))
    return model


def strategy() -> tf.distribute.Strategy:
    """All GPUs of this machine, or the default device."""
    gpus = tf.config.list_physical_devices("GPU")
    return tf.distribute.MirroredStrategy() if len(gpus) > 1 else tf.distribute.get_strategy()


def train(arguments, model, train_batches, test_batches):
    output = arguments.output
    evaluation = kr.callbacks.DetectionEvaluation(test_batches, frequency=arguments.evaluate_every)
    callbacks = [
        evaluation,
        kr.callbacks.DetectionPlot(
            test_batches, output / "progress", frequency=arguments.evaluate_every
        ),
        keras.callbacks.CSVLogger(output / "log.csv"),
    ]
    history = model.fit(train_batches, epochs=arguments.epochs, callbacks=callbacks)
    kr.visualization.plot_history([history, evaluation], path=output / "history.png")


def report(arguments, model, test, test_batches, seconds, cpu_seconds) -> None:
    """Average precision, pictures with detections, and the saved models."""
    output = arguments.output
    result = kr.evaluation.evaluate_detections(model, test_batches)
    kr.visualization.plot_precision_recall(result, path=output / "precision_recall.png")
    pictures, truth = [], []
    for element in test.as_dataset().take(6):
        pictures.append(element["images"].numpy())
        truth.append({k: v.numpy() for k, v in element["bounding_boxes"].items()})
    kr.visualization.plot_detections(
        pictures,
        model.detect(pictures),
        model.class_names,
        ground_truth=truth,
        path=output / "detections.png",
    )
    model.save(output / "detector.keras")
    model.export(output / "serving" / "1")
    summary = {
        "mAP50": result.mAP,
        "AP50": result.per_class(),
        "parameters": model.count_params(),
        "wall_seconds": round(seconds),
        "cpu_seconds": round(cpu_seconds),
        "arguments": {k: v for k, v in vars(arguments).items() if k != "output"},
    }
    (output / "result.json").write_text(json.dumps(summary, indent=2, default=str))
    print(result)
    print(f"mAP@0.5 {result.mAP:.3f}, training {seconds:.0f} s, CPU time {cpu_seconds:.0f} s")
    print(f"Plots, detector.keras, serving/1 and result.json are in {output}")


def main() -> None:
    arguments = parse_arguments()
    keras.utils.set_random_seed(arguments.seed)
    try:
        train_set, test_set = read_data(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"The data cannot be used: {error}")
    print(f"Training data: {train_set.report}\nTest data: {test_set.report}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    kr.visualization.plot_dataset(train_set, path=arguments.output / "dataset.png")

    num_batches = max(1, len(train_set) // arguments.batch_size)
    with strategy().scope():
        model = build_model(arguments, train_set.class_names, num_batches)
    augmentation = make_augmentation(arguments, model.image_shape)
    train_batches = kr.data.training_batches(
        train_set, model.image_shape, arguments.batch_size, augmentation, seed=arguments.seed
    )
    test_batches = kr.data.evaluation_batches(test_set, model.image_shape, arguments.batch_size)

    start, cpu_start = time.perf_counter(), time.process_time()
    train(arguments, model, train_batches, test_batches)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    report(arguments, model, test_set, test_batches, seconds, cpu_seconds)


if __name__ == "__main__":
    main()
