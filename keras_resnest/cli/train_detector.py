"""`keras-resnest train` for detectors: options, data, model and report."""

import dataclasses
import json
from pathlib import Path

import keras_resnest as kr
from keras_resnest.atomic import atomic_file
from keras_resnest.cli.common import (
    add_reading_arguments,
    fraction,
    positive,
    reading_options,
)
from keras_resnest.data.rare_classes import METHODS
from keras_resnest.data.readers.files import read_text

EPOCHS = "60, or those of the published recipe"
BATCH_SIZE = 8
OUTPUT = "runs/train"
RECIPES = ("detector_from_scratch", "refinedet_voc", "refinedet_coco")
AUGMENTATIONS = ("mild", "ssd", "flip")
BATCH_NORMS = ("train", "frozen", "synchronized")


def add_arguments(parser) -> None:
    add_reading_arguments(parser)
    add = parser.add_argument
    add("--model", default="refinedet_tiny", help="`list --kind detectors`; default: %(default)s")
    add("--image-size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="multiples of 64")
    sides, text = (32, 64, 128, 256), "at strides 8, 16, 32, 64; default: 32 64 128 256"
    add("--anchor-sizes", type=float, nargs=4, default=sides, metavar="PIXELS", help=text)
    add("--fit-anchors", action="store_true", help="fit the anchor sizes to the training data")
    add("--backbone-weights", help='"imagenet", another tag or a file; default: random weights')
    text = "frozen: for pretrained weights and small batches; default: %(default)s"
    add("--batch-norm", choices=BATCH_NORMS, default=BATCH_NORMS[0], help=text)
    add("--recipe", choices=RECIPES, default=RECIPES[0], help="default: %(default)s")
    add("--augmentation", choices=AUGMENTATIONS, default="mild", help="default: %(default)s")
    add("--vertical-flip", action="store_true", help="for images without a natural orientation")
    add("--mosaic", type=fraction, default=0.0, metavar="PROBABILITY", help="four images in one")
    add("--mixup", type=fraction, default=0.0, metavar="PROBABILITY", help="two images in one")
    text = f"of rare classes: {', '.join(METHODS)} or a JSON file {{class name: weight}}"
    add("--class-weight", metavar="METHOD", help=text)
    text = "sides in pixels; each batch draws one of them"
    add("--multi-scale", type=positive(), nargs="+", metavar="SIDE", help=text)
    add("--no-cache", action="store_true", help="decode images in every epoch, for large datasets")
    text = "and after the first and the last epoch; default: %(default)s"
    add("--evaluate-every", type=positive(), default=10, metavar="EPOCHS", help=text)
    add("--checkpoint-steps", type=positive(), metavar="STEPS", help="also within epochs")


class Training:
    """The model and everything that `fit` needs."""

    def __init__(self, arguments):
        self.arguments, self.output = arguments, arguments.output
        if (name := arguments.model) not in (names := kr.builders.BUILDERS):
            raise ValueError(f"--model must be one of {', '.join(names)}, not {name}")
        batch_size = arguments.batch_size or BATCH_SIZE
        strategy = kr.training.create_strategy()
        kr.training.check_global_batch({batch_size}, strategy.num_replicas_in_sync)
        self.train_set, self.test_set = kr.data.read_train_test(
            arguments.data,
            train_split=arguments.train_split,
            test_split=arguments.test_split,
            seed=arguments.seed,
            **reading_options(arguments),
        )
        self.recipe = make_recipe(arguments, batch_size, len(self.train_set))
        with strategy.scope():
            self.model = build_model(arguments, self.train_set)
            self.model.compile(self.recipe.optimizer())
        self.output.mkdir(parents=True, exist_ok=True)
        image_shape = self.model.image_shape
        self.train_batches = kr.training.distribute_batches(
            strategy, batch_maker(arguments, self.train_set, image_shape), batch_size
        )
        self.test_batches = kr.data.evaluation_batches(
            self.test_set, image_shape, batch_size, cache=not arguments.no_cache
        )
        chief, every = kr.training.is_chief(strategy), arguments.evaluate_every
        if chief:
            kr.visualization.plot_dataset(self.train_set, path=self.output / "dataset.png")
        self.measures = [
            kr.callbacks.DetectionEvaluation(self.test_batches, frequency=every, verbose=chief)
        ]
        self.plots = [
            kr.callbacks.DetectionPlot(self.test_batches, self.output / "progress", frequency=every)
        ]

    def fit(self, callbacks, verbose):
        options = {"epochs": self.recipe.epochs, "callbacks": callbacks, "verbose": verbose}
        return self.model.fit(self.train_batches, **options)

    def evaluate(self):
        return kr.evaluation.evaluate_detections(self.model, self.test_batches)

    def report(self, history, result) -> dict:
        """Writes plots and models; returns the results."""
        output = self.output
        if history.epoch:
            kr.visualization.plot_history([history, *self.measures], path=output / "history.png")
        kr.visualization.plot_precision_recall(result, path=output / "precision_recall.png")
        plot_examples(self.model, self.test_set, range(6), output / "detections.png")
        with atomic_file(output / "detector.keras") as file:
            self.model.save(file)
        self.model.export(output / "serving" / "1")
        print(f"{result}\nmAP@0.5 {result.mAP:.3f}")
        return {"mAP50": result.mAP, "AP50": result.per_class()}


def plot_examples(model, dataset, indices, path: Path) -> None:
    """Plots some images of a dataset with detections and ground truth."""
    images, truth = [], []
    for index, element in enumerate(dataset.as_dataset().take(max(indices) + 1)):
        if index in indices:
            images.append(element["images"].numpy())
            truth.append({k: v.numpy() for k, v in element["bounding_boxes"].items()})
    options = {"ground_truth": truth, "path": path}
    kr.visualization.plot_detections(images, model.detect(images), model.class_names, **options)


def batch_maker(arguments, train_set, image_shape):
    """Returns the function that creates one worker's training batches."""
    flip = kr.data.RandomFlip(vertical=0.5 if arguments.vertical_flip else 0.0)
    augmentation = kr.data.TrainingAugmentation(
        image_shape, flip=flip, **kr.data.DETECTION_AUGMENTATIONS[arguments.augmentation]
    )
    options = {
        "mosaic": kr.data.Mosaic(probability=arguments.mosaic) if arguments.mosaic else None,
        "mixup": kr.data.MixUp(probability=arguments.mixup) if arguments.mixup else None,
        "image_sizes": [(side, side) for side in arguments.multi_scale or ()] or None,
        "cache": not arguments.no_cache,
        "seed": arguments.seed,
    }

    def make_batches(num_workers, worker, batch_size):
        shard = train_set.shard(num_workers, worker) if num_workers > 1 else train_set
        return kr.data.training_batches(shard, image_shape, batch_size, augmentation, **options)

    return make_batches


def make_recipe(arguments, batch_size: int, num_images: int):
    recipe = kr.recipes.RECIPES[arguments.recipe]
    if arguments.learning_rate is not None:
        recipe = dataclasses.replace(
            recipe, learning_rate=arguments.learning_rate, batch_size=batch_size
        )
    epochs = arguments.epochs or (60 if arguments.recipe == RECIPES[0] else None)
    return recipe.scaled(batch_size, dataset_size=num_images, epochs=epochs)


def build_model(arguments, train_set) -> kr.RefineDet:
    side = kr.builders.BUILDERS[arguments.model].side
    image_shape = (*(arguments.image_size or (side, side)), 3)
    anchors = kr.detection.AnchorGenerator(sizes=arguments.anchor_sizes)
    if arguments.fit_anchors:
        anchors = kr.detection.fit_anchors(train_set, image_shape, anchors)
    if kr.training.is_chief():
        print(kr.detection.anchor_coverage(train_set, anchors, image_shape))
    return getattr(kr.builders, arguments.model)(
        class_names=train_set.class_names,
        image_shape=image_shape,
        anchor_generator=anchors,
        detection_loss=make_loss(arguments, train_set),
        backbone_weights=arguments.backbone_weights,
        freeze_batch_norm=arguments.batch_norm == "frozen",
        synchronized_batch_norm=arguments.batch_norm == "synchronized",
        dtype=arguments.precision,
    )


def make_loss(arguments, train_set) -> kr.detection.RefineDetLoss:
    weights, method = None, arguments.class_weight
    try:
        if method is not None and method not in METHODS:
            method = json.loads(read_text(method, "file of weights"))
        if method is not None:
            weights = kr.data.class_weights(train_set, method)
        options = kr.builders.BUILDERS[arguments.model].loss
        return kr.detection.RefineDetLoss(**options, class_weights=weights)
    except ValueError as error:
        raise ValueError(
            f"--class-weight must be {', '.join(METHODS)} or a JSON file {{class name: weight}}. "
            f"Received: {arguments.class_weight}: {error}"
        ) from error
