"""Use a ResNeSt backbone in your own model, here a segmentation network.

    python examples/use_backbone_elsewhere.py --weights imagenet

docs/drop_in.md shows the same backbones in RetinaNet and DeepLabV3 of KerasCV and KerasHub.
"""

import argparse

import keras
import numpy as np

import keras_resnest as kr


def build_segmenter(backbone: keras.Model, num_classes: int) -> keras.Model:
    """Builds a feature pyramid that adds each level to the next larger one, then classifies."""
    levels = backbone.pyramid_outputs  # {"P2": (batch, H/4, W/4, C), "P3": (batch, H/8, ...), ...}
    x = None
    for name in ("P5", "P4", "P3", "P2"):
        lateral = keras.layers.Conv2D(64, 1, name=f"lateral_{name}")(levels[name])
        if x is not None:
            x = keras.layers.UpSampling2D(interpolation="bilinear")(x)
            lateral = keras.layers.Add()([lateral, x])
        x = lateral
    x = keras.layers.Conv2D(64, 3, padding="same", activation="relu")(x)
    x = keras.layers.Conv2D(num_classes, 1)(x)
    outputs = keras.layers.UpSampling2D(4, interpolation="bilinear")(x)  # (batch, H, W, classes)
    return keras.Model(backbone.input, outputs)


def draw_disks(count: int, side: int, seed: int):
    """Returns images of bright disks on noise, 0 to 255, and the class of each pixel."""
    rng = np.random.default_rng(seed)
    images = rng.uniform(0, 120, (count, side, side, 3)).astype("float32")
    center_y, center_x = rng.uniform(0.3, 0.7, (2, count, 1, 1)) * side
    radii = rng.uniform(0.1, 0.3, (count, 1, 1)) * side
    y, x = np.mgrid[:side, :side]
    masks = np.hypot(y - center_y, x - center_x) < radii  # (count, side, side)
    images[masks] += 130
    return images, masks.astype("int32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnest50", help="`keras-resnest list` shows all")
    parser.add_argument("--weights", help='"imagenet"; default: random weights')
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()
    keras.utils.set_random_seed(1)

    shape = (arguments.side, arguments.side, 3)
    backbone = kr.create_backbone(
        arguments.network, include_top=False, weights=arguments.weights, input_shape=shape
    )
    model = build_segmenter(backbone, num_classes=2)
    model.compile(
        keras.optimizers.Adam(1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(*draw_disks(64, arguments.side, seed=1), batch_size=8, epochs=arguments.epochs)
    _, accuracy = model.evaluate(*draw_disks(16, arguments.side, seed=2), verbose=0)
    print(f"{accuracy:.1%} of the pixels are correct")


if __name__ == "__main__":
    main()
