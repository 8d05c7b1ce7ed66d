"""Helpers for `tf.distribute`: counting replicas, reducing over them, empty batches."""

import keras
import numpy as np


def num_replicas() -> int:
    """Number of replicas of the current `tf.distribute` strategy; 1 on other backends."""
    if keras.backend.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    return tf.distribute.get_strategy().num_replicas_in_sync


def sum_over_replicas(value):
    """Sums a tensor over all replicas. Call it inside a replica's step."""
    if num_replicas() == 1:
        return value
    import tensorflow as tf

    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, value)


def is_multi_worker(strategy=None) -> bool:
    """Whether a strategy (default: the current one) spans several processes."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    strategy = _checked(strategy)
    kind = tf.distribute.MultiWorkerMirroredStrategy
    return isinstance(strategy, kind) and strategy.extended._in_multi_worker_mode()


def is_chief(strategy=None) -> bool:
    """Whether this process is the worker that writes files; True with a single process."""
    if keras.backend.backend() != "tensorflow":
        return True

    resolver = _checked(strategy).cluster_resolver
    if resolver is None or not resolver.task_type:
        return True
    has_chief = "chief" in resolver.cluster_spec().jobs
    return resolver.task_type == "chief" or (not has_chief and resolver.task_id == 0)


def _checked(strategy):
    """The strategy, by default the current one."""
    import tensorflow as tf

    strategy = tf.distribute.get_strategy() if strategy is None else strategy
    if not isinstance(strategy, tf.distribute.Strategy):
        raise ValueError(f"`strategy` must be a tf.distribute.Strategy. Received: {strategy!r}")
    return strategy


def run_on_replicas(strategy, function):
    """Runs a function without arguments on every replica, as one compiled step."""
    import tensorflow as tf

    function = tf.autograph.experimental.do_not_convert(function)
    return tf.function(lambda: strategy.run(function), autograph=False)()


def gather_over_replicas(strategy, numbers) -> np.ndarray:
    """Returns the numbers of all workers, (replicas, n); one row with a single process."""
    if not is_multi_worker(strategy):
        return np.asarray([numbers])
    import tensorflow as tf

    row = tf.constant([numbers])
    return np.asarray(strategy.gather(run_on_replicas(strategy, lambda: tf.identity(row)), axis=0))


def call_with_rows(function, x):
    """Returns `function(x)`; pads an empty batch with one row and removes it from the result.

    TensorFlow's oneDNN convolutions return a wrong shape for an empty batch.

    Args:
        function: maps a structure of tensors to another; the batch is the first axis.
        x: tensors of a batch of any size.
    """
    import tensorflow as tf

    count = tf.shape(keras.tree.flatten(x)[0])[0]
    padding = tf.maximum(0, 1 - count)
    padded = keras.tree.map_structure(
        lambda part: tf.pad(part, [[0, padding]] + [[0, 0]] * (len(part.shape) - 1)), x
    )
    return keras.tree.map_structure(lambda part: part[:count], function(padded))
