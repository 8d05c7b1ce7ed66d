"""Recipes: how the published networks were trained, as rows of a table.

A recipe says everything that is not the network and not the data: optimizer, schedule, weight
decay, and the regularization that goes with them. `RECIPES` holds the published ones and two for
small datasets; `Recipe.scaled` brings one to another batch size, dataset or length.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from keras_resnest.backbones import VARIANTS

#: Names of variables that are not decayed: biases, and what normalization layers learn.
NOT_DECAYED = ("bias", "gamma", "beta")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained. `dataclasses.replace` makes another recipe out of one.

    Args:
        name: name of the row.
        source: where the numbers are from.
        batch_size: images per step, over all replicas, that the other numbers belong to.
        learning_rate: highest learning rate.
        unit: `"steps"` or `"epochs"`, what `duration`, `warmup` and `boundaries` count.
        duration: length of the training.
        warmup: in this time the learning rate rises in a line from 0.
        schedule: `"cosine"`, from the highest rate down to `final_share` of it; or `"steps"`, the
            rate times `decay_factor` at every one of `boundaries`.
        boundaries: times at which the rate falls, with `schedule="steps"`.
        decay_factor: what the rate is multiplied by at each boundary.
        final_share: share of the highest rate at the end of `schedule="cosine"`.
        algorithm: `"sgd"` (`SGDWithL2`) or `"adamw"` (`AdamW`).
        momentum: of SGD.
        nesterov: whether the momentum is Nesterov's.
        weight_decay: with SGD the factor of L2 regularization, with AdamW decoupled.
        excluded_variables: names of variables that are not decayed.
        learning_rate_rule: how the learning rate follows the batch size: `"linear"`
            (arXiv 1706.02677, for SGD) or `"sqrt"` (arXiv 2205.10330, for Adam).
        global_clipnorm: largest norm of all gradients together, or None.
        label_smoothing: share of the label that is spread over all classes.
        mixup: parameter of the beta distribution of mixup, 0 for none.
        augmentation: name of an augmentation, for classifiers one of
            `keras_resnest.data.CLASSIFICATION_AUGMENTATIONS`.
        crop_size: side of a classifier's images in pixels, or None.
        crop_share: crop of the evaluation as a share of the resized shorter side.
        dropblock_rate: of the last two stages.
        dropout_rate: before the classifier.
        zero_init_last_gamma: whether blocks start as their shortcut.
        networks: what differs for single networks, by name; see `for_network`.
        steps_per_epoch: batches in one pass over the data, where known.

    Raises:
        ValueError: if an argument has a value that no training can be made from.

    Example:
        >>> recipe = RECIPES["resnest_imagenet"].for_network("resnest101")
        >>> recipe = recipe.scaled(batch_size=512, dataset_size=1_281_167)
        >>> model.compile(recipe.optimizer(), "categorical_crossentropy")
        >>> model.fit(batches, epochs=recipe.epochs)
    """

    name: str
    source: str
    batch_size: int
    learning_rate: float
    unit: str
    duration: int
    warmup: int
    schedule: str = "cosine"
    boundaries: tuple[int, ...] = ()
    decay_factor: float = 0.1
    final_share: float = 0.0
    algorithm: str = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    excluded_variables: tuple[str, ...] = NOT_DECAYED
    learning_rate_rule: str = "linear"
    global_clipnorm: float | None = None
    label_smoothing: float = 0.0
    mixup: float = 0.0
    augmentation: str | None = None
    crop_size: int | None = None
    crop_share: float = 0.875
    dropblock_rate: float = 0.0
    dropout_rate: float = 0.0
    zero_init_last_gamma: bool = False
    networks: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict, hash=False)
    steps_per_epoch: int | None = None

    def __post_init__(self):
        choices = {
            "unit": ("steps", "epochs"),
            "schedule": ("cosine", "steps"),
            "algorithm": ("sgd", "adamw"),
            "learning_rate_rule": ("linear", "sqrt"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"`{name}` must be one of {allowed}. Received: {name}={getattr(self, name)!r}"
                )
        _check_positive(
            batch_size=self.batch_size, duration=self.duration, learning_rate=self.learning_rate
        )
        if not 0 <= self.warmup <= self.duration:
            raise ValueError(
                "`warmup` must be a part of `duration`. "
                f"Received: warmup={self.warmup}, duration={self.duration}"
            )
        rising = list(self.boundaries) == sorted(self.boundaries)
        if not rising or (self.schedule == "steps") != bool(self.boundaries):
            raise ValueError(
                '`boundaries` must rise, with schedule="steps" only. '
                f"Received: boundaries={self.boundaries}, schedule={self.schedule!r}"
            )

    def for_network(self, name: str) -> "Recipe":
        """The recipe with what differs for one network, such as the size of its images.

        Args:
            name: name of a network, as in `kr.list_models()`. Case does not matter.

        Returns:
            A `Recipe`; the same numbers, where nothing differs.
        """
        return dataclasses.replace(self, **self.networks.get(name.lower(), {}))

    def scaled(
        self,
        batch_size: int,
        steps_per_epoch: int | None = None,
        dataset_size: int | None = None,
        epochs: float | None = None,
    ) -> "Recipe":
        """The recipe in steps, for another batch size or length.

        The learning rate grows with the batch size (`learning_rate_rule`) and the number of
        steps shrinks with it, so that as many images are seen. With `epochs`, warm-up and
        boundaries are compressed or stretched in proportion.

        Args:
            batch_size: images per step, over all replicas.
            steps_per_epoch: batches in one pass over the data; needed for recipes that count
                epochs, and with `epochs`.
            dataset_size: images in one pass, in place of `steps_per_epoch`; a last, smaller
                batch is not counted.
            epochs: length of the training in passes over the data. Default: that of the recipe.

        Returns:
            A `Recipe` with `unit="steps"`.

        Raises:
            ValueError: if a number is not positive or missing.

        Example:
            >>> RECIPES["refinedet_voc"].scaled(batch_size=16).duration
            240000
        """
        _check_positive(
            batch_size=batch_size,
            steps_per_epoch=steps_per_epoch,
            dataset_size=dataset_size,
            epochs=epochs,
        )
        if steps_per_epoch is not None and dataset_size is not None:
            raise ValueError(
                "Only one of `steps_per_epoch` and `dataset_size` can be given. Received: "
                f"steps_per_epoch={steps_per_epoch}, dataset_size={dataset_size}"
            )
        ratio = batch_size / self.batch_size
        if dataset_size is not None:
            steps_per_epoch = max(1, dataset_size // batch_size)
        elif steps_per_epoch is None and self.steps_per_epoch is not None:
            steps_per_epoch = max(1, round(self.steps_per_epoch / ratio))
        duration = self._steps(ratio, steps_per_epoch, epochs)
        stretch = duration / self.duration
        return dataclasses.replace(
            self,
            batch_size=batch_size,
            learning_rate=self.learning_rate * ratio ** _POWERS[self.learning_rate_rule],
            unit="steps",
            duration=duration,
            warmup=min(duration, max(1, round(self.warmup * stretch))) if self.warmup else 0,
            boundaries=tuple(round(time * stretch) for time in self.boundaries),
            steps_per_epoch=steps_per_epoch,
        )

    def _steps(self, ratio, steps_per_epoch, epochs) -> int:
        if epochs is None and self.unit == "steps":
            return max(1, round(self.duration / ratio))
        if steps_per_epoch is None:
            raise ValueError(
                f"`steps_per_epoch` or `dataset_size` is needed to count epochs of {self.name!r}. "
                "Received: neither"
            )
        epochs = self.duration if epochs is None else epochs
        return max(1, round(epochs * steps_per_epoch))

    @property
    def epochs(self) -> int:
        """Passes over the data, the last one perhaps not a whole one.

        Raises:
            ValueError: if the recipe is in steps and `steps_per_epoch` is not known.
        """
        if self.unit == "epochs":
            return self.duration
        if self.steps_per_epoch is None:
            raise ValueError("`scaled` was not told `steps_per_epoch` or `dataset_size`")
        return -(-self.duration // self.steps_per_epoch)

    def learning_rate_schedule(self) -> keras.optimizers.schedules.LearningRateSchedule:
        """The learning rate by step, a serializable Keras schedule.

        Raises:
            ValueError: if the recipe counts epochs: use `scaled` first.
        """
        if self.unit != "steps":
            raise ValueError(f"{self.name!r} counts epochs: use `scaled(...)` first")
        schedules = keras.optimizers.schedules
        if self.schedule == "cosine":
            decay_steps = max(1, self.duration - self.warmup)
            if not self.warmup:
                return schedules.CosineDecay(self.learning_rate, decay_steps, self.final_share)
            return schedules.CosineDecay(
                0.0,
                decay_steps,
                self.final_share,
                warmup_target=self.learning_rate,
                warmup_steps=self.warmup,
            )
        rates = [self.learning_rate * self.decay_factor**i for i in range(len(self.boundaries) + 1)]
        # Caffe's and PyTorch's step number `boundary` has the lower rate already, Keras' not yet.
        steps = schedules.PiecewiseConstantDecay([b - 1 for b in self.boundaries], rates)
        return LinearWarmup(steps, self.warmup) if self.warmup else steps

    def optimizer(self, **kwargs) -> keras.optimizers.Optimizer:
        """The optimizer with its schedule, weight decay and clipping.

        Args:
            **kwargs: more arguments of the optimizer, such as `use_ema` or
                `gradient_accumulation_steps`; or others in place of the recipe's.

        Raises:
            ValueError: if the recipe counts epochs: use `scaled` first.
        """
        options = {
            "learning_rate": self.learning_rate_schedule(),
            "weight_decay": self.weight_decay or None,
            "excluded_variables": self.excluded_variables,
            "global_clipnorm": self.global_clipnorm,
        }
        if self.algorithm == "sgd":
            options |= {"momentum": self.momentum, "nesterov": self.nesterov}
            return SGDWithL2(**{**options, **kwargs})
        return AdamW(**{**options, **kwargs})

    def network_arguments(self, name: str) -> dict:
        """Arguments of `create_backbone` that the recipe asks for and the network knows.

        Args:
            name: name of a network, as in `kr.list_models()`. Case does not matter.

        Returns:
            Dict with some of `dropblock_rate`, `dropout_rate` and `zero_init_last_gamma`.

        Raises:
            ValueError: if there is no such network.
        """
        if name.lower() not in VARIANTS:
            raise ValueError(f"`name` must be the name of a network. Received: name={name!r}")
        recipe = self.for_network(name)
        known = inspect.signature(VARIANTS[name.lower()].network).parameters
        wanted = ("dropblock_rate", "dropout_rate", "zero_init_last_gamma")
        return {key: getattr(recipe, key) for key in wanted if key in known}


_POWERS = {"linear": 1.0, "sqrt": 0.5}


def _check_positive(**numbers) -> None:
    for name, number in numbers.items():
        if number is not None and not number > 0:
            raise ValueError(f"`{name}` must be positive. Received: {name}={number!r}")


@keras.saving.register_keras_serializable("keras_resnest")
class LinearWarmup(keras.optimizers.schedules.LearningRateSchedule):
    """Another schedule, whose first steps rise in a line from 0.

    Keras' `CosineDecay` warms up by itself; the other schedules of Keras do not.

    Args:
        schedule: `keras.optimizers.schedules.LearningRateSchedule`.
        warmup_steps: positive integer; step `n` has `n / warmup_steps` of the schedule's rate.

    Raises:
        ValueError: if `warmup_steps` is not positive.

    Example:
        >>> steps = keras.optimizers.schedules.PiecewiseConstantDecay([79_999], [1e-3, 1e-4])
        >>> float(LinearWarmup(steps, 1000)(500))
        0.0005
    """

    def __init__(self, schedule, warmup_steps: int):
        super().__init__()
        _check_positive(warmup_steps=warmup_steps)
        self.schedule = schedule
        self.warmup_steps = warmup_steps

    def __call__(self, step):
        share = ops.cast(step, "float32") / self.warmup_steps
        return self.schedule(step) * ops.minimum(share, 1.0)

    def get_config(self):
        schedule = keras.optimizers.schedules.serialize(self.schedule)
        return {"schedule": schedule, "warmup_steps": self.warmup_steps}

    @classmethod
    def from_config(cls, config):
        schedule = keras.optimizers.schedules.deserialize(config["schedule"])
        return cls(schedule, config["warmup_steps"])


class _NamedExclusions:
    """Excludes variables from weight decay by name, and keeps the names in the config.

    What Keras' own `exclude_from_weight_decay` was told is lost when a model is saved and loaded.
    """

    def __init__(self, *args, excluded_variables=NOT_DECAYED, **kwargs):
        super().__init__(*args, **kwargs)
        self.excluded_variables = tuple(excluded_variables)

    def build(self, variables):
        if not self.built:
            # By the whole name: a part of it, as Keras compares, would find "scale" in "rescale".
            excluded = [v for v in variables if v.name in self.excluded_variables]
            self.exclude_from_weight_decay(var_list=excluded)
        super().build(variables)

    def get_config(self):
        return {**super().get_config(), "excluded_variables": list(self.excluded_variables)}


@keras.saving.register_keras_serializable("keras_resnest")
class SGDWithL2(_NamedExclusions, keras.optimizers.SGD):
    """SGD with momentum whose weight decay is L2 regularization, as in Caffe and PyTorch.

    The published recipes were trained so:

        velocity = momentum * velocity - learning_rate * (gradient + weight_decay * variable)
        variable = variable + velocity

    The weight decay of `keras.optimizers.SGD` bypasses the momentum (it is decoupled): with the
    same factor and a momentum of 0.9 it decays a tenth as much. Gradients are clipped before the
    decay is added, as in Caffe.

    Args:
        *args: arguments of `keras.optimizers.SGD`.
        excluded_variables: names of the variables that are not decayed.
        **kwargs: arguments of `keras.optimizers.SGD`.

    Example:
        >>> model.compile(SGDWithL2(1e-3, momentum=0.9, weight_decay=5e-4))
    """

    def _apply_weight_decay(self, variables):
        """Keras' decoupled decay does not take place."""

    def update_step(self, gradient, variable, learning_rate):
        if self.weight_decay and self._use_weight_decay(variable):
            decay = ops.cast(self.weight_decay, variable.dtype)
            gradient = ops.cast(gradient, variable.dtype) + decay * variable
        super().update_step(gradient, variable, learning_rate)


@keras.saving.register_keras_serializable("keras_resnest")
class AdamW(_NamedExclusions, keras.optimizers.AdamW):
    """Keras' AdamW with weight decay that leaves out variables by name, also after loading.

    Args:
        *args: arguments of `keras.optimizers.AdamW`.
        excluded_variables: names of the variables that are not decayed.
        **kwargs: arguments of `keras.optimizers.AdamW`.

    Example:
        >>> model.compile(AdamW(1e-3, weight_decay=0.05))
    """


# --- The table -------------------------------------------------------------------------------

_REFINEDET = {
    # solver_param of the authors' scripts: base_lr = 0.00004 * 25 with 4 GPUs of 8 images.
    "batch_size": 32,
    "learning_rate": 1e-3,
    "unit": "steps",
    "schedule": "steps",
    "momentum": 0.9,
    "weight_decay": 5e-4,
    # The authors have neither warm-up nor clipping. Their first steps start from a network that
    # was trained on ImageNet; with others they are where losses explode. 35 is what detectors of
    # mmdetection are clipped at; a healthy run stays below it after the first steps.
    "warmup": 1000,
    "global_clipnorm": 35.0,
    "augmentation": "ssd",
}

_RECIPES = (
    Recipe(
        "refinedet_voc",
        source="arXiv 1711.06897, section 4.1; "
        "github.com/sfzhang15/RefineDet examples/refinenet/VGG16_VOC2007_320.py",
        duration=120_000,
        boundaries=(80_000, 100_000),
        **_REFINEDET,
    ),
    Recipe(
        "refinedet_coco",
        source="arXiv 1711.06897, section 4.3; "
        "github.com/sfzhang15/RefineDet examples/refinedet/VGG16_COCO_320.py",
        duration=400_000,
        boundaries=(280_000, 360_000),
        **_REFINEDET,
    ),
    Recipe(
        "resnest_imagenet",
        source="arXiv 2004.08955 (version 2), section 4.2; "
        "github.com/zhanghang1989/ResNeSt scripts/gluon (README.md, train.py)",
        batch_size=256,
        learning_rate=0.1,  # 0.05 for each GPU of 128 images
        unit="epochs",
        duration=270,
        warmup=5,
        nesterov=True,  # train.py: optimizer "nag"
        weight_decay=1e-4,
        # Not the authors'. Far above the norms of a healthy run.
        global_clipnorm=10.0,
        label_smoothing=0.1,
        mixup=0.2,
        augmentation="rand_augment",  # of the authors' PyTorch code; AutoAugment in the paper
        crop_size=224,
        dropblock_rate=0.1,
        zero_init_last_gamma=True,
        networks={
            "resnest101": {"crop_size": 256},
            # 320 / (320 + 32), as the authors' verification cuts.
            "resnest200": {"crop_size": 320, "crop_share": 0.909, "dropout_rate": 0.2},
            "resnest269": {"crop_size": 416, "crop_share": 0.929, "dropout_rate": 0.2},
        },
    ),
    Recipe(
        "detector_from_scratch",
        source="this project, measured on BCCD and on synthetic shapes",
        batch_size=8,
        learning_rate=1e-3,
        unit="epochs",
        duration=60,
        warmup=3,
        final_share=0.01,
        algorithm="adamw",
        weight_decay=0.05,
        learning_rate_rule="sqrt",
        global_clipnorm=10.0,
        augmentation="mild",
    ),
    Recipe(
        "finetune_classifier",
        source="this project",
        batch_size=32,
        learning_rate=5e-4,
        unit="epochs",
        duration=20,
        warmup=1,
        final_share=0.01,
        algorithm="adamw",
        weight_decay=0.05,
        learning_rate_rule="sqrt",
        global_clipnorm=10.0,
        label_smoothing=0.1,
        augmentation="mild",
        crop_size=224,
    ),
)

#: All recipes by name.
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _RECIPES}
