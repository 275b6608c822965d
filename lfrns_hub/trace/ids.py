"""Channel ids: every position of an activation's channel axes has the id of the unit it belongs to.

Ids are int64; `NONE` marks a position that belongs to no unit. Ties are edges, resolved once, by connected components.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

NONE = -1


@dataclass
class Axis:
    """Ids along one axis of a parameter or buffer."""

    tensor: str
    dim: int
    ids: Tensor
    makes: bool  # the axis is the output of a conv or linear


@dataclass
class Consumer:
    """A conv or linear that contracts its input's ids [in] into new ones."""

    module: str
    ids: Tensor


@dataclass
class Literal:
    """A number written in the graph that is the length of an axis on which units lie.

    `rows` are the ids of the axis [R, P]: position p depends on the unit that all of column p belongs to.
    """

    module: str
    value: int
    rows: Tensor
    whole: tuple[int, ...] = ()  # the list it is an element of, as in split(x, [a, b])
    place: int = 0
    attribute: str = ""  # if the attribute is known beforehand
    factor: int = 1  # positions of the axis for each unit of the attribute, such as channels in a conv group
    all: bool = False  # whether it follows no unit where the rows differ anywhere


@dataclass
class MacsTerm:
    """MACs of one operation, and the id axes on whose kept share they depend, each linearly."""

    macs: int
    axes: tuple[Tensor, ...]


@dataclass
class IdTable:
    """All ids of a trace and the facts collected about them."""

    count: int = 0
    starts: list[int] = field(default_factory=list)
    from_tensor: list[bool] = field(default_factory=list)
    edges: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    frozen: list[tuple[Tensor, str]] = field(default_factory=list)
    deferred: list[tuple[Tensor, str | None]] = field(default_factory=list)
    heads: list[Tensor] = field(default_factory=list)
    activated: list[Tensor] = field(default_factory=list)
    normed: list[Tensor] = field(default_factory=list)
    axes: list[Axis] = field(default_factory=list)
    consumers: list[Consumer] = field(default_factory=list)
    unobserved: list[Tensor] = field(default_factory=list)  # contracted where no output depends on it
    macs: list[MacsTerm] = field(default_factory=list)
    literals: list[Literal] = field(default_factory=list)
    divisions: list[list[Tensor]] = field(default_factory=list)  # ids of each part
    tensors: dict[str, Tensor] = field(default_factory=dict)
    by_axis: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    unmade: dict[str, tuple[int, str]] = field(default_factory=dict)  # layers without ids: number of outputs, and why

    def fresh(self, count: int, from_tensor: bool = False) -> Tensor:
        """Return `count` new ids in one block."""
        self.starts.append(self.count)
        self.from_tensor.append(from_tensor)
        self.count += count
        return torch.arange(self.count - count, self.count)

    def blocks(self, ids: Tensor) -> Tensor:
        """Return the block of each id, NONE for NONE."""
        starts = torch.tensor(self.starts or [0])
        return torch.where(ids == NONE, NONE, torch.searchsorted(starts, ids.contiguous(), right=True) - 1)

    def axis(self, tensor: str, dim: int, ids: Tensor, makes: bool = False) -> None:
        """Record that ids [P] lie along an axis of a parameter or buffer; if it has ids already, tie the two."""
        first = self.by_axis.get((tensor, dim))
        if first is None:
            self.by_axis[tensor, dim] = ids
            self.axes.append(Axis(tensor, dim, ids, makes))
            return
        self.tie(first, ids)
        holes = (first == NONE) != (ids == NONE)
        self.freeze(torch.cat([first[holes], ids[holes]]), f"{tensor} also meets channels of fixed number")

    def tie(self, one: Tensor, other: Tensor) -> None:
        """Record that ids are removed together, position by position; NONE ties nothing."""
        one, other = (ids.reshape(-1) for ids in collapse(one, other))
        real = (one != NONE) & (other != NONE) & (one != other)
        if real.any():
            pairs = torch.unique(one[real] * self.count + other[real])  # one number per pair: far faster than columns
            self.edges.append((pairs // self.count, pairs % self.count))

    def tie_all(self, ids: Tensor) -> None:
        """Record that all of these ids are removed together."""
        ids = distinct(ids)
        if len(ids) > 1:
            self.tie(ids[:-1], ids[1:])

    def freeze(self, ids: Tensor, reason: str) -> None:
        """Record that these ids are never removed."""
        ids = distinct(ids)
        if len(ids):
            self.frozen.append((ids, reason))

    def one_unit_per_row(self, rows: Tensor, freeze: str | None) -> None:
        """Require one unit in each row of ids [R, P]; several units are marked approximate, or frozen."""
        self.deferred.append((torch.unique(rows, dim=0), freeze))

    def of_tensors(self, ids: Tensor) -> bool:
        """Return whether ids belong only to parameters and buffers, or to no unit."""
        tensors = [*self.from_tensor, True]  # the block of NONE, -1, reads the last entry
        return all(tensors[block] for block in self.blocks(ids).unique().tolist())

    def other_units(self, rows: Tensor) -> bool:
        """Return whether two rows of ids [R, P] have different units of the same producer."""
        rows = torch.unique(rows, dim=0)
        blocks = self.blocks(rows)
        blocks = torch.where(torch.tensor([*self.from_tensor, True])[blocks], NONE, blocks)  # tokens are not units
        order = torch.argsort(blocks, dim=0, stable=True)
        sorted_blocks, sorted_rows = blocks.gather(0, order), rows.gather(0, order)
        same = (sorted_blocks[1:] == sorted_blocks[:-1]) & (sorted_blocks[1:] != NONE)
        return bool((same & (sorted_rows[1:] != sorted_rows[:-1])).any())

    def tie_rows(self, rows: Tensor) -> tuple[Tensor, bool]:
        """Tie the ids that one tensor, indexed by P, reads in rows of ids [R, P].

        Returns:
            Ids of the tensor's own axis [P], and True; or, where two rows have different units of the same producer (a
                tensor shared by heads), ids of no axis, and False: then each row is tied into one unit.
        """
        rows = torch.unique(rows, dim=0)
        if len(rows) > 1:
            if self.other_units(rows):
                for row in rows:
                    self.tie_all(row)
                return torch.full_like(rows[0], NONE), False
            for row in rows[1:]:
                self.tie(rows[0], row)
            holes = (rows == NONE).any(0)
            if holes.any():
                self.freeze(rows[:, holes], "units meet a constant of fixed size")
        return rows.max(0).values, True

    def classes(self) -> np.ndarray:
        """Resolve all ties; return the unit number of each id, [count]."""
        from scipy.sparse import coo_matrix  # imported here: slow
        from scipy.sparse.csgraph import connected_components

        one = torch.cat([edge[0] for edge in self.edges]).numpy() if self.edges else np.zeros(0, np.int64)
        other = torch.cat([edge[1] for edge in self.edges]).numpy() if self.edges else np.zeros(0, np.int64)
        graph = coo_matrix((np.ones(len(one), np.int8), (one, other)), shape=(self.count, self.count))
        return connected_components(graph, directed=False)[1]


def resolve(ids: Tensor, labels: np.ndarray) -> np.ndarray:
    """Return the unit of each id, NONE for none, as a flat array."""
    flat = ids.reshape(-1).numpy()
    return np.where(flat == NONE, NONE, labels[np.maximum(flat, 0)])


def distinct(ids: Tensor) -> Tensor:
    """Return the distinct ids except NONE, ascending."""
    for dim in range(ids.ndim):
        if ids.stride(dim) == 0 and ids.shape[dim] > 1:
            ids = ids.narrow(dim, 0, 1)
    return torch.unique(ids[ids != NONE])


def varies(ids: Tensor, dim: int) -> bool:
    """Return whether ids differ along an axis."""
    return ids.shape[dim] > 1 and ids.stride(dim) != 0 and bool((ids.narrow(dim, 0, 1) != ids).any())


def collapse(*tensors: Tensor) -> list[Tensor]:
    """Broadcast id tensors and keep one position of every axis on which none of them varies."""
    tensors = list(torch.broadcast_tensors(*tensors))
    for dim in range(tensors[0].ndim):
        if all(t.stride(dim) == 0 for t in tensors) and tensors[0].shape[dim] > 1:
            tensors = [t.narrow(dim, 0, 1) for t in tensors]
    return tensors


def as_rows(ids: Tensor, dims: list[int]) -> Tensor:
    """Return ids as rows [R, P]: P runs over `dims`, R over all other axes; each row once."""
    dims = [d % ids.ndim for d in dims]
    for dim in range(ids.ndim):
        if dim not in dims and ids.stride(dim) == 0 and ids.shape[dim] > 1:
            ids = ids.narrow(dim, 0, 1)
    rest = [d for d in range(ids.ndim) if d not in dims]
    columns = int(np.prod([ids.shape[d] for d in dims]))
    rows = ids.permute(*rest, *dims).reshape(-1, columns)
    return rows if len(rows) == 1 else torch.unique(rows, dim=0)
