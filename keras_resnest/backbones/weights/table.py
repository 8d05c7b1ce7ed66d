"""The table of published weights: where they lie, under which license, and what they reach."""

from typing import NamedTuple


class PretrainedWeights(NamedTuple):
    """A file of published ImageNet weights.

    `source` is a repository of the Hugging Face hub, which holds `model.safetensors`, or the
    address of a PyTorch file. `crop_size`, `crop_share` (the crop as a share of the resized
    image) and `interpolation` say how images were prepared when `top1` (per cent, ImageNet
    validation) was measured by those who published it. `sha256` is the beginning of the file's
    checksum, where its authors publish one; the hub states the checksum of each of its files.
    """

    source: str
    crop_size: int
    crop_share: float
    interpolation: str
    top1: float | None
    license: str
    sha256: str | None = None

    @property
    def on_hub(self) -> bool:
        """Whether `source` is a repository of the Hugging Face hub."""
        return "://" not in self.source


def _hub(name, crop_size, crop_share, interpolation, top1, license):
    return PretrainedWeights(f"timm/{name}", crop_size, crop_share, interpolation, top1, license)


def _official(name, sha256, crop_size, crop_share, interpolation, top1):
    releases = "https://github.com/zhanghang1989/ResNeSt/releases/download/weights_step1"
    url = f"{releases}/{name}-{sha256}.pth"
    return PretrainedWeights(url, crop_size, crop_share, interpolation, top1, "apache-2.0", sha256)


def _torchvision(file, sha256, crop_size, crop_share, interpolation, top1):
    url = f"https://download.pytorch.org/models/{file}"
    return PretrainedWeights(
        url, crop_size, crop_share, interpolation, top1, "bsd-3-clause", sha256
    )


# By network and tag; the first tag of a network is what "imagenet" stands for. Figures: timm's
# results on ImageNet, the tables of ResNeSt's repository, torchvision's documentation.
PRETRAINED: dict[str, dict[str, PretrainedWeights]] = {
    "resnest14": {
        "gluon_in1k": _hub("resnest14d.gluon_in1k", 224, 0.875, "bilinear", 75.52, "apache-2.0"),
    },
    "resnest26": {
        "gluon_in1k": _hub("resnest26d.gluon_in1k", 224, 0.875, "bilinear", 78.48, "apache-2.0"),
    },
    "resnest50": {
        "in1k": _hub("resnest50d.in1k", 224, 0.875, "bilinear", 80.96, "apache-2.0"),
        "official": _official("resnest50", "528c19ca", 224, 0.875, "bicubic", 81.03),
    },
    "resnest101": {
        "in1k": _hub("resnest101e.in1k", 256, 0.875, "bilinear", 82.92, "apache-2.0"),
        "official": _official("resnest101", "22405ba7", 256, 0.889, "bicubic", 82.83),
    },
    "resnest200": {
        "in1k": _hub("resnest200e.in1k", 320, 0.909, "bicubic", 83.88, "apache-2.0"),
        "official": _official("resnest200", "75117900", 320, 0.909, "bicubic", 83.84),
    },
    "resnest269": {
        "in1k": _hub("resnest269e.in1k", 416, 0.928, "bicubic", 84.54, "apache-2.0"),
        "official": _official("resnest269", "0cc87c48", 416, 0.929, "bicubic", 84.54),
    },
    "resnest50_fast_1s1x64d": {
        "official": _official("resnest50_fast_1s1x64d", "d8fbf808", 224, 0.875, "bicubic", 80.33),
    },
    "resnest50_fast_2s1x64d": {
        "official": _official("resnest50_fast_2s1x64d", "44938639", 224, 0.875, "bicubic", 80.53),
    },
    "resnest50_fast_4s1x64d": {
        "official": _official("resnest50_fast_4s1x64d", "f74f3fc3", 224, 0.875, "bicubic", 80.76),
    },
    "resnest50_fast_1s2x40d": {
        "official": _official("resnest50_fast_1s2x40d", "32830b84", 224, 0.875, "bicubic", 80.59),
    },
    "resnest50_fast_2s2x40d": {
        "official": _official("resnest50_fast_2s2x40d", "9d126481", 224, 0.875, "bicubic", 80.61),
    },
    "resnest50_fast_4s2x40d": {
        "in1k": _hub("resnest50d_4s2x40d.in1k", 224, 0.875, "bicubic", 81.15, "apache-2.0"),
        "official": _official("resnest50_fast_4s2x40d", "41d14ed0", 224, 0.875, "bicubic", 81.14),
    },
    "resnest50_fast_1s4x24d": {
        "in1k": _hub("resnest50d_1s4x24d.in1k", 224, 0.875, "bicubic", 81.02, "apache-2.0"),
        "official": _official("resnest50_fast_1s4x24d", "d4a4f76f", 224, 0.875, "bicubic", 80.99),
    },
    "resnet18": {
        "a1_in1k": _hub("resnet18.a1_in1k", 224, 0.95, "bicubic", 71.50, "apache-2.0"),
        "a2_in1k": _hub("resnet18.a2_in1k", 224, 0.95, "bicubic", 70.63, "apache-2.0"),
        "a3_in1k": _hub("resnet18.a3_in1k", 160, 0.95, "bicubic", 65.67, "apache-2.0"),
        "tv_in1k": _hub("resnet18.tv_in1k", 224, 0.875, "bilinear", 69.75, "bsd-3-clause"),
        "gluon_in1k": _hub("resnet18.gluon_in1k", 224, 0.875, "bicubic", 70.84, "apache-2.0"),
    },
    "resnet34": {
        "a1_in1k": _hub("resnet34.a1_in1k", 224, 0.95, "bicubic", 76.42, "apache-2.0"),
        "a2_in1k": _hub("resnet34.a2_in1k", 224, 0.95, "bicubic", 75.52, "apache-2.0"),
        "a3_in1k": _hub("resnet34.a3_in1k", 160, 0.95, "bicubic", 70.58, "apache-2.0"),
        "tv_in1k": _hub("resnet34.tv_in1k", 224, 0.875, "bilinear", 73.30, "bsd-3-clause"),
        "gluon_in1k": _hub("resnet34.gluon_in1k", 224, 0.875, "bicubic", 74.57, "apache-2.0"),
    },
    "resnet50": {
        "a1_in1k": _hub("resnet50.a1_in1k", 224, 0.95, "bicubic", 80.38, "apache-2.0"),
        "a2_in1k": _hub("resnet50.a2_in1k", 224, 0.95, "bicubic", 79.83, "apache-2.0"),
        "a3_in1k": _hub("resnet50.a3_in1k", 160, 0.95, "bicubic", 75.99, "apache-2.0"),
        "tv_in1k": _hub("resnet50.tv_in1k", 224, 0.875, "bilinear", 76.16, "bsd-3-clause"),
        "gluon_in1k": _hub("resnet50.gluon_in1k", 224, 0.875, "bicubic", 77.58, "apache-2.0"),
    },
    "resnet101": {
        "a1_in1k": _hub("resnet101.a1_in1k", 224, 0.95, "bicubic", 81.49, "apache-2.0"),
        "a2_in1k": _hub("resnet101.a2_in1k", 224, 0.95, "bicubic", 81.34, "apache-2.0"),
        "a3_in1k": _hub("resnet101.a3_in1k", 160, 0.95, "bicubic", 77.93, "apache-2.0"),
        "tv_in1k": _hub("resnet101.tv_in1k", 224, 0.875, "bilinear", 77.40, "bsd-3-clause"),
        "gluon_in1k": _hub("resnet101.gluon_in1k", 224, 0.875, "bicubic", 79.31, "apache-2.0"),
    },
    "resnet152": {
        "a1_in1k": _hub("resnet152.a1_in1k", 224, 0.95, "bicubic", 82.00, "apache-2.0"),
        "a2_in1k": _hub("resnet152.a2_in1k", 224, 0.95, "bicubic", 81.76, "apache-2.0"),
        "a3_in1k": _hub("resnet152.a3_in1k", 160, 0.95, "bicubic", 78.90, "apache-2.0"),
        "tv_in1k": _hub("resnet152.tv_in1k", 224, 0.875, "bilinear", 78.33, "bsd-3-clause"),
        "gluon_in1k": _hub("resnet152.gluon_in1k", 224, 0.875, "bicubic", 79.71, "apache-2.0"),
    },
    "resnet50c": {
        "gluon_in1k": _hub("resnet50c.gluon_in1k", 224, 0.875, "bicubic", 78.02, "apache-2.0"),
    },
    "resnet26d": {
        "bt_in1k": _hub("resnet26d.bt_in1k", 224, 0.875, "bicubic", 76.70, "apache-2.0"),
    },
    "resnet50d": {
        "ra2_in1k": _hub("resnet50d.ra2_in1k", 224, 0.875, "bicubic", 80.55, "apache-2.0"),
        "a1_in1k": _hub("resnet50d.a1_in1k", 224, 0.95, "bicubic", 80.73, "apache-2.0"),
        "gluon_in1k": _hub("resnet50d.gluon_in1k", 224, 0.875, "bicubic", 79.08, "apache-2.0"),
    },
    "resnet101d": {
        "ra2_in1k": _hub("resnet101d.ra2_in1k", 256, 0.95, "bicubic", 82.25, "apache-2.0"),
        "gluon_in1k": _hub("resnet101d.gluon_in1k", 224, 0.875, "bicubic", 80.47, "apache-2.0"),
    },
    "seresnet50": {
        "ra2_in1k": _hub("seresnet50.ra2_in1k", 224, 0.875, "bicubic", 80.26, "apache-2.0"),
        "a1_in1k": _hub("seresnet50.a1_in1k", 224, 0.95, "bicubic", 80.01, "apache-2.0"),
    },
    "resnext50_32x4d": {
        "a1_in1k": _hub("resnext50_32x4d.a1_in1k", 224, 0.95, "bicubic", 80.53, "apache-2.0"),
        "tv_in1k": _hub("resnext50_32x4d.tv_in1k", 224, 0.875, "bilinear", 77.63, "bsd-3-clause"),
        "gluon_in1k": _hub(
            "resnext50_32x4d.gluon_in1k", 224, 0.875, "bicubic", 79.35, "apache-2.0"
        ),
    },
    "resnext101_32x8d": {
        "tv_in1k": _hub("resnext101_32x8d.tv_in1k", 224, 0.875, "bilinear", 79.31, "bsd-3-clause"),
    },
    "skresnet18": {
        "ra_in1k": _hub("skresnet18.ra_in1k", 224, 0.875, "bicubic", 73.02, "apache-2.0"),
    },
    "skresnet34": {
        "ra_in1k": _hub("skresnet34.ra_in1k", 224, 0.875, "bicubic", 76.96, "apache-2.0"),
    },
    "skresnext50_32x4d": {
        "ra_in1k": _hub("skresnext50_32x4d.ra_in1k", 224, 0.875, "bicubic", 80.17, "apache-2.0"),
    },
    "res2net50_26w_4s": {
        "in1k": _hub("res2net50_26w_4s.in1k", 224, 0.875, "bilinear", 77.99, "unknown"),
    },
    "res2net50_14w_8s": {
        "in1k": _hub("res2net50_14w_8s.in1k", 224, 0.875, "bilinear", 78.14, "unknown"),
    },
    "res2net101_26w_4s": {
        "in1k": _hub("res2net101_26w_4s.in1k", 224, 0.875, "bilinear", 79.19, "unknown"),
    },
    "regnetx_002": {
        "pycls_in1k": _hub("regnetx_002.pycls_in1k", 224, 0.875, "bicubic", 68.76, "mit"),
    },
    "regnetx_004": {
        "pycls_in1k": _hub("regnetx_004.pycls_in1k", 224, 0.875, "bicubic", 72.48, "mit"),
    },
    "regnetx_006": {
        "pycls_in1k": _hub("regnetx_006.pycls_in1k", 224, 0.875, "bicubic", 73.90, "mit"),
    },
    "regnetx_008": {
        "pycls_in1k": _hub("regnetx_008.pycls_in1k", 224, 0.875, "bicubic", 75.05, "mit"),
        "tv2_in1k": _hub("regnetx_008.tv2_in1k", 224, 0.965, "bicubic", 77.29, "bsd-3-clause"),
    },
    "regnetx_016": {
        "pycls_in1k": _hub("regnetx_016.pycls_in1k", 224, 0.875, "bicubic", 76.94, "mit"),
        "tv2_in1k": _hub("regnetx_016.tv2_in1k", 224, 0.965, "bicubic", 79.44, "bsd-3-clause"),
    },
    "regnetx_032": {
        "pycls_in1k": _hub("regnetx_032.pycls_in1k", 224, 0.875, "bicubic", 78.16, "mit"),
        "tv2_in1k": _hub("regnetx_032.tv2_in1k", 224, 0.965, "bicubic", 80.92, "bsd-3-clause"),
    },
    "regnety_002": {
        "pycls_in1k": _hub("regnety_002.pycls_in1k", 224, 0.875, "bicubic", 70.29, "mit"),
    },
    "regnety_004": {
        "pycls_in1k": _hub("regnety_004.pycls_in1k", 224, 0.875, "bicubic", 74.00, "mit"),
        "tv2_in1k": _hub("regnety_004.tv2_in1k", 224, 0.965, "bicubic", 75.59, "bsd-3-clause"),
    },
    "regnety_006": {
        "pycls_in1k": _hub("regnety_006.pycls_in1k", 224, 0.875, "bicubic", 75.27, "mit"),
    },
    "regnety_008": {
        "pycls_in1k": _hub("regnety_008.pycls_in1k", 224, 0.875, "bicubic", 76.33, "mit"),
    },
    "regnety_016": {
        "pycls_in1k": _hub("regnety_016.pycls_in1k", 224, 0.875, "bicubic", 77.88, "mit"),
        "tv2_in1k": _hub("regnety_016.tv2_in1k", 224, 0.965, "bicubic", 80.67, "bsd-3-clause"),
    },
    "regnety_032": {
        "pycls_in1k": _hub("regnety_032.pycls_in1k", 224, 0.875, "bicubic", 78.90, "mit"),
        "tv2_in1k": _hub("regnety_032.tv2_in1k", 224, 0.965, "bicubic", 81.79, "bsd-3-clause"),
    },
    "vgg16": {
        "tv_in1k": _hub("vgg16.tv_in1k", 224, 0.875, "bilinear", 71.59, "bsd-3-clause"),
    },
    "shufflenet_v2_0_5x": {
        "tv_in1k": _torchvision(
            "shufflenetv2_x0.5-f707e7126e.pth", "f707e7126e", 224, 0.875, "bilinear", 60.55
        ),
    },
    "shufflenet_v2_1_0x": {
        "tv_in1k": _torchvision(
            "shufflenetv2_x1-5666bf0f80.pth", "5666bf0f80", 224, 0.875, "bilinear", 69.36
        ),
    },
    "shufflenet_v2_1_5x": {
        "tv_in1k": _torchvision(
            "shufflenetv2_x1_5-3c479a10.pth", "3c479a10", 224, 0.966, "bilinear", 73.00
        ),
    },
    "shufflenet_v2_2_0x": {
        "tv_in1k": _torchvision(
            "shufflenetv2_x2_0-8be3c8ee.pth", "8be3c8ee", 224, 0.966, "bilinear", 76.23
        ),
    },
    "vgg16_reduced": {
        "reducedfc": PretrainedWeights(
            "https://s3.amazonaws.com/amdegroot-models/vgg16_reducedfc.pth",
            224,
            0.875,
            "bilinear",
            None,
            "unknown",
        ),
    },
}
