"""Where and how a training runs: devices and machines, optimizers for detectors."""

import json
import os

import keras

from keras_resnest.distribution import DistributedTraining, is_chief, num_replicas
from keras_resnest.layers.normalization import set_batch_norm

__all__ = [
    "DistributedTraining",
    "adamw_with_warmup",
    "create_strategy",
    "is_chief",
    "num_replicas",
    "read_tf_config",
    "set_batch_norm",
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
    several = config is not None and sum(map(len, config["cluster"].values())) > 1
    if distribution == "multi_worker" or (distribution == "auto" and several):
        return tf.distribute.MultiWorkerMirroredStrategy()
    gpus = tf.config.list_logical_devices("GPU")
    if distribution == "mirrored" or (distribution == "auto" and len(gpus) > 1):
        return tf.distribute.MirroredStrategy()
    return tf.distribute.get_strategy()


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
        kind, index = config["task"]["type"], int(config["task"]["index"])
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
    addresses = [address for job in jobs.values() for address in job]
    faulty = [a for a in addresses if not (isinstance(a, str) and a.rpartition(":")[2].isdigit())]
    if faulty or len(set(addresses)) < len(addresses):
        raise ValueError(
            f'TF_CONFIG: addresses must be different "host:port". Received: {addresses}'
        )
    if kind not in jobs or not 0 <= index < len(jobs[kind]):
        raise ValueError(
            f"TF_CONFIG: the task must be one of the cluster {jobs}. "
            f"Received: type={kind!r}, index={index}"
        )
    return {"cluster": jobs, "task": {"type": kind, "index": index}}


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
        weight_decay: decoupled, as in AdamW; biases and normalisation are left out.
        global_clipnorm: largest norm of all gradients together.

    Returns:
        A Keras optimizer.

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
    optimizer = keras.optimizers.AdamW(
        schedule, weight_decay=weight_decay, global_clipnorm=global_clipnorm
    )
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta", "scale"])
    return optimizer
