"""Checkpoints of a whole training, so that a killed one goes on where it was."""

import contextlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import keras
import numpy as np

from keras_resnest.replicas import is_chief, is_multi_worker, run_everywhere

STATE, ARRAYS = "state.json", "arrays.npz"
#: What callbacks such as ModelCheckpoint, EarlyStopping and ReduceLROnPlateau remember.
MEMORY = ("best", "wait", "best_epoch", "cooldown_counter", "history", "epoch")
KEPT = 2  # the one before the last stays, should the last be damaged


class ResumeTraining(keras.callbacks.Callback):
    """Saves the whole state of a training, and goes on from it after a crash.

    Start a killed program again with the same arguments: weights, optimizer, random numbers of
    layers, losses of the running epoch, history and the memory of `callbacks` come back, and
    training goes on with the next step. With the batches of `training_batches`, whose order
    depends on seed and epoch only, the result is the one of an uninterrupted run, on a CPU
    bit for bit (`tf.config.experimental.enable_op_determinism()`).

    Every checkpoint is written beside the last one and renamed when it is complete, so that a
    process killed while it writes leaves a usable one. A folder that cannot be written, and a
    disk without room for two checkpoints, are reported when training starts.

    Args:
        folder: where the checkpoints go. One training, one folder; on several machines one
            that all of them see.
        every_steps: also saves inside of epochs, every so many steps; None only at their end.
            TensorFlow only.
        callbacks: other callbacks of this training whose memory (best value so far,
            epochs waited) is saved too.
        metadata: what else tells this training from another, as JSON can hold it, for instance
            `{"class_names": [...]}` of a classifier. A detector's classes, image size and
            anchors are compared without it.

    Attributes:
        initial_epoch: epochs that are complete in `folder`, 0 for a new training.

    Raises:
        ValueError: if `folder` holds checkpoints of another model or `metadata`, or
            `every_steps` is no positive integer.
        OSError: at the start of training, if `folder` cannot be written or the disk is full.

    Example:

    >>> best = keras.callbacks.ModelCheckpoint("best.keras", "val_mAP50", mode="max")
    >>> resume = kr.callbacks.ResumeTraining("runs/checkpoint", callbacks=[best])
    >>> model.fit(batches, epochs=60, callbacks=[best, resume])
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        every_steps: int | None = None,
        callbacks: Sequence[keras.callbacks.Callback] = (),
        metadata: Mapping | None = None,
    ):
        super().__init__()
        if every_steps is not None and (int(every_steps) != every_steps or every_steps < 1):
            raise ValueError(
                f"`every_steps` must be a positive integer. Received: every_steps={every_steps}"
            )
        if every_steps is not None and keras.backend.backend() != "tensorflow":
            raise ValueError("`every_steps` needs the TensorFlow backend; leave it out.")
        self.folder = Path(folder)
        self.every_steps = every_steps
        self.callbacks = list(callbacks)
        self.metadata = json.loads(json.dumps(dict(metadata or {})))  # as it will be read
        found = _latest(self.folder)
        self.initial_epoch = found[1]["epoch"] if found else 0
        self._epoch = self._saved_step = 0
        self._restored_metrics, self._past_epochs = None, []

    # === Begin ===

    def on_train_begin(self, logs=None):
        if not self.model.optimizer.built:
            with _strategy_scope(self.model):
                self.model.optimizer.build(self.model.trainable_variables)
        self._writes = is_chief(_strategy(self.model))
        if self._writes:
            self._check_folder()
        found = _latest(self.folder)
        state = found[1] if found else {"epoch": 0, "step": 0}
        self._check_workers_agree(state)
        if found:
            self._restore(*found)

    def _check_folder(self) -> None:
        needed = KEPT * sum(4 * math.prod(v.shape) for v in _state_variables(self.model))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob("*.tmp"):
                shutil.rmtree(leftover)
            probe = self.folder / "probe.tmp"
            probe.write_bytes(b"x" * 1024)
            probe.unlink()
        except OSError as error:
            raise OSError(f"`folder` cannot be written: {self.folder} ({error})") from None
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(
                f"`folder` needs room for {KEPT} checkpoints, {needed / 2**20:.0f} MiB. "
                f"{self.folder} has {free / 2**20:.0f} MiB left"
            )

    def _check_workers_agree(self, state: dict) -> None:
        strategy = _strategy(self.model)
        if not is_multi_worker(strategy):
            return
        import tensorflow as tf

        here = tf.constant([[state["epoch"], state["step"]]])
        places = run_everywhere(strategy, lambda: tf.identity(here))
        everywhere = np.asarray(strategy.gather(places, axis=0))
        if (everywhere != everywhere[0]).any():
            raise ValueError(
                "`folder` must be one that all workers see. The workers found checkpoints of "
                f"different (epoch, step): {everywhere.tolist()} in {self.folder}"
            )

    def _restore(self, path: Path, state: dict) -> None:
        there, here = state["signature"], self._signature()
        if there != here:
            names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
            differences = "; ".join(
                f"{name}: {_short(there.get(name))}, here {_short(here.get(name))}"
                for name in names
            )
            raise ValueError(
                f"`folder` holds a checkpoint of another model. Its {differences}. "
                f"Take another folder, or remove {self.folder}"
            )
        with np.load(path / ARRAYS) as arrays:
            values = {name: arrays[name] for name in arrays.files}
        _assign(_state_variables(self.model), values, "state")
        self._restored_metrics = values
        self.model._initial_epoch = state["epoch"]
        self._saved_step = state["step"]
        for callback, memory in zip(
            [self.model.history, *self.callbacks], state["memory"], strict=False
        ):
            for name, value in memory.items():
                setattr(callback, name, value)
        self._past_epochs = state["memory"][0].get("epoch", [])

    def _complete_history(self) -> None:
        # History empties its list of epochs when training begins, after this callback.
        self.model.history.epoch[:0] = self._past_epochs
        self._past_epochs = []

    def on_train_end(self, logs=None):
        self._complete_history()

    def on_epoch_begin(self, epoch, logs=None):
        self._complete_history()
        self._epoch = epoch
        if self._restored_metrics is not None and self._saved_step:
            self._skip_steps(self._saved_step, self._restored_metrics)
        self._restored_metrics = None

    def _skip_steps(self, count: int, metrics: dict) -> None:
        """Reads the batches that were trained on already, without training."""
        model, train = self.model, self.model.train_function
        remaining = count

        def read(iterator):
            nonlocal remaining
            for _ in range(model.steps_per_execution):
                batch = next(iterator)
                if remaining == count:
                    # Metrics are built by a first batch; under a strategy they are already.
                    if getattr(model, "_distribute_strategy", None) is None:
                        model._symbolic_build(data_batch=batch)
                    _assign(model.metrics_variables, metrics, "metric")
                remaining -= 1
            if remaining <= 0:
                model.train_function = train
            return model.get_metrics_result()

        model.train_function = read

    # === Save ===

    def on_train_batch_end(self, batch, logs=None):
        step = batch + 1
        if self.every_steps and step - self._saved_step >= self.every_steps:
            self._save(self._epoch, step)
            self._saved_step = step

    def on_epoch_end(self, epoch, logs=None):
        self._saved_step = 0
        # History comes after the callbacks of the user: its row of this epoch is still missing.
        self._save(epoch + 1, 0, epoch, logs)

    def _save(self, epoch: int, step: int, finished: int | None = None, logs=None) -> None:
        # Metrics live on all workers: each must read, even though only the chief writes.
        groups = {"state": _state_variables(self.model), "metric": self.model.metrics_variables}
        values = {
            f"{group}_{i}": np.asarray(variable)
            for group, variables in groups.items()
            for i, variable in enumerate(variables)
        }
        if not self._writes:
            return
        path = self.folder / f"epoch_{epoch:06d}_step_{step:08d}"
        temporary = path.with_suffix(".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        np.savez(temporary / ARRAYS, **values)
        state = {
            "epoch": epoch,
            "step": step,
            "signature": self._signature(),
            "memory": [self._history(finished, logs), *map(_memory, self.callbacks)],
            "checksum": _checksum(temporary / ARRAYS),
        }
        (temporary / STATE).write_text(json.dumps(state))
        for name in (ARRAYS, STATE):
            _flush(temporary / name)
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
        for old in sorted(self.folder.glob("epoch_*"))[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def _signature(self) -> dict:
        return {**_signature(self.model), **self.metadata}

    def _history(self, finished: int | None, logs) -> dict:
        memory = _memory(self.model.history)
        if finished is None or finished in memory.get("epoch", []):
            return memory
        rows = {name: list(values) for name, values in memory.get("history", {}).items()}
        for name, value in (logs or {}).items():
            rows.setdefault(name, []).append(float(np.asarray(value)))
        return {"history": rows, "epoch": [*memory.get("epoch", []), finished]}


def _state_variables(model) -> list:
    """Weights, random numbers of layers (weights files lack them), and the optimizer's.

    Without metrics: those that `compile` was given do not exist before the first batch.
    """
    metrics = {id(variable) for variable in model.metrics_variables}
    found = {id(v): v for v in [*model.variables, *model.optimizer.variables]}
    return [variable for key, variable in found.items() if key not in metrics]


def _assign(variables: list, values: dict, group: str) -> None:
    for i, variable in enumerate(variables):
        variable.assign(values[f"{group}_{i}"])


def _strategy(model):
    return getattr(model, "distribute_strategy", None)


def _strategy_scope(model):
    strategy = _strategy(model)
    return strategy.scope() if strategy else contextlib.nullcontext()


def _signature(model) -> dict:
    """What tells one model and optimizer from another, as JSON holds it."""
    shapes = json.dumps([[w.name, list(w.shape)] for w in model.weights])
    signature = {
        "model": type(model).__name__,
        "parameters": model.count_params(),
        "weights": zlib.crc32(shapes.encode()),
        "optimizer": type(model.optimizer).__name__,
    }
    is_detector = hasattr(model, "training_config")
    signature |= model.training_config() if is_detector else {"input_shape": _input_shape(model)}
    return json.loads(json.dumps(signature))


def _input_shape(model):
    try:
        return model.input_shape
    except AttributeError:  # of a model that is not built of layers
        return None


def _short(value, length: int = 300) -> str:
    text = json.dumps(value)
    return text if len(text) <= length else f"{text[:length]}..."


def _memory(callback) -> dict:
    found = {name: getattr(callback, name) for name in MEMORY if hasattr(callback, name)}
    plain = {name: _plain(value) for name, value in found.items()}
    return {name: value for name, value in plain.items() if value is not None}


def _plain(value):
    """`value` as JSON has it, or None."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, bool | int | str):
        return value
    try:
        return float(np.asarray(value))
    except (TypeError, ValueError):
        return None


def _latest(folder: Path):
    """(path, state) of the newest checkpoint that is whole, or None."""
    for path in sorted(folder.glob("epoch_*_step_*"), reverse=True):
        if path.suffix == ".tmp":
            continue
        try:
            state = json.loads((path / STATE).read_text())
            if _checksum(path / ARRAYS) == state["checksum"]:
                return path, state
        except (OSError, ValueError, KeyError):
            pass
    return None


def _checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
