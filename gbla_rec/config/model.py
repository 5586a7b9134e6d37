"""Tables, encoder and decoder."""

from dataclasses import dataclass, field
from typing import Literal

from gbla_rec.config.item_head import ItemHeadConfig
from gbla_rec.config.rules import require, require_choice, require_positive

Direction = Literal["bidirectional", "causal"]
FeatureMap = Literal["elu1", "relu"]
Kernels = Literal["auto", "reference", "triton"]
Sharding = Literal["auto", "row_wise", "table_wise", "column_wise"]
Placement = Literal["auto", "hbm", "uvm_caching", "uvm"]
Communication = Literal["fp32", "bf16"]
Objective = Literal["generative", "item", "joint"]
Tokens = Literal["items", "codes"]
PATTERN_LETTERS = "SGW"
TRITON_MAX_CONV_WIDTH = 8
"""Taps of a convolution that the Triton kernels hold."""
TRITON_MAX_HEAD_DIM = 256
"""Width of a head that they hold."""
TRITON_MAX_FUSED_NORM_DIM = 2048
"""Width of a token whose norm is computed by the kernel of the convolution."""
UNREAD_TABLE_ROWS = 1024
"""Of an item table that nobody looks up: some for each rank, since fbgemm's CPU kernel refuses a rank that has no row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingConfig:
    """Multi-hash item tables and context tables, all sharded by TorchRec."""

    num_hashes: int = 2
    """Item tables; each is looked up by a hash function of its own, and the rows are put end to end."""
    rows_per_table: int = 1 << 20
    """Of an item table, about the number of items; with fewer more items share a row."""
    dim: int = 64
    """Width of one row, a multiple of 4 (fbgemm's rule); TorchRec's EmbeddingCollection wants one width for all tables."""
    hash_seed: int = 0
    context_features: tuple[str, ...] = ()
    """Context columns of the prepared dataset that are embedded."""
    semantic_code_dim: int = 32
    """Width of one semantic-ID code's embedding on the history side; 0 leaves the codes out."""
    sharding: Sharding = "auto"
    """``auto``: the planner chooses row_wise or table_wise for each table."""
    placement: Placement = "auto"
    """Where rows lie with CUDA. ``hbm``: device memory; ``uvm_caching``: host memory, the hot rows cached on the device;
    ``uvm``: host memory; ``auto``: the planner takes the fastest that fits."""
    cache_load_factor: float = 0.2
    """Fraction of a ``uvm_caching`` table that its cache on the device holds."""
    memory_reserve: float = 0.4
    """Fraction of device memory (and of host memory, for what lies there) that the planner keeps from the tables: for the dense
    part, activations and communication."""
    communication: Communication = "fp32"
    """What rows, and their gradients on the way back, are rounded to while ranks exchange them."""
    id_dropout: float = 0.0
    """Probability that an event's item-id rows are left out in training: the model then leans on codes, features and context.
    1 leaves ids out altogether."""
    event_dropout: float = 0.0
    """Probability that an event's whole token is left out in training: the encoder reads a zero in its place."""
    token_dropout: float = 0.0
    """Probability that an element of an event's token is zero in training."""
    item_features: bool = False
    """Also read the item embeddings that the semantic IDs were made from, projected to the model width."""
    tokens: Tokens = "items"
    """What the encoder reads of an event. ``items``: one token of item id, context and semantic-ID codes together; ``codes``: its
    codes one after another, a token each, as in TIGER (arXiv 2305.05065), with the context on the first. Item ids are not read then:
    ``num_hashes``, ``rows_per_table`` and ``semantic_code_dim`` mean nothing. Lengths and budgets count events in either case."""

    def __post_init__(self) -> None:
        require_choice(self, "tokens", Tokens)
        require_choice(self, "sharding", Sharding)
        require_choice(self, "placement", Placement)
        require_choice(self, "communication", Communication)
        require(0 < self.cache_load_factor <= 1, "EmbeddingConfig.cache_load_factor", "lie in (0, 1]", self.cache_load_factor)
        require(0 <= self.memory_reserve < 1, "EmbeddingConfig.memory_reserve", "lie in [0, 1)", self.memory_reserve)
        require_positive(self, "num_hashes", "rows_per_table", "dim")
        require(self.dim % 4 == 0, "EmbeddingConfig.dim", "be a multiple of 4, as fbgemm wants the rows of its tables", self.dim)
        require(self.semantic_code_dim >= 0, "EmbeddingConfig.semantic_code_dim", "not be negative", self.semantic_code_dim)
        require(0 <= self.id_dropout <= 1, "EmbeddingConfig.id_dropout", "lie in [0, 1]", self.id_dropout)
        for name, dropout in (("event_dropout", self.event_dropout), ("token_dropout", self.token_dropout)):
            require(0 <= dropout < 1, f"EmbeddingConfig.{name}", "lie in [0, 1)", dropout)
        reads_items = self.item_features or self.id_dropout + self.event_dropout + self.token_dropout > 0
        is_defined = self.tokens == "items" or not reads_items
        require(is_defined, "EmbeddingConfig.tokens", "be 'items' with item_features or a dropout of the input", self.tokens)

    @property
    def reads_item_ids(self) -> bool:
        """Whether the item tables are looked up."""
        return self.tokens == "items"

    @property
    def num_item_tables(self) -> int:
        """One for each hash function; one that nobody looks up if ids are not read, since TorchRec wants a table."""
        return self.num_hashes if self.reads_item_ids else 1

    @property
    def rows_per_item_table(self) -> int:
        """``rows_per_table``; few if ids are not read."""
        return self.rows_per_table if self.reads_item_ids else UNREAD_TABLE_ROWS

    def tokens_per_event(self, num_code_levels: int) -> int:
        """Tokens of the encoder for one event of a history; ``num_code_levels`` is ``C``."""
        return num_code_levels if self.tokens == "codes" else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderConfig:
    """The hybrid encoder: one letter of ``pattern`` per layer, and the switches of the paper's ablations."""

    model_dim: int = 512
    """Width of a token in the encoder."""
    num_heads: int = 8
    pattern: str = "SGG"
    """``S`` softmax attention, ``G`` gated bidirectional linear attention, ``W`` softmax attention in a window."""
    num_repeats: int = 1
    """The encoder has the layers of ``pattern`` this many times over."""
    ffn_dim: int | None = None
    """SwiGLU width; None: 8/3 of model_dim, rounded up to a multiple of 64."""
    conv: bool = True
    """``G`` layers: a short causal convolution before the projections."""
    conv_width: int = 4
    """Its taps."""
    key_gate: bool = True
    """``G`` layers: a softmax over the history, of one logit a token and head, weighs the keys."""
    output_gate: bool = True
    """``G`` layers: the normed output is multiplied by ``silu`` of a gate of its own."""
    direction: Direction = "bidirectional"
    """``causal``: a token sees those before it and itself only."""
    feature_map: FeatureMap = "elu1"
    """``G`` layers: what makes queries and keys positive."""
    rope_base: float = 10_000.0
    window: int = 256
    """Tokens that a ``W`` layer sees on each side of a token; only those before it where the direction is causal."""
    dropout: float = 0.0
    activation_checkpointing: bool = False
    """Keep the input of each layer only and run the layer again in backward: less memory, the same gradients bit for bit."""

    def __post_init__(self) -> None:
        require_choice(self, "direction", Direction)
        require_choice(self, "feature_map", FeatureMap)
        require_positive(self, "model_dim", "num_heads", "num_repeats", "conv_width", "window")
        require(self.rope_base > 1, "EncoderConfig.rope_base", "be above 1", self.rope_base)
        require(self.ffn_dim is None or self.ffn_dim > 0, "EncoderConfig.ffn_dim", "be positive or None", self.ffn_dim)
        require(
            self.model_dim % (2 * self.num_heads) == 0,
            "EncoderConfig.model_dim",
            "be a multiple of 2 * num_heads (RoPE turns pairs)",
            (self.model_dim, self.num_heads),
        )
        require(
            bool(self.pattern) and set(self.pattern) <= set(PATTERN_LETTERS),
            "EncoderConfig.pattern",
            f"use the letters {PATTERN_LETTERS!r}",
            self.pattern,
        )
        require(0 <= self.dropout < 1, "EncoderConfig.dropout", "lie in [0, 1)", self.dropout)

    @property
    def layers(self) -> str:
        """One letter per layer, first layer first."""
        return self.pattern * self.num_repeats

    @property
    def resolved_ffn_dim(self) -> int:
        """Width of the SwiGLU hidden layer."""
        return self.ffn_dim if self.ffn_dim is not None else -(-8 * self.model_dim // (3 * 64)) * 64


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """The decoder of semantic IDs."""

    num_heads: int = 8
    ffn_dim: int | None = None
    dropout: float = 0.0
    label_smoothing: float = 0.0
    num_layers: int = 1
    """Layers of self-attention over the codes, cross-attention over the memory and SwiGLU. The paper has one: its capacity is in the
    encoder; TIGER (arXiv 2305.05065) has as many as its encoder."""

    def __post_init__(self) -> None:
        require_positive(self, "num_heads", "num_layers")
        require(self.ffn_dim is None or self.ffn_dim > 0, "DecoderConfig.ffn_dim", "be positive or None", self.ffn_dim)
        require(0 <= self.label_smoothing < 1, "DecoderConfig.label_smoothing", "lie in [0, 1)", self.label_smoothing)
        require(0 <= self.dropout < 1, "DecoderConfig.dropout", "lie in [0, 1)", self.dropout)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Tables, encoder, and what predicts: the decoder, the item-level head, or both."""

    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    kernels: Kernels = "auto"
    """``triton``: the fused GPU kernels of linear attention, convolution, rotary embedding and cross-attention, on CUDA only;
    ``reference``: plain torch, anywhere; ``auto``: ``triton`` on CUDA where the model has a kernel for every part, else
    ``reference``. The weights are the same."""
    objective: Objective = "generative"
    """``generative``: the decoder's semantic IDs; ``item``: the item-level head alone; ``joint``: both on one encoder."""
    item_head: ItemHeadConfig = field(default_factory=ItemHeadConfig)

    def __post_init__(self) -> None:
        require_choice(self, "kernels", Kernels)
        require_choice(self, "objective", Objective)
        sees_no_target = not self.item_head.every_position or (self.encoder.direction == "causal" and self.objective == "item")
        require(
            sees_no_target,
            "ItemHeadConfig.every_position",
            "be False unless objective is 'item' and EncoderConfig.direction 'causal': any other encoder would see the events to predict",
            (self.objective, self.encoder.direction),
        )
        require(
            not self.has_decoder or self.encoder.model_dim % self.decoder.num_heads == 0,
            "DecoderConfig.num_heads",
            "divide EncoderConfig.model_dim",
            self.decoder.num_heads,
        )
        has_items = self.embedding.tokens == "items"
        require(has_items or not self.has_item_head, "ModelConfig.objective", "be 'generative' where tokens are codes", self.objective)
        obstacle = self._triton_obstacle()
        require(self.kernels != "triton" or obstacle is None, "ModelConfig.kernels", f"be 'reference' where {obstacle}", self.kernels)

    @property
    def has_decoder(self) -> bool:
        """Whether semantic IDs are generated."""
        return self.objective != "item"

    @property
    def has_item_head(self) -> bool:
        """Whether items are scored."""
        return self.objective != "generative"

    def kernels_on(self, device_type: str) -> Literal["reference", "triton"]:
        """The kernels that run on a ``"cpu"`` or ``"cuda"`` device."""
        if self.kernels == "auto":
            return "triton" if device_type == "cuda" and self._triton_obstacle() is None else "reference"
        return self.kernels

    def _triton_obstacle(self) -> str | None:
        """The first setting for which there is no Triton kernel."""
        encoder, decoder = self.encoder, self.decoder
        has_linear, decoder_heads = "G" in encoder.pattern, decoder.num_heads if self.has_decoder else None
        if encoder.direction == "causal":
            return "EncoderConfig.direction is 'causal', which has no Triton kernel"
        if has_linear and encoder.conv and encoder.conv_width > TRITON_MAX_CONV_WIDTH:
            return f"EncoderConfig.conv_width is {encoder.conv_width}: there are Triton kernels up to {TRITON_MAX_CONV_WIDTH}"
        for name, heads in (("EncoderConfig", encoder.num_heads if has_linear else None), ("DecoderConfig", decoder_heads)):
            if heads is not None and encoder.model_dim // heads > TRITON_MAX_HEAD_DIM:
                width = encoder.model_dim // heads
                return f"model_dim / {name}.num_heads is {width}: there are Triton kernels for heads up to {TRITON_MAX_HEAD_DIM}"
        return None
