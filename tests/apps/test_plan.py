"""``gbla-rec plan``: prints a plan for a cluster that is not there, as text and as JSON, and refuses what does not fit."""

import json
from pathlib import Path
from typing import Any

import pytest

from gbla_apps import command_line, plan

BILLION = ("--recipe", "own_data", "--model.embedding.rows-per-table", "1_000_000_000", "--model.embedding.dim", "128")
SIXTEEN_NODES = ("--nodes", "16", "--gpus", "8", "--hbm", "80GB", "--items", "1000000")


@pytest.mark.usefixtures("workspace")
def test_text_and_json_tell_one_plan(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SIXTEEN_NODES, *BILLION, "--stream.tokens-per-batch", "1048576", "--model.embedding.communication", "bf16"]
    plan.main([*arguments, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["cluster"]["world_size"] == 128 and found["tokens_per_rank"] == 8_192
    assert [table["sharding"] for table in found["tables"]] == ["row_wise"] * 2
    assert found["fullest_rank"]["rows"]["device"] == 2 * 10**9 * 128 * 4 // 128
    assert found["exchange"]["rows"] == 2 * 2**20 * 128 * 2
    plan.main(arguments)
    text = capsys.readouterr().out
    for part in (
        "128 cuda ranks on 16 node(s); 80 GB of device memory",
        "item_hash_0  1,000,000,000  128  row_wise  fused   128     1       7,812,500 x 128",
        "table rows (TorchRec's estimate)                 8 GB",
        "ids 16.8 MB, rows 537 MB forward, gradients 537 MB backward",
        "128 data files",
    ):
        assert part in text, text


@pytest.mark.usefixtures("workspace")
def test_a_plan_that_does_not_fit_ends_with_one_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command_line.run(plan.main, ["--nodes", "1", *BILLION, "--model.embedding.placement", "hbm", "--items", "1000"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the tables do not fit on 8 cuda rank(s)") and "Traceback" not in error
    assert "more ranks: 32 are enough" in error and "--model.embedding.placement uvm_caching fits" in error


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        (("--items", "4_000_000_000"), "memory-reserve, fewer --items, or ranks"),
        (("--model.embedding.rows-per-table", "4_000_000_000"), "memory-reserve, fewer rows (--model.embedding.rows-per-table, which"),
    ],
)
@pytest.mark.usefixtures("workspace")
def test_too_many_items_are_told_by_the_option_that_they_come_from(options: tuple[str, str], cure: str) -> None:
    # the tables lie in host memory and fit: what does not is codes and rows of the items
    cluster = ("--gpus", "8", "--hbm", "80GB", "--host-memory", "20TB", "--model.embedding.placement", "uvm")
    with pytest.raises(ValueError, match="every rank holds does not fit") as refused:
        plan.main([*cluster, "--recipe", "own_data", *options])
    assert cure in str(refused.value)


def test_too_many_items_of_a_dataset_are_no_matter_of_options(tiny_workspace: Path) -> None:
    with pytest.raises(ValueError, match="memory-reserve, fewer items, or ranks"):
        plan.main(["--gpus", "1", "--recipe", "own_data", "--dataset", "tiny", "--model.embedding.memory-reserve", "0.0001"])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--hbm", "80", "--hbm must be a number and a unit"),
        ("--nodes", "0", "--nodes must be positive, got 0"),
        ("--write-rate", "0", "--write-rate must be a number and a unit"),
    ],
)
@pytest.mark.parametrize("form", [(), ("--json",)], ids=["text", "json"])
def test_a_bad_size_is_refused(option: str, value: str, message: str, form: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=message):
        plan.main([option, value, *form, "--recipe", "own_data"])


def test_a_prepared_dataset_gives_items_and_codes(tiny_workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--device",
        "cpu",
        "--gpus",
        "2",
        "--recipe",
        "own_data",
        "--dataset",
        "tiny",
        "--model.embedding.context-features",
        "kind",
    ]
    plan.main(arguments)
    text = capsys.readouterr().out
    assert f"dataset tiny in {tiny_workspace / 'datasets' / 'tiny'}; 80 items, codes " in text
    assert "context_kind" in text and "device memory" not in text.splitlines()[1]
