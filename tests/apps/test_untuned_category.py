"""The Amazon recipe on a category that it was never chosen on: only the path changes, and there may be neither titles nor attributes."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from gbla_apps import cli

TINY = """--model.encoder.model-dim 16 --model.encoder.num-heads 2 --model.encoder.ffn-dim 16 --model.decoder.num-heads 2
    --model.decoder.ffn-dim 16 --model.embedding.rows-per-table 64 --stream.tokens-per-batch 300 --evaluation.joint-beams 60
    --training.num-steps 2 --training.validate-every 2 --training.save-every 2""".split()


def commands(rank: int, lines: list[list[str]]) -> None:
    for line in lines:
        sys.argv = ["gbla-rec", *line]
        cli.main()


def category(path: Path) -> Path:
    """Ids alone, in the form of S3-Rec: 40 users who walk through 30 items."""
    generator = random.Random(0)
    lines = []
    for user in range(1, 41):
        walk = [(7 * user + 3 * step + generator.randrange(2)) % 30 + 1 for step in range(generator.randint(5, 9))]
        lines.append(" ".join(map(str, (user, *walk))))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.timeout(170)
def test_a_category_of_ids_alone_is_prepared_trained_and_evaluated_by_its_path(tmp_path: Path, workspace: Path, launch_ranks: Any) -> None:
    run = ["--recipe", "amazon_beauty", "--name", "toys", "--dataset", "amazon_toys"]
    path = ["prepare", "--dataset", "amazon", "--path", str(category(tmp_path / "Toys.txt"))]
    lines = [
        path,
        ["tokenize", *run],
        ["train", *run, *TINY],
        ["evaluate", "--name", "toys"],
        ["recommend", "--name", "toys", "--user", "3"],
    ]
    ((status, output),) = launch_ranks(commands, 1, lines, timeout_s=150.0)
    assert status == 0, output
    assert "text columns: none" in output
    (found,) = workspace.glob("runs/toys/*/results.json")
    results = json.loads(found.read_text())
    assert results["protocol"]["users"] == 40 and results["protocol"]["candidates"] == 30
    assert list(results["scores"]) == ["joint", "generative", "item"]
    # any ranking of 30 items has all of them in the first 50
    assert all(results["methods"][method]["Recall@50"]["mean"] == 1 for method in results["scores"].values())
