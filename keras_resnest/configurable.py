"""Base class of serializable objects that are neither layers nor models."""

import functools
import inspect
from typing import Self


class Configurable:
    """Object whose config is its constructor arguments; each is an attribute of the same name."""

    def get_config(self) -> dict:
        names = _argument_names(type(self))
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    @classmethod
    def from_config(cls, config: dict) -> Self:
        return cls(**config)


@functools.cache
def _argument_names(cls: type) -> list[str]:
    # A subclass may pass `**kwargs` on to its base.
    signatures = [inspect.signature(base.__init__) for base in cls.__mro__]
    return list(dict.fromkeys(name for s in signatures for name in s.parameters))
