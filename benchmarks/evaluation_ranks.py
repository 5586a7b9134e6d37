"""Evaluation shared by ranks: seconds of encoding and beam search over all test users against the number of ranks, and whether all agree.

``python benchmarks/evaluation_ranks.py --run-dir RUN --ranks 1 2 4``: one torchrun for each number of ranks, on the checkpoint
of a trained run that has the lowest validation NLL. What was measured is in the report after each launch, and kept where
``--seconds`` or SIGTERM (``timeout``) cuts it off.
"""

import argparse
import hashlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from report import results_directory, write_report

from gbla_rec.checkpoint.process_group import process_group
from gbla_rec.checkpoint.run_directory import best_checkpoints, read_config, write_text
from gbla_rec.checkpoint.run_parts import RunParts
from gbla_rec.checkpoint.storage import load_checkpoint
from gbla_rec.evaluation.rank import RankedUsers, Score, Search, rank_searches
from gbla_rec.semantic_ids.trie import PrefixTrie

TIMED = 2
"""Passes over all users that are timed; each is kept as soon as it is done."""
WARM_UP_USERS = 1_024
"""A sample of the users, who go first: several batches of each rank, where all users would take as long as a timed pass."""
END_SECONDS = 5.0
"""So long before the limit a launch is ended."""
POLL_SECONDS = 0.1
PATIENCE_SECONDS = 40.0
"""torchrun ends ranks that do not end by themselves after 30 s."""
NOTES = (
    "Encoding, and beam search of every test user by every score of the model, shared by the ranks: {users:,} users, {items:,} items, "
    f"{{beams}} beams{{joint}}; {WARM_UP_USERS:,} users to warm up, then the shortest of the passes over all, between barriers. "
    "start: seconds from launch to the loaded checkpoint. same as: so are the ranked items of every user and score, by their digest, and "
    "the metrics."
)


@dataclass
class Limit:
    """When to end: at a time of ``time.monotonic``, or once SIGTERM came, as ``timeout`` sends it."""

    deadline: float
    is_asked: bool = False

    def ask(self, number: int, frame: object) -> None:
        """Handle SIGTERM."""
        self.is_asked = True

    def is_over(self) -> bool:
        """Whether no launch may go on."""
        return self.is_asked or time.monotonic() >= self.deadline - END_SECONDS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True, help="a trained run")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="the largest number goes first: it is done soonest")
    parser.add_argument("--seconds", type=float, help="end by then, with what was measured (default: no limit)")
    parser.add_argument("--directory", type=Path, help="of the report (default: the committed results; the workspace if cut off)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        rank_program(options.run_dir, options.child)
        return
    limit = Limit(time.monotonic() + options.seconds if options.seconds else math.inf)
    signal.signal(signal.SIGTERM, limit.ask)
    measured: dict[int, dict[str, Any]] = {}
    for ranks in sorted(set(options.ranks), reverse=True):
        found, is_cut = launch(options.run_dir, ranks, limit)
        if found is not None:
            measured[ranks] = found
            # at once: the next launch may fail, or be cut off
            print(report(options, measured, is_whole=not is_cut and len(measured) == len(set(options.ranks))), flush=True)
        if is_cut:
            raise SystemExit(f"cut off at {ranks} rank(s); measured: {', '.join(map(str, sorted(measured))) or 'nothing'}")


def report(options: argparse.Namespace, measured: dict[int, dict[str, Any]], *, is_whole: bool) -> Path:
    """Write what was measured so far, held against the smallest number of ranks of it."""
    found = [measured[ranks] for ranks in sorted(measured)]
    config = read_config(options.run_dir)
    settings = config.evaluation
    joint = f" ({max(settings.joint_beams, settings.num_beams)} for joint scores)" if config.model.objective == "joint" else ""
    notes = NOTES.format(users=found[0]["users"], items=found[0]["items"], beams=settings.num_beams, joint=joint)
    run_dir = Path("workspace", "runs", *options.run_dir.resolve().parts[-2:])
    own = ["--run-dir", str(run_dir), "--ranks", *map(str, options.ranks)]
    command = shlex.join(["python", "benchmarks/evaluation_ranks.py", *own])
    rows = [row_against(found[0], one) for one in found]
    directory = results_directory(options.directory, is_whole=is_whole)
    return write_report("evaluation_ranks", rows, command, notes, directory=directory)


def row_against(first: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The line of one number of ranks, held against that of the first."""
    seconds = min(found["seconds"])
    return {
        "ranks": found["ranks"],
        "evaluation (s)": seconds,
        "passes": len(found["seconds"]),
        "users/s": round(found["users"] / seconds),
        f"speed-up over {first['ranks']}": min(first["seconds"]) / seconds,
        "start (s)": found["start"],
        f"same as {first['ranks']}": all(found[key] == first[key] for key in ("digest", "metrics")),
    }


def launch(run_dir: Path, ranks: int, limit: Limit) -> tuple[dict[str, Any] | None, bool]:
    """What the ranks of one torchrun measured, None if nothing, and whether the limit cut them off.

    Raises:
        subprocess.CalledProcessError: if it failed; its output stands above.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "found.json"
        program = torchrun(run_dir, ranks, path)
        started = time.time()
        process = subprocess.Popen(program, env={"OMP_NUM_THREADS": "4", **os.environ})
        try:
            while (status := process.poll()) is None and not limit.is_over():
                time.sleep(POLL_SECONDS)
        finally:
            # not SIGKILL: the ranks of a killed torchrun go on
            process.terminate()
            process.wait(PATIENCE_SECONDS)
        # timeout signals torchrun too, which may be the first to end
        is_cut = status is None or limit.is_asked
        if status and not is_cut:
            raise subprocess.CalledProcessError(status, program)
        found = json.loads(path.read_text()) if path.exists() else None
    return (None if found is None else {"ranks": ranks, **found, "start": found["loaded"] - started}), is_cut


def torchrun(run_dir: Path, ranks: int, path: Path) -> list[str]:
    """The command of ``ranks`` ranks that write what they find to ``path``."""
    own = [str(Path(__file__)), "--run-dir", str(run_dir), "--child", str(path)]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *own]


def rank_program(run_dir: Path, path: Path) -> None:
    """One rank: load, rank all test users, and on the first rank write what was found, after each pass."""
    with process_group() as device:
        parts = RunParts.open(read_config(run_dir), device, run_dir)
        trie = PrefixTrie.from_codes(parts.semantic_ids.codes, parts.semantic_ids.widths).to(device)
        load_checkpoint(best_checkpoints(run_dir, 1)[0], parts.model, None)
        dist.barrier()
        loaded = time.time()
        search = Search.of(parts.config.evaluation)
        rank_searches(parts, trie, "test", [search], WARM_UP_USERS)
        seconds: list[float] = []
        for _ in range(TIMED):
            dist.barrier()
            started = time.perf_counter()
            rankings = rank_searches(parts, trie, "test", [search])[search]
            dist.barrier()
            seconds.append(time.perf_counter() - started)
            if dist.get_rank() == 0:
                print(f"{dist.get_world_size()} rank(s), pass {len(seconds)}: {seconds[-1]:.2f} s", flush=True)
                found = {"loaded": loaded, "seconds": seconds, "items": parts.dataset.manifest.num_items}
                write_text(path, json.dumps(found | described(rankings, parts.config.evaluation.cutoffs)))


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
