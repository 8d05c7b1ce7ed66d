"""Write the files of this folder from the complete reference folder.

    python tests/golden/make_golden.py ../shared

The complete folder holds the same cases with weights, inputs and all values; `README.md` says what
is left out here. Every array that `recipe.py` draws is compared with the complete folder's.
"""

import argparse
import gzip
import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
from recipe import make_array, make_split_attention_tensor, sample, sample_indices

HERE = Path(__file__).resolve().parent
# Values kept of each array of the Split-Attention cases.
NUM_SAMPLES = 512
# The outputs of a RefineDet for 20 classes, and their channels.
OUTPUTS = {"arm_loc": 4, "arm_conf": 2, "odm_loc": 4, "odm_conf": 21}
BLOOD_CELLS = ("Platelets", "RBC", "WBC")
CORNERS = ("xmin", "ymin", "xmax", "ymax")
AP_CASES = (
    "voc_padilla_sample2",
    "voc_cartucho_example",
    "voc_difficult_bccd",
    "coco_bccd_jitter",
)


def read_json(path):
    return json.loads(path.read_text())


def write_json(name, rows):
    """Write a dictionary with one entry per line, floats with seven digits."""

    def rounded(value):
        if isinstance(value, float):
            return float(f"{value:.7g}")
        if isinstance(value, list):
            return [rounded(item) for item in value]
        if isinstance(value, dict):
            return {key: rounded(item) for key, item in value.items()}
        return value

    lines = [f"{json.dumps(key)}: {json.dumps(rounded(row))}" for key, row in rows.items()]
    (HERE / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def pick(row, *keys):
    return {key: row[key] for key in keys}


def assert_sampled(arrays, key, shape, count):
    """The complete files store the indices that `sample_indices` draws."""
    index = sample_indices(int(np.prod(shape)), count)
    assert np.array_equal(np.ravel_multi_index(arrays[f"{key}_index"].T, shape), index), key


def read_manifest(golden, name):
    tensors = read_json(golden / "manifests" / f"{name}.json")["tensors"]
    return [[tensor["name"], tensor["shape"], tensor["kind"]] for tensor in tensors]


def make_networks(golden):
    """Return the manifests of the classifiers. Most of the authors' ResNeSts equal timm's."""
    rows, kept, manifests = {}, {}, {}
    networks = read_json(golden / "networks.json")
    for name in sorted(networks, key=lambda name: name.startswith("official.")):
        entry, own = networks[name], {}
        with np.load(golden / "networks" / f"{name}.npz") as arrays:
            for case, facts in entry["cases"].items():
                own[f"{case}_logits"] = arrays[f"{case}_logits"]
                for i, stage in enumerate(facts["stages"], 1):
                    assert_sampled(arrays, f"{case}_stage{i}", stage["shape"], 64)
                    own[f"{case}_stage{i}"] = arrays[f"{case}_stage{i}_value"]
        manifest = read_manifest(golden, name)
        same = [
            other
            for other, tensors in manifests.items()
            if tensors == manifest
            and all(np.array_equal(own[key], kept.get(f"{other}/{key}")) for key in own)
        ]
        if same:
            rows[name] = {"same_as": same[0]}
            continue
        manifests[name] = manifest
        rows[name] = pick(entry, "num_params", "seed", "weights_crc32", "cases")
        kept.update({f"{name}/{key}": array for key, array in own.items()})
    write_json("networks", {name: rows[name] for name in networks})
    np.savez_compressed(HERE / "networks.npz", **kept)
    return manifests


def make_detectors(golden):
    """Return the manifests of the RefineDet networks."""
    rows, kept = {}, {}
    for name, entry in read_json(golden / "networks_refinedet.json").items():
        keys = ("num_params", "seed", "weights_crc32", "input_shape", "input_name", "input_crc32")
        rows[name] = pick(entry, *keys, "outputs", "features")
        with np.load(golden / "networks" / f"{name}.npz") as arrays:
            for output, facts in entry["outputs"].items():
                assert_sampled(arrays, output, facts["shape"], 2000)
                kept[f"{name}/{output}"] = arrays[f"{output}_value"]
            for module, facts in entry["features"].items():
                assert_sampled(arrays, f"feature.{module}", facts["shape"], 64)
                kept[f"{name}/{module}"] = arrays[f"feature.{module}_value"]
    write_json("detectors", rows)
    np.savez_compressed(HERE / "detectors.npz", **kept)
    return {name: read_manifest(golden, name) for name in rows}


def make_matching(folder):
    rows = {c["case"]: c for c in read_json(folder / "match.json")["cases"]}
    write_json("matching", rows)
    shutil.copyfile(folder / "match.npz", HERE / "matching.npz")
    shutil.copyfile(folder / "priors.npz", HERE / "anchors.npz")


def make_losses(folder):
    """Drop the reference's ODM gradients, which follow its own filtering and not the paper's."""
    rows, kept = {}, {}
    keys = ("seed", "batch", "scales", "arm_conf_shift", "loss", "odm_paper")
    with np.load(folder / "loss.npz") as arrays:
        for case in read_json(folder / "loss.json")["cases"]:
            name = case["case"]
            rows[name] = pick(case, *keys)
            rows[name]["odm_paper"] = pick(case["odm_paper"], "loss_loc", "loss_conf")
            for i in range(case["batch"]):
                kept[f"{name}/targets{i}"] = arrays[f"{name}_targets{i}"]
            for output, channels in OUTPUTS.items():
                prefix = "grad" if output.startswith("arm") else "papergrad"
                prefix = f"{name}_{prefix}_{output}"
                index = arrays[f"{prefix}_index"].T
                shape = (case["batch"], 6375, channels)
                kept[f"{name}/{output}_index"] = np.ravel_multi_index(index, shape).astype("int32")
                kept[f"{name}/{output}"] = arrays[f"{prefix}_value"]
    write_json("losses", rows)
    np.savez_compressed(HERE / "losses.npz", **kept)


def make_detections(folder):
    """Keep the anchors with a class confidence above 0.01; the others are never detected."""
    rows, kept = {}, {}
    with np.load(folder / "detect.npz") as arrays:
        for case in read_json(folder / "detect.json")["cases"]:
            name = case["case"]
            rows[name] = pick(case, "size", "batch", "detections_per_image")
            logits = arrays[f"{name}_odm_conf"].astype("float64")
            confidence = np.exp(logits - logits.max(-1, keepdims=True))
            confidence /= confidence.sum(-1, keepdims=True)
            image, anchor = np.nonzero((confidence[..., 1:] > 0.0099).any(-1))
            kept[f"{name}/image"] = image.astype("uint8")
            kept[f"{name}/anchor"] = anchor.astype("uint16")
            for output in OUTPUTS:
                kept[f"{name}/{output}"] = arrays[f"{name}_{output}"][image, anchor]
            kept[f"{name}/detections"] = arrays[f"{name}_detections_top500"]
    write_json("detections", rows)
    np.savez_compressed(HERE / "detections.npz", **kept)


def make_split_attention(golden):
    rows, kept = {}, {}
    keys = ("seed", "radix", "cardinality", "channels", "kernel_size", "stride")
    with np.load(golden / "splat.npz") as arrays:
        for case in read_json(golden / "splat.json")["cases"]:
            name = case["case"]
            weights = {key: arrays[f"{name}/w/{key}"] for key in case["weights"]}
            for key, value in weights.items():
                drawn = make_split_attention_tensor(key, value.shape, case["seed"])
                assert np.array_equal(drawn, value), (name, key)
            drawn = make_array((4, 32, 6, 8), case["seed"], "input")
            assert np.array_equal(drawn, arrays[f"{name}/input"])
            rows[name] = pick(case, *keys, "bias", "batch_norm")
            rows[name]["weights"] = {key: list(value.shape) for key, value in weights.items()}
            for mode in ("eval", "train"):
                if f"{name}/{mode}/output" not in arrays:
                    continue
                for output in ("output", "input_grad", "attention"):
                    key = f"{name}/{mode}/{output}"
                    kept[key] = sample(arrays[key], NUM_SAMPLES)
            for key in arrays.files:
                if key.startswith(f"{name}/train/after/"):
                    kept[key] = arrays[key]
    write_json("split_attention", rows)
    np.savez_compressed(HERE / "split_attention.npz", **kept)


def make_average_precision(folder):
    target = HERE / "average_precision"
    (target / "licenses").mkdir(parents=True, exist_ok=True)
    for name in AP_CASES:
        shutil.copyfile(folder / f"{name}.json", target / f"{name}.json")
    for path in (folder / "licences").iterdir():
        shutil.copyfile(path, target / "licenses" / path.name)


def make_blood_cells(folder):
    """Boxes of BCCD's training and test split: zero-based pixels of images of 640 x 480."""
    kept = {}
    for split in ("train", "test"):
        boxes, labels = [], []
        for image_id in (folder / "ImageSets" / "Main" / f"{split}.txt").read_text().split():
            root = ElementTree.parse(folder / "Annotations" / f"{image_id}.xml").getroot()
            for item in root.iter("object"):
                corners = [int(item.findtext(f"bndbox/{tag}")) for tag in CORNERS]
                if corners[0] < corners[2] and corners[1] < corners[3]:
                    boxes.append(np.array(corners) - [1, 1, 0, 0])
                    labels.append(BLOOD_CELLS.index(item.findtext("name")))
        kept[f"{split}_boxes"] = np.array(boxes, "int16")
        kept[f"{split}_labels"] = np.array(labels, "uint8")
    np.savez_compressed(HERE / "blood_cells.npz", **kept)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="the complete reference folder")
    folder = parser.parse_args().folder
    golden = folder / "golden"
    manifests = {**make_networks(golden), **make_detectors(golden)}
    text = json.dumps(manifests, separators=(",", ":"))
    # Without a time stamp, so that equal manifests give equal files.
    (HERE / "manifests.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    make_matching(golden / "refinedet")
    make_losses(golden / "refinedet")
    make_detections(golden / "refinedet")
    make_split_attention(golden)
    make_average_precision(folder / "golden_ap")
    make_blood_cells(folder / "data" / "bccd")


if __name__ == "__main__":
    main()
