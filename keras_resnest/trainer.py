"""Distributed training with `tf.distribute`, beyond what Keras offers.

On a single device, the only change is that non-finite gradients become zeros.
"""

import contextlib
import functools
import inspect

import keras

from keras_resnest.replicas import call_with_rows, is_multi_worker, num_replicas, sum_over_replicas


def same_arguments_as(method):
    """Decorates an override of a Keras method so that it takes the same arguments.

    The override receives all passed arguments by keyword. `help` shows Keras' signature, and its
    docstring unless the override has one.

    Args:
        method: the method of `keras.Model`.

    Example:
        >>> @same_arguments_as(keras.Model.fit)
        ... def fit(self, x=None, callbacks=None, **kwargs):
        ...     return super().fit(x, callbacks=[*callbacks, guard], **kwargs)
    """
    signature = inspect.signature(method)

    def decorate(override):
        @functools.wraps(override if override.__doc__ else method)
        def wrapper(*args, **kwargs):
            arguments = signature.bind(*args, **kwargs).arguments
            extra = arguments.pop("kwargs", {})
            return override(**arguments, **extra)

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
    - In `evaluate` and `predict`, replicas may receive no rows of a small last batch. TensorFlow's
      oneDNN convolution returns a wrong shape for an empty batch, and its mean loss is NaN.

    Example:
        >>> class Model(DistributedTraining, keras.Model):
        ...     pass
    """

    @same_arguments_as(keras.Model.fit)
    def fit(self, x=None, batch_size=None, callbacks=None, **kwargs):
        strategy = getattr(self, "_distribute_strategy", None)
        if strategy is not None:
            sizes = _batch_sizes(x, batch_size, kwargs.get("validation_split") or 0.0)
            check_global_batch(sizes, strategy.num_replicas_in_sync)
        if hasattr(x, "epoch_counter"):  # of `keras_resnest.data.training_batches`
            callbacks = [_SetEpoch(x.epoch_counter), *keras.tree.flatten(callbacks or [])]
        if hasattr(x, "element_spec"):
            kwargs["shuffle"] = False  # Keras cannot shuffle a tf.data.Dataset, and warns
        with report_lost_workers(strategy):
            return super().fit(x, batch_size=batch_size, callbacks=callbacks, **kwargs)

    @same_arguments_as(keras.Model.evaluate)
    def evaluate(self, **kwargs):
        with report_lost_workers(getattr(self, "_distribute_strategy", None)):
            return super().evaluate(**kwargs)

    @same_arguments_as(keras.Model.predict)
    def predict(self, **kwargs):
        with report_lost_workers(getattr(self, "_distribute_strategy", None)):
            return super().predict(**kwargs)

    def train_step(self, *args):
        """Runs one step; the batch is the last argument on every backend."""
        if keras.backend.backend() != "tensorflow":
            return super().train_step(*args)
        return self._add_worker_axis(self._tensorflow_step(*args))

    def _tensorflow_step(self, data):
        import tensorflow as tf

        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(x, y, y_pred, sample_weight, training=True)
            scaled = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, self.trainable_weights)
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
        loss = self.compute_loss(x, y, y_pred, sample_weight, training=False)
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
        if self.optimizer is not None and not self.optimizer.built and self.built:
            self.optimizer.build(self.trainable_variables)
        return super().make_train_function(force)

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


def check_global_batch(sizes, replicas: int) -> None:
    """Checks that the replicas can share every batch evenly.

    Args:
        sizes: batch sizes; None if unknown.
        replicas: number of replicas, `strategy.num_replicas_in_sync`.

    Raises:
        ValueError: if a size is unknown or not a multiple of `replicas`.

    Example:
        >>> check_global_batch({32}, strategy.num_replicas_in_sync)
    """
    if replicas == 1:
        return
    if None in sizes:
        raise ValueError(
            f"The {replicas} replicas must share every batch evenly, but the batch size is not "
            "known beforehand. Pass a tf.data.Dataset made with batch(..., drop_remainder=True)"
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


def _batch_sizes(x, batch_size: int | None, validation_split: float) -> set:
    """Batch sizes that `fit` makes of `x`; None if unknown."""
    if isinstance(x, keras.utils.PyDataset):
        last = (x.num_batches or 0) - 1
        return {len(keras.tree.flatten(x[i])[0]) for i in (0, last)} if last >= 0 else {None}
    if hasattr(x, "element_spec"):
        # A distributed dataset was checked by `distribute_batches`.
        import tensorflow as tf

        return {batch_size_of(x)} if isinstance(x, tf.data.Dataset) else set()
    leaves = [leaf for leaf in keras.tree.flatten(x) if hasattr(leaf, "shape")]
    if not leaves:
        return {None}
    rows = int(leaves[0].shape[0] * (1.0 - validation_split))
    batch_size = batch_size or 32  # as Keras
    return {min(batch_size, rows), rows % batch_size or batch_size}


class _SetEpoch(keras.callbacks.Callback):
    """Sets the epoch of the data, which may have been iterated before."""

    def __init__(self, epoch_counter):
        super().__init__()
        self.epoch_counter = epoch_counter

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch_counter.set_epoch(epoch)


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
