"""The order and the random numbers of every epoch, from nothing but (seed, epoch, image).

Epoch k of a dataset is the same whether k epochs came before it or the training was resumed
there, and whatever the global seeds of TensorFlow are.
"""

import threading

import numpy as np
import tensorflow as tf


class EpochCounter:
    """Tells each pass over a dataset which epoch it is: the next one, or the one that was set.

    Args:
        initial_epoch: epoch of the first pass, from 0.

    Example:
        ```python
        counter = EpochCounter(3)
        counter.next_epoch(), counter.next_epoch()  # 3, 4
        counter.set_epoch(7)
        counter.next_epoch(), counter.next_epoch()  # 7, 7
        ```
    """

    def __init__(self, initial_epoch: int = 0):
        self._lock = threading.Lock()
        self._epoch, self._step = _checked_epoch("initial_epoch", initial_epoch), 1

    def next_epoch(self) -> np.int64:
        """The epoch of the pass that begins now."""
        with self._lock:
            epoch = self._epoch
            self._epoch += self._step
        return np.int64(epoch)

    def set_epoch(self, epoch: int) -> None:
        """From now on, every pass is of this epoch, until the next call."""
        with self._lock:
            self._epoch, self._step = _checked_epoch("epoch", epoch), 0

    def as_tensor(self) -> tf.Tensor:
        """`next_epoch()` inside a `tf.data` graph: int64 scalar, drawn when the graph runs."""
        # State in Python, not in a tf.Variable: inside a strategy's scope that would be mirrored.
        return tf.ensure_shape(tf.numpy_function(self.next_epoch, [], tf.int64), [])


def set_epoch(batches: tf.data.Dataset, epoch: int) -> None:
    """Makes every following pass over training batches that of `epoch`, until the next call.

    Left alone, the passes over `training_batches` are epochs 0, 1, 2, ... (from `initial_epoch`).
    But `fit` may look into a dataset before and between its epochs (under a
    `tf.distribute.Strategy` it does). A callback that calls `set_epoch` when an epoch begins keeps
    the two together, so that a resumed training sees exactly what an uninterrupted one would.

    Args:
        batches: what `training_batches` returned (not a dataset made from it).
        epoch: from 0.

    Raises:
        ValueError: `batches` is another dataset, or `epoch` is no integer from 0.

    Example:
        ```python
        on_epoch_begin = lambda epoch, logs: set_epoch(batches, epoch)
        callback = keras.callbacks.LambdaCallback(on_epoch_begin=on_epoch_begin)
        model.fit(batches, initial_epoch=12, epochs=60, callbacks=[callback])
        ```
    """
    counter = getattr(batches, "epoch_counter", None)
    if not isinstance(counter, EpochCounter):
        raise ValueError(
            "`batches` must be the dataset that `training_batches` returned, not one made from "
            f"it. Received: {batches!r}"
        )
    counter.set_epoch(epoch)


def epoch_passes(
    stored: tf.data.Dataset, counter: EpochCounter, seed: int, shuffle_buffer: int
) -> tf.data.Dataset:
    """Passes over stored items, shuffled anew in every epoch.

    Args:
        stored: dataset of anything; it is never built again, so its cache lasts.
        counter: tells the epoch of a pass.
        seed: start of all random numbers.
        shuffle_buffer: number of items among which the next one is drawn; 0 or 1: in order.

    Returns:
        Dataset of (epoch seed (2,) int64, position in the epoch, number of the item, item).
        Its cardinality is that of `stored`, where that is known.
    """
    stored = stored.enumerate()

    def one_pass(_):
        own_seed = fold_in(tf.constant([seed, 0], tf.int64), counter.as_tensor())
        order_seed, epoch_seed = tf.unstack(tf.random.split(own_seed, 2))
        items = stored
        if shuffle_buffer > 1:
            # Of this graph only: `shuffle` mixes the global seed into its own otherwise.
            tf.random.set_seed(1)
            order = tf.random.stateless_uniform(
                [], order_seed, minval=0, maxval=tf.int64.max, dtype=tf.int64
            )
            items = items.shuffle(shuffle_buffer, seed=order, reshuffle_each_iteration=False)
        return items.enumerate().map(
            lambda position, numbered: (epoch_seed, position, numbered[0], numbered[1])
        )

    passes = tf.data.Dataset.from_tensors(0).flat_map(one_pass)
    count = int(stored.cardinality())
    if count == tf.data.UNKNOWN_CARDINALITY:
        return passes
    return passes.apply(tf.data.experimental.assert_cardinality(count))


def fold_in(seed: tf.Tensor, *numbers: tf.Tensor) -> tf.Tensor:
    """A seed (2,) int64 for each tuple of integers: the same for the same, else independent."""
    for number in numbers:
        seed = tf.random.fold_in(seed, tf.cast(number, tf.int64))  # int64 in, 64 random bits out
    return seed


def _checked_epoch(name: str, epoch: int) -> int:
    if not isinstance(epoch, int | np.integer) or isinstance(epoch, bool) or epoch < 0:
        raise ValueError(f"`{name}` must be an integer of at least 0. Received: {name}={epoch!r}")
    return int(epoch)
