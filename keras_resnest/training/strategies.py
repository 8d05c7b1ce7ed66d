"""Where and how a training runs: devices and machines, optimizers for detectors."""

import json
import os

import keras

from keras_resnest.layers.normalization import set_batch_norm
from keras_resnest.replicas import is_chief, is_multi_worker, num_replicas, run_everywhere
from keras_resnest.trainer import (
    DistributedTraining,
    batch_size_of,
    check_global_batch,
    lost_workers,
)
from keras_resnest.training.recipes import AdamW

__all__ = [
    "DistributedTraining",
    "adamw_with_warmup",
    "check_global_batch",
    "create_strategy",
    "distribute_batches",
    "is_chief",
    "num_replicas",
    "read_tf_config",
    "set_batch_norm",
    "wait_for_workers",
]

STRATEGIES = ("auto", "none", "mirrored", "multi_worker")


def create_strategy(distribution: str = "auto"):
    """The `tf.distribute` strategy for what this machine and its environment offer.

    Args:
        distribution: `"multi_worker"` for several processes, described by TF_CONFIG;
            `"mirrored"` for all GPUs of this machine (its CPU where there is none);
            `"none"` for one device; `"auto"`: the first of these that fits.

    Returns:
        A `tf.distribute.Strategy`. Build and compile the model in its `scope()`.

    Raises:
        ValueError: if `distribution` is unknown, or TF_CONFIG is missing or faulty.

    Example:

    >>> with create_strategy().scope():
    ...     model = kr.RefineDet(num_classes=20)
    ...     model.compile()
    """
    import tensorflow as tf

    if distribution not in STRATEGIES:
        raise ValueError(
            f"`distribution` must be one of {STRATEGIES}. Received: distribution={distribution!r}"
        )
    config = read_tf_config()
    if distribution == "multi_worker" and config is None:
        raise ValueError(
            'distribution="multi_worker" needs the environment variable TF_CONFIG, such as '
            '{"cluster": {"worker": ["host1:2222", "host2:2222"]}, '
            '"task": {"type": "worker", "index": 0}}. Received: no TF_CONFIG'
        )
    addresses = [a for job in (config or {"cluster": {}})["cluster"].values() for a in job]
    if distribution == "multi_worker" or (distribution == "auto" and len(addresses) > 1):
        if len(addresses) > 1:
            others = f"the other {len(addresses) - 1} of {', '.join(addresses)}"
            print(f"Waiting until all workers are there: {others}", flush=True)
        return tf.distribute.MultiWorkerMirroredStrategy()
    gpus = tf.config.list_logical_devices("GPU")
    if distribution == "mirrored" or (distribution == "auto" and len(gpus) > 1):
        return tf.distribute.MirroredStrategy()
    return tf.distribute.get_strategy()


def distribute_batches(strategy, make_batches, batch_size: int):
    """Training batches for `fit`, of which each worker reads its own part of the data only.

    Given to `fit` as it is, a dataset is read in whole by every worker, which then drops what
    others train on: right for few workers or small data, a waste for many.

    Args:
        strategy: the `tf.distribute.Strategy` of the model.
        make_batches: called with (number of workers, this worker, batch size of one
            replica), returns a `tf.data.Dataset` of batches of that size.
        batch_size: images of one step, over all replicas.

    Returns:
        What `fit` takes as `x`. With one worker it is what `make_batches(1, 0, batch_size)` gives.

    Raises:
        ValueError: if the replicas cannot share `batch_size` evenly, or `make_batches` gives
            other batches.

    Example:

    >>> def make_batches(num_workers, worker, batch_size):
    ...     part = train.shard(num_workers, worker)
    ...     return kr.data.training_batches(part, shape, batch_size, seed=1)
    >>> model.fit(distribute_batches(model.distribute_strategy, make_batches, 32))
    """
    check_global_batch({batch_size}, strategy.num_replicas_in_sync)
    if not is_multi_worker(strategy):
        return make_batches(1, 0, batch_size)
    counters = []

    def of_worker(context):
        own_size = context.get_per_replica_batch_size(batch_size)
        batches = make_batches(context.num_input_pipelines, context.input_pipeline_id, own_size)
        if batch_size_of(batches) != own_size:
            raise ValueError(
                f"`make_batches` must give batches of {own_size}, without a smaller last one: "
                f"batch({own_size}, drop_remainder=True). Received: {batches.element_spec}"
            )
        counters.append(getattr(batches, "epoch_counter", None))
        return batches

    distributed = strategy.distribute_datasets_from_function(of_worker)
    if counters[0] is not None:
        distributed.epoch_counter = counters[0]
    return distributed


def wait_for_workers(strategy) -> None:
    """Returns when all workers of a strategy have called it; at once with a single one.

    A worker that ends while others are still at work counts as lost: call this last, for
    instance after the chief has written its report.

    Args:
        strategy: the `tf.distribute.Strategy` of the training.

    Raises:
        RuntimeError: if another worker is gone.

    Example:

    >>> wait_for_workers(model.distribute_strategy)
    """
    if not is_multi_worker(strategy):
        return
    import tensorflow as tf

    with lost_workers(strategy):
        strategy.reduce("SUM", run_everywhere(strategy, lambda: tf.constant(1.0)), axis=None)


def read_tf_config() -> dict | None:
    """The environment variable TF_CONFIG, checked; None where it is not set.

    TensorFlow waits for minutes, or trains alone, on many of the faults that are found here.

    Returns:
        `{"cluster": {job: [address, ...]}, "task": {"type": job, "index": int}}`.

    Raises:
        ValueError: says what is wrong.

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
        kind, index = config["task"]["type"], _whole_number(config["task"]["index"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            'TF_CONFIG must be JSON like {"cluster": {"worker": ["host1:2222", "host2:2222"]}, '
            f'"task": {{"type": "worker", "index": 0}}}} ({error!r}). Received: {text}'
        ) from None
    if not jobs or set(jobs) - {"chief", "worker"}:
        raise ValueError(
            'TF_CONFIG: the jobs of a cluster that trains in step are "worker" and perhaps one '
            f'"chief". Received: {list(jobs)}'
        )
    if len(jobs.get("chief", ())) > 1:
        raise ValueError(f'TF_CONFIG: there must be one "chief" only. Received: {jobs["chief"]}')
    addresses = [address for job in jobs.values() for address in job]
    faulty = [a for a in addresses if not _is_address(a)]
    if faulty or len(set(addresses)) < len(addresses):
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


def _whole_number(value) -> int:
    """An index as TF_CONFIG may have it: a number, or its digits as text."""
    if isinstance(value, bool) or not (isinstance(value, int) or str(value).isdigit()):
        raise TypeError(f"no whole number: {value!r}")
    return int(value)


def _is_address(text) -> bool:
    host, _, port = text.rpartition(":") if isinstance(text, str) else ("", "", "")
    return bool(host) and port.isdigit() and 1 <= int(port) <= 65535


def adamw_with_warmup(
    learning_rate: float = 1e-3,
    total_steps: int = 10_000,
    warmup_steps: int | None = None,
    weight_decay: float = 0.05,
    global_clipnorm: float = 10.0,
) -> keras.optimizers.Optimizer:
    """AdamW that warms up, decays along a cosine and clips gradients.

    It trains a detector from scratch in few epochs. Warm-up and clipping keep the
    first steps, whose losses are large, from throwing the weights off.

    Args:
        learning_rate: highest learning rate.
        total_steps: steps of the whole training, epochs times batches per epoch.
        warmup_steps: steps in which the rate rises from 0; a twentieth of all by default.
        weight_decay: decoupled, as in AdamW; biases and normalization are left out.
        global_clipnorm: largest norm of all gradients together.

    Returns:
        A Keras optimizer. `RECIPES["detector_from_scratch"]` is the same as a recipe.

    Raises:
        ValueError: if `total_steps` is not positive.

    Example:

    >>> model.compile(adamw_with_warmup(1e-3, total_steps=30 * len(train_batches)))
    """
    if total_steps < 1:
        raise ValueError(f"`total_steps` must be positive. Received: total_steps={total_steps}")
    warmup_steps = max(1, total_steps // 20) if warmup_steps is None else warmup_steps
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        decay_steps=max(1, total_steps - warmup_steps),
        alpha=0.01,
        warmup_target=learning_rate,
        warmup_steps=warmup_steps,
    )
    return AdamW(schedule, weight_decay=weight_decay, global_clipnorm=global_clipnorm)
