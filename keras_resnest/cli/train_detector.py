"""`keras-resnest train` for detectors: options, data, model and report."""

import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import keras

import keras_resnest as kr
from keras_resnest.atomic import atomic_file
from keras_resnest.cli.common import (
    add_reading_arguments,
    figures,
    fraction,
    is_saved_model,
    open_detector,
    positive,
    print_figures,
    reading_options,
    refuse_options,
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
    text = "to choose the best model; default: val or valid, else a tenth of the training split"
    add("--validation-split", metavar="SPLIT", help=text)
    add("--recipe", choices=RECIPES, default=RECIPES[0], help="default: %(default)s")

    add = parser.add_argument_group("model").add_argument
    add("--model", help="see `keras-resnest list --kind detectors`; default: refinedet_tiny")
    add("--image-size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="multiples of 64")
    text = "at strides 8, 16, 32, 64; default: 32 64 128 256, but fitted for refinedet_tiny"
    add("--anchor-sizes", type=float, nargs=4, metavar="PIXELS", help=text)
    add("--fit-anchors", action="store_true", help="fit them to the training data")
    text = '"imagenet", another tag or a file; default: random weights'
    add("--backbone-weights", metavar="WEIGHTS", help=text)
    text = "frozen: for pretrained weights and small batches; default: train"
    add("--batch-norm", choices=BATCH_NORMS, help=text)

    add = parser.add_argument_group("fine-tuning").add_argument
    text = "a .keras file or a preset; with --model, the tag or file of the authors' weights"
    add("--start-from", metavar="DETECTOR", help=text)
    text = "keep the backbone's stem and first N of 4 stages unchanged"
    add("--freeze-stages", type=positive(), metavar="N", help=text)
    text = "train these stages too after this many epochs"
    add("--unfreeze-after", type=positive(), metavar="EPOCHS", help=text)
    text = "learning rate of the backbone, relative to the other layers; default: %(default)s"
    add(
        "--backbone-learning-rate-factor",
        type=positive(float),
        default=1.0,
        metavar="FACTOR",
        help=text,
    )

    add = parser.add_argument_group("augmentation").add_argument
    add("--augmentation", choices=AUGMENTATIONS, default="mild", help="default: %(default)s")
    add("--vertical-flip", action="store_true", help="for images without a natural orientation")
    add("--mosaic", type=fraction, default=0.0, metavar="PROBABILITY", help="four images in one")
    add("--mixup", type=fraction, default=0.0, metavar="PROBABILITY", help="two images in one")
    text = "sides of the images in pixels; one of them is drawn for each batch"
    add("--multi-scale", type=positive(), nargs="+", metavar="SIDE", help=text)

    add = parser.add_argument_group("course of the training").add_argument
    text = f"weights for rare classes: {', '.join(METHODS)} or a JSON file {{class name: weight}}"
    add("--class-weight", metavar="METHOD", help=text)
    text = "stop after this many epochs without a better model"
    add("--patience", type=positive(), metavar="EPOCHS", help=text)
    text = "compute each batch in this many parts, to save memory; default: %(default)s"
    add("--accumulate", type=positive(), default=1, metavar="PARTS", help=text)
    text = "shorten the training, and its schedule, to this time; test and export follow"
    add("--time-limit", type=positive(float), metavar="MINUTES", help=text)
    text = "of a moving average of the weights, such as 0.99; default: the recipe's"
    add("--ema-momentum", type=fraction, metavar="MOMENTUM", help=text)
    text = "interval; also after the first and the last epoch; default: %(default)s"
    add("--evaluate-every", type=positive(), default=5, metavar="EPOCHS", help=text)
    add("--checkpoint-steps", type=positive(), metavar="STEPS", help="save also within epochs")
    add("--tensorboard", action="store_true", help="write curves to OUTPUT/tensorboard")
    add("--no-cache", action="store_true", help="decode images in every epoch, for large datasets")


class Training:
    """The model and everything that `fit` needs."""

    def __init__(self, arguments):
        self.arguments, self.output = arguments, arguments.output
        check_arguments(arguments)
        batch_size = arguments.batch_size or BATCH_SIZE
        strategy = kr.training.create_strategy()
        replicas = strategy.num_replicas_in_sync
        kr.training.check_global_batch({batch_size}, replicas)
        if batch_size // replicas % arguments.accumulate:
            raise ValueError(
                f"--accumulate must divide the {batch_size // replicas} images of a device, "
                f"not {arguments.accumulate}"
            )
        self.chief = kr.training.is_chief(strategy)
        self.train_set, validation_set, self.test_set = kr.data.read_splits(
            arguments.data,
            train_split=arguments.train_split,
            validation_split=arguments.validation_split,
            test_split=arguments.test_split,
            seed=arguments.seed,
            **reading_options(arguments),
        )
        self.data = {
            "Training": self.train_set,
            "Validation": validation_set,
            "Test": self.test_set,
        }
        self.recipe = make_recipe(arguments, batch_size, len(self.train_set))
        with strategy.scope():
            self.model = build_model(arguments, self.train_set)
            if arguments.freeze_stages:
                self.model.freeze_stages(arguments.freeze_stages)
            factor = arguments.backbone_learning_rate_factor
            optimizer = self.recipe.optimizer(backbone_learning_rate_factor=factor)
            self.model.compile(optimizer, accumulate=arguments.accumulate)
        self.output.mkdir(parents=True, exist_ok=True)
        if self.chief and not all(layer.trainable for layer in self.model._flatten_layers()):
            trained = sum(math.prod(w.shape) for w in self.model.trainable_weights)
            print(f"Frozen: all but {trained:,} of {self.model.count_params():,} parameters")
        image_shape = self.model.image_shape
        self.train_batches = kr.training.distribute_batches(
            strategy, batch_maker(arguments, self.train_set, image_shape), batch_size
        )
        # With the sizes of the images: small, medium and large are in their pixels.
        options = {"batch_size": batch_size, "include_source": True}
        self.test_batches = kr.data.evaluation_batches(
            self.test_set, image_shape, cache=False, **options
        )
        validation = kr.data.evaluation_batches(
            validation_set, image_shape, cache=not arguments.no_cache, **options
        )
        self.make_callbacks(validation)
        if self.chief:
            kr.visualization.plot_dataset(self.train_set, path=self.output / "dataset.png")

    def make_callbacks(self, validation) -> None:
        """Creates the callbacks that measure, on all workers, and those that write files."""
        arguments, output = self.arguments, self.output
        every = {"frequency": arguments.evaluate_every}
        self.best = kr.callbacks.DetectionEvaluation(
            validation,
            **every,
            verbose=self.chief,
            restore_best_weights=True,
            patience=arguments.patience,
        )
        self.measures, self.pace = [self.best], []
        if arguments.unfreeze_after:
            self.pace.append(kr.callbacks.UnfreezeStages(arguments.unfreeze_after))
        if arguments.time_limit:
            self.pace.append(kr.callbacks.TimeLimit(arguments.time_limit))
        self.plots = [kr.callbacks.DetectionPlot(validation, output / "progress", **every)]
        if arguments.tensorboard:
            self.plots.append(keras.callbacks.TensorBoard(output / "tensorboard"))

    def fit(self, callbacks, verbose):
        options = {"epochs": self.recipe.epochs, "callbacks": callbacks, "verbose": verbose}
        return self.model.fit(self.train_batches, **options)

    def evaluate(self):
        """Measures the best model on the test data, which nothing has seen before."""
        truth, found = kr.evaluation.collect_detections(self.model, self.test_batches)
        names = self.model.class_names
        voc = kr.evaluation.voc_average_precision(truth, found, names)
        return voc, kr.evaluation.coco_average_precision(truth, found, names)

    def report(self, history, result) -> dict:
        """Writes plots and models; returns the results."""
        output, best, (voc, _) = self.output, self.best, result
        if history.epoch:
            kr.visualization.plot_history([history, best], path=output / "history.png")
        kr.visualization.plot_precision_recall(voc, path=output / "precision_recall.png")
        plot_examples(self.model, self.test_set, range(6), output / "detections.png")
        with atomic_file(output / "detector.keras") as file:
            self.model.save(file)
        self.model.export(output / "serving" / "1")
        print(f"The best model, of epoch {best.best_epoch + 1}, on the test data:")
        print_figures(*result)
        row = best.epoch.index(best.best_epoch)
        chosen = {k.removeprefix("val_"): values[row] for k, values in best.history.items()}
        return {**figures(*result), "validation": {"epoch": best.best_epoch + 1, **chosen}}


def check_arguments(arguments) -> None:
    """Raises ValueError for options that do not go together."""
    if (name := arguments.model) not in (None, *(names := kr.builders.BUILDERS)):
        raise ValueError(f"--model must be one of {', '.join(names)}, not {name}")
    if source := arguments.start_from:
        if arguments.backbone_weights:
            raise ValueError("--backbone-weights: not with --start-from, which has all weights")
        if is_saved_model(source) and name:
            raise ValueError(f"--model: not with --start-from {source}, which has its own network")
        if not is_saved_model(source) and not name:
            raise ValueError(f"--start-from {source} needs --model, the network of these weights")
    if arguments.freeze_stages is None:
        refuse_options(arguments, ["unfreeze_after"], "with --freeze-stages")
    if arguments.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs a package: pip install tensorboard")


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
    if arguments.ema_momentum is not None:
        recipe = dataclasses.replace(recipe, ema_momentum=arguments.ema_momentum or None)
    epochs = arguments.epochs or (60 if arguments.recipe == RECIPES[0] else None)
    return recipe.scaled(batch_size, dataset_size=num_images, epochs=epochs)


def build_model(arguments, train_set) -> kr.RefineDet:
    """Builds the network, or that of `--start-from`, with its anchors and size by default."""
    anchors = kr.detection.AnchorGenerator()
    if arguments.start_from:
        source = open_detector(arguments.start_from, arguments.model)
        image_shape, anchors = source.image_shape, source.anchor_generator
    else:
        name = arguments.model or "refinedet_tiny"
        image_shape = (*[kr.builders.BUILDERS[name].side] * 2, 3)
    if arguments.image_size:
        image_shape = (*arguments.image_size, 3)
    if arguments.anchor_sizes:
        config = {**anchors.get_config(), "sizes": arguments.anchor_sizes}
        anchors = kr.detection.AnchorGenerator.from_config(config)
    fits = not (arguments.start_from or arguments.anchor_sizes) and name == "refinedet_tiny"
    if arguments.fit_anchors or fits:
        anchors = kr.detection.fit_anchors(train_set, image_shape, anchors)
    if kr.training.is_chief():
        print(kr.detection.anchor_coverage(train_set, anchors, image_shape))
    options = {"image_shape": image_shape, "anchor_generator": anchors}
    if arguments.batch_norm:
        options["freeze_batch_norm"] = arguments.batch_norm == "frozen"
        options["synchronized_batch_norm"] = arguments.batch_norm == "synchronized"
    if arguments.class_weight:
        row = None if arguments.start_from else kr.builders.BUILDERS[name]
        loss = kr.detection.RefineDetLoss(**row.loss) if row else source.detection_loss
        options["detection_loss"] = weigh_classes(loss, arguments, train_set)
    if arguments.start_from:
        return start_from(arguments, source, train_set.class_names, options)
    return getattr(kr.builders, name)(
        class_names=train_set.class_names,
        backbone_weights=arguments.backbone_weights,
        dtype=arguments.precision,
        **options,
    )


def weigh_classes(loss, arguments, train_set) -> kr.detection.RefineDetLoss:
    """Returns the loss with the weights of `--class-weight`."""
    method = arguments.class_weight
    try:
        if method not in METHODS:
            method = json.loads(read_text(method, "file of weights"))
        weights = kr.data.class_weights(train_set, method)
        return type(loss).from_config({**loss.get_config(), "class_weights": weights})
    except ValueError as error:
        raise ValueError(
            f"--class-weight must be {', '.join(METHODS)} or a JSON file {{class name: weight}}. "
            f"Received: {arguments.class_weight}: {error}"
        ) from error


def start_from(arguments, source: kr.RefineDet, class_names, options: dict) -> kr.RefineDet:
    """Returns the source for other classes, image size and anchors."""
    backbone = source.get_config()["backbone"]
    backbone["config"]["dtype"] = arguments.precision
    options |= {"backbone": backbone, "dtype": arguments.precision, "bounding_box_format": "xyxy"}
    try:
        model = source.replace_classes(class_names, **options)
    except ValueError as error:
        raise ValueError(f"--start-from {arguments.start_from}: {error}") from error
    if kr.training.is_chief():
        known = kr.detection.class_sources(class_names, source.class_names)
        shown = ", ".join(
            f"{new} from {old}" if old else f"{new} new" for new, old in known.items()
        )
        print(f"Classes of {arguments.start_from}: {shown}")
        if model.anchor_generator.get_config() != source.anchor_generator.get_config():
            print("The anchors are not those that these weights were trained with")
    return model
