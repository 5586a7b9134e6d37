"""The hybrid encoder: pre-norm blocks of softmax attention (S, or W in a window) and gated bidirectional linear attention (G)."""

# B rows, L tokens, T tokens of a row, D model width (docs/shapes.md)

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gbla_kernels import Backend, JaggedLayout, keyed_dropout
from gbla_kernels.checks import require_backend, require_layout, require_tensor
from gbla_rec.config import EncoderConfig
from gbla_rec.models.layers import GatedBidirectionalLinearAttention, RMSNorm, SoftmaxAttention, SwiGLU
from gbla_rec.models.step_parts import step_part

__all__ = ["EncoderBlock", "EncoderConfig", "HybridEncoder", "recency_buckets"]

RECENCY_BUCKETS_PER_OCTAVE = 4
NUM_RECENCY_BUCKETS = 24 * RECENCY_BUCKETS_PER_OCTAVE


def mixer_of(letter: str, config: EncoderConfig, output_scale: float, backend: Backend) -> nn.Module:
    """The mixing layer of a pattern letter (docs/shapes.md)."""
    match letter:
        case "S":
            return SoftmaxAttention(config, output_scale=output_scale, backend=backend)
        case "W":
            return SoftmaxAttention(config, window=config.window, output_scale=output_scale, backend=backend)
        case "G":
            return GatedBidirectionalLinearAttention(config, output_scale=output_scale, backend=backend)
    raise AssertionError(f"EncoderConfig let the letter {letter!r} pass")


class EncoderBlock(nn.Module):
    """``x + mix(norm(x))``, then ``x + ffn(norm(x))``."""

    def __init__(self, letter: str, config: EncoderConfig, index: int, backend: Backend) -> None:
        super().__init__()
        output_scale = (2 * len(config.layers)) ** -0.5
        self.mixer_norm = RMSNorm(config.model_dim)
        self.mixer = mixer_of(letter, config, output_scale, backend)
        self.ffn_norm = RMSNorm(config.model_dim)
        self.ffn = SwiGLU(config.model_dim, config.resolved_ffn_dim, output_scale=output_scale)
        self.dropout, self.index, self.backend = config.dropout, index, backend
        self.mixer_part = f"encoder.{letter}"

    def forward(self, x: Tensor, layout: JaggedLayout, token_keys: Tensor | None) -> Tensor:
        """``(L, D)`` to ``(L, D)``."""
        with step_part(self.mixer_part):
            x = self._add(x, self.mixer(x, layout, norm=self.mixer_norm), token_keys, 2 * self.index)
        with step_part("encoder.ffn"):
            return self._add(x, self.ffn(self.ffn_norm(x)), token_keys, 2 * self.index + 1)

    def _add(self, x: Tensor, update: Tensor, token_keys: Tensor | None, salt: int) -> Tensor:
        return keyed_dropout(update, token_keys, self.dropout, salt, residual=x, backend=self.backend)


class HybridEncoder(nn.Module):
    """Encodes jagged histories with one layer per letter of ``config.pattern * config.num_repeats``.

    A drop-in for any model that has a TorchRec ``JaggedTensor``: ``encoder(jagged.values(), jagged.offsets())``.
    """

    def __init__(self, config: EncoderConfig, *, backend: Backend) -> None:
        """Make the layers.

        Args:
            config: of the encoder.
            backend: ``TRITON``: the fused kernels, for a GPU; ``REFERENCE``: plain torch, anywhere, slow on a GPU. The caller chooses:
                the device of the values is not known here. The weights are the same.

        Raises:
            ValueError: if ``backend`` is not a ``Backend``.
        """
        super().__init__()
        require_backend(backend)
        self.config = config
        # G without conv sees a bag of items: every variant gets the distance from the end
        self.recency = nn.Embedding(NUM_RECENCY_BUCKETS, config.model_dim)
        nn.init.normal_(self.recency.weight, std=0.1)
        self.blocks = nn.ModuleList(EncoderBlock(letter, config, i, backend) for i, letter in enumerate(config.layers))
        self.final_norm = RMSNorm(config.model_dim)

    def forward(self, values: Tensor, offsets: Tensor, *, layout: JaggedLayout | None = None, token_keys: Tensor | None = None) -> Tensor:
        """Encode each row.

        Args:
            values: ``(L, D)`` token embeddings, oldest first in each row, in the dtype of the weights or under autocast.
            offsets: ``(B + 1,)`` integers; row ``b`` is ``offsets[b]:offsets[b + 1]``, possibly empty.
            layout: the same rows on the device of ``values``, made in collate; without it offsets are read by the host (a device sync).
            token_keys: ``(L,)`` int64, which decide what dropout drops: new ones for each step. Needed in training where
                ``config.dropout`` is above 0; evaluation does not read them.

        Returns:
            ``(L, D)``, normalised.

        Raises:
            ValueError: if values are not ``(L, model_dim)`` or of another dtype than the weights, offsets do not cover them, layout has
                other rows, or dropout lacks its keys.
        """
        require_tensor("values", values)
        if values.dim() != 2 or values.shape[1] != self.config.model_dim:
            raise ValueError(f"values must have shape (L, model_dim) = (L, {self.config.model_dim}), got {tuple(values.shape)}")
        dtype = self.recency.weight.dtype
        if values.dtype != dtype and not torch.is_autocast_enabled(values.device.type):
            raise ValueError(
                f"values must have the dtype of the encoder's weights, {dtype}, outside of autocast, got {values.dtype}; cast one of them, "
                "or call it under torch.autocast"
            )
        if self.training and self.config.dropout > 0 and token_keys is None:
            raise ValueError(
                f"token_keys must be given in training with EncoderConfig.dropout = {self.config.dropout}, got None; "
                "give torch.randint(2**62, (L,)) of each step, or call eval()"
            )
        if layout is None:
            layout = JaggedLayout.from_offsets(offsets)
        else:
            _require_rows(layout, offsets, values.device)
        if layout.num_tokens != values.shape[0]:
            raise ValueError(f"offsets must cover values, got {layout.num_tokens} tokens in offsets and {values.shape[0]} in values")
        x = values + self.recency(recency_buckets(layout)).to(values.dtype)
        keys = token_keys if self.training else None
        for block in self.blocks:
            if self.config.activation_checkpointing and torch.is_grad_enabled():
                x = _recomputed(block, x, layout, keys)
            else:
                x = block(x, layout, keys)
        return self.final_norm(x)  # type: ignore[no-any-return]


def _require_rows(layout: JaggedLayout, offsets: Tensor, device: torch.device) -> None:
    """Raise ValueError unless ``layout`` is of ``offsets`` and on ``device``: the layers read the layout alone."""
    require_layout("layout", layout)
    require_tensor("offsets", offsets)
    if layout.num_rows != offsets.numel() - 1:
        raise ValueError(f"layout must have the rows of offsets, got {layout.num_rows} rows and {offsets.numel() - 1} in offsets")
    if layout.offsets.device != device:
        raise ValueError(
            f"layout must be on the device of values, got {layout.offsets.device} and {device}; move it with the batch: layout.to(device)"
        )
    # on a GPU a look at the values would synchronise, and a compiler has none
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.equal(layout.offsets_cpu, offsets.to(torch.int64)):
        raise ValueError(
            f"layout must have the rows of offsets, got offsets {layout.offsets_cpu.tolist()[:16]} in layout and {offsets.tolist()[:16]}; "
            "make it of the lengths of this very batch"
        )


def _recomputed(block: nn.Module, x: Tensor, layout: JaggedLayout, token_keys: Tensor | None) -> Tensor:
    """The block, keeping its input only: backward runs it again."""

    def run(x: Tensor) -> Tensor:
        return block(x, layout, token_keys)  # type: ignore[no-any-return]

    # dropout is keyed by token: there is no generator to rewind
    return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]


def recency_buckets(layout: JaggedLayout) -> Tensor:
    """``(L,)`` int64: log-bucketed distance from the end of the row; 0 is the newest event."""
    distance = layout.offsets[layout.rows + 1] - layout.offsets[layout.rows] - 1 - layout.positions
    bucket = torch.log2(distance.to(torch.float32) + 1) * RECENCY_BUCKETS_PER_OCTAVE
    return bucket.to(torch.int64).clamp(max=NUM_RECENCY_BUCKETS - 1)
