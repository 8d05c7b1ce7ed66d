"""From the backbone's features to the raw outputs: source levels, ARM, TCBs, ODM.

    P3 P4 P5 -> source levels P3 P4 P5 P6 -> ARM: objectness and offsets of every anchor
                        |
                        v  transfer connection blocks (TCB), from P6 down
                P3 P4 P5 P6 -> ODM: classes and offsets of every anchor

Figure 1 of RefineDet, arXiv 1711.06897. In RefineDet++ the ODM reads its maps inside the refined
anchors.
"""

import math
from collections.abc import Sequence

import keras
import numpy as np
from keras import layers, ops

from keras_resnest.backbones.graph import GraphBuilder
from keras_resnest.boxes.anchors import AnchorGenerator
from keras_resnest.boxes.offsets import VARIANCES, decode_boxes
from keras_resnest.checks import checked
from keras_resnest.configurable import Configurable
from keras_resnest.layers import (
    AlignedConvolution,
    BatchNormalization,
    L2Normalization,
    TransferConnectionBlock,
)
from keras_resnest.layers.changes import KeepsLayerChanges

LEVELS = ("P3", "P4", "P5")  # of the backbone, strides 8, 16 and 32; P6 is added here
STRIDES = (8, 16, 32, 64)
L2_SCALES = (10.0, 8.0)  # initial scales of P3 and P4, as in the authors' code


@checked
@keras.saving.register_keras_serializable("keras_resnest")
class RefineDetHeads(Configurable):
    """The layers of RefineDet after the backbone.

    Args:
        filters: channels of the TCBs, and so of the maps that the ODM reads.
        extra_filters: channels of the two convolutions that make P6 from P5.
        use_batch_norm: whether these layers are batch normalized. The paper's VGG-16 models
            are not; it helps training from scratch.
        use_l2_normalization: whether P3 and P4 are L2 normalized, as in the VGG-16 models.
        use_residual_blocks: whether a residual block makes P6 and one of (`filters`, `filters`,
            `4 * filters`) channels precedes every pair of heads, as in the authors' ResNet-101
            models.
        use_transfer_connection: whether the ODM reads the TCBs, or the ARM's maps (table 3).
        use_alignment: whether the ODM reads its maps inside the refined anchors (RefineDet++),
            or around the cells.
        predict_iou: whether the ODM also predicts the IoU of its boxes with the objects.

    Raises:
        ValueError: if `filters` or `extra_filters` is not positive.

    Example:
        >>> heads = RefineDetHeads(filters=64, use_batch_norm=True)
        >>> model = RefineDet(num_classes=3, backbone="resnest14_tiny", heads=heads)
    """

    def __init__(
        self,
        filters: int = 256,
        extra_filters: Sequence[int] = (256, 512),
        use_batch_norm: bool = False,
        use_l2_normalization: bool = True,
        use_residual_blocks: bool = False,
        use_transfer_connection: bool = True,
        use_alignment: bool = False,
        predict_iou: bool = False,
    ):
        extra_filters = tuple(extra_filters)
        widths = (filters, *extra_filters)
        if len(widths) != 3 or any(not isinstance(n, int | np.integer) or n < 1 for n in widths):
            raise ValueError(
                "`filters` must be a positive integer, `extra_filters` two positive integers. "
                f"Received: filters={filters}, extra_filters={extra_filters}"
            )
        self.filters = int(filters)
        self.extra_filters = tuple(int(n) for n in extra_filters)
        self.use_batch_norm = bool(use_batch_norm)
        self.use_l2_normalization = bool(use_l2_normalization)
        self.use_residual_blocks = bool(use_residual_blocks)
        self.use_transfer_connection = bool(use_transfer_connection)
        self.use_alignment = bool(use_alignment)
        self.predict_iou = bool(predict_iou)

    def __call__(
        self,
        features,
        anchor_generator: AnchorGenerator,
        num_classes: int,
        variances=VARIANCES,
        dtype=None,
    ) -> dict:
        """Builds the layers on symbolic tensors.

        Args:
            features: P3, P4 and P5 of the backbone, (batch, height, width, channels).
            anchor_generator: generates the anchors of the four levels.
            num_classes: number of classes, without background.
            variances: of the ARM's offsets, see `encode_boxes`.
            dtype: dtype policy of the layers.

        Returns:
            Raw outputs: `"arm_boxes"` (batch, anchors, 4), `"arm_objectness"` (batch, anchors, 2),
            `"odm_boxes"` (batch, anchors, 4), `"odm_logits"` (batch, anchors, num_classes + 1),
            and with `predict_iou` `"odm_iou"` (batch, anchors, 1), logits.
        """
        num_anchors = anchor_generator.num_anchors_per_cell
        sources = self._source_levels(*features, dtype)
        arm = PredictionHead(num_anchors, 2, dtype=dtype, name="arm")
        arm_boxes, arm_objectness = arm(self._before_head("arm", sources, dtype))
        maps = self._transfer(sources, dtype) if self.use_transfer_connection else sources
        inputs = [self._before_head("odm", maps, dtype)]
        if self.use_alignment:
            refine = RefinedAnchors(
                anchor_generator, variances, dtype="float32", name="refined_anchors"
            )
            inputs.append(refine(*inputs, arm_boxes))
        kind = AlignedPredictionHead if self.use_alignment else PredictionHead
        odm = kind(num_anchors, num_classes + 1, self.predict_iou, dtype=dtype, name="odm")
        names = ("odm_boxes", "odm_logits", "odm_iou")
        return {
            "arm_boxes": arm_boxes,
            "arm_objectness": arm_objectness,
            **dict(zip(names, odm(*inputs), strict=False)),
        }

    def _source_levels(self, p3, p4, p5, dtype) -> list:
        """Returns the maps of strides 8, 16, 32 and 64 that the ARM reads."""
        width, out_width = self.extra_filters
        if self.use_residual_blocks:
            p6 = bottleneck_block(p5, width, out_width, strides=2, dtype=dtype, name="res6")
        else:
            x = self._convolution(p5, width, 1, 1, "conv6_1", dtype)
            p6 = self._convolution(x, out_width, 3, 2, "conv6_2", dtype)
        if self.use_l2_normalization:
            p3 = L2Normalization(L2_SCALES[0], dtype=dtype, name="l2_normalization_p3")(p3)
            p4 = L2Normalization(L2_SCALES[1], dtype=dtype, name="l2_normalization_p4")(p4)
        return [p3, p4, p5, p6]

    def _convolution(self, x, filters: int, kernel_size: int, strides: int, name: str, dtype):
        """Convolution with symmetric padding, optional batch normalization, ReLU."""
        if kernel_size > 1:
            x = layers.ZeroPadding2D(kernel_size // 2, dtype=dtype, name=f"{name}_padding")(x)
        x = layers.Conv2D(
            filters, kernel_size, strides, use_bias=not self.use_batch_norm, dtype=dtype, name=name
        )(x)
        if self.use_batch_norm:
            norm = {"momentum": 0.9, "epsilon": 1e-5, "name": f"{name}_batch_norm"}
            x = BatchNormalization(dtype=dtype, **norm)(x)
        return layers.ReLU(dtype=dtype, name=f"{name}_relu")(x)

    def _transfer(self, sources, dtype) -> list:
        """One TCB per level, each fed by its source and the TCB above."""
        maps, upper = [], None
        for level, source in zip((6, 5, 4, 3), reversed(sources), strict=True):
            block = TransferConnectionBlock(
                self.filters, self.use_batch_norm, dtype=dtype, name=f"tcb_p{level}"
            )
            upper = block(source) if upper is None else block(source, upper)
            maps.insert(0, upper)
        return maps

    def _before_head(self, name: str, maps, dtype) -> list:
        if not self.use_residual_blocks:
            return maps
        width = self.filters
        return [
            bottleneck_block(x, width, 4 * width, dtype=dtype, name=f"{name}_p{level}")
            for level, x in enumerate(maps, start=3)
        ]


@keras.saving.register_keras_serializable("keras_resnest")
class RefinedAnchors(layers.Layer):
    """The anchors that the ARM's offsets have moved, where the ODM reads its maps.

    Args:
        anchor_generator: `AnchorGenerator` of the levels.
        variances: of the offsets, see `encode_boxes`.
        **kwargs: see `keras.layers.Layer`. Half precision is too coarse for boxes.

    Call arguments:
        features: list of feature maps (batch, height, width, channels), one for each level.
        offsets: (batch, anchors, 4).

    Returns:
        For each level `"xyxy"` boxes (batch, anchors, 4) in its pixels, without a gradient.

    Example:
        >>> p3_boxes, *_ = RefinedAnchors(AnchorGenerator())([p3, p4, p5, p6], offsets)
    """

    def __init__(self, anchor_generator: AnchorGenerator, variances=VARIANCES, **kwargs):
        super().__init__(**kwargs)
        self.anchor_generator = anchor_generator
        self.variances = tuple(variances)

    def call(self, features, offsets):
        generator = self.anchor_generator
        sides = [ops.shape(x)[1:3] for x in features]
        anchors = generator([side * generator.strides[0] for side in sides[0]])
        boxes = decode_boxes(ops.stop_gradient(offsets), anchors, self.variances)
        levels, start = [], 0
        for (height, width), stride, count in zip(
            sides, generator.strides, generator.num_anchors_per_cell, strict=True
        ):
            stop = start + height * width * count
            levels.append(boxes[:, start:stop] / stride)
            start = stop
        return levels

    def get_config(self) -> dict:
        generator = keras.saving.serialize_keras_object(self.anchor_generator)
        config = {"anchor_generator": generator, "variances": self.variances}
        return {**super().get_config(), **config}

    @classmethod
    def from_config(cls, config: dict) -> "RefinedAnchors":
        generator = keras.saving.deserialize_keras_object(config["anchor_generator"])
        return cls(**{**config, "anchor_generator": generator})


@keras.saving.register_keras_serializable("keras_resnest")
class PredictionHead(KeepsLayerChanges, layers.Layer):
    """One 3x3 convolution for boxes and one for classes on each level.

    Both stages of RefineDet use it: with two logits it is the Anchor Refinement Module, with
    `num_classes + 1` the Object Detection Module.

    Args:
        num_anchors: anchors of one cell, for each level.
        num_outputs: class logits of one anchor, including the background.
        predict_iou: whether a third convolution predicts the IoU of each box.
        **kwargs: see `keras.layers.Layer`.

    Call arguments:
        features: list of feature maps (batch, height, width, channels), one for each level.

    Returns:
        Offsets (batch, anchors, 4), logits (batch, anchors, num_outputs), and with `predict_iou`
        logits of the IoU (batch, anchors, 1). Anchors run over level, row, column, anchor of the
        cell.

    Example:
        >>> offsets, logits = PredictionHead((3, 3), num_outputs=2)([p3, p4])

    Source: RefineDet (arXiv 1711.06897) section 3.1.
    """

    def __init__(self, num_anchors, num_outputs: int, predict_iou: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.num_anchors = tuple(int(n) for n in num_anchors)
        self.num_outputs = int(num_outputs)
        self.predict_iou = bool(predict_iou)
        self.box_convolutions = self._convolutions("boxes", 4)
        self.class_convolutions = self._convolutions("classes", self.num_outputs)
        self.iou_convolutions = self._convolutions("iou", 1) if self.predict_iou else []
        self._layers_made()

    def _convolutions(self, name: str, outputs: int) -> list:
        return [
            layers.Conv2D(
                n * outputs, 3, padding="same", dtype=self.dtype_policy, name=f"{name}_{i}"
            )
            for i, n in enumerate(self.num_anchors)
        ]

    def build(self, input_shape):
        if len(input_shape) != len(self.num_anchors):
            raise ValueError(
                f"{self.name} needs one feature map per entry of `num_anchors`="
                f"{self.num_anchors}. Received: {len(input_shape)} feature maps"
            )
        for convolutions, _ in self._outputs():
            for convolution, shape in zip(convolutions, input_shape, strict=True):
                convolution.build(shape)
        super().build(input_shape)

    def call(self, features):
        return tuple(self._flatten(layers, features, n) for layers, n in self._outputs())

    def _outputs(self) -> list:
        """Convolutions of all levels and the number of outputs of an anchor, for each output."""
        outputs = [(self.box_convolutions, 4), (self.class_convolutions, self.num_outputs)]
        return [*outputs, (self.iou_convolutions, 1)] if self.predict_iou else outputs

    @staticmethod
    def _flatten(convolutions, features, outputs: int):
        maps = [convolution(x) for convolution, x in zip(convolutions, features, strict=True)]
        rows = [ops.reshape(m, _flat_shape(m, outputs)) for m in maps]
        return ops.concatenate(rows, axis=1)  # (B, anchors, outputs)

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "num_anchors": self.num_anchors,
            "num_outputs": self.num_outputs,
            "predict_iou": self.predict_iou,
        }


@keras.saving.register_keras_serializable("keras_resnest")
class AlignedPredictionHead(PredictionHead):
    """ODM of RefineDet++: a `PredictionHead` of aligned convolutions.

    Args:
        num_anchors: anchors of one cell, for each level.
        num_outputs: class logits of one anchor, including the background.
        predict_iou: whether a third convolution predicts the IoU of each box.
        **kwargs: see `keras.layers.Layer`.

    Call arguments:
        features: list of feature maps (batch, height, width, channels), one for each level.
        boxes: for each level the boxes to read, as `RefinedAnchors` returns them.

    Returns:
        As `PredictionHead`.

    Example:
        >>> offsets, logits = AlignedPredictionHead((3, 3), 21)([p3, p4], [p3_boxes, p4_boxes])

    Source: RefineDet++, "Single-Shot Refinement Neural Network for Object Detection", IEEE TCSVT
    2020.
    """

    def __init__(self, num_anchors, num_outputs: int, predict_iou: bool = False, **kwargs):
        # Boxes remain in float32; the convolutions cast their features.
        super().__init__(num_anchors, num_outputs, predict_iou, autocast=False, **kwargs)

    def _convolutions(self, name: str, outputs: int) -> list:
        return [
            AlignedConvolution(n, outputs, dtype=self.dtype_policy, name=f"{name}_{i}")
            for i, n in enumerate(self.num_anchors)
        ]

    def build(self, features_shape, boxes_shape):
        super().build(list(zip(features_shape, boxes_shape, strict=True)))

    def call(self, features, boxes):
        return super().call(list(zip(features, boxes, strict=True)))


def _flat_shape(feature_map, outputs: int) -> tuple:
    """Shape (batch, anchors, outputs) of a flattened output; -1 for one of the first two."""
    sides = feature_map.shape[1:]
    if None in sides:
        return ops.shape(feature_map)[0], -1, outputs
    return -1, math.prod(sides) // outputs, outputs


def bottleneck_block(x, filters: int, out_filters: int, strides: int = 1, *, dtype, name: str):
    """Residual block of 1x1, 3x3 and 1x1 convolutions, each batch normalized.

    Unlike in the backbones, the shortcut always has a convolution, and the stride is in the first
    1x1 convolution.

    Source: `ResBody` in the authors' code, github.com/sfzhang15/RefineDet.
    """
    graph = GraphBuilder(keras.config.image_data_format(), dtype)
    shortcut = graph.convolution(x, out_filters, 1, f"{name}_shortcut", strides)
    shortcut = graph.norm(shortcut, f"{name}_shortcut_bn")
    x = graph.convolution(x, filters, 1, f"{name}_conv1", strides)
    x = graph.relu(graph.norm(x, f"{name}_bn1"), f"{name}_relu1")
    x = graph.convolution(x, filters, 3, f"{name}_conv2")
    x = graph.relu(graph.norm(x, f"{name}_bn2"), f"{name}_relu2")
    x = graph.convolution(x, out_filters, 1, f"{name}_conv3")
    x = graph.norm(x, f"{name}_bn3")
    return graph.relu(graph.add(x, shortcut, f"{name}_add"), f"{name}_relu")
