"""Evaluation shared by ranks: seconds of encoding and beam search over all test users against the number of ranks, and whether all agree.

``python benchmarks/evaluation_ranks.py --run-dir RUN --ranks 1 2 4``: one torchrun for each number of ranks, on the checkpoint
of a trained run that has the lowest validation NLL.
"""

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from report import RESULTS, write_report

from gbla_rec.checkpoint.process_group import process_group
from gbla_rec.checkpoint.run_directory import best_checkpoints, read_config
from gbla_rec.checkpoint.run_parts import RunParts
from gbla_rec.checkpoint.storage import load_checkpoint
from gbla_rec.evaluation.rank import RankedUsers, Score, Search, rank_searches
from gbla_rec.semantic_ids.trie import PrefixTrie

TIMED = 2
"""Passes over the users that are timed, after one that warms up."""
TIMEOUT_SECONDS = 1_200
NOTES = (
    "Encoding, and beam search of every test user by every score of the model, shared by the ranks: {users:,} users, {items:,} items, "
    f"{{beams}} beams{{joint}}; one pass to warm up, then the shorter of {TIMED}, between barriers. start: seconds from launch to "
    "the loaded checkpoint. same as one rank: so are the ranked items of every user and score, by their digest, and the metrics."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True, help="a trained run")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--directory", type=Path, default=RESULTS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        rank_program(options.run_dir, options.child)
        return
    measured = [launch(options.run_dir, ranks) for ranks in options.ranks]
    config = read_config(options.run_dir)
    settings = config.evaluation
    joint = f" ({max(settings.joint_beams, settings.num_beams)} for joint scores)" if config.model.objective == "joint" else ""
    notes = NOTES.format(users=measured[0]["users"], items=measured[0]["items"], beams=settings.num_beams, joint=joint)
    run_dir = Path("workspace", "runs", *options.run_dir.resolve().parts[-2:])
    own = ["--run-dir", str(run_dir), "--ranks", *map(str, options.ranks)]
    command = shlex.join(["python", "benchmarks/evaluation_ranks.py", *own])
    rows = [row_against(measured[0], found) for found in measured]
    print(write_report("evaluation_ranks", rows, command, notes, directory=options.directory))


def row_against(first: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The line of one number of ranks, held against that of the first."""
    return {
        "ranks": found["ranks"],
        "evaluation (s)": found["seconds"],
        "users/s": round(found["users"] / found["seconds"]),
        f"speed-up over {first['ranks']}": first["seconds"] / found["seconds"],
        "start (s)": found["start"],
        f"same as {first['ranks']}": all(found[key] == first[key] for key in ("digest", "metrics")),
    }


def launch(run_dir: Path, ranks: int) -> dict[str, Any]:
    """What the ranks of one torchrun measured.

    Raises:
        subprocess.CalledProcessError: if it failed; its output stands above.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "found.json"
        own = [str(Path(__file__)), "--run-dir", str(run_dir), "--child", str(path)]
        started = time.time()
        program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *own]
        subprocess.run(program, check=True, timeout=TIMEOUT_SECONDS, env={"OMP_NUM_THREADS": "4", **os.environ})
        found = json.loads(path.read_text())
    return {"ranks": ranks, **found, "start": found["loaded"] - started}


def rank_program(run_dir: Path, path: Path) -> None:
    """One rank: load, rank all test users, and on the first rank write what was found."""
    with process_group() as device:
        parts = RunParts.open(read_config(run_dir), device, run_dir)
        trie = PrefixTrie.from_codes(parts.semantic_ids.codes, parts.semantic_ids.widths).to(device)
        load_checkpoint(best_checkpoints(run_dir, 1)[0], parts.model, None)
        dist.barrier()
        loaded = time.time()
        search = Search.of(parts.config.evaluation)
        seconds = []
        for _ in range(1 + TIMED):
            dist.barrier()
            started = time.perf_counter()
            rankings = rank_searches(parts, trie, "test", [search])[search]
            dist.barrier()
            seconds.append(time.perf_counter() - started)
        if dist.get_rank() == 0:
            found = {"loaded": loaded, "seconds": min(seconds[1:]), "items": parts.dataset.manifest.num_items}
            path.write_text(json.dumps(found | described(rankings, parts.config.evaluation.cutoffs)))


def described(rankings: dict[Score, RankedUsers], cutoffs: tuple[int, ...]) -> dict[str, Any]:
    """Number of users, a digest of all ranked items, and the means of the metrics by score."""
    digest = hashlib.sha256()
    for ranked in rankings.values():
        digest.update(np.ascontiguousarray(ranked.ranked).tobytes())
    metrics = {
        score: {name: float(values.mean()) for name, values in ranked.metrics(cutoffs).items()} for score, ranked in rankings.items()
    }
    return {"users": len(next(iter(rankings.values())).user_rows), "digest": digest.hexdigest(), "metrics": metrics}


if __name__ == "__main__":
    main()
