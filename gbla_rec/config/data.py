"""Preparing a dataset, and how histories become training batches."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gbla_rec.config.rules import require, require_choice, require_plain_name, require_positive

SplitKind = Literal["leave_last", "temporal"]
TieRule = Literal["together", "ordered"]
Cuts = Literal["everywhere", "newest"]


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
    """Of the first event of validation, in the unit of the timestamps; of dates and ISO-8601 text microseconds since 1970 UTC."""
    test_time: int | None = None
    """Of the first event of the test, in the same unit."""
    temporal_fraction: float = 0.1
    """Part of the events that tests, and as much validates, where no times are given."""

    def __post_init__(self) -> None:
        require_choice(self, "kind", SplitKind)
        require_choice(self, "ties", TieRule)
        require_positive(self, "num_targets")
        require(0 < self.temporal_fraction < 0.5, "SplitConfig.temporal_fraction", "lie in (0, 0.5)", self.temporal_fraction)
        both = (self.validation_time is None) == (self.test_time is None)
        require(both, "SplitConfig.validation_time", "be given together with test_time", self.validation_time)
        if self.validation_time is not None and self.test_time is not None:
            times = (self.validation_time, self.test_time)
            require(self.validation_time < self.test_time, "SplitConfig.validation_time", "lie before test_time", times)


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
        require_plain_name("PrepareConfig.name", self.name)
        require_positive(self, "max_events_per_shard")


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
    """Events after a cut that are predicted from those before it."""
    max_cuts_per_history: int = 64
    """In one epoch."""
    min_history_length: int = 1
    """A cut leaves at least this many events to read."""
    oversized: Literal["refuse", "own_batch"] = "refuse"
    """A sample longer than ``tokens_per_batch``: refuse it by name, or make it its own batch."""
    linear_cost: float | None = None
    quadratic_cost: float | None = None
    target_cost: float | None = None
    """Ranks share a global batch by the costs of its samples: ``linear_cost * T + quadratic_cost * T^2 + target_cost * S`` for ``T``
    events and ``S`` targets, in any unit; a ``target_cost`` that is left out beside the others is 0. None for all: multiply-adds,
    counted from the model."""
    cuts: Cuts = "everywhere"
    """``newest``: one cut a history and epoch, before its newest ``targets_per_cut`` training events, for models in which every event
    predicts the next one."""
    exclude_evaluated: bool = False
    """Leave out histories with validation or test targets: users that are evaluated are new to the model."""

    def __post_init__(self) -> None:
        require_choice(self, "cuts", Cuts)
        require_positive(self, "tokens_per_batch", "max_history_length", "targets_per_cut", "max_cuts_per_history")
        require(self.min_history_length >= 0, "StreamConfig.min_history_length", "not be negative", self.min_history_length)
        costs = (self.linear_cost, self.quadratic_cost, self.target_cost)
        is_whole = None not in costs[:2] or set(costs) == {None}
        require(is_whole, "StreamConfig.linear_cost and quadratic_cost", "be given together, or no cost at all", costs)
        require(all(cost is None or cost >= 0 for cost in costs), "StreamConfig costs", "not be negative", costs)

    @property
    def has_costs(self) -> bool:
        """Whether the costs are stated, not left to the model."""
        return self.linear_cost is not None
