"""Devices and machines: strategies, batches per worker, TF_CONFIG."""

import json
import os
from collections.abc import Callable
from typing import Literal

from keras_resnest.checks import checked
from keras_resnest.replicas import is_multi_worker, run_on_replicas
from keras_resnest.trainer import batch_size_of, check_global_batch, report_lost_workers

TF_CONFIG_EXAMPLE = (
    '{"cluster": {"worker": ["host1:2222", "host2:2222"]}, "task": {"type": "worker", "index": 0}}'
)


@checked
def create_strategy(distribution: Literal["auto", "none", "mirrored", "multi_worker"] = "auto"):
    """Creates the `tf.distribute` strategy for this machine and its environment.

    Args:
        distribution: `"multi_worker"` for several processes, described by TF_CONFIG;
            `"mirrored"` for all GPUs of this machine, or its CPU; `"none"` for one device;
            `"auto"` for the first of these that applies.

    Returns:
        A `tf.distribute.Strategy`. Build and compile the model in its `scope()`.

    Raises:
        ValueError: if `distribution` is unknown, or TF_CONFIG is missing or invalid.

    Example:
        >>> with create_strategy().scope():
        ...     model = kr.RefineDet(num_classes=20)
        ...     model.compile()
    """
    import tensorflow as tf

    config = read_tf_config()
    if distribution == "multi_worker" and config is None:
        raise ValueError(
            'distribution="multi_worker" needs the environment variable TF_CONFIG, such as '
            f"{TF_CONFIG_EXAMPLE}. Received: no TF_CONFIG"
        )
    addresses = [a for job in (config or {"cluster": {}})["cluster"].values() for a in job]
    if distribution == "multi_worker" or (distribution == "auto" and len(addresses) > 1):
        if len(addresses) > 1:
            others = f"the other {len(addresses) - 1} of {', '.join(addresses)}"
            print(f"Waiting for all workers: {others}", flush=True)
        return tf.distribute.MultiWorkerMirroredStrategy()
    gpus = tf.config.list_logical_devices("GPU")
    if distribution == "mirrored" or (distribution == "auto" and len(gpus) > 1):
        return tf.distribute.MirroredStrategy()
    return tf.distribute.get_strategy()


@checked
def distribute_batches(strategy, make_batches: Callable, batch_size: int):
    """Creates training batches for `fit` such that each worker reads only its part of the data.

    With a plain dataset, every worker reads all of it and drops the batches of the others, which
    suits few workers or small data.

    Args:
        strategy: the model's `tf.distribute.Strategy`.
        make_batches: function of (number of workers, index of this worker, batch size per
            replica) that returns a `tf.data.Dataset` of batches of that size.
        batch_size: images per step, over all replicas.

    Returns:
        The argument `x` of `fit`; with one worker the dataset `make_batches(1, 0, batch_size)`.

    Raises:
        ValueError: if the replicas cannot share `batch_size` evenly, or `make_batches` returns
            batches of another size.

    Example:
        >>> def make_batches(num_workers, worker, batch_size):
        ...     part = train.shard(num_workers, worker)
        ...     return kr.data.training_batches(part, shape, batch_size, seed=1)
        >>> model.fit(distribute_batches(model.distribute_strategy, make_batches, 32))
    """
    multi_worker = is_multi_worker(strategy)
    check_global_batch({batch_size}, strategy.num_replicas_in_sync)
    if not multi_worker:
        return make_batches(1, 0, batch_size)
    attributes = {}

    def worker_batches(context):
        size = context.get_per_replica_batch_size(batch_size)
        batches = make_batches(context.num_input_pipelines, context.input_pipeline_id, size)
        if batch_size_of(batches) != size:
            raise ValueError(
                f"`make_batches` must return batches of {size} without a smaller last one: "
                f"batch({size}, drop_remainder=True). Received: {batches.element_spec}"
            )
        for name in ("epoch_counter", "class_names", "identity"):
            if hasattr(batches, name):
                attributes[name] = getattr(batches, name)
        attributes.get("identity", {})["batch_size"] = batch_size  # of all workers
        return batches

    distributed = strategy.distribute_datasets_from_function(worker_batches)
    for name, value in attributes.items():
        setattr(distributed, name, value)
    return distributed


def wait_for_workers(strategy) -> None:
    """Waits until all workers of a strategy have called this function.

    Call this last: a worker that exits while others still work counts as lost. With a single
    worker it returns immediately.

    Args:
        strategy: the model's `tf.distribute.Strategy`.

    Raises:
        RuntimeError: if another worker is lost.

    Example:
        >>> wait_for_workers(model.distribute_strategy)
    """
    if not is_multi_worker(strategy):
        return
    import tensorflow as tf

    with report_lost_workers(strategy):
        strategy.reduce("SUM", run_on_replicas(strategy, lambda: tf.constant(1.0)), axis=None)


def read_tf_config() -> dict | None:
    """Reads and checks the environment variable TF_CONFIG.

    With many invalid values, TensorFlow would wait for minutes or train on one worker alone.

    Returns:
        `{"cluster": {job: [address, ...]}, "task": {"type": job, "index": int}}`, or None if
        TF_CONFIG is not set.

    Raises:
        ValueError: if TF_CONFIG is invalid.

    Example:
        >>> read_tf_config()["task"]["index"]
        0
    """
    text = os.environ.get("TF_CONFIG")
    if not text:
        return None
    try:
        config = json.loads(text)
        jobs = {job: list(addresses) for job, addresses in config["cluster"].items()}
        kind, index = config["task"]["type"], _parse_index(config["task"]["index"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"TF_CONFIG must be JSON like {TF_CONFIG_EXAMPLE} ({error!r}). Received: {text}"
        ) from None
    if not jobs or set(jobs) - {"chief", "worker"}:
        raise ValueError(
            'TF_CONFIG: the jobs of a cluster must be "worker" and optionally one "chief". '
            f"Received: {list(jobs)}"
        )
    if len(jobs.get("chief", ())) > 1:
        raise ValueError(f'TF_CONFIG: there must be one "chief" only. Received: {jobs["chief"]}')
    addresses = [address for job in jobs.values() for address in job]
    if not all(map(_is_address, addresses)) or len(set(addresses)) < len(addresses):
        raise ValueError(
            'TF_CONFIG: addresses must be different "host:port" with ports of 1 to 65535. '
            f"Received: {addresses}"
        )
    if kind not in jobs or not 0 <= index < len(jobs[kind]):
        raise ValueError(
            f"TF_CONFIG: the task must be one of the cluster {jobs}. "
            f"Received: type={kind!r}, index={index}"
        )
    return {"cluster": jobs, "task": {"type": kind, "index": index}}


def _parse_index(value) -> int:
    """A task index: a number, or its digits as text."""
    if isinstance(value, bool) or not (isinstance(value, int) or str(value).isdigit()):
        raise TypeError(f"not a whole number: {value!r}")
    return int(value)


def _is_address(text) -> bool:
    host, _, port = text.rpartition(":") if isinstance(text, str) else ("", "", "")
    return bool(host) and port.isdigit() and 1 <= int(port) <= 65535
