"""Compares the networks with the reference numbers in `shared/golden`; also a program:

python tests/golden_networks.py            # all networks, as a table
python tests/golden_networks.py "regnet*"
"""

import argparse
import fnmatch
import importlib.util
import json
import re
from pathlib import Path

import keras
import numpy as np

from keras_resnest.backbones import create_backbone, load_torch_state_dict

# Layers that the references call stages, where they differ from the pyramid levels.
STAGE_LAYERS = {
    "vgg16": ("pool2", "pool3", "pool4", "pool5"),
}


def our_name(reference: str) -> str:
    """Our name of a reference network: "timm.resnest50d" is "resnest50"."""
    source, name = reference.split(".")
    if source == "torchvision":
        return name.replace("_x", "_") + "x"
    if source == "megvii":
        return name if "_v1_" in name or "_plus_" in name else f"{name}_megvii"
    if name.startswith("resnest50d_"):
        return name.replace("resnest50d_", "resnest50_fast_")
    return re.sub(r"^(resnest\d+)[de]$", r"\1", name)


def load_recipe(golden: Path):
    spec = importlib.util.spec_from_file_location("recipe", golden / "recipe.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe


def values_at(feature_map, index):
    """Values of a channels_last map at (image, channel, row, column)."""
    return np.asarray(feature_map)[index[:, 0], index[:, 2], index[:, 3], index[:, 1]]


class Comparison:
    """Errors of one network, relative to the largest reference value.

    `errors` holds (what, error, tolerance). The tolerance is twenty times the rounding error of
    the reference, at least 1e-5, as the README of the reference numbers recommends.
    """

    def __init__(self, reference: str, golden: Path):
        recipe = load_recipe(golden)
        entry = json.loads((golden / "networks.json").read_text())[reference]
        manifest = recipe.load_manifest(golden / "manifests" / f"{reference}.json")
        self.expected_parameters = entry["num_params"]
        name = our_name(reference)
        model = create_backbone(name, include_rescaling=False, classifier_activation=None)
        load_torch_state_dict(model, recipe.make_state_dict(manifest, entry["seed"]))
        # PyTorch does not count running statistics.
        self.parameters = int(sum(np.prod(v.shape) for v in model.trainable_variables))
        if name in STAGE_LAYERS:
            stages = [model.get_layer(layer).output for layer in STAGE_LAYERS[name]]
        else:
            stages = [model.pyramid_outputs[f"P{level}"] for level in (2, 3, 4, 5)]
        features = keras.Model(model.input, {"stages": stages, "logits": model.output})
        self.errors = []
        with np.load(golden / "networks" / f"{reference}.npz") as arrays:
            for case, facts in entry["cases"].items():
                image = recipe.make_input(facts["input_shape"], entry["seed"], facts["input_name"])
                outputs = features(image.transpose(0, 2, 3, 1), training=False)
                self._compare(case, facts, outputs, arrays)

    def _compare(self, case, facts, outputs, arrays):
        self._add(
            f"{case} logits",
            np.asarray(outputs["logits"]) - arrays[f"{case}_logits"],
            facts["logits_absmax"],
            facts["logits_rel_err"],
        )
        for i, (ours, theirs) in enumerate(zip(outputs["stages"], facts["stages"], strict=True), 1):
            count, channels, height, width = theirs["shape"]
            assert ours.shape == (count, height, width, channels), (case, i, ours.shape)
            values = values_at(ours, arrays[f"{case}_stage{i}_index"])
            difference = values - arrays[f"{case}_stage{i}_value"]
            self._add(f"{case} stage {i}", difference, theirs["absmax"], theirs["rel_err"])

    def _add(self, what, difference, largest, rounding_error):
        error = float(np.abs(difference).max() / largest)
        self.errors.append((what, error, max(1e-5, 20 * rounding_error)))

    @property
    def worst(self):
        """The entry of `errors` with the largest error relative to its tolerance."""
        return max(self.errors, key=lambda entry: entry[1] / entry[2])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("patterns", nargs="*", default=["*"], help="shell patterns of our names")
    here = Path(__file__).resolve()
    parser.add_argument("--golden", type=Path, default=here.parents[2] / "shared" / "golden")
    arguments = parser.parse_args()
    print("| network | reference | parameters | max relative error | tolerance |")
    print("| --- | --- | --- | --- | --- |")
    for reference in json.loads((arguments.golden / "networks.json").read_text()):
        name = our_name(reference)
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in arguments.patterns):
            continue
        comparison = Comparison(reference, arguments.golden)
        same = "" if comparison.parameters == comparison.expected_parameters else " (differs)"
        _, error, tolerance = comparison.worst
        print(
            f"| {name} | {reference} | {comparison.parameters:,}{same} | {error:.1e} | "
            f"{tolerance:.1e} |",
            flush=True,
        )
        keras.backend.clear_session()


if __name__ == "__main__":
    main()
