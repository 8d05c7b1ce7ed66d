"""RefineDet: the single-shot detector that refines its anchors.

The network is backbone and `RefineDetHeads`; `RefineDetLoss` trains it, `DetectionDecoder` turns
its raw outputs into detections.
"""

import os
from collections.abc import Iterator, Mapping, Sequence

import keras
import numpy as np
from keras import layers, ops

from keras_resnest.backbones import create_backbone
from keras_resnest.backbones.backbone import Backbone
from keras_resnest.backbones.presets import SharedAsPreset
from keras_resnest.boxes.anchors import AnchorGenerator, height_and_width
from keras_resnest.boxes.formats import check_box_format, convert_boxes
from keras_resnest.checks import (
    check_batch_shape,
    check_box_dictionary,
    check_box_shapes,
    check_class_names,
    check_counts,
    check_ground_truth,
    check_image_shape,
    check_images,
    check_same_classes,
    check_sample_weight,
    checked,
    class_thresholds,
    dense_boxes,
    float_policy,
    reading_config,
    unpack_batch,
    value_errors,
)
from keras_resnest.detection.arguments import (
    check_anchor_generator,
    check_channels_last,
    check_classes,
    check_parts,
    check_same_offsets,
)
from keras_resnest.detection.class_transfer import class_sources, copy_weights
from keras_resnest.detection.decoding import DetectionDecoder
from keras_resnest.detection.detect import (
    CompiledDetector,
    TiledDetector,
    detect_images,
    detect_resized,
)
from keras_resnest.detection.heads import LEVELS, STRIDES, RefineDetHeads
from keras_resnest.detection.loss import LOSS_NAMES, RefineDetLoss
from keras_resnest.divergence import TerminateOnDivergence
from keras_resnest.images import MAX_PIXELS
from keras_resnest.layers.changes import KeepsLayerChanges
from keras_resnest.layers.normalization import set_batch_norm
from keras_resnest.replicas import num_replicas, sum_over_replicas
from keras_resnest.trainer import DistributedTraining, check_not_forked, same_arguments_as

INITIAL_LOSS_SCALE = 2.0**9  # from Keras' 2 ** 15, the first steps of a detector overflow


@keras.saving.register_keras_serializable("keras_resnest")
@checked
class RefineDet(KeepsLayerChanges, SharedAsPreset, DistributedTraining, keras.Model):
    """RefineDet on any backbone with `pyramid_outputs`.

    The Anchor Refinement Module (ARM) finds anchors with objects and moves them; Transfer
    Connection Blocks (TCB) carry features top-down; the Object Detection Module (ODM) classifies
    the refined anchors and moves them again.

    `model(images)` returns raw outputs, `predict` detections, `detect` detections in images of any
    size. The two-stage loss is built in: compile with an optimizer alone and `fit` on batches of
    `(images, {"boxes", "labels"})` or `{"images", "bounding_boxes": {"boxes", "labels"}}`. Labels
    are 0 to `num_classes - 1`; rows with label -1 are padding.

    Args:
        num_classes: number of classes, without background; by default that of `class_names`.
        backbone: a name for `create_backbone`, or a model with `pyramid_outputs` P3, P4 and P5.
        image_shape: (height, width, 3), sides multiples of 64. Images are RGB, 0 to 255.
        bounding_box_format: format of ground truth and detections, as in
            `keras.utils.bounding_boxes`; `"xyxy"` is in pixels of `image_shape`.
        class_names: names of the classes; saved with the model.
        anchor_generator: `AnchorGenerator` for strides 8, 16, 32, 64.
        heads: `RefineDetHeads`, the layers after the backbone.
        detection_loss: `RefineDetLoss` of both stages.
        decoder: `DetectionDecoder`; may be replaced at any time.
        freeze_batch_norm: whether all batch normalization, including the backbone's, keeps its
            statistics, scale and offset: for small batches on top of pretrained weights.
        synchronized_batch_norm: whether batch statistics are taken over all replicas.
        dtype: precision of the layers, such as `"mixed_bfloat16"`. Loss and boxes are float32.
        name: name of the model.
        trainable: whether the weights are trained, as in `keras.Model`.

    Raises:
        ValueError: if an argument is unusable, or if `detection_loss` and `decoder` differ in
            `two_step_regression` or `variances`.

    Example:
        >>> model = RefineDet(num_classes=3, backbone="resnest50", image_shape=(320, 320, 3))
        >>> model.compile(optimizer=keras.optimizers.SGD(1e-3, momentum=0.9))
        >>> model.fit(train_batches, epochs=10)
        >>> model.detect("photo.jpg")["boxes"]

    Source: Zhang et al., "Single-Shot Refinement Neural Network for Object Detection",
    arXiv 1711.06897.
    """

    def __init__(
        self,
        num_classes: int | None = None,
        backbone="resnest50",
        image_shape=(320, 320, 3),
        bounding_box_format: str = "xyxy",
        class_names=None,
        anchor_generator: AnchorGenerator | None = None,
        heads: RefineDetHeads | None = None,
        detection_loss: RefineDetLoss | None = None,
        decoder: DetectionDecoder | None = None,
        freeze_batch_norm: bool = False,
        synchronized_batch_norm: bool = False,
        dtype=None,
        name: str = "refinedet",
        trainable: bool = True,
    ):
        # === Arguments ===
        check_channels_last()
        num_classes, class_names = check_classes(num_classes, class_names)
        image_shape = (*check_image_shape(image_shape, STRIDES[-1]), 3)
        bounding_box_format = check_box_format(bounding_box_format)
        anchor_generator = check_anchor_generator(anchor_generator)
        heads, detection_loss, decoder = check_parts(heads, detection_loss, decoder)
        decoder.thresholds(class_names, num_classes)
        detection_loss.check_num_classes(num_classes)
        policy = float_policy(dtype)
        backbone = _backbone(backbone, dtype)

        # === Functional model ===
        images = keras.Input(image_shape, name="images")
        features = _pyramid(backbone)(images)
        outputs = heads(features, anchor_generator, num_classes, detection_loss.variances, policy)
        super().__init__(inputs=images, outputs=outputs, name=name)
        # Training may change the size from batch to batch.
        self.input_spec = [layers.InputSpec(shape=(None, None, None, 3))]
        self.dtype_policy = policy  # mixed_float16 makes `compile` scale the loss

        # === Config ===
        self.num_classes, self.class_names = num_classes, class_names
        self.backbone = backbone
        self.image_shape = image_shape
        self.bounding_box_format = bounding_box_format
        self.anchor_generator = anchor_generator
        self.heads = heads
        self.detection_loss = detection_loss
        self.decoder = decoder
        self.freeze_batch_norm = bool(freeze_batch_norm)
        self.synchronized_batch_norm = bool(synchronized_batch_norm)
        self.anchors = anchor_generator(image_shape)  # "xyxy" in pixels, (anchors, 4)
        self.compiled_detector = CompiledDetector(self)
        names = [*LOSS_NAMES, *(["odm_iou_loss"] if "odm_iou" in outputs else [])]
        self._loss_trackers = [keras.metrics.Mean(name=n) for n in names]
        self._mark_backbone()
        given = _given_changes(backbone)
        set_batch_norm(self, self.freeze_batch_norm, self.synchronized_batch_norm)
        self._layers_made()
        self._made.backbone = given
        if not trainable:
            self.trainable = False

    # === Training ===

    def _mark_backbone(self) -> None:
        """Tells optimizers which variables are the backbone's, to train them more slowly."""
        own = {id(variable) for variable in self.backbone.variables}
        for variable in self.variables:
            variable.in_backbone = id(variable) in own

    @checked
    def freeze_stages(self, num_stages: int | None) -> None:
        """Freezes the stem and the first stages of the backbone; the rest of it is trained.

        Training changes nothing of a frozen layer, batch statistics included. Compile after this
        call, as after any change of `trainable`; `kr.callbacks.UnfreezeStages` ends it.

        Args:
            num_stages: 1 to 4; stage n ends at the backbone's level P(n + 1). None for no stage.

        Raises:
            ValueError: if the backbone has no such stage.

        Example:
            >>> model.freeze_stages(2)
        """
        ends = {int(level[1:]) - 1: map_ for level, map_ in self.backbone.pyramid_outputs.items()}
        if num_stages is not None and num_stages not in ends:
            raise ValueError(
                f"`num_stages` must be None or one of {', '.join(map(str, sorted(ends)))}. "
                f"Received: num_stages={num_stages!r}"
            )
        frozen = keras.Model(self.backbone.inputs, ends[num_stages]).layers if num_stages else ()
        for layer in self.backbone.layers:
            layer.trainable = not any(layer is other for other in frozen)
        if self.freeze_batch_norm:
            set_batch_norm(self.backbone, freeze=True)

    def compile(self, optimizer=None, *, accumulate: int = 1, **kwargs):
        """Configures training, with the loss built in.

        Args:
            optimizer: a Keras optimizer. By default the paper's SGD, learning rate 1e-3 and
                momentum 0.9, with a warm-up of 500 steps and clipped gradients.
            accumulate: number of parts in which a batch is computed, one after another, to save
                memory; TensorFlow only. The step is that of the whole batch, if batch normalization
                is frozen: a first pass counts the positives that the losses are divided by, which
                `gradient_accumulation_steps` of Keras' optimizers cannot know. It takes the time
                of a forward pass more.
            **kwargs: as in `keras.Model.compile`. On TensorFlow `jit_compile="auto"` means no XLA,
                which takes minutes for every new shape and omits the checks of each batch;
                `True` compiles training and evaluation, but not `predict`.

        Raises:
            ValueError: if `loss` or `metrics` are given, or `accumulate` is unusable.
        """
        check_counts(accumulate=accumulate)
        if accumulate > 1 and keras.backend.backend() != "tensorflow":
            raise ValueError(f"`accumulate` requires TensorFlow. Received: accumulate={accumulate}")
        self.accumulate = int(accumulate)
        for name in ("loss", "loss_weights", "metrics", "weighted_metrics"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"RefineDet has its loss built in and takes no `{name}`; average precision "
                    f"comes from the DetectionEvaluation callback. Received: {name}={kwargs[name]}"
                )
        if keras.backend.backend() == "tensorflow" and kwargs.get("jit_compile", "auto") == "auto":
            kwargs["jit_compile"] = False
        with reading_config("the optimizer"):
            optimizer = keras.optimizers.get(optimizer or _default_optimizer())
        if self.dtype_policy.name == "mixed_float16" and kwargs.get("auto_scale_loss", True):
            optimizer = _with_loss_scaling(optimizer)
        super().compile(optimizer=optimizer, **kwargs)

    def get_compile_config(self):
        config = super().get_compile_config()
        return config and {**config, "accumulate": self.accumulate}

    def compile_from_config(self, config: dict):
        """Compiles as the saved model was compiled, including the state of its optimizer."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    @same_arguments_as(keras.Model.fit)
    def fit(self, x=None, y=None, validation_data=None, callbacks=None, **kwargs):
        _refuse_class_weight(kwargs)
        x, y = self._prepare(x, y)
        check_same_classes(validation_data, self.class_names)
        validation_data = _as_keras_reads(validation_data)
        if y is None and not isinstance(x, dict):
            kwargs.setdefault("shuffle", False)  # Keras warns where it cannot shuffle
        callbacks = _with_divergence_guard(callbacks)
        return super().fit(x, y, validation_data=validation_data, callbacks=callbacks, **kwargs)

    @same_arguments_as(keras.Model.evaluate)
    def evaluate(self, x=None, y=None, **kwargs):
        return super().evaluate(*self._prepare(x, y), **kwargs)

    @same_arguments_as(keras.Model.train_on_batch)
    def train_on_batch(self, x, y=None, **kwargs):
        _refuse_class_weight(kwargs)
        with value_errors():
            return super().train_on_batch(*self._prepare_batch(x, y), **kwargs)

    @same_arguments_as(keras.Model.test_on_batch)
    def test_on_batch(self, x, y=None, **kwargs):
        with value_errors():
            return super().test_on_batch(*self._prepare_batch(x, y), **kwargs)

    def train_step(self, *args):
        """Runs one step; the batch, in either layout, is the last argument on every backend."""
        return super().train_step(*args[:-1], self._checked(args[-1]))

    def test_step(self, *args):
        """Evaluates one batch, as `train_step`."""
        return super().test_step(*args[:-1], self._checked(args[-1]))

    def _symbolic_build(self, iterator=None, data_batch=None):
        # All layers are built; Keras would call them on a batch whose layout it does not know.
        if self.optimizer is not None and not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)

    def _checked(self, data) -> tuple:
        """A batch of either layout as (images, ground truth, sample weight)."""
        images, y, sample_weight = unpack_batch(data)
        sides = _sides(images)
        boxes, labels = self._ground_truth(y, sides)
        relative = convert_boxes(boxes, "xyxy", "rel_xyxy", *sides)
        images = check_ground_truth(
            images, boxes, labels, relative, self.num_classes, self.bounding_box_format
        )
        if sample_weight is not None:
            sample_weight = check_sample_weight(sample_weight)
        return check_images(images), y, sample_weight

    def _ground_truth(self, y, sides) -> tuple:
        """Boxes, `"xyxy"` in pixels (batch, objects, 4), and int32 labels (batch, objects)."""
        check_box_dictionary(y)
        check_box_shapes(y)
        boxes = convert_boxes(y["boxes"], self.bounding_box_format, "xyxy", *sides)
        return boxes, ops.cast(y["labels"], "int32")

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Returns the two-stage loss of a batch, RefineDet eq. 1."""
        return self._two_stage_loss(x, y, y_pred, sample_weight, training)

    def _two_stage_loss(self, x, y, y_pred, sample_weight, training=True, positives=None):
        """The loss of a batch, or with the `positives` of the whole, the share of a part of it."""
        arguments = self._loss_arguments(x, y, y_pred, sample_weight)
        losses = self.detection_loss(*arguments, positives)
        batch, replicas = ops.shape(y["labels"])[0], num_replicas()
        parts = 1 if positives is None else self.accumulate
        # Losses add up over replicas; Keras takes their mean over rows, which must be that sum.
        # Training batches are shared evenly, others need not be.
        rows = 1.0 if training or replicas == 1 else _relative_rows(batch, replicas)
        for tracker in self._loss_trackers:
            value = losses[tracker.name] * replicas * parts / rows
            tracker.update_state(value, sample_weight=batch)
        regularization = [ops.sum(value) / replicas / parts for value in self.losses]
        return sum(losses.values()) / rows + sum(regularization)

    def _loss_arguments(self, x, y, y_pred, sample_weight) -> tuple:
        sides = self.image_shape[:2] if x is None else _sides(x)
        boxes, labels = self._ground_truth(y, sides)
        level_sizes = self.anchor_generator.level_sizes(sides)
        return y_pred, boxes, labels, self.anchors_for(sides), sample_weight, level_sizes

    def _gradients(self, x, y, sample_weight) -> tuple:
        """Gradients, loss and predictions of a batch; without predictions if it is in parts."""
        if self.accumulate == 1:
            return super()._gradients(x, y, sample_weight)
        import tensorflow as tf

        def count(*part):
            outputs = self(part[0], training=False)  # leaves batch statistics alone
            arguments = self._loss_arguments(part[0], part[1], outputs, part[2])
            return self.detection_loss.count_positives(*arguments)

        def differentiate(*part):
            with tf.GradientTape() as tape:
                outputs = self(part[0], training=True)
                loss = self._two_stage_loss(part[0], part[1], outputs, part[2], positives=positives)
                scaled = self.optimizer.scale_loss(loss)
            return [
                loss,
                *tape.gradient(scaled, self.trainable_weights, unconnected_gradients="zero"),
            ]

        positives = self._sum_over_parts(count, x, y, sample_weight)
        loss, *gradients = self._sum_over_parts(differentiate, x, y, sample_weight)
        return gradients, loss, None

    def _sum_over_parts(self, function, *batch) -> list:
        import tensorflow as tf

        rows = tf.shape(batch[0])[0]
        message = f"`accumulate={self.accumulate}` must divide the batch of each replica"
        tf.debugging.assert_equal(rows % self.accumulate, 0, message)
        size, total = rows // self.accumulate, []
        for start in range(self.accumulate):
            x, *rest = _rows(batch, slice(start * size, (start + 1) * size))
            with tf.control_dependencies(total):  # else a graph computes the parts side by side
                x = tf.identity(x)
            values = function(x, *rest)
            total = [a + b for a, b in zip(total, values, strict=True)] if total else values
        return total

    # === Prediction ===

    @checked
    def anchors_for(self, image_shape: Sequence[int]):
        """Returns the anchors, `"xyxy"` in pixels (anchors, 4), of images (height, width, ...)."""
        height, width = height_and_width(image_shape)
        known = isinstance(height, int) and isinstance(width, int)
        if known and (height, width) == self.image_shape[:2]:
            return self.anchors
        return self.anchor_generator((height, width))

    @checked
    def decode(
        self, outputs, image_shape: Sequence[int] | None = None, portable: bool = False
    ) -> dict:
        """Turns raw outputs into detections, as `predict` returns them.

        Args:
            outputs: what `model(images)` returns.
            image_shape: (height, width) of these images, the model's by default.
            portable: see `DetectionDecoder`.
        """
        shape = self.image_shape if image_shape is None else image_shape
        anchors = self.anchors_for(shape)
        names = self.class_names
        return self.decoder(outputs, anchors, shape, self.bounding_box_format, portable, names)

    def predict_step(self, *args):
        """Detects in one batch; the batch is the last argument on every backend."""
        images, _, _ = unpack_batch(args[-1])
        images = check_batch_shape(images, self.image_shape)
        result = super().predict_step(*args[:-1], (check_images(images),))
        if keras.backend.backend() == "jax":  # there a step returns its state too
            return self.decode(result[0]), result[1]
        return self.decode(result)

    def make_predict_function(self, force=False):
        """As in Keras, without XLA on TensorFlow: NMS is not an XLA operation."""
        jit_compile = self.jit_compile
        if keras.backend.backend() == "tensorflow":
            self.jit_compile = False
        try:
            return super().make_predict_function(force)
        finally:
            self.jit_compile = jit_compile

    @same_arguments_as(keras.Model.predict)
    def predict(self, x, **kwargs) -> dict:
        """Detects in images that already have the model's size.

        Args:
            x: images (batch, height, width, 3), RGB, 0 to 255, uint8 or float; or a
                `tf.data.Dataset` of them or of training batches.
            **kwargs: `batch_size`, `verbose`, `steps` and `callbacks`, as in Keras.

        Returns:
            Dictionary of arrays: `"boxes"` (batch, max_detections, 4) in `bounding_box_format`,
            `"confidence"` and `"labels"` (batch, max_detections), by falling confidence,
            `"num_detections"` (batch,). Rows beyond `num_detections` are -1.
        """
        self._check_arrays(x)
        self.compiled_detector.discard_stale()
        return super().predict(_as_keras_reads(x), **kwargs)

    def predict_on_batch(self, x) -> dict:
        """Detects in one batch, in this process alone under any strategy; see `predict`."""
        check_not_forked()
        images = np.asarray(x)
        self._check_arrays(images)
        with value_errors():
            check_images(images)
        return self.compiled_detector(images)

    def detect(
        self,
        images,
        confidence_threshold: float | Mapping[str, float] = 0.3,
        batch_size: int = 8,
        max_pixels: int = MAX_PIXELS,
        tiles: Sequence[int] | None = None,
        overlap: float = 0.2,
    ):
        """Detects in images of any size.

        Args:
            images: a path, an encoded image (bytes), a PIL image, an array (height, width,
                channels) 0 to 255, a folder, or a list or 4-D array of images.
            confidence_threshold: lowest confidence that is returned, 0 to 1; or a dictionary with
                one for each class name, such as `DetectionReport.best_thresholds`.
            batch_size: images, or tiles, that pass through the network together.
            max_pixels: height times width above which a file is not read.
            tiles: (height, width) in pixels, multiples of 64, for small objects in large images:
                detects in overlapping tiles at native resolution too; see `TiledDetector`.
            overlap: of neighboring tiles, as a fraction of their sides, below 1.

        Returns:
            For a single image a dictionary of arrays: `"boxes"` (n, 4) in `bounding_box_format`
            and the image's own pixels, `"confidence"` (n,), `"labels"` (n,), by falling
            confidence, and `"class_names"`, a list of n names. For several images a list of
            these; an image that cannot be read gives None and a warning.

        Raises:
            ValueError: if a single image cannot be read, or an argument is out of range.

        Example:
            >>> model.detect("satellite.png", tiles=(320, 320), overlap=0.2)["boxes"]
        """
        class_thresholds(confidence_threshold, self.label_names)
        if tiles is not None:
            detector = TiledDetector(self, tiles, overlap, batch_size)
            return detector.detect(images, confidence_threshold, max_pixels)
        return detect_images(
            images,
            lambda batch: detect_resized(self, batch, confidence_threshold),
            batch_size,
            max_pixels,
        )

    @checked
    def class_name(self, label: int) -> str:
        """Returns the name of a class, or its number if the model has no `class_names`."""
        if not 0 <= label < self.num_classes:
            raise ValueError(f"`label` must be 0 to {self.num_classes - 1}. Received: {label}")
        return self.label_names[label]

    @property
    def label_names(self) -> list[str]:
        """Names of the labels: the class names, or the numbers if there are none."""
        return self.class_names or [str(label) for label in range(self.num_classes)]

    def _prepare(self, x, y=None) -> tuple:
        """Returns checked `x` and `y` of a Keras method, in layouts that Keras reads."""
        check_not_forked()  # the checks run TensorFlow too
        self._check_arrays(x)
        check_same_classes(x, self.class_names)
        if y is None and isinstance(x, dict):  # with which Keras would drop `sample_weight`
            x, y, _ = unpack_batch(x)
        if hasattr(x, "shape"):
            check_box_dictionary(y)
        return _as_keras_reads(x), dense_boxes(y)

    def _prepare_batch(self, x, y) -> tuple:
        x, y = self._prepare(x, y)
        if not hasattr(x, "shape"):
            raise ValueError(f"`x` must be a batch of images. Received: a {type(x).__name__}")
        return x, y

    def _check_arrays(self, images) -> None:
        """Checks arrays and tensors that are passed directly, on every backend."""
        if isinstance(images, dict):
            images = images.get("images")
        if images is None:
            raise ValueError("`x` must be images, or a dataset of batches. Received: x=None")
        if isinstance(images, list | tuple | str | os.PathLike):
            raise ValueError(
                "`x` must be one array of images; `detect` takes lists and files. "
                f"Received: a {type(images).__name__}"
            )
        if not hasattr(images, "shape"):
            return
        check_batch_shape(images, self.image_shape)
        if images.shape[0] == 0:
            raise ValueError(
                f"`x` must have at least one image. Received: x.shape={tuple(images.shape)}"
            )
        if keras.backend.backend() != "tensorflow":
            check_images(images)

    # === Other classes ===

    def replace_classes(self, class_names, mapping=None, **kwargs) -> "RefineDet":
        """Returns a new model for other classes that starts from the weights of this one.

        A class that this model knows, by name or by `mapping`, keeps its logits; other classes
        start at random. All other weights are copied. This is how VOC starts from COCO. The loss
        loses its `class_weights`, which belong to the old classes.

        Args:
            class_names: names of the new classes.
            mapping: for some new classes the name of the class here, or None to start at random;
                see `keras_resnest.detection.class_sources`.
            **kwargs: further arguments of `RefineDet` that differ, such as `image_shape`.

        Raises:
            ValueError: if this model has no `class_names`, `mapping` has an unknown name, or
                the other arguments change the network.

        Example:
            >>> voc = coco_model.replace_classes(["aeroplane", "bicycle", "bird"])
        """
        if self.class_names is None:
            raise ValueError("`replace_classes` needs a model with `class_names`. Received: none")
        names = check_class_names(class_names)
        sources = class_sources(names, self.class_names, mapping)
        config = {**self.get_config(), "num_classes": len(names), "class_names": names}
        if self.detection_loss.class_weights is not None:
            config["detection_loss"]["config"]["class_weights"] = None
        config |= kwargs
        model = RefineDet.from_config(config)
        copy_weights(self, model, sources.values())
        return model

    # === Saving ===

    def _run_through_graph(self, *args, operation_fn=None, **kwargs):
        if operation_fn is None:
            return super()._run_through_graph(*args, **kwargs)
        if operation_fn.__module__ == keras.models.clone_model.__module__:
            raise ValueError(
                "`clone_model` makes a network without loss and decoder; use "
                "RefineDet.from_config(model.get_config()), then `set_weights`"
            )
        return super()._run_through_graph(*args, operation_fn=operation_fn, **kwargs)

    def quantize(self, mode=None, *args, **kwargs):
        raise ValueError(
            "Keras quantizes dense layers, and RefineDet has none; `export` has a `precision`. "
            f"Received: mode={mode!r}"
        )

    def export(self, filepath, format: str = "tf_saved_model", verbose=None, **kwargs):
        """Writes the model for TensorFlow Serving, onnxruntime, OpenVINO or LiteRT.

        The export needs neither Keras nor this package: it decodes and suppresses boxes itself.

        Args:
            filepath: folder or file to write, for instance `"serving/1"`.
            format: `"tf_saved_model"`, `"onnx"`, `"openvino"` or `"litert"`.
            verbose: whether to print what was written.
            **kwargs: `precision`, `decode` and others: see `keras_resnest.serving.export_model`.
        """
        from keras_resnest.serving.export import export_model

        export_model(self, filepath, format, verbose=bool(verbose), **kwargs)

    def get_config(self) -> dict:
        check_same_offsets(self.detection_loss, self.decoder)  # a file could not be loaded
        serialize = keras.saving.serialize_keras_object
        backbone = serialize(self.backbone)
        if self._made.backbone:
            backbone["config"].pop("layer_changes", None)
            backbone["config"].update(self._made.backbone)
        return {
            "num_classes": self.num_classes,
            "backbone": backbone,
            "image_shape": self.image_shape,
            "bounding_box_format": self.bounding_box_format,
            "class_names": self.class_names,
            "anchor_generator": serialize(self.anchor_generator),
            "heads": serialize(self.heads),
            "detection_loss": serialize(self.detection_loss),
            "decoder": serialize(self.decoder),
            "freeze_batch_norm": self.freeze_batch_norm,
            "synchronized_batch_norm": self.synchronized_batch_norm,
            "dtype": serialize(self.dtype_policy),
            "name": self.name,
            "trainable": self.trainable,
            **self._layer_changes(),
        }

    def training_config(self) -> dict:
        """Returns what must not change when `ResumeTraining` resumes a run, beside the weights."""
        config = self.get_config()
        # A backbone's layers have names of their own.
        for name in ("backbone", "decoder", "dtype", "name", "trainable", "layer_changes"):
            config.pop(name, None)
        parts = ("anchor_generator", "heads", "detection_loss")
        return {**config, **{name: config[name]["config"] for name in parts}}

    @classmethod
    def from_config(cls, config: dict, custom_objects=None) -> "RefineDet":
        def restored(value):
            if isinstance(value, dict):
                return keras.saving.deserialize_keras_object(value, custom_objects=custom_objects)
            return value

        def construct(arguments):
            return cls(**{name: restored(value) for name, value in arguments.items()})

        with reading_config(cls.__name__):
            return cls._changed(construct, config)


def _refuse_class_weight(kwargs: dict) -> None:
    if kwargs.get("class_weight") is not None:
        raise ValueError(
            "RefineDet takes no `class_weight`; `RefineDetLoss(class_weights=...)` weights "
            "classes, and `sample_weight` whole images. "
            f"Received: class_weight={kwargs['class_weight']}"
        )


def _backbone(backbone, dtype):
    """The backbone, made if it is a name."""
    if not isinstance(backbone, str):
        return backbone
    return create_backbone(backbone, include_top=False, include_rescaling=True, dtype=dtype)


def _pyramid(backbone) -> keras.Model:
    """The backbone up to its levels P3, P4 and P5."""
    pyramid = getattr(backbone, "pyramid_outputs", None)
    if not isinstance(pyramid, dict) or not set(LEVELS) <= set(pyramid):
        raise ValueError(
            f"`backbone` must be a name or a model with `pyramid_outputs` for {', '.join(LEVELS)}. "
            f"Received: {backbone!r} with {list(pyramid or [])}"
        )
    outputs = [pyramid[level] for level in LEVELS]
    return keras.Model(backbone.inputs, outputs, name=f"{backbone.name}_pyramid")


def _given_changes(backbone) -> dict:
    """Changes of a backbone's layers before it became part of a detector."""
    if not isinstance(backbone, Backbone):
        return {}
    return {"trainable": backbone.trainable, **backbone._layer_changes()}


def _default_optimizer() -> keras.optimizers.Optimizer:
    # Keras' cosine with a warm-up, so slow that the rate stays constant after the warm-up.
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, decay_steps=10**9, warmup_target=1e-3, warmup_steps=500
    )
    return keras.optimizers.SGD(rate, momentum=0.9, global_clipnorm=10.0)


def _with_loss_scaling(optimizer):
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer
    return keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=INITIAL_LOSS_SCALE)


def _with_divergence_guard(callbacks):
    """Adds a `TerminateOnDivergence` unless there is one."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        return callbacks
    callbacks = keras.tree.flatten(callbacks) if callbacks is not None else []
    if any(isinstance(callback, TerminateOnDivergence) for callback in callbacks):
        return callbacks
    return [TerminateOnDivergence(), *callbacks]


def _as_keras_reads(data):
    """Data in a layout that Keras reads.

    Keras takes no generator of dictionaries and no lists of boxes. On JAX and PyTorch, it pads the
    ragged boxes of a `tf.data.Dataset` with labels of 0.
    """

    def parts(*batch):
        return tuple(part for part in unpack_batch(batch) if part is not None)

    if isinstance(data, Iterator):
        return (parts(*(batch if isinstance(batch, tuple) else (batch,))) for batch in data)
    if isinstance(data, tuple):  # for validation
        return parts(*data)
    if keras.backend.backend() == "tensorflow" or not hasattr(data, "element_spec"):
        return data
    import tensorflow as tf

    specs = keras.tree.flatten(data.element_spec)
    is_ragged = any(isinstance(spec, tf.RaggedTensorSpec) for spec in specs)
    return data.map(parts) if is_ragged else data


def _sides(images) -> tuple:
    """(height, width) of a batch; tensors where the graph does not know them."""
    sides = images.shape[1:3]
    return tuple(ops.shape(images)[1:3]) if None in tuple(sides) else tuple(sides)


def _rows(batch, part: slice):
    return keras.tree.map_structure(lambda v: None if v is None else v[part], batch)


def _relative_rows(rows, replicas: int):
    """Rows of this replica, at least one, relative to the mean over all replicas."""
    rows = ops.cast(rows, "float32")
    return ops.maximum(rows, 1.0) * replicas / sum_over_replicas(rows)
