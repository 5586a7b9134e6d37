"""Named runs: functions that return a complete config. The docstring says what to expect, on what, by which command.

The command line takes a recipe's name and overrides single fields: ``gbla-rec train --recipe movielens_small --seed 1``.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from gbla_rec.config import (
    DecoderConfig,
    EmbeddingConfig,
    EncoderConfig,
    EvaluationConfig,
    ItemHeadConfig,
    ModelConfig,
    OptimizerConfig,
    PrepareConfig,
    RunConfig,
    SemanticIdConfig,
    StreamConfig,
    TrainingConfig,
)
from gbla_rec.data.movielens import movielens_small_config

EXAMPLE_DATA = Path(__file__).resolve().parent.parent / "examples" / "data"


def movielens_small() -> RunConfig:
    """MovieLens ml-latest-small: 610 histories of up to 2,698 ratings, real titles, minutes on a laptop CPU.

    The last 10 films of each user are the test targets; films of the user's own history are never ranked. The encoder reads
    the newest 96 events: a film depends on the session around it, and short memories fit more steps into minutes.

    Expect: Recall@10 .059 and Recall@50 .207 on 584 users, mean of 3 seeds on an H100; the demo's seed has .064 and .212
    (most-popular .039 and .126, item-kNN .064 and .194), in 120 s on 2 CPU cores (Xeon, 2 gloo ranks). Command:
    ``gbla-rec demo``, or prepare, tokenize, train and evaluate with ``--recipe movielens_small``.
    """
    return RunConfig(
        name="movielens_small",
        dataset="movielens_small",
        semantic_ids=SemanticIdConfig(embedding="behaviour", embedding_dim=64, num_levels=2, codebook_width=128),
        model=ModelConfig(
            embedding=EmbeddingConfig(rows_per_table=16_384, dim=64, context_features=("rating",), semantic_code_dim=32),
            encoder=EncoderConfig(model_dim=96, num_heads=4, pattern="SGG", ffn_dim=192, dropout=0.1),
            decoder=DecoderConfig(num_heads=4, ffn_dim=192, dropout=0.1, label_smoothing=0.1),
        ),
        stream=StreamConfig(tokens_per_batch=4_096, max_history_length=96, targets_per_cut=8, max_cuts_per_history=400),
        optimizer=OptimizerConfig(learning_rate=4e-3, table_learning_rate=0.02, warmup_steps=30, weight_decay=0.05),
        training=TrainingConfig(num_steps=450, validate_every=150, save_every=150, validation_users=610),
        evaluation=EvaluationConfig(num_beams=50, exclude_history=True, tokens_per_batch=16_384),
    )


def amazon_beauty() -> RunConfig:
    """Amazon Beauty, 5-core of 2014: 22,363 users, 12,101 items, histories of 9 events on average, leave-one-out.

    Semantic IDs come from the text of the items (title, brand, categories). One encoder has two heads: the decoder generates
    semantic IDs, the item-level head scores items; evaluation ranks the items of 200 beams by both together, and shows each head alone.
    Small data overfit: half of the events lose their item ids in training, a tenth their whole token, and ranking still gets
    better where the NLL no longer does, so that recall chooses among the newest checkpoints.

    Expect on the test users, mean of 3 seeds, own history neither removed nor masked: joint Recall@10 .0893, NDCG@10 .0515; generative
    alone with 50 beams .0842, .0479; item-level head alone .0835, .0489 (``SSSS`` in place of ``SGGS``: .0887, .0505; .0857, .0473;
    .0838, .0484). On four H100s, some 32 runs side by side: 350 s a run, 58 s of one GPU, six numbers of beams evaluated (``SSSS``, one
    number: 294 s, 37 s). Commands: ``gbla-rec prepare --dataset amazon --path DIRECTORY --name amazon_beauty``, then tokenize, train and
    evaluate with ``--recipe amazon_beauty``; tables: ``benchmarks/quality/README.md``.
    Needs the extra ``text``. Another category: the same with its own ``--name`` and ``--dataset``; where its items have no text,
    semantic IDs and features come from behaviour.
    """
    return RunConfig(
        name="amazon_beauty",
        dataset="amazon_beauty",
        semantic_ids=SemanticIdConfig(embedding="auto", text_encoder="wordllama", embedding_dim=256, distinct_last_code=True),
        model=ModelConfig(
            embedding=EmbeddingConfig(
                rows_per_table=32_768,
                dim=64,
                semantic_code_dim=64,
                id_dropout=0.5,
                event_dropout=0.1,
                token_dropout=0.2,
                item_features=True,
            ),
            encoder=EncoderConfig(model_dim=384, num_heads=6, pattern="SGGS", ffn_dim=768, dropout=0.3),
            decoder=DecoderConfig(num_heads=6, ffn_dim=768, num_layers=2, dropout=0.3, label_smoothing=0.1),
            objective="joint",
            item_head=ItemHeadConfig(weight=0.3, label_smoothing=0.1),
        ),
        stream=StreamConfig(tokens_per_batch=16_384, max_history_length=50, targets_per_cut=1, max_cuts_per_history=1_000),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, final_learning_rate_fraction=0.0, table_learning_rate=0.02, warmup_steps=100, weight_decay=0.1
        ),
        training=TrainingConfig(
            num_steps=1_600, validate_every=200, save_every=200, validation_users=4_096, keep_last=3, keep_best=1, log_every=50
        ),
        evaluation=EvaluationConfig(
            num_beams=50, joint_beams=200, beam_weight=0.8, both_histories=True, tokens_per_batch=4_096, shortlist_users=4_096
        ),
    )


def amazon_sports() -> RunConfig:
    """Amazon Sports and Outdoors, 5-core of 2014: 35,598 users, 18,357 items; else as ``amazon_beauty``.

    Weight and size of the batches were chosen on validation users of both sets, everything else on Beauty's.

    Expect in the same way: joint Recall@10 .0525, NDCG@10 .0287; generative alone .0495, .0268; item-level head alone .0490, .0270
    (``SSSS``: .0518, .0282; .0489, .0263; .0494, .0269). On four H100s, some 32 runs side by side: 327 s a run, 41 s of one GPU.
    Commands: as there, with ``--name amazon_sports`` and ``--recipe amazon_sports``.
    """
    return dataclasses.replace(amazon_beauty(), name="amazon_sports", dataset="amazon_sports")


def own_data() -> RunConfig:
    """A starting point for a log of one's own: give ``--name`` and ``--dataset``, then size it to the data and the machine.

    As it stands it fits a laptop and some hundred thousand events. Expect no figure, as data differ: hold it against most-popular and
    item-kNN, which ``evaluate`` prints beside it. Training takes 10 to 30 minutes on two CPU cores. Commands: prepare and tokenize, then
    train with ``--recipe own_data --name NAME --dataset DATASET``, and evaluate with ``--name NAME``.

    With more events: ``rows_per_table`` about the number of items, ``num_steps`` for some ten epochs (an epoch is at most events x
    max_history_length / targets_per_cut tokens), and on a GPU ``model_dim`` 512, ``num_repeats`` 2, ``tokens_per_batch`` 65,536,
    ``max_history_length`` 8,192.
    """
    return RunConfig(
        name="own_data",
        dataset="own_data",
        model=ModelConfig(
            embedding=EmbeddingConfig(rows_per_table=1 << 16, dim=64),
            encoder=EncoderConfig(model_dim=128, num_heads=4, pattern="SGG", dropout=0.1),
            decoder=DecoderConfig(num_heads=4, dropout=0.1),
        ),
        stream=StreamConfig(tokens_per_batch=4_096, max_history_length=512, targets_per_cut=8),
        training=TrainingConfig(num_steps=1_000, validate_every=200, save_every=200),
    )


def movielens_small_data() -> PrepareConfig:
    """The event log of ``movielens_small``, as it lies in this repository."""
    return movielens_small_config(EXAMPLE_DATA / "ml-latest-small")


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "movielens_small": movielens_small,
    "amazon_beauty": amazon_beauty,
    "amazon_sports": amazon_sports,
    "own_data": own_data,
}
DATASETS: dict[str, Callable[[], PrepareConfig]] = {"movielens_small": movielens_small_data}


def recipe(name: str) -> RunConfig:
    """The config of the recipe called ``name``.

    Raises:
        ValueError: if there is none; the message lists them.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {sorted(RECIPES)}, got {name!r}")
    return RECIPES[name]()
