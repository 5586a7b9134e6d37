"""What README, docs and recipes say of retrieval quality, and of what it costs, is what the committed reports say."""

import itertools
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
README, TABLES, RECIPES = "README.md", "benchmarks/quality/README.md", "gbla_rec/recipes.py"
SETS = {"Amazon Beauty": "amazon_beauty", "Amazon Sports": "amazon_sports", "ml-latest-small": "movielens_small"}
SCORES = {"core": ("joint", "generative", "item"), "ablation": ("generative",)}
GPUS = 4
"""Of the machine whose seconds runs share."""
MANY = 24
"""Runs at once that kept four GPUs busy for sure."""
AIM = 75
"""Seconds of a GPU that a seed may cost."""
FEW = 12
"""With fewer runs at once four GPUs were not busy."""
Rows = list[dict[str, Any]]


def report(table: str, dataset: str) -> dict[str, Any]:
    return dict(json.loads((ROOT / "benchmarks" / "results" / f"quality_{table}_{dataset}.json").read_text()))


def row(rows: Rows, **wanted: Any) -> dict[str, Any]:
    (found,) = [line for line in rows if wanted.items() <= line.items()]
    return found


def short(value: float, digits: int = 4) -> str:
    """As pages write shares: no zero before the point."""
    return f"{value:.{digits}f}".replace("0.", ".", 1)


def figure(table: str, dataset: str, name: str, score: str, metric: str = "Recall@10") -> dict[str, Any]:
    return row(report(table, dataset)["details"]["All figures"], configuration=name, score=score, metric=metric)


def both(table: str, dataset: str, name: str, score: str) -> str:
    """``.0893 / .0515``."""
    return " / ".join(short(figure(table, dataset, name, score, metric)["mean"]) for metric in ("Recall@10", "NDCG@10"))


def recall(table: str, dataset: str, name: str, score: str = "generative", metric: str = "Recall@10", digits: int = 4) -> str:
    return short(figure(table, dataset, name, score, metric)["mean"], digits)


def pair(table: str, dataset: str, first: str, second: str, metric: str = "Recall@10") -> dict[str, str]:
    """Difference and intervals of main scores, as pages write them."""
    lines = report(table, dataset)["tables"]["Main scores, row against row"]
    (found,) = [line for line in lines if (line["first"].split()[0], line["second"].split()[0], line["metric"]) == (first, second, metric)]
    return {name: str(found[name]).replace("0.", ".") for name in ("difference", "over users", "over users and seeds")}


def statements() -> Iterator[tuple[str, str]]:
    """Page, and words that must be on it."""
    yield from of_the_main_tables()
    yield from of_intervals()
    yield from of_inputs_and_baselines()
    yield from of_films()
    yield from of_distance()
    yield from of_windows_and_direction()
    yield from of_cold_items()
    yield from of_cost()


def of_the_main_tables() -> Iterator[tuple[str, str]]:
    for title, dataset in SETS.items():
        table = "core" if dataset.startswith("amazon") else "ablation"
        link = f"[{title}](benchmarks/results/quality_{table}_{dataset}.md)"
        ours, softmax = ([both(table, dataset, name, score) for score in SCORES[table]] for name in ("sggs", "ssss"))
        if table == "ablation":
            yield README, f"| {link}, generated | {ours[0]} | {softmax[0]} | |"
            continue
        yield README, f"| {link}, `joint` | {ours[0]} | {softmax[0]} | {both(table, dataset, 'sasrec-ce', 'item')} |"
        yield README, f"| generated | {ours[1]} | {softmax[1]} | |"
        joint, generated, item = (words.split(" / ") for words in ours)
        yield RECIPES, f"joint Recall@10 {joint[0]}, NDCG@10 {joint[1]}; generative alone"
        yield RECIPES, f"{generated[0]}, {generated[1]}; item-level head alone {item[0]}, {item[1]}"
        yield RECIPES, "; ".join(pair_of.replace(" / ", ", ") for pair_of in softmax)
    text, behaviour = (both("core", f"amazon_beauty{more}", "sggs", "joint") for more in ("", "_text_and_behaviour"))
    yield TABLES, f"`{behaviour}` where those of text have `{text}`"
    generated = [both("core", f"amazon_beauty{more}", "sggs", "generative") for more in ("", "_text_and_behaviour")]
    yield (
        "docs/decisions/0014-semantic-ids.md",
        f"{text} against {behaviour} with both heads, generated {generated[0]} against {generated[1]}",
    )


def of_intervals() -> Iterator[tuple[str, str]]:
    minus = {"ssss": "softmax attention", "sasrec-ce": "SASRec"}
    for dataset, title in (("amazon_beauty", "Amazon Beauty"), ("amazon_sports", "Amazon Sports")):
        for other, words in minus.items():
            pairs = [pair("core", dataset, "sggs", other, metric)["over users and seeds"] for metric in ("Recall@10", "NDCG@10")]
            yield README, f"| {title}, `joint`, minus {words} | {' | '.join(pairs)} |"
    lost = pair("core", "amazon_beauty", "sggs", "ssss")["over users and seeds"].split()[0].removeprefix("-")
    yield README, f"a loss of more than {lost} Recall@10 of `joint` is ruled out"
    films = []
    for metric in ("Recall@10", "NDCG@10"):
        # the report has the pair the other way round
        ends = pair("ablation", "movielens_small", "ssss", "sggs", metric)["over users and seeds"].split(" to ")
        films.append(" to ".join(turned(end) for end in ends[::-1]))
    yield README, f"| ml-latest-small, generated, minus softmax attention | {' | '.join(films)} |"
    generated = [figure("core", "amazon_beauty", "sggs", "generative", metric) for metric in ("Recall@10", "NDCG@10")]
    recall_words, ndcg_words = (
        f"{signed(line['difference'])}, {signed(line['difference low'])} to {signed(line['difference high'])}" for line in generated
    )
    yield TABLES, f"(Recall@10 {recall_words}; NDCG@10 {ndcg_words}: [core]"
    line = figure("baselines", "amazon_beauty", "sggs", "generative", "NDCG@10")
    words = f"{signed(line['difference'])}, {signed(line['difference low'])} to {signed(line['difference high'])}"
    yield TABLES, f"(NDCG@10 {words}: [baselines]"


def signed(value: float) -> str:
    return f"{value:+.4f}".replace("0.", ".")


def turned(end: str) -> str:
    """The same end of the opposite difference."""
    return end.replace("-", "+") if end.startswith("-") else end.replace("+", "-")


def of_inputs_and_baselines() -> Iterator[tuple[str, str]]:
    inputs, baselines = (partial(both, table, "amazon_beauty") for table in ("inputs", "baselines"))
    yield TABLES, f"ids alone `joint` {inputs('sggs-ids', 'joint')} ("
    yield TABLES, f"trained to generate alone {inputs('sggs-generative', 'generative')},"
    yield TABLES, f"a token for each code {inputs('sggs-code-tokens', 'generative')} ("
    tiger, sasrec = baselines("tiger", "generative"), baselines("sasrec-ce-ids", "item")
    yield TABLES, f"TIGER-style encoder-decoder {tiger}, SASRec on ids alone {sasrec}."
    bce = recall("baselines", "amazon_beauty", "sasrec-bce", "item")
    yield TABLES, f"it has learnt little by then: {bce} Recall@10"


def of_films() -> Iterator[tuple[str, str]]:
    films = {
        line["configuration"]: short(line["mean"])
        for line in report("ablation", "movielens_small")["details"]["All figures"]
        if line["metric"] == "Recall@10"
    }
    parts = sorted(films[name] for name in ("linear", "linear-conv", "linear-conv-key"))
    words = f"{parts[0]} to {parts[-1]}, all of GBLA {films['gggg']}, softmax attention {films['ssss']}, hybrids"
    hybrids = f"`SGG` {films['sgg']} and `SGGS` {films['sggs']}, causal `SGGS` {films['sggs-causal']}"
    yield TABLES, f"{words} {hybrids}, windowed `WGG` {films['wgg']} and `WGGW` {films['wggw']}, item-kNN {films['item-kNN']}"


def of_distance() -> Iterator[tuple[str, str]]:
    hybrid, windowed = (recall("long_range", "long_range_1000", name, metric="Recall@1", digits=2) for name in ("sgg", "wgg-256"))
    yield README, f"1.00 with softmax attention and {hybrid} with `SGG` ("
    yield TABLES, f"`sgg` has Recall@1 {hybrid} and `wgg-256` {windowed}"
    lost = pair("long_range", "long_range_1000", "sss", "sgg", "Recall@1")
    yield TABLES, f"`sss` minus `sgg` is {lost['difference']} Recall@1: {lost['over users']} over users"
    yield TABLES, f"one seed of three makes it, {lost['over users and seeds']} over users and seeds"
    rows = {line["configuration"] for line in report("long_range", "long_range_10000")["details"]["Single runs"]}
    farthest = sorted(float(recall("long_range", "long_range_10000", name, metric="Recall@1", digits=2)) for name in rows)
    yield TABLES, f"Recall@1 {short(farthest[0], 2)} to {short(farthest[-1], 2)}, below the .25 of a guess"
    far: dict[str, list[str]] = {}
    for line in sorted(report("long_range", "long_range_to_10000")["details"]["Single runs"], key=lambda line: int(line["seed"])):
        far.setdefault(line["configuration"], []).append(short(line["Recall@1"], 2))
    assert {len(recalls) for recalls in far.values()} == {3}, "pages say of how many seeds"
    seeds = {name: "{}, {} and {}".format(*recalls) for name, recalls in far.items()}
    windowed = sorted(far["www-256"] + far["wgg-256"])
    yield TABLES, f"`sgg` {seeds['sgg']}, `sss` {seeds['sss']}, `ggg` {seeds['ggg']}, `ggg-no-key` {seeds['ggg-no-key']}, `ggg-linear`"
    yield TABLES, f"`ggg-linear` {seeds['ggg-linear']}; `www-256` and `wgg-256` {windowed[0]} to {windowed[-1]}"
    whole = f"`SGG` {seeds['sgg']}, softmax attention {seeds['sss']}, `GGG` {seeds['ggg']}, plain linear attention {seeds['ggg-linear']}"
    yield README, f"{whole}; windows of 256, alone or in a hybrid, {windowed[0]} to {windowed[-1]}."
    near = [line for line in report("long_range", "long_range_100")["details"]["Single runs"] if line["configuration"] == "ggg"]
    yield TABLES, f"at {short(min(line['Recall@1'] for line in near), 2)} with the third when training ended"


def of_windows_and_direction() -> Iterator[tuple[str, str]]:
    for title, dataset in SETS.items():
        found = pair("ablation", dataset, "sgg", "wgg")
        yield TABLES, f"{title} {found['difference']} ({found['over users and seeds']})"
    beauty, films = (pair("ablation", dataset, "sggs", "sggs-causal") for dataset in ("amazon_beauty", "movielens_small"))
    yield TABLES, f"as above: Amazon Beauty {beauty['difference']} ({beauty['over users and seeds']})"
    yield TABLES, f"ml-latest-small {films['difference']} ({films['over users and seeds']})"


def of_cold_items() -> Iterator[tuple[str, str]]:
    users = {}
    for title, dataset in list(SETS.items())[:2]:
        for path in (ROOT / "benchmarks" / "results").glob(f"quality_*_{dataset}.json"):
            tables = json.loads(path.read_text())["tables"]
            (cold,) = [lines for name, lines in tables.items() if name.startswith("By training events of the target")]
            slices = [line for line in cold if line["slice"] == "0"]
            assert slices and all(line["Recall@50"] == 0 for line in slices), (
                f"{path.name} has a row that finds cold items: say so in {TABLES}"
            )
            users[title] = slices[0]["users"]
    counts = [
        f"{count} test users of {title}" if place == 0 else f"{count} of {title}" for place, (title, count) in enumerate(users.items())
    ]
    yield TABLES, f"Of {' and '.join(counts)} no training event has the target"


def seconds(line: dict[str, Any]) -> float:
    """Of one GPU."""
    return GPUS * float(line["train share of the machine (s)"] + line["evaluate share of the machine (s)"])


def at_once(line: dict[str, Any]) -> float:
    """Runs that trained at the same time, on average."""
    return float(line["train s"] / line["train share of the machine (s)"])


def of_cost() -> Iterator[tuple[str, str]]:
    def between(lines: Rows, joint: str = " to ") -> str:
        spent = sorted(map(seconds, lines))
        return f"{spent[0]:.0f}{joint}{spent[-1]:.0f}"

    def costs(table: str, dataset: str, *others: str) -> Rows:
        return [line for line in report(table, dataset)["tables"]["Cost"] if line["configuration"] not in others]

    # the causal hybrid ran on two machines, the second time beside runs of another call
    beauty = costs("ablation", "amazon_beauty", "sggs-causal")
    filled = [line for line in beauty if at_once(line) > MANY]
    yield TABLES, f"rows of `ablation` on Amazon Beauty take {between(filled)},"
    yield TABLES, f"those of `core` on Amazon Sports {between(costs('core', 'amazon_sports', 'sasrec-ce'))},"
    yield TABLES, f"of `long_range_1000` {between(costs('long_range', 'long_range_1000'))},"
    films, slow = (
        costs("ablation", "movielens_small", "sggs-causal"),
        row(costs("ablation", "movielens_small"), configuration="sggs-causal"),
    )
    yield TABLES, f"of `ablation` on ml-latest-small {between(films)} (causal: {seconds(slow):.0f})"
    sasrec = [
        line for dataset in ("amazon_beauty", "amazon_sports") for line in costs("core", dataset) if line["configuration"] == "sasrec-ce"
    ]
    sasrec += [line for line in costs("baselines", "amazon_beauty") if line["configuration"].startswith("sasrec")]
    few = [line for line in costs("long_range", "long_range_100") if at_once(line) < FEW - 3]
    assert len(few) == 5
    above = f"SASRec with {between(sasrec)} and five of `long_range_100` with {between(few)}"
    late = sorted((line for line in beauty if seconds(line) > AIM), key=seconds, reverse=True)
    words = [f"`{line['configuration']}` with {seconds(line):.0f}" for line in late]
    yield TABLES, f"{above}; and on Amazon Beauty {', '.join(words[:-1])} and {words[-1]}."
    for dataset in ("amazon_beauty", "amazon_sports"):
        line = row(costs("core", dataset), configuration="sggs")
        yield RECIPES, f"{line['train s'] + line['evaluate s']:.0f} s a run, {seconds(line):.0f} s of one GPU"


@pytest.mark.parametrize(("page", "words"), list(statements()))
def test_a_page_quotes_the_committed_table(page: str, words: str) -> None:
    text = " ".join((ROOT / page).read_text().replace("``", "`").split())
    assert words in text, f"by benchmarks/results, {page} must say: {words}"


def contains_0(interval: str) -> bool:
    low, high = map(float, interval.split(" to "))
    return low <= 0 <= high


def test_intervals_over_users_and_seeds_contain_0_where_pages_say_so() -> None:
    assert "no part alone has an interval over users and seeds that excludes 0" in " ".join((ROOT / TABLES).read_text().split())
    parts = itertools.pairwise(("linear", "linear-conv", "linear-conv-key", "gggg"))
    of_parts = [("ablation", dataset, *names) for names in parts for dataset in ("amazon_beauty", "movielens_small")]
    of_sports = [("core", "amazon_sports", "sggs", other) for other in ("ssss", "sasrec-ce")]
    for where in (*of_parts, *of_sports):
        for metric in ("Recall@10", "NDCG@10"):
            assert contains_0(pair(*where, metric)["over users and seeds"]), (where, metric)
    far = ("sss", "ggg", "ggg-no-key", "ggg-linear", "sgg")
    for names in itertools.combinations(far, 2):
        assert contains_0(pair("long_range", "long_range_to_10000", *names, "Recall@1")["over users and seeds"]), names
