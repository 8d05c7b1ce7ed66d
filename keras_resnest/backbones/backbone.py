"""Base class of all networks."""

from collections.abc import Callable

import keras

from keras_resnest.backbones.graph import GraphBuilder, complete_config
from keras_resnest.backbones.presets import SharedAsPreset
from keras_resnest.checks import float_policy, reading_config
from keras_resnest.layers.changes import KeepsLayerChanges
from keras_resnest.trainer import DistributedTraining

# Names in `locals()` of a constructor that are not in its config, or that `get_config` adds.
NOT_IN_CONFIG = ("self", "dtype", "kwargs", "__class__")


class Backbone(KeepsLayerChanges, SharedAsPreset, DistributedTraining, keras.Model):
    """Functional model with named feature maps.

    With `include_top` it returns class probabilities (batch, classes), otherwise features.
    `pyramid_outputs` has the last map of every stride: level `Pn` has stride `2**n`, so `P3` of a
    320 x 320 image is 40 x 40. The constructor arguments of a subclass become its attributes and
    its config.

    All networks share these arguments:

    - `dropout_rate`: float in [0, 1), dropout before the classifier.
    - `include_top`: whether the model ends with a classifier.
    - `classes`: integer, number of classes.
    - `classifier_activation`: activation of the classifier; None for logits.
    - `pooling`: without a classifier, `"avg"` or `"max"` for a feature vector, None for the last
      feature map.
    - `include_rescaling`: whether the model normalizes its input: RGB images, 0 to 255, uint8
      or float. If False, images must already be normalized.
    - `image_shape`: shape of one image, `(height, width, 3)`, or `(3, height, width)` with
      `channels_first`. Height and width may be None. Default: any size.
    - `data_format`: `"channels_last"`, `"channels_first"`, or None for Keras' default.
    - `dtype`: dtype or dtype policy of all layers.

    Args:
        build_graph: function of a `GraphBuilder`, the input tensor and the config that returns
            the output tensor and the feature maps by level, `{"P2": tensor, ...}`.
        config: `locals()` of the subclass's constructor, which may have no other local variables.
        dtype: dtype policy of the layers.
        **kwargs: `name` and `trainable` of `keras.Model`.

    Raises:
        ValueError: if a shared argument has a wrong value.

    Example:
        >>> backbone = create_backbone("resnest50", include_top=False)
        >>> features = keras.Model(backbone.input, backbone.pyramid_outputs)
        >>> features(keras.ops.zeros((1, 64, 64, 3)))["P3"].shape
        (1, 8, 8, 512)
    """

    def __init__(self, build_graph: Callable, config: dict, dtype=None, **kwargs):
        dtype = float_policy(dtype)
        config = {name: value for name, value in config.items() if name not in NOT_IN_CONFIG}
        config = complete_config(config)
        inputs = keras.Input(config["image_shape"], name="images")
        graph = GraphBuilder(config["data_format"], dtype)
        outputs, pyramid_outputs = build_graph(graph, inputs, config)
        trainable = kwargs.pop("trainable", True)
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)
        self.dtype_policy = dtype
        self._pyramid_outputs = pyramid_outputs
        self._config_names = tuple(config)
        for name, value in config.items():
            setattr(self, name, value)
        self._layers_made()
        if not trainable:
            self.trainable = False

    @property
    def pyramid_outputs(self) -> dict:
        """Feature maps by level: `{"P2": tensor of stride 4, "P3": tensor of stride 8, ...}`."""
        return dict(self._pyramid_outputs)

    @property
    def pyramid_strides(self) -> dict[str, int]:
        """Stride of every level in pixels: `{"P2": 4, "P3": 8, ...}`."""
        return {level: 2 ** int(level[1:]) for level in self._pyramid_outputs}

    @property
    def pyramid_level_inputs(self) -> dict[str, str]:
        """Name of the layer behind each level, as `keras_cv.models.RetinaNet` expects."""
        return {
            level: tensor._keras_history.operation.name
            for level, tensor in self._pyramid_outputs.items()
        }

    def replace_top(self, classes: int, classifier_activation="softmax") -> "Backbone":
        """Returns the same network with a new classifier.

        Args:
            classes: positive integer, number of classes.
            classifier_activation: activation of the classifier; None for logits.

        Returns:
            A new model with a copy of all weights; those of the last dense layer are random.

        Raises:
            ValueError: if the architecture has no classifier.

        Example:
            >>> model = ResNeSt50(weights="imagenet").replace_top(classes=5)
        """
        activation = keras.activations.serialize(keras.activations.get(classifier_activation))
        top = {"include_top": True, "classes": classes, "classifier_activation": activation}
        model = type(self).from_config({**self.get_config(), **top})
        own_layers = {layer.name: layer for layer in self.layers}
        for layer in model.layers:
            if layer.name != "fc" and layer.name in own_layers:
                layer.set_weights(own_layers[layer.name].get_weights())
        return model

    def export(self, filepath, format: str = "tf_saved_model", verbose=None, **kwargs):
        """Exports the model for TensorFlow Serving, onnxruntime, OpenVINO or LiteRT.

        Args:
            filepath: folder or file to write, for instance `"serving/1"`.
            format: `"tf_saved_model"`, `"onnx"`, `"openvino"` or `"litert"`.
            verbose: whether to print what was written.
            **kwargs: `precision`, `image_shape`, `class_names`, `crop_ratio` and others; see
                `keras_resnest.serving.export_model`.

        Example:
            >>> model.export("serving/1", class_names=["cat", "dog"])
        """
        from keras_resnest.serving.export import export_model

        export_model(self, filepath, format, verbose=bool(verbose), **kwargs)

    def get_config(self) -> dict:
        config = {name: getattr(self, name) for name in self._config_names}
        # Keras wraps lists that become attributes.
        config = {k: list(v) if isinstance(v, list) else v for k, v in config.items()}
        config["classifier_activation"] = keras.activations.serialize(self.classifier_activation)
        return {
            **config,
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
            "name": self.name,
            "trainable": self.trainable,
            **self._layer_changes(),
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        # keras.Model would expect a list of layers; here the arguments suffice.
        with reading_config(cls.__name__):
            return cls._changed(lambda arguments: cls(**arguments), config)
