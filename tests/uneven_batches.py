"""Program of test_distribution: batches that two replicas cannot share evenly.

    python tests/uneven_batches.py detector

Fails unless two replicas return what one device returns.
"""

import os
import sys
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from detectors import rectangles, small_detector
from distributed_training import SHAPE, classifier

ROWS = 5  # the last batch, of four, has one
TRAINED = 7  # the last batch, of four, has three: two are trained


def arrays(kind: str, rows: int):
    images, truth = rectangles(rows, SHAPE, objects=2)
    return images, truth["labels"][:, 0] if kind == "classifier" else truth


class Batches(keras.utils.PyDataset):
    """Arrays in batches of four."""

    def __init__(self, data):
        super().__init__()
        self.data = data

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return keras.tree.map_structure(lambda part: part[4 * i : 4 * i + 4], self.data)


def trained(kind: str, model, replicas: int) -> dict:
    """Losses of every form of data, and weights at the end."""
    # One device gets what two replicas can share.
    data = arrays(kind, TRAINED)
    data = keras.tree.map_structure(lambda part: part[: 6 if replicas == 1 else None], data)
    dataset = tf.data.Dataset.from_tensor_slices(data)
    found = {}
    forms = [
        ("dataset", dataset.batch(4), {}),
        ("rest of one", dataset.take(5 if replicas > 1 else 4).batch(4), {}),
        ("arrays", data[0], {"y": data[1], "batch_size": 4, "shuffle": False}),
        ("PyDataset", Batches(data), {"shuffle": False}),
    ]
    for name, x, options in forms[: 1 if kind == "detector" else None]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found[name] = model.fit(x, verbose=0, **options).history["loss"][0]
        said = [w for w in caught if "replicas share every batch evenly" in str(w.message)]
        assert len(said) == replicas - 1, (name, [str(w.message) for w in caught])
    weights = {f"weight_{i}": w for i, w in enumerate(model.get_weights())}
    return {**found, **weights}


def results(kind: str, strategy) -> dict:
    keras.utils.set_random_seed(1)
    with strategy.scope():
        if kind == "classifier":
            model = classifier("frozen")
        else:
            model = small_detector(image_shape=SHAPE, freeze_batch_norm=True)
            model.compile(keras.optimizers.SGD(1e-3))
    learned = trained(kind, model, strategy.num_replicas_in_sync)
    data = tf.data.Dataset.from_tensor_slices(arrays(kind, ROWS)).batch(4)
    evaluated = model.evaluate(data, return_dict=True, verbose=0)
    predicted = model.predict(data.map(lambda x, y: x), verbose=0)
    train = data.take(1).unbatch().batch(4, drop_remainder=True)
    history = model.fit(train, validation_data=data, verbose=0).history
    validated = {k: v[0] for k, v in history.items() if k.startswith("val_")}
    leaves = {f"predict_{i}": leaf for i, leaf in enumerate(keras.tree.flatten(predicted))}
    if strategy.num_replicas_in_sync > 1:
        refuses(lambda: model.fit(*arrays(kind, ROWS), ROWS), "a batch of 5")
    return {**learned, **evaluated, **validated, **leaves}


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
