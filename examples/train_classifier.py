"""Train a classifier on your own images: accuracy, plots, .keras file and SavedModel.

DATA is a folder with a folder of images for each class, inside of "train" and "val" folders or
without (then a part is held out for testing); or tfds:NAME for a dataset of TensorFlow Datasets
with "image" and "label".

    python examples/train_classifier.py flowers --model resnest50 --weights imagenet
    python examples/train_classifier.py flowers --model resnest14_tiny --crop-size 96 --epochs 30
    python examples/train_classifier.py tfds:imagenet2012 --recipe resnest_imagenet \\
        --model resnest101 --batch-size 1024 --mixed-precision mixed_bfloat16

A recipe says everything that is not given here: learning rate and its schedule, weight decay,
augmentation, mixup, label smoothing, crop size. It is scaled to the batch size and the number of
epochs; docs/recipes.md has the numbers. All GPUs of the machine are used, and with TF_CONFIG all
machines of a cluster (examples/train_multi_worker.py --classifier). A run that was stopped goes on
where its last epoch ended, if it is started again with the same command.

What was measured and where it went stands at the end of the output, in OUTPUT/result.json.

Exit status: 0; 1 if training ended early; 2 if data or arguments cannot be used.
"""

import argparse
import csv
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # hide TensorFlow's start-up messages

import keras
import numpy as np
import tensorflow as tf

import keras_resnest as kr
from keras_resnest.training.recipes import RECIPES

CLASSIFIER_RECIPES = [name for name, recipe in RECIPES.items() if recipe.crop_size]
PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
# A loss that is no number, a checkpoint of another model, a full disk, a lost worker.
TRAINING_ERRORS = (FloatingPointError, ValueError, OSError, RuntimeError)
TEST_SPLITS = ("val", "validation", "valid", "test")


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
    add("data", help="folder with a folder for each class, or tfds:NAME")
    add("--train-split", default="train", help="folder or TFDS split (default: %(default)s)")
    add("--test-split", help=f"default: the first that exists of {', '.join(TEST_SPLITS)}")
    add("--data-dir", help="folder of TFDS; default: its own")
    add("--skip-faulty", action="store_true", help="leave out images that cannot be read")
    add("--model", default="resnest50", help="name of a network (default: %(default)s)")
    add("--weights", help='start: "imagenet", another tag or a file; default: random weights')
    add(
        "--recipe",
        default="finetune_classifier",
        choices=CLASSIFIER_RECIPES,
        help="default: %(default)s",
    )
    add("--epochs", type=positive(), help="default: that of the recipe")
    add("--batch-size", type=positive(), help="over all devices; default: that of the recipe")
    rate = positive(float)
    add("--learning-rate", type=rate, help="highest, as it is; default: the recipe's, scaled")
    add("--crop-size", type=positive(), help="of the images, in pixels; default: the recipe's")
    add(
        "--augmentation",
        choices=sorted(kr.data.CLASSIFICATION_AUGMENTATIONS),
        help="default: that of the recipe",
    )
    add("--mixup", type=float, help="default: that of the recipe")
    add(
        "--mixed-precision",
        choices=PRECISIONS,
        default="float32",
        help="default: %(default)s",
    )
    add("--seed", type=int, default=1, help="default: %(default)s")
    add("--output", type=Path, default=Path("runs/classifier"), help="default: %(default)s")
    return parser.parse_args(arguments)


# === Data ===


def read_data(arguments):
    """The training and the test set, with the same classes."""
    if arguments.data.startswith("tfds:"):
        return read_tfds(arguments)
    folder, on_error = Path(arguments.data), "skip" if arguments.skip_faulty else "raise"
    if folder.is_dir() and not (folder / arguments.train_split).is_dir():
        if arguments.test_split:
            raise ValueError(f"there is no folder {arguments.train_split!r} in {folder}")
        dataset = kr.data.read_image_folder(folder, on_error=on_error)
        train, test = dataset.hold_out(0.2, arguments.seed)
        print(f"{len(test)} of {len(dataset)} images are held out for testing")
        return train, test
    found = [name for name in TEST_SPLITS if (folder / name).is_dir()]
    test_split = arguments.test_split or (found or TEST_SPLITS)[0]
    train = kr.data.read_image_folder(folder, arguments.train_split, on_error=on_error)
    test = kr.data.read_image_folder(folder, test_split, train.class_names, on_error=on_error)
    return train, test


def read_tfds(arguments):
    name, options = arguments.data.removeprefix("tfds:"), {"data_dir": arguments.data_dir}
    read = kr.data.read_tfds_classification
    train = read(name, arguments.train_split, **options)
    if arguments.test_split:
        return train, read(name, arguments.test_split, train.class_names, **options)
    for split in TEST_SPLITS:
        try:
            return train, read(name, split, train.class_names, **options)
        except ValueError as error:
            reason = error
    raise reason


def make_recipe(arguments):
    """The recipe with what the command line says otherwise; not yet scaled."""
    recipe = RECIPES[arguments.recipe].for_network(arguments.model)
    given = {name: getattr(arguments, name) for name in ("crop_size", "augmentation", "mixup")}
    return dataclasses.replace(recipe, **{k: v for k, v in given.items() if v is not None})


def make_batches(arguments, recipe, strategy, train_set, test_set, batch_size: int):
    """Training batches, of which every worker reads its own part, and those for testing."""
    shape = (recipe.crop_size, recipe.crop_size, 3)

    def train_batches(num_workers, worker, size):
        return kr.data.classification_batches(
            train_set.shard(num_workers, worker),
            shape,
            size,
            training=True,
            augmentation=recipe.augmentation,
            mixup=recipe.mixup,
            seed=arguments.seed,
        )

    test_batches = kr.data.classification_batches(
        test_set, shape, batch_size, training=False, crop_ratio=recipe.crop_ratio
    )
    return kr.training.distribute_batches(strategy, train_batches, batch_size), test_batches


# === Model and training ===


def build_model(arguments, recipe, num_classes: int):
    model = kr.create_backbone(
        arguments.model,
        include_top=True,
        weights=arguments.weights,
        input_shape=(recipe.crop_size, recipe.crop_size, 3),
        dtype=arguments.mixed_precision,
        **({} if arguments.weights else {"classes": num_classes}),
        **recipe.network_arguments(arguments.model),
    )
    if arguments.weights:  # of 1000 classes
        model = model.replace_top(num_classes)
    has_gpu = bool(tf.config.list_physical_devices("GPU"))
    model.compile(
        recipe.optimizer(),
        keras.losses.CategoricalCrossentropy(label_smoothing=recipe.label_smoothing),
        metrics=[
            keras.metrics.CategoricalAccuracy(name="top1"),
            keras.metrics.TopKCategoricalAccuracy(min(5, num_classes), name="top5"),
        ],
        jit_compile="auto" if has_gpu else False,  # XLA compiles for minutes on a CPU
    )
    return model


def train(arguments, recipe, model, class_names, train_batches, test_batches) -> int:
    """Trains, and returns the number of epochs that an earlier start had completed."""
    output = arguments.output
    chief = kr.training.is_chief(model.distribute_strategy)
    resume = kr.callbacks.ResumeTraining(
        output / "checkpoint", metadata={"class_names": list(class_names)}
    )
    guard = kr.callbacks.TerminateOnDivergence(output / "last_finite.weights.h5")
    callbacks = [guard, resume]
    if resume.initial_epoch and chief:
        print(f"Going on with the run in {output}")
    if chief:
        append = resume.initial_epoch > 0
        callbacks += [
            keras.callbacks.CSVLogger(output / "log.csv", append=append),
            # Of a run before; it stays if the checkpoint does not fit and nothing is trained.
            keras.callbacks.LambdaCallback(
                on_train_begin=lambda logs: (output / "result.json").unlink(missing_ok=True)
            ),
        ]
    model.fit(
        train_batches,
        epochs=recipe.epochs,
        validation_data=test_batches,
        callbacks=callbacks,
        shuffle=False,  # the batches are
        verbose="auto" if chief else 0,
    )
    return resume.initial_epoch


# === Results ===


def read_log(path: Path) -> dict[str, list]:
    """The columns of log.csv, which also holds the epochs before a run was stopped."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {name: [float(row[name]) for row in rows] for name in (rows or [{}])[0]}
    return {**columns, "epoch": [int(epoch) for epoch in columns.get("epoch", [])]}


def plot_accuracy(log: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(6.4, 4.2), layout="constrained")).add_subplot()
    epochs = np.asarray(log["epoch"]) + 1
    for name, style in (("top1", "solid"), ("val_top1", "dashed"), ("val_top5", "dotted")):
        axes.plot(epochs, log[name], color="black", linestyle=style, marker=".", label=name)
    axes.set(xlabel="epoch", ylabel="accuracy", ylim=(0, 1.02))
    axes.legend()
    figure.savefig(path)


def report(arguments, recipe, model, class_names, result, earlier_epochs, seconds) -> None:
    """Accuracy, plots and the saved models."""
    output = arguments.output
    log = read_log(output / "log.csv")
    if log["epoch"]:
        kr.visualization.plot_history(log, path=output / "history.png")
        plot_accuracy(log, output / "accuracy.png")
    model.save(output / "classifier.keras")
    model.export(output / "serving" / "1", class_names=class_names, crop_share=recipe.crop_ratio)
    (output / "class_names.txt").write_text("\n".join(class_names) + "\n", encoding="utf-8")
    summary = {
        "top1": result["top1"],
        "top5": result["top5"],
        "loss": result["loss"],
        "epochs": recipe.epochs,
        "steps": int(np.asarray(model.optimizer.iterations)),
        "learning_rate": recipe.learning_rate,
        "parameters": model.count_params(),
        "epochs_before_timing": earlier_epochs,  # of the same run, before it was stopped
        "wall_seconds": round(seconds),
        "class_names": class_names,
        "arguments": {k: v for k, v in vars(arguments).items() if k != "output"},
    }
    (output / "result.json").write_text(json.dumps(summary, indent=2))
    print(f"top-1 {result['top1']:.2%}, top-{min(5, len(class_names))} {result['top5']:.2%}")
    print(f"Plots, classifier.keras, serving/1, class_names.txt and result.json are in {output}")


def batch_size_for(wanted: int, num_images: int, replicas: int) -> int:
    """The batch that is wanted, or the largest that the images can fill."""
    largest = num_images - num_images % replicas
    if wanted > largest > 0:
        print(f"There are {num_images} images: the batch is {largest} instead of {wanted}")
        return largest
    return wanted


def prepare(arguments):
    """All that can be wrong with the arguments is found here."""
    recipe = make_recipe(arguments)
    strategy = kr.training.create_strategy()
    wanted, replicas = arguments.batch_size or recipe.batch_size, strategy.num_replicas_in_sync
    kr.training.check_global_batch({wanted}, replicas)
    train_set, test_set = read_data(arguments)
    batch_size = batch_size_for(wanted, len(train_set), replicas)
    batches = make_batches(arguments, recipe, strategy, train_set, test_set, batch_size)
    steps = len(train_set) // batch_size
    recipe = recipe.scaled(batch_size, steps_per_epoch=steps, epochs=arguments.epochs)
    if arguments.learning_rate is not None:
        recipe = dataclasses.replace(recipe, learning_rate=arguments.learning_rate)
    with strategy.scope():
        model = build_model(arguments, recipe, train_set.num_classes)
    arguments.output.mkdir(parents=True, exist_ok=True)
    if kr.training.is_chief(strategy):
        print(f"Training data: {train_set.report}\nTest data: {test_set.report}")
    return recipe, model, train_set.class_names, *batches


def main(arguments=None) -> None:
    arguments = parse_arguments(arguments)
    keras.utils.set_random_seed(arguments.seed)
    try:
        recipe, model, class_names, train_batches, test_batches = prepare(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"This cannot be trained: {error}", file=sys.stderr)
        sys.exit(2)
    strategy = model.distribute_strategy
    print(f"{recipe.name}: {recipe.duration} steps, learning rate {recipe.learning_rate:g}")
    start = time.perf_counter()
    try:
        earlier = train(arguments, recipe, model, class_names, train_batches, test_batches)
        seconds = time.perf_counter() - start
        result = model.evaluate(test_batches, return_dict=True, verbose=0)  # by all workers
        if kr.training.is_chief(strategy):
            report(arguments, recipe, model, class_names, result, earlier, seconds)
        kr.training.wait_for_workers(strategy)
    except TRAINING_ERRORS as error:
        sys.exit(f"Training ended: {error}")


if __name__ == "__main__":
    main()
