"""Optimizers that treat variables differently, and schedules of the learning rate."""

import contextlib
from collections.abc import Iterable

import keras
from keras import ops

from keras_resnest.checks import check_positive, checked

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


@checked
@keras.saving.register_keras_serializable("keras_resnest")
class ShiftedSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """Another schedule from a later step on, which may change during the training.

    Args:
        schedule: a `keras.optimizers.schedules.LearningRateSchedule`.
        shift: integer; step `n` uses the rate of step `n + shift`.

    Example:
        >>> later = ShiftedSchedule(keras.optimizers.schedules.CosineDecay(1e-3, 1000), 500)
        >>> float(later(0))
        0.0005
    """

    def __init__(self, schedule, shift: int = 0):
        super().__init__()
        self.schedule = schedule
        self.shift = keras.Variable(int(shift), dtype="int", trainable=False, name="shift")

    def __call__(self, step):
        return self.schedule(ops.cast(step, self.shift.dtype) + self.shift)

    def get_config(self):
        schedule = keras.optimizers.schedules.serialize(self.schedule)
        return {"schedule": schedule, "shift": number_in(self.shift)}

    @classmethod
    def from_config(cls, config):
        schedule = keras.optimizers.schedules.deserialize(config["schedule"])
        return cls(schedule, config["shift"])


def inner_optimizer(model):
    """Returns the optimizer of a model, without loss scaling."""
    return getattr(model.optimizer, "inner_optimizer", model.optimizer)


def number_in(variable) -> int | float:
    """Returns the number in a variable, which a strategy may have mirrored."""
    return ops.convert_to_numpy(variable).item()


@checked
def shift_schedule(model: keras.Model, shift: int) -> None:
    """Moves the learning rate's schedule of a compiled model; nothing for a constant rate."""
    optimizer = inner_optimizer(model)
    schedule = optimizer._learning_rate
    if isinstance(schedule, ShiftedSchedule):
        schedule.shift.assign(shift)
    elif isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
        optimizer._learning_rate = ShiftedSchedule(schedule, shift)
        model.make_train_function(force=True)


@checked
def restart_optimizer(model: keras.Model) -> None:
    """Gives a model a new optimizer for what is trainable now; the learning rate goes on.

    Keras' optimizers only know the variables of their first step. Moments and averages of all
    variables start anew: among the old ones, a new moment of zero makes steps of Adam many times
    too large.

    Args:
        model: a compiled model whose layers have been frozen or unfrozen.
    """
    old, strategy = inner_optimizer(model), getattr(model, "distribute_strategy", None)
    config, schedule = old.get_config(), old._learning_rate
    with strategy.scope() if strategy is not None else contextlib.nullcontext():
        if isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
            done = number_in(old.iterations)
            if isinstance(schedule, ShiftedSchedule):
                done, schedule = done + number_in(schedule.shift), schedule.schedule
            config["learning_rate"] = ShiftedSchedule(schedule, done)
        optimizer = type(old).from_config(config)
        if old is not model.optimizer:
            scale = number_in(model.optimizer.dynamic_scale)
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=scale)
        optimizer.build(model.trainable_variables)
    model.optimizer = optimizer
    model.make_train_function(force=True)


@checked
class _ByVariable:
    """Mix-in that treats some variables otherwise: no weight decay, or a lower learning rate.

    The names are part of the config; Keras' `exclude_from_weight_decay` is not saved.
    """

    def __init__(
        self,
        *args,
        excluded_variables: Iterable[str] = EXCLUDED_VARIABLES,
        backbone_learning_rate_factor: float = 1.0,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.excluded_variables = tuple(excluded_variables)
        check_positive(backbone_learning_rate_factor=backbone_learning_rate_factor)
        self.backbone_learning_rate_factor = float(backbone_learning_rate_factor)

    def build(self, variables):
        if not self.built:
            # Compare whole names: Keras compares parts, and would find "scale" in "rescale".
            excluded = [v for v in variables if v.name in self.excluded_variables]
            self.exclude_from_weight_decay(var_list=excluded)
            backbone = [v for v in variables if getattr(v, "in_backbone", False)]
            self._slow = {self._var_key(v) for v in backbone}
            factor = self.backbone_learning_rate_factor
            if factor != 1.0 and not any(hasattr(v, "in_backbone") for v in variables):
                raise ValueError(
                    "`backbone_learning_rate_factor` needs a `RefineDet`, which knows its "
                    f"backbone. Received: backbone_learning_rate_factor={factor}"
                )
        super().build(variables)

    def rate_of(self, variable, learning_rate):
        """Returns the learning rate of one variable."""
        slow = self._var_key(variable) in self._slow
        return learning_rate * self.backbone_learning_rate_factor if slow else learning_rate

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient, variable, self.rate_of(variable, learning_rate))

    def get_config(self):
        return {
            **super().get_config(),
            "excluded_variables": list(self.excluded_variables),
            "backbone_learning_rate_factor": self.backbone_learning_rate_factor,
        }


@keras.saving.register_keras_serializable("keras_resnest")
class SGDWithL2(_ByVariable, keras.optimizers.SGD):
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
        backbone_learning_rate_factor: learning rate of a `RefineDet`'s backbone, relative to that
            of its other layers.
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
class AdamW(_ByVariable, keras.optimizers.AdamW):
    """Keras' AdamW that excludes variables from weight decay by name.

    Args:
        *args: arguments of `keras.optimizers.AdamW`.
        excluded_variables: names of variables without weight decay.
        backbone_learning_rate_factor: learning rate of a `RefineDet`'s backbone, relative to that
            of its other layers; also scales its weight decay.
        **kwargs: arguments of `keras.optimizers.AdamW`.

    Example:
        >>> model.compile(AdamW(1e-3, weight_decay=0.05, backbone_learning_rate_factor=0.1))
    """

    def _apply_weight_decay(self, variables):
        """In `update_step`, at the learning rate of each variable."""

    def update_step(self, gradient, variable, learning_rate):
        if self.weight_decay and self._use_weight_decay(variable):
            decay = ops.cast(self.weight_decay, variable.dtype)
            rate = ops.cast(self.rate_of(variable, learning_rate), variable.dtype)
            self.assign_sub(variable, variable * decay * rate)
        super().update_step(gradient, variable, learning_rate)
