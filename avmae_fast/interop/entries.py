"""One row of a name map, and what such a table does: read, write, and complain.

Every format is a list of `Entry`, one for each of our parameters; both directions and every error
follow from it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# How many names an error lists before it counts the rest.
_LISTED = 6


class ConvertError(ValueError):
    """Weights cannot be converted; the text names the tensors or the field, and what would do."""


@dataclass(frozen=True)
class Entry:
    """One of our parameters and where another code base keeps it.

    name: our state-dict name.
    leaves: their name of each part, stacked along our first axis. None: they have no such part,
        which is zero.
    leaf_shape: shape of a leaf.
    part_shape: our shape of a part, before stacking.
    view: the axes of a leaf told apart, where one of its axes stands for several.
    axes: the order of these axes in our part; None leaves them as they are.
    """

    name: str
    leaves: tuple[str | None, ...]
    leaf_shape: tuple[int, ...]
    part_shape: tuple[int, ...]
    view: tuple[int, ...] | None = None
    axes: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of our parameter."""
        return len(self.leaves) * self.part_shape[0], *self.part_shape[1:]

    def part(self, leaf: Tensor) -> Tensor:
        """A leaf in our layout."""
        viewed = leaf.reshape(self.view or self.leaf_shape)
        return (viewed if self.axes is None else viewed.permute(self.axes)).reshape(self.part_shape)

    def leaf(self, part: Tensor) -> Tensor:
        """A part in their layout."""
        view = self.view or self.leaf_shape
        if self.axes is not None:
            part = part.reshape([view[axis] for axis in self.axes])
            part = part.permute([self.axes.index(axis) for axis in range(len(view))])
        return part.reshape(self.leaf_shape).contiguous()


def to_ours(
    entries: Sequence[Entry], tensors: Mapping[str, Tensor], what: str
) -> dict[str, Tensor]:
    """Our state dict from their tensors; dtypes are kept.

    Args:
        what: how an error calls the tensors, such as "timm weights".

    Raises:
        ConvertError: tensors are missing, superfluous or of another shape; the text names them.
    """
    check(tensors, {leaf: e.leaf_shape for e in entries for leaf in e.leaves if leaf}, what)
    state = {}
    for entry in entries:
        dtype = next(tensors[leaf].dtype for leaf in entry.leaves if leaf)
        parts = [
            entry.part(tensors[leaf]) if leaf else torch.zeros(entry.part_shape, dtype=dtype)
            for leaf in entry.leaves
        ]
        state[entry.name] = torch.cat(parts) if len(parts) > 1 else parts[0].clone()
    return state


def to_theirs(entries: Sequence[Entry], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors from our state dict, or from gradients under the same names.

    Parts that they do not have are left out. Only key biases are, and softmax does not see them.

    Raises:
        ConvertError: names are missing, superfluous or of another shape, or two of ours that they
            keep as one differ; the text names them.
    """
    check(state, {entry.name: entry.shape for entry in entries}, "parameters")
    leaves: dict[str, Tensor] = {}
    for entry in entries:
        parts = state[entry.name].detach().cpu().chunk(len(entry.leaves))
        for leaf, part in zip(entry.leaves, parts, strict=True):
            if leaf is None:
                continue
            written = entry.leaf(part)
            if leaf in leaves and not torch.equal(leaves[leaf], written):
                raise ConvertError(
                    f"{entry.name} differs from another parameter that this format keeps in the "
                    f"same tensor {leaf}: it cannot hold both"
                )
            leaves[leaf] = written
    return leaves


def check(given: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raise ConvertError unless the tensors have these names and shapes."""
    problems = []
    if missing := sorted(shapes.keys() - given.keys()):
        problems.append(f"missing {listed(missing)}")
    if unknown := sorted(given.keys() - shapes.keys()):
        problems.append(f"unknown {listed(unknown)}")
    wrong = [
        f"{name} has shape {tuple(given[name].shape)}, want {shapes[name]}"
        for name in sorted(shapes.keys() & given.keys())
        if tuple(given[name].shape) != shapes[name]
    ]
    if problems or wrong:
        problems += wrong[:_LISTED]
        if len(wrong) > _LISTED:
            problems.append(f"and {len(wrong) - _LISTED} more of another shape")
        raise ConvertError(f"{what} do not fit the model: " + "; ".join(problems))


def listed(names: Sequence[str]) -> str:
    """The first of the names, and how many there are beyond them."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{list(names[:_LISTED])}{more}"
