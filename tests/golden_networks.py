"""Compare our networks with the golden outputs of the PyTorch implementations; also a program:

python tests/golden_networks.py            # all networks, as a table
python tests/golden_networks.py "regnet*"
"""

import argparse
import fnmatch
import re

import golden_data
import keras
import numpy as np

from keras_resnest.backbones import create_backbone, load_torch_state_dict

# Layers whose maps the references call stages, where those are not the pyramid's levels.
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


class Comparison:
    """Errors of one network, each relative to the largest reference value.

    `errors` holds (what, error, tolerance). The tolerance is twenty times the rounding error of the
    float32 reference, at least 1e-5.
    """

    def __init__(self, reference: str):
        entry = golden_data.load_cases("networks")[reference]
        reference = entry.get("same_as", reference)
        entry = golden_data.load_cases("networks")[reference]
        self.expected_parameters = entry["num_params"]
        name = our_name(reference)
        model = create_backbone(name, include_rescaling=False, classifier_activation=None)
        load_torch_state_dict(model, golden_data.state_dict(reference, entry))
        # PyTorch does not count the running statistics, which are not trained.
        self.parameters = int(sum(np.prod(v.shape) for v in model.trainable_variables))
        if name in STAGE_LAYERS:
            stages = [model.get_layer(layer).output for layer in STAGE_LAYERS[name]]
        else:
            stages = [model.pyramid_outputs[f"P{level}"] for level in (2, 3, 4, 5)]
        features = keras.Model(model.input, {"stages": stages, "logits": model.output})
        self.errors = []
        for case, facts in entry["cases"].items():
            images = golden_data.input_images(facts, entry["seed"])
            self._compare(f"{reference}/{case}", facts, features(images, training=False))

    def _compare(self, case, facts, outputs):
        arrays = golden_data.load_arrays("networks")
        self._add(
            f"{case} logits",
            np.asarray(outputs["logits"]) - arrays[f"{case}_logits"],
            facts["logits_absmax"],
            facts["logits_rel_err"],
        )
        for i, (ours, theirs) in enumerate(zip(outputs["stages"], facts["stages"], strict=True), 1):
            count, channels, height, width = theirs["shape"]
            assert ours.shape == (count, height, width, channels), (case, i, ours.shape)
            difference = golden_data.sample_map(ours) - arrays[f"{case}_stage{i}"]
            self._add(f"{case} stage {i}", difference, theirs["absmax"], theirs["rel_err"])
            # Statistics of the whole map, of which the samples are a part.
            moments = np.array([np.mean(ours, dtype="float64"), np.std(ours, dtype="float64")])
            difference = moments - [theirs["mean"], theirs["std"]]
            self._add(f"{case} stage {i} moments", difference, theirs["absmax"], theirs["rel_err"])

    def _add(self, what, difference, largest, rounding_error):
        error = float(np.abs(difference).max() / largest)
        self.errors.append((what, error, max(1e-5, 20 * rounding_error)))

    @property
    def worst(self):
        """The entry of `errors` that is nearest to its tolerance, or furthest above it."""
        return max(self.errors, key=lambda entry: entry[1] / entry[2])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("patterns", nargs="*", default=["*"], help="shell patterns of our names")
    arguments = parser.parse_args()
    print("| network | reference | parameters | max relative error | tolerance |")
    print("| --- | --- | --- | --- | --- |")
    for reference in golden_data.load_cases("networks"):
        name = our_name(reference)
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in arguments.patterns):
            continue
        comparison = Comparison(reference)
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
