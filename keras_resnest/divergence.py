"""Stops a training whose loss is no number any more, and says why."""

import os
from pathlib import Path

import keras
import numpy as np

from keras_resnest.distribution import is_chief


class TerminateOnDivergence(keras.callbacks.Callback):
    """Ends a training that cannot recover, with a sentence and the last finite weights.

    Keras' `TerminateOnNaN` stops too, but by then NaN is in every weight. `RefineDet` on
    TensorFlow drops a gradient that is not finite, so that the weights stay as they were
    before it; `fit` adds this callback by itself. A loss that grows far beyond where it
    began is reported as well: it will not come back.

    Args:
        filepath: where the last finite weights go, a `.weights.h5` file; None leaves them
            in the model.
        max_growth: the mean loss of an epoch may be this many times that of the first
            steps; None never looks.
        first_steps: steps whose mean loss stands for the beginning.

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
        first_steps: int = 20,
    ):
        super().__init__()
        if filepath is not None and not str(filepath).endswith(".weights.h5"):
            raise ValueError(
                f"`filepath` must end with .weights.h5. Received: filepath={filepath!r}"
            )
        if max_growth is not None and max_growth <= 1:
            raise ValueError(f"`max_growth` must be above 1. Received: max_growth={max_growth}")
        self.filepath = None if filepath is None else Path(filepath)
        self.max_growth = max_growth
        self.first_steps = first_steps
        self._beginning = None
        self._epoch = 0

    def on_train_begin(self, logs=None):
        self._beginning = None

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        values = {name: float(np.asarray(value)) for name, value in (logs or {}).items()}
        faulty = {name: value for name, value in values.items() if not np.isfinite(value)}
        if faulty:
            self._stop(f"{_culprits(faulty)} at step {batch + 1} of epoch {self._epoch + 1}")
        if self._beginning is None and batch + 1 >= self.first_steps:
            self._beginning = values.get("loss")

    def on_epoch_end(self, epoch, logs=None):
        loss = (logs or {}).get("loss")
        if loss is None or self.max_growth is None:
            return
        if self._beginning is None:  # fewer steps in an epoch
            self._beginning = loss
        elif loss > self.max_growth * max(self._beginning, 1e-6):
            self._stop(
                f"`loss` has grown from {self._beginning:.4g} in the first steps to {loss:.4g} "
                f"in epoch {epoch + 1}"
            )

    def _stop(self, what: str):
        rate = _learning_rate(self.model.optimizer)
        advice = (
            f"The learning rate is {rate:.3g}: try a tenth of it, a longer warm-up, or clip "
            "gradients (`global_clipnorm=10` of the optimizer)."
        )
        raise FloatingPointError(f"Training stopped: {what}. {advice} {self._keep_weights()}")

    def _keep_weights(self) -> str:
        if not all(np.isfinite(np.asarray(v)).all() for v in self.model.get_weights()):
            return "The weights are not finite either: go back to the last checkpoint."
        if self.filepath is None:
            return "The model holds the last finite weights."
        if is_chief(getattr(self.model, "distribute_strategy", None)):
            self.filepath.parent.mkdir(parents=True, exist_ok=True)
            self.model.save_weights(self.filepath)
        return f"The last finite weights are in {self.filepath}."


def _culprits(faulty: dict) -> str:
    """The single losses that became NaN or infinite; the gradient, where only their sum did."""
    parts = {name: value for name, value in faulty.items() if name != "loss"}
    if not parts:
        return "the loss or its gradient became nan or infinite"
    return ", ".join(f"`{name}` became {value}" for name, value in parts.items())


def _learning_rate(optimizer) -> float:
    inner = getattr(optimizer, "inner_optimizer", optimizer)  # under loss scaling
    return float(np.asarray(inner.learning_rate))
