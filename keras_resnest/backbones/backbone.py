"""What every backbone offers to a detector, whatever its architecture."""

import keras

from keras_resnest.trainer import DistributedTraining


class Backbone(DistributedTraining, keras.Model):
    """Functional model that also names its feature maps by pyramid level.

    Level `Pn` has stride `2**n`: `P3` of a 320 x 320 image is 40 x 40. A subclass builds its
    graph in `__init__` and hands it over here together with its constructor arguments, which
    become attributes and the config.

    Args:
        inputs: `keras.KerasTensor`, the image.
        outputs: `keras.KerasTensor`, the result of the model.
        pyramid_outputs: dict of level name to `keras.KerasTensor`, by rising stride.
        config: dict of the subclass's constructor arguments, except `dtype`, `name` and
            `trainable`.
        dtype: dtype policy of the layers.
        **kwargs: `name` and `trainable` of `keras.Model`.

    Example:
        >>> backbone = create_backbone("resnest50", include_top=False)
        >>> features = keras.Model(backbone.input, backbone.pyramid_outputs)
        >>> features(keras.ops.zeros((1, 64, 64, 3)))["P3"].shape
        (1, 8, 8, 512)
    """

    def __init__(self, inputs, outputs, pyramid_outputs: dict, config: dict, dtype, **kwargs):
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)
        self.dtype_policy = keras.dtype_policies.get(dtype)
        self._pyramid_outputs = pyramid_outputs
        self._config_names = tuple(config)
        for name, value in config.items():
            setattr(self, name, value)

    @property
    def pyramid_outputs(self) -> dict:
        """Feature maps by level: `{"P2": tensor of stride 4, "P3": tensor of stride 8, ...}`."""
        return dict(self._pyramid_outputs)

    @property
    def pyramid_strides(self) -> dict[str, int]:
        """Stride of every level in pixels of the image: `{"P2": 4, "P3": 8, ...}`."""
        return {level: 2 ** int(level[1:]) for level in self._pyramid_outputs}

    @property
    def pyramid_level_inputs(self) -> dict[str, str]:
        """Name of the layer that makes each level, as `keras_cv.models.RetinaNet` asks for."""
        return {
            level: tensor._keras_history.operation.name
            for level, tensor in self._pyramid_outputs.items()
        }

    def replace_top(self, classes: int, classifier_activation="softmax") -> "Backbone":
        """The same network with a new classifier.

        Args:
            classes: positive integer, number of classes.
            classifier_activation: activation of the classifier; None for logits.

        Returns:
            A new model. All weights are copies of this model's; those of the last dense layer
            are random.

        Raises:
            ValueError: if the architecture has no classifier.

        Example:
            >>> model = ResNeSt50(weights="imagenet").replace_top(classes=5)
        """
        config = {**self.get_config(), "include_top": True, "classes": classes}
        config["classifier_activation"] = keras.activations.serialize(
            keras.activations.get(classifier_activation)
        )
        model = type(self).from_config(config)
        mine = {layer.name: layer for layer in self.layers}
        for layer in model.layers:
            if layer.name != "fc" and layer.name in mine:
                layer.set_weights(mine[layer.name].get_weights())
        return model

    def export(self, filepath, format: str = "tf_saved_model", verbose=None, **kwargs):
        """Writes the model for TensorFlow Serving, onnxruntime, OpenVINO or LiteRT.

        Args:
            filepath: folder or file to write, for instance `"serving/1"`.
            format: `"tf_saved_model"`, `"onnx"`, `"openvino"` or `"litert"`.
            verbose: whether to say what was written.
            **kwargs: `precision`, `image_shape`, `class_names`, `crop_ratio` and others: see
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
        if "classifier_activation" in config:
            activation = keras.activations.serialize(config["classifier_activation"])
            config["classifier_activation"] = activation
        return {
            **config,
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
            "name": self.name,
            "trainable": self.trainable,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        # keras.Model would look for a list of layers: here the arguments say everything.
        return cls(**config)
