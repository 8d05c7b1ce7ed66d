"""Prints which heavy modules importing `keras_resnest.data` loads."""

import sys

import keras  # noqa: F401

if __name__ == "__main__":
    before = set(sys.modules)
    import keras_resnest.data

    heavy = {"matplotlib.figure", "pycocotools", "tensorflow_datasets", "keras_cv", "PIL.Image"}
    heavy.add("huggingface_hub")
    loaded = sorted(heavy & (set(sys.modules) - before))
    assert keras_resnest.data.Shapes and "tensorflow_datasets" in sys.modules
    print(loaded)
