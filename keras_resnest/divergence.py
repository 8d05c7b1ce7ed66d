"""Stop training when the loss becomes NaN or infinite, or grows far beyond its start."""

import collections
import os
import threading
from pathlib import Path

import keras
import numpy as np

from keras_resnest.atomic import atomic_file
from keras_resnest.checks import check_counts, check_positive, checked
from keras_resnest.replicas import is_chief

# Lower bound of the reference loss. Networks of this package start below it, so an easy first
# batch, for instance one without objects, does not set the limit too low.
MIN_FIRST_LOSS = 10.0
FLOAT32_ROUNDING = 2.0**-21  # relative error of a float32 sum and quotient, with a margin


@checked
class TerminateOnDivergence(keras.callbacks.Callback):
    """Stops training when the loss becomes NaN or infinite, or stays far above its start.

    On TensorFlow, the models of this package replace non-finite gradients by zeros, so the
    weights are still finite when training stops, unlike with `keras.callbacks.TerminateOnNaN`. On
    JAX and PyTorch the weights may be lost: save checkpoints. `RefineDet.fit` adds this callback.
    A short peak of the loss does not stop training.

    Args:
        filepath: `.weights.h5` file for the last finite weights. By default they only stay in
            the model.
        max_growth: limit of the loss, as a multiple of the first step's loss (at least 10).
            None disables this check.
        patience: number of steps whose median loss must exceed the limit.

    Raises:
        FloatingPointError: from `fit`; names the loss and the step, and suggests a remedy.

    Example:
        >>> guard = kr.callbacks.TerminateOnDivergence("runs/last_finite.weights.h5")
        >>> model.fit(train_ds, callbacks=[guard])
    """

    # On JAX and PyTorch Keras may call `on_train_batch_end` from other threads, out of order.
    async_safe = True

    def __init__(
        self,
        filepath: str | os.PathLike | None = None,
        max_growth: float | None = 10.0,
        patience: int = 100,
    ):
        super().__init__()
        if filepath is not None and not str(filepath).endswith(".weights.h5"):
            raise ValueError(f"`filepath` must end with .weights.h5. Received: {filepath!r}")
        check_counts(patience=patience)
        if max_growth is not None:
            check_positive(max_growth=max_growth)
            if max_growth <= 1:
                raise ValueError(f"`max_growth` must be above 1. Received: max_growth={max_growth}")
        self.filepath = None if filepath is None else Path(filepath)
        self.max_growth = max_growth
        self.patience = int(patience)
        self._lock = threading.Lock()
        self.on_train_begin()

    def on_train_begin(self, logs=None):
        self._first_loss = None
        self._recent_losses = collections.deque(maxlen=self.patience)
        self._failure = None  # (step, reason)
        self._training_thread = threading.get_ident()
        self.on_epoch_begin(0)

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        self._steps, self._loss_sum = 0, 0.0

    def on_train_batch_begin(self, batch, logs=None):
        self._raise_failure()

    def on_epoch_end(self, epoch, logs=None):
        self._raise_failure()

    def on_train_batch_end(self, batch, logs=None):
        losses = {
            name: float(value)
            for name, value in (logs or {}).items()
            if name == "loss" or name.endswith("_loss")
        }
        step = batch + 1
        with self._lock:
            reason = self._check(step, losses)
            if reason and (self._failure is None or step < self._failure[0]):
                self._failure = (step, reason)
        # Another thread must not touch the model: the next step may be running.
        if threading.get_ident() == self._training_thread:
            self._raise_failure()

    def _check(self, step: int, losses: dict) -> str | None:
        """Why training must stop, or None."""
        where = f"at step {step} of epoch {self._epoch + 1}"
        if not np.isfinite(list(losses.values())).all():
            return f"{_describe_nonfinite(losses)} {where}"
        # Steps may be reported out of order: a later running mean includes this step.
        if "loss" not in losses or self.max_growth is None or step <= self._steps:
            return None
        return self._check_growth(step, losses, where)

    def _check_growth(self, step: int, losses: dict, where: str) -> str | None:
        # Keras logs the mean since the start of the epoch; recover the loss of the last steps.
        num_steps, loss_sum = step - self._steps, losses["loss"] * step
        rounding = FLOAT32_ROUNDING * abs(loss_sum)  # large after a single huge batch
        loss = (loss_sum - self._loss_sum - rounding) / num_steps
        self._steps, self._loss_sum = step, loss_sum
        if self._first_loss is None:
            self._first_loss = loss
        self._recent_losses.extend([loss] * num_steps)
        limit = self.max_growth * max(self._first_loss, MIN_FIRST_LOSS)
        median = float(np.median(self._recent_losses))
        if len(self._recent_losses) < self.patience or median <= limit:
            return None
        return (
            f"`loss` has grown from {self._first_loss:.4g} at the first step to {median:.4g}, the "
            f"median of the last {self.patience} steps, {where}{_describe_largest(losses)}"
        )

    def _raise_failure(self) -> None:
        if self._failure is not None:
            (_, reason), model = self._failure, self.model
            advice, weights = _advice(model.optimizer), self._save_weights(model)
            raise FloatingPointError(f"Training stopped: {reason}. {advice} {weights}")

    def _save_weights(self, model) -> str:
        if not all(np.isfinite(value).all() for value in model.get_weights()):
            return "The weights are not finite either: go back to the last checkpoint."
        if self.filepath is None:
            return "The model holds the last finite weights."
        if is_chief(getattr(model, "distribute_strategy", None)):
            self.filepath.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self.filepath) as file:
                model.save_weights(file)
        return f"The last finite weights are in {self.filepath}."


def _describe_nonfinite(losses: dict) -> str:
    """Names the losses that are NaN or infinite; the gradient if only their sum is."""
    parts = {name: value for name, value in losses.items() if name != "loss"}
    nonfinite = {name: value for name, value in parts.items() if not np.isfinite(value)}
    if nonfinite:
        return ", ".join(f"`{name}` became {value}" for name, value in nonfinite.items())
    return f"`loss` or its gradient became NaN or infinite{_describe_largest(losses)}"


def _describe_largest(losses: dict) -> str:
    parts = {name: value for name, value in losses.items() if name != "loss"}
    if not parts:
        return ""
    name = max(parts, key=parts.get)
    return f" (its largest part is `{name}`, with a mean of {parts[name]:.4g} in this epoch)"


def _advice(optimizer) -> str:
    inner = getattr(optimizer, "inner_optimizer", optimizer)  # under loss scaling
    rate = float(keras.ops.convert_to_numpy(inner.learning_rate))
    remedies = ["a tenth of it", "a longer warm-up"]
    if not any((inner.clipnorm, inner.global_clipnorm, inner.clipvalue)):
        remedies.append("gradient clipping (`global_clipnorm=10` of the optimizer)")
    if inner is not optimizer:
        remedies.append('"mixed_bfloat16", which has a larger range than "mixed_float16"')
    return f"The learning rate is {rate:.3g}: try {', '.join(remedies[:-1])} or {remedies[-1]}."
