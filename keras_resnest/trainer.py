"""What training on several devices and machines needs beyond Keras, on `tf.distribute`.

Nothing here matters on one device, except that a gradient that is not finite becomes zeros.
"""

import contextlib
import functools
import inspect

import keras

from keras_resnest.replicas import call_with_rows, is_multi_worker, num_replicas, sum_over_replicas


def same_arguments_as(method):
    """Decorates an override of a Keras method, which then takes the same arguments.

    The override receives those that were passed, all by keyword. `help` shows the signature of
    Keras, and its docstring unless the override has one.

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
            return override(**{**arguments, **arguments.pop("kwargs", {})})

        wrapper.__signature__ = signature
        return wrapper

    return decorate


class DistributedTraining:
    """Mix-in of a `keras.Model` that trains on many devices as it would on one.

    With TensorFlow it changes these points of Keras 3.15; each would be better mended in
    Keras itself:

    - Gradients are clipped after they are added up over the replicas. Keras clips those of
      each replica, so that the step depends on the number of replicas.
    - A gradient that is not finite, or whose norm is not, is replaced by zeros, so that all
      weights stay finite, and shows as a `loss` of NaN; see `TerminateOnDivergence`. Loss
      scaling, which skips such steps itself, is left alone.
    - `fit` and `evaluate` run under `tf.distribute.MultiWorkerMirroredStrategy` (Keras issue
      20585). Keras reduces a whole batch over the workers to learn its shapes, and takes a
      mean over axis 0 of logs that have no axis. Here the shapes come from the dataset's
      own description, and the logs get an axis.
    - A replica that gets no row of a last, small batch of `evaluate` or `predict` predicts an
      empty batch. TensorFlow's oneDNN convolution gives that a wrong shape, and the mean over
      its rows is no number.

    A batch that the replicas cannot share evenly, and a worker that is lost, end with a
    plain sentence.

    Example:

    >>> class Model(DistributedTraining, keras.Model):
    ...     pass
    """

    def fit(self, x=None, y=None, batch_size=None, *args, **kwargs):
        """As `keras.Model.fit`."""
        strategy = getattr(self, "_distribute_strategy", None)
        if strategy is not None:
            sizes = _batch_sizes(x, batch_size, kwargs.get("validation_split") or 0.0)
            check_global_batch(sizes, strategy.num_replicas_in_sync)
        if hasattr(x, "epoch_counter"):  # of `keras_resnest.data.training_batches`
            kwargs["callbacks"] = [_EpochOfData(x), *_as_list(kwargs.get("callbacks"))]
        if hasattr(x, "element_spec"):  # Keras warns that it cannot shuffle these
            kwargs.setdefault("shuffle", False)
        with lost_workers(strategy):
            return super().fit(x, y, batch_size, *args, **kwargs)

    def evaluate(self, x=None, y=None, *args, **kwargs):
        """As `keras.Model.evaluate`."""
        with lost_workers(getattr(self, "_distribute_strategy", None)):
            return super().evaluate(x, y, *args, **kwargs)

    def train_step(self, *args):
        """One step; the batch is the last argument on every backend."""
        if keras.backend.backend() != "tensorflow":
            return super().train_step(*args)
        return self._with_axis(self._tensorflow_step(*args))

    def _tensorflow_step(self, data):
        import tensorflow as tf

        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(x, y, y_pred, sample_weight, training=True)
            scaled = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, self.trainable_weights)
        gradients = _clipped_as_one(gradients, self.optimizer)
        gradients, loss = _finite_or_zero(gradients, loss, self.optimizer)
        batch = tf.shape(keras.tree.flatten(x)[0])[0]
        self._loss_tracker.update_state(loss * num_replicas(), sample_weight=batch)
        if self.trainable_weights:
            self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def test_step(self, *args):
        if num_replicas() == 1:
            return super().test_step(*args)
        return self._with_axis(self._replica_test_step(*args))

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
        """As that of Keras, also for a replica without a row."""
        if num_replicas() == 1:
            return super().predict_step(*args)
        x, _, _ = keras.utils.unpack_x_y_sample_weight(args[-1])
        return call_with_rows(functools.partial(self, training=False), x)

    @staticmethod
    def _with_axis(logs):
        """Logs as Keras can take their mean over all workers: with an axis to take it over."""
        if not is_multi_worker():
            return logs
        return keras.tree.map_structure(lambda value: value[None], logs)

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        """Builds what Keras builds before training, without drawing a batch for it."""
        if getattr(self, "_distribute_strategy", None) is None:
            return super()._maybe_symbolic_build(iterator, data_batch)
        if iterator is not None:
            spec = iterator.data_adapter.get_tf_dataset().element_spec
            # Of a dataset that is distributed already: what the first replica gets.
            data_batch = keras.tree.map_structure(
                lambda part: getattr(part, "_value_specs", (part,))[0], spec
            )
        return super()._maybe_symbolic_build(data_batch=data_batch)


def check_global_batch(sizes, replicas: int) -> None:
    """Checks that replicas can share batches evenly, before a training begins.

    Args:
        sizes: numbers of rows of the batches; None is an unknown one.
        replicas: number of replicas, `strategy.num_replicas_in_sync`.

    Raises:
        ValueError: if one of the sizes is no multiple of `replicas`, or unknown.

    Example:

    >>> check_global_batch({32}, strategy.num_replicas_in_sync)
    """
    if replicas == 1:
        return
    if None in sizes:
        raise ValueError(
            f"The {replicas} replicas must be able to share every batch evenly, but the number of "
            "rows is not known beforehand. Give a tf.data.Dataset, made with "
            "batch(..., drop_remainder=True)"
        )
    uneven = [size for size in sizes if size % replicas]
    if uneven:
        raise ValueError(
            f"The global batch must be a multiple of the {replicas} replicas that share it. "
            f"Received: a batch of {uneven[0]}"
        )


def batch_size_of(dataset) -> int | None:
    """Rows of every batch of a `tf.data.Dataset`; None where the last one may be smaller."""
    return keras.tree.flatten(dataset.element_spec)[0].shape[0]


def _batch_sizes(x, batch_size: int | None, validation_split: float) -> set:
    """Numbers of rows of the batches that `fit` makes of `x`; None is an unknown one."""
    if isinstance(x, keras.utils.PyDataset):
        last = (x.num_batches or 0) - 1
        return {len(keras.tree.flatten(x[i])[0]) for i in (0, last)} if last >= 0 else {None}
    if hasattr(x, "element_spec"):
        # A dataset that is distributed already does not tell: see `distribute_batches`.
        import tensorflow as tf

        return {batch_size_of(x)} if isinstance(x, tf.data.Dataset) else set()
    leaves = [leaf for leaf in keras.tree.flatten(x) if hasattr(leaf, "shape")]
    if not leaves:
        return {None}
    rows = int(leaves[0].shape[0] * (1.0 - validation_split))
    batch_size = batch_size or 32  # as Keras
    return {min(batch_size, rows), rows % batch_size or batch_size}


class _EpochOfData(keras.callbacks.Callback):
    """Keeps the epochs of training and of data together, whoever looked into the data."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def on_epoch_begin(self, epoch, logs=None):
        self.batches.epoch_counter.set_epoch(epoch)


def _as_list(callbacks) -> list:
    if callbacks is None:
        return []
    return list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]


def _clipped_as_one(gradients: list, optimizer) -> list:
    """Gradients that add up, over the replicas, to their clipped sum.

    The optimizer clips what each replica brings and adds it up. Each brings the same part of
    the clipped sum here, which is too small for the optimizer to clip again.
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


def _finite_or_zero(gradients: list, loss, optimizer):
    """Zeros, and a loss of NaN, where a gradient of any replica is not finite."""
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
def lost_workers(strategy):
    """Turns what TensorFlow raises when another worker is gone into one plain sentence."""
    if strategy is None or not is_multi_worker(strategy):
        yield
        return
    import tensorflow as tf

    gone = (
        tf.errors.UnavailableError,
        tf.errors.AbortedError,
        tf.errors.CancelledError,
        tf.errors.InternalError,
        tf.errors.DeadlineExceededError,
    )
    try:
        yield
    except gone as error:
        text = " ".join(str(error).split())[-300:]
        raise RuntimeError(
            "Another worker of this training was lost or cannot be reached. Start all workers "
            f"again with the same command: they go on from the last checkpoint. TensorFlow: {text}"
        ) from None
