"""Training is world-size free: any number of ranks, any sharding, stopped and resumed or not, gives one loss curve."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gbla_rec import workspace
from gbla_rec.config import ItemHeadConfig, OptimizerConfig, RunConfig, StreamConfig, TrainingConfig

TOLERANCE = 2e-5
"""Relative: fp32 sums in another order, over a few steps of a growing difference."""


def train_and_read(rank: int, world_size: int, config: RunConfig, resume: bool = False) -> dict[str, Any]:
    """Train in the workspace; what rank 0 logged, and of each rank and step the number of targets and the keys of the dropout masks."""
    from gbla_rec.training import trainer

    targets: list[int] = []
    keys: list[list[int]] = []
    trainers: list[Any] = []
    run = trainer.Trainer.run

    def keep_and_run(self: Any) -> Path:
        trainers.append(self)
        return run(self)

    trainer.Trainer.run = keep_and_run  # type: ignore[method-assign]
    train_steps = trainer.train_steps

    def count(*arguments: Any) -> Any:
        for batches, nll in train_steps(*arguments):
            targets.append(nll.numel())
            keys.append([key for batch in batches for key in batch.token_keys.tolist() + batch.target_keys.tolist()])
            yield batches, nll

    trainer.train_steps = count
    run_dir = trainer.train(config, device=torch.device("cpu"), resume=resume)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "losses": [line["loss"] for line in lines if line["kind"] == "train"],
        "nll": [line["nll"] for line in lines if line["kind"] == "validation"],
        "gradient_norms": [line["gradient_norm"] for line in lines if line["kind"] == "train"],
        "table_norm": moved_by(trainers[0]),
        "targets": targets,
        "keys": keys,
        "run_dir": str(run_dir),
    }


def moved_by(trainer: Any) -> float:
    """How far training moved the item tables from their initial weights: the Euclidean norm over all shards of all ranks."""
    import torch.distributed as dist

    from gbla_rec.models.embeddings import initialize_tables

    tables = trainer.parts.retriever.tables
    shards = {name: value.local_shards() for name, value in tables.state_dict().items() if "item_hash" in name}
    after = {name: [shard.tensor.clone() for shard in local] for name, local in shards.items()}
    initialize_tables(tables, trainer.config.seed)
    moved = []
    for name, local in shards.items():
        for shard, trained in zip(local, after[name], strict=True):
            moved.append((trained - shard.tensor).square().sum())
    # a rank may hold no shard
    total = sum(moved, start=next(trainer.parts.retriever.history.parameters()).new_zeros(()).detach())
    dist.all_reduce(total)
    return float(total.sqrt())


def with_sharding(config: RunConfig, sharding: str, **changes: Any) -> RunConfig:
    embedding = dataclasses.replace(config.model.embedding, sharding=sharding, **changes)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, embedding=embedding))


@pytest.mark.usefixtures("tiny_workspace")
def test_two_ranks_see_the_curve_of_one(run_ranks: Any, tiny_run: Any) -> None:
    # a large eps: without it both optimisers hide a gradient of the wrong scale
    config = tiny_run(optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=2, table_learning_rate=1.0, table_eps=1.0))
    alone = run_ranks(train_and_read, 1, config)[0]
    assert len(alone["losses"]) == config.training.num_steps
    # it learns
    assert alone["losses"][-1] < alone["losses"][0]
    for sharding in ("row_wise", "table_wise"):
        first, second = run_ranks(train_and_read, 2, with_sharding(config, sharding))
        assert first["targets"] != second["targets"], "the ranks must have unequal shares for this test to mean something"
        assert first["losses"] == pytest.approx(alone["losses"], rel=TOLERANCE), sharding
        assert first["gradient_norms"] == pytest.approx(alone["gradient_norms"], rel=1e-3), sharding
        assert first["table_norm"] == pytest.approx(alone["table_norm"], rel=1e-4), sharding
        assert first["nll"] == pytest.approx(alone["nll"], rel=TOLERANCE), sharding


@pytest.mark.usefixtures("tiny_workspace")
def test_micro_batches_step_the_tables_alike_on_any_number_of_ranks(run_ranks: Any, tiny_run: Any) -> None:
    # tables that move: each backward steps them, and the next micro batch reads them
    config = tiny_run(
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=2, table_learning_rate=1.0, table_eps=1.0),
        training=TrainingConfig(num_steps=6, validate_every=6, save_every=6, log_every=1, validation_users=20, num_micro_batches=4),
    )
    alone = run_ranks(train_and_read, 1, config)[0]
    assert alone["losses"][-1] < alone["losses"][0]
    for world_size, sharding in ((2, "row_wise"), (4, "table_wise")):
        run, *others = run_ranks(train_and_read, world_size, with_sharding(config, sharding))
        assert any(run["targets"] != other["targets"] for other in others)
        assert run["losses"] == pytest.approx(alone["losses"], rel=TOLERANCE)
        assert run["gradient_norms"] == pytest.approx(alone["gradient_norms"], rel=1e-3)
        assert run["table_norm"] == pytest.approx(alone["table_norm"], rel=1e-4)
        assert run["nll"] == pytest.approx(alone["nll"], rel=TOLERANCE)


@pytest.mark.usefixtures("tiny_workspace")
def test_more_micro_batches_than_histories_change_nothing(run_ranks: Any, tiny_run: Any, tmp_path: Path) -> None:
    # batches of one history: one micro batch holds it all, the others are empty on every rank
    config = tiny_run(
        stream=StreamConfig(tokens_per_batch=1, max_history_length=20, targets_per_cut=4, oversized="own_batch"),
        training=TrainingConfig(num_steps=4, validate_every=4, save_every=2, log_every=1, validation_users=5),
    )

    def in_parts(num_micro_batches: int) -> RunConfig:
        return dataclasses.replace(config, training=dataclasses.replace(config.training, num_micro_batches=num_micro_batches))

    whole = run_ranks(train_and_read, 1, config)[0]
    stopped = run_ranks(train_and_stop, 2, in_parts(3), 2)[0]
    resumed = run_ranks(train_and_read, 1, in_parts(2), True)[0]
    assert resumed["run_dir"] == stopped != whole["run_dir"]
    assert resumed["losses"] == pytest.approx(whole["losses"], rel=TOLERANCE)
    assert resumed["nll"] == pytest.approx(whole["nll"], rel=TOLERANCE)
    log = (tmp_path / "ranks-2" / "0.output").read_text()
    assert "the tables step 2 time(s) a step: num_micro_batches is 2, the run began with 3" in log


@pytest.mark.usefixtures("tiny_workspace")
def test_code_tokens_see_one_curve_too_and_the_run_is_evaluated(run_ranks: Any, tiny_run: Any) -> None:
    config = tiny_run(training=TrainingConfig(num_steps=4, validate_every=4, save_every=4, log_every=1, validation_users=20))
    encoder = dataclasses.replace(config.model.encoder, pattern="SS")
    decoder = dataclasses.replace(config.model.decoder, num_layers=2)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, encoder=encoder, decoder=decoder))
    # with a context table that is read, and with no table that anybody looks up
    for context in (("kind",), ()):
        of_codes = with_sharding(config, "row_wise", tokens="codes", context_features=context)
        alone = run_ranks(train_and_read, 1, of_codes)[0]
        first, second = run_ranks(train_and_read, 2, of_codes)
        assert alone["losses"][-1] < alone["losses"][0] and alone["table_norm"] == 0
        assert first["targets"] != second["targets"]
        assert first["losses"] == pytest.approx(alone["losses"], rel=TOLERANCE), context
        assert first["gradient_norms"] == pytest.approx(alone["gradient_norms"], rel=1e-3), context
        assert first["nll"] == pytest.approx(alone["nll"], rel=TOLERANCE), context
    results, again = run_ranks(evaluate_run, 2, first["run_dir"])
    assert results == again
    assert results["protocol"]["users"] == 60 and list(results["methods"]) == ["tiny", "most-popular", "item-kNN"]


@pytest.mark.usefixtures("tiny_workspace")
def test_item_level_scores_see_one_curve_too_and_the_run_is_evaluated_by_every_score(run_ranks: Any, tiny_run: Any) -> None:
    config = tiny_run(
        training=TrainingConfig(num_steps=4, validate_every=4, save_every=4, log_every=1, validation_users=20),
        # a large eps: without it row-wise Adagrad hides a gradient of the wrong scale
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=2, table_learning_rate=1.0, table_eps=1.0),
    )
    head = ItemHeadConfig(num_sampled=20)
    joint = with_sharding(config, "row_wise", item_features=True, id_dropout=0.3)
    joint = dataclasses.replace(joint, model=dataclasses.replace(joint.model, objective="joint", item_head=head))
    alone = run_ranks(train_and_read, 1, joint)[0]
    first, second = run_ranks(train_and_read, 2, joint)
    assert alone["losses"][-1] < alone["losses"][0]
    assert first["targets"] != second["targets"]
    assert first["losses"] == pytest.approx(alone["losses"], rel=TOLERANCE)
    assert first["gradient_norms"] == pytest.approx(alone["gradient_norms"], rel=1e-3)
    assert first["table_norm"] == pytest.approx(alone["table_norm"], rel=1e-4)
    assert first["nll"] == pytest.approx(alone["nll"], rel=TOLERANCE)
    results = run_ranks(evaluate_run, 1, first["run_dir"], (3, 10))[0]
    assert run_ranks(evaluate_run, 2, first["run_dir"], (3, 10)) == [results] * 2
    few, configured = (row["methods"] for row in results["beam_sweep"])
    assert list(few) == list(configured) == ["tiny (generative)"]
    assert configured["tiny (generative)"]["Recall@5"]["mean"] == results["methods"]["tiny (generative)"]["Recall@5"]["mean"]
    assert list(results["scores"]) == ["joint", "generative", "item"]
    assert results["protocol"]["joint_beams"] == config.evaluation.joint_beams and results["protocol"]["beam_weight"] == 1
    assert list(results["methods"])[:3] == list(results["scores"].values())
    main, item = run_ranks(recommended_items, 1, first["run_dir"])[0]
    assert main["ranked_by"] == "joint" and item["ranked_by"] == "item"
    for recommendation in (main, item):
        assert len(set(recommendation["item_ids"])) == 5 and recommendation["scores"] == sorted(recommendation["scores"], reverse=True)
    # the joint score adds log-probabilities, which are negative
    scores = dict(zip(item["item_ids"], item["scores"], strict=True))
    assert all(score < scores[found] for found, score in zip(main["item_ids"], main["scores"], strict=True) if found in scores)


def recommended_items(rank: int, world_size: int, run_dir: str) -> list[dict[str, Any]]:
    from gbla_rec.checkpoint import run_parts
    from gbla_rec.evaluation.recommend import Recommender

    opened = [Recommender.open(Path(run_dir), torch.device("cpu"), score) for score in (None, "item")]
    # a catalogue of several exchanges has the same vectors
    run_parts.ITEMS_AT_ONCE = 33
    torch.testing.assert_close(opened[0].parts.item_vectors(), opened[0].vectors)
    return [dataclasses.asdict(recommender.for_user("3", 5)) for recommender in opened]


def evaluate_run(rank: int, world_size: int, run_dir: str, beam_sweep: tuple[int, ...] = ()) -> dict[str, Any]:
    from gbla_rec.checkpoint.run_directory import read_config
    from gbla_rec.evaluation.evaluate import evaluate

    settings = dataclasses.replace(read_config(Path(run_dir)).evaluation, beam_sweep=beam_sweep)
    return evaluate(Path(run_dir), device=torch.device("cpu"), settings=settings)


@pytest.mark.usefixtures("tiny_workspace")
def test_resumed_run_sees_the_curve_of_an_undisturbed_one(run_ranks: Any, tiny_run: Any) -> None:
    config = tiny_run()
    whole = run_ranks(train_and_read, 1, config)[0]
    for before, after, tolerance in ((1, 1, 1e-12), (2, 1, TOLERANCE), (1, 2, TOLERANCE)):
        stopped = run_ranks(train_and_stop, before, config, 4)[0]
        resumed = run_ranks(train_and_read, after, config, True)[0]
        assert resumed["run_dir"] == stopped != whole["run_dir"]
        # the stopped run logged steps 1 to 4 before it stopped after saving step 4, the resumed one goes on in the same file
        assert resumed["losses"] == pytest.approx(whole["losses"], rel=tolerance), (before, after)
        assert resumed["nll"] == pytest.approx(whole["nll"], rel=tolerance), (before, after)


@pytest.mark.usefixtures("tiny_workspace")
@pytest.mark.parametrize("sharding", ["row_wise", "table_wise", "column_wise"])
def test_a_run_saved_on_two_ranks_goes_on_exactly_on_four(run_ranks: Any, tiny_run: Any, sharding: str) -> None:
    # a fourth rank has no table of its own where tables are whole, and two column shards of each table need 256 columns
    config = with_sharding(tiny_run(), sharding, dim=256 if sharding == "column_wise" else 8)
    encoder = dataclasses.replace(config.model.encoder, dropout=0.3)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, encoder=encoder))
    whole = run_ranks(train_and_read, 1, config)[0]
    run_ranks(train_and_stop, 2, config, 4)
    resumed = run_ranks(train_and_read, 4, config, True)
    assert resumed[0]["losses"] == pytest.approx(whole["losses"], rel=TOLERANCE)
    assert resumed[0]["nll"] == pytest.approx(whole["nll"], rel=TOLERANCE)
    plan = (Path(resumed[0]["run_dir"]) / "plan.txt").read_text()
    assert sharding in plan
    assert sharding != "column_wise" or "64 x 128 on rank:0/cpu, 64 x 128 on rank:1/cpu" in plan
    # steps 5 and 6: the keys, of which the masks are a function, are those of the undisturbed run
    together = [sorted(itertools.chain(*step)) for step in zip(*(rank["keys"] for rank in resumed), strict=True)]
    assert len(together) == 2 and together == [sorted(step) for step in whole["keys"][4:]]


def train_and_stop(rank: int, world_size: int, config: RunConfig, last_step: int) -> str:
    """Train, and die like a killed process right after the checkpoint of ``last_step``."""
    from gbla_rec.training import trainer

    save = trainer.Trainer._save

    def save_and_stop(self: Any, nll: float | None) -> None:
        save(self, nll)
        if self.step == last_step:
            raise KeyboardInterrupt

    trainer.Trainer._save = save_and_stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train(config, device=torch.device("cpu"))
    return str(workspace.latest_run_dir(config.name))


@pytest.mark.usefixtures("tiny_workspace")
def test_resuming_with_another_config_is_refused(run_ranks: Any, tiny_run: Any) -> None:
    config = tiny_run(training=TrainingConfig(num_steps=1, log_every=1, validation_users=5))

    def attempt(rank: int, world_size: int) -> str:
        train_and_read(rank, world_size, config)
        with pytest.raises(ValueError, match=r"cannot resume .* config.json differs in seed, and no older run") as refused:
            train_and_read(rank, world_size, dataclasses.replace(config, seed=5), True)
        # how a run computes may change
        kernels = dataclasses.replace(config.model, kernels="reference")
        train_and_read(rank, world_size, dataclasses.replace(config, model=kernels), True)
        return str(refused.value)

    assert len(set(run_ranks(attempt, 2))) == 1


@pytest.mark.usefixtures("tiny_workspace")
def test_ranks_without_samples_take_part(run_ranks: Any, tiny_run: Any) -> None:
    # batches of one history, and fewer validation users than ranks
    config = tiny_run(
        stream=StreamConfig(tokens_per_batch=1, max_history_length=20, targets_per_cut=4, oversized="own_batch"),
        training=TrainingConfig(num_steps=3, validate_every=3, save_every=3, log_every=1, validation_users=1),
    )
    alone = run_ranks(train_and_read, 1, config)[0]
    first, second = run_ranks(train_and_read, 2, config)
    assert 0 in first["targets"] + second["targets"]
    assert first["losses"] == pytest.approx(alone["losses"], rel=TOLERANCE)
    assert first["nll"] == pytest.approx(alone["nll"], rel=TOLERANCE)


@pytest.mark.usefixtures("tiny_workspace")
def test_the_tables_are_really_pipelined(run_ranks: Any, tiny_run: Any) -> None:
    def pipelined(rank: int, world_size: int) -> list[str]:
        from gbla_rec.training import step_pipeline, trainer

        detach = step_pipeline.TrainPipelineSparseDist.detach
        names: list[str] = []

        def detach_and_look(self: Any) -> Any:
            names.extend(type(module).__name__ for module in self._pipelined_modules)
            return detach(self)

        step_pipeline.TrainPipelineSparseDist.detach = detach_and_look
        trainer.train(tiny_run(), device=torch.device("cpu"))
        return names

    for names in run_ranks(pipelined, 2):
        assert names
        assert set(names) == {"ShardedEmbeddingCollection"}


@pytest.mark.usefixtures("tiny_workspace")
def test_run_directory_says_what_ran(run_ranks: Any, tiny_run: Any) -> None:
    config = tiny_run()
    run_dir = Path(run_ranks(train_and_read, 2, config)[0]["run_dir"])
    from gbla_rec.checkpoint.run_directory import checkpoints, read_config

    assert read_config(run_dir) == config
    versions = json.loads((run_dir / "version.json").read_text())
    assert versions["torch"] and versions["dataset_hash"]
    assert "item_hash_0" in (run_dir / "plan.txt").read_text()
    assert list((run_dir / "tensorboard").glob("events*"))
    # keep_last 2 and keep_best 2 of the steps 2, 3, 4, 6; only 3 and 6 were validated
    assert [checkpoint.progress.step for checkpoint in checkpoints(run_dir)] == [3, 4, 6]
    assert not list((run_dir / "checkpoints").glob(".tmp-*"))
