"""Distributed training with `tf.distribute`, beyond what Keras offers.

On a single device, the only change is that non-finite gradients become zeros.
"""

import contextlib
import functools
import inspect
import os
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace

import keras
import numpy as np

from keras_resnest.checks import (
    check_counts,
    check_finite_weights,
    check_fractions,
    check_layers_of_file,
    checked,
    one_line,
    value_errors,
)
from keras_resnest.replicas import call_with_rows, is_multi_worker, num_replicas, sum_over_replicas

# The hints that Keras' methods lack.
_COUNTS = ("batch_size", "steps", "steps_per_epoch", "validation_batch_size", "validation_steps")
_HINTS = {**dict.fromkeys(_COUNTS, int | None), "epochs": int, "initial_epoch": int}
_HINTS |= {
    "validation_split": float | None,
    "validation_freq": int | Sequence[int],
    "class_weight": Mapping | None,
}
_HINTS |= {"shuffle": bool | str, "verbose": bool | int | str}
_CALLBACK = keras.callbacks.Callback
_HINTS["callbacks"] = _CALLBACK | Sequence[_CALLBACK] | None


def same_arguments_as(method):
    """Decorates an override of a Keras method so that it takes the same arguments.

    The override receives all passed arguments by keyword, of the kinds of `_HINTS`. `help` shows
    Keras' signature, and its docstring unless the override has one.

    Args:
        method: the method of `keras.Model`.

    Example:
        >>> @same_arguments_as(keras.Model.fit)
        ... def fit(self, x=None, callbacks=None, **kwargs):
        ...     return super().fit(x, callbacks=[*callbacks, guard], **kwargs)
    """
    signature = inspect.signature(method)
    parameters = signature.parameters.values()
    hinted = [p.replace(annotation=_HINTS.get(p.name, p.annotation)) for p in parameters]

    def decorate(override):
        @functools.wraps(override if override.__doc__ else method)
        def wrapper(*args, **kwargs):
            arguments = signature.bind(*args, **kwargs).arguments
            extra = arguments.pop("kwargs", {})
            check_counts(**{n: v for n, v in arguments.items() if n in _COUNTS and v is not None})
            check_fractions(validation_split=arguments.get("validation_split") or 0.0)
            return override(**arguments, **extra)

        wrapper.__signature__ = signature.replace(parameters=hinted)
        wrapper = checked(wrapper)
        wrapper.__signature__ = signature
        return wrapper

    return decorate


class DistributedTraining:
    """Mix-in for a `keras.Model` that trains on many devices as on one.

    With TensorFlow, it changes Keras 3.15 as follows:

    - Gradients are clipped after they are summed over the replicas. Keras clips those of each
      replica, so the step depends on the number of replicas.
    - If a gradient or its norm is not finite, all gradients become zeros and the `loss` becomes
      NaN; see `TerminateOnDivergence`. Loss scaling skips such steps itself and stays unchanged.
    - `fit` and `evaluate` run under `tf.distribute.MultiWorkerMirroredStrategy` (Keras issue
      20585). Keras reduces a whole batch over the workers to learn its shapes, and averages over
      axis 0 of logs that have no axis. Here shapes come from the dataset's element spec, and
      logs get an axis.
    - `fit` leaves out the images at the end of a batch that the replicas cannot share evenly.
    - `load_weights` loads all weights or, with a `ValueError` that names the file, none: no layer
      may be missing or left over (except with `skip_mismatch=True`), no weight NaN.
    - In `evaluate` and `predict`, replicas may receive no rows of a small last batch. TensorFlow's
      oneDNN convolution returns a wrong shape for an empty batch, and its mean loss is NaN.

    With an optimizer that averages the weights (`use_ema`), on every backend, the moving statistics
    of batch normalization are averages over the same steps: those of Keras belong to the last
    weights.

    Example:
        >>> class Model(DistributedTraining, keras.Model):
        ...     pass
    """

    _swaps = None

    def __new__(cls, *args, **kwargs):
        check_not_forked()
        return super().__new__(cls, *args, **kwargs)

    def __call__(self, *args, **kwargs):
        """Runs the network; see `call`."""
        check_not_forked()
        return super().__call__(*args, **kwargs)

    @same_arguments_as(keras.Model.fit)
    def fit(self, x=None, batch_size=None, callbacks=None, **kwargs):
        check_not_forked()
        _check_rows(x=x, **kwargs)
        strategy = getattr(self, "_distribute_strategy", None)
        given = keras.tree.flatten(getattr(callbacks, "callbacks", callbacks) or [])
        swaps = [each for each in given if isinstance(each, keras.callbacks.SwapEMAWeights)]
        self._swaps = SimpleNamespace(callbacks=swaps)  # Keras would track a list
        own_data = x
        if strategy is not None and strategy.num_replicas_in_sync > 1:
            x, kwargs = _leave_out_rest(x, kwargs, batch_size, strategy.num_replicas_in_sync)
        if hasattr(own_data, "epoch_counter"):  # of `keras_resnest.data.training_batches`
            callbacks = [_TrainingData(own_data), *keras.tree.flatten(callbacks or [])]
        if hasattr(x, "element_spec"):
            kwargs["shuffle"] = False  # Keras cannot shuffle a tf.data.Dataset, and warns
        with warnings.catch_warnings(), value_errors(), report_lost_workers(strategy):
            if x is not own_data and kwargs.get("steps_per_epoch") is None:
                # Keras says so at the end of every dataset that does not know its length.
                warnings.filterwarnings("ignore", "Your input ran out of data")
            return super().fit(x, batch_size=batch_size, callbacks=callbacks, **kwargs)

    @same_arguments_as(keras.Model.evaluate)
    def evaluate(self, x=None, **kwargs):
        check_not_forked()
        _check_rows(x=x, **kwargs)
        with value_errors(), report_lost_workers(getattr(self, "_distribute_strategy", None)):
            return super().evaluate(x, **kwargs)

    @same_arguments_as(keras.Model.predict)
    def predict(self, x, **kwargs):
        check_not_forked()
        _check_rows(x=x)
        with value_errors(), report_lost_workers(getattr(self, "_distribute_strategy", None)):
            return super().predict(x, **kwargs)

    @same_arguments_as(keras.Model.predict_on_batch)
    def predict_on_batch(self, x):
        check_not_forked()
        return super().predict_on_batch(x)

    @same_arguments_as(keras.Model.load_weights)
    def load_weights(self, filepath, **kwargs):
        before = self.get_weights()
        try:
            super().load_weights(filepath, **kwargs)
            if not kwargs and str(filepath).endswith((".weights.h5", ".keras")):
                check_layers_of_file(self, filepath)
            check_finite_weights(self)
        except Exception as error:  # each kind of damage raises another type
            self.set_weights(before)
            raise ValueError(f"{filepath} cannot be loaded: {one_line(error)}") from error

    def train_step(self, *args):
        """Runs one step; the batch is the last argument on every backend."""
        if keras.backend.backend() != "tensorflow":
            return super().train_step(*args)
        return self._add_worker_axis(self._tensorflow_step(*args))

    def _gradients(self, x, y, sample_weight) -> tuple:
        """Gradients of the scaled loss, the loss and the predictions of a batch."""
        import tensorflow as tf

        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self._compute_loss(x, y, y_pred, sample_weight, training=True)
            scaled = self.optimizer.scale_loss(loss)
        return tape.gradient(scaled, self.trainable_weights), loss, y_pred

    def _tensorflow_step(self, data):
        import tensorflow as tf

        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        gradients, loss, y_pred = self._gradients(x, y, sample_weight)
        gradients = _clip_summed_gradients(gradients, self.optimizer)
        gradients, loss = _zero_nonfinite_gradients(gradients, loss, self.optimizer)
        batch = tf.shape(keras.tree.flatten(x)[0])[0]
        self._loss_tracker.update_state(loss * num_replicas(), sample_weight=batch)
        if self.trainable_weights:
            self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def test_step(self, *args):
        if num_replicas() == 1:
            return super().test_step(*args)
        return self._add_worker_axis(self._replica_test_step(*args))

    def _replica_test_step(self, data):
        import tensorflow as tf

        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        y_pred = call_with_rows(functools.partial(self, training=False), x)
        loss = self._compute_loss(x, y, y_pred, sample_weight, training=False)
        batch = tf.shape(keras.tree.flatten(x)[0])[0]
        loss = tf.where(batch > 0, loss, tf.zeros_like(loss))
        self._loss_tracker.update_state(loss * num_replicas(), sample_weight=batch)
        return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def predict_step(self, *args):
        """Runs one step, also on a replica without rows."""
        if num_replicas() == 1:
            return super().predict_step(*args)
        x, *_ = keras.utils.unpack_x_y_sample_weight(args[-1])
        return call_with_rows(functools.partial(self, training=False), x)

    def make_train_function(self, force=False):
        """As in Keras, but TensorFlow traces a step twice if the first trace creates variables."""
        self._average_statistics()
        self._check_trainable()
        if self.optimizer is not None and not self.optimizer.built and self.built:
            self.optimizer.build(self.trainable_variables)
        return super().make_train_function(force)

    def _check_trainable(self) -> None:
        """Keras' optimizers only know the variables they were built for, in their order."""
        optimizer = getattr(self.optimizer, "inner_optimizer", self.optimizer)
        if getattr(optimizer, "built", False):
            known = {id(variable) for variable in optimizer._trainable_variables}
            if known != {id(variable) for variable in self.trainable_variables}:
                raise ValueError(
                    "Other layers are trainable than when the optimizer was built: call `compile` "
                    f"again. Received: {len(self.trainable_variables)} trainable weights, of which "
                    f"the optimizer knows {len(known)}"
                )

    def _average_statistics(self) -> None:
        """Batch normalization averages its statistics over the steps that the optimizer does."""
        optimizer = getattr(self.optimizer, "inner_optimizer", self.optimizer)
        momentum = optimizer.ema_momentum if getattr(optimizer, "use_ema", False) else 0.0
        for layer in self._flatten_layers():
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.ema_momentum = momentum

    @contextlib.contextmanager
    def averaged_weights(self):
        """Puts the averages of an optimizer with `use_ema` in place of the weights, as `fit` ends.

        Without averages, or where `SwapEMAWeights` has put them there, it changes nothing.

        Example:
            >>> with model.averaged_weights():
            ...     model.save("averaged.keras")
        """
        optimizer = getattr(self.optimizer, "inner_optimizer", self.optimizer)
        averages = getattr(optimizer, "_model_variables_moving_average", [])
        if any(swap._ema_weights_in_model for swap in getattr(self._swaps, "callbacks", ())):
            averages = []
        variables = optimizer._trainable_variables if averages else []
        weights = [np.asarray(variable) for variable in variables]
        try:
            for variable, average in zip(variables, averages, strict=True):
                variable.assign(average)
            yield
        finally:
            for variable, value in zip(variables, weights, strict=True):
                variable.assign(value)

    @staticmethod
    def _add_worker_axis(logs):
        """Adds the axis over which Keras averages the logs of all workers."""
        if not is_multi_worker():
            return logs
        return keras.tree.map_structure(lambda value: value[None], logs)

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        """Builds from the element spec, without drawing a batch."""
        if getattr(self, "_distribute_strategy", None) is None:
            return super()._maybe_symbolic_build(iterator, data_batch)
        if iterator is not None:
            spec = iterator.data_adapter.get_tf_dataset().element_spec
            # A distributed dataset has one spec per replica: take the first.
            data_batch = keras.tree.map_structure(
                lambda part: getattr(part, "_value_specs", (part,))[0], spec
            )
        return super()._maybe_symbolic_build(data_batch=data_batch)


_process = None  # that built the first model


def check_not_forked() -> None:
    """Raises `RuntimeError` where TensorFlow would wait forever for threads that a fork loses."""
    global _process
    _process = _process or os.getpid()
    if _process != os.getpid() and keras.backend.backend() == "tensorflow":
        raise RuntimeError(
            "A forked process cannot use TensorFlow after its parent has built a model. Start "
            'processes with multiprocessing.get_context("spawn"), or build models only after the '
            f"fork. Received: process {os.getpid()}, forked from {_process}"
        )


@checked
def check_global_batch(sizes: Iterable[int | None], replicas: int) -> None:
    """Checks that the replicas can share every batch evenly.

    Args:
        sizes: batch sizes; None if unknown.
        replicas: number of replicas, `strategy.num_replicas_in_sync`.

    Raises:
        ValueError: if a size is unknown or not a multiple of `replicas`.

    Example:
        >>> check_global_batch({32}, strategy.num_replicas_in_sync)
    """
    check_counts(replicas=replicas)
    if replicas == 1:
        return
    if None in sizes:
        raise ValueError(
            f"The {replicas} replicas must share every batch evenly, but the batch size is not "
            "known beforehand. Pass arrays or a tf.data.Dataset"
        )
    uneven = [size for size in sizes if size % replicas]
    if uneven:
        raise ValueError(
            f"The global batch must be a multiple of the {replicas} replicas that share it. "
            f"Received: a batch of {uneven[0]}"
        )


def batch_size_of(dataset) -> int | None:
    """Batch size of a `tf.data.Dataset`; None if the last batch may be smaller."""
    return keras.tree.flatten(dataset.element_spec)[0].shape[0]


def _leave_out_rest(x, others: dict, batch_size: int | None, replicas: int) -> tuple:
    """Returns the data of `fit` without the rows that the replicas cannot share, and says so.

    Args:
        x: the argument of `fit`.
        others: its keyword arguments, of which `y` and `sample_weight` may change.
        batch_size: its argument.
        replicas: number of replicas, more than one.

    Raises:
        ValueError: if the batch size is unknown, or not a multiple of `replicas`.
    """
    if isinstance(x, keras.utils.PyDataset):
        shared = _SharedBatches(x, replicas)
        check_global_batch(shared.whole_sizes, replicas)
        uneven = shared.last_size % replicas
        x = shared if uneven else x
    elif hasattr(x, "element_spec"):
        import tensorflow as tf

        # A distributed dataset was checked by `distribute_batches`.
        size = batch_size_of(x) if isinstance(x, tf.data.Dataset) else 0
        uneven = size is None
        if uneven:
            x = x.map(lambda *batch: _evenly_shared(batch, replicas), tf.data.AUTOTUNE)
        else:
            check_global_batch({size}, replicas)
    else:
        arrays = x, others.get("y"), others.get("sample_weight")
        if not any(hasattr(leaf, "shape") for leaf in keras.tree.flatten(x)):
            check_global_batch({None}, replicas)
        total, batch_size = _num_rows(x), batch_size or 32  # as Keras
        trained = 1.0 - (others.get("validation_split") or 0.0)
        rows = next(
            n for n in range(total, -1, -1) if int(n * trained) % batch_size % replicas == 0
        )
        check_global_batch({batch_size} if int(rows * trained) >= batch_size else (), replicas)
        uneven = rows < total
        if uneven:
            x, y, sample_weight = _slice_rows(arrays, rows)
            others = {**others, "y": y, "sample_weight": sample_weight}
    if uneven:
        warnings.warn(
            f"The {replicas} replicas share every batch evenly: up to {replicas - 1} image(s) at "
            "the end of a batch are left out",
            stacklevel=4,
        )
    return x, others


def _check_rows(**data) -> None:
    """Raises `ValueError` if data are None, or arrays without rows or numbers."""
    for name in ("x", "y", "sample_weight", "validation_data"):
        leaves = keras.tree.flatten(data.get(name))
        shapes = [tuple(leaf.shape) for leaf in leaves if hasattr(leaf, "shape")]
        is_absent = all(leaf is None for leaf in leaves)
        is_absent = is_absent and (name == "x" or data.get(name) is not None)
        is_object = any(str(getattr(leaf, "dtype", None)) == "object" for leaf in leaves)
        if is_absent or is_object or not all(shape and shape[0] != 0 for shape in shapes):
            received = textwrap.shorten(repr(data.get(name)), 100)
            raise ValueError(
                f"`{name}` must be numbers, with at least one row. Received: {name}={received}"
            )


def _num_rows(batch):
    """Rows of a batch or of arrays; a tensor inside a graph."""
    leaf = next(leaf for leaf in keras.tree.flatten(batch) if hasattr(leaf, "shape"))
    if hasattr(leaf, "nrows"):  # tf.RaggedTensor
        return leaf.nrows()
    return keras.ops.shape(leaf)[0]


def _slice_rows(batch, rows):
    return keras.tree.map_structure(lambda part: None if part is None else part[:rows], batch)


def _first_rows(batch, replicas: int):
    """The rows of a batch that the replicas can share evenly."""
    rows = _num_rows(batch)
    return _slice_rows(batch, rows - rows % replicas)


def _evenly_shared(batch, replicas: int):
    """As `_first_rows`, inside a dataset. Of too few rows, every replica gets all.

    Leaving them out would hide the number of batches, after which Keras runs an empty step.
    """
    import tensorflow as tf

    rows = _num_rows(batch)
    shared = rows - rows % replicas
    index = tf.range(tf.where(shared > 0, shared, rows * replicas)) % rows
    take = functools.partial(tf.gather, indices=index)
    return keras.tree.map_structure(lambda part: None if part is None else take(part), batch)


class _SharedBatches(keras.utils.PyDataset):
    """The batches of a `PyDataset` without the rows that the replicas cannot share."""

    def __init__(self, data, replicas: int):
        names = ("workers", "use_multiprocessing", "max_queue_size")
        super().__init__(**{name: getattr(data, name) for name in names})
        self.data, self.replicas = data, replicas
        count = data.num_batches or 0
        self.last_size = _num_rows(data[count - 1]) if count else 0
        self.whole_sizes = {_num_rows(data[0])} if count > 1 else (set() if count else {None})

    def __len__(self):
        return self.data.num_batches - (self.last_size < self.replicas)

    def __getitem__(self, index):
        return _first_rows(self.data[index], self.replicas)

    def on_epoch_begin(self):
        self.data.on_epoch_begin()

    def on_epoch_end(self):
        self.data.on_epoch_end()


class _TrainingData(keras.callbacks.Callback):
    """Sets the epoch of the data, which may have been iterated before; tells others its origin."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def set_params(self, params):
        super().set_params(params)
        params["data"] = getattr(self.batches, "identity", {})  # all callbacks share `params`

    def on_epoch_begin(self, epoch, logs=None):
        self.batches.epoch_counter.set_epoch(epoch)


def _clip_summed_gradients(gradients: list, optimizer) -> list:
    """Clips the sum of the gradients over the replicas; each replica returns an equal part.

    The optimizer clips each part again, without effect, and sums them up.
    """
    replicas = num_replicas()
    inner = getattr(optimizer, "inner_optimizer", optimizer)  # under loss scaling
    if replicas == 1 or not any((inner.clipnorm, inner.global_clipnorm, inner.clipvalue)):
        return gradients
    import tensorflow as tf

    known = [g for g in gradients if g is not None]
    total = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, known)
    scale = optimizer.scale_loss(1.0)
    if inner.clipnorm:
        total = [tf.clip_by_norm(g, inner.clipnorm * scale) for g in total]
    elif inner.global_clipnorm:
        total, _ = tf.clip_by_global_norm(total, inner.global_clipnorm * scale)
    else:
        limit = inner.clipvalue * scale
        total = [tf.clip_by_value(g, -limit, limit) for g in total]
    clipped = iter(total)
    return [None if g is None else next(clipped) / replicas for g in gradients]


def _zero_nonfinite_gradients(gradients: list, loss, optimizer):
    """Returns zeros and a loss of NaN if a gradient of any replica is not finite."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return gradients, loss
    import tensorflow as tf

    norm = tf.linalg.global_norm([loss, *(g for g in gradients if g is not None)])
    finite = sum_over_replicas(tf.cast(~tf.math.is_finite(norm), "float32")) == 0.0
    gradients = [
        None if g is None else tf.math.multiply_no_nan(g, tf.cast(finite, g.dtype))
        for g in gradients
    ]
    return gradients, tf.where(finite, loss, float("nan"))


@contextlib.contextmanager
def report_lost_workers(strategy):
    """Replaces the TensorFlow errors that mean a lost worker by a `RuntimeError`."""
    if strategy is None or not is_multi_worker(strategy):
        yield
        return
    import tensorflow as tf

    kinds = ("Unavailable", "Aborted", "Cancelled", "Internal", "DeadlineExceeded")
    try:
        yield
    except tuple(getattr(tf.errors, f"{kind}Error") for kind in kinds) as error:
        text = " ".join(str(error).split())[-300:]
        raise RuntimeError(
            "Another worker of this training was lost or cannot be reached. To resume from the "
            f"last checkpoint, restart all workers with the same command. TensorFlow: {text}"
        ) from None
