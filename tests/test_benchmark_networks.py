"""`benchmarks/networks.py`."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keras_resnest.backbones import create_backbone
from keras_resnest.backbones.zoo import count_multiply_adds

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def networks(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import networks

    return networks


def test_writes_a_table_and_a_plot(tmp_path):
    command = [sys.executable, BENCHMARKS / "networks.py", "regnetx_002", "--runs", "2"]
    files = ["--csv", tmp_path / "table.csv", "--plot", tmp_path / "plot.png"]
    subprocess.run([*command, *files], check=True)
    (row,) = csv.DictReader((tmp_path / "table.csv").open())
    assert row["name"] == "regnetx_002" and row["size"] == "224"
    assert row["parameters"] == "2684792" and row["top1"] == "68.76"
    assert float(row["latency_ms"]) > 0 and float(row["memory_mb"]) > 0
    assert Image.open(tmp_path / "plot.png").size[0] > 500


def test_measures_the_network_that_runs(networks):
    ballast = np.ones(2**27)  # 1 GB in this process, not in that of the network
    row = networks.measure_in_new_process("resnest14_tiny", 65, 1, 2, True)
    del ballast
    model = create_backbone("resnest14_tiny", include_top=False)
    assert row["gflops"] == round(count_multiply_adds(model, (65, 65, 3)) / 1e9, 2)
    assert row["parameters"] == sum(np.prod(v.shape) for v in model.trainable_variables)
    # 1 M parameters are 4 MB; the rest is TensorFlow's.
    assert 4 < row["memory_mb"] < 800


def test_peak_memory_excludes_the_parent_process():
    code = (
        "from networks import peak_memory; before = peak_memory();"
        "x = bytearray(300 << 20); print(before, peak_memory())"
    )
    ballast = np.ones(2**27)
    command = [sys.executable, "-c", code]
    before, after = map(float, subprocess.check_output(command, cwd=BENCHMARKS).split())
    del ballast
    assert before < 1000 and 250 < after - before < 350
