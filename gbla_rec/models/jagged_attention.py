"""Softmax attention between two jagged batches of the same rows: no padding, no row sees another."""

# B rows, L tokens, T tokens of a row, H heads, K head width (docs/shapes.md); queries and keys may have different row lengths

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from gbla_kernels import JaggedLayout
from gbla_rec.models.cudnn_attention import cudnn_attention, has_cudnn_kernel, has_dense_cudnn_kernel
from gbla_rec.models.dense_rows import SHORT_ROWS, attend_dense, is_dense_length
from gbla_rec.models.row_attention import attend_rows, row_attention_op

FLASH_CAPABILITY = (8, 0)
FLASH_ALIGNMENT, FLASH_MAX_HEAD_DIM = 8, 256


def jagged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_layout: JaggedLayout,
    key_layout: JaggedLayout,
    *,
    is_causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """Each query attends to all keys of its row, or to those near it or up to its own position.

    Which kernel runs is a rule of the arguments; nothing is tried and caught:

    - half precision on CUDA, one layout on both sides, neither causal nor windowed, a row of more than ``SHORT_ROWS`` tokens, on
      Hopper or later, head width up to 128: cuDNN. If all rows have one length, a multiple of 128 (histories cut at a maximum,
      mostly), its dense kernel, unless sums must have a fixed order; else, where the extra ``cudnn`` is installed, its ragged one;
    - other half precision on CUDA: torch's ``varlen_attn``;
    - everything else: one exact call per row, or per block of queries where there is a window (memory linear in ``T * window``).

    Args:
        query: ``(L_query, H, K)``.
        key: ``(L_key, H, K)``.
        value: ``(L_key, H, K)``.
        query_layout: rows of the queries.
        key_layout: rows of keys and values: as many as queries have, of any lengths.
        is_causal: needs equal layouts.
        window: tokens that a query sees on each side of its own position (if causal, before it); needs equal layouts.

    Returns:
        ``(L_query, H, K)``; a query whose row has no keys gets zeros.

    Raises:
        ValueError: if the layouts disagree in the number of rows, or must be equal and are not, or the window is negative.
        NotImplementedError: for half precision on a GPU that has no kernel for it.
    """
    if query_layout.num_rows != key_layout.num_rows:
        raise ValueError(f"query_layout and key_layout must have the same rows, got {query_layout.num_rows} and {key_layout.num_rows}")
    is_same = query_layout is key_layout
    if window is not None and window < 0:
        raise ValueError(f"window must not be negative, got {window}")
    if (window is not None or is_causal) and not is_same and query_layout.row_lengths != key_layout.row_lengths:
        raise ValueError("query_layout and key_layout must be equal where there is a window or is_causal, got rows of different lengths")
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and query.shape[0] and key.shape[0]:
        is_plain = is_same and not is_causal and window is None
        heads = (query.device, query.dtype, query.shape[2])
        if is_plain and query_layout.max_length > SHORT_ROWS:
            # first: dense or ragged is decided inside, so that a compiler makes one graph for both
            if has_cudnn_kernel(*heads):
                return cudnn_attention(query, key, value, query_layout.offsets, query_layout.offsets_cpu)
            is_dense = is_dense_length(query_layout.uniform_length) and not torch.are_deterministic_algorithms_enabled()
            if is_dense and has_dense_cudnn_kernel(*heads):
                return attend_dense(query, key, value, query_layout.uniform_length)
        return _flash(query, key, value, query_layout, key_layout, is_causal, window)
    if torch.compiler.is_compiling():
        return row_attention_op(query, key, value, query_layout.offsets_cpu, key_layout.offsets_cpu, is_causal, window)  # type: ignore[no-any-return]
    return attend_rows(query, key, value, query_layout.row_lengths, key_layout.row_lengths, is_causal, window)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_layout: JaggedLayout,
    key_layout: JaggedLayout,
    is_causal: bool,
    window: int | None,
) -> Tensor:
    _require_flash_kernel(query.device, query.dtype, query.shape[2])
    side = -1 if window is None else window
    attended = varlen_attn(
        query,
        key,
        value,
        query_layout.offsets_int32,
        key_layout.offsets_int32,
        query_layout.max_length,
        key_layout.max_length,
        window_size=(side, 0 if is_causal else side),
    )
    assert isinstance(attended, Tensor)
    return attended


def _require_flash_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    capability = _capability(device)
    if capability < FLASH_CAPABILITY or head_dim % FLASH_ALIGNMENT or head_dim > FLASH_MAX_HEAD_DIM:
        raise NotImplementedError(
            f"jagged softmax attention in {dtype} has a kernel for compute capability >= {FLASH_CAPABILITY} and head widths that are "
            f"multiples of {FLASH_ALIGNMENT} up to {FLASH_MAX_HEAD_DIM}, got capability {capability} and width {head_dim}; use fp32"
        )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
