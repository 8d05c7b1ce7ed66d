"""What to do with a batch without rows, on TensorFlow."""

import keras


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
