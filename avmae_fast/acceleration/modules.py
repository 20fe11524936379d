"""What every swapped module has in common: a class made at run time from two others."""

import functools
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

Settings = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Part:
    """One operation of a module: `Finding`, by the name of a child, and what its class is told."""

    operation: str
    child: str
    reason: str | None = None
    condition: str | None = None
    settings: Settings = ()


class Swapped(nn.Module):
    """Our forward for a module of another library, to be mixed into its class.

    `super().forward` is the module's own code, for calls that ours does not cover.
    """

    # The classes that are mixed, and the settings; absent in a class derived from the mixture.
    _recipe: ClassVar[tuple[type, type, Settings]]
    # Methods that must be the library's own for ours to mean the same.
    methods: ClassVar[tuple[str, ...]] = ("forward",)
    # Attributes that our forward reads; other releases of a library may not have them.
    reads: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def examine(cls, module: Any) -> Iterable[Part]:
        """What can be swapped in a module of the library's class, and what cannot, and why."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class has no place to be imported from: a copy is made from its ingredients.
        if "_recipe" not in type(self).__dict__:
            return super().__reduce_ex__(protocol)
        made: Any = super().__reduce_ex__(protocol)
        return revive, self._recipe, *made[2:]


@functools.cache
def mixture(own: type, ours: type, settings: Settings) -> type:
    """The class of a swapped module: `ours` before `own`, under its name.

    The name is kept for policies that find the layers to shard by it.
    """
    place = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    made = type(own.__name__, (ours, own), {**place, **dict(settings)})
    made._recipe = (own, ours, settings)  # type: ignore[attr-defined]
    return made


def revive(own: type, ours: type, settings: Settings) -> Any:
    """An empty module of the mixture, for copy and pickle to fill."""
    return object.__new__(mixture(own, ours, settings))


def own_class(cls: type) -> type:
    """The class that a module had before it was swapped; one that was not swapped is its own.

    A class that was derived from the mixture since, as by fully_shard, is derived anew.
    """
    if "_recipe" in cls.__dict__:
        return cls.__dict__["_recipe"][0]
    if not issubclass(cls, Swapped):
        return cls
    bases = tuple(own_class(base) for base in cls.__bases__)
    return type(cls.__name__, bases, {"__module__": cls.__module__, "__doc__": cls.__doc__})


def overrides(cls: type, known: type, methods: Iterable[str]) -> bool:
    """Whether `cls` computes something else than `known`, from which it is derived."""
    # Hugging Face wraps the forward of every class anew.
    return any(
        inspect.unwrap(getattr(cls, method)) is not inspect.unwrap(getattr(known, method))
        for method in methods
    )
