"""Read the golden cases of `golden/`: outputs of reference implementations; see its README."""

import functools
import gzip
import json
import zlib
from pathlib import Path

import numpy as np
from golden import recipe

FOLDER = Path(__file__).resolve().parent / "golden"


def load_cases(topic: str) -> dict:
    """Facts of each case of a topic: "networks", "detectors", "matching", "losses", ..."""
    return json.loads((FOLDER / f"{topic}.json").read_text())


@functools.cache
def load_arrays(topic: str) -> dict:
    with np.load(FOLDER / f"{topic}.npz") as arrays:
        return dict(arrays)


@functools.cache
def load_manifests() -> dict:
    return json.loads(gzip.decompress((FOLDER / "manifests.json.gz").read_bytes()))


def check_drawn(tensors, crc32, what):
    """Raise an error if this NumPy draws other random numbers than NumPy 2.4 did."""
    found = 0
    for tensor in tensors:
        found = zlib.crc32(np.ascontiguousarray(tensor, "<f4"), found)
    if found != crc32:
        raise RuntimeError(f"the recipe draws other {what} with NumPy {np.__version__}")


def state_dict(network: str, entry: dict) -> dict:
    """Weights of a network of "networks" or "detectors", in PyTorch's names and layouts."""
    weights = recipe.make_state_dict(load_manifests()[network], entry["seed"])
    check_drawn(weights.values(), entry["weights_crc32"], f"weights of {network}")
    return weights


def input_images(facts: dict, seed: int):
    """Input of a case of a network, NHWC."""
    images = recipe.make_input(facts["input_shape"], seed, facts["input_name"])
    check_drawn([images], facts["input_crc32"], "images")
    return images.transpose(0, 2, 3, 1)


def sample_map(feature_map, count: int = 64):
    """Values of a channels_last map at the places of the golden arrays, which are drawn NCHW."""
    return recipe.sample(np.transpose(feature_map, (0, 3, 1, 2)), count)


def detection_case(name: str):
    """Raw outputs by our names, and the detections: (image, class, confidence, x1, y1, x2, y2).

    Anchors without any class above a confidence of 0.01 are not stored: they are background here.
    """
    case, arrays = load_cases("detections")[name], load_arrays("detections")
    num_anchors = {320: 6375, 512: 16320}[case["size"]]
    where = arrays[f"{name}/image"], arrays[f"{name}/anchor"]
    outputs = {}
    for theirs, ours in OUTPUT_NAMES.items():
        stored = arrays[f"{name}/{theirs}"].astype("float32")
        outputs[ours] = np.zeros((case["batch"], num_anchors, stored.shape[-1]), "float32")
        if theirs == "odm_conf":
            outputs[ours][..., 0] = 20.0
        outputs[ours][where] = stored
    return case, outputs, arrays[f"{name}/detections"]


def average_precision_case(name: str) -> dict:
    return json.loads((FOLDER / "average_precision" / f"{name}.json").read_text())


# The references' names of the outputs, and ours.
OUTPUT_NAMES = {
    "arm_loc": "arm_boxes",
    "arm_conf": "arm_objectness",
    "odm_loc": "odm_boxes",
    "odm_conf": "odm_logits",
}
