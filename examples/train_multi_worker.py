"""Train a detector or classifier on several machines, or on several processes of this one.

On N machines, start the same command on each, with TF_CONFIG telling who is who (README, "Many
machines", has lines for Slurm and Kubernetes). Data and OUTPUT must be seen by all of them:

    TF_CONFIG='{"cluster": {"worker": ["host1:2222", "host2:2222"]},
                "task": {"type": "worker", "index": 0}}' \\
        python examples/train_multi_worker.py -- my_folder --batch-size 64 --output /shared/run

Without TF_CONFIG, it starts --workers processes here, which talk over loopback:

    python examples/train_multi_worker.py --workers 2 -- my_folder --batch-size 16

What stands behind "--" goes to examples/train_detector.py, or with --classifier to
examples/train_classifier.py; their --help has the options. If a worker is lost, all of them end
with a sentence that says so. Started again with the same command (or by --restarts) they go on
from the last checkpoint.

Exit status: 0; 1 if a worker was lost or training ended early; 2 if data or arguments cannot be
used.
"""

import argparse
import importlib
import json
import os
import socket
import subprocess
import sys
import time

UNUSABLE = 2  # status of a program whose data or arguments cannot be used


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="processes, without TF_CONFIG (default: 2)"
    )
    parser.add_argument(
        "--restarts",
        type=int,
        default=0,
        help="how often the local processes start again after one was lost (default: 0)",
    )
    parser.add_argument("--classifier", action="store_true", help="train with train_classifier.py")
    parser.add_argument("training", nargs="+", help="-- and arguments of the training program")
    arguments = parser.parse_args(arguments)
    if arguments.workers < 1:
        parser.error(f"--workers must be 1 or more, not {arguments.workers}")
    return arguments


def free_addresses(count: int) -> list[str]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    return addresses


def start_workers(count: int) -> list[subprocess.Popen]:
    """This program once more for every worker, each with its TF_CONFIG."""
    addresses = free_addresses(count)
    processes = []
    for index in range(count):
        config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        environment = {**os.environ, "TF_CONFIG": json.dumps(config)}
        processes.append(subprocess.Popen([sys.executable, *sys.argv], env=environment))
    return processes


def wait_for(processes: list[subprocess.Popen], patience: float = 120.0) -> list[int]:
    """Exit statuses. After one worker failed, the others get `patience` seconds."""
    failed_at = None
    while any(process.poll() is None for process in processes):
        statuses = [process.poll() for process in processes]
        if failed_at is None and any(statuses):
            failed_at = time.monotonic()
        is_late = failed_at is not None and time.monotonic() - failed_at > patience
        if is_late or UNUSABLE in statuses:
            for process in processes:
                process.kill()
        time.sleep(0.2)
    return [process.returncode for process in processes]


def main() -> None:
    arguments = parse_arguments()
    if os.environ.get("TF_CONFIG"):
        program = "train_classifier" if arguments.classifier else "train_detector"
        importlib.import_module(program).main(arguments.training)
        return
    for attempt in range(arguments.restarts + 1):
        statuses = wait_for(start_workers(arguments.workers))
        if not any(statuses):
            return
        if UNUSABLE in statuses:  # the worker has said what
            sys.exit(UNUSABLE)
        left = arguments.restarts - attempt
        ended = ", ".join(f"{i} with status {status}" for i, status in enumerate(statuses))
        print(f"Workers ended: {ended}; {left} restarts are left.", file=sys.stderr, flush=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
