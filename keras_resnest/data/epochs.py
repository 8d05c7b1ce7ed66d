"""Order and random numbers of each epoch, which depend only on seed, epoch, and image.

Epoch k is the same in an uninterrupted run and after resuming, whatever TensorFlow's global seeds.
"""

import random
import threading

import numpy as np
import tensorflow as tf

from keras_resnest.checks import check_counts, checked

_ONE = 2**30  # 1 as a fixed-point number


class EpochCounter:
    """Numbers the passes over a dataset: the next epoch, or a fixed one after `set_epoch`.

    Args:
        initial_epoch: epoch of the first pass, from 0.

    Example:
        >>> counter = EpochCounter(3)
        >>> counter.next_epoch(), counter.next_epoch()
        (3, 4)
    """

    def __init__(self, initial_epoch: int = 0):
        self._lock = threading.Lock()
        check_counts(minimum=0, initial_epoch=initial_epoch)
        self._epoch, self._step = int(initial_epoch), 1

    def next_epoch(self) -> np.int64:
        """Returns the epoch of the pass that begins."""
        with self._lock:
            epoch = self._epoch
            self._epoch += self._step
        return np.int64(epoch)

    def set_epoch(self, epoch: int) -> None:
        """Fixes the epoch of every pass until the next call."""
        check_counts(minimum=0, epoch=epoch)
        with self._lock:
            self._epoch, self._step = int(epoch), 0

    def as_tensor(self) -> tf.Tensor:
        """`next_epoch()` in a `tf.data` graph: an int64 scalar, drawn when the graph runs."""
        # Python state: a tf.Variable would be mirrored in the scope of a strategy.
        return tf.ensure_shape(tf.numpy_function(self.next_epoch, [], tf.int64), [])


@checked
def set_epoch(batches: tf.data.Dataset, epoch: int) -> None:
    """Fixes the epoch of all following passes over training batches, until the next call.

    By default, the passes over `training_batches` are epochs 0, 1, 2, ... (from `initial_epoch`).
    However, `fit` may also iterate before and between its epochs, as under a
    `tf.distribute.Strategy`. Call `set_epoch` at the start of each epoch to keep both in step, so
    that a resumed training sees what an uninterrupted one would.

    Args:
        batches: the dataset that `training_batches` returned, not one derived from it.
        epoch: from 0.

    Raises:
        ValueError: if `batches` is another dataset, or `epoch` is not a nonnegative integer.

    Example:
        >>> on_epoch_begin = lambda epoch, logs: set_epoch(batches, epoch)
        >>> callback = keras.callbacks.LambdaCallback(on_epoch_begin=on_epoch_begin)
        >>> model.fit(batches, initial_epoch=12, epochs=60, callbacks=[callback])
    """
    counter = getattr(batches, "epoch_counter", None)
    if not isinstance(counter, EpochCounter):
        raise ValueError(
            "`batches` must be the dataset that `training_batches` returned, not one derived from "
            f"it. Received: {batches!r}"
        )
    counter.set_epoch(epoch)


def epoch_passes(
    stored: tf.data.Dataset,
    counter: EpochCounter,
    seed: int | None,
    shuffle_buffer: int,
    repeats: np.ndarray | None = None,
) -> tf.data.Dataset:
    """Returns a dataset that reshuffles `stored`, of any items, in each pass.

    Its elements are (epoch seed (2,) int64, position in the epoch, index of the item, item), with
    the cardinality of `stored` if that is known. `stored` is built once, so its cache lasts. A
    `shuffle_buffer` of 0 or 1 keeps the order. Without a `seed`, Python's `random` draws one.

    With `repeats`, the mean number of copies of each item, an epoch has `epoch_length(repeats)`
    items, newly rounded in each pass. Copy k of item i has the index i + k * items.
    """
    stored = stored.enumerate()
    seed = random.randrange(2**31) if seed is None else int(seed)

    def one_pass(_):
        own_seed = fold_in(tf.constant([seed, 0], tf.int64), counter.as_tensor())
        order_seed, epoch_seed = tf.unstack(tf.random.split(own_seed, 2))
        items = stored if repeats is None else _with_copies(stored, repeats, order_seed)
        if shuffle_buffer > 1:
            # Set in this graph only; `shuffle` would mix the global seed into its own.
            tf.random.set_seed(1)
            order = tf.random.stateless_uniform([], order_seed, 0, tf.int64.max, tf.int64)
            items = items.shuffle(shuffle_buffer, seed=order, reshuffle_each_iteration=False)
        return items.enumerate().map(lambda position, item: (epoch_seed, position, *item))

    passes = tf.data.Dataset.from_tensors(0).flat_map(one_pass)
    count = int(stored.cardinality()) if repeats is None else epoch_length(repeats)
    if count == tf.data.UNKNOWN_CARDINALITY:
        return passes
    return passes.apply(tf.data.experimental.assert_cardinality(count))


def epoch_length(repeats: np.ndarray) -> int:
    """Returns the number of items of every epoch: the sum of `repeats`, rounded down."""
    return int(_fixed_point(repeats).sum()) // _ONE


def _with_copies(stored: tf.data.Dataset, repeats: np.ndarray, seed: tf.Tensor) -> tf.data.Dataset:
    copies = round_at_random(repeats, seed)

    def repeat(index, item):
        numbers = tf.data.Dataset.range(copies[index])
        return numbers.map(lambda number: (index + number * len(repeats), item))

    return stored.flat_map(repeat)


def round_at_random(repeats: np.ndarray, seed: tf.Tensor) -> tf.Tensor:
    """Rounds each number up with the probability of its fraction; the sum is `epoch_length`.

    This is systematic sampling, which keeps the length of all epochs: the numbers add up, in random
    order and from a random start below 1, and an item has a copy for each integer that the sum
    passes while it is added. Fixed-point numbers, as the sum must be exact.
    """
    draws = tf.random.stateless_uniform([len(repeats)], fold_in(seed, 0), 0, tf.int64.max, tf.int64)
    start = tf.random.stateless_uniform([], fold_in(seed, 1), 0, _ONE, tf.int64)
    order = tf.argsort(draws)
    passed = (start + tf.cumsum(tf.gather(_fixed_point(repeats), order))) // _ONE
    passed = tf.minimum(passed, epoch_length(repeats))  # or one more, a random one
    copies = passed - tf.concat([[0], passed[:-1]], axis=0)
    return tf.scatter_nd(order[:, None], copies, [len(repeats)])


def _fixed_point(numbers: np.ndarray) -> np.ndarray:
    return np.round(numbers * _ONE).astype("int64")


def fold_in(seed: tf.Tensor, *numbers: tf.Tensor) -> tf.Tensor:
    """Derives an int64 seed (2,) from integers; different integers give independent seeds."""
    for number in numbers:
        seed = tf.random.fold_in(seed, tf.cast(number, tf.int64))  # int64 in, 64 random bits out
    return seed
