"""Several training processes on this machine, which talk over loopback."""

import json
import os
import socket
import subprocess
import sys
import time

import keras_resnest as kr
from keras_resnest.cli.common import Failure

UNUSABLE = 2  # exit status of a command whose data or arguments cannot be used
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
    """Runs this command in `count` processes, again after one was lost; the exit status."""
    for restarts_left in range(max(restarts, 0), -1, -1):
        statuses = wait_for(start_workers(argv, count))
        if not any(statuses):
            return 0
        if UNUSABLE in statuses:  # the worker has said why
            return UNUSABLE
        ended = ", ".join(f"{i} with status {status}" for i, status in enumerate(statuses))
        text = f"workers ended: {ended}; {restarts_left} restarts are left"
        if restarts_left:
            print(text, file=sys.stderr, flush=True)
    raise Failure(text)


def free_addresses(count: int) -> list[str]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    return addresses


def start_workers(argv: list[str], count: int) -> list[subprocess.Popen]:
    addresses = free_addresses(count)
    processes = []
    for index in range(count):
        config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        environment = {**os.environ, "TF_CONFIG": json.dumps(config)}
        command = [sys.executable, "-m", "keras_resnest", *argv]
        processes.append(subprocess.Popen(command, env=environment))
    return processes


def wait_for(processes: list[subprocess.Popen]) -> list[int]:
    """Exit statuses. Kills the workers that are left some time after one has failed."""
    failed_at = None
    while any(process.poll() is None for process in processes):
        statuses = [process.poll() for process in processes]
        if failed_at is None and any(statuses):
            failed_at = time.monotonic()
        is_late = failed_at is not None and time.monotonic() - failed_at > PATIENCE
        if is_late or UNUSABLE in statuses:
            for process in processes:
                process.kill()
        time.sleep(0.2)
    return [process.returncode for process in processes]
