"""Callbacks that change the course of a training: unfreezing, a limit of its time."""

import time

import keras

from keras_resnest.checks import check_counts, check_positive
from keras_resnest.replicas import gather_over_replicas, is_multi_worker
from keras_resnest.training.optimizers import (
    ShiftedSchedule,
    inner_optimizer,
    number_in,
    restart_optimizer,
    shift_schedule,
)


class UnfreezeStages(keras.callbacks.Callback):
    """Trains the frozen stages of a `RefineDet` too, after some epochs.

    The optimizer starts anew, without moments and averages; its learning rate goes on.

    Args:
        after: number of epochs with frozen stages.

    Example:
        >>> model.freeze_stages(2)
        >>> model.compile(recipe.optimizer())
        >>> model.fit(train_ds, epochs=30, callbacks=[kr.callbacks.UnfreezeStages(after=5)])
    """

    def __init__(self, after: int):
        super().__init__()
        check_counts(after=after)
        self.after = int(after)

    def on_epoch_begin(self, epoch, logs=None):
        if epoch < self.after:
            return
        before = len(self.model.trainable_weights)
        self.model.freeze_stages(None)
        if len(self.model.trainable_weights) > before:
            restart_optimizer(self.model)


class TimeLimit(keras.callbacks.Callback):
    """Shortens a training so that it ends within a time, with the end of its schedule.

    After each epoch, it counts the epochs that still fit. If they are fewer than planned, the
    schedule of the learning rate goes on faster. Put it after callbacks that take time, and before
    `ResumeTraining`.

    Args:
        minutes: from the beginning of `fit`; with `ResumeTraining(callbacks=[limit])`, over all
            runs.

    Attributes:
        elapsed: seconds of the complete epochs.
        skipped: steps of the schedule that were left out.
        stopped: whether the training has ended before its last epoch.

    Example:
        >>> limit = kr.callbacks.TimeLimit(minutes=30)
        >>> model.fit(train_ds, epochs=100, callbacks=[evaluation, limit])
    """

    def __init__(self, minutes: float):
        super().__init__()
        check_positive(minutes=minutes)
        if keras.backend.backend() != "tensorflow":
            raise ValueError(f"`TimeLimit` requires TensorFlow, not {keras.backend.backend()}")
        self.minutes = minutes
        self.elapsed, self.skipped, self.stopped = 0.0, 0, False

    def on_train_begin(self, logs=None):
        self.elapsed, self.skipped, self.stopped = 0.0, 0, False
        self._epoch_begin = self._second_step = None
        self._mark, self._longest = time.monotonic(), 0.0
        if not isinstance(inner_optimizer(self.model)._learning_rate, ShiftedSchedule):
            shift_schedule(self.model, 0)

    def on_epoch_begin(self, epoch, logs=None):
        self._step = number_in(inner_optimizer(self.model).iterations)

    def on_train_batch_end(self, batch, logs=None):
        now = time.monotonic()
        self._second_step = self._second_step or now  # the first one compiles
        workers = is_multi_worker(getattr(self.model, "distribute_strategy", None))
        if not workers and self.elapsed + now - self._mark > 60 * self.minutes:
            self.stopped = self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        now = time.monotonic()
        times = [self.elapsed + now - self._mark, now - (self._epoch_begin or self._second_step)]
        strategy = getattr(self.model, "distribute_strategy", None)
        # All workers must stop together.
        self.elapsed, seconds = gather_over_replicas(strategy, times).max(axis=0).tolist()
        self._mark = self._epoch_begin = now
        self._longest = max(self._longest, seconds)
        self._plan(self.params["epochs"] - (epoch + 1))

    def _plan(self, epochs: int) -> None:
        """Makes the schedule end with the last epoch that fits, of so many that are planned."""
        optimizer = inner_optimizer(self.model)
        steps = number_in(optimizer.iterations) - self._step  # of an epoch
        if not epochs or not steps:
            return
        left = epochs - self.skipped / steps  # epochs of the schedule
        fitting = int((60 * self.minutes - self.elapsed) / self._longest)
        count = min(fitting, round(left))
        if count < 1:
            self.stopped = self.model.stop_training = True
        elif count < epochs and isinstance(optimizer._learning_rate, ShiftedSchedule):
            jump = round(left * steps / count) - steps
            self.skipped += jump
            shift_schedule(self.model, number_in(optimizer._learning_rate.shift) + jump)
