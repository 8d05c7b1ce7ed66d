"""Program of test_distribution: five SGD steps on fixed batches, weights to a file.

    python tests/distributed_training.py OUTPUT --model detector --batch-norm frozen --replicas 2

With TF_CONFIG set, it is one of several workers.
"""

import argparse
import os
import signal

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from detectors import CLASS_NAMES, rectangles, small_detector

from keras_resnest.backbones import ResNet
from keras_resnest.layers.normalization import set_batch_norm
from keras_resnest.training.callbacks import ResumeTraining
from keras_resnest.training.strategies import distribute_batches

STEPS, GLOBAL_BATCH, SHAPE = 5, 4, (64, 128, 3)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output")
    parser.add_argument("--model", choices=("detector", "classifier"), default="detector")
    parser.add_argument("--batch-norm", choices=("frozen", "synchronized"), default="frozen")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--checkpoint", help="folder of ResumeTraining")
    parser.add_argument("--kill-at", type=int, default=-1, help="step at which worker 1 dies")
    return parser.parse_args()


def detector(batch_norm: str):
    option = {"frozen": "freeze_batch_norm", "synchronized": "synchronized_batch_norm"}
    model = small_detector(image_shape=SHAPE, **{option[batch_norm]: True})
    model.compile(keras.optimizers.SGD(1e-3, momentum=0.9, global_clipnorm=10.0))
    return model


def classifier(batch_norm: str):
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
    set_batch_norm(model, freeze=batch_norm == "frozen", synchronized=batch_norm != "frozen")
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def batches(kind: str):
    """The second half of every batch, which the last replicas get, has no objects."""
    images, truth = rectangles(STEPS * GLOBAL_BATCH, SHAPE, objects=2)
    if kind == "classifier":
        return tf.data.Dataset.from_tensor_slices((images, truth["labels"][:, 0])).batch(
            GLOBAL_BATCH, drop_remainder=True
        )
    empty = np.arange(len(images)) % GLOBAL_BATCH >= GLOBAL_BATCH // 2
    truth["labels"][empty] = -1
    return tf.data.Dataset.from_tensor_slices((images, truth)).batch(
        GLOBAL_BATCH, drop_remainder=True
    )


def check_classes_of_distributed_batches(model):
    """`distribute_batches` keeps the class names of the data, so `fit` compares them."""

    def make_batches(num_workers, worker, batch_size):
        data = batches("detector").unbatch().shard(num_workers, worker)
        data = data.batch(batch_size, drop_remainder=True)
        data.class_names = [*CLASS_NAMES[1:], "black"]
        return data

    data = distribute_batches(model.distribute_strategy, make_batches, GLOBAL_BATCH)
    try:
        model.fit(data, verbose=0)
    except ValueError as error:
        assert "same classes" in str(error), error
    else:
        raise AssertionError("fit accepted data of other classes")


class Kill(keras.callbacks.Callback):
    """Sends SIGKILL to the second worker at a step."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_train_batch_begin(self, batch, logs=None):
        is_second = '"index": 1' in os.environ.get("TF_CONFIG", "")
        if is_second and int(np.asarray(self.model.optimizer.iterations)) == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(arguments, strategy) -> dict:
    with strategy.scope():
        model = {"detector": detector, "classifier": classifier}[arguments.model](
            arguments.batch_norm
        )
    if arguments.model == "detector" and "TF_CONFIG" in os.environ:
        check_classes_of_distributed_batches(model)
    callbacks = [Kill(arguments.kill_at)]
    if arguments.checkpoint:
        callbacks.append(ResumeTraining(arguments.checkpoint))
    data = batches(arguments.model)
    history = model.fit(data, epochs=arguments.epochs, verbose=0, callbacks=callbacks)
    weights = {f"weight_{i}": np.asarray(w) for i, w in enumerate(model.get_weights())}
    return {**weights, **{k: np.asarray(v) for k, v in history.history.items()}}


def main():
    arguments = parse_arguments()
    if "TF_CONFIG" in os.environ:
        result = train(arguments, tf.distribute.MultiWorkerMirroredStrategy())
        np.savez(arguments.output, **result)
        return
    cpu = tf.config.list_physical_devices("CPU")[0]
    count = max(arguments.replicas)
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration() for _ in range(count)]
    )
    devices = tf.config.list_logical_devices("CPU")
    for replicas in arguments.replicas:
        strategy = tf.distribute.get_strategy()
        if replicas > 1:
            strategy = tf.distribute.MirroredStrategy(
                [device.name for device in devices[:replicas]],
                tf.distribute.ReductionToOneDevice(),
            )
        np.savez(f"{arguments.output}_{replicas}", **train(arguments, strategy))


if __name__ == "__main__":
    main()
