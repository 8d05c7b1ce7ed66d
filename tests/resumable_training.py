"""Program of test_resume: trains a small detector, and kills itself if told to.

python tests/resumable_training.py FOLDER OUTPUT.npz --kill-at 7
"""

import argparse
import os
import signal

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


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("output")
    parser.add_argument("--kill-at", type=int, default=-1)
    parser.add_argument("--every-steps", type=int)
    parser.add_argument("--steps-per-execution", type=int, default=1)
    arguments = parser.parse_args()

    keras.utils.set_random_seed(3)
    tf.config.experimental.enable_op_determinism()
    images, truth = rectangles(10, SHAPE)
    data = tf.data.Dataset.from_tensor_slices(
        {"images": images, "bounding_boxes": truth, "image_id": [str(i) for i in range(10)]}
    )
    augmentation = TrainingAugmentation(SHAPE, flip=RandomFlip(), expand=None)
    batches = training_batches(data, SHAPE, 2, augmentation, seed=5)
    # The random numbers of DropBlock must be restored too.
    model = small_detector(SHAPE, backbone=small_backbone(dropblock_rate=0.2))
    model.compile(steps_per_execution=arguments.steps_per_execution)
    resume = ResumeTraining(arguments.folder, every_steps=arguments.every_steps)
    callbacks = [resume, Kill(arguments.kill_at)]
    history = model.fit(batches, epochs=EPOCHS, verbose=0, callbacks=callbacks)
    weights = {f"weight_{i}": w for i, w in enumerate(model.get_weights())}
    logs = {name: np.array(values) for name, values in history.history.items()}
    np.savez(arguments.output, **weights, **logs, first_epoch=resume.initial_epoch)


if __name__ == "__main__":
    main()
