"""Comparisons of runs made by hand: exact where nothing differs, covering what was planted, blind to the order of seeds."""

import copy
import json
from typing import Any

import numpy as np
import pytest

from gbla_rec.evaluation.compare import compare
from gbla_rec.evaluation.comparison_table import comparison_table, comparisons_markdown
from gbla_rec.evaluation.run_group import RunGroup, common_name

NUM_USERS = 200


def group_of(evaluated_runs: Any, name: str, mean: float, seed_sd: float, generator: np.random.Generator, **changes: Any) -> RunGroup:
    """Three seeds around ``mean``, whose users share their difficulty with all groups."""
    difficulty = np.random.default_rng(9).standard_normal(NUM_USERS) * 0.3
    for seed in range(3):
        values = mean + seed_sd * generator.standard_normal() + difficulty + 0.02 * generator.standard_normal(NUM_USERS)
        evaluated_runs.write(name, seed, values, **changes)
    return RunGroup.find([name])


def without_runs(comparison: dict[str, Any]) -> dict[str, Any]:
    return {key: comparison[key] for key in ("metrics", "slices", "protocol", "method")}


def test_runs_compared_with_themselves_differ_by_zero_with_certainty(evaluated_runs: Any) -> None:
    group = group_of(evaluated_runs, "a", 0.5, 0.1, np.random.default_rng(0))
    found = compare(group, group)
    for part in (found, *found["slices"]["history_length"], *found["slices"]["rarest_target_events"]):
        for metric in ("Recall@10", "NDCG@10"):
            assert [part["metrics"][metric][key] for key in ("difference", "low", "high", "seeds_low", "seeds_high")] == [0.0] * 5
    alone = RunGroup.of(group.runs[:1])
    single = compare(alone, alone)["metrics"]["Recall@10"]
    assert (single["low"], single["high"], single["seeds_low"], single["first_seed_sd"]) == (0.0, 0.0, None, None), "one seed has no spread"


def test_the_order_of_seeds_and_of_directories_changes_nothing(evaluated_runs: Any) -> None:
    generator = np.random.default_rng(0)
    first, second = group_of(evaluated_runs, "a", 0.5, 0.02, generator), group_of(evaluated_runs, "b", 0.4, 0.02, generator)
    found = compare(first, second)
    directories = [[run.run_dir for run in group.runs] for group in (first, second)]
    for order in ([2, 0, 1], [1, 2, 0]):
        again = compare(*(RunGroup.find([part[place] for place in order]) for part in directories))
        assert again == found
    assert [run["seed"] for run in found["first"]["runs"]] == [0, 1, 2]


def test_the_opposite_comparison_is_the_negative(evaluated_runs: Any) -> None:
    generator = np.random.default_rng(0)
    first, second = group_of(evaluated_runs, "a", 0.5, 0.0, generator), group_of(evaluated_runs, "b", 0.4, 0.0, generator)
    forth, back = (compare(*pair)["metrics"]["Recall@10"] for pair in ((first, second), (second, first)))
    assert (back["difference"], back["low"], back["high"]) == pytest.approx((-forth["difference"], -forth["high"], -forth["low"]))
    assert forth["low"] < 0.1 < forth["high"] and forth["high"] - forth["low"] < 0.02, "pairing takes the users' difficulty out"


@pytest.mark.slow
def test_intervals_cover_a_planted_difference_and_seeds_need_their_own(evaluated_runs: Any) -> None:
    covered = {"low": 0, "seeds_low": 0}
    for trial in range(80):
        generator = np.random.default_rng(trial)
        first = group_of(evaluated_runs, f"a{trial}", 0.5, 0.01, generator)
        second = group_of(evaluated_runs, f"b{trial}", 0.45, 0.01, generator)
        found = compare(first, second, num_samples=200)["metrics"]["Recall@10"]
        for low in covered:
            covered[low] += found[low] < 0.05 < found[low.replace("low", "high")]
    assert covered["seeds_low"] >= 0.8 * 80, "users and seeds"
    assert covered["low"] <= 0.5 * 80, "over users alone, new seeds are not covered"


def test_a_name_takes_the_newest_run_of_each_seed_and_a_star_any_name(evaluated_runs: Any) -> None:
    values = np.linspace(0, 1, NUM_USERS)
    evaluated_runs.write("films_s0", 0, values, started="1")
    newest = evaluated_runs.write("films_s0", 0, values, started="2")
    other = evaluated_runs.write("films_s1", 1, values)
    assert [run.run_dir for run in RunGroup.find(["films_s*"]).runs] == [newest, other]
    assert [run.run_dir for run in RunGroup.find([newest, "films_s1", str(newest)]).runs] == [newest, other]


def test_a_baseline_and_another_score_can_be_compared(evaluated_runs: Any) -> None:
    group = group_of(evaluated_runs, "a", 0.5, 0.0, np.random.default_rng(0))
    found = compare(group, group, first_method="generative", second_method="item-kNN")
    assert found["metrics"]["Recall@10"]["second"] == 0.25
    assert found["metrics"]["Recall@10"]["difference"] == pytest.approx(found["metrics"]["Recall@10"]["first"] - 0.25)


def test_two_methods_of_one_group_stand_in_columns_of_their_own_names(evaluated_runs: Any) -> None:
    group = group_of(evaluated_runs, "a", 0.5, 0.0, np.random.default_rng(0))
    text = comparisons_markdown([compare(group, group, first_method="generative", second_method="item-kNN")])
    assert "| metric | generative | item-kNN | difference |" in text and "a (generative) minus a (item-kNN)" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"content_hash": "xyz"}, r"the same dataset: .*runs/a/1-0 has content abc, .*runs/b/1-0 has content xyz"),
        ({"split": "validation"}, r"the same split: .*runs/a/1-0 has test, .*runs/b/1-0 has validation"),
        ({"first_user": 7}, r"the same users: .*runs/a/1-0 has 200, .*runs/b/1-0 has 200 or others"),
    ],
)
def test_runs_on_other_data_are_refused_by_name(evaluated_runs: Any, changes: dict[str, Any], message: str) -> None:
    values = np.linspace(0, 1, NUM_USERS)
    pair = [RunGroup.find([evaluated_runs.write("a", 0, values)]), RunGroup.find([evaluated_runs.write("b", 0, values, **changes)])]
    with pytest.raises(ValueError, match=message):
        compare(*pair)


def test_runs_of_the_same_semantic_ids_are_a_group_however_these_were_made(evaluated_runs: Any) -> None:
    values = np.linspace(0, 1, NUM_USERS)
    runs = [evaluated_runs.write("a", 0, values), evaluated_runs.write("b", 1, values)]
    for run_dir, embedding in zip(runs, ("text", "auto"), strict=True):
        path = run_dir / "results.json"
        results = json.loads(path.read_text())
        results["config"]["semantic_ids"] = {"embedding": embedding}
        path.write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"differ in semantic_ids\.embedding"):
        RunGroup.find(runs)
    for hashes, are_same in ((("x", "y"), False), (("x", "x"), True)):
        for run_dir, content in zip(runs, hashes, strict=True):
            (run_dir / "version.json").write_text(json.dumps({"semantic_ids_hash": content}))
        if are_same:
            assert [run.run_dir for run in RunGroup.find(runs).runs] == runs
        else:
            with pytest.raises(ValueError, match=r"differ in semantic_ids\.embedding"):
                RunGroup.find(runs)


def test_a_run_from_before_an_option_is_one_with_its_default(evaluated_runs: Any) -> None:
    values = np.linspace(0, 1, NUM_USERS)
    runs = [evaluated_runs.write(name, seed, values) for seed, name in enumerate("abc")]
    for run_dir, stream in zip(runs[1:], ({"exclude_evaluated": False}, {"exclude_evaluated": True}), strict=True):
        path = run_dir / "results.json"
        results = json.loads(path.read_text())
        results["config"]["stream"] = stream
        path.write_text(json.dumps(results))
    assert [run.run_dir for run in RunGroup.find(runs[:2]).runs] == runs[:2]
    with pytest.raises(ValueError, match=r"differ in stream\.exclude_evaluated \(false, true\)"):
        RunGroup.find([runs[0], runs[2]])


@pytest.mark.parametrize("left_out", ["per_user", "config"])
def test_results_without_what_is_compared_are_to_be_made_again(evaluated_runs: Any, left_out: str) -> None:
    run_dir = evaluated_runs.write("a", 0, np.linspace(0, 1, NUM_USERS))
    results = json.loads((run_dir / "results.json").read_text())
    del results[left_out]
    (run_dir / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"results\.json was written by an older version; evaluate again: gbla-rec evaluate --run-dir"):
        RunGroup.find([run_dir])


def test_groups_of_unlike_runs_and_missing_values_are_refused_by_name(evaluated_runs: Any) -> None:
    values = np.linspace(0, 1, NUM_USERS)
    first, other = evaluated_runs.write("a", 0, values), evaluated_runs.write("b", 1, values, pattern="SSS")
    said = r"differ in the seed only, .*runs/a/1-0 and .*runs/b/1-1 differ in model\.encoder\.pattern \(SGG, SSS\); make two groups .* --a"
    with pytest.raises(ValueError, match=said):
        RunGroup.find([first, other])
    with pytest.raises(ValueError, match=r"distinct seeds, .*runs/a/1-0 and .*runs/c/1-0 both have 0"):
        RunGroup.find([first, evaluated_runs.write("c", 0, values)])
    with pytest.raises(
        FileNotFoundError, match=r"no evaluated run called 'd' in .*; none was trained under this name; .* called: a, b, c$"
    ):
        RunGroup.find(["d"])
    (evaluated_runs.write("d", 0, values) / "results.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no evaluated run called 'd' in .*; evaluate one: gbla-rec evaluate --name d$"):
        RunGroup.find(["d"])
    group = RunGroup.find([first])
    with pytest.raises(ValueError, match=r"has no score 'joint' .--score, --a-score, --b-score.; it has generative, a, item-kNN"):
        compare(group, group, first_method="joint")
    with pytest.raises(ValueError, match=r"not evaluated with the own history removed; .* --both-histories"):
        compare(group, group, history="removed")
    (first / "per_user.parquet").write_bytes(b"PAR1 of another evaluation")
    with pytest.raises(ValueError, match=r"per_user\.parquet does not belong to the results\.json beside it"):
        compare(group, group)


def test_tables_show_means_spread_and_both_intervals(evaluated_runs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    generator = np.random.default_rng(0)
    found = compare(group_of(evaluated_runs, "a", 0.5, 0.02, generator), group_of(evaluated_runs, "b", 0.4, 0.02, generator))
    recall = found["metrics"]["Recall@10"]
    text = comparisons_markdown([found])
    Console(width=200).print(comparison_table(found))
    for shown in (text, capsys.readouterr().out):
        assert f"{recall['first']:.4f} ± {recall['first_seed_sd']:.4f}" in shown
        assert f"{recall['low']:+.4f} to {recall['high']:+.4f}" in shown
        assert f"{recall['seeds_low']:+.4f} to {recall['seeds_high']:+.4f}" in shown
    assert "| 0-9 | 50 |" in text and "runs/b/1-2" in text and "Owen" in text
    single = copy.deepcopy(found)
    single["metrics"]["Recall@10"] |= {"seeds_low": None, "first_seed_sd": None}
    assert "| one seed |" in comparisons_markdown([single])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["beauty.sggs.seed0", "beauty.sggs.seed1"], "beauty.sggs"),
        (["beauty_s0", "beauty_s1", "beauty_s12"], "beauty"),
        (["beauty", "beauty"], "beauty"),
        (["beauty_s10", "beauty_s11"], "beauty"),
        (["films0", "films1"], "films"),
        (["classes-1"], "classes-1"),
        (["b", "a", "b"], "a + b"),
        (["shop_sss", "shop"], "shop + shop_sss"),
        (["k", "k2"], "k + k2"),
        (["0", "1"], "0 + 1"),
    ],
)
def test_a_group_is_called_by_the_one_name_of_its_seeds_or_by_all_names_of_its_runs(names: list[str], expected: str) -> None:
    assert common_name(names) == expected
