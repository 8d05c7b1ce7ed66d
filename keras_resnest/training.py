"""Optimizers with the schedules that detectors need."""

import keras


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
