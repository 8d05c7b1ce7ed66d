"""Saves what was changed on the layers of a network after its construction."""

from collections import deque
from types import SimpleNamespace

import keras


class KeepsLayerChanges:
    """Mix-in of layers and models whose config is the arguments of their constructor.

    Users freeze layers of a built network, add regularizers, quantize. The constructor knows
    nothing of it, so the config gets an entry `"layer_changes"`, `{path: {name: value}}`, if a
    layer inside differs from what the constructor made. Only differences are kept: arguments that
    are changed in a config remain in effect.

    Subclasses call `_layers_made` at the end of the constructor and of a `build` that adds layers.
    """

    _made = None  # a namespace: Keras and TensorFlow would track a dictionary

    def _layers_made(self) -> None:
        """Remembers the state of all layers inside."""
        if self._made is None:
            self._made = SimpleNamespace(configs={}, changes={})
        configs = self._made.configs
        layers = {p: pair for p, pair in _inner_layers(self).items() if p not in configs}
        configs.update({path: _state(layer) for path, (layer, _) in layers.items()})
        if self._made.changes or not self.trainable:
            self._change_layers(self._made.changes, layers)

    def _layer_changes(self) -> dict:
        """The entry of the config; empty if nothing was changed."""
        if self._made is None:
            return {}
        changes = {} if self.built else dict(self._made.changes)
        for path, (layer, parent) in _inner_layers(self).items():
            if path in self._made.configs:
                made = self._made.configs[path]
                made = {**made, "trainable": made["trainable"] and parent.trainable}
                state = _state(layer)
                change = {k: v for k, v in state.items() if repr(v) != repr(made.get(k))}
                changes |= {path: change} if change else {}
        return {"layer_changes": changes} if changes else {}

    def _change_layers(self, changes: dict, layers: dict | None = None) -> None:
        """Applies the entry of a config; layers that `build` adds follow later."""
        self._made.changes = changes
        for path, (layer, parent) in (layers or _inner_layers(self)).items():
            change = dict(changes.get(path, {}))
            made = self._made.configs[path]["trainable"] and parent.trainable
            layer.trainable = change.pop("trainable", made)
            if change:
                _change(layer, change)

    def get_config(self) -> dict:
        return {**super().get_config(), **self._layer_changes()}

    @classmethod
    def from_config(cls, config: dict):
        return cls._changed(super().from_config, config)

    @staticmethod
    def _changed(construct, config: dict):
        """Constructs from a config and applies its entry `"layer_changes"`."""
        config = dict(config)
        changes = config.pop("layer_changes", {})
        made = construct(config)
        if changes:
            made._change_layers(changes)
        return made


def _inner_layers(owner) -> dict:
    """Layers inside as {path: (layer, parent)}, outer ones first, shared ones once."""
    found, seen, queue = {}, {id(owner)}, deque([("", owner)])
    while queue:
        prefix, parent = queue.popleft()
        for layer in parent._layers:
            if id(layer) not in seen:
                seen.add(id(layer))
                path = prefix + layer.name
                found[path] = layer, parent
                queue.append((f"{path}/", layer))
    return found


def _state(layer) -> dict:
    # The layers of a model have their own states.
    config = {} if isinstance(layer, keras.Model) else layer.get_config()
    config.pop("layer_changes", None)
    return _without_ids({**config, "trainable": layer.trainable})


def _without_ids(value):
    """A part of a config without what Keras adds while a model is saved or loaded."""
    if not isinstance(value, dict):
        return value
    return {k: _without_ids(v) for k, v in value.items() if k != "shared_object_id"}


def _change(layer, change: dict) -> None:
    """Does to a layer what was done to the one that was saved."""
    wanted = type(layer).from_config({**layer.get_config(), **change})
    if "dtype" in change:
        mode = wanted.dtype_policy.quantization_mode
        if mode and layer.built:
            layer.quantize(mode, config=wanted.quantization_config)
        layer.dtype_policy = wanted.dtype_policy
    if "lora_rank" in change and layer.built:
        layer.enable_lora(wanted.lora_rank, lora_alpha=wanted.lora_alpha)
    for name in change.keys() - {"dtype", "quantization_config"}:
        setattr(layer, name, getattr(wanted, name))
        weight, _, kind = name.rpartition("_")  # such as kernel_regularizer
        if kind in ("regularizer", "constraint"):
            variable = getattr(layer, weight, None)
            if isinstance(variable, keras.Variable):
                setattr(variable, kind, getattr(wanted, name))
