"""A table of experiments from its definition to its report, on the real entry points."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "--semantic-ids.embedding-dim 8 --semantic-ids.min-codebook-width 8 --semantic-ids.dedup-width 8 --semantic-ids.kmeans-iterations 5 "
    "--model.embedding.rows-per-table 64 --model.embedding.dim 8 --model.embedding.semantic-code-dim 4 --model.encoder.model-dim 16 "
    "--model.encoder.num-heads 2 --model.encoder.ffn-dim 16 --model.decoder.num-heads 2 --model.decoder.ffn-dim 16 "
    "--stream.tokens-per-batch 600 --stream.max-history-length 100 --stream.targets-per-cut 4 --training.num-steps 4 "
    "--training.validate-every 4 --training.save-every 4 --training.validation-users 20 --evaluation.num-beams 10 "
    "--evaluation.cutoffs 2 5 --evaluation.bootstrap-samples 50"
)


@pytest.fixture(autouse=True)
def root_on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(ROOT)
    yield


@pytest.fixture
def tiny_table(monkeypatch: pytest.MonkeyPatch):
    from benchmarks.quality.tables import TABLES, Table

    table = Table(
        configurations=("sgg", "sss"),
        reference="sss",
        text="A tiny table.",
        seeds=(0,),
        recipe="own_data",
        dataset_options=lambda dataset: tuple(TINY.split()),
    )
    monkeypatch.setitem(TABLES, "tiny", table)
    return table


def jobs_of(table, **options):
    from benchmarks.quality.run_job import table_jobs

    return table_jobs(table, "tiny", **options)


@pytest.mark.slow
@pytest.mark.timeout(170)
def test_a_table_is_trained_evaluated_and_reported_and_done_only_once(tiny_workspace, tiny_table, tmp_path, capsys):
    from benchmarks.quality import collect, run

    arguments = ["tiny", "--dataset", "tiny"]
    status = run.main([*arguments, "--jobs", "2", "--minutes", "2.5", "--grace", "5"])
    assert status == run.ALL_DONE, capsys.readouterr().out
    assert "2 done" in capsys.readouterr().out
    runs = sorted(path.relative_to(tiny_workspace).parts[1] for path in tiny_workspace.glob("runs/*/*/results.json"))
    assert runs == ["tiny.sgg.seed0", "tiny.sss.seed0"]

    assert run.main(arguments) == run.ALL_DONE
    assert "2 runs" in capsys.readouterr().out and len(list(tiny_workspace.glob("runs/*/*"))) == 2

    assert collect.main([*arguments, "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "quality_tiny_tiny.json").read_text())
    figures = {(line["configuration"], line["metric"]): line for line in report["details"]["All figures"]}
    results = {name: json.loads(next(tiny_workspace.glob(f"runs/tiny.{name}.seed0/*/results.json")).read_text()) for name in ("sgg", "sss")}
    means = {name: found["methods"][f"tiny.{name}.seed0"]["Recall@5"]["mean"] for name, found in results.items()}
    assert figures["sgg", "Recall@5"]["mean"] == pytest.approx(means["sgg"])
    assert figures["sgg", "Recall@5"]["difference"] == pytest.approx(means["sgg"] - means["sss"])
    assert "difference" not in figures["sss", "Recall@5"] and ("item-kNN", "Recall@5") in figures
    assert [line["configuration"] for line in report["rows"]] == ["sgg", "sss", "most-popular", "item-kNN"]
    pairs = {line["metric"]: line for line in report["details"]["Main scores, row against row, all metrics"]}
    assert {(line["first"], line["second"]) for line in pairs.values()} == {("sgg (generative)", "sss (generative)")}
    assert pairs["Recall@5"]["difference"] == f"{means['sgg'] - means['sss']:+.4f}"
    assert all(line["train s"] > 1 and line["evaluate s"] > 1 for line in report["tables"]["Cost"])
    text = (tmp_path / "quality_tiny_tiny.md").read_text()
    assert [line["metric"] for line in report["tables"]["Main scores, row against row"]] == ["Recall@5", "NDCG@5"]
    assert "All figures" not in text and "all metrics\n" not in text
    assert "hybrid SGG" in text and "Unfinished" not in text and "benchmarks.quality.run tiny --dataset tiny" in text


def test_what_a_run_directory_holds_decides_what_comes_next(tiny_workspace, tiny_table):
    from gbla_rec.checkpoint.run_directory import Progress, create_run, write_progress
    from gbla_rec.data.histories import StreamPosition

    (job,) = jobs_of(tiny_table, only=["sgg"])
    stage = job.next_stage()
    assert stage.name == "train" and "--resume" not in stage.command and stage.saves_on_sigterm

    run_dir = tiny_workspace / "runs" / job.name / "20260101T000000_000000Z"
    create_run(run_dir, job.config, job.dataset_hash, job.semantic_ids.content)
    # it saved nothing: --resume would take an older run
    assert "--resume" not in job.next_stage().command
    for step, name in ((2, "train"), (4, "evaluate")):
        checkpoint = run_dir / "checkpoints" / f"step_{step:08d}"
        checkpoint.mkdir()
        write_progress(checkpoint, Progress(step=step, position=StreamPosition(), sequence_hash="x", world_size=1))
        assert job.next_stage().name == name and ("--resume" in job.next_stage().command) == (name == "train")
    assert job.next_stage().command[-2:] == ("--run-dir", str(run_dir)) and not job.next_stage().saves_on_sigterm

    (run_dir / "results.json").write_text(json.dumps({"beam_sweep": [{"num_beams": 10}, {"num_beams": 50}]}))
    assert job.next_stage() is None
    swept = dataclasses.replace(job, beam_sweep=(10, 50))
    assert swept.next_stage() is None
    more = dataclasses.replace(job, beam_sweep=(10, 500)).next_stage()
    assert more.name == "evaluate" and more.command[-3:] == ("--num-beams", "10", "500")

    overrides = {"beam_weight": {"own": 1.0, "used": 0.5}}
    (run_dir / "results.json").write_text(json.dumps({"protocol": {"overrides": overrides}}))
    assert job.results is None and job.next_stage().name == "evaluate", "figures of other settings are not the job's"
    (run_dir / "results.json").write_text(json.dumps({"protocol": {"overrides": {}}}))
    assert job.next_stage() is None


def test_a_run_of_another_config_or_dataset_is_trained_anew_and_said_to_be(tiny_workspace, tiny_table, capsys):
    from benchmarks.quality.run import describe_start
    from gbla_rec.checkpoint.run_directory import create_run

    (job,) = jobs_of(tiny_table, only=["sgg"])
    run_dir = tiny_workspace / "runs" / job.name / "20260101T000000_000000Z"
    create_run(run_dir, job.config, job.dataset_hash, job.semantic_ids.content)
    (run_dir / "results.json").write_text("{}")
    (changed,) = jobs_of(tiny_table, only=["sgg"], extra=("--training.num-steps", "5"))
    renewed = dataclasses.replace(job, dataset_hash="other")
    tokenized = dataclasses.replace(job, semantic_ids=dataclasses.replace(job.semantic_ids, content="other"))
    reasons = ("another training.num_steps", "another version of the dataset", "other semantic IDs")
    for other, reason in zip((changed, renewed, tokenized), reasons, strict=True):
        assert other.results is None and "--resume" not in other.next_stage().command
        describe_start([other])
        printed = capsys.readouterr().out
        assert "1 runs" in printed and "0 done" in printed and reason in printed
    (otherwise_named,) = jobs_of(tiny_table, only=["sgg"], extra=("--semantic-ids.embedding", "auto", "--semantic-ids.seed", "7"))
    assert otherwise_named.config != job.config
    same_ids = dataclasses.replace(otherwise_named, semantic_ids=job.semantic_ids)
    for same in (job, same_ids):
        describe_start([same])
        assert "1 done" in capsys.readouterr().out

    # a run that does not say which semantic IDs it has is told apart by how they were made
    (run_dir / "version.json").write_text(json.dumps({"dataset_hash": job.dataset_hash}))
    assert job.obstacle(run_dir) is None
    assert same_ids.obstacle(run_dir) == "another semantic_ids.embedding, semantic_ids.seed"


def test_wrong_names_and_options_are_refused_before_anything_starts(tiny_workspace, tiny_table, capsys):
    from benchmarks.quality import run

    for arguments, reason in (
        (["tiny", "--dataset", "tiny", "--only", "sgx"], "got sgx"),
        (["tiny", "--dataset", "absent"], "absent"),
        (["tiny", "--dataset", "tiny", "--jobs", "0"], "num_parallel must be at least 1"),
        (["tiny", "--dataset", "tiny", "--", "--training.no-such-option", "1"], "configuration 'sgg' must fit its recipe"),
    ):
        assert run.main(arguments) == 2
        assert reason in capsys.readouterr().err
    assert not (tiny_workspace / "quality").exists() and not (tiny_workspace / "runs").exists()


def test_every_table_names_known_rows_and_has_its_reference_among_them():
    from benchmarks.quality.tables import CONFIGURATIONS, TABLES

    for table in TABLES.values():
        assert set(table.configurations) <= set(CONFIGURATIONS) and table.reference in table.configurations
        assert len(set(table.configurations)) == len(table.configurations) and len(table.seeds) >= 3


def test_the_notes_say_how_many_beams_the_joint_scores_rank():
    from benchmarks.quality.collect import _joint_beams

    def row(scores, **evaluation):
        run = SimpleNamespace(results={"config": {"evaluation": {"joint_beams": 200, "num_beams": 50, **evaluation}}})
        return SimpleNamespace(scores=scores, group=SimpleNamespace(runs=[run]))

    joint, item = ("joint", "generative", "item"), ("item",)
    assert _joint_beams([row(item), row(joint)]) == " (joint: 200)"
    assert _joint_beams([row(joint), row(joint, num_beams=500)]) == " (joint: 200, 500)"
    assert _joint_beams([row(item)]) == ""


def test_rows_are_compared_by_the_main_score_of_each(monkeypatch):
    from benchmarks.quality import collect

    asked = []

    def compared(first, second, *, first_method, second_method, num_samples):
        asked.append((first, first_method, second, second_method))
        interval = {"low": -0.001, "high": 0.002, "seeds_low": None, "seeds_high": None}
        return {"metrics": {"Recall@10": {"difference": 0.0005, **interval}}}

    monkeypatch.setattr(collect, "compare", compared)
    joint = SimpleNamespace(name="sggs", scores={"joint": "a", "generative": "a (generative)", "item": "a (item)"}, group="seeds of sggs")
    item = SimpleNamespace(name="sasrec-ce", scores={"item": "b"}, group="seeds of sasrec-ce")
    (line,) = collect.pair_figures(joint, item)
    assert asked == [("seeds of sggs", "joint", "seeds of sasrec-ce", "item")]
    assert (line["first"], line["second"], line["difference"]) == ("sggs (joint)", "sasrec-ce (item)", "+0.0005")
    assert line["over users"] == "-0.0010 to +0.0020" and line["over users and seeds"] is None


def test_the_origin_of_a_table_is_that_of_its_runs(tmp_path):
    from benchmarks.quality.attempts import Attempt, add_attempt
    from benchmarks.quality.collect import _origin

    def row(name, machine, **versions):
        run = SimpleNamespace(results={"versions": {"commit": "1" * 40, "gbla-rec": None, "torch": "2.11.0", **versions}})
        (tmp_path / name).mkdir()
        add_attempt(tmp_path / name, Attempt("train", "2026-01-01T00:00:00+00:00", 9.0, 1.0, 0, False, machine))
        return SimpleNamespace(jobs=[SimpleNamespace(directory=tmp_path / name)], group=SimpleNamespace(runs=[run]))

    one, other = row("one", "4 x H100, 64 cores"), row("other", "1 x H200, 16 cores", commit="2" * 40)
    assert _origin([one]) == {"commit": "1" * 12, "hardware": {"machine": "4 x H100, 64 cores"}, "versions": {"torch": "2.11.0"}}
    both = _origin([one, other])
    assert both["hardware"]["machine"] == "1 x H200, 16 cores; 4 x H100, 64 cores" and both["commit"] == f"{'1' * 12}, {'2' * 12}"
