"""Train a RefineDet on your own annotated images: model, mAP, plots and SavedModel.

DATA is a folder in Pascal-VOC, YOLO or COCO layout, a folder with images and XML files side by
side, a COCO .json or a .csv file, or tfds:NAME for a dataset of TensorFlow Datasets. Where it has
no splits such as "train" and "test", a fifth of the images is held out for testing.

    python examples/train_detector.py my_folder
    python examples/train_detector.py my_folder --test-split val --epochs 60 --fit-anchors
    python examples/train_detector.py tfds:voc/2007 --train-split train+validation \\
        --model refinedet320_vgg16 --recipe refinedet_voc --augmentation ssd --batch-size 32

All GPUs of the machine are used, and with TF_CONFIG all machines of a cluster
(examples/train_multi_worker.py). A run that was stopped or killed goes on where its last
checkpoint is, if it is started again with the same command.

What is measured and where it went stands at the end of the output, in OUTPUT/result.json.

Exit status: 0; 1 if training ended early; 2 if data or arguments cannot be used.
"""

import argparse
import dataclasses
import functools
import json
import os
import re
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # hide TensorFlow's start-up messages

import keras
import tensorflow as tf

import keras_resnest as kr

AUGMENTATIONS = ("mild", "ssd", "flip")
PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
TEST_SPLITS = ("test", "val", "valid", "validation")
# A loss that is no number, a checkpoint of another model, a full disk, a lost worker.
TRAINING_ERRORS = (FloatingPointError, ValueError, OSError, RuntimeError)
RECIPES = ("detector_from_scratch", "refinedet_voc", "refinedet_coco")


def positive(kind=int):
    """Reads a number above 0 of the command line."""

    def read(text: str):
        number = kind(text)
        if not number > 0:
            raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
        return number

    read.__name__ = kind.__name__  # argparse says "invalid int value"
    return read


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", help="folder or file of annotated images, or tfds:NAME")
    add("--train-split", help="split file or TFDS split; default: train, see above")
    add("--test-split", help="split that is evaluated; default: test, else val")
    add("--skip-faulty", action="store_true", help="leave out images with faulty annotations")
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
    add("--fit-anchors", action="store_true", help="fit the anchor sizes to the training data")
    add("--backbone-weights", help='"imagenet", another tag or a file; default: random weights')
    add(
        "--batch-norm",
        choices=("train", "frozen", "synchronized"),
        default="train",
        help="frozen: for pretrained weights and small batches (default: %(default)s)",
    )
    add("--recipe", choices=RECIPES, default=RECIPES[0], help="default: %(default)s")
    add("--epochs", type=positive(), help="default: 60, or those of a published recipe")
    add("--batch-size", type=positive(), default=8, help="over all devices (default: %(default)s)")
    add(
        "--learning-rate",
        type=positive(float),
        help="highest; default: the recipe's, scaled to the batch",
    )
    add("--precision", choices=PRECISIONS, default="float32", help="default: %(default)s")
    add("--augmentation", choices=AUGMENTATIONS, default="mild", help="default: %(default)s")
    add("--vertical-flip", action="store_true", help="for images without up and down")
    add("--mosaic", type=float, default=0.0, metavar="CHANCE", help="four images in one")
    add("--mixup", type=float, default=0.0, metavar="CHANCE", help="two images in one")
    add(
        "--multi-scale",
        type=positive(),
        nargs="+",
        metavar="SIDE",
        help="one side per batch, in pixels",
    )
    add("--no-cache", action="store_true", help="decode images in every epoch: large datasets")
    add(
        "--evaluate-every",
        type=positive(),
        default=10,
        metavar="EPOCHS",
        help="and after the first and the last one (default: %(default)s)",
    )
    add("--checkpoint-steps", type=positive(), metavar="STEPS", help="also inside of epochs")
    add("--deterministic", action="store_true", help="the same bits in every run; slower")
    add("--seed", type=int, default=1, help="default: %(default)s")
    add("--output", type=Path, default=Path("runs/train"), help="folder (default: %(default)s)")
    return parser.parse_args(arguments)


def read_data(arguments):
    """The training and the test set, with the same classes."""
    on_error = "skip" if arguments.skip_faulty else "raise"
    read = functools.partial(kr.data.read_detection, arguments.data, on_error=on_error)
    train_split, test_split = arguments.train_split, arguments.test_split
    if not arguments.data.startswith("tfds:"):
        splits = kr.data.find_splits(arguments.data)
        if len(splits) < 2 and not (train_split or test_split):
            dataset = read()
            train, test = dataset.hold_out(0.2, arguments.seed)
            print(f"{len(test)} of {len(dataset)} images are held out for testing")
            return train, test
        test_split = test_split or first_of(TEST_SPLITS, splits)
    train = read(train_split or "train")
    return train, read(test_split or "test", class_names=train.class_names)


def first_of(wanted, splits: list[str]) -> str | None:
    """The first split that is there; a year may stand behind its name, as in "val2017"."""
    names = {re.sub(r"[-_ ]?\d+$", "", split) for split in splits}
    return next((name for name in wanted if name in names), None)


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


def make_batches(arguments, train_set, image_shape):
    """A function that makes the batches of one worker."""
    augmentation = make_augmentation(arguments, image_shape)
    options = {
        "mosaic": kr.data.Mosaic(probability=arguments.mosaic) if arguments.mosaic else None,
        "mixup": kr.data.MixUp(probability=arguments.mixup) if arguments.mixup else None,
        "image_sizes": [(side, side) for side in arguments.multi_scale or ()] or None,
        "cache": not arguments.no_cache,
        "seed": arguments.seed,
    }

    def batches(num_workers, worker, batch_size):
        part = train_set.shard(num_workers, worker) if num_workers > 1 else train_set
        return kr.data.training_batches(part, image_shape, batch_size, augmentation, **options)

    return batches


def make_recipe(arguments, num_images: int):
    recipe = kr.recipes.RECIPES[arguments.recipe]
    if arguments.learning_rate is not None:
        recipe = dataclasses.replace(
            recipe, learning_rate=arguments.learning_rate, batch_size=arguments.batch_size
        )
    epochs = arguments.epochs or (60 if arguments.recipe == RECIPES[0] else None)
    return recipe.scaled(arguments.batch_size, dataset_size=num_images, epochs=epochs)


def build_model(arguments, train_set, recipe) -> kr.RefineDet:
    side = kr.builders.BUILDERS[arguments.model][1]
    image_shape = (*(arguments.image_size or (side, side)), 3)
    anchors = kr.detection.AnchorGenerator(sizes=arguments.anchor_sizes)
    if arguments.fit_anchors:
        anchors = kr.detection.fit_anchors(train_set, image_shape, anchors)
    if kr.training.is_chief():
        print(kr.detection.anchor_coverage(train_set, anchors, image_shape))
    model = getattr(kr.builders, arguments.model)(
        num_classes=len(train_set.class_names),
        class_names=train_set.class_names,
        image_shape=image_shape,
        anchor_generator=anchors,
        backbone_weights=arguments.backbone_weights,
        freeze_batch_norm=arguments.batch_norm == "frozen",
        synchronized_batch_norm=arguments.batch_norm == "synchronized",
        dtype=arguments.precision,
    )
    model.compile(recipe.optimizer())
    return model


def train(arguments, model, epochs: int, train_batches, test_batches) -> int:
    """Trains, and returns the number of epochs that an earlier start had completed."""
    output = arguments.output
    chief = kr.training.is_chief(model.distribute_strategy)
    evaluation = kr.callbacks.DetectionEvaluation(
        test_batches, frequency=arguments.evaluate_every, verbose=chief
    )
    resume = kr.callbacks.ResumeTraining(
        output / "checkpoint", every_steps=arguments.checkpoint_steps, callbacks=[evaluation]
    )
    if resume.initial_epoch:
        print(f"Going on with the run in {output}, after epoch {resume.initial_epoch}")
    callbacks = [
        kr.callbacks.TerminateOnDivergence(output / "last_finite.weights.h5"),
        evaluation,
        resume,
    ]
    if chief:
        callbacks += [
            kr.callbacks.DetectionPlot(
                test_batches, output / "progress", frequency=arguments.evaluate_every
            ),
            keras.callbacks.CSVLogger(output / "log.csv", append=resume.initial_epoch > 0),
            # Of a run before; it stays if the checkpoint does not fit and nothing is trained.
            keras.callbacks.LambdaCallback(
                on_train_begin=lambda logs: (output / "result.json").unlink(missing_ok=True)
            ),
        ]
    history = model.fit(
        train_batches, epochs=epochs, callbacks=callbacks, verbose="auto" if chief else 0
    )
    if chief and history.epoch:
        kr.visualization.plot_history([history, evaluation], path=output / "history.png")
    return resume.initial_epoch


def report(arguments, model, test, test_batches, earlier_epochs, seconds, cpu_seconds) -> None:
    """Average precision, images with detections, and the saved models."""
    output = arguments.output
    result = kr.evaluation.evaluate_detections(model, test_batches)
    kr.visualization.plot_precision_recall(result, path=output / "precision_recall.png")
    images, truth = [], []
    for element in test.as_dataset().take(6):
        images.append(element["images"].numpy())
        truth.append({k: v.numpy() for k, v in element["bounding_boxes"].items()})
    kr.visualization.plot_detections(
        images,
        model.detect(images),
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
        "epochs_before_timing": earlier_epochs,  # of the same run, before it was stopped
        "wall_seconds": round(seconds),
        "cpu_seconds": round(cpu_seconds),
        "arguments": {k: v for k, v in vars(arguments).items() if k != "output"},
    }
    (output / "result.json").write_text(json.dumps(summary, indent=2, default=str))
    print(result)
    since = f" after epoch {earlier_epochs}" if earlier_epochs else ""
    times = f"training{since} {seconds:.0f} s, CPU time {cpu_seconds:.0f} s"
    print(f"mAP@0.5 {result.mAP:.3f}, {times}")
    print(f"Plots, detector.keras, serving/1 and result.json are in {output}")


def prepare(arguments):
    """All that can be wrong with the arguments is found here."""
    strategy = kr.training.create_strategy()
    kr.training.check_global_batch({arguments.batch_size}, strategy.num_replicas_in_sync)
    train_set, test_set = read_data(arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    recipe = make_recipe(arguments, len(train_set))
    with strategy.scope():
        model = build_model(arguments, train_set, recipe)
    train_batches = kr.training.distribute_batches(
        strategy, make_batches(arguments, train_set, model.image_shape), arguments.batch_size
    )
    test_batches = kr.data.evaluation_batches(
        test_set, model.image_shape, arguments.batch_size, cache=not arguments.no_cache
    )
    if kr.training.is_chief(strategy):
        print(f"Training data: {train_set.report}\nTest data: {test_set.report}")
        kr.visualization.plot_dataset(train_set, path=arguments.output / "dataset.png")
    return model, recipe.epochs, train_batches, test_set, test_batches


def main(arguments=None) -> None:
    arguments = parse_arguments(arguments)
    keras.utils.set_random_seed(arguments.seed)
    if arguments.deterministic:
        tf.config.experimental.enable_op_determinism()
    try:
        model, epochs, train_batches, test_set, test_batches = prepare(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"This cannot be trained: {error}", file=sys.stderr)
        sys.exit(2)
    strategy = model.distribute_strategy
    start, cpu_start = time.perf_counter(), time.process_time()
    try:
        earlier_epochs = train(arguments, model, epochs, train_batches, test_batches)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        if kr.training.is_chief(strategy):
            report(arguments, model, test_set, test_batches, earlier_epochs, seconds, cpu_seconds)
        kr.training.wait_for_workers(strategy)
    except TRAINING_ERRORS as error:
        sys.exit(f"Training ended: {error}")


if __name__ == "__main__":
    main()
