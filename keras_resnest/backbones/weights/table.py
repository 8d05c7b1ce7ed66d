"""Published ImageNet weights: their source, license and accuracy."""

from typing import NamedTuple


class PretrainedWeights(NamedTuple):
    """A file of published ImageNet weights.

    `source` is a Hugging Face repository with a `model.safetensors`, or the URL of a PyTorch file.
    `crop_size`, `crop_ratio` (crop relative to the resized image) and `interpolation` describe
    the preprocessing with which the publishers measured `top1` (percent, ImageNet validation).
    `sha256` is the start of the published checksum; the hub has one for each of its files.
    """

    source: str
    crop_size: int
    crop_ratio: float
    interpolation: str
    top1: float | None
    license: str
    sha256: str | None = None

    @property
    def on_hub(self) -> bool:
        """Whether `source` is a repository of the Hugging Face hub."""
        return "://" not in self.source


_APACHE, _BSD = "apache-2.0", "bsd-3-clause"
# Our name, timm's name, crop size, crop ratio, interpolation, top-1 (timm's results), license.
_TIMM = [
    ("resnest14", "resnest14d.gluon_in1k", 224, 0.875, "bilinear", 75.52, _APACHE),
    ("resnest26", "resnest26d.gluon_in1k", 224, 0.875, "bilinear", 78.48, _APACHE),
    ("resnest50", "resnest50d.in1k", 224, 0.875, "bilinear", 80.96, _APACHE),
    ("resnest101", "resnest101e.in1k", 256, 0.875, "bilinear", 82.92, _APACHE),
    ("resnest200", "resnest200e.in1k", 320, 0.909, "bicubic", 83.88, _APACHE),
    ("resnest269", "resnest269e.in1k", 416, 0.928, "bicubic", 84.54, _APACHE),
    ("resnest50_fast_4s2x40d", "resnest50d_4s2x40d.in1k", 224, 0.875, "bicubic", 81.15, _APACHE),
    ("resnest50_fast_1s4x24d", "resnest50d_1s4x24d.in1k", 224, 0.875, "bicubic", 81.02, _APACHE),
    ("resnet18", "resnet18.a1_in1k", 224, 0.95, "bicubic", 71.50, _APACHE),
    ("resnet18", "resnet18.a2_in1k", 224, 0.95, "bicubic", 70.63, _APACHE),
    ("resnet18", "resnet18.a3_in1k", 160, 0.95, "bicubic", 65.67, _APACHE),
    ("resnet18", "resnet18.tv_in1k", 224, 0.875, "bilinear", 69.75, _BSD),
    ("resnet18", "resnet18.gluon_in1k", 224, 0.875, "bicubic", 70.84, _APACHE),
    ("resnet34", "resnet34.a1_in1k", 224, 0.95, "bicubic", 76.42, _APACHE),
    ("resnet34", "resnet34.a2_in1k", 224, 0.95, "bicubic", 75.52, _APACHE),
    ("resnet34", "resnet34.a3_in1k", 160, 0.95, "bicubic", 70.58, _APACHE),
    ("resnet34", "resnet34.tv_in1k", 224, 0.875, "bilinear", 73.30, _BSD),
    ("resnet34", "resnet34.gluon_in1k", 224, 0.875, "bicubic", 74.57, _APACHE),
    ("resnet50", "resnet50.a1_in1k", 224, 0.95, "bicubic", 80.38, _APACHE),
    ("resnet50", "resnet50.a2_in1k", 224, 0.95, "bicubic", 79.83, _APACHE),
    ("resnet50", "resnet50.a3_in1k", 160, 0.95, "bicubic", 75.99, _APACHE),
    ("resnet50", "resnet50.tv_in1k", 224, 0.875, "bilinear", 76.16, _BSD),
    ("resnet50", "resnet50.gluon_in1k", 224, 0.875, "bicubic", 77.58, _APACHE),
    ("resnet101", "resnet101.a1_in1k", 224, 0.95, "bicubic", 81.49, _APACHE),
    ("resnet101", "resnet101.a2_in1k", 224, 0.95, "bicubic", 81.34, _APACHE),
    ("resnet101", "resnet101.a3_in1k", 160, 0.95, "bicubic", 77.93, _APACHE),
    ("resnet101", "resnet101.tv_in1k", 224, 0.875, "bilinear", 77.40, _BSD),
    ("resnet101", "resnet101.gluon_in1k", 224, 0.875, "bicubic", 79.31, _APACHE),
    ("resnet152", "resnet152.a1_in1k", 224, 0.95, "bicubic", 82.00, _APACHE),
    ("resnet152", "resnet152.a2_in1k", 224, 0.95, "bicubic", 81.76, _APACHE),
    ("resnet152", "resnet152.a3_in1k", 160, 0.95, "bicubic", 78.90, _APACHE),
    ("resnet152", "resnet152.tv_in1k", 224, 0.875, "bilinear", 78.33, _BSD),
    ("resnet152", "resnet152.gluon_in1k", 224, 0.875, "bicubic", 79.71, _APACHE),
    ("resnet50c", "resnet50c.gluon_in1k", 224, 0.875, "bicubic", 78.02, _APACHE),
    ("resnet26d", "resnet26d.bt_in1k", 224, 0.875, "bicubic", 76.70, _APACHE),
    ("resnet50d", "resnet50d.ra2_in1k", 224, 0.875, "bicubic", 80.55, _APACHE),
    ("resnet50d", "resnet50d.a1_in1k", 224, 0.95, "bicubic", 80.73, _APACHE),
    ("resnet50d", "resnet50d.gluon_in1k", 224, 0.875, "bicubic", 79.08, _APACHE),
    ("resnet101d", "resnet101d.ra2_in1k", 256, 0.95, "bicubic", 82.25, _APACHE),
    ("resnet101d", "resnet101d.gluon_in1k", 224, 0.875, "bicubic", 80.47, _APACHE),
    ("seresnet50", "seresnet50.ra2_in1k", 224, 0.875, "bicubic", 80.26, _APACHE),
    ("seresnet50", "seresnet50.a1_in1k", 224, 0.95, "bicubic", 80.01, _APACHE),
    ("resnext50_32x4d", "resnext50_32x4d.a1_in1k", 224, 0.95, "bicubic", 80.53, _APACHE),
    ("resnext50_32x4d", "resnext50_32x4d.tv_in1k", 224, 0.875, "bilinear", 77.63, _BSD),
    ("resnext50_32x4d", "resnext50_32x4d.gluon_in1k", 224, 0.875, "bicubic", 79.35, _APACHE),
    ("resnext101_32x8d", "resnext101_32x8d.tv_in1k", 224, 0.875, "bilinear", 79.31, _BSD),
    ("skresnet18", "skresnet18.ra_in1k", 224, 0.875, "bicubic", 73.02, _APACHE),
    ("skresnet34", "skresnet34.ra_in1k", 224, 0.875, "bicubic", 76.96, _APACHE),
    ("skresnext50_32x4d", "skresnext50_32x4d.ra_in1k", 224, 0.875, "bicubic", 80.17, _APACHE),
    ("res2net50_26w_4s", "res2net50_26w_4s.in1k", 224, 0.875, "bilinear", 77.99, "unknown"),
    ("res2net50_14w_8s", "res2net50_14w_8s.in1k", 224, 0.875, "bilinear", 78.14, "unknown"),
    ("res2net101_26w_4s", "res2net101_26w_4s.in1k", 224, 0.875, "bilinear", 79.19, "unknown"),
    ("regnetx_002", "regnetx_002.pycls_in1k", 224, 0.875, "bicubic", 68.76, "mit"),
    ("regnetx_004", "regnetx_004.pycls_in1k", 224, 0.875, "bicubic", 72.48, "mit"),
    ("regnetx_006", "regnetx_006.pycls_in1k", 224, 0.875, "bicubic", 73.90, "mit"),
    ("regnetx_008", "regnetx_008.pycls_in1k", 224, 0.875, "bicubic", 75.05, "mit"),
    ("regnetx_008", "regnetx_008.tv2_in1k", 224, 0.965, "bicubic", 77.29, _BSD),
    ("regnetx_016", "regnetx_016.pycls_in1k", 224, 0.875, "bicubic", 76.94, "mit"),
    ("regnetx_016", "regnetx_016.tv2_in1k", 224, 0.965, "bicubic", 79.44, _BSD),
    ("regnetx_032", "regnetx_032.pycls_in1k", 224, 0.875, "bicubic", 78.16, "mit"),
    ("regnetx_032", "regnetx_032.tv2_in1k", 224, 0.965, "bicubic", 80.92, _BSD),
    ("regnety_002", "regnety_002.pycls_in1k", 224, 0.875, "bicubic", 70.29, "mit"),
    ("regnety_004", "regnety_004.pycls_in1k", 224, 0.875, "bicubic", 74.00, "mit"),
    ("regnety_004", "regnety_004.tv2_in1k", 224, 0.965, "bicubic", 75.59, _BSD),
    ("regnety_006", "regnety_006.pycls_in1k", 224, 0.875, "bicubic", 75.27, "mit"),
    ("regnety_008", "regnety_008.pycls_in1k", 224, 0.875, "bicubic", 76.33, "mit"),
    ("regnety_016", "regnety_016.pycls_in1k", 224, 0.875, "bicubic", 77.88, "mit"),
    ("regnety_016", "regnety_016.tv2_in1k", 224, 0.965, "bicubic", 80.67, _BSD),
    ("regnety_032", "regnety_032.pycls_in1k", 224, 0.875, "bicubic", 78.90, "mit"),
    ("regnety_032", "regnety_032.tv2_in1k", 224, 0.965, "bicubic", 81.79, _BSD),
    ("vgg16", "vgg16.tv_in1k", 224, 0.875, "bilinear", 71.59, _BSD),
]
# Our name, start of the checksum, crop size, crop ratio, interpolation, top-1 (tables of the
# ResNeSt repository).
_OFFICIAL = [
    ("resnest50", "528c19ca", 224, 0.875, "bicubic", 81.03),
    ("resnest101", "22405ba7", 256, 0.889, "bicubic", 82.83),
    ("resnest200", "75117900", 320, 0.909, "bicubic", 83.84),
    ("resnest269", "0cc87c48", 416, 0.929, "bicubic", 84.54),
    ("resnest50_fast_1s1x64d", "d8fbf808", 224, 0.875, "bicubic", 80.33),
    ("resnest50_fast_2s1x64d", "44938639", 224, 0.875, "bicubic", 80.53),
    ("resnest50_fast_4s1x64d", "f74f3fc3", 224, 0.875, "bicubic", 80.76),
    ("resnest50_fast_1s2x40d", "32830b84", 224, 0.875, "bicubic", 80.59),
    ("resnest50_fast_2s2x40d", "9d126481", 224, 0.875, "bicubic", 80.61),
    ("resnest50_fast_4s2x40d", "41d14ed0", 224, 0.875, "bicubic", 81.14),
    ("resnest50_fast_1s4x24d", "d4a4f76f", 224, 0.875, "bicubic", 80.99),
]
# Our name, torchvision's file, start of the checksum, crop size, crop ratio, interpolation, top-1
# (torchvision's documentation).
_TORCHVISION = [
    ("shufflenet_v2_0_5x", "shufflenetv2_x0.5", "f707e7126e", 224, 0.875, "bilinear", 60.55),
    ("shufflenet_v2_1_0x", "shufflenetv2_x1", "5666bf0f80", 224, 0.875, "bilinear", 69.36),
    ("shufflenet_v2_1_5x", "shufflenetv2_x1_5", "3c479a10", 224, 0.966, "bilinear", 73.00),
    ("shufflenet_v2_2_0x", "shufflenetv2_x2_0", "8be3c8ee", 224, 0.966, "bilinear", 76.23),
]
_OFFICIAL_URL = "https://github.com/zhanghang1989/ResNeSt/releases/download/weights_step1"
_TORCHVISION_URL = "https://download.pytorch.org/models"
_REDUCED_URL = "https://s3.amazonaws.com/amdegroot-models/vgg16_reducedfc.pth"


def _pretrained() -> dict[str, dict[str, PretrainedWeights]]:
    table = {}
    for network, name, *facts in _TIMM:
        tag = name.split(".")[1]
        table.setdefault(network, {})[tag] = PretrainedWeights(f"timm/{name}", *facts)
    for network, sha256, *facts in _OFFICIAL:
        url = f"{_OFFICIAL_URL}/{network}-{sha256}.pth"
        weights = PretrainedWeights(url, *facts, _APACHE, sha256)
        table.setdefault(network, {})["official"] = weights
    for network, file, sha256, *facts in _TORCHVISION:
        url = f"{_TORCHVISION_URL}/{file}-{sha256}.pth"
        weights = PretrainedWeights(url, *facts, _BSD, sha256)
        table.setdefault(network, {})["tv_in1k"] = weights
    reduced = PretrainedWeights(_REDUCED_URL, 224, 0.875, "bilinear", None, "unknown")
    table["vgg16_reduced"] = {"reducedfc": reduced}
    return table


# By network and tag. `weights="imagenet"` selects the first tag of a network.
PRETRAINED = _pretrained()
