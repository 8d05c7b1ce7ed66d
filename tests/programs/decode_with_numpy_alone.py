"""Decodes raw.npz with a copy of decoder_numpy.py; prints the packages that it imported."""

import sys

for name in ("keras", "tensorflow", "torch", "jax", "keras_resnest"):
    sys.modules[name] = None  # an import raises ImportError

import numpy as np  # noqa: E402

sys.path.insert(0, ".")
before = set(sys.modules)
import decoder_numpy  # noqa: E402

decoder = decoder_numpy.NumpyDetectionDecoder.from_files("decoder.json")
with np.load("raw.npz") as raw:
    np.savez("detections.npz", **decoder(raw))
packages = {name.split(".")[0] for name in set(sys.modules) - before}
print(*sorted(packages - set(sys.stdlib_module_names) - {"numpy", "decoder_numpy"}))
