"""`benchmarks/deploy_latency.py` runs, and what it compares computes the same."""

import importlib.util
import math
import pathlib
import re
import subprocess
import sys

import keras
import numpy as np
import pytest

from keras_resnest.detection import AnchorGenerator
from keras_resnest.serving import NumpyDetectionDecoder

BENCHMARKS = pathlib.Path(__file__).resolve().parents[1] / "benchmarks"

if keras.backend.backend() != "tensorflow":
    pytest.skip("models are exported on TensorFlow", allow_module_level=True)


def run(*arguments):
    """What the program prints, on a small network and small images."""
    program = [sys.executable, str(BENCHMARKS / "deploy_latency.py")]
    small = ["--fast", "--model", "resnest14_tiny", "--runs", "1"]
    done = subprocess.run([*program, *small, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows(output):
    """Numbers at the end of every line that ends with at least three of them, by label."""
    table = {}
    for line in output.splitlines():
        label = re.sub(r"(\s+(-?[\d.]+|nan|-?inf)){3,}$", "", line)
        if label != line:
            table[label.strip()] = [float(word) for word in line[len(label) :].split()]
    return table


def check(table, *labels):
    assert set(labels) <= set(table)
    for label in labels:
        assert all(math.isfinite(x) and x > 0 for x in table[label]), (label, table[label])


def has(*packages):
    return all(importlib.util.find_spec(package) is not None for package in packages)


def test_the_tables_hold_times():
    output = run("--parts", "classifier", "postprocess", "--runtimes", "openvino")
    table = rows(output)
    check(table, "SavedModel as Keras writes it", "our SavedModel, float32")
    check(table, "our SavedModel, bfloat16", "64, as trained", "64, crowded")
    if has("openvino"):
        check(table, "our OpenVINO, float32", "our OpenVINO, bfloat16")
    assert len(table["64, crowded"]) == 9  # three implementations: few, many classes, growth
    assert "avx2" in output.splitlines()[0]


@pytest.mark.slow
def test_all_parts():
    output = run()
    table = rows(output)
    end_to_end = ("file to detections", "pixels to detections", "network alone")
    check(table, *(f"SavedModel {p}, {e}" for p in ("float32", "bfloat16") for e in end_to_end))
    check(table, "decoding + NMS, as trained", "float32", "bfloat16")
    for label, packages in (
        ("OpenVINO", ["openvino"]),
        ("ONNX", ["onnxruntime", "onnx", "tf2onnx"]),
        ("LiteRT", ["ai_edge_litert"]),
    ):
        if has(*packages):
            check(table, f"{label}, file to detections")
    assert "skipped torch" in output


@pytest.mark.parametrize("crowded", [False, True])
def test_the_ports_and_we_detect_the_same(crowded, monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("resnest")
    monkeypatch.syspath_prepend(BENCHMARKS)
    import deploy_workers

    anchors = np.asarray(AnchorGenerator()((128, 128)))
    raw = deploy_workers.made_up_outputs(anchors, 128, 21, crowded)
    ours = NumpyDetectionDecoder(anchors, (128, 128), clip_to_image=False)(raw)
    tensors = {name: torch.from_numpy(value) for name, value in raw.items()}
    (theirs,) = deploy_workers.detect_as_the_ports_do(tensors, torch.from_numpy(anchors))
    assert len(theirs) == ours["num_detections"][0] > 10
    np.testing.assert_allclose(theirs[:, 4], ours["confidence"][0, : len(theirs)], rtol=1e-5)
    np.testing.assert_array_equal(theirs[:, 5], ours["labels"][0, : len(theirs)])
    np.testing.assert_allclose(theirs[:, :4], ours["boxes"][0, : len(theirs)], atol=1e-3)
