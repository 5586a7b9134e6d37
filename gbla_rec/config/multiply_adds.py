"""What a model multiplies in a forward pass, counted from its config: the costs by which ranks share a batch, and the FLOPs behind MFU.

Only matrix products count: table look-ups, norms, activations, softmax, the convolution's 4 taps and padding are left out.
"""

# L tokens, T tokens of a history, S targets, D model width, H heads, K head width, C code levels (docs/shapes.md)

import dataclasses
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from gbla_rec.config.data import StreamConfig
from gbla_rec.config.model import EncoderConfig, ModelConfig

CountT = TypeVar("CountT", float, NDArray[np.float64])


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSizes:
    """What the products of a batch depend on, all of them linearly.

    Attributes:
        tokens: ``L`` of the encoder: events, or ``C`` times as many where codes are tokens.
        pairs: pairs of tokens of one row, ``sum T^2``.
        window_pairs: pairs that a windowed layer sees.
        targets: ``S``.
        memory_pairs: pairs of a code position and a memory token of its row.
        queries: of the item-level head.
        candidates: items that the head gives vectors.
        scores: products of a query and a candidate.
    """

    tokens: int = 0
    pairs: int = 0
    window_pairs: int = 0
    targets: int = 0
    memory_pairs: int = 0
    queries: int = 0
    candidates: int = 0
    scores: int = 0


def forward_multiply_adds(model: ModelConfig, widths: tuple[int, ...], sizes: BatchSizes) -> dict[str, int]:
    """Multiply-adds of a forward pass by part: ``input``, ``S``, ``G``, ``W`` (mixing layers), ``ffn``, ``decoder``, ``item_head``.

    Args:
        model: tables, encoder, decoder.
        widths: codes of each level, ``C`` entries.
        sizes: of the batch.
    """
    encoder = model.encoder
    counts = {"input": _input(model, widths, sizes)}
    for letter in sorted(set(encoder.layers)):
        counts[letter] = encoder.layers.count(letter) * _mixer(letter, encoder, sizes)
    counts["ffn"] = len(encoder.layers) * sizes.tokens * 3 * encoder.model_dim * encoder.resolved_ffn_dim
    if model.has_decoder:
        counts["decoder"] = _decoder(model, widths, sizes)
    if model.has_item_head:
        dim = encoder.model_dim
        vectors = _input(model, widths, BatchSizes(tokens=sizes.candidates))
        counts["item_head"] = sizes.queries * dim**2 + vectors + sizes.scores * dim
    return counts


def _input(model: ModelConfig, widths: tuple[int, ...], sizes: BatchSizes) -> int:
    """Multiply-adds of the projection of an event's rows and codes; codes that are tokens are looked up at model width.

    The width of item features is not in the config: their part is left out.
    """
    embedding = model.embedding
    num_features = embedding.num_item_tables * embedding.reads_item_ids + len(embedding.context_features)
    code_dims = len(widths) * embedding.semantic_code_dim if embedding.tokens == "items" else 0
    events = sizes.tokens // embedding.tokens_per_event(len(widths))
    return events * (num_features * embedding.dim + code_dims) * model.encoder.model_dim


def _mixer(letter: str, encoder: EncoderConfig, sizes: BatchSizes) -> int:
    """Multiply-adds of one mixing layer."""
    tokens, dim = sizes.tokens, encoder.model_dim
    # scores q k^T, then their product with v; a causal mask leaves half of the pairs
    each_pair = dim if encoder.direction == "causal" else 2 * dim
    if letter != "G":
        return tokens * 4 * dim**2 + each_pair * (sizes.window_pairs if letter == "W" else sizes.pairs)
    columns = (4 if encoder.output_gate else 3) * dim + (encoder.num_heads if encoder.key_gate else 0)
    projections = tokens * dim * (columns + dim)
    if encoder.direction == "causal":
        return projections + each_pair * sizes.pairs
    # the state k v^T, then q S and q n
    return projections + tokens * dim * (2 * (dim // encoder.num_heads) + 1)


def _decoder(model: ModelConfig, widths: tuple[int, ...], sizes: BatchSizes) -> int:
    """Multiply-adds of the decoder's layers, each with its projection of the memory to keys and values, and of the heads."""
    dim, positions = model.encoder.model_dim, sizes.targets * len(widths)
    ffn_dim = model.decoder.ffn_dim if model.decoder.ffn_dim is not None else 2 * dim
    # self-attention's projections (4), cross-attention's query and output (2), SwiGLU (3)
    dense = positions * dim * (6 * dim + 3 * ffn_dim)
    attention = 2 * dim * (positions * len(widths) + sizes.memory_pairs)
    layer = dense + attention + sizes.tokens * 2 * dim**2
    return model.decoder.num_layers * layer + sizes.targets * dim * sum(widths)


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
    """The cost of a sample; without the item-level head's scores, which cost each target the same.

    Args:
        model: the model.
        widths: codes of each level, ``C`` entries.
        max_history_length: histories are at most this long; a window that always sees all of them counts by pairs, another one
            by events, each of which sees the whole window.
    """

    def each(**one: int) -> int:
        return sum(forward_multiply_adds(model, widths, BatchSizes(**one)).values())

    window, window_pair = model.encoder.window, each(window_pairs=1)
    tokens = model.embedding.tokens_per_event(len(widths))
    sees_all = window + 1 >= max_history_length * tokens
    return MultiplyAdds(
        event=each(tokens=tokens) + (0 if sees_all else tokens * (2 * window + 1) * window_pair),
        pair=tokens**2 * (each(pairs=1) + (window_pair if sees_all else 0)),
        target=each(targets=1),
        target_event=len(widths) * tokens * each(memory_pairs=1),
    )


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
