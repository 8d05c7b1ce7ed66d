"""Optimizers that exclude variables from weight decay by name, and linear warm-up."""

import keras
from keras import ops

from keras_resnest.checks import checked

#: Names of the variables without weight decay: biases and the weights of normalization layers.
EXCLUDED_VARIABLES = ("bias", "gamma", "beta")


@checked
@keras.saving.register_keras_serializable("keras_resnest")
class LinearWarmup(keras.optimizers.schedules.LearningRateSchedule):
    """Multiplies another schedule by a factor that rises linearly from 0 to 1.

    In Keras, only `CosineDecay` has a warm-up.

    Args:
        schedule: a `keras.optimizers.schedules.LearningRateSchedule`.
        warmup_steps: positive integer; step `n` uses `n / warmup_steps` of the schedule's rate.

    Raises:
        ValueError: if `warmup_steps` is not positive.

    Example:
        >>> steps = keras.optimizers.schedules.PiecewiseConstantDecay([79_999], [1e-3, 1e-4])
        >>> float(LinearWarmup(steps, 1000)(500))
        0.0005
    """

    def __init__(self, schedule, warmup_steps: int):
        super().__init__()
        if warmup_steps <= 0:
            raise ValueError(
                f"`warmup_steps` must be positive. Received: warmup_steps={warmup_steps!r}"
            )
        self.schedule = schedule
        self.warmup_steps = warmup_steps

    def __call__(self, step):
        progress = ops.cast(step, "float32") / self.warmup_steps
        return self.schedule(step) * ops.minimum(progress, 1.0)

    def get_config(self):
        schedule = keras.optimizers.schedules.serialize(self.schedule)
        return {"schedule": schedule, "warmup_steps": self.warmup_steps}

    @classmethod
    def from_config(cls, config):
        schedule = keras.optimizers.schedules.deserialize(config["schedule"])
        return cls(schedule, config["warmup_steps"])


class _ExcludeByName:
    """Mix-in that excludes variables from weight decay by name.

    The names are part of the config; Keras' `exclude_from_weight_decay` is not saved.
    """

    def __init__(self, *args, excluded_variables=EXCLUDED_VARIABLES, **kwargs):
        super().__init__(*args, **kwargs)
        self.excluded_variables = tuple(excluded_variables)

    def build(self, variables):
        if not self.built:
            # Compare whole names: Keras compares parts, and would find "scale" in "rescale".
            excluded = [v for v in variables if v.name in self.excluded_variables]
            self.exclude_from_weight_decay(var_list=excluded)
        super().build(variables)

    def get_config(self):
        return {**super().get_config(), "excluded_variables": list(self.excluded_variables)}


@keras.saving.register_keras_serializable("keras_resnest")
class SGDWithL2(_ExcludeByName, keras.optimizers.SGD):
    """SGD with momentum and L2 regularization as weight decay, as in Caffe and PyTorch.

    The published recipes use this rule:

        velocity = momentum * velocity - learning_rate * (gradient + weight_decay * variable)
        variable = variable + velocity

    The weight decay of `keras.optimizers.SGD` is decoupled: it bypasses the momentum and, with
    momentum 0.9, decays a tenth as much. As in Caffe, gradients are clipped before the decay is
    added.

    Args:
        *args: arguments of `keras.optimizers.SGD`.
        excluded_variables: names of variables without weight decay.
        **kwargs: arguments of `keras.optimizers.SGD`.

    Example:
        >>> model.compile(SGDWithL2(1e-3, momentum=0.9, weight_decay=5e-4))
    """

    def _apply_weight_decay(self, variables):
        """Disables Keras' decoupled weight decay."""

    def update_step(self, gradient, variable, learning_rate):
        if self.weight_decay and self._use_weight_decay(variable):
            decay = ops.cast(self.weight_decay, variable.dtype)
            gradient = ops.cast(gradient, variable.dtype) + decay * variable
        super().update_step(gradient, variable, learning_rate)


@keras.saving.register_keras_serializable("keras_resnest")
class AdamW(_ExcludeByName, keras.optimizers.AdamW):
    """Keras' AdamW that excludes variables from weight decay by name.

    Args:
        *args: arguments of `keras.optimizers.AdamW`.
        excluded_variables: names of variables without weight decay.
        **kwargs: arguments of `keras.optimizers.AdamW`.

    Example:
        >>> model.compile(AdamW(1e-3, weight_decay=0.05))
    """
