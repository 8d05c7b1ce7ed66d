"""Program of test_distribution: `evaluate` and `predict` where a replica gets no rows.

    python tests/uneven_batches.py detector

Fails unless two replicas return what one device returns.
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from detectors import rectangles, small_detector
from distributed_training import SHAPE, classifier

ROWS = 5  # the last batch, of four, has one


def batches(kind: str, size: int = 4):
    images, truth = rectangles(ROWS, SHAPE, objects=2)
    y = truth["labels"][:, 0] if kind == "classifier" else truth
    return tf.data.Dataset.from_tensor_slices((images, y)).batch(size)


def results(kind: str, strategy) -> dict:
    keras.utils.set_random_seed(1)
    with strategy.scope():
        if kind == "classifier":
            model = classifier("frozen")
        else:
            model = small_detector(image_shape=SHAPE, freeze_batch_norm=True)
            model.compile(keras.optimizers.SGD(1e-3))
    data = batches(kind)
    evaluated = model.evaluate(data, return_dict=True, verbose=0)
    predicted = model.predict(data.map(lambda x, y: x), verbose=0)
    train = data.take(1).unbatch().batch(4, drop_remainder=True)
    history = model.fit(train, validation_data=data, verbose=0).history
    validated = {k: v[0] for k, v in history.items() if k.startswith("val_")}
    leaves = {f"predict_{i}": leaf for i, leaf in enumerate(keras.tree.flatten(predicted))}
    if strategy.num_replicas_in_sync > 1:
        images, y = next(iter(batches(kind, ROWS)))
        refuses(lambda: model.fit(data, verbose=0), "drop_remainder=True")
        refuses(lambda: model.fit(images.numpy(), y, ROWS), "a batch of 5")  # positional batch_size
    return {**evaluated, **validated, **leaves}


def refuses(train, message: str) -> None:
    try:
        train()
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError("fit accepted uneven batches")


def main():
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    two = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"], tf.distribute.ReductionToOneDevice())
    kind = sys.argv[1]
    one, many = results(kind, tf.distribute.get_strategy()), results(kind, two)
    assert set(one) == set(many), (set(one), set(many))
    for name, value in one.items():
        assert np.shape(value) == np.shape(many[name]), name
        np.testing.assert_allclose(many[name], value, rtol=1e-4, atol=1e-4, err_msg=name)
    print(f"{len(one)} values are the same")


if __name__ == "__main__":
    main()
