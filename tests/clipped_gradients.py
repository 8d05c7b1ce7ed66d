"""Program of test_distribution: clipped gradients of two replicas against the formula.

Every kind of clipping, with and without loss scaling, on one and on two devices.
"""

import keras
import numpy as np
import tensorflow as tf
from distributed_training import replicas

from keras_resnest.training import DistributedTraining


class Model(DistributedTraining, keras.Model):
    pass


x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
y = np.random.default_rng(1).normal(size=(8, 2)).astype("float32")
y[4:] *= 9  # the second replica has the larger gradient


def weights(strategy, scaled, **clipping):
    with strategy.scope():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((3,))
        model = Model(inputs, keras.layers.Dense(2)(inputs))
        optimizer = keras.optimizers.SGD(1.0, **clipping)
        if scaled:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=64.0)
        model.compile(optimizer, "mse", jit_compile=False)
    start = model.get_weights()
    model.fit(tf.data.Dataset.from_tensors((x, y)).unbatch().batch(8, True), verbose=0)
    gradient = [a - b for a, b in zip(start, model.get_weights(), strict=True)]
    return start, gradient


def truth(start, clipping):
    """The gradient of the mean over the global batch, clipped, by the formula."""
    kernel, bias = start
    error = 2.0 * (x @ kernel + bias - y) / y.size
    g = [x.T @ error, error.sum(axis=0)]
    ((kind, limit),) = clipping.items()
    if kind == "clipvalue":
        return [np.clip(v, -limit, limit) for v in g]
    norms = [np.linalg.norm(v) for v in g]
    if kind == "global_clipnorm":
        norms = [np.linalg.norm(norms)] * 2
    assert min(norms) > limit
    return [v * limit / n for v, n in zip(g, norms, strict=True)]


def main(folder):
    for clipping in ({"clipnorm": 0.05}, {"global_clipnorm": 0.05}, {"clipvalue": 0.02}):
        for strategy in (tf.distribute.get_strategy(), replicas(2)):
            for scaled in (False, True):
                start, gradient = weights(strategy, scaled, **clipping)
                for got, want in zip(gradient, truth(start, clipping), strict=True):
                    np.testing.assert_allclose(
                        got, want, atol=1e-6, err_msg=str((clipping, scaled))
                    )
