"""`keras-resnest train` for classifiers: options, data, model and report."""

import dataclasses
from pathlib import Path

import numpy as np

import keras_resnest as kr
from keras_resnest.atomic import atomic_file
from keras_resnest.cli.common import positive, refuse_options
from keras_resnest.data.readers.files import find_split, folders_in

EPOCHS = BATCH_SIZE = "that of the recipe"
OUTPUT = "runs/classifier"
RECIPES = ("finetune_classifier", "resnest_imagenet")
AUGMENTATIONS = ("none", "mild", "inception", "rand_augment")
TEST_SPLITS = ("val", "validation", "valid", "test")


def add_arguments(parser) -> None:
    add = parser.add_argument
    add("--skip-faulty", action="store_true", help="leave out images that cannot be used")
    add("--data-dir", help="folder of TFDS; default: that of TFDS")
    add("--model", default="resnest50", help="see `keras-resnest list`; default: %(default)s")
    add("--weights", help='"imagenet", another tag or a file; default: random weights')
    add("--recipe", choices=RECIPES, default=RECIPES[0], help="default: %(default)s")
    add("--crop-size", type=positive(), help="side of the images in pixels; default: the recipe's")
    add("--augmentation", choices=AUGMENTATIONS, help="default: the recipe's")
    add("--mixup", type=float, metavar="ALPHA", help="default: the recipe's")


class Training:
    """The model and everything that `fit` needs."""

    measures = plots = pace = ()

    def __init__(self, arguments):
        self.arguments, self.output = arguments, arguments.output
        recipe = make_recipe(arguments)
        strategy = kr.training.create_strategy()
        replicas = strategy.num_replicas_in_sync
        batch_size = arguments.batch_size or recipe.batch_size
        kr.training.check_global_batch({batch_size}, replicas)
        self.train_set, self.test_set = read_train_test(arguments)
        self.data = {"Training": self.train_set, "Test": self.test_set}
        self.class_names = self.train_set.class_names
        batch_size = limit_batch_size(batch_size, len(self.train_set), replicas)
        self.make_batches(recipe, strategy, batch_size)
        steps = len(self.train_set) // batch_size
        recipe = recipe.scaled(batch_size, steps_per_epoch=steps, epochs=arguments.epochs)
        if arguments.learning_rate is not None:
            recipe = dataclasses.replace(recipe, learning_rate=arguments.learning_rate)
        self.recipe = recipe
        with strategy.scope():
            self.model = build_model(arguments, recipe, len(self.class_names))
        self.output.mkdir(parents=True, exist_ok=True)
        if kr.training.is_chief(strategy):
            text = f"{recipe.name}: {recipe.duration} steps, learning rate"
            print(f"{text} {recipe.learning_rate:g}")

    def make_batches(self, recipe, strategy, batch_size: int) -> None:
        """Creates training batches, a shard for each worker, and test batches."""
        shape = (recipe.crop_size, recipe.crop_size, 3)
        options = {"augmentation": recipe.augmentation, "mixup": recipe.mixup}
        options |= {"training": True, "seed": self.arguments.seed}

        def make_shard(num_workers, worker, batch_size):
            shard = self.train_set.shard(num_workers, worker)
            return kr.data.classification_batches(shard, shape, batch_size, **options)

        self.train_batches = kr.training.distribute_batches(strategy, make_shard, batch_size)
        self.test_batches = kr.data.classification_batches(
            self.test_set, shape, batch_size, training=False, crop_ratio=recipe.crop_ratio
        )

    def fit(self, callbacks, verbose):
        options = {"epochs": self.recipe.epochs, "callbacks": callbacks, "verbose": verbose}
        # The batches are shuffled already.
        options |= {"validation_data": self.test_batches, "shuffle": False}
        return self.model.fit(self.train_batches, **options)

    def evaluate(self) -> dict:
        return self.model.evaluate(self.test_batches, return_dict=True, verbose=0)

    def report(self, history, result) -> dict:
        """Writes plots and models; returns the results."""
        output, model = self.output, self.model
        if self.rows:
            log = {name: [row[name] for row in self.rows] for name in self.rows[0]}
            kr.visualization.plot_history(log, path=output / "history.png")
            plot_accuracy(log, output / "accuracy.png")
        with atomic_file(output / "classifier.keras") as file:
            model.save(file)
        options = {"class_names": self.class_names, "crop_ratio": self.recipe.crop_ratio}
        model.export(output / "serving" / "1", **options)
        (output / "class_names.txt").write_text("\n".join(self.class_names) + "\n", "utf-8")
        top = min(5, len(self.class_names))
        print(f"top-1 {result['top1']:.2%}, top-{top} {result['top5']:.2%}")
        return {
            **{name: result[name] for name in ("top1", "top5", "loss")},
            "epochs": self.recipe.epochs,
            "steps": int(np.asarray(model.optimizer.iterations)),
            "learning_rate": self.recipe.learning_rate,
            "class_names": self.class_names,
        }


def read_train_test(arguments):
    """Reads a training and a test set with the same classes."""
    train_split, test_split = arguments.train_split or "train", arguments.test_split
    folder, splits = Path(arguments.data), TEST_SPLITS
    if not arguments.data.startswith("tfds:"):
        known = [path.name for path in folders_in(folder)] if folder.is_dir() else ()
        if folder.is_dir() and not find_split(train_split, known):
            if test_split or arguments.train_split:
                raise ValueError(f"no folder {train_split!r} in {folder}")
            return read_labeled(arguments, None).hold_out(0.2, arguments.seed)
        found = [name for name in TEST_SPLITS if find_split(name, known)]
        splits = (found or TEST_SPLITS)[:1]
    train = read_labeled(arguments, train_split)
    for split in [test_split] if test_split else splits:
        try:
            return train, read_labeled(arguments, split, train.class_names)
        except ValueError as error:
            reason = error
    raise reason


def read_labeled(arguments, split: str | None, class_names: list[str] | None = None):
    """Reads a split of a folder of class folders, or of a TFDS dataset."""
    if arguments.data.startswith("tfds:"):
        refuse_options(arguments, ["skip_faulty"], "for files, not for TFDS")
        name, data_dir = arguments.data.removeprefix("tfds:"), arguments.data_dir
        return kr.data.read_tfds_classification(name, split, class_names, data_dir=data_dir)
    refuse_options(arguments, ["data_dir"], "for tfds:NAME")
    on_error = "skip" if arguments.skip_faulty else "raise"
    return kr.data.read_image_folder(arguments.data, split, class_names, on_error=on_error)


def make_recipe(arguments):
    """Returns the unscaled recipe with the values from the command line."""
    recipe = kr.recipes.RECIPES[arguments.recipe].for_network(arguments.model)
    given = {name: getattr(arguments, name) for name in ("crop_size", "augmentation", "mixup")}
    return dataclasses.replace(recipe, **{k: v for k, v in given.items() if v is not None})


def limit_batch_size(wanted: int, num_images: int, replicas: int) -> int:
    """Returns the wanted batch size, or the largest that the images can fill."""
    largest = num_images - num_images % replicas
    if wanted > largest > 0:
        print(f"There are {num_images} images: the batch size is {largest}, not {wanted}")
        return largest
    return wanted


def build_model(arguments, recipe, num_classes: int):
    import keras
    import tensorflow as tf

    model = kr.create_backbone(
        arguments.model,
        include_top=True,
        weights=arguments.weights,
        input_shape=(recipe.crop_size, recipe.crop_size, 3),
        dtype=arguments.precision,
        **({} if arguments.weights else {"classes": num_classes}),
        **recipe.network_arguments(arguments.model),
    )
    if arguments.weights:  # for 1000 classes
        model = model.replace_top(num_classes)
    has_gpu = bool(tf.config.list_physical_devices("GPU"))
    model.compile(
        recipe.optimizer(),
        keras.losses.CategoricalCrossentropy(label_smoothing=recipe.label_smoothing),
        metrics=[
            keras.metrics.CategoricalAccuracy(name="top1"),
            keras.metrics.TopKCategoricalAccuracy(min(5, num_classes), name="top5"),
        ],
        jit_compile="auto" if has_gpu else False,  # XLA compiles for minutes on a CPU
    )
    return model


def plot_accuracy(log: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(6.4, 4.2), layout="constrained")).add_subplot()
    epochs = np.asarray(log["epoch"]) + 1
    for name, style in (("top1", "solid"), ("val_top1", "dashed"), ("val_top5", "dotted")):
        axes.plot(epochs, log[name], color="black", linestyle=style, marker=".", label=name)
    axes.set(xlabel="epoch", ylabel="accuracy", ylim=(0, 1.02))
    axes.legend()
    figure.savefig(path)
