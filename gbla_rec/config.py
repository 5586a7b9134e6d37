"""Every setting of the library: frozen, typed dataclasses, validated when they are made.

A run is a function in ``gbla_rec/recipes.py`` that returns a ``RunConfig``; the command line overrides single fields.
"""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

Direction = Literal["bidirectional", "causal"]
FeatureMap = Literal["elu1", "relu"]
SplitKind = Literal["leave_last", "temporal"]
TieRule = Literal["together", "ordered"]
EmbeddingSource = Literal["text", "behaviour", "file"]
Kernels = Literal["reference", "triton"]
Sharding = Literal["auto", "row_wise", "table_wise", "column_wise"]
PATTERN_LETTERS = "SGW"
TRITON_MAX_CONV_WIDTH = 8
"""Taps of a convolution that the Triton kernels hold."""
TRITON_MAX_HEAD_DIM = 256
"""Width of a head that they hold."""
ConfigT = TypeVar("ConfigT")


def _require(condition: bool, argument: str, rule: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{argument} must {rule}, got {value!r}")


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value > 0, f"{type(config).__name__}.{name}", "be positive", value)


def _require_plain_name(argument: str, name: str) -> None:
    """Names become directories and glob patterns."""
    is_plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is not None
    _require(is_plain, argument, "consist of letters, digits, '.', '_' and '-', and begin with a letter or digit", name)


def _require_choice(config: object, name: str, choices: object) -> None:
    value = getattr(config, name)
    _require(value in get_args(choices), f"{type(config).__name__}.{name}", f"be one of {get_args(choices)}", value)


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitConfig:
    """Which events of a history are for training, validation and test.

    ``leave_last`` takes the last ``num_targets`` events of each user as test targets and the ``num_targets`` before
    them as validation targets (1 is the classical leave-one-out). ``temporal`` takes the events at or after
    ``test_time`` as test and those in ``[validation_time, test_time)`` as validation; without times, the quantiles
    ``1 - 2 * temporal_fraction`` and ``1 - temporal_fraction`` of all timestamps are used.
    """

    kind: SplitKind = "leave_last"
    num_targets: int = 1
    ties: TieRule = "together"
    """``together`` moves a cut back to the first event of its timestamp, so that tied events stay on one side;
    ``ordered`` trusts the order of the file."""
    validation_time: int | None = None
    test_time: int | None = None
    temporal_fraction: float = 0.1

    def __post_init__(self) -> None:
        _require_choice(self, "kind", SplitKind)
        _require_choice(self, "ties", TieRule)
        _require_positive(self, "num_targets")
        _require(0 < self.temporal_fraction < 0.5, "SplitConfig.temporal_fraction", "lie in (0, 0.5)", self.temporal_fraction)
        both = (self.validation_time is None) == (self.test_time is None)
        _require(both, "SplitConfig.validation_time", "be given together with test_time", self.validation_time)
        if self.validation_time is not None and self.test_time is not None:
            _require(self.validation_time < self.test_time, "SplitConfig.validation_time", "lie before test_time", self.validation_time)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """From an event log to a prepared dataset."""

    name: str
    """Name of the prepared dataset inside the workspace."""
    events: Path
    """A Parquet or CSV file, or a directory of them: one event a row, or one user a row with ``sequence_column``."""
    items: Path | None = None
    """Optional item table (Parquet or CSV) with ``item_column`` and text columns."""
    user_column: str = "user_id"
    item_column: str = "item_id"
    timestamp_column: str = "timestamp"
    """Integer (any unit), or a date/datetime, or an ISO-8601 string."""
    sequence_column: str | None = None
    """If set, the log is already grouped: this column lists each user's items, oldest first."""
    context_columns: tuple[str, ...] = ()
    """Categorical columns of the events (rating, event type, ...)."""
    text_columns: tuple[str, ...] = ()
    """Columns of the item table to keep; the first one is the title. Empty: every string column."""
    split: SplitConfig = field(default_factory=SplitConfig)
    max_events_per_shard: int = 2_000_000
    """Bounds the memory of preparation and of the training reader: one shard is read at a time."""

    def __post_init__(self) -> None:
        _require_plain_name("PrepareConfig.name", self.name)
        _require_positive(self, "max_events_per_shard")


@dataclass(frozen=True, kw_only=True, slots=True)
class SemanticIdConfig:
    """From item embeddings to semantic IDs (residual k-means and a de-duplication level)."""

    embedding: EmbeddingSource = "text"
    embedding_file: Path | None = None
    """For ``embedding="file"``: ``.npy`` of shape (N, D) in item order, or Parquet with item_id and a list column."""
    text_encoder: Literal["tfidf", "wordllama"] = "tfidf"
    embedding_dim: int = 96
    num_levels: int = 3
    codebook_width: int | None = None
    """None: the next power of two >= (4 N)^(1/3), at least ``min_codebook_width``."""
    min_codebook_width: int = 256
    dedup_width: int = 256
    """Items under one prefix beyond this number share an ID (reported)."""
    kmeans_iterations: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        _require_choice(self, "embedding", EmbeddingSource)
        _require(
            (self.embedding == "file") == (self.embedding_file is not None),
            "SemanticIdConfig.embedding_file",
            "be given exactly when embedding='file'",
            self.embedding_file,
        )
        _require_positive(self, "embedding_dim", "num_levels", "min_codebook_width", "dedup_width", "kmeans_iterations")
        if self.codebook_width is not None:
            _require_positive(self, "codebook_width")


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingConfig:
    """Multi-hash item tables and context tables, all sharded by TorchRec."""

    num_hashes: int = 2
    rows_per_table: int = 1 << 20
    dim: int = 64
    """Width of one row; TorchRec's EmbeddingCollection wants one width for all tables."""
    hash_seed: int = 0
    context_features: tuple[str, ...] = ()
    """Context columns of the prepared dataset that are embedded."""
    semantic_code_dim: int = 32
    """Width of one semantic-ID code's embedding on the history side; 0 leaves the codes out."""
    sharding: Sharding = "auto"

    def __post_init__(self) -> None:
        _require_choice(self, "sharding", Sharding)
        _require_positive(self, "num_hashes", "rows_per_table", "dim")
        _require(self.semantic_code_dim >= 0, "EmbeddingConfig.semantic_code_dim", "not be negative", self.semantic_code_dim)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderConfig:
    """The hybrid encoder: one letter of ``pattern`` per layer, and the switches of the paper's ablations."""

    model_dim: int = 512
    num_heads: int = 8
    pattern: str = "SGG"
    """``S`` softmax attention, ``G`` gated bidirectional linear attention, ``W`` softmax attention in a window."""
    num_repeats: int = 1
    ffn_dim: int | None = None
    """SwiGLU width; None: 8/3 of model_dim, rounded up to a multiple of 64."""
    conv: bool = True
    conv_width: int = 4
    key_gate: bool = True
    output_gate: bool = True
    direction: Direction = "bidirectional"
    feature_map: FeatureMap = "elu1"
    rope_base: float = 10_000.0
    window: int = 256
    """Tokens that a ``W`` layer sees on each side of a token; only those before it where the direction is causal."""
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _require_choice(self, "direction", Direction)
        _require_choice(self, "feature_map", FeatureMap)
        _require_positive(self, "model_dim", "num_heads", "num_repeats", "conv_width", "window")
        _require(self.rope_base > 1, "EncoderConfig.rope_base", "be above 1", self.rope_base)
        _require(self.ffn_dim is None or self.ffn_dim > 0, "EncoderConfig.ffn_dim", "be positive or None", self.ffn_dim)
        _require(
            self.model_dim % (2 * self.num_heads) == 0,
            "EncoderConfig.model_dim",
            "be a multiple of 2 * num_heads (RoPE turns pairs)",
            (self.model_dim, self.num_heads),
        )
        _require(
            bool(self.pattern) and set(self.pattern) <= set(PATTERN_LETTERS),
            "EncoderConfig.pattern",
            f"use the letters {PATTERN_LETTERS!r}",
            self.pattern,
        )
        _require(0 <= self.dropout < 1, "EncoderConfig.dropout", "lie in [0, 1)", self.dropout)

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
    """The one-layer decoder of semantic IDs."""

    num_heads: int = 8
    ffn_dim: int | None = None
    dropout: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _require_positive(self, "num_heads")
        _require(self.ffn_dim is None or self.ffn_dim > 0, "DecoderConfig.ffn_dim", "be positive or None", self.ffn_dim)
        _require(0 <= self.label_smoothing < 1, "DecoderConfig.label_smoothing", "lie in [0, 1)", self.label_smoothing)
        _require(0 <= self.dropout < 1, "DecoderConfig.dropout", "lie in [0, 1)", self.dropout)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Tables, encoder and decoder."""

    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    kernels: Kernels = "reference"
    """``triton``: the fused GPU kernels of linear attention, convolution, rotary embedding and cross-attention, on CUDA only;
    ``reference``: plain torch, anywhere."""

    def __post_init__(self) -> None:
        _require_choice(self, "kernels", Kernels)
        _require(
            self.encoder.model_dim % self.decoder.num_heads == 0,
            "DecoderConfig.num_heads",
            "divide EncoderConfig.model_dim",
            self.decoder.num_heads,
        )
        obstacle = self._triton_obstacle()
        _require(self.kernels == "reference" or obstacle is None, "ModelConfig.kernels", f"be 'reference' where {obstacle}", self.kernels)

    def _triton_obstacle(self) -> str | None:
        """The first setting for which there is no Triton kernel."""
        encoder, decoder = self.encoder, self.decoder
        has_linear = "G" in encoder.pattern
        if encoder.direction == "causal":
            return "EncoderConfig.direction is 'causal', which has no Triton kernel"
        if has_linear and encoder.conv and encoder.conv_width > TRITON_MAX_CONV_WIDTH:
            return f"EncoderConfig.conv_width is {encoder.conv_width}: there are Triton kernels up to {TRITON_MAX_CONV_WIDTH}"
        for name, heads in (("EncoderConfig", encoder.num_heads if has_linear else None), ("DecoderConfig", decoder.num_heads)):
            if heads is not None and encoder.model_dim // heads > TRITON_MAX_HEAD_DIM:
                width = encoder.model_dim // heads
                return f"model_dim / {name}.num_heads is {width}: there are Triton kernels for heads up to {TRITON_MAX_HEAD_DIM}"
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamConfig:
    """How histories become training samples and global batches.

    Each epoch cuts a history of n training events in about ``n / targets_per_cut`` places; the encoder reads the
    events before the cut and the decoder predicts the ``targets_per_cut`` events after it.
    """

    tokens_per_batch: int = 65_536
    """Global token budget: history events of one optimiser step, over all ranks."""
    max_history_length: int = 8_192
    """The encoder reads at most this many most recent events."""
    targets_per_cut: int = 32
    max_cuts_per_history: int = 64
    min_history_length: int = 1
    """A cut leaves at least this many events to read."""
    oversized: Literal["refuse", "own_batch"] = "refuse"
    """A sample longer than ``tokens_per_batch``: refuse it by name, or make it its own batch."""
    linear_cost: float = 1.0
    quadratic_cost: float = 1.0 / 8_192
    """Ranks share a global batch by ``linear_cost * sum(T) + quadratic_cost * sum(T^2)``."""

    def __post_init__(self) -> None:
        _require_positive(self, "tokens_per_batch", "max_history_length", "targets_per_cut", "max_cuts_per_history")
        _require(self.min_history_length >= 0, "StreamConfig.min_history_length", "not be negative", self.min_history_length)
        _require(
            self.linear_cost >= 0 and self.quadratic_cost >= 0,
            "StreamConfig costs",
            "not be negative",
            (self.linear_cost, self.quadratic_cost),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """Fused row-wise Adagrad for the tables, AdamW with warm-up and cosine decay for the rest."""

    table_learning_rate: float = 0.05
    table_eps: float = 1e-8
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    warmup_steps: int = 100
    final_learning_rate_fraction: float = 0.05
    clip_grad_norm: float = 1.0
    """Global norm of the dense gradients; the fused tables step inside backward and are not clipped."""

    def __post_init__(self) -> None:
        _require_positive(self, "table_learning_rate", "table_eps", "learning_rate", "clip_grad_norm")
        _require(self.weight_decay >= 0, "OptimizerConfig.weight_decay", "not be negative", self.weight_decay)
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            _require(0 <= beta < 1, f"OptimizerConfig.{name}", "lie in [0, 1)", beta)
        final = self.final_learning_rate_fraction
        _require(0 <= final <= 1, "OptimizerConfig.final_learning_rate_fraction", "lie in [0, 1]", final)
        _require(self.warmup_steps >= 0, "OptimizerConfig.warmup_steps", "not be negative", self.warmup_steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """Length of a run, and when it validates, logs and saves."""

    num_steps: int = 10_000
    validate_every: int = 1_000
    validation_users: int = 1_024
    """A fixed sample of users (drawn from the seed) whose NLL chooses the checkpoints."""
    save_every: int = 1_000
    keep_last: int = 2
    keep_best: int = 2
    log_every: int = 10

    def __post_init__(self) -> None:
        _require_positive(self, "num_steps", "validate_every", "validation_users", "save_every", "keep_last", "keep_best", "log_every")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Full-catalogue beam search and its metrics."""

    num_beams: int = 50
    cutoffs: tuple[int, ...] = (5, 10, 50)
    exclude_history: bool = False
    """Never recommend an item of the user's own history; the baselines obey it too."""
    tokens_per_batch: int = 65_536
    shortlist_users: int = 1_024
    """Validation users on whom beam search chooses among the shortlisted checkpoints."""
    bootstrap_samples: int = 2_000

    def __post_init__(self) -> None:
        _require_positive(self, "num_beams", "tokens_per_batch", "shortlist_users", "bootstrap_samples")
        _require(bool(self.cutoffs) and min(self.cutoffs) > 0, "EvaluationConfig.cutoffs", "be positive and not empty", self.cutoffs)
        _require(
            max(self.cutoffs) <= self.num_beams,
            "EvaluationConfig.num_beams",
            "be at least the largest cutoff",
            (self.num_beams, self.cutoffs),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One training run, complete: dataset, semantic IDs, model, stream, optimiser, evaluation."""

    name: str
    """Name of the run's directory in the workspace; evaluate and recommend find it by this name."""
    dataset: str
    """Name of a prepared dataset in the workspace."""
    seed: int = 0
    """Of the initial weights, the order of samples and dropout."""
    semantic_ids: SemanticIdConfig = field(default_factory=SemanticIdConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        for argument, value in (("name", self.name), ("dataset", self.dataset)):
            _require_plain_name(f"RunConfig.{argument}", value)


def to_json(config: Any) -> str:
    """The config as indented JSON; ``from_json`` reads it back."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"


def from_json(kind: type[ConfigT], text: str) -> ConfigT:
    """Rebuild a config of class ``kind`` from ``to_json``'s text.

    Raises:
        ValueError: if the text names a field that ``kind`` lacks, or a value breaks a rule of the config.
    """
    return cast(ConfigT, _build(kind, json.loads(text), kind.__name__))


def differing_fields(first: object, second: object, prefix: str = "") -> list[str]:
    """Dotted names of the fields in which two configs of one class differ."""
    assert dataclasses.is_dataclass(first)
    names = []
    for item in dataclasses.fields(first):
        left, right = getattr(first, item.name), getattr(second, item.name)
        if dataclasses.is_dataclass(left):
            names += differing_fields(left, right, f"{prefix}{item.name}.")
        elif left != right:
            names.append(prefix + item.name)
    return names


def _build(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        unknown = sorted(set(value) - set(hints))
        _require(not unknown, where, f"have only the fields {sorted(hints)}", unknown)
        return cast(Any, kind)(**{name: _build(hints[name], item, f"{where}.{name}") for name, item in value.items()})
    if get_origin(kind) is tuple:
        return tuple(_build(get_args(kind)[0], item, where) for item in value)
    if value is not None and Path in (kind, *get_args(kind)):
        return Path(value)
    return value
