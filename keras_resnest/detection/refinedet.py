"""RefineDet: the single-shot detector that refines its anchors."""

import keras
import numpy as np
from keras import layers, ops

from keras_resnest.backbones import create_backbone
from keras_resnest.boxes.anchors import AnchorGenerator
from keras_resnest.boxes.formats import check_box_format, convert_boxes, scale_boxes
from keras_resnest.boxes.matching import BoxMatcher
from keras_resnest.boxes.offsets import decode_boxes
from keras_resnest.checks import (
    check_box_dictionary,
    check_ground_truth,
    check_image_shape,
    check_images,
    check_same_classes,
    unpack_batch,
    value_errors,
)
from keras_resnest.detection.blocks import bottleneck_block
from keras_resnest.detection.class_transfer import class_sources, remap_class_outputs
from keras_resnest.detection.decoding import DetectionDecoder
from keras_resnest.detection.detect import detect_images
from keras_resnest.detection.heads import PredictionHead
from keras_resnest.detection.loss import MultiBoxLoss, encode_targets
from keras_resnest.divergence import TerminateOnDivergence
from keras_resnest.images import resize_image
from keras_resnest.layers import BatchNormalization, L2Normalization, TransferConnectionBlock
from keras_resnest.layers.normalization import set_batch_norm
from keras_resnest.replicas import num_replicas, sum_over_replicas
from keras_resnest.trainer import DistributedTraining

LEVELS = ("P3", "P4", "P5")  # of the backbone; the detector adds P6
SIDE_MULTIPLE = 64  # stride of P6
L2_SCALES = (10.0, 8.0)  # of P3 and P4, as in the authors' code
FIRST_LOSS_SCALE = 2.0**9
STAGE_LOSSES = (
    "arm_box_loss",
    "arm_classification_loss",
    "odm_box_loss",
    "odm_classification_loss",
)


@keras.saving.register_keras_serializable("keras_resnest")
class RefineDet(DistributedTraining, keras.Model):
    """RefineDet on any backbone with `pyramid_outputs`.

    The Anchor Refinement Module (ARM) finds out which anchors hold an object and
    moves them; Transfer Connection Blocks (TCB) carry features top-down; the Object
    Detection Module (ODM) classifies the refined anchors and moves them again.

    `model(images)` gives raw outputs, `predict` detections in the model's pixels,
    `detect` detections of images of any size. The two-stage loss is built in:
    compile with an optimizer alone and `fit` on batches of
    `(images, {"boxes", "labels"})` or
    `{"images", "bounding_boxes": {"boxes", "labels"}}`. Labels are 0 to
    `num_classes - 1`; rows of label -1 are padding.

    Args:
        num_classes: number of classes, without background.
        backbone: a name for `create_backbone`, or a model with `pyramid_outputs`
            `"P3"`, `"P4"`, `"P5"` at strides 8, 16 and 32.
        image_shape: (height, width, 3) of the images, sides multiples of 64.
            Images are RGB, 0 to 255, uint8 or float.
        bounding_box_format: format of ground truth and detections, as in
            `keras.utils.bounding_boxes`; `"xyxy"` is pixels of `image_shape`.
        class_names: names of the classes; saved with the model.
        anchor_generator: `AnchorGenerator` for strides 8, 16, 32, 64.
        matcher: `BoxMatcher` of both stages.
        decoder: `DetectionDecoder`. Its `objectness_threshold` also filters the
            negatives that the ODM learns from.
        multibox_loss: `MultiBoxLoss` of both stages.
        filters: channels of the TCBs, and so of the maps that the ODM reads.
        extra_filters: channels of the two convolutions that make P6 from P5.
        use_batch_norm: whether the layers after the backbone are batch normalized.
            The paper's VGG-16 models have none; it helps training from scratch.
        use_l2_normalization: whether P3 and P4 are L2 normalized, as in the VGG-16 models.
        use_residual_blocks: whether a residual block makes P6, and one of `filters`,
            `filters`, `4 * filters` channels stands before every pair of heads, as in the
            authors' ResNet-101 models.
        negative_anchor_filtering: whether anchors that the ARM finds empty (see
            `objectness_threshold` of the decoder) are left out of the ODM's negatives
            and of the detections. This and the next two switch off what table 3 of the
            paper switches off.
        two_step_regression: whether the ODM starts from the anchors as the ARM refines
            them, in matching, encoding and decoding, or from the regular ones.
        use_transfer_connection: whether the ODM reads the TCBs, or the ARM's maps.
        freeze_batch_norm: whether all batch normalization, the backbone's included, keeps
            its statistics, scale and offset: right for small batches on top of
            pretrained weights.
        synchronized_batch_norm: whether batch normalization takes its statistics over the
            batches of all replicas together, on `tf.distribute`.
        dtype: precision of the layers after the backbone, for instance
            `"mixed_bfloat16"`. Loss and boxes are always float32.
        name: name of the model.

    Raises:
        ValueError: for an argument that does not fit, saying what does.

    Source: Zhang et al., "Single-Shot Refinement Neural Network for Object
    Detection", arXiv 1711.06897.

    Example:

    >>> model = RefineDet(num_classes=3, backbone="resnest50", image_shape=(320, 320, 3))
    >>> model.compile(optimizer=keras.optimizers.SGD(1e-3, momentum=0.9))
    >>> model.fit(train_batches, epochs=10)
    >>> model.detect("photo.jpg")["boxes"]
    """

    def __init__(
        self,
        num_classes: int,
        backbone="resnest50",
        image_shape=(320, 320, 3),
        bounding_box_format: str = "xyxy",
        class_names=None,
        anchor_generator: AnchorGenerator | None = None,
        matcher: BoxMatcher | None = None,
        decoder: DetectionDecoder | None = None,
        multibox_loss: MultiBoxLoss | None = None,
        filters: int = 256,
        extra_filters=(256, 512),
        use_batch_norm: bool = False,
        use_l2_normalization: bool = True,
        use_residual_blocks: bool = False,
        negative_anchor_filtering: bool = True,
        two_step_regression: bool = True,
        use_transfer_connection: bool = True,
        freeze_batch_norm: bool = False,
        synchronized_batch_norm: bool = False,
        dtype=None,
        name: str = "refinedet",
    ):
        # === Arguments ===
        image_shape = (*check_image_shape(image_shape, SIDE_MULTIPLE), 3)
        class_names = _check_class_names(class_names, num_classes)
        bounding_box_format = check_box_format(bounding_box_format)
        if isinstance(backbone, str):
            backbone = create_backbone(
                backbone, include_top=False, include_rescaling=True, dtype=dtype
            )
        anchor_generator = anchor_generator or AnchorGenerator()
        _check_anchor_generator(anchor_generator)

        # === Functional model ===
        policy = keras.dtype_policies.get(dtype or keras.config.dtype_policy())
        head = {"filters": int(filters), "use_batch_norm": bool(use_batch_norm), "dtype": policy}
        extra_filters = _check_extra_filters(extra_filters)
        images = keras.Input(image_shape, name="images")
        features = _backbone_features(backbone)(images)
        sources = _source_levels(
            features, extra_filters, bool(use_l2_normalization), bool(use_residual_blocks), head
        )
        outputs = _two_stages(
            sources,
            anchor_generator,
            int(num_classes),
            bool(use_transfer_connection),
            bool(use_residual_blocks),
            head,
        )
        super().__init__(inputs=images, outputs=outputs, name=name)
        # Training may change the size from batch to batch.
        self.input_spec = [layers.InputSpec(shape=(None, None, None, 3))]
        self.dtype_policy = policy  # mixed_float16 makes `compile` scale the loss

        # === Config ===
        self.num_classes = int(num_classes)
        self.backbone = backbone
        self.image_shape = image_shape
        self.bounding_box_format = bounding_box_format
        self.class_names = class_names
        self.anchor_generator = anchor_generator
        self.matcher = matcher or BoxMatcher()
        self.decoder = decoder or DetectionDecoder()
        self.multibox_loss = multibox_loss or MultiBoxLoss()
        self.filters = head["filters"]
        self.extra_filters = extra_filters
        self.use_batch_norm = head["use_batch_norm"]
        self.use_l2_normalization = bool(use_l2_normalization)
        self.use_residual_blocks = bool(use_residual_blocks)
        self.negative_anchor_filtering = bool(negative_anchor_filtering)
        self.two_step_regression = bool(two_step_regression)
        self.use_transfer_connection = bool(use_transfer_connection)
        self.freeze_batch_norm = bool(freeze_batch_norm)
        self.synchronized_batch_norm = bool(synchronized_batch_norm)
        set_batch_norm(self, self.freeze_batch_norm, self.synchronized_batch_norm)
        self.anchors = anchor_generator(image_shape)  # "xyxy" pixels, (anchors, 4)
        self._detect_function = None
        self._stage_trackers = [keras.metrics.Mean(name=n) for n in STAGE_LOSSES]

    # === Training ===

    def compile(self, optimizer=None, **kwargs):
        """As `keras.Model.compile`, with the loss built in.

        Args:
            optimizer: a Keras optimizer. By default the paper's SGD, learning rate 1e-3 and
                momentum 0.9, with a warm-up of 500 steps and clipped gradients. See
                `keras_resnest.recipes` for whole schedules.
                Under `"mixed_float16"` its loss is scaled, `auto_scale_loss=False` aside.
            **kwargs: as in `keras.Model.compile`. `jit_compile="auto"` means no XLA on
                TensorFlow: it compiles for minutes, again for every new shape of images or
                ground truth, and leaves out the checks of each batch. `jit_compile=True`
                compiles training and evaluation; NMS is no XLA operation, so that
                `predict` stays as it is.

        Raises:
            ValueError: if `loss` or `metrics` are given. For mean average precision
                use the `DetectionEvaluation` callback.
        """
        for name in ("loss", "loss_weights", "metrics", "weighted_metrics"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"RefineDet has its loss built in and takes no `{name}`; average precision "
                    f"comes from the DetectionEvaluation callback. Received: {name}={kwargs[name]}"
                )
        if keras.backend.backend() == "tensorflow" and kwargs.get("jit_compile", "auto") == "auto":
            kwargs["jit_compile"] = False
        optimizer = _default_optimizer() if optimizer is None else keras.optimizers.get(optimizer)
        if self.dtype_policy.name == "mixed_float16" and kwargs.get("auto_scale_loss", True):
            optimizer = _with_loss_scaling(optimizer)
        super().compile(optimizer=optimizer, **kwargs)

    def make_predict_function(self, force=False):
        jit_compile = self.jit_compile
        if keras.backend.backend() == "tensorflow":
            self.jit_compile = False
        try:
            return super().make_predict_function(force)
        finally:
            self.jit_compile = jit_compile

    def compile_from_config(self, config: dict):
        """Compiles as the saved model was, its optimizer state included."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def fit(self, x=None, y=None, *args, **kwargs):
        """As `keras.Model.fit`; faulty images or boxes raise a `ValueError`.

        A loss that becomes NaN or infinite, or grows far beyond where it began, ends the
        training with a `FloatingPointError` that says so; see `TerminateOnDivergence`.
        """
        self._check_arrays(x)
        for data in (x, kwargs.get("validation_data")):
            check_same_classes(data, self.class_names)
        if y is None and not isinstance(x, dict):  # Keras warns where it cannot shuffle
            kwargs.setdefault("shuffle", False)
        kwargs["callbacks"] = _with_divergence_guard(kwargs.get("callbacks"))
        with value_errors():
            return super().fit(x, y, *args, **kwargs)

    def evaluate(self, x=None, y=None, *args, **kwargs):
        """As `keras.Model.evaluate`: the losses. For mAP see `DetectionEvaluation`."""
        self._check_arrays(x)
        check_same_classes(x, self.class_names)
        with value_errors():
            return super().evaluate(x, y, *args, **kwargs)

    def train_step(self, *args):
        """One step; the batch, in either layout, is the last argument on every backend."""
        return super().train_step(*args[:-1], self._checked(args[-1]))

    def test_step(self, *args):
        return super().test_step(*args[:-1], self._checked(args[-1]))

    def _symbolic_build(self, iterator=None, data_batch=None):
        # All layers are built; Keras would call them on a batch whose layout it does not know.
        if self.optimizer is not None and not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)

    def _checked(self, data):
        """A batch of either layout as (images, ground truth, sample weight)."""
        images, y, sample_weight = unpack_batch(data)
        sides = _sides(images)
        boxes, labels = self._corners(y, sides)
        relative = convert_boxes(boxes, "xyxy", "rel_xyxy", *sides)
        images = check_ground_truth(
            images, boxes, labels, relative, self.num_classes, self.bounding_box_format
        )
        return check_images(images), y, sample_weight

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The two-stage loss, RefineDet eq. 1. The ODM learns from ARM-refined anchors."""
        sides = self.image_shape[:2] if x is None else _sides(x)
        boxes, labels = self._corners(y, sides)
        values = self.stage_losses(boxes, labels, y_pred, sides)
        batch, replicas = ops.shape(labels)[0], num_replicas()
        # The values add up over replicas; the mean over rows that Keras takes must give that sum.
        # Training batches are shared evenly.
        share = 1.0 if training or replicas == 1 else _share_of_rows(batch, replicas)
        for tracker in self._stage_trackers:
            tracker.update_state(values[tracker.name] * replicas / share, sample_weight=batch)
        regularization = [ops.sum(value) / replicas for value in self.losses]
        return sum(values.values()) / share + sum(regularization)

    def stage_losses(self, boxes, labels, outputs, image_shape=None) -> dict:
        """The four losses of a batch.

        Args:
            boxes: ground truth, `"xyxy"` in pixels, (batch, objects, 4).
            labels: int, (batch, objects), padding is -1.
            outputs: raw outputs of the model.
            image_shape: (height, width) of the images, the model's by default.

        Returns:
            Dictionary of float32 scalars, each divided by the positives of its stage
            in the global batch of all replicas.
        """
        arm_boxes = ops.cast(outputs["arm_boxes"], "float32")
        arm_objectness = ops.cast(outputs["arm_objectness"], "float32")
        anchors = ops.convert_to_tensor(self.anchors_for(image_shape or self.image_shape))
        any_object = ops.minimum(labels, 0)  # the ARM knows one class
        arm_targets = encode_targets(
            boxes, any_object, anchors, self.matcher, self.decoder.variances
        )
        arm = self.multibox_loss(*arm_targets, arm_boxes, arm_objectness)

        refined = anchors
        if self.two_step_regression:
            refined = decode_boxes(arm_boxes, anchors, self.decoder.variances)
            refined = ops.stop_gradient(refined)
        odm_targets = encode_targets(boxes, labels, refined, self.matcher, self.decoder.variances)
        objectness = ops.softmax(ops.stop_gradient(arm_objectness), axis=-1)[..., 1]
        not_easy = None
        if self.negative_anchor_filtering:
            not_easy = objectness > self.decoder.objectness_threshold
        odm = self.multibox_loss(
            *odm_targets, outputs["odm_boxes"], outputs["odm_logits"], not_easy
        )

        values = {}
        for stage, (box_sum, class_sum, positives) in (("arm", arm), ("odm", odm)):
            count = ops.maximum(sum_over_replicas(positives), 1.0)
            values[f"{stage}_box_loss"] = box_sum / count
            values[f"{stage}_classification_loss"] = class_sum / count
        return values

    def _corners(self, y, sides):
        """Ground truth as `"xyxy"` pixel boxes and int32 labels."""
        check_box_dictionary(y)
        boxes = convert_boxes(y["boxes"], self.bounding_box_format, "xyxy", *sides)
        return boxes, ops.cast(y["labels"], "int32")

    # === Prediction ===

    def anchors_for(self, image_shape):
        """Anchors, `"xyxy"` in pixels, (anchors, 4), of images of (height, width, ...)."""
        height, width = image_shape[:2]
        known = isinstance(height, int) and isinstance(width, int)
        if known and (height, width) == self.image_shape[:2]:
            return self.anchors
        return self.anchor_generator((height, width))

    def decode(self, outputs, image_shape=None, portable: bool = False) -> dict:
        """Detections from raw outputs; see `DetectionDecoder`.

        Args:
            outputs: what `model(images)` gives.
            image_shape: (height, width) of these images, the model's by default.
            portable: see `DetectionDecoder`.

        Returns:
            As `predict`, boxes in `bounding_box_format` and pixels of the images.
        """
        switched_off = set()
        if not self.two_step_regression:
            switched_off.add("arm_boxes")
        if not self.negative_anchor_filtering:
            switched_off.add("arm_objectness")
        used = {name: value for name, value in outputs.items() if name not in switched_off}
        shape, anchors = self.image_shape, self.anchors
        if image_shape is not None:
            shape, anchors = image_shape, self.anchors_for(image_shape)
        return self.decoder(used, anchors, shape, self.bounding_box_format, portable)

    def predict_step(self, *args):
        images, _, _ = unpack_batch(args[-1])
        result = super().predict_step(*args[:-1], (check_images(images),))
        if keras.backend.backend() == "jax":  # there a step hands its state on
            return self.decode(result[0]), result[1]
        return self.decode(result)

    def predict(self, x, *args, **kwargs) -> dict:
        """Detections of images that already have the model's size.

        Args:
            x: images (batch, height, width, 3), RGB, 0 to 255, uint8 or float; or a
                `tf.data.Dataset` of them or of training batches.
            *args: as in `keras.Model.predict`.
            **kwargs: as in `keras.Model.predict`.

        Returns:
            Dictionary of arrays: `"boxes"` (batch, max_detections, 4) in
            `bounding_box_format`, `"confidence"` and `"labels"` (batch,
            max_detections), by falling confidence, `"num_detections"` (batch,). Rows
            beyond `num_detections` are -1.
        """
        self._check_arrays(x)
        with value_errors():
            return super().predict(x, *args, **kwargs)

    def detect(self, images, confidence_threshold: float = 0.3, batch_size: int = 8):
        """Detections of images of any size.

        Args:
            images: a path, an encoded image (bytes), a PIL image, an array (height,
                width, channels) 0 to 255, a folder, or a list or 4-D array of images.
            confidence_threshold: lowest confidence that is returned, 0 to 1.
            batch_size: images that go through the network together.

        Returns:
            For one image a dictionary of arrays: `"boxes"` (n, 4) in
            `bounding_box_format` and the image's own pixels, `"confidence"` (n,),
            `"labels"` (n,), by falling confidence, and `"class_names"`, a list of n
            names. For several images a list of these. In it an image that cannot
            be read is None, and a warning names it.

        Raises:
            ValueError: if a single image cannot be read.
        """
        return detect_images(
            images, lambda pictures: self._detect_batch(pictures, confidence_threshold), batch_size
        )

    def _detect_batch(self, images: list, confidence_threshold: float) -> list[dict]:
        if not images:
            return []
        height, width = self.image_shape[:2]
        resized = [ops.convert_to_numpy(resize_image(p, height, width)) for p in images]
        batch = self.predict_locally(np.stack(resized))
        return [
            self._own_pixels({k: v[i] for k, v in batch.items()}, p.shape, confidence_threshold)
            for i, p in enumerate(images)
        ]

    def predict_locally(self, images) -> dict:
        """Detections of one batch by this process alone, whatever strategy it trains under.

        Args:
            images: images (batch, height, width, 3) of the model's size, 0 to 255. Unlike
                in `predict`, they may be so dark that they look like fractions.

        Returns:
            As `predict`.
        """
        if keras.backend.backend() != "tensorflow":
            return self.predict_on_batch(images)
        if self._detect_function is None:
            import tensorflow as tf

            self._detect_function = tf.function(
                lambda images: self.decode(self(images, training=False)), reduce_retracing=True
            )
        return {name: value.numpy() for name, value in self._detect_function(images).items()}

    def _own_pixels(self, detections: dict, shape, confidence_threshold: float) -> dict:
        """Detections of one image, without padding, in the pixels of an image of `shape`."""
        chosen = detections["confidence"] >= max(confidence_threshold, 0.0)
        height, width = self.image_shape[:2]
        boxes = scale_boxes(
            detections["boxes"][chosen],
            self.bounding_box_format,
            shape[1] / width,
            shape[0] / height,
        )
        labels = detections["labels"][chosen]
        return {
            "boxes": ops.convert_to_numpy(boxes),
            "confidence": detections["confidence"][chosen],
            "labels": labels,
            "class_names": [self.class_name(label) for label in labels],
        }

    def class_name(self, label: int) -> str:
        """Name of a class, its number where the model has no `class_names`."""
        return self.class_names[int(label)] if self.class_names else str(int(label))

    def _check_arrays(self, images) -> None:
        """The checks of the graph, where arrays are given and every backend can look."""
        if isinstance(images, dict):
            images = images.get("images")
        if not isinstance(images, np.ndarray):
            return
        if images.ndim != 4 or images.shape[1:] != self.image_shape:
            raise ValueError(
                f"`x` must have shape (batch, {', '.join(map(str, self.image_shape))}); `detect` "
                f"takes images of any size. Received: x.shape={images.shape}"
            )
        if keras.backend.backend() != "tensorflow":
            check_images(images)

    # === Other classes ===

    def replace_classes(self, class_names, mapping=None, **kwargs) -> "RefineDet":
        """A new model for other classes, which starts from the weights of this one.

        Backbone, ARM, TCBs, boxes and the background are those of this model. A class that
        this model knows, by name, by one of the other names that VOC and COCO have for it
        ("sofa" and "couch"), or by `mapping`, keeps its rows of the class head: its logits are
        the same. Other classes start at random. This is how one starts VOC from COCO.

        Args:
            class_names: names of the new classes.
            mapping: for some new classes the name of the class here, or None to start afresh;
                see `keras_resnest.detection.class_sources`.
            **kwargs: further arguments of `RefineDet` that differ, such as `image_shape`.

        Returns:
            A `RefineDet` of its own weights, not compiled.

        Raises:
            ValueError: if this model has no `class_names`, `mapping` has an unknown name, or
                the other arguments make a network of another shape.

        Example:

        >>> voc = coco_model.replace_classes(["aeroplane", "bicycle", "bird"])
        """
        if self.class_names is None:
            raise ValueError("`replace_classes` needs a model with `class_names`. Received: none")
        names = _check_class_names(class_names, len(class_names))
        sources = class_sources(names, self.class_names, mapping)
        columns = [0] + [
            None if s is None else 1 + self.class_names.index(s) for s in sources.values()
        ]
        config = {**self.get_config(), "num_classes": len(names), "class_names": names, **kwargs}
        model = RefineDet.from_config(config)
        _copy_weights(self, model, columns)
        return model

    # === Saving ===

    def export(self, filepath, format: str = "tf_saved_model", verbose=None, **kwargs):
        """Writes the model for TensorFlow Serving, onnxruntime, OpenVINO or LiteRT.

        Nothing of Keras or of this package is needed to run it: boxes are decoded and
        suppressed inside.

        Args:
            filepath: folder or file to write, for instance `"serving/1"`.
            format: `"tf_saved_model"`, `"onnx"`, `"openvino"` or `"litert"`.
            verbose: whether to say what was written.
            **kwargs: `precision`, `decode` and others: see `keras_resnest.serving.export_model`.

        Example:

        >>> model.export("serving/1", precision="bfloat16")
        >>> model.export("detector.onnx", format="onnx")
        """
        from keras_resnest.serving.export import export_model

        export_model(self, filepath, format, verbose=bool(verbose), **kwargs)

    def get_config(self) -> dict:
        serialize = keras.saving.serialize_keras_object
        return {
            "num_classes": self.num_classes,
            "backbone": serialize(self.backbone),
            "image_shape": self.image_shape,
            "bounding_box_format": self.bounding_box_format,
            "class_names": self.class_names,
            "anchor_generator": serialize(self.anchor_generator),
            "matcher": serialize(self.matcher),
            "decoder": serialize(self.decoder),
            "multibox_loss": serialize(self.multibox_loss),
            "filters": self.filters,
            "extra_filters": self.extra_filters,
            "use_batch_norm": self.use_batch_norm,
            "use_l2_normalization": self.use_l2_normalization,
            "use_residual_blocks": self.use_residual_blocks,
            "negative_anchor_filtering": self.negative_anchor_filtering,
            "two_step_regression": self.two_step_regression,
            "use_transfer_connection": self.use_transfer_connection,
            "freeze_batch_norm": self.freeze_batch_norm,
            "synchronized_batch_norm": self.synchronized_batch_norm,
            "dtype": serialize(self.dtype_policy),
            "name": self.name,
        }

    def training_config(self) -> dict:
        """What decides, beside the shapes of the weights, what this model learns.

        `ResumeTraining` compares it: a training must not go on with other classes, another
        image size or other anchors.

        Returns:
            Dictionary that JSON can hold.
        """
        config = self.get_config()
        for name in ("backbone", "decoder", "dtype", "name"):  # a backbone's layers have own names
            del config[name]
        parts = ("anchor_generator", "matcher", "multibox_loss")
        return {**config, **{name: config[name]["config"] for name in parts}}

    @classmethod
    def from_config(cls, config: dict, custom_objects=None) -> "RefineDet":
        parts = ("backbone", "anchor_generator", "matcher", "decoder", "multibox_loss", "dtype")
        config = dict(config)
        for part in parts:
            if isinstance(config.get(part), dict):
                config[part] = keras.saving.deserialize_keras_object(
                    config[part], custom_objects=custom_objects
                )
        return cls(**config)


def _check_anchor_generator(anchor_generator: AnchorGenerator) -> None:
    if anchor_generator.strides != (8, 16, 32, 64):
        raise ValueError(
            "`anchor_generator` must have the strides of the feature maps, (8, 16, 32, 64). "
            f"Received: strides={anchor_generator.strides}"
        )


def _default_optimizer() -> keras.optimizers.Optimizer:
    # Keras' cosine with a warm-up, stretched so far that the rate stays where it is.
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, decay_steps=10**9, warmup_target=1e-3, warmup_steps=500
    )
    return keras.optimizers.SGD(rate, momentum=0.9, global_clipnorm=10.0)


def _with_loss_scaling(optimizer):
    """For float16. From Keras' own 2 ** 15 on, the first five steps of a detector overflow."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer
    return keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=FIRST_LOSS_SCALE)


def _with_divergence_guard(callbacks):
    """The callbacks, with a `TerminateOnDivergence` where there is none."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        return callbacks
    callbacks = keras.tree.flatten(callbacks) if callbacks is not None else []
    if any(isinstance(callback, TerminateOnDivergence) for callback in callbacks):
        return callbacks
    return [TerminateOnDivergence(), *callbacks]


def _check_class_names(class_names, num_classes):
    if not isinstance(num_classes, int | np.integer) or num_classes < 1:
        raise ValueError(
            f"`num_classes` must be a positive integer. Received: num_classes={num_classes!r}"
        )
    if class_names is None:
        return None
    if len(class_names) != num_classes or len(set(class_names)) != num_classes:
        raise ValueError(
            f"`class_names` must hold {num_classes} different names, one per class. "
            f"Received: class_names={list(class_names)}"
        )
    return [str(name) for name in class_names]


def _backbone_features(backbone) -> keras.Model:
    pyramid = getattr(backbone, "pyramid_outputs", None)
    if not isinstance(pyramid, dict) or not set(LEVELS) <= set(pyramid):
        raise ValueError(
            f"`backbone` must be a name or a model with `pyramid_outputs` for {', '.join(LEVELS)}. "
            f"Received: {backbone!r} with {list(pyramid or [])}"
        )
    return keras.Model(
        backbone.inputs, [pyramid[p] for p in LEVELS], name=f"{backbone.name}_pyramid"
    )


def _check_extra_filters(extra_filters) -> tuple[int, int]:
    filters = tuple(extra_filters)
    if len(filters) != 2 or any(not isinstance(f, int | np.integer) or f < 1 for f in filters):
        raise ValueError(
            "`extra_filters` must be two positive integers, the channels of the two convolutions "
            f"after the backbone. Received: extra_filters={extra_filters}"
        )
    return tuple(int(f) for f in filters)


def _source_levels(features, extra_filters, l2_normalization: bool, residual: bool, head: dict):
    """The four feature maps that the heads read, strides 8 to 64."""
    p3, p4, p5 = features
    dtype = head["dtype"]
    if residual:
        p6 = bottleneck_block(p5, *extra_filters, strides=2, dtype=dtype, name="res6")
    else:
        x = _convolution(p5, extra_filters[0], 1, 1, "conv6_1", head)
        p6 = _convolution(x, extra_filters[1], 3, 2, "conv6_2", head)
    if l2_normalization:
        p3 = L2Normalization(scale=L2_SCALES[0], dtype=dtype, name="l2_normalization_p3")(p3)
        p4 = L2Normalization(scale=L2_SCALES[1], dtype=dtype, name="l2_normalization_p4")(p4)
    return [p3, p4, p5, p6]


def _convolution(x, filters: int, kernel_size: int, strides: int, name: str, head: dict):
    """Convolution with symmetric padding, optional batch normalization, ReLU."""
    dtype, batch_norm = head["dtype"], head["use_batch_norm"]
    if kernel_size > 1:
        x = layers.ZeroPadding2D(kernel_size // 2, dtype=dtype, name=f"{name}_padding")(x)
    x = layers.Conv2D(
        filters, kernel_size, strides, use_bias=not batch_norm, dtype=dtype, name=name
    )(x)
    if batch_norm:
        x = BatchNormalization(momentum=0.9, epsilon=1e-5, dtype=dtype, name=f"{name}_batch_norm")(
            x
        )
    return layers.ReLU(dtype=dtype, name=f"{name}_relu")(x)


def _two_stages(
    sources, anchor_generator, num_classes: int, transfer: bool, residual: bool, head: dict
) -> dict:
    """ARM on the sources, TCBs from the top level down, ODM on what they give."""

    def predict(maps, outputs, name):
        if residual:
            maps = [
                bottleneck_block(x, width, 4 * width, dtype=dtype, name=f"{name}_p{level}")
                for level, x in enumerate(maps, start=3)
            ]
        return PredictionHead(counts, outputs, dtype=dtype, name=name)(maps)

    counts, dtype, width = anchor_generator.num_anchors_per_cell, head["dtype"], head["filters"]
    arm_boxes, arm_objectness = predict(sources, 2, "arm")
    transferred = _transfer(sources, head) if transfer else sources
    odm_boxes, odm_logits = predict(transferred, num_classes + 1, "odm")
    return {
        "arm_boxes": arm_boxes,
        "arm_objectness": arm_objectness,
        "odm_boxes": odm_boxes,
        "odm_logits": odm_logits,
    }


def _transfer(sources, head: dict) -> list:
    """The ODM's maps: one TCB per level, each fed by its source and the TCB above."""
    transferred, upper = [], None
    for level, source in zip((6, 5, 4, 3), reversed(sources), strict=True):
        block = TransferConnectionBlock(**head, name=f"tcb_p{level}")
        upper = block(source) if upper is None else block(source, upper)
        transferred.insert(0, upper)
    return transferred


def _sides(images) -> tuple:
    """(height, width) of a batch; tensors where the graph does not know them."""
    sides = images.shape[1:3]
    return tuple(ops.shape(images)[1:3]) if None in tuple(sides) else tuple(sides)


def _share_of_rows(rows, replicas: int):
    """Rows of this replica, at least one, as a multiple of those that each has in the mean."""
    rows = ops.cast(rows, "float32")
    return ops.maximum(rows, 1.0) * replicas / sum_over_replicas(rows)


def _copy_weights(source: RefineDet, target: RefineDet, columns) -> None:
    """All weights, those of the class convolutions by `columns` of the target."""
    by_class = {id(w) for c in target.get_layer("odm").class_convolutions for w in c.weights}
    if len(source.weights) != len(target.weights):
        raise ValueError(
            "`replace_classes` keeps the network. Received: arguments that give it "
            f"{len(target.weights)} weights instead of {len(source.weights)}"
        )
    for old, new in zip(source.weights, target.weights, strict=True):
        value = ops.convert_to_numpy(old)
        if id(new) in by_class:
            value = remap_class_outputs(ops.convert_to_numpy(new), value, columns)
        new.assign(value)
