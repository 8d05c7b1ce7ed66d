"""Training: strategies, recipes, optimizers and callbacks."""

from keras_resnest.layers.normalization import set_batch_norm
from keras_resnest.replicas import is_chief, num_replicas
from keras_resnest.trainer import DistributedTraining, check_global_batch
from keras_resnest.training import callbacks, optimizers, recipes
from keras_resnest.training.strategies import (
    create_strategy,
    distribute_batches,
    read_tf_config,
    wait_for_workers,
)

__all__ = [
    "DistributedTraining",
    "callbacks",
    "check_global_batch",
    "create_strategy",
    "distribute_batches",
    "is_chief",
    "num_replicas",
    "optimizers",
    "read_tf_config",
    "recipes",
    "set_batch_norm",
    "wait_for_workers",
]
