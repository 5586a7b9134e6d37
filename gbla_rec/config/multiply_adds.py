"""What a sample costs a model, counted in multiply-adds of a forward pass: the shares by which ranks divide a batch."""

# T tokens of a history, S targets of a sample, D model width, H heads, C code levels (docs/shapes.md)

import dataclasses
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from gbla_rec.config.data import StreamConfig
from gbla_rec.config.model import EncoderConfig, ModelConfig

CountT = TypeVar("CountT", float, NDArray[np.float64])


@dataclass(frozen=True, kw_only=True, slots=True)
class MultiplyAdds:
    """A sample of ``T`` events and ``S`` targets costs ``event T + pair T^2 + target S + target_event S T``."""

    event: float
    pair: float
    target: float
    target_event: float

    def of(self, num_events: CountT, num_targets: int) -> CountT:
        """Multiply-adds of a sample, forward (a training step takes three times as many); of several, for an array of events."""
        return num_events * (self.event + self.pair * num_events + self.target_event * num_targets) + self.target * num_targets


def multiply_adds(model: ModelConfig, widths: tuple[int, ...], max_history_length: int) -> MultiplyAdds:
    """Count the matrix products of encoder and decoder; table look-ups, norms, activations and padding are left out.

    Args:
        model: the model.
        widths: codes of each level, ``C`` entries.
        max_history_length: histories are at most this long; a window that always sees all of them counts by pairs.
    """
    encoder, dim, num_levels = model.encoder, model.encoder.model_dim, len(widths)
    layers = [_layer(letter, encoder, max_history_length) for letter in encoder.layers]
    code_width = num_levels * model.embedding.semantic_code_dim
    tables_width = (model.embedding.num_hashes + len(model.embedding.context_features)) * model.embedding.dim
    decoder_ffn = model.decoder.ffn_dim if model.decoder.ffn_dim is not None else 2 * dim
    # self-attention 4 D^2, its pairs of codes, cross-attention's query and output 2 D^2, SwiGLU
    code = 6 * dim**2 + 2 * dim * num_levels + 3 * dim * decoder_ffn
    return MultiplyAdds(
        event=(tables_width + code_width) * dim + sum(event for event, _ in layers) + 2 * dim**2,
        pair=sum(pair for _, pair in layers),
        target=num_levels * code + dim * sum(widths),
        target_event=2 * dim * num_levels,
    )


def _layer(letter: str, encoder: EncoderConfig, max_history_length: int) -> tuple[float, float]:
    """Multiply-adds of an encoder layer per event and per pair of events."""
    dim, ffn = encoder.model_dim, 3 * encoder.model_dim * encoder.resolved_ffn_dim
    # scores and weighted sum: 2 D a pair, of which a causal mask leaves half
    all_pairs = dim if encoder.direction == "causal" else 2 * dim
    if letter == "G":
        columns = 3 * dim + (dim if encoder.output_gate else 0) + (encoder.num_heads if encoder.key_gate else 0)
        projections = columns * dim + dim**2
        conv = dim * encoder.conv_width if encoder.conv else 0
        if encoder.direction == "causal":
            return ffn + projections + conv, all_pairs
        # the state (K, V) of each head is written and read once an event, and so is the normaliser (K,)
        return ffn + projections + conv + 2 * dim * (dim // encoder.num_heads + 1), 0.0
    event = ffn + 4 * dim**2
    if letter == "W" and encoder.window + 1 < max_history_length:
        return event + all_pairs * (2 * encoder.window + 1), 0.0
    return event, all_pairs


def with_sample_costs(stream: StreamConfig, model: ModelConfig, widths: tuple[int, ...]) -> StreamConfig:
    """``stream`` with the costs that it leaves to the model counted; costs that it states stay.

    The attention of targets over their history is counted with each event, for as many targets as a sample may have.

    Args:
        stream: of the run.
        model: of the run.
        widths: codes of each level.
    """
    if stream.has_costs:
        return stream
    counted = multiply_adds(model, widths, stream.max_history_length)
    return dataclasses.replace(
        stream,
        linear_cost=counted.event + counted.target_event * stream.targets_per_cut,
        quadratic_cost=counted.pair,
        target_cost=counted.target,
    )
