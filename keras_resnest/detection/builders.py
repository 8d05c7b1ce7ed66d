"""Builder functions: one for each published RefineDet, and a small one for CPUs."""

import re
from typing import NamedTuple

from keras_resnest.backbones import create_backbone, read_state_dict
from keras_resnest.backbones.weights import caffe, detector_files, fetching
from keras_resnest.boxes.anchors import AnchorGenerator
from keras_resnest.boxes.matching import BoxMatcher
from keras_resnest.detection import arguments as checks
from keras_resnest.detection import class_names
from keras_resnest.detection.decoding import DetectionDecoder
from keras_resnest.detection.heads import RefineDetHeads
from keras_resnest.detection.loss import RefineDetLoss
from keras_resnest.detection.refinedet import RefineDet

# Modules of the PyTorch ports that detection does not use: pengyang1225's checkpoints hold a
# second backbone and the backbone's classifier.
_UNUSED_MODULES = ("Resnet86", "model.fc")

# As the authors' ResNet101_COCO_320.py: batch normalization in the TCBs, no L2 normalization,
# residual blocks for P6 (128, 128, 512 channels) and before the heads (256, 256, 1024). Their
# backbone has its strides in the 1x1 convolutions, and comes with their weights; all weights that
# are published today have them in the 3x3 ones.
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

    Example:
        >>> BUILDERS["refinedet320_vgg16"].backbone
        'vgg16_reduced'
    """

    backbone: str
    side: int
    heads: dict = {}
    loss: dict = {}
    decoder: dict = {}


_ALIGNED = {"use_alignment": True}

# The published networks, with the published losses and decoder, and a small one that places boxes
# better.
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
        "resnest14_tiny",
        320,
        {"filters": 64, "use_batch_norm": True},
        {"odm_matcher": BoxMatcher(0.6)},
        {"voting_iou": 0.6, "exclusive_classes": True},
    ),
}


_CAFFE_CLASS_HEAD = re.compile(r"(res)?P[3-6]_(inter_)?mbox_conf\.weight")
_CAFFE_CLASS_KERNELS = ((256, 3, 3), (1024, 3, 3))  # VGG-16, ResNet-101
_CAFFE_CLASS_NAMES = {len(names): list(names) for names in (class_names.VOC, class_names.COCO)}
_CAFFE_DECODER = {"pre_nms_top_k": 1000, "max_detections": 500}  # of the authors' code


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
        weights = detector_files.detector_weights(name, weights)
        form = caffe.caffe_form(weights, backbone)
        arrays = None if weights is None else read_state_dict(weights)
        if caffe.is_caffe_file(weights):
            arguments["decoder"] = DetectionDecoder(**{**_CAFFE_DECODER, **decoder})
            arguments |= _caffe_classes(weights, arrays, num_classes, kwargs.get("class_names"))
        else:
            arguments["num_classes"] = num_classes
            arguments["anchor_generator"] = AnchorGenerator(clip=arrays is not None)
        if (form or backbone_weights is not None) and "backbone" not in kwargs:
            options = {"weights": backbone_weights, "dtype": kwargs.get("dtype"), **form}
            arguments["backbone"] = create_backbone(backbone, include_top=False, **options)
        model = RefineDet(**{**arguments, **kwargs})
        if arrays is not None:
            caffe.check_caffe_form(model.backbone, weights, backbone)
            if caffe.is_caffe_file(weights) and model.heads.use_alignment:
                raise ValueError(f"{weights} is for RefineDet. Received: RefineDet++, {model.name}")
            fetching.load_arrays_of_file(model, arrays, weights, ignore=_UNUSED_MODULES)
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""Builds RefineDet on the backbone `{backbone}` at {side} x {side} pixels.

    Args:
        num_classes: number of classes, without background; by default that of `class_names`.
        image_shape: (height, width, 3), sides multiples of 64.
        weights: tag of a file of the authors, see `list_models(kind="detector")`; the path of such
            a file (`.caffemodel`), whose network, anchors, decoder and classes are used; the path
            of a checkpoint of the PyTorch ports (`.pth`, `.safetensors`), which clip anchors to
            the image; or None.
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


def _caffe_classes(path, arrays: dict, num_classes, names) -> dict:
    """Number and names of the classes of a Caffe file; they must be those asked for."""
    heads = [array.shape for name, array in arrays.items() if _CAFFE_CLASS_HEAD.fullmatch(name)]
    if len(heads) != 4 or len(set(heads)) > 1 or heads[0][1:] not in _CAFFE_CLASS_KERNELS:
        raise ValueError(
            f"{path} holds no RefineDet: the weights of P3_mbox_conf to P6_mbox_conf have the "
            f"shapes {heads}"
        )
    asked = count = max(heads[0][0] // 3 - 1, 1)
    if num_classes is not None or names is not None:
        asked, _ = checks.check_classes(num_classes, names)
    if asked != count:
        raise ValueError(
            f"{path} is for {count} classes; `replace_classes` changes them after loading. "
            f"Received: num_classes={asked}"
        )
    return {"num_classes": count, "class_names": _CAFFE_CLASS_NAMES.get(count)}


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
