"""Builder functions: one for each published RefineDet, and a small one for CPUs."""

from typing import NamedTuple

from keras_resnest.backbones import create_backbone, load_torch_state_dict, read_state_dict
from keras_resnest.boxes.anchors import AnchorGenerator
from keras_resnest.detection.decoding import DetectionDecoder
from keras_resnest.detection.heads import RefineDetHeads
from keras_resnest.detection.loss import RefineDetLoss
from keras_resnest.detection.refinedet import RefineDet

# Modules of the PyTorch ports that detection does not use: pengyang1225's checkpoints hold a
# second backbone and the backbone's classifier.
_UNUSED_MODULES = ("Resnet86", "model.fc")

# As the authors' ResNet101_COCO_320.py: batch normalization in the TCBs, no L2 normalization,
# residual blocks for P6 (128, 128, 512 channels) and before the heads (256, 256, 1024). Only the
# backbone differs: theirs has its strides in the 1x1 convolutions, ours and all weights that are
# published today in the 3x3 ones.
_RESNET_HEADS = {
    "extra_filters": (128, 512),
    "use_batch_norm": True,
    "use_l2_normalization": False,
    "use_residual_blocks": True,
}


class DetectorVariant(NamedTuple):
    """One row of `BUILDERS`: what a builder passes to `RefineDet`.

    Args:
        backbone: name of the backbone.
        side: height and width of the images in pixels.
        heads: arguments of `RefineDetHeads`.
        loss: arguments of `RefineDetLoss`.
        decoder: arguments of `DetectionDecoder`.
    """

    backbone: str
    side: int
    heads: dict = {}
    loss: dict = {}
    decoder: dict = {}


_ALIGNED = {"use_alignment": True}

# The published networks, with the published losses and decoder, and a small one.
BUILDERS = {
    "refinedet320_vgg16": DetectorVariant("vgg16_reduced", 320),
    "refinedet512_vgg16": DetectorVariant("vgg16_reduced", 512),
    "refinedet320_resnet50": DetectorVariant("resnet50", 320, _RESNET_HEADS),
    "refinedet512_resnet50": DetectorVariant("resnet50", 512, _RESNET_HEADS),
    "refinedet320_resnet101": DetectorVariant("resnet101", 320, _RESNET_HEADS),
    "refinedet512_resnet101": DetectorVariant("resnet101", 512, _RESNET_HEADS),
    "refinedet320_resnest50": DetectorVariant("resnest50", 320),
    "refinedet512_resnest50": DetectorVariant("resnest50", 512),
    "refinedet320_resnest101": DetectorVariant("resnest101", 320),
    "refinedet512_resnest101": DetectorVariant("resnest101", 512),
    "refinedet_plus_plus512_vgg16": DetectorVariant("vgg16_reduced", 512, _ALIGNED),
    "refinedet_plus_plus512_resnest50": DetectorVariant("resnest50", 512, _ALIGNED),
    "refinedet_tiny": DetectorVariant(
        "resnest14_tiny", 320, {"filters": 64, "use_batch_norm": True}
    ),
}


def _builder(name: str):
    backbone, side, heads, loss, decoder = BUILDERS[name]

    def build(
        num_classes: int | None = None,
        image_shape=(side, side, 3),
        weights=None,
        backbone_weights=None,
        **kwargs,
    ) -> RefineDet:
        arguments = {"backbone": backbone, "image_shape": image_shape, "name": name}
        arguments["heads"] = RefineDetHeads(**heads)
        arguments["detection_loss"] = RefineDetLoss(**loss)
        arguments["decoder"] = DetectionDecoder(**decoder)
        if backbone_weights is not None:
            arguments["backbone"] = create_backbone(
                backbone, include_top=False, weights=backbone_weights, dtype=kwargs.get("dtype")
            )
        if weights is not None:
            arguments["anchor_generator"] = AnchorGenerator(clip=True)  # as in the ports
        model = RefineDet(num_classes, **{**arguments, **kwargs})
        if weights is not None:
            load_torch_state_dict(model, read_state_dict(weights), ignore=_UNUSED_MODULES)
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""Builds RefineDet on the backbone `{backbone}` at {side} x {side} pixels.

    Args:
        num_classes: number of classes, without background; by default that of `class_names`.
        image_shape: (height, width, 3), sides multiples of 64.
        weights: path of a checkpoint of the PyTorch RefineDet ports (`.pth`, `.safetensors`), or
            None. Anchors are then clipped to the image, as in the ports.
        backbone_weights: `weights` of the backbone alone, such as `"imagenet"`; see
            `create_backbone`.
        **kwargs: as in `RefineDet`.

    Returns:
        A `RefineDet`, with random weights unless weights are given.

    Raises:
        ValueError: if weights do not fit the network, array by array.
        ConnectionError: if published weights cannot be fetched.

    Example:
        >>> model = keras_resnest.builders.{name}(class_names=["cat", "dog"])
    """
    return build


refinedet320_vgg16 = _builder("refinedet320_vgg16")
refinedet512_vgg16 = _builder("refinedet512_vgg16")
refinedet320_resnet50 = _builder("refinedet320_resnet50")
refinedet512_resnet50 = _builder("refinedet512_resnet50")
refinedet320_resnet101 = _builder("refinedet320_resnet101")
refinedet512_resnet101 = _builder("refinedet512_resnet101")
refinedet320_resnest50 = _builder("refinedet320_resnest50")
refinedet512_resnest50 = _builder("refinedet512_resnest50")
refinedet320_resnest101 = _builder("refinedet320_resnest101")
refinedet512_resnest101 = _builder("refinedet512_resnest101")
refinedet_plus_plus512_vgg16 = _builder("refinedet_plus_plus512_vgg16")
refinedet_plus_plus512_resnest50 = _builder("refinedet_plus_plus512_resnest50")
refinedet_tiny = _builder("refinedet_tiny")
