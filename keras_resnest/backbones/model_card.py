"""The model card of a preset: what somebody who finds the folder wants to know."""

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

_CARD = """---
library_name: keras_resnest
license: {license}
pipeline_tag: {task}
---

# {name}

```python
import keras_resnest as kr

model = kr.{cls}.from_preset("hf://user/name")  # or the path of this folder
```
{command}
| | |
| --- | --- |
{rows}
"""


def model_card(model, license: str, sha256: str, result: dict) -> str:
    """Returns a model card in the Markdown of the Hugging Face hub.

    Args:
        model: a detector or a backbone.
        license: name of the license.
        sha256: checksum of the weights.
        result: what `keras-resnest train` or `evaluate` wrote to `result.json`, or an empty one.
    """
    cls, task = "RefineDet", "object-detection"
    if not hasattr(model, "detect"):
        cls = f"backbones.{type(model).__name__}"
        task = "image-classification" if model.include_top else "image-feature-extraction"
    options = result.get("arguments")
    options = options if isinstance(options, dict) and "data" in options else {}
    names = getattr(model, "class_names", None) or result.get("class_names")
    rows = {
        "classes": ", ".join(map(str, names)) if names else None,
        "image shape": model.image_shape,
        "data": _without_folders(options.get("data", result.get("data"))),
        **dict(_figures(result)),
        "license": license,
        "sha256 of the weights": sha256,
    }
    rows = [f"| {_escaped(k)} | {_escaped(v)} |" for k, v in rows.items() if v is not None]
    return _CARD.format(
        license=license,
        task=task,
        name=_escaped(model.name),
        cls=cls,
        command=f"\nTrained with\n\n    {_command(options)}\n" if options else "",
        rows="\n".join(rows),
    )


def _figures(result: dict) -> Iterator[tuple[str, str]]:
    """Metrics of a `result.json`, those of classes below them; counts are no metrics."""
    for name, value in result.items():
        if name != "arguments":
            for key, figure in (value if isinstance(value, dict) else {"": value}).items():
                if isinstance(figure, dict):
                    figure = figure.get("average_precision")
                if isinstance(figure, float):
                    yield f"{name} {key}".strip(), f"{figure:.4g}"


def _command(options: dict) -> str:
    """The command that trained, on one line."""
    words = ["keras-resnest", "train", _without_folders(options["data"])]
    for name, value in options.items():
        if name != "data" and value is not None and value is not False:
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [f"--{name.replace('_', '-')}", *map(_without_folders, values)]
    return " ".join(shlex.join(words).split())


def _without_folders(value) -> str | None:
    """A path of this machine as its name; other values as they are."""
    text = str(value)
    return value if value is None else Path(text).name if os.path.isabs(text) else text


def _escaped(text) -> str:
    """Text of strangers in Markdown: one line that begins no cell, link, code or HTML."""
    return re.sub(r"([\\|<\[`])", r"\\\1", " ".join(str(text).split()))
