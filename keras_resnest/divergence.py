"""Stops a training whose loss is no number any more, and says why."""

import collections
import os
from pathlib import Path

import keras
import numpy as np

from keras_resnest.replicas import is_chief

# No network of this package starts above this, whatever its first batch holds. A first loss
# below counts as this one, so that an easy first batch, or one without objects, sets no trap.
LEAST_FIRST_LOSS = 10.0
FLOAT32_ROUNDING = 2.0**-21  # of a sum and a quotient, with a margin


class TerminateOnDivergence(keras.callbacks.Callback):
    """Ends a training that cannot recover, with a sentence and the last finite weights.

    Keras' `TerminateOnNaN` stops too, but by then NaN is in every weight. The models of this
    package, on TensorFlow, replace a gradient that is not finite by zeros, so that their
    weights stay finite; `RefineDet.fit` adds this callback by itself. On JAX and PyTorch the
    training stops as well, but the weights may be lost: keep checkpoints.

    A loss that stays far above where it began is reported too: it will not come back. A short
    peak is left alone, since a training may recover from it.

    Args:
        filepath: where the last finite weights go, a `.weights.h5` file; None leaves them
            in the model.
        max_growth: the loss may be this many times that of the first step (of 10, where the
            first step had less); None never looks.
        patience: number of steps; the training ends when half of the last so many are above.

    Raises:
        FloatingPointError: out of `fit`; says which loss became what at which step, and
            what to change.

    Example:

    >>> guard = kr.callbacks.TerminateOnDivergence("runs/last_finite.weights.h5")
    >>> model.fit(train_ds, callbacks=[guard])
    """

    def __init__(
        self,
        filepath: str | os.PathLike | None = None,
        max_growth: float | None = 10.0,
        patience: int = 100,
    ):
        super().__init__()
        if filepath is not None and not str(filepath).endswith(".weights.h5"):
            raise ValueError(
                f"`filepath` must end with .weights.h5. Received: filepath={filepath!r}"
            )
        if max_growth is not None and max_growth <= 1:
            raise ValueError(f"`max_growth` must be above 1. Received: max_growth={max_growth}")
        if patience < 1:
            raise ValueError(f"`patience` must be at least 1. Received: patience={patience}")
        self.filepath = None if filepath is None else Path(filepath)
        self.max_growth = max_growth
        self.patience = int(patience)
        self.on_train_begin()

    def on_train_begin(self, logs=None):
        self._first = None
        self._recent = collections.deque(maxlen=self.patience)
        self.on_epoch_begin(0)

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        self._steps, self._sum = 0, 0.0

    def on_train_batch_end(self, batch, logs=None):
        losses = {
            name: float(keras.ops.convert_to_numpy(value))
            for name, value in (logs or {}).items()
            if name == "loss" or name.endswith("_loss")
        }
        where = f"at step {batch + 1} of epoch {self._epoch + 1}"
        if not all(np.isfinite(value) for value in losses.values()):
            self._stop(f"{_culprits(losses)} {where}")
        if "loss" in losses and self.max_growth is not None:
            self._check_growth(batch + 1, losses, where)

    def _check_growth(self, steps: int, losses: dict, where: str) -> None:
        # Keras logs the mean since the epoch began; the loss of the last steps is wanted.
        taken, total = max(steps - self._steps, 1), losses["loss"] * steps
        rounding = FLOAT32_ROUNDING * abs(total)  # after a wild batch it exceeds other losses
        loss = (total - self._sum - rounding) / taken
        self._steps, self._sum = steps, total
        if self._first is None:
            self._first = loss
        self._recent.extend([loss] * taken)
        limit = self.max_growth * max(self._first, LEAST_FIRST_LOSS)
        middle = float(np.median(self._recent))
        if len(self._recent) == self.patience and middle > limit:
            self._stop(
                f"`loss` has grown from {self._first:.4g} at the first step to {middle:.4g}, the "
                f"median of the last {self.patience} steps, {where}{_largest(losses)}"
            )

    def _stop(self, what: str):
        model = self.model
        advice = " ".join([f"Training stopped: {what}.", _advice(model), self._keep_weights(model)])
        raise FloatingPointError(advice)

    def _keep_weights(self, model) -> str:
        if not all(np.isfinite(value).all() for value in model.get_weights()):
            return "The weights are not finite either: go back to the last checkpoint."
        if self.filepath is None:
            return "The model holds the last finite weights."
        if is_chief(getattr(model, "distribute_strategy", None)):
            self.filepath.parent.mkdir(parents=True, exist_ok=True)
            model.save_weights(self.filepath)
        return f"The last finite weights are in {self.filepath}."


def _culprits(losses: dict) -> str:
    """The single losses that became NaN or infinite; the gradient, where only their sum did."""
    parts = {name: value for name, value in losses.items() if name != "loss"}
    faulty = {name: value for name, value in parts.items() if not np.isfinite(value)}
    if faulty:
        return ", ".join(f"`{name}` became {value}" for name, value in faulty.items())
    return f"`loss` or its gradient became NaN or infinite{_largest(losses)}"


def _largest(losses: dict) -> str:
    parts = {name: value for name, value in losses.items() if name != "loss"}
    if not parts:
        return ""
    name = max(parts, key=parts.get)
    return f" (its largest part is `{name}`, {parts[name]:.4g} in the mean of this epoch)"


def _advice(model) -> str:
    optimizer = model.optimizer
    inner = getattr(optimizer, "inner_optimizer", optimizer)  # under loss scaling
    rate = float(keras.ops.convert_to_numpy(inner.learning_rate))
    ways = ["a tenth of it", "a longer warm-up"]
    if not any((inner.clipnorm, inner.global_clipnorm, inner.clipvalue)):
        ways.append("clipped gradients (`global_clipnorm=10` of the optimizer)")
    if inner is not optimizer:
        ways.append('"mixed_bfloat16", whose numbers reach further, instead of "mixed_float16"')
    return f"The learning rate is {rate:.3g}: try {', '.join(ways[:-1])} or {ways[-1]}."
