"""The tables of experiments, as data: named configurations, each a list of options on top of a dataset's recipe."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.quality import long_range


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One row of a table.

    Attributes:
        name: unique; part of the run's name.
        text: what it is, for the table.
        options: of ``gbla_apps.train``, on top of the recipe.
    """

    name: str
    text: str
    options: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Configurations that are compared with each other.

    Attributes:
        configurations: names of rows.
        reference: the row that others are compared with.
        text: what the table shows.
        seeds: of each row.
        recipe: of its datasets; None: the recipe that is named as the dataset.
        dataset_options: options of training for a dataset, between those of the recipe and of the configuration.
        beam_sweep: numbers of beams to evaluate with, beside the configured one.
        shown_cutoff: differences are shown at this one, or at the largest one below it.
    """

    configurations: tuple[str, ...]
    reference: str
    text: str
    seeds: tuple[int, ...] = (0, 1, 2)
    recipe: str | None = None
    dataset_options: Callable[[str], tuple[str, ...]] = lambda dataset: ()
    beam_sweep: tuple[int, ...] = ()
    shown_cutoff: int = 10


def _encoder(pattern: str, *others: str) -> tuple[str, ...]:
    return ("--model.encoder.pattern", pattern, "--model.encoder.num-repeats", "1", *others)


NO_CONV = ("--model.encoder.conv", "False")
NO_KEY_GATE = ("--model.encoder.key-gate", "False")
NO_OUTPUT_GATE = ("--model.encoder.output-gate", "False")
CAUSAL = ("--model.encoder.direction", "causal")
# events on each side of a token: the library's 256 would see a whole Amazon history, and be S
SHORT_WINDOW = ("--model.encoder.window", "4")
LONG_WINDOW = ("--model.encoder.window", "256")
# baselines keep the schedule of the Amazon sets that they were chosen with: on validation users of both a rate that ends at zero gave
# SASRec .0651 and .0366 NDCG@10 in place of .0651 and .0370, batches of 16,384 .0652 on Beauty; TIGER overfits early, and is chosen
# among more checkpoints. Other data need their own, after --
SHORT_BATCHES = (
    *("--stream.tokens-per-batch", "8192", "--optimizer.final-learning-rate-fraction", "0.05"),
    *("--training.keep-last", "6", "--training.keep-best", "2"),
)
SASREC = (
    *("--model.objective", "item", *_encoder("SS"), *CAUSAL, "--model.item-head.every-position", "True", "--stream.cuts", "newest"),
    # the best of seven settings on validation users of Beauty; an epoch is one cut a history, so there are fewer steps
    *("--model.encoder.dropout", "0.5", "--model.embedding.token-dropout", "0.5", "--model.embedding.event-dropout", "0.1"),
    *(
        "--model.encoder.model-dim",
        "256",
        "--model.encoder.num-heads",
        "4",
        "--model.encoder.ffn-dim",
        "512",
        "--model.decoder.num-heads",
        "4",
    ),
    *("--training.num-steps", "1000", "--training.validate-every", "100", "--training.save-every", "100", *SHORT_BATCHES),
)
WITH_IDS = ("--model.embedding.id-dropout", "0.0")
IDS_ONLY = (*WITH_IDS, "--model.embedding.semantic-code-dim", "0", "--model.embedding.item-features", "False")
ALL_ITEMS = ("--model.item-head.loss", "softmax", "--model.item-head.num-sampled", "0")
# as published (arXiv 1808.09781)
ONE_NEGATIVE = (
    *("--model.item-head.loss", "bce", "--model.item-head.num-sampled", "1"),
    *("--model.item-head.label-smoothing", "0.0"),
)
GENERATIVE = ("--model.objective", "generative")
# codes are all that it reads
CODE_TOKENS = (
    *GENERATIVE,
    *("--model.embedding.tokens", "codes", "--model.embedding.item-features", "False", *WITH_IDS),
    *("--model.embedding.event-dropout", "0.0", "--model.embedding.token-dropout", "0.0"),
)
TIGER = (
    *(*_encoder("SSSS"), "--model.decoder.num-layers", "4", *CODE_TOKENS),
    *("--training.num-steps", "2600", *SHORT_BATCHES),
)

_ROWS = (
    ("linear", "linear attention", (*_encoder("GGGG"), *NO_CONV, *NO_KEY_GATE, *NO_OUTPUT_GATE)),
    ("linear-conv", "+ convolution", (*_encoder("GGGG"), *NO_KEY_GATE, *NO_OUTPUT_GATE)),
    ("linear-conv-key", "+ key gate", (*_encoder("GGGG"), *NO_OUTPUT_GATE)),
    ("gggg", "+ output gate: GBLA", _encoder("GGGG")),
    ("ssss", "softmax attention SSSS", _encoder("SSSS")),
    ("sggs", "hybrid SGGS", _encoder("SGGS")),
    ("sgg", "hybrid SGG", _encoder("SGG")),
    ("sggs-ids", "hybrid SGGS; multi-hash ids alone", (*_encoder("SGGS"), *IDS_ONLY)),
    ("sggs-generative", "hybrid SGGS; trained to generate alone", (*_encoder("SGGS"), *GENERATIVE)),
    (
        "sggs-code-tokens",
        "hybrid SGGS; a token for each code, as TIGER reads an event; trained to generate alone",
        (*_encoder("SGGS"), *CODE_TOKENS),
    ),
    ("sggs-causal", "causal hybrid SGGS", (*_encoder("SGGS"), *CAUSAL)),
    ("wggw", "windowed hybrid WGGW, 4 events on each side", (*_encoder("WGGW"), *SHORT_WINDOW)),
    ("wgg", "windowed hybrid WGG, 4 events on each side", (*_encoder("WGG"), *SHORT_WINDOW)),
    ("sss", "softmax attention SSS", _encoder("SSS")),
    ("ggg", "GBLA GGG", _encoder("GGG")),
    ("ggg-no-key", "GBLA without key gate", (*_encoder("GGG"), *NO_KEY_GATE)),
    ("ggg-linear", "linear attention GGG", (*_encoder("GGG"), *NO_CONV, *NO_KEY_GATE, *NO_OUTPUT_GATE)),
    ("www-256", "windowed softmax attention WWW, 256 events on each side", (*_encoder("WWW"), *LONG_WINDOW)),
    ("wgg-256", "windowed hybrid WGG, 256 events on each side", (*_encoder("WGG"), *LONG_WINDOW)),
    (
        "sasrec-ce",
        "SASRec, cross-entropy over all items; ids and the same features",
        (*SASREC, *ALL_ITEMS),
    ),
    ("sasrec-ce-ids", "SASRec, cross-entropy over all items; ids alone", (*SASREC, *IDS_ONLY, *ALL_ITEMS)),
    ("sasrec-bce", "SASRec, binary cross-entropy; ids alone", (*SASREC, *IDS_ONLY, *ONE_NEGATIVE)),
    ("tiger", "TIGER-style: code tokens, decoder of 4 layers", TIGER),
)

CONFIGURATIONS = {name: Configuration(name=name, text=text, options=options) for name, text, options in _ROWS}
"""By name; tables share them, and their runs."""

TABLES = {
    "core": Table(
        configurations=("sggs", "ssss", "sasrec-ce"),
        reference="ssss",
        text="The hybrid encoder against pure softmax attention and SASRec with the same features.",
    ),
    "ablation": Table(
        configurations=("linear", "linear-conv", "linear-conv-key", "gggg", "ssss", "sggs", "sgg", "sggs-causal", "wggw", "wgg"),
        reference="ssss",
        text="The parts of GBLA one by one, the hybrids, a causal hybrid, and windows in place of full softmax attention.",
    ),
    "baselines": Table(
        configurations=("sasrec-ce", "sasrec-ce-ids", "sasrec-bce", "tiger", "sggs"),
        reference="sasrec-ce",
        text="Baselines in the same harness; item-kNN and most-popular are part of every evaluation.",
    ),
    "inputs": Table(
        configurations=("sggs", "sggs-ids", "sggs-generative", "sggs-code-tokens"),
        reference="sggs",
        text="What the encoder reads of an event: ids, codes and features in one token (the recipe), ids alone, or a token for each code, "
        "which has no item-level score.",
    ),
    "beams": Table(
        configurations=("sggs", "ssss"),
        reference="ssss",
        text="The runs of the core table, tested with other numbers of beams.",
        beam_sweep=(10, 20, 50, 100, 200, 500),
    ),
    "long_range": Table(
        configurations=("sss", "ggg", "ggg-no-key", "ggg-linear", "www-256", "sgg", "wgg-256"),
        reference="sss",
        text="A target decided by one event 100, 1,000 or 10,000 steps back (benchmarks/quality/planted_recall.py).",
        recipe=long_range.RECIPE,
        dataset_options=long_range.training_options,
        # a history has four values: guessing among them is right within the first four
        shown_cutoff=1,
    ),
}
