"""Builder functions: one for each published RefineDet, and a small one for CPUs."""

from keras_resnest.detection.refinedet import RefineDet

# name: (backbone, side of the pictures in pixels, what differs from RefineDet's defaults)
BUILDERS = {
    "refinedet320_vgg16": ("vgg16_reduced", 320, {}),
    "refinedet512_vgg16": ("vgg16_reduced", 512, {}),
    "refinedet320_resnest50": ("resnest50", 320, {}),
    "refinedet512_resnest50": ("resnest50", 512, {}),
    "refinedet320_resnest101": ("resnest101", 320, {}),
    "refinedet512_resnest101": ("resnest101", 512, {}),
    "refinedet_tiny": ("resnest14_tiny", 320, {"filters": 64, "use_batch_norm": True}),
}


def _builder(name: str):
    backbone, side, options = BUILDERS[name]

    def build(num_classes: int, image_shape=(side, side, 3), **kwargs) -> RefineDet:
        return RefineDet(
            num_classes,
            **{"backbone": backbone, "image_shape": image_shape, "name": name, **options, **kwargs},
        )

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""RefineDet with the backbone `{backbone}` at {side} x {side} pixels.

    Args:
        num_classes: number of classes, without background.
        image_shape: (height, width, 3), sides multiples of 64.
        **kwargs: as in `RefineDet`.

    Returns:
        A `RefineDet` with random weights.

    Example:

    >>> model = keras_resnest.builders.{name}(num_classes=20)
    """
    return build


refinedet320_vgg16 = _builder("refinedet320_vgg16")
refinedet512_vgg16 = _builder("refinedet512_vgg16")
refinedet320_resnest50 = _builder("refinedet320_resnest50")
refinedet512_resnest50 = _builder("refinedet512_resnest50")
refinedet320_resnest101 = _builder("refinedet320_resnest101")
refinedet512_resnest101 = _builder("refinedet512_resnest101")
refinedet_tiny = _builder("refinedet_tiny")
