"""Moves the class head of a detector from the classes of one dataset to those of another."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from keras import ops

from keras_resnest.checks import checked

# Names of the same class in PASCAL VOC and in COCO.
SYNONYMS = (
    ("aeroplane", "airplane"),
    ("motorbike", "motorcycle"),
    ("sofa", "couch"),
    ("tvmonitor", "tv"),
    ("diningtable", "dining table"),
    ("pottedplant", "potted plant"),
)


@checked
def class_sources(
    class_names: Sequence[str],
    source_names: Sequence[str],
    mapping: Mapping[str, str | None] | None = None,
) -> dict[str, str | None]:
    """Maps each class to its counterpart in another dataset.

    Args:
        class_names: names of the new classes.
        source_names: names of the known classes.
        mapping: for some new classes the name of the counterpart, or None for none. The others are
            found by name, ignoring case, spaces, hyphens and underscores; the six classes with
            different names in VOC and COCO are known.

    Returns:
        Dictionary from every new class to the name of its counterpart, or None.

    Raises:
        ValueError: if `mapping` has an unknown name.

    Example:
        >>> class_sources(["sofa", "person", "sheep"], ["person", "couch"])
        {'sofa': 'couch', 'person': 'person', 'sheep': None}
    """
    mapping = dict(mapping or {})
    for role, names, known in (
        ("new class", mapping, class_names),
        ("class of the model", [s for s in mapping.values() if s is not None], source_names),
    ):
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(
                f"`mapping` must be {{new class: class of the model or None}}. Received {unknown}, "
                f"which is no {role}. Known: {list(known)}"
            )
    by_key = {_key(name): name for name in reversed(source_names)}
    return {name: mapping.get(name, by_key.get(_key(name))) for name in class_names}


def copy_weights(source, target, class_names: Iterable[str | None]) -> None:
    """Copies the weights of a `RefineDet` to one of the same network for other classes.

    Args:
        source: a model with `class_names`.
        target: the other model.
        class_names: for each class of `target`, in order, its class in `source` or None.

    Raises:
        ValueError: if the networks differ.
    """
    per_cell, others = (m.anchor_generator.num_anchors_per_cell for m in (source, target))
    if per_cell != others:
        raise ValueError(
            f"`replace_classes` keeps the network, with {per_cell} anchors per cell of each level. "
            f"Received: an `anchor_generator` with {others}"
        )
    if len(source.weights) != len(target.weights):
        raise ValueError(
            "`replace_classes` keeps the network. Received: arguments that give it "
            f"{len(target.weights)} weights instead of {len(source.weights)}"
        )
    known = source.class_names
    columns = [0] + [None if name is None else 1 + known.index(name) for name in class_names]
    by_class = {id(w) for c in target.get_layer("odm").class_convolutions for w in c.weights}
    for old, new in zip(source.weights, target.weights, strict=True):
        value = ops.convert_to_numpy(old)
        if id(new) in by_class:
            value = remap_class_outputs(ops.convert_to_numpy(new), value, columns)
        if value.shape != tuple(new.shape):
            raise ValueError(
                f"`replace_classes` keeps the network. Received: arguments that give {new.path} "
                f"the shape {tuple(new.shape)} instead of {value.shape}"
            )
        new.assign(value)


def remap_class_outputs(new, old, columns: Sequence[int | None]) -> np.ndarray:
    """Returns a kernel or bias of a class convolution with outputs copied from another one.

    Args:
        new: weights whose last axis is anchors x (new classes + 1), kept where there is no source.
        old: weights whose last axis is anchors x (old classes + 1).
        columns: for each output of one anchor, background first, the output of `old` or None.

    Returns:
        Array of the shape of `new`.
    """
    new, old = np.array(new), np.asarray(old)
    anchors = new.shape[-1] // len(columns)
    rows = new.reshape(*new.shape[:-1], anchors, len(columns))
    old_rows = old.reshape(*old.shape[:-1], anchors, -1)
    for column, source in enumerate(columns):
        if source is not None:
            rows[..., column] = old_rows[..., source]
    return rows.reshape(new.shape)


def _key(name: str) -> str:
    plain = "".join(name.lower().replace("-", " ").replace("_", " ").split())
    return _FIRST_NAMES.get(plain, plain)


_FIRST_NAMES = {other.replace(" ", ""): first for first, other in SYNONYMS}
