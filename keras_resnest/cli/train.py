"""Trains a detector on annotated images, or a classifier on labeled ones.

A detector takes a folder in Pascal VOC, YOLO or COCO layout, a folder with images and XML files
side by side, a COCO .json or a .csv file, or tfds:NAME. A classifier (--classifier) takes a folder
with one folder of images per class, inside "train" and "val" folders or without them, or tfds:NAME.
A fifth of a dataset without splits is held out for testing.

    keras-resnest train my_folder --epochs 60 --fit-anchors
    keras-resnest train tfds:voc/2007 --train-split train+validation --augmentation ssd \\
        --model refinedet320_vgg16 --recipe refinedet_voc --batch-size 32
    keras-resnest train flowers --classifier --model resnest50 --weights imagenet
    keras-resnest train --classifier --help

All GPUs of this machine are used. To train on several machines, run the same command on each of
them with TF_CONFIG set; data and output must be visible to all. --workers N starts N processes on
this machine instead. To resume a training that ended early, rerun the same command.

OUTPUT holds the model, an export for TensorFlow Serving, plots, and the measures in result.json.
"""

import contextlib
import json
import os
import time
from pathlib import Path

import keras_resnest as kr
from keras_resnest.cli import train_classifier, train_detector, workers
from keras_resnest.cli.common import Failure, positive

PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")


def add_arguments(parser, argv) -> None:
    # Each kind of model has options of its own; those of the other kind are errors.
    kind = train_classifier if "--classifier" in argv else train_detector
    add = parser.add_argument
    add("data", help="folder or file of images, or tfds:NAME")
    add("--classifier", action="store_true", help="train a classifier; --help shows its options")
    add("--train-split", help="folder, split file or TFDS split; default: train, see above")
    add("--test-split", help="split that is evaluated; default: the first usual name that exists")
    add("--skip-faulty", action="store_true", help="leave out images that cannot be used")
    add("--epochs", type=positive(), help=f"default: {kind.EPOCHS}")
    add("--batch-size", type=positive(), help=f"over all devices; default: {kind.BATCH_SIZE}")
    add("--learning-rate", type=positive(float), help="highest; default: the recipe's, scaled")
    add("--precision", choices=PRECISIONS, default="float32", help="default: %(default)s")
    add("--deterministic", action="store_true", help="the same bits in every run; slower")
    add("--seed", type=int, default=1, help="default: %(default)s")
    add("--output", type=Path, default=Path(kind.OUTPUT), help="folder; default: %(default)s")
    kind.add_arguments(parser)
    add("--workers", type=positive(), help="train in this number of processes on this machine")
    add("--restarts", type=int, default=0, help="after a worker is lost; default: %(default)s")


def run(arguments) -> int:
    if arguments.restarts and arguments.workers is None:
        raise ValueError("--restarts needs --workers")
    if arguments.workers is not None and not os.environ.get("TF_CONFIG"):
        return workers.run_workers(arguments.argv, arguments.workers, arguments.restarts)
    workers.check_cluster_size(arguments.workers)
    train(arguments)
    return 0


def train(arguments) -> None:
    """Trains, evaluates and saves in this process, perhaps as one of several workers."""
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(arguments.seed)
    if arguments.deterministic:
        tf.config.experimental.enable_op_determinism()
    kind = train_classifier.Training if arguments.classifier else train_detector.Training
    training = kind(arguments)
    strategy, output = training.model.distribute_strategy, arguments.output
    chief = kr.training.is_chief(strategy)
    if chief:
        print(f"Training data: {training.train_set.report}\nTest data: {training.test_set.report}")
    with failing_in_a_sentence():
        resume = training.resume_callback()
        if resume.initial_epoch and chief:
            print(f"Resuming the training in {output} after epoch {resume.initial_epoch}")
        start, cpu_start = time.perf_counter(), time.process_time()
        history = training.fit(make_callbacks(training, resume, chief), 1 if chief else 0)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        result = training.evaluate()  # by all workers
        if chief:
            summary = {
                **training.report(history, result),
                "parameters": training.model.count_params(),
                "epochs_before_timing": resume.initial_epoch,  # in earlier runs of this command
                "wall_seconds": round(seconds),
                "cpu_seconds": round(cpu_seconds),
                "arguments": {k: v for k, v in vars(arguments).items() if k not in UNREPORTED},
            }
            (output / "result.json").write_text(json.dumps(summary, indent=2, default=str))
            print(f"Training took {seconds:.0f} s, CPU time {cpu_seconds:.0f} s")
            print(f"The model, serving/1, plots and result.json are in {output}")
        kr.training.wait_for_workers(strategy)


UNREPORTED = ("argv", "command", "output")


def make_callbacks(training, resume, chief: bool) -> list:
    import keras

    output = training.output
    guard = kr.callbacks.TerminateOnDivergence(output / "last_finite.weights.h5")
    callbacks = [guard, *training.measures, resume]
    if chief:
        callbacks += [
            *training.plots,
            keras.callbacks.CSVLogger(output / "log.csv", append=resume.initial_epoch > 0),
            # The result of an earlier run stays if the checkpoint is unusable.
            keras.callbacks.LambdaCallback(
                on_train_begin=lambda logs: (output / "result.json").unlink(missing_ok=True)
            ),
        ]
    return callbacks


@contextlib.contextmanager
def failing_in_a_sentence():
    """Divergence, a checkpoint of another model, a full disk, a lost worker: one sentence each."""
    try:
        yield
    except (FloatingPointError, ValueError, OSError, RuntimeError) as error:
        raise Failure(f"training ended early: {error}") from error
