"""Many devices and many processes train what one device trains."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PROGRAM = Path(__file__).with_name("distributed_training.py")


def run(*arguments, config=None, wait=True):
    environment = {k: v for k, v in os.environ.items() if k != "TF_CONFIG"}
    if config is not None:
        environment["TF_CONFIG"] = json.dumps(config)
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if not wait:
        return process
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return output


def free_addresses(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    return addresses


def run_workers(count, *arguments, outputs):
    addresses = free_addresses(count)
    processes = [
        run(
            outputs[i],
            *arguments,
            config={"cluster": {"worker": addresses}, "task": {"type": "worker", "index": i}},
            wait=False,
        )
        for i in range(count)
    ]
    texts = [process.communicate(timeout=300)[0] for process in processes]
    assert [p.returncode for p in processes] == [0] * count, "\n".join(t[-2000:] for t in texts)


def assert_same_training(one, many):
    one, many = np.load(one), np.load(many)
    assert set(one) == set(many)
    moved = 0.0
    for name in one:
        tolerance = 1e-5 if name.startswith("weight") else 1e-4 * np.abs(one[name]).max()
        np.testing.assert_allclose(many[name], one[name], rtol=0, atol=tolerance, err_msg=name)
        moved += np.abs(one[name]).sum()
    assert np.isfinite(moved)


@pytest.mark.parametrize(
    ("model", "batch_norm", "replicas"),
    [
        ("detector", "frozen", (2, 4)),
        ("detector", "synchronized", (2,)),
        ("classifier", "frozen", (2, 4)),
        ("classifier", "synchronized", (2,)),
    ],
)
def test_replicas_train_as_one_device(tmp_path, model, batch_norm, replicas):
    """In the detector's batches the last replicas have no object."""
    run(tmp_path / "w", "--model", model, "--batch-norm", batch_norm, "--replicas", 1, *replicas)
    for count in replicas:
        assert_same_training(tmp_path / "w_1.npz", tmp_path / f"w_{count}.npz")


@pytest.mark.parametrize("model", ["detector", "classifier"])
def test_two_processes_train_as_one(tmp_path, model):
    run(tmp_path / "w", "--model", model, "--replicas", 1)
    outputs = [tmp_path / "worker_0.npz", tmp_path / "worker_1.npz"]
    run_workers(2, "--model", model, outputs=outputs)
    for output in outputs:
        assert_same_training(tmp_path / "w_1.npz", output)
