"""The load generator: its table, its batches, and that it leaves other machines alone."""

import importlib.util
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import keras
import numpy as np
import pytest

if keras.backend.backend() != "tensorflow":
    pytest.skip("SavedModels are TensorFlow's", allow_module_level=True)

PROGRAM = Path(__file__).resolve().parents[1] / "benchmarks" / "serving_load.py"


@pytest.fixture(scope="module")
def program():
    specification = importlib.util.spec_from_file_location(PROGRAM.stem, PROGRAM)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def run(*arguments):
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_it_prints_rates_latencies_and_memory():
    ended = run("--requests", 40, "--clients", 4, "--size", 64, "--threads", 1)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.startswith("40 requests from 4 clients, 16 files of ")
    rows = dict(re.findall(r"^(alone|batched) +(\d+\.\d .*)$", ended.stdout, re.MULTILINE))
    for row in rows.values():
        rate, p50, p95, p99, cpu, failed, unreadable = map(float, row.split())
        assert rate > 0 and cpu > 0 and 0 < p50 <= p95 <= p99
        assert failed == unreadable == 0
    assert set(rows) == {"alone", "batched"}
    assert re.search(r"^batched / alone: \d+\.\d\d times", ended.stdout, re.MULTILINE)
    if sys.platform == "linux":
        memories = re.findall(r"^(?:alone|batched)((?: +\d{3,5}){11})$", ended.stdout, re.MULTILINE)
        growths = re.findall(r"growth after the first tenth ([+-]\d+\.\d) MiB", ended.stdout)
        assert len(memories) == len(growths) == 2


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com:8501",
        "http://127.0.0.1.example.com:8501",
        "http://localhost.example.com",
        "http://localhost@example.com",
        "http://10.0.0.1:8501",
        "http://0.0.0.0:8501",
        "https://127.0.0.1:8501",
        "http://127.0.0.1:port",
        "127.0.0.1:8501",
        "file:///etc",
        "",
    ],
)
def test_other_machines_are_refused(program, monkeypatch, capsys, url):
    monkeypatch.setattr(sys, "argv", [PROGRAM.name, "--url", url])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "loopback" in message and f"Received: {url}" in message


def test_this_machine_is_not_refused(program):
    assert program.local_server("http://127.0.0.1:8501") == ("127.0.0.1", 8501)
    assert program.local_server("http://localhost:8501/") == ("localhost", 8501)
    assert program.local_server("http://[::1]:8501") == ("::1", 8501)


def test_a_server_that_is_not_there(program, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # free again behind this block
    url = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(sys, "argv", [PROGRAM.name, "--url", url, "--requests", "10"])
    assert program.main() == 1
    printed = capsys.readouterr()
    assert "10 requests failed" in printed.err and "resident" not in printed.out


def test_wrong_arguments(tmp_path):
    ended = run("--model", tmp_path)
    assert ended.returncode == 2 and "no SavedModel" in ended.stderr


def test_batches(program):
    """Answers reach who asked; batches are full where enough clients wait, never larger."""
    sizes, together = [], threading.Barrier(4)

    def serve(files):
        sizes.append(len(files))
        return {"size": np.array([len(file) for file in files])}

    def client(number):
        for i in range(30):
            together.wait(10)
            answers[number, i] = ask(bytes(100 * number + i))["size"]

    answers = {}
    with program.batched(serve, max_batch_size=4, timeout=5.0, threads=2) as ask:
        clients = [threading.Thread(target=client, args=(n,), daemon=True) for n in range(4)]
        for one in clients:
            one.start()
        for one in clients:
            one.join(30)
    assert sizes == [4] * 30
    assert answers == {(n, i): 100 * n + i for n in range(4) for i in range(30)}


def test_a_batch_is_run_when_its_time_is_over(program):
    with program.batched(lambda files: {"n": np.arange(len(files))}, 8, 0.01, 1) as ask:
        assert ask(b"alone")["n"] == 0


def test_failures_are_counted(program):
    def serve(files):
        if b"bad" in files:
            raise RuntimeError("broken")
        return {"readable": np.array([file != b"text" for file in files])}

    with program.batched(serve, 1, 0.0, 2) as ask:
        load = program.Load(ask, [b"good", b"bad", b"text", b"good"]).run(40, clients=3)
    assert (load.failures, load.unreadable, len(load.latencies)) == (10, 10, 30)
    assert len(load.memories) == 11 and str(load.last_error) == "broken"
