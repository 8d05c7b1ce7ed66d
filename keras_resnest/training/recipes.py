"""Training recipes: optimizer, schedule and regularization.

`RECIPES` holds published recipes and two for small datasets.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, Literal

import keras

from keras_resnest.backbones import VARIANTS
from keras_resnest.checks import check_positive, checked
from keras_resnest.training.optimizers import EXCLUDED_VARIABLES, AdamW, LinearWarmup, SGDWithL2

__all__ = ["RECIPES", "AdamW", "LinearWarmup", "Recipe", "SGDWithL2"]

_SCALING_POWERS = {"linear": 1.0, "sqrt": 0.5}


@checked
@dataclasses.dataclass(frozen=True)
class Recipe:
    """Hyperparameters of a training run: all but the network and the data.

    Change single values with `dataclasses.replace`.

    Args:
        name: name of the recipe.
        source: publication and code that the values come from.
        batch_size: images per step, over all replicas, that the other values are tuned for.
        learning_rate: highest learning rate.
        unit: `"steps"` or `"epochs"`, the unit of `duration`, `warmup` and `boundaries`.
        duration: length of the training.
        warmup: length of the linear warm-up from 0.
        schedule: `"cosine"`, or `"steps"` to multiply the rate by `decay_factor` at `boundaries`.
        boundaries: when the rate drops, for `schedule="steps"`.
        decay_factor: factor of the rate at each boundary.
        final_ratio: last learning rate divided by the highest, for `schedule="cosine"`.
        algorithm: `"sgd"` (`SGDWithL2`) or `"adamw"` (`AdamW`).
        momentum: momentum of SGD.
        nesterov: whether SGD uses Nesterov momentum.
        weight_decay: L2 regularization with SGD, decoupled decay with AdamW.
        excluded_variables: names of variables without weight decay.
        learning_rate_rule: how the rate scales with the batch size: `"linear"` (arXiv 1706.02677,
            for SGD) or `"sqrt"` (arXiv 2205.10330, for Adam).
        global_clipnorm: largest norm of all gradients together, or None.
        ema_momentum: share of the old average in the moving average of the weights, in (0, 1),
            which replaces the weights at the end of `fit`; None for no average.
        label_smoothing: fraction of the label that is spread over all classes.
        mixup: parameter of mixup's beta distribution; 0 disables it.
        augmentation: name of an augmentation; for classifiers in `CLASSIFICATION_AUGMENTATIONS`.
        crop_size: side of a classifier's images in pixels, or None.
        crop_ratio: `crop_size` divided by the resized shorter side in evaluation.
        dropblock_rate: DropBlock rate of the last two stages.
        dropout_rate: dropout rate before the classifier.
        zero_init_last_gamma: whether residual branches start at zero.
        networks: values that differ for some networks, by name; see `for_network`.
        steps_per_epoch: batches per epoch, if known.

    Raises:
        ValueError: if a value is out of range or not among the choices.

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
    unit: Literal["steps", "epochs"]
    duration: int
    warmup: int
    schedule: Literal["cosine", "steps"] = "cosine"
    boundaries: tuple[int, ...] = ()
    decay_factor: float = 0.1
    final_ratio: float = 0.0
    algorithm: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    excluded_variables: tuple[str, ...] = EXCLUDED_VARIABLES
    learning_rate_rule: Literal["linear", "sqrt"] = "linear"
    global_clipnorm: float | None = None
    ema_momentum: float | None = None
    label_smoothing: float = 0.0
    mixup: float = 0.0
    augmentation: str | None = None
    crop_size: int | None = None
    crop_ratio: float = 0.875
    dropblock_rate: float = 0.0
    dropout_rate: float = 0.0
    zero_init_last_gamma: bool = False
    networks: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict, hash=False)
    steps_per_epoch: int | None = None

    def __post_init__(self):
        check_positive(
            batch_size=self.batch_size, duration=self.duration, learning_rate=self.learning_rate
        )
        if not 0 <= self.warmup <= self.duration:
            raise ValueError(
                "`warmup` must be between 0 and `duration`. "
                f"Received: warmup={self.warmup}, duration={self.duration}"
            )
        if self.ema_momentum is not None and not 0 < self.ema_momentum < 1:
            raise ValueError(
                "`ema_momentum` must be above 0 and below 1, or None. "
                f"Received: ema_momentum={self.ema_momentum!r}"
            )
        ascending = list(self.boundaries) == sorted(self.boundaries)
        if not ascending or (self.schedule == "steps") != bool(self.boundaries):
            raise ValueError(
                '`boundaries` must be ascending, and given for schedule="steps" only. '
                f"Received: boundaries={self.boundaries}, schedule={self.schedule!r}"
            )

    @checked
    def for_network(self, name: str) -> "Recipe":
        """Returns the recipe with the values of one network, for instance its image size.

        Args:
            name: a name listed by `kr.list_models()`, in any case. Other names change nothing.
        """
        return dataclasses.replace(self, **self.networks.get(name.lower(), {}))

    @checked
    def scaled(
        self,
        batch_size: int,
        steps_per_epoch: int | None = None,
        epochs: float | None = None,
        dataset_size: int | None = None,
    ) -> "Recipe":
        """Returns the recipe in steps, for another batch size or length.

        The learning rate follows `learning_rate_rule`; the total number of images stays the same.
        `epochs` also scales warm-up and boundaries.

        Args:
            batch_size: images per step, over all replicas.
            steps_per_epoch: batches per epoch. This or `dataset_size` is required for `epochs`
                and for recipes in epochs.
            epochs: length of the training. Default: that of the recipe.
            dataset_size: images per epoch, instead of `steps_per_epoch`; a smaller last batch is
                dropped.

        Raises:
            ValueError: if a number is not positive or missing.

        Example:
            >>> RECIPES["refinedet_voc"].scaled(batch_size=16).duration
            240000
        """
        check_positive(
            batch_size=batch_size,
            steps_per_epoch=steps_per_epoch,
            epochs=epochs,
            dataset_size=dataset_size,
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
        duration = self._scaled_duration(ratio, steps_per_epoch, epochs)
        stretch = duration / self.duration
        return dataclasses.replace(
            self,
            batch_size=batch_size,
            learning_rate=self.learning_rate * ratio ** _SCALING_POWERS[self.learning_rate_rule],
            unit="steps",
            duration=duration,
            warmup=min(duration, max(1, round(self.warmup * stretch))) if self.warmup else 0,
            boundaries=tuple(round(time * stretch) for time in self.boundaries),
            steps_per_epoch=steps_per_epoch,
        )

    def _scaled_duration(self, ratio: float, steps_per_epoch, epochs) -> int:
        if epochs is None and self.unit == "steps":
            return max(1, round(self.duration / ratio))
        if steps_per_epoch is None:
            raise ValueError(
                "`steps_per_epoch` or `dataset_size` is required to count the epochs of "
                f"{self.name!r}. Received: neither"
            )
        epochs = self.duration if epochs is None else epochs
        return max(1, round(epochs * steps_per_epoch))

    @property
    def epochs(self) -> int:
        """Number of epochs; the last one may be incomplete.

        Raises ValueError if the recipe is in steps and `steps_per_epoch` is unknown.
        """
        if self.unit == "epochs":
            return self.duration
        if self.steps_per_epoch is None:
            raise ValueError("`epochs` needs the `steps_per_epoch` or `dataset_size` of `scaled`")
        return -(-self.duration // self.steps_per_epoch)

    def learning_rate_schedule(self) -> keras.optimizers.schedules.LearningRateSchedule:
        """Returns the learning rate as a serializable Keras schedule.

        Raises ValueError if the recipe is in epochs: call `scaled` first.
        """
        if self.unit != "steps":
            raise ValueError(f"{self.name!r} is in epochs: use `scaled(...)` first")
        schedules = keras.optimizers.schedules
        if self.schedule == "cosine":
            decay_steps = max(1, self.duration - self.warmup)
            if not self.warmup:
                return schedules.CosineDecay(self.learning_rate, decay_steps, self.final_ratio)
            warmup = {"warmup_target": self.learning_rate, "warmup_steps": self.warmup}
            return schedules.CosineDecay(0.0, decay_steps, self.final_ratio, **warmup)
        rates = [self.learning_rate * self.decay_factor**i for i in range(len(self.boundaries) + 1)]
        # In Caffe and PyTorch the rate falls at step `boundary`, in Keras one step later.
        steps = schedules.PiecewiseConstantDecay([b - 1 for b in self.boundaries], rates)
        return LinearWarmup(steps, self.warmup) if self.warmup else steps

    def optimizer(self, **kwargs) -> keras.optimizers.Optimizer:
        """Returns the optimizer with schedule, weight decay and clipping.

        Raises ValueError if the recipe is in epochs: call `scaled` first.

        Args:
            **kwargs: arguments of the optimizer, such as `use_ema`; they override the recipe's.
        """
        options = {
            "learning_rate": self.learning_rate_schedule(),
            "weight_decay": self.weight_decay or None,
            "excluded_variables": self.excluded_variables,
            "global_clipnorm": self.global_clipnorm,
        }
        if self.ema_momentum is not None:
            options |= {"use_ema": True, "ema_momentum": self.ema_momentum}
        if self.algorithm == "sgd":
            options |= {"momentum": self.momentum, "nesterov": self.nesterov}
            return SGDWithL2(**{**options, **kwargs})
        return AdamW(**{**options, **kwargs})

    @checked
    def network_arguments(self, name: str) -> dict:
        """Returns the recipe's arguments for `create_backbone`, as far as the network has them.

        These are `dropblock_rate`, `dropout_rate` and `zero_init_last_gamma`.

        Args:
            name: a name listed by `kr.list_models()`, in any case.

        Raises:
            ValueError: if there is no such network.
        """
        if name.lower() not in VARIANTS:
            raise ValueError(f"`name` must be the name of a network. Received: name={name!r}")
        recipe = self.for_network(name)
        known = inspect.signature(VARIANTS[name.lower()].network).parameters
        wanted = ("dropblock_rate", "dropout_rate", "zero_init_last_gamma")
        return {key: getattr(recipe, key) for key in wanted if key in known}


_REFINEDET = {
    # solver_param of the authors' scripts: base_lr = 0.00004 * 25 with 4 GPUs of 8 images.
    "batch_size": 32,
    "learning_rate": 1e-3,
    "unit": "steps",
    "schedule": "steps",
    "momentum": 0.9,
    "weight_decay": 5e-4,
    # Warm-up and clipping are ours: the authors start from ImageNet weights, without which losses
    # can explode in the first steps. mmdetection clips at 35; normal gradients stay below.
    "warmup": 1000,
    "global_clipnorm": 35.0,
    "augmentation": "ssd",
}
_SMALL_DATASET = {
    "unit": "epochs",
    "final_ratio": 0.01,
    "algorithm": "adamw",
    "weight_decay": 0.05,
    "learning_rate_rule": "sqrt",
    "global_clipnorm": 10.0,
    "augmentation": "mild",
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
        global_clipnorm=10.0,  # ours; far above normal gradients
        label_smoothing=0.1,
        mixup=0.2,
        augmentation="rand_augment",  # as in the authors' PyTorch code; AutoAugment in the paper
        crop_size=224,
        dropblock_rate=0.1,
        zero_init_last_gamma=True,
        networks={
            "resnest101": {"crop_size": 256},
            # 320 / (320 + 32), as in the authors' verification.
            "resnest200": {"crop_size": 320, "crop_ratio": 0.909, "dropout_rate": 0.2},
            "resnest269": {"crop_size": 416, "crop_ratio": 0.929, "dropout_rate": 0.2},
        },
    ),
    Recipe(
        "detector_from_scratch",
        source="this project, measured on BCCD and on synthetic shapes",
        batch_size=8,
        learning_rate=1e-3,
        duration=60,
        warmup=3,
        **_SMALL_DATASET,
    ),
    Recipe(
        "finetune_classifier",
        source="this project",
        batch_size=32,
        learning_rate=5e-4,
        duration=20,
        warmup=1,
        label_smoothing=0.1,
        crop_size=224,
        **_SMALL_DATASET,
    ),
)

#: All recipes by name.
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _RECIPES}
