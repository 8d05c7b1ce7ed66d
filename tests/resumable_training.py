"""Program of test_resume: trains a small detector and resumes a training that was killed.

    python tests/resumable_training.py FOLDER --kill-at 7
    python tests/resumable_training.py FOLDER

The first kills itself. The second writes FOLDER/resumed.npz, and FOLDER/uninterrupted.npz of the
same training from the start.
"""

import argparse
import os
import signal
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from detectors import rectangles, small_backbone, small_detector

from keras_resnest.data import RandomFlip, TrainingAugmentation, training_batches
from keras_resnest.training.callbacks import ResumeTraining

EPOCHS, SHAPE = 3, (64, 128, 3)


class Kill(keras.callbacks.Callback):
    """Sends SIGKILL, which allows no cleanup."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_train_batch_begin(self, batch, logs=None):
        if int(self.model.optimizer.iterations) == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder, arguments):
    keras.utils.set_random_seed(3)
    images, truth = rectangles(10, SHAPE)
    data = tf.data.Dataset.from_tensor_slices(
        {"images": images, "bounding_boxes": truth, "image_id": [str(i) for i in range(10)]}
    )
    augmentation = TrainingAugmentation(SHAPE, flip=RandomFlip(), expand=None)
    batches = training_batches(data, SHAPE, 2, augmentation, seed=5)
    # The random numbers of DropBlock must be restored too.
    model = small_detector(SHAPE, backbone=small_backbone(dropblock_rate=0.2))
    model.compile()
    resume = ResumeTraining(folder, every_steps=arguments.every_steps)
    callbacks = [resume, Kill(arguments.kill_at)]
    history = model.fit(batches, epochs=EPOCHS, verbose=0, callbacks=callbacks)
    weights = {f"weight_{i}": w for i, w in enumerate(model.get_weights())}
    logs = {name: np.array(values) for name, values in history.history.items()}
    return {**weights, **logs, "first_epoch": resume.initial_epoch}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill-at", type=int, default=-1)
    parser.add_argument("--every-steps", type=int)
    arguments = parser.parse_args()
    tf.config.experimental.enable_op_determinism()
    for name in ("resumed", "uninterrupted"):
        np.savez(arguments.folder / name, **train(arguments.folder / f"{name}_run", arguments))


if __name__ == "__main__":
    main()
