"""Runs several training processes on this machine, connected over loopback."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import keras_resnest as kr
from keras_resnest.cli.common import Failure

UNUSABLE = 2  # exit status for unusable data or arguments
PATIENCE = 120.0  # seconds in which all workers must end after one has failed


def check_cluster_size(workers: int | None) -> None:
    """Raises ValueError if --workers contradicts TF_CONFIG."""
    config = kr.training.read_tf_config()
    if workers is None or config is None:
        return
    size = sum(len(addresses) for addresses in config["cluster"].values())
    if workers != size:
        raise ValueError(f"--workers {workers} contradicts TF_CONFIG, which lists {size}")


def run_workers(argv: list[str], count: int, restarts: int) -> int:
    """Runs this command in `count` processes, and restarts them all if one is lost."""
    for restarts_left in range(max(restarts, 0), -1, -1):
        statuses = wait_for(start_workers(argv, count))
        if not any(statuses):
            return 0
        if UNUSABLE in statuses:  # the worker has printed the reason
            return UNUSABLE
        ended = ", ".join(f"{i} with status {status}" for i, status in enumerate(statuses))
        text = f"workers ended: {ended}; {restarts_left} restarts are left"
        if restarts_left:
            print(text, file=sys.stderr, flush=True)
    raise Failure(text)


def free_addresses(count: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    return addresses


def start_workers(argv: list[str], count: int) -> list[subprocess.Popen]:
    command, addresses = [sys.executable, "-m", "keras_resnest", *argv], free_addresses(count)
    processes = []
    # Workers ignore Ctrl-C, which reaches them too: `wait_for` ends them, and one sentence is said.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    for index in range(count):
        config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        environment = {**os.environ, "TF_CONFIG": json.dumps(config)}
        processes.append(subprocess.Popen(command, env=environment))
    signal.signal(signal.SIGINT, handler)
    return processes


def wait_for(processes: list[subprocess.Popen]) -> list[int]:
    """Returns the exit statuses. Kills workers that outlive a failed one by `PATIENCE`."""
    deadline = None
    try:
        while None in (statuses := [process.poll() for process in processes]):
            if deadline is None and any(statuses):
                deadline = time.monotonic() + PATIENCE
            if UNUSABLE in statuses or (deadline and time.monotonic() > deadline):
                break
            time.sleep(0.2)
    finally:
        for process in processes:
            process.kill()
    return [process.wait() for process in processes]
