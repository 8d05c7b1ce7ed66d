"""Train a detector on annotated images; `keras-resnest train` does the same without programming.

    python examples/train_detector.py my_folder --epochs 60

The folder has VOC, YOLO, COCO or CSV format. To resume a training that ended early, rerun the
command.
"""

import argparse
from pathlib import Path

import keras

import keras_resnest as kr

IMAGE_SHAPE = (320, 320, 3)  # any multiples of 64
BATCH_SIZE = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--output", type=Path, default=Path("runs/detector"))
    arguments = parser.parse_args()
    output = arguments.output
    keras.utils.set_random_seed(1)

    # Read the images. What has no split is held out.
    train, validation, test = kr.data.read_splits(arguments.data)
    print(train.report)
    kr.visualization.plot_dataset(train, path=output / "dataset.png")
    train_batches = kr.data.training_batches(train, IMAGE_SHAPE, BATCH_SIZE, "mild", seed=1)
    validation_batches = kr.data.evaluation_batches(validation, IMAGE_SHAPE, BATCH_SIZE)
    test_batches = kr.data.evaluation_batches(test, IMAGE_SHAPE, BATCH_SIZE)

    # Build a model with anchors that fit the objects.
    model = kr.builders.refinedet_tiny(
        class_names=train.class_names,
        image_shape=IMAGE_SHAPE,
        anchor_generator=kr.detection.fit_anchors(train, IMAGE_SHAPE),
    )
    recipe = kr.recipes.RECIPES["detector_from_scratch"]
    recipe = recipe.scaled(BATCH_SIZE, dataset_size=len(train), epochs=arguments.epochs)
    model.compile(recipe.optimizer())

    # Train. Measure mAP every five epochs and keep the best model.
    best = kr.callbacks.DetectionEvaluation(
        validation_batches, frequency=5, restore_best_weights=True
    )
    resume = kr.callbacks.ResumeTraining(output / "checkpoint", callbacks=[best])
    history = model.fit(train_batches, epochs=recipe.epochs, callbacks=[best, resume])
    kr.visualization.plot_history([history, best], path=output / "history.png")

    # Evaluate.
    result = kr.evaluation.evaluate_detections(model, test_batches)
    print(result)
    kr.visualization.plot_precision_recall(result, path=output / "precision_recall.png")
    model.save(output / "detector.keras")


if __name__ == "__main__":
    main()
