"""`keras-resnest train --classifier` in one process, on two virtual devices.

Each device gets the images of one of two workers, so that batch statistics are the same too. The
weights before the training go to start.npz.
"""

import sys

import numpy as np
import tensorflow as tf

import keras_resnest as kr
from keras_resnest.cli import main, train_classifier

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
two = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"], tf.distribute.ReductionToOneDevice())


class Epochs:
    """Counts the epochs of the data of both workers."""

    def __init__(self, parts):
        self.counters = [part.epoch_counter for part in parts]

    def set_epoch(self, epoch):
        for counter in self.counters:
            counter.set_epoch(epoch)


def join(one, other):
    return tuple(tf.concat(pair, axis=0) for pair in zip(one, other, strict=True))


def global_batches(strategy, make_batches, batch_size):
    parts = [make_batches(2, worker, batch_size // 2) for worker in range(2)]
    batches = tf.data.Dataset.zip(*parts).map(join)
    batches.epoch_counter = Epochs(parts)
    return batches


class Training(train_classifier.Training):
    def fit(self, callbacks, verbose):
        np.savez(self.output / "start.npz", *self.model.get_weights())
        return super().fit(callbacks, verbose)


kr.training.create_strategy = lambda: two
kr.training.distribute_batches = global_batches
train_classifier.Training = Training
sys.exit(main(["train", "--classifier", *sys.argv[1:]]))
