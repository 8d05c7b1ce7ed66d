"""Program of test_distribution: training on batches that two replicas cannot share evenly.

Two replicas learn what one device learns from the rows that they share.
"""

import warnings

import keras
import numpy as np
import tensorflow as tf
from detectors import rectangles
from distributed_training import SHAPE, classifier, refuses, replicas

TRAINED = 7  # the last batch, of four, has three: two are trained


def arrays(rows: int):
    images, truth = rectangles(rows, SHAPE, objects=2)
    return images, truth["labels"][:, 0]


class Batches(keras.utils.PyDataset):
    """Arrays in batches of four."""

    def __init__(self, data):
        super().__init__()
        self.data = data

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return keras.tree.map_structure(lambda part: part[4 * i : 4 * i + 4], self.data)


def trained(model, replicas: int) -> dict:
    """Losses of every form of data, and weights at the end."""
    # One device gets what two replicas can share.
    data = [part[: 6 if replicas == 1 else None] for part in arrays(TRAINED)]
    dataset = tf.data.Dataset.from_tensor_slices(tuple(data))
    found = {}
    forms = [
        ("dataset", dataset.batch(4), {}),
        ("rest of one", dataset.take(5).batch(4), {}),
        ("arrays", data[0], {"y": data[1], "batch_size": 4, "shuffle": False}),
        ("PyDataset", Batches(data), {"shuffle": False}),
    ]
    for name, x, options in forms:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss = model.fit(x, verbose=0, **options).history["loss"][0]
        if name != "rest of one":  # there both replicas have the last row, which so counts twice
            found[name] = loss
        said = [w for w in caught if "replicas share every batch evenly" in str(w.message)]
        assert not [w for w in caught if "ran out of data" in str(w.message)], name
        assert len(said) == replicas - 1, (name, [str(w.message) for w in caught])
    weights = {f"weight_{i}": w for i, w in enumerate(model.get_weights())}
    return {**found, **weights}


def results(strategy) -> dict:
    with strategy.scope():
        model = classifier(freeze=True)
    if strategy.num_replicas_in_sync > 1:
        refuses(lambda: model.fit(*arrays(5), 5), "a batch of 5")  # positional batch_size
    return trained(model, strategy.num_replicas_in_sync)


def main(folder):
    one, many = results(tf.distribute.get_strategy()), results(replicas(2))
    assert set(one) == set(many), (set(one), set(many))
    for name, value in one.items():
        assert np.shape(value) == np.shape(many[name]), name
        np.testing.assert_allclose(many[name], value, rtol=1e-4, atol=1e-4, err_msg=name)
