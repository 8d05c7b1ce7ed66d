"""Prints the error of a training that diverges at its second step, on any backend."""

import keras
import numpy as np

from keras_resnest.training.callbacks import TerminateOnDivergence

layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")
model = keras.Sequential([keras.Input((1,)), layer])
model.compile(keras.optimizers.SGD(0.25), "mse")
x = np.array([[1.0], [1e20], [1.0]], "float32")
if keras.backend.backend() == "jax":  # the guard must not turn off asynchronous dispatch
    assert keras.callbacks.CallbackList([TerminateOnDivergence()])._async_train
try:
    model.fit(x, x, batch_size=1, shuffle=False, verbose=0, callbacks=[TerminateOnDivergence()])
except FloatingPointError as error:
    print(error)
