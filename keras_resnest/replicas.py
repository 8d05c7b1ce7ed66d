"""Replicas of `tf.distribute`: how many there are, sums over them, batches without rows."""

import keras


def num_replicas() -> int:
    """Replicas that train in step under the current `tf.distribute` strategy, else 1."""
    if keras.backend.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    return tf.distribute.get_strategy().num_replicas_in_sync


def sum_over_replicas(value):
    """Sum of a tensor over the replicas of a `tf.distribute` strategy, inside a step."""
    if num_replicas() == 1:
        return value
    import tensorflow as tf

    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, value)


def is_multi_worker(strategy=None) -> bool:
    """Whether a strategy, by default the current one, spans several processes."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    strategy = strategy or tf.distribute.get_strategy()
    kind = tf.distribute.MultiWorkerMirroredStrategy
    return isinstance(strategy, kind) and strategy.extended._in_multi_worker_mode()


def is_chief(strategy=None) -> bool:
    """Whether this process is the one of all workers of a strategy that writes files."""
    if keras.backend.backend() != "tensorflow":
        return True
    import tensorflow as tf

    resolver = (strategy or tf.distribute.get_strategy()).cluster_resolver
    if resolver is None or not resolver.task_type:
        return True
    has_chief = "chief" in resolver.cluster_spec().jobs
    return resolver.task_type == "chief" or (not has_chief and resolver.task_id == 0)


def run_everywhere(strategy, function):
    """What a function without arguments gives on every replica, as one compiled step."""
    import tensorflow as tf

    function = tf.autograph.experimental.do_not_convert(function)
    return tf.function(lambda: strategy.run(function), autograph=False)()


def call_with_rows(function, x):
    """`function(x)`, also where `x` has no rows.

    TensorFlow's oneDNN convolutions give an empty batch a wrong shape: one row of zeros is sent
    in its place, and its result is taken away again.

    Args:
        function: takes a structure of tensors, returns one, batch first in all of them.
        x: tensors of a batch, of which there may be none.

    Returns:
        What `function` returns, with as many rows as `x`.
    """
    import tensorflow as tf

    count = tf.shape(keras.tree.flatten(x)[0])[0]
    lacking = tf.maximum(0, 1 - count)
    padded = keras.tree.map_structure(
        lambda part: tf.pad(part, [[0, lacking]] + [[0, 0]] * (len(part.shape) - 1)), x
    )
    return keras.tree.map_structure(lambda part: part[:count], function(padded))
