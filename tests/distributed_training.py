"""Programs of test_distribution: SGD steps on fixed batches, and what the model finds.

    TF_CONFIG=... python tests/distributed_training.py FOLDER frozen_detector frozen_classifier

trains as one of several workers. `many_devices.py` calls `main` and `with_more_replicas`.
"""

import argparse
import os
import signal
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from detectors import CLASS_NAMES, rectangles, small_detector

from keras_resnest.backbones import ResNet
from keras_resnest.layers.normalization import set_batch_norm
from keras_resnest.training.callbacks import ResumeTraining
from keras_resnest.training.optimizers import SGDWithL2
from keras_resnest.training.strategies import create_strategy, distribute_batches

STEPS, GLOBAL_BATCH, SHAPE = 5, 4, (64, 128, 3)
UNEVEN_ROWS = 5  # the last batch, of four, has one


def detector(**batch_norm):
    model = small_detector(SHAPE, **batch_norm)
    options = {"use_ema": True, "ema_momentum": 0.5, "backbone_learning_rate_factor": 0.1}
    model.compile(SGDWithL2(1e-3, momentum=0.9, global_clipnorm=10.0, **options))
    return model


def classifier(**batch_norm):
    keras.utils.set_random_seed(1)
    model = ResNet(
        stackwise_num_filters=[8, 16],
        stackwise_num_blocks=[1, 1],
        stackwise_num_strides=[1, 2],
        block_type="basic",
        include_top=True,
        include_rescaling=True,
        classes=3,
        image_shape=SHAPE,
    )
    set_batch_norm(model, **batch_norm)
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


MODELS = {
    "frozen_detector": lambda: detector(freeze_batch_norm=True),
    "synchronized_detector": lambda: detector(synchronized_batch_norm=True),
    "frozen_classifier": lambda: classifier(freeze=True),
    "synchronized_classifier": lambda: classifier(synchronized=True),
}


def training_batches(kind: str):
    """The second half of every batch, which the last replicas get, has no objects."""
    images, truth = rectangles(STEPS * GLOBAL_BATCH, SHAPE, objects=2)
    if "classifier" in kind:
        truth = truth["labels"][:, 0]
    else:
        truth["labels"][np.arange(len(images)) % GLOBAL_BATCH >= GLOBAL_BATCH // 2] = -1
    data = tf.data.Dataset.from_tensor_slices((images, truth))
    return data.batch(GLOBAL_BATCH, drop_remainder=True)


def uneven_batches(kind: str):
    """Of the last batch, some replicas get no rows."""
    images, truth = rectangles(UNEVEN_ROWS, SHAPE, objects=2)
    y = truth["labels"][:, 0] if "classifier" in kind else truth
    return tf.data.Dataset.from_tensor_slices((images, y)).batch(GLOBAL_BATCH)


def check_classes_of_distributed_batches(model):
    """`distribute_batches` keeps the class names of the data, so `fit` compares them."""

    def make_batches(num_workers, worker, batch_size):
        data = training_batches("detector").unbatch().shard(num_workers, worker)
        data = data.batch(batch_size, drop_remainder=True)
        data.class_names = [*CLASS_NAMES[1:], "black"]
        return data

    data = distribute_batches(model.distribute_strategy, make_batches, GLOBAL_BATCH)
    refuses(lambda: model.fit(data, verbose=0), "same classes")


def refuses(train, message: str) -> None:
    try:
        train()
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError("fit accepted unusable batches")


class Kill(keras.callbacks.Callback):
    """Sends SIGKILL to the second worker at a step."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_train_batch_begin(self, batch, logs=None):
        is_second = '"index": 1' in os.environ.get("TF_CONFIG", "")
        if is_second and int(np.asarray(self.model.optimizer.iterations)) == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(model, kind: str, callbacks=(), **options) -> dict:
    """Weights and logs after a training."""
    # After more steps, batch statistics and mined negatives would differ by more than rounding.
    epochs = 2 if kind == "frozen_classifier" else 1
    options |= {"epochs": epochs, "verbose": 0, "callbacks": list(callbacks)}
    history = model.fit(training_batches(kind), **options).history
    weights = {f"weight_{i}": np.asarray(w) for i, w in enumerate(model.get_weights())}
    return {**weights, **{name: np.asarray(values) for name, values in history.items()}}


def results(kind: str, strategy) -> dict:
    """All that a model returns on the replicas of a strategy."""
    with strategy.scope():
        model = MODELS[kind]()
    uneven = uneven_batches(kind)
    evaluated = model.evaluate(uneven, return_dict=True, verbose=0)
    predicted = keras.tree.flatten(model.predict(uneven.map(lambda x, y: x), verbose=0))
    return {
        **{f"evaluate_{name}": value for name, value in evaluated.items()},
        **{f"predict_{i}": leaf for i, leaf in enumerate(predicted)},
        **train(model, kind, validation_data=uneven),
    }


def save_results(folder, kind: str, *counts: int) -> None:
    for count in counts:
        strategy = replicas(count) if count > 1 else tf.distribute.get_strategy()
        np.savez(folder / f"{kind}_{count}", **results(kind, strategy))


def replicas(count: int):
    """The strategy of the first devices of `many_devices.py`."""
    devices = [f"CPU:{i}" for i in range(count)]
    return tf.distribute.MirroredStrategy(devices, tf.distribute.ReductionToOneDevice())


def main(folder):
    for kind in ("frozen_detector", "synchronized_classifier", "frozen_classifier"):
        save_results(folder, kind, 1, 2)


def with_more_replicas(folder):
    save_results(folder, "frozen_detector", 1, 4)
    save_results(folder, "synchronized_detector", 1, 2)
    save_results(folder, "frozen_classifier", 1, 4)


def train_as_worker():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", choices=MODELS, nargs="+")
    parser.add_argument("--kill-at", type=int, default=-1, help="step at which worker 1 dies")
    arguments = parser.parse_args()
    strategy = create_strategy()
    for kind in arguments.models:
        with strategy.scope():
            model = MODELS[kind]()
        callbacks = [Kill(arguments.kill_at)]
        if "detector" in kind:
            check_classes_of_distributed_batches(model)
        else:
            callbacks.append(ResumeTraining(arguments.folder / "checkpoint"))
        worker = strategy.cluster_resolver.task_id
        np.savez(arguments.folder / f"{kind}_{worker}", **train(model, kind, callbacks))


if __name__ == "__main__":
    train_as_worker()
