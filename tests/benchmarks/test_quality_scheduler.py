"""The driver of experiment tables, with shell commands as jobs: what is done is skipped, what was interrupted goes on, time is kept."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def root_on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(ROOT)
    yield


@dataclass(frozen=True)
class ShellJob:
    """Two stages; each leaves a file ``<stage>.done``."""

    name: str
    directory: Path
    train: str = "touch train.done"
    evaluate: str = "touch evaluate.done"
    needed_seconds: float = 0.0

    def next_stage(self):
        from benchmarks.quality.scheduler import Stage

        if (self.directory / "evaluate.done").exists():
            return None
        is_trained = (self.directory / "train.done").exists()
        name, text = ("evaluate", self.evaluate) if is_trained else ("train", self.train)
        command = ("bash", "-c", f"cd {self.directory} && {text}")
        return Stage(name=name, command=command, needed_seconds=self.needed_seconds, saves_on_sigterm=not is_trained, urgency=is_trained)


def run(jobs, num_parallel=2, seconds=30.0, grace_seconds=2.5, **options):
    from benchmarks.quality.scheduler import Scheduler

    lines: list[str] = []
    outcome = Scheduler(jobs, num_parallel=num_parallel, seconds=seconds, grace_seconds=grace_seconds, report=lines.append, **options).run()
    return outcome, lines


def states(outcome):
    return {name: str(state) for name, state in outcome.states.items()}


def attempts(directory):
    return json.loads((directory / "attempts.json").read_text())


def test_every_stage_runs_once_and_what_is_done_is_skipped(tmp_path):
    count = "echo x >> $PWD/../count"
    jobs = [ShellJob(f"job{i}", tmp_path / f"job{i}", f"{count} && touch train.done", f"{count} && touch evaluate.done") for i in range(3)]
    for _ in range(2):
        outcome, _ = run(jobs)
        assert states(outcome) == dict.fromkeys(("job0", "job1", "job2"), "done") and not outcome.failures
    assert len((tmp_path / "count").read_text().split()) == 6
    assert [attempt["stage"] for attempt in attempts(tmp_path / "job0")] == ["train", "evaluate"]


def test_no_more_processes_run_than_asked_for_and_each_has_its_environment(tmp_path):
    marks = "touch ../$SLOT.$$ && ls .. | grep -c '^[01][.]' >> ../most && sleep 0.3 && rm ../$SLOT.$$ && touch train.done evaluate.done"
    jobs = [ShellJob(f"job{i}", tmp_path / f"job{i}", marks) for i in range(5)]
    outcome, _ = run(jobs, environments=[{**os.environ, "SLOT": "0"}, {**os.environ, "SLOT": "1"}])
    assert set(states(outcome).values()) == {"done"}
    assert max(map(int, (tmp_path / "most").read_text().split())) == 2
    # two at a time cost half of the machine each
    shares = [attempt["share_seconds"] / attempt["seconds"] for i in range(4) for attempt in attempts(tmp_path / f"job{i}")]
    assert sum(shares) / len(shares) < 0.75


def test_a_training_is_asked_to_save_before_the_time_is_over_and_goes_on_in_the_next_call(tmp_path):
    # as the trainer: SIGTERM saves, and the exit status is 143
    training = "trap 'sleep 0.5; touch saved; exit 143' TERM; test -e saved && touch train.done && exit 0; while true; do sleep 0.05; done"
    job = ShellJob("job", tmp_path / "job", training)
    started = time.monotonic()
    outcome, _ = run([job], seconds=5.0, grace_seconds=4.0)
    assert time.monotonic() - started < 5 and states(outcome) == {"job": "waiting"} and not outcome.failures
    assert attempts(tmp_path / "job")[0]["was_stopped"] and attempts(tmp_path / "job")[0]["status"] == 143
    outcome, _ = run([job])
    assert states(outcome) == {"job": "done"}


def test_what_ignores_sigterm_is_killed_before_the_limit(tmp_path):
    job = ShellJob("job", tmp_path / "job", "trap '' TERM; while true; do sleep 0.05; done")
    started = time.monotonic()
    outcome, _ = run([job], seconds=4.0, grace_seconds=3.0)
    assert time.monotonic() - started < 4 and states(outcome) == {"job": "waiting"}
    assert attempts(tmp_path / "job")[0]["status"] == -signal.SIGKILL


def test_a_stage_that_needs_more_time_than_is_left_is_not_started_but_one_longer_than_any_limit_is(tmp_path):
    first = ShellJob("first", tmp_path / "first", "sleep 1 && touch train.done evaluate.done")
    long = ShellJob("long", tmp_path / "long", needed_seconds=60.0)
    outcome, _ = run([first, long], num_parallel=1, seconds=9.5)
    assert states(outcome) == {"first": "done", "long": "waiting"} and not (tmp_path / "long").exists()
    outcome, _ = run([first, long], num_parallel=1, seconds=9.5)
    assert states(outcome) == {"first": "done", "long": "done"}


def test_evaluations_come_before_trainings(tmp_path):
    note = "basename $PWD >> ../order"
    jobs = [ShellJob(f"job{i}", tmp_path / f"job{i}", f"{note} && touch train.done", f"{note} && touch evaluate.done") for i in range(2)]
    run(jobs, num_parallel=1)
    assert (tmp_path / "order").read_text().split() == ["job0", "job0", "job1", "job1"]


def test_a_failure_stops_neither_the_others_nor_hides_its_log(tmp_path, capsys):
    from benchmarks.quality.run import SOME_FAILED, summarize

    jobs = [
        ShellJob("bad", tmp_path / "bad", "echo the reason; exit 7"),
        ShellJob("empty", tmp_path / "empty", "echo did nothing"),
        ShellJob("good", tmp_path / "good"),
    ]
    outcome, _ = run(jobs)
    assert states(outcome) == {"bad": "failed", "empty": "failed", "good": "done"}
    assert summarize(outcome) == SOME_FAILED
    printed = capsys.readouterr().out
    assert "bad: train ended with status 7" in printed and "    the reason" in printed
    assert "empty: train ended with status 0, but what it must leave is not there" in printed and "1 done, 2 failed" in printed


def test_the_exit_status_tells_done_from_more_to_do(tmp_path):
    from benchmarks.quality.run import ALL_DONE, MORE_TO_DO, summarize

    assert summarize(run([ShellJob("job", tmp_path / "job")])[0]) == ALL_DONE
    stopped = ShellJob("stopped", tmp_path / "stopped", "sleep 60")
    assert summarize(run([stopped], seconds=4.0, grace_seconds=3.0)[0]) == MORE_TO_DO


DRIVER = """
import sys
from pathlib import Path
from test_job import ShellJob, run, states
outcome, _ = run([ShellJob("job", Path(sys.argv[1]), sys.argv[2])])
print(states(outcome))
"""


def start_driver(tmp_path, training):
    (tmp_path / "test_job.py").write_bytes(Path(__file__).read_bytes())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")))}
    arguments = [sys.executable, "-c", DRIVER, str(tmp_path / "job"), training]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True)


def wait_for(path):
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def test_a_driver_that_is_interrupted_lets_its_trainings_save(tmp_path):
    training = "trap 'touch saved; exit 143' TERM; touch started; while true; do sleep 0.05; done"
    driver = start_driver(tmp_path, training)
    wait_for(tmp_path / "job" / "started")
    driver.send_signal(signal.SIGINT)
    assert driver.communicate(timeout=20)[0].strip() == "{'job': 'waiting'}"
    assert (tmp_path / "job" / "saved").exists()


def test_a_job_whose_process_outlived_its_driver_is_left_alone(tmp_path):
    # it ends by itself should the test fail
    training = "touch started; for i in $(seq 1200); do test -e go && break; sleep 0.05; done; touch train.done evaluate.done"
    driver = start_driver(tmp_path, training)
    wait_for(tmp_path / "job" / "started")
    driver.kill()
    driver.communicate()
    job = ShellJob("job", tmp_path / "job", "touch twice")
    outcome, lines = run([job])
    assert states(outcome) == {"job": "running elsewhere"} and not (tmp_path / "job" / "twice").exists() and "still works on it" in lines[0]
    (tmp_path / "job" / "go").touch()
    wait_for(tmp_path / "job" / "evaluate.done")
    assert states(run([job])[0]) == {"job": "done"}


def test_the_environment_of_a_process_is_of_no_group_and_shares_the_cores():
    from benchmarks.quality.run import process_environments

    launched = {
        "RANK": "3",
        "WORLD_SIZE": "8",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "x",
        "GBLA_REC_METRICS_PORT": "9",
        "HOME": "/",
    }
    (alone,) = process_environments(launched, 2, None)
    assert not set(launched) & set(alone) - {"HOME"} and alone["HOME"] == "/"
    assert int(alone["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)
    on_gpus = list(process_environments({}, 1, ["2", "5"]))
    assert [(found["CUDA_VISIBLE_DEVICES"], found["OMP_NUM_THREADS"]) for found in on_gpus] == [("2", "1"), ("5", "1")]
