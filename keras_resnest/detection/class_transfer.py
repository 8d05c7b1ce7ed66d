"""Which class of one dataset is which class of another, and its rows of the class head."""

from collections.abc import Mapping, Sequence

import numpy as np

# Names of the same class in PASCAL VOC and in COCO.
SYNONYMS = (
    ("aeroplane", "airplane"),
    ("motorbike", "motorcycle"),
    ("sofa", "couch"),
    ("tvmonitor", "tv"),
    ("diningtable", "dining table"),
    ("pottedplant", "potted plant"),
)


def class_sources(
    class_names: Sequence[str],
    source_names: Sequence[str],
    mapping: Mapping[str, str | None] | None = None,
) -> dict[str, str | None]:
    """For each class the one of another dataset that it is.

    Args:
        class_names: names of the new classes.
        source_names: names of the classes that there are.
        mapping: for some new classes the name of the source, or None for no source. The
            others are found by name; case, spaces, hyphens and underscores do not matter,
            and the six classes that VOC and COCO call by different names are known.

    Returns:
        Dictionary of every new class: the name of its source, or None.

    Raises:
        ValueError: if `mapping` has a name that is not among the classes.

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
                f"no {role}; there are {list(known)}"
            )
    by_key = {_key(name): name for name in reversed(source_names)}
    return {name: mapping.get(name, by_key.get(_key(name))) for name in class_names}


def remap_class_outputs(new, old, columns: Sequence[int | None]) -> np.ndarray:
    """Kernel or bias of a class convolution with its outputs taken from another one.

    Args:
        new: weights whose last axis is anchors x (new classes + 1), kept where there is no
            source.
        old: weights whose last axis is anchors x (old classes + 1).
        columns: for each output of `new` of one anchor, background first, the output of `old`
            or None.

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
