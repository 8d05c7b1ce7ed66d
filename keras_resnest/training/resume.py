"""Checkpoints of whole training runs, to resume after a crash."""

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

from keras_resnest.atomic import atomic_folder
from keras_resnest.checks import check_counts, checked
from keras_resnest.replicas import gather_over_replicas, is_chief
from keras_resnest.training.optimizers import inner_optimizer, restart_optimizer, shift_schedule

STATE, ARRAYS = "state.json", "arrays.npz"
#: Attributes that ModelCheckpoint, DetectionEvaluation, ReduceLROnPlateau and others need.
CALLBACK_ATTRIBUTES = ("best", "wait", "best_epoch", "cooldown_counter", "history", "epoch")
CALLBACK_ATTRIBUTES += ("stopped", "elapsed", "skipped")
MAX_CHECKPOINTS = 2  # the previous one is the fallback if the last is damaged
FILE_OVERHEAD = 300  # bytes of an array's headers in the file


@checked
class ResumeTraining(keras.callbacks.Callback):
    """Saves the whole state of a training run and resumes it.

    To resume after a crash, rerun the same program. Weights, optimizer, random seeds of layers,
    which layers are frozen, losses of the current epoch, history and the state of `callbacks` are
    restored, and training continues with the next step. With `training_batches`, whose order
    depends only on seed and epoch, the result equals that of an uninterrupted run; on a CPU bit for
    bit, with `tf.config.experimental.enable_op_determinism()`. Checkpoints are written atomically.

    What a checkpoint rests on must be the same on resuming: model, optimizer and its settings,
    steps per epoch, `metadata`, and of batches that `keras_resnest.data` makes, class names,
    number, names, boxes and labels of the images, batch size and seed. `epochs`, the learning rate
    and its schedule, other callbacks, folders and the number of devices may change.

    Put callbacks that write files for each epoch before this one: after a crash between the file
    and the checkpoint, the epoch is repeated and its file written again.

    Args:
        folder: folder of the checkpoints of one run; shared by all machines.
        every_steps: also save at this interval within epochs; TensorFlow only. By default only
            at the end of each epoch.
        callbacks: other callbacks whose state (best value, epochs waited, ...) is saved too.
        metadata: JSON-serializable values that must also match on resuming, for instance
            `{"augmentation": "ssd"}`.

    Attributes:
        initial_epoch: number of complete epochs in `folder`; 0 for a new training.
        rows: the logs of all epochs, also of those before resuming: `{"epoch": 0, "loss": ...}`.

    Raises:
        ValueError: if `folder` has checkpoints of another model or run, or of more epochs than
            `fit` has, or `every_steps` is not a positive integer.
        OSError: at the start of training, if `folder` is not writable or the disk is full; later,
            if `folder` was removed.

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
        check_counts(every_steps=every_steps)
        if every_steps is not None and keras.backend.backend() != "tensorflow":
            raise ValueError(
                "`every_steps` requires the TensorFlow backend. "
                f"Received: every_steps={every_steps} on {keras.backend.backend()}"
            )
        self.folder = Path(folder)
        self.every_steps = every_steps
        self.callbacks = list(callbacks)
        self.metadata = _to_json(dict(metadata or {}))
        found = _latest_checkpoint(self.folder)
        self.initial_epoch = found[1]["epoch"] if found else 0
        self.rows = []
        self._epoch = self._saved_step = 0
        self._restored_metrics, self._restored_callbacks = None, []

    # === Restore ===

    def on_train_begin(self, logs=None):
        strategy = _strategy(self.model)
        if not self.model.optimizer.built:
            with strategy.scope() if strategy else contextlib.nullcontext():
                self.model.optimizer.build(self.model.trainable_variables)
        self._is_chief = is_chief(strategy)
        self._signature = {**_signature(self.model), **self._run_facts()}
        if self._is_chief:
            self._prepare_folder()
        found = _latest_checkpoint(self.folder)
        self._check_workers_agree(found[1] if found else {"epoch": 0, "step": 0})
        if found:
            self._restore(*found)

    def _run_facts(self) -> dict:
        """What the run rests on beside the model and its optimizer."""
        params = self.params or {}
        steps = {
            "steps_per_epoch": params.get("steps"),
            "steps_per_execution": self.model.steps_per_execution,
        }
        return _to_json({**steps, **params.get("data", {}), **self.metadata})

    def _prepare_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".epoch_*"):
                shutil.rmtree(leftover)
            probe = self.folder / ".probe"
            probe.write_bytes(b"x" * 1024)
            probe.unlink()
        except OSError as error:
            raise OSError(f"`folder` cannot be written: {self.folder} ({error})") from None
        variables = [*_state_variables(self.model), *self.model.metrics_variables]
        for callback in self.callbacks:
            variables += self.model.weights * getattr(callback, "restore_best_weights", False)
        sizes = (math.prod(v.shape) * np.dtype(v.dtype).itemsize for v in variables)
        size = sum(number + FILE_OVERHEAD for number in sizes)
        held = sum(file.stat().st_size for file in self.folder.glob("epoch_*/*"))
        free, needed = shutil.disk_usage(self.folder).free, (MAX_CHECKPOINTS + 1) * size
        if free + held < needed:
            raise OSError(
                f"`folder` needs room for {MAX_CHECKPOINTS} checkpoints and the one that is being "
                f"written, {needed / 2**20:.1f} MiB, of which {held / 2**20:.1f} are there. "
                f"Received: {self.folder} with {free / 2**20:.1f} MiB left"
            )

    def _check_workers_agree(self, state: dict) -> None:
        gathered = gather_over_replicas(_strategy(self.model), [state["epoch"], state["step"]])
        if (gathered != gathered[0]).any():
            raise ValueError(
                "`folder` must be shared by all workers. Received: checkpoints of "
                f"different (epoch, step) {gathered.tolist()} in {self.folder}"
            )

    def _restore(self, path: Path, state: dict) -> None:
        saved, current = state["signature"], self._signature
        names = [name for name in {**saved, **current} if saved.get(name) != current.get(name)]
        if names:
            what = "run" if set(names) <= set(self._run_facts()) else "model"
            differences = "; ".join(
                f"{name}: {_shorten(saved.get(name))}, here {_shorten(current.get(name))}"
                for name in names
            )
            raise ValueError(
                f"`folder` has a checkpoint of another {what}. Its {differences}. "
                f"Use another folder, or remove {self.folder}"
            )
        epochs = (self.params or {}).get("epochs")
        if epochs is not None and epochs < state["epoch"] + bool(state["step"]):
            raise ValueError(
                f"`epochs` must be at least those of the checkpoint, {state['epoch']} and "
                f"{state['step']} steps. Received: epochs={epochs} and {self.folder}"
            )
        self._restore_training_state(state)
        with np.load(path / ARRAYS) as arrays:
            values = {name: arrays[name] for name in arrays.files}
        _assign(_state_variables(self.model), values, "state")
        self._restored_metrics = values
        # A training that a callback has stopped is complete.
        stopped = any(attributes.get("stopped") for attributes in state["callbacks"])
        self.model._initial_epoch = epochs if stopped else state["epoch"]
        self._saved_step = state["step"]
        self.rows = state["rows"]
        for i, attributes in enumerate(state["callbacks"]):
            weights = [values[name] for name in values if name.startswith(f"callback_{i}_")]
            if weights:
                attributes["best_weights"] = weights
        self._restored_callbacks = state["callbacks"]

    def _restore_training_state(self, state: dict) -> None:
        """Layers that were frozen or unfrozen during the training, and a moved schedule."""
        layers = self.model._flatten_layers(include_self=False)
        now = [layer.trainable for layer in layers]
        saved = state.get("trainable", now)  # unknown to earlier versions
        if saved != now:
            for layer, trainable in zip(layers, saved, strict=True):
                layer.trainable = trainable
            restart_optimizer(self.model)
        if state.get("shift"):
            shift_schedule(self.model, state["shift"])

    def _restore_callbacks(self) -> None:
        """Not before training has begun, when History and EarlyStopping clear their state."""
        self.model._initial_epoch = None  # `fit` has read it, and would read it next time too
        saved, self._restored_callbacks = self._restored_callbacks, []
        for callback in [self.model.history, *self.callbacks]:
            index = next((i for i, a in enumerate(saved) if a["kind"] == _kind(callback)), None)
            attributes = {} if index is None else saved.pop(index)
            for name in {"best_weights", *CALLBACK_ATTRIBUTES} & set(attributes):
                setattr(callback, name, attributes[name])

    def on_train_end(self, logs=None):
        if self._restored_callbacks:  # no epoch was left
            self._restore_callbacks()
            for callback in self.callbacks:  # those before this one ended without their state
                callback.on_train_end(logs)

    def on_epoch_begin(self, epoch, logs=None):
        self._restore_callbacks()
        self._epoch = epoch
        if self._restored_metrics is not None and self._saved_step:
            self._skip_steps(self._saved_step, self._restored_metrics)
        self._restored_metrics = None

    def _skip_steps(self, count: int, metrics: dict) -> None:
        """Reads the batches of the steps already done, without training."""
        model, train_function = self.model, self.model.train_function
        remaining = count

        def skip(iterator):
            nonlocal remaining
            for _ in range(model.steps_per_execution):
                batch = next(iterator, None)
                if batch is None:
                    if remaining >= model.steps_per_execution:
                        raise ValueError(
                            f"The checkpoint in {self.folder} rests on {count} batches of this "
                            f"epoch. Received: data with {count - remaining}"
                        )
                    remaining = 0  # the last execution of an epoch may be shorter
                    break
                if remaining == count:
                    # The first batch builds the metrics, except under a strategy.
                    if getattr(model, "_distribute_strategy", None) is None:
                        model._symbolic_build(data_batch=batch)
                    _assign(model.metrics_variables, metrics, "metric")
                remaining -= 1
            if remaining <= 0:
                model.train_function = train_function
            return model.get_metrics_result()

        model.train_function = skip

    # === Save ===

    def on_train_batch_end(self, batch, logs=None):
        step = batch + 1
        if self.every_steps and step - self._saved_step >= self.every_steps:
            self._save(self._epoch, step, _attributes(self.model.history))
            self._saved_step = step

    def on_epoch_end(self, epoch, logs=None):
        self._saved_step = 0
        numbers = {name: float(np.asarray(value)) for name, value in (logs or {}).items()}
        self.rows.append({"epoch": epoch, **numbers})
        self._save(epoch + 1, 0, self._history_after(epoch, logs or {}))

    def _history_after(self, epoch: int, logs: dict) -> dict:
        # History is called after the user's callbacks: it has no row of this epoch yet.
        attributes = _attributes(self.model.history)
        epochs = attributes.get("epoch", [])
        if epoch in epochs:
            return attributes
        columns = {name: list(values) for name, values in attributes.get("history", {}).items()}
        for name, value in logs.items():
            columns.setdefault(name, []).append(float(np.asarray(value)))
        return {"kind": attributes["kind"], "history": columns, "epoch": [*epochs, epoch]}

    def _save(self, epoch: int, step: int, history: dict) -> None:
        swaps = getattr(getattr(self.model, "_swaps", None), "callbacks", ())
        if any(swap._ema_weights_in_model for swap in swaps):
            raise ValueError(
                "`SwapEMAWeights` must come after `ResumeTraining`, which saves the weights of "
                "training. Received: averages"
            )
        # Metrics are distributed over the workers: all must read, though only the chief writes.
        groups = {"state": _state_variables(self.model), "metric": self.model.metrics_variables}
        values = {
            f"{group}_{i}": np.asarray(variable)
            for group, variables in groups.items()
            for i, variable in enumerate(variables)
        }
        if not self._is_chief:
            return
        for i, callback in enumerate(self.callbacks, 1):  # 0 is History
            for j, weights in enumerate(getattr(callback, "best_weights", None) or []):
                values[f"callback_{i}_{j}"] = weights
        if not self.folder.is_dir():
            raise OSError(f"`folder` was removed during the training: {self.folder}")
        path = self.folder / f"epoch_{epoch:06d}_step_{step:08d}"
        with atomic_folder(path, markers=(STATE, ARRAYS)) as folder:
            np.savez(folder / ARRAYS, **values)
            state = {
                "epoch": epoch,
                "step": step,
                "signature": self._signature,
                "rows": self.rows,
                "trainable": [v.trainable for v in self.model._flatten_layers(include_self=False)],
                "shift": int(getattr(inner_optimizer(self.model)._learning_rate, "shift", 0)),
                "callbacks": [history, *map(_attributes, self.callbacks)],
                "checksum": _checksum(folder / ARRAYS),
            }
            (folder / STATE).write_text(json.dumps(state))
            for name in (ARRAYS, STATE):
                _flush(folder / name)
        for old in sorted(self.folder.glob("epoch_*"))[:-MAX_CHECKPOINTS]:
            shutil.rmtree(old, ignore_errors=True)


def _state_variables(model) -> list:
    """Weights, random seeds of layers (which weights files lack) and optimizer variables.

    Without metrics: those of `compile` do not exist before the first batch.
    """
    metrics = {id(variable) for variable in model.metrics_variables}
    found = {id(v): v for v in [*model.variables, *model.optimizer.variables]}
    return [variable for key, variable in found.items() if key not in metrics]


def _assign(variables: list, values: dict, group: str) -> None:
    saved = [values.get(f"{group}_{i}", np.empty(0)) for i in range(len(variables))]
    if [a.shape for a in saved] != [tuple(v.shape) for v in variables]:
        raise ValueError(f"`folder` has a checkpoint of another {group}: compile as before")
    for variable, value in zip(variables, saved, strict=True):
        variable.assign(value)


def _strategy(model):
    return getattr(model, "distribute_strategy", None)


def _signature(model) -> dict:
    """Properties of model and optimizer that must match on resuming."""
    shapes = json.dumps([[w.name, list(w.shape)] for w in model.weights])
    settings = inner_optimizer(model).get_config()
    for name in ("name", "learning_rate"):  # a schedule depends on the number of epochs
        del settings[name]
    signature = {
        "model": type(model).__name__,
        "parameters": sum(math.prod(w.shape) for w in model.weights),
        "weights": zlib.crc32(shapes.encode()),
        "optimizer": type(model.optimizer).__name__,
        "optimizer_settings": settings,
    }
    is_detector = hasattr(model, "training_config")
    # Subclassed models have no `input_shape`.
    other = {"input_shape": getattr(model, "input_shape", None)}
    return _to_json({**signature, **(model.training_config() if is_detector else other)})


def _to_json(value):
    """`value` as JSON returns it, for instance with lists instead of tuples."""
    return json.loads(json.dumps(value))


def _shorten(value, length: int = 300) -> str:
    text = json.dumps(value)
    return text if len(text) <= length else f"{text[:length]}..."


def _kind(callback) -> str:
    return f"{type(callback).__name__} {getattr(callback, 'monitor', '')}"


def _attributes(callback) -> dict:
    """The state of a callback, as JSON-serializable values."""
    found = {n: _to_plain(getattr(callback, n, None)) for n in CALLBACK_ATTRIBUTES}
    return {"kind": _kind(callback)} | {k: v for k, v in found.items() if v is not None}


def _to_plain(value):
    """A JSON-serializable copy of `value`, or None."""
    if isinstance(value, dict):
        return {str(k): _to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(v) for v in value]
    if isinstance(value, bool | int | str):
        return value
    try:
        return float(np.asarray(value))
    except (TypeError, ValueError):
        return None


def _latest_checkpoint(folder: Path):
    """(path, state) of the newest intact checkpoint, or None."""
    for path in sorted(folder.glob("epoch_*_step_*"), reverse=True):
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
