"""The layout of a jagged batch: made once per batch, while lengths are still on the CPU, and shared by all layers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gbla_kernels.row_splits import RowSplits


@dataclass(frozen=True, eq=False)
class JaggedLayout:
    """Where each row of a jagged ``(L, ...)`` tensor begins and ends.

    ``B`` rows, ``L`` tokens.

    Attributes:
        offsets: ``(B + 1,)`` int64 on the batch's device; row ``b`` is ``offsets[b]:offsets[b + 1]``.
        offsets_int32: the same as int32, for kernels that take no int64.
        offsets_cpu: ``(B + 1,)`` int64 on the CPU: lengths are known without a device synchronisation.
        positions: ``(L,)`` int64, the index of each token inside its row.
        rows: ``(L,)`` int64, the row of each token.
        row_splits: the work of linear attention: short rows whole, longer ones cut into splits.
        all_splits: the same with every row cut into splits, for kernels without a path of their own for short rows.
        max_length: tokens of the longest row (0 when there is none).
        uniform_length: tokens of every row if all have as many, else 0.
    """

    offsets: Tensor
    offsets_int32: Tensor
    offsets_cpu: Tensor
    positions: Tensor
    rows: Tensor
    row_splits: RowSplits
    all_splits: RowSplits
    max_length: int
    uniform_length: int
    row_lengths: list[int] = field(repr=False)

    def __post_init__(self) -> None:
        if not torch.compiler.is_compiling():
            # else a compiler takes two sizes for one if they are equal in the first batch
            for tensor in self._device_tensors():
                torch._dynamo.maybe_mark_dynamic(tensor, 0)

    @classmethod
    def from_lengths(cls, lengths: Tensor | Sequence[int]) -> "JaggedLayout":
        """Build the layout on the CPU from row lengths ``(B,)``; move it with ``to``.

        Raises:
            ValueError: if a length is negative, or lengths are not one-dimensional integers on the CPU.
        """
        lengths = torch.as_tensor(lengths)
        if lengths.numel() == 0:
            lengths = lengths.to(torch.int64)
        if lengths.dim() != 1 or lengths.is_floating_point() or lengths.device.type != "cpu":
            found = f"{lengths.dtype} {tuple(lengths.shape)} on {lengths.device}"
            raise ValueError(f"lengths must be one-dimensional integers on the CPU, got {found}")
        lengths = lengths.to(torch.int64)
        if lengths.numel() and int(lengths.min()) < 0:
            raise ValueError(f"lengths must not be negative, got {int(lengths.min())} in row {int(lengths.argmin())}")
        offsets = torch.zeros(lengths.numel() + 1, dtype=torch.int64)
        torch.cumsum(lengths, 0, out=offsets[1:])
        rows = torch.repeat_interleave(lengths)
        return cls(
            offsets=offsets,
            offsets_int32=offsets.to(torch.int32),
            offsets_cpu=offsets,
            positions=torch.arange(rows.numel()) - offsets[rows],
            rows=rows,
            row_splits=RowSplits.from_lengths(lengths),
            all_splits=RowSplits.from_lengths(lengths, short_limit=0),
            max_length=int(lengths.max()) if lengths.numel() else 0,
            uniform_length=int(lengths[0]) if lengths.numel() and bool((lengths == lengths[0]).all()) else 0,
            row_lengths=lengths.tolist(),
        )

    @classmethod
    def from_offsets(cls, offsets: Tensor) -> "JaggedLayout":
        """Build the layout from ``(B + 1,)`` offsets. Offsets on a GPU are copied to the CPU first, which synchronises.

        Raises:
            ValueError: if offsets are no tensor of integers, do not start at 0 or decrease.
        """
        if not isinstance(offsets, Tensor) or offsets.is_floating_point():
            found = offsets.dtype if isinstance(offsets, Tensor) else f"{type(offsets).__name__} {offsets!r:.60}"
            raise ValueError(f"offsets must be a tensor of integers, got {found}; torch.as_tensor makes one of a list of them")
        host = offsets.detach().cpu().to(torch.int64)
        if host.dim() != 1 or host.numel() == 0 or int(host[0]) != 0:
            raise ValueError(f"offsets must be (B + 1,) and start at 0, got shape {tuple(host.shape)}, first {host[:1].tolist()}")
        return cls.from_lengths(host[1:] - host[:-1]).to(offsets.device)

    @property
    def num_rows(self) -> int:
        """Rows of the batch, empty ones included."""
        return self.offsets.numel() - 1

    @property
    def num_tokens(self) -> int:
        """Tokens of the batch, ``L``."""
        return self.positions.numel()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "JaggedLayout":
        """The layout with its device tensors on ``device``; the CPU copy stays where it is."""
        return self._map(lambda tensor: tensor.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> "JaggedLayout":
        """The layout in page-locked memory, for asynchronous copies to a GPU."""
        return self._map(lambda tensor: tensor.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory of the device tensors until ``stream`` has passed this point."""
        for tensor in self._device_tensors():
            tensor.record_stream(stream)

    def _device_tensors(self) -> tuple[Tensor, ...]:
        tables = (*self.row_splits.tensors(), *self.all_splits.tensors())
        return (self.offsets, self.offsets_int32, self.positions, self.rows, *tables)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "JaggedLayout":
        return replace(
            self,
            offsets=function(self.offsets),
            offsets_int32=function(self.offsets_int32),
            positions=function(self.positions),
            rows=function(self.rows),
            row_splits=self.row_splits.map(function),
            all_splits=self.all_splits.map(function),
        )
