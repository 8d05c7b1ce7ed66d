"""Fine-tune a pretrained network on a folder with one folder of images per class.

python examples/fine_tune_classifier.py flowers --network resnest50
"""

import argparse
from pathlib import Path

import keras

import keras_resnest as kr

BATCH_SIZE = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--network", default="resnest50")
    parser.add_argument("--weights", default="imagenet")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--output", type=Path, default=Path("runs/classifier"))
    arguments = parser.parse_args()
    keras.utils.set_random_seed(1)
    shape = (arguments.size, arguments.size, 3)

    # Read the images; hold out a fifth of each class.
    train, test = kr.data.read_image_folder(arguments.data).hold_out(0.2, seed=1)
    print(train.report)
    train_batches = kr.data.classification_batches(
        train, shape, BATCH_SIZE, training=True, augmentation="mild", seed=1
    )
    test_batches = kr.data.classification_batches(test, shape, BATCH_SIZE, training=False)

    # Keep the pretrained weights, except for the last layer.
    weights = None if arguments.weights == "none" else arguments.weights
    model = kr.create_backbone(
        arguments.network, include_top=True, weights=weights, input_shape=shape
    )
    model = model.replace_top(train.num_classes)

    recipe = kr.recipes.RECIPES["finetune_classifier"]
    recipe = recipe.scaled(BATCH_SIZE, dataset_size=len(train), epochs=arguments.epochs)
    model.compile(
        recipe.optimizer(),
        keras.losses.CategoricalCrossentropy(label_smoothing=recipe.label_smoothing),
        metrics=["accuracy"],
    )
    model.fit(train_batches, epochs=recipe.epochs, validation_data=test_batches)

    arguments.output.mkdir(parents=True, exist_ok=True)
    model.save(arguments.output / "classifier.keras")
    image = test.records[0].image
    crop = kr.data.center_crop_image(kr.data.load_image(image), arguments.size)
    probabilities = model.predict(crop[None], verbose=0)
    print(image, kr.backbones.decode_predictions(probabilities, 1, train.class_names))


if __name__ == "__main__":
    main()
