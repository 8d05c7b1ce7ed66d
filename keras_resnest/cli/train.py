"""Trains a detector on annotated images, or a classifier on labeled images.

A detector takes a folder in Pascal VOC, YOLO or COCO layout, a folder of images and XML files, a
COCO .json or a .csv file, or tfds:NAME. A classifier (--classifier) takes a folder with one folder
of images per class, optionally inside "train" and "val" folders, or tfds:NAME. Without splits, a
fifth of the data is held out for testing.

    keras-resnest train my_folder --epochs 60
    keras-resnest train tfds:voc/2007 --train-split train+validation --augmentation ssd \\
        --model refinedet320_vgg16 --recipe refinedet_voc --batch-size 32
    keras-resnest train my_folder --start-from coco.keras
    keras-resnest train flowers --classifier --model resnest50 --weights imagenet
    keras-resnest train --classifier --help

Training uses all GPUs of this machine. To train on several machines, run the same command on each,
with TF_CONFIG set; all must see the data and the output folder. --workers N starts N processes on
this machine instead.

To resume a training that ended early, rerun the same command. --epochs may change, and what affects
neither model nor data: a moved dataset or OUTPUT, the number of devices, --evaluate-every,
--checkpoint-steps, --no-cache, --tensorboard, --deterministic. Anything else needs another OUTPUT.

OUTPUT receives the model, an export for TensorFlow Serving, plots, and result.json. The model of a
detector is the best of the training by mAP@[.5:.95] on validation data; its figures are those on
test data, which are read once, at the end.
"""

import csv
import json
import os
import time
from pathlib import Path

import keras

import keras_resnest as kr
from keras_resnest.atomic import atomic_file, naming_path
from keras_resnest.cli import train_classifier, train_detector, workers
from keras_resnest.cli.common import Failure, check_output, positive, refuse_options

PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
# Options that may change when a training is resumed ...
FREE = "epochs output workers restarts evaluate_every checkpoint_steps no_cache deterministic"
FREE += " tensorboard"
# ... and options of the data and the model, which are compared themselves.
COMPARED = "data data_dir train_split validation_split test_split skip_faulty batch_size seed"
COMPARED += " format unannotated allow_outside image_size anchor_sizes fit_anchors class_weight"


def add_arguments(parser, argv) -> None:
    # Options of the other kind of model are errors.
    kind = train_classifier if "--classifier" in argv else train_detector
    add = parser.add_argument
    add("data", metavar="DATA", help="folder or file of images, or tfds:NAME")
    add("--classifier", action="store_true", help="train a classifier; see its --help")
    add("--train-split", metavar="SPLIT", help="folder, split file or TFDS split; default: train")
    add("--test-split", metavar="SPLIT", help="default: test, else val or valid")
    add("--epochs", type=positive(), help=f"default: {kind.EPOCHS}")
    add("--batch-size", type=positive(), help=f"over all devices; default: {kind.BATCH_SIZE}")
    text = "highest; default: the recipe's, scaled to the batch size"
    add("--learning-rate", type=positive(float), metavar="RATE", help=text)
    add("--precision", choices=PRECISIONS, default="float32", help="default: %(default)s")
    add("--deterministic", action="store_true", help="bitwise reproducible; slower")
    add("--seed", type=int, default=1, help="default: %(default)s")
    add("--output", type=Path, default=Path(kind.OUTPUT), help="folder; default: %(default)s")
    kind.add_arguments(parser)
    add("--workers", type=positive(), help="number of processes on this machine")
    add("--restarts", type=positive(), help="after a lost worker; default: none")


def run(arguments) -> int:
    if arguments.workers is None:
        refuse_options(arguments, ["restarts"], "with --workers")
    try:
        if arguments.workers is not None and not os.environ.get("TF_CONFIG"):
            return workers.run_workers(arguments.argv, arguments.workers, arguments.restarts or 0)
        workers.check_cluster_size(arguments.workers)
        training = prepare(arguments)
        try:
            with naming_path(arguments.output):
                train(training, arguments)
        # Divergence, the checkpoint of another run, a full disk, a lost worker
        except (FloatingPointError, ValueError, OSError, RuntimeError) as error:
            raise Failure(f"training ended early: {error}") from error
    except KeyboardInterrupt:
        found = any((arguments.output / "checkpoint").glob("epoch_*"))
        how = f"resume from the last checkpoint in {arguments.output}" if found else "start over"
        raise KeyboardInterrupt(f"to {how}, run the same command") from None
    return 0


def prepare(arguments):
    """Returns the `Training`. Raises ValueError or OSError for unusable arguments or data."""
    import tensorflow as tf

    check_output(arguments.output)
    keras.utils.set_random_seed(arguments.seed)
    if arguments.deterministic:
        tf.config.experimental.enable_op_determinism()
    kind = train_classifier if arguments.classifier else train_detector
    return kind.Training(arguments)


def train(training, arguments) -> None:
    """Trains, evaluates and saves, as the only process or as one of several workers."""
    strategy, output = training.model.distribute_strategy, arguments.output
    chief = kr.training.is_chief(strategy)
    resume = kr.callbacks.ResumeTraining(
        output / "checkpoint",
        every_steps=getattr(arguments, "checkpoint_steps", None),
        callbacks=[*training.measures, *training.pace],
        metadata=remembered_options(training, arguments),
    )
    if chief:
        for role, dataset in training.data.items():
            print_data(role, dataset.report)
        if resume.initial_epoch:
            print(f"Resuming the training in {output} after epoch {resume.initial_epoch}")
    start, cpu_start = time.perf_counter(), time.process_time()
    history = training.fit(make_callbacks(training, resume, chief), 1 if chief else 0)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    result = training.evaluate()  # on all workers
    training.rows = resume.rows  # of all epochs, also of earlier runs
    if chief:
        shown = {k: v for k, v in vars(arguments).items() if k not in ("argv", "command", "output")}
        summary = {
            **training.report(history, result),
            "parameters": training.model.count_params(),
            "epochs_before_timing": resume.initial_epoch,  # in earlier runs of this command
            "wall_seconds": round(seconds),
            "cpu_seconds": round(cpu_seconds),
            "arguments": shown,
        }
        if not resume.folder.is_dir():
            raise OSError(f"the output folder was removed during the training: {output}")
        with atomic_file(output / "result.json") as file:
            file.write_text(json.dumps(summary, indent=2, default=str))
        done = f"{len(resume.rows)} of {training.recipe.epochs} epochs"  # --patience, --time-limit
        print(f"Trained {done}; this run took {seconds:.0f} s, CPU time {cpu_seconds:.0f} s")
        print(f"The model, serving/1, plots and result.json are in {output}")
    kr.training.wait_for_workers(strategy)


def print_data(role: str, report) -> None:
    print(f"{role} data: {report}")
    if absent := ", ".join(name for name, count in report.class_counts.items() if not count):
        consequence = "cannot be learned" if role == "Training" else "not part of the means"
        print(f"{role} data: no objects of {absent}: {consequence}")


def remembered_options(training, arguments) -> dict:
    """Returns what a checkpoint remembers of the command, with the recipe's values for None."""
    others = {"argv", "command", *FREE.split(), *COMPARED.split()}
    options = {k: v for k, v in vars(arguments).items() if k not in others}
    for name in [name for name, value in options.items() if value is None]:
        options[name] = getattr(training.recipe, name, None)
    for role, dataset in list(training.data.items())[1:]:  # `fit` compares the training data
        options |= {f"{role.lower()} {name}": v for name, v in dataset.identity.items()}
    return options


def make_callbacks(training, resume, chief: bool) -> list:
    output = training.output
    guard = kr.callbacks.TerminateOnDivergence(output / "last_finite.weights.h5")
    callbacks = [guard, *training.measures]
    if not chief:
        return [*callbacks, *training.pace, resume]

    def write(*_):
        # An unusable checkpoint has ended the training before an earlier result is deleted.
        (output / "result.json").unlink(missing_ok=True)
        write_log(resume.rows, output / "log.csv")

    log = keras.callbacks.LambdaCallback(on_train_begin=write, on_epoch_end=write)
    # The bar comes before the evaluation, which adds dozens of values and prints the main ones.
    bar = keras.callbacks.ProgbarLogger()
    # A kill loses no file of an epoch: plots come before its checkpoint, which holds the log.
    return [bar, *callbacks, *training.plots, *training.pace, resume, log]


def write_log(rows: list[dict], path: Path) -> None:
    """Writes a CSV file with a row for each epoch."""
    columns = dict.fromkeys(name for row in rows for name in row) or ["epoch"]
    with atomic_file(path) as temporary, temporary.open("w", newline="") as file:
        table = csv.DictWriter(file, columns, restval="NA")
        table.writeheader()
        table.writerows(rows)
