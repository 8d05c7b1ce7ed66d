"""Builders of the published networks, and `create_backbone`, which finds them by name."""

import difflib
import os
from collections.abc import Callable
from typing import NamedTuple

from keras_resnest.backbones.backbone import Backbone
from keras_resnest.backbones.weights.caffe import caffe_form
from keras_resnest.backbones.weights.fetching import load_pretrained
from keras_resnest.checks import checked


class Variant(NamedTuple):
    """A published network: its class, the arguments that make it, and its builder."""

    network: type[Backbone]
    arguments: dict
    build: Callable[..., Backbone]


# All networks by name, filled by `variants.py`.
VARIANTS: dict[str, Variant] = {}

_DOCSTRING = """Builds {title}.

    Args:
        include_top: whether the model ends with a classifier.
        weights: `"imagenet"` or another tag of `list_models({name!r})` for published weights;
            the path of a `.safetensors`, `.weights.h5`, PyTorch `state_dict` or `.caffemodel`
            file, whose network is then built; or None for random weights.
        input_shape: shape of one image. Default: `(None, None, 3)`, any size.
        pooling: without a classifier, `"avg"` or `"max"` for a feature vector, None for a map.
        classes: integer, number of classes.
        classifier_activation: activation of the classifier; None for logits.
        include_rescaling: whether the model normalizes its input: RGB images, 0 to 255, uint8
            or float. If False, images must already be normalized.
        name: name of the model. Default: `{name!r}`.
        **kwargs: further arguments of `{network}`, such as `dropout_rate`, `data_format`, `dtype`.

    Returns:
        A `{network}`, which is a `keras.Model`.

    Raises:
        ValueError: if an argument is out of range, or `weights` do not fit the network.
        ConnectionError: if published weights cannot be fetched.

    Example:
        >>> model = {title}(include_top=False)
        >>> features = model.pyramid_outputs["P3"]
    """


# No return annotation: type checkers infer the builder's signature.
def register(
    variant: str, title: str, network: type[Backbone], arguments: dict, has_top: bool = True
):
    """Adds a network to `VARIANTS` and returns its builder, in `keras.applications` style."""

    def build(
        include_top: bool = has_top,
        weights: str | os.PathLike | None = None,
        input_shape=None,
        pooling: str | None = None,
        classes: int = 1000,
        classifier_activation="softmax",
        include_rescaling: bool = True,
        name: str | None = None,
        **kwargs,
    ) -> Backbone:
        options = {
            "include_top": include_top,
            "image_shape": input_shape,
            "pooling": pooling,
            "classes": classes,
            "classifier_activation": classifier_activation,
            "include_rescaling": include_rescaling,
            "name": name or variant,
        }
        model = network(**{**arguments, **options, **caffe_form(weights, variant), **kwargs})
        if weights is not None:
            load_pretrained(model, weights, variant)
        return model

    build.__name__ = build.__qualname__ = title
    build.__doc__ = _DOCSTRING.format(title=title, name=variant, network=network.__name__)
    build = checked(build)
    VARIANTS[variant] = Variant(network, arguments, build)
    return build


@checked
def create_backbone(name: str, **kwargs) -> Backbone:
    """Builds a network by name.

    Args:
        name: a name listed by `list_models()`. Case does not matter.
        **kwargs: arguments of the builder, see `ResNeSt50`.

    Returns:
        A `Backbone`, which is a `keras.Model`.

    Raises:
        ValueError: if the name is unknown or an argument is out of range.

    Example:
        >>> backbone = create_backbone("resnest50", include_top=False)
        >>> list(backbone.pyramid_outputs)
        ['P2', 'P3', 'P4', 'P5']
    """
    variant = str(name).lower()
    if variant not in VARIANTS:
        nearest = difflib.get_close_matches(variant, VARIANTS, n=3, cutoff=0.0)
        raise ValueError(
            f"Unknown backbone. Received: name={name!r}. Nearest names: {', '.join(nearest)}. "
            "`list_models()` returns all."
        )
    return VARIANTS[variant].build(**kwargs)
