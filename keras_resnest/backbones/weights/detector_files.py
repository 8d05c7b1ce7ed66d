"""The weight files of the RefineDet authors: what they were trained on and where they are.

Source: the README and scripts of https://github.com/sfzhang15/RefineDet, and the paper, arXiv
1711.06897. Nobody serves the files without a login page, so they are not downloaded.
"""

import os
from pathlib import Path
from typing import NamedTuple


class DetectorFile(NamedTuple):
    """A `.caffemodel` file of a published detector.

    `name` is the builder and `weights` the tag that selects the file. `map` is the published mAP
    (percent) on `test`, at IoU 0.5 for VOC and 0.5 to 0.95 for COCO, with one image size; None
    where we know none. `source` is the page of the archive that holds `file`.
    """

    name: str
    weights: str
    data: str
    test: str
    map: float | None
    file: str
    source: str
    license: str = "code BSD-2-Clause, weights not stated"


# Tag, data, test, mAP at 320 and 512, file, archives at 320 and 512.
_VGG16 = [
    (
        *("voc0712", "VOC 07+12", "VOC 2007 test", 80.0, 81.8, "VOC0712_refinedet_vgg16_{}_final"),
        *("1rj6ikGCJg_rOlt0gUCXkjHzPkjpvzxXV", "10Fwymi1HizebH3qnyZmecXRvtBc1HCop"),
    ),
    (
        *("voc0712plus", "VOC 07++12", "VOC 2012 test", 78.1, 80.1),
        "VOC0712Plus_refinedet_vgg16_{}_final",
        *("1d1T_tTImZynD88CoB0OF0rdFXgp4E_le", "1h9IrfBHKnO1tQq3PWmo0TLhQcx7lUHhj"),
    ),
    (
        *("coco_voc", "COCO, the 20 classes of VOC", "VOC 2007 test", None, None),
        "coco_refinedet_vgg16_{}",
        *("1dl-eyCZgDv_UwxGb2c1Usaqq2u2u7sqz", "1vJ8CZlOocsF5cASr3k2Or1vQx-hTfxs6"),
    ),
    (
        *("voc0712_coco", "COCO, then VOC 07+12", "VOC 2007 test", None, None),
        "VOC0712_refinedet_vgg16_{}_ft_final",
        *("1c8umLHI-x68uxT7CcCirFPhykPkyYUzC", "1-d4w152HsEaYgWY7v4_6zqxxQIijlHjX"),
    ),
    (
        *("voc0712plus_coco", "COCO, then VOC 07++12", "VOC 2012 test", None, None),
        "VOC0712Plus_refinedet_vgg16_{}_ft_final",
        *("1pti47J-oE7Os02vNvO0JIrQp3_FQR70v", "1ZwnO_F1Pqdg1xyNSa-0XPEuh7knel9L_"),
    ),
    (
        *("coco", "COCO trainval35k", "COCO test-dev", 29.4, 33.0),
        "coco_refinedet_vgg16_{}_final",
        *("1BIVvkSQM8DarpeqOpjgPpDxUoFq9ZxKM", "16j7gmHvd82LSog52kBXUUYyLx26mOV_6"),
    ),
]
_RESNET101 = [
    (
        *("coco", "COCO trainval35k", "COCO test-dev", 32.0, 36.4),
        "coco_refinedet_resnet101_{}_final",
        *("1yrCfPIyKNsD9aBnn5iooFoX414FzXvzH", "1KWdfrowNIJqJF0j-ZxkQpkbAcPPbwAS1"),
    )
]
DETECTOR_FILES = [
    DetectorFile(
        f"refinedet{side}_{network}",
        *(tag, data, test, maps[place]),
        f"{file.format(f'{side}x{side}')}.caffemodel",
        f"https://drive.google.com/open?id={archives[place]}",
    )
    for network, rows in (("vgg16", _VGG16), ("resnet101", _RESNET101))
    for place, side in enumerate((320, 512))
    for tag, data, test, *maps, file, archive_320, archive_512 in rows
    for archives in [(archive_320, archive_512)]
]


def models_folder() -> Path:
    """Returns the folder of weight files that do not come from the Hugging Face hub."""
    home = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras"))
    return home / "models" / "keras_resnest"


def detector_weights(name: str, weights):
    """Returns the path of a detector's weights, which may be the tag of a published file."""
    files = {row.weights: row for row in DETECTOR_FILES if row.name == name}
    if isinstance(weights, str) and weights in files:
        row = files[weights]
        path = models_folder() / row.file
        if not path.is_file():
            raise ValueError(
                f"{row.file} of {name} must be in {path.parent}: get the archive from {row.source} "
                f"and move the file there. Received: weights={weights!r}"
            )
        return path
    is_path = isinstance(weights, str) and ("." in weights or os.path.exists(weights))
    if weights is not None and not is_path and not isinstance(weights, os.PathLike):
        tags = f" or a tag ({', '.join(files)})" if files else ""
        raise ValueError(
            f"`weights` of {name} must be None, the path of a file{tags}. "
            f"Received: weights={weights!r}"
        )
    return weights
