"""What README and docs say of speed and memory is what the committed reports say, and each report's page is that of its JSON."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
BUDGET = 262_144
KERNELS = "docs/kernels.md"


def report(name: str) -> dict[str, Any]:
    return dict(json.loads((RESULTS / f"{name}.json").read_text()))


def row(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    (found,) = [line for line in rows if wanted.items() <= line.items()]
    return found


def short(value: float) -> str:
    """Two digits after the point, and no zero before it, as the pages write shares."""
    return f"{value:.2f}".removeprefix("0")


def times(ratio: float) -> str:
    """How many times as fast: two digits after the point below 2, one above."""
    return short(ratio) if ratio < 1 else f"{ratio:.2f}" if ratio < 2 else f"{ratio:.1f}"


def statements() -> Iterator[tuple[str, str]]:
    """Page, and words that must be on it."""
    yield from of_commits()
    yield from of_the_layer()
    yield from of_the_op()
    yield from of_an_h100()
    yield from of_the_ops_kernels()
    yield from of_the_convolution()
    yield from of_softmax_attention()
    yield from of_the_step()
    yield from of_several_gpus()
    first = [line for line in report("cold_start")["rows"] if line["Triton cache"] == "empty"]
    forward, backward = (sorted(line[f"op {name} (s)"] for line in first) for name in ("forward", "backward"))
    both = sorted(line["op forward (s)"] + line["op backward (s)"] for line in first)
    yield "README.md", f"forward {forward[0]:.0f} to {forward[-1]:.0f} s, backward {backward[0]:.0f} to {backward[-1]:.0f} s"
    each = f"forward takes {forward[0]:.0f} to {forward[-1]:.0f} s and its backward {backward[0]:.0f} to {backward[-1]:.0f} s"
    yield "kernels/README.md", f"on an H200 the op's {each}"
    yield "docs/launching.md", f"the op alone takes {both[0]:.0f} to {both[-1]:.0f} s"
    yield KERNELS, host_cost()
    data = [line for line in report("data_stream")["rows"] if line["ranks"] == 1]
    few, many = sorted((line for line in data if line["history length"] == 2048), key=lambda line: line["items"])
    rate, slowest = "with collate: Mtokens/CPU s", "slowest run: Mtokens/CPU s"
    rates = f"{few[rate]:.1f} M tokens/s on one core, {few[slowest]:.1f} M in the slowest of five runs; {many[rate]:.1f} M with 4 M items"
    yield "README.md", rates
    yield "docs/training.md", f"one core makes {few[rate]:.1f} M/s of such histories, {many[rate]:.1f} M with 4 M items"
    yield "docs/training.md", f"Histories of 9 events come at {row(data, **{'history length': 9})[rate]:.1f} M tokens/s a core"


def of_commits() -> Iterator[tuple[str, str]]:
    """Which kernels a report is of, on either GPU."""
    names = ("gbla_layer", "linear_attention", "op_parts", "cold_start", "kernel_counters", "causal_conv1d", "softmax_attention")
    for name in names:
        commits = {}
        for found in (report(place) for place in (name, f"h100/{name}") if (RESULTS / f"{place}.json").exists()):
            commits["H100" if "H100" in found["hardware"]["gpu"] else "H200"] = f" {found['commit'][:7]} "
        words = "softmax_attention, with cross-attention" if name == "softmax_attention" else name
        yield KERNELS, f"| {words} |{commits.get('H200', ' ')}|{commits.get('H100', ' ')}|"


def host_cost() -> str:
    """Of an eager call, of its peer and of one without a layout."""
    calls = report("cold_start")["tables"]["Host cost of an eager call"]
    names = ("gated_linear_attention", "torch scaled_dot_product_attention", "gated_linear_attention without layout")
    ours, peer, bare = ([row(calls, call=name)[f"{which} (us)"] for which in ("forward", "forward+backward")] for name in names)
    source = "([cold_start](../benchmarks/results/cold_start.md), beside an H200; "
    costs = f"costs the host {ours[0]:.0f} us, with backward {ours[1]:,.0f} {source}"
    peers = f"scaled_dot_product_attention: {peer[0]:.0f} and {peer[1]:.0f})"
    return f"{costs}{peers}, and without a layout {bare[0]:,.0f} and {bare[1]:,.0f}:"


def of_the_layer() -> Iterator[tuple[str, str]]:
    layer = report("gbla_layer")["rows"]
    lengths = (512, 1024, 1536, 2048, 4096, 8192, 32768, 131072)
    for width in (512, 1024):
        for which, words in (("forward", "forward"), ("forward+backward", "with backward")):
            of_width = {"D": width, "pass": which}
            cells = [times(row(layer, **{"rows x tokens": f"1 x {length}"}, **of_width)["faster"]) for length in lengths]
            yield "README.md", f"| D = {width:,}, {words} | {' | '.join(cells)} |"
    parts = report("gbla_layer")["tables"]["Parts of the GBLA layer, forward, each alone"]
    words = {
        512: "Of its {:.0f} us at D = 512 the layer has {:.0f} in the first product and {:.0f} in the last one",
        1024: "of its {:.0f} at D = 1,024 it has {:.0f} and {:.0f}",
    }
    for width in (512, 1024):
        line = row(parts, **{"rows x tokens": "1 x 32768", "D": width})
        products = 1000 * (line["in-projection (ms)"] + line["out-projection (ms)"])
        whole, first, last = (1000 * line[f"{part} (ms)"] for part in ("layer", "in-projection", "out-projection"))
        yield KERNELS, f"the two products, {products:.0f} of {whole:.0f} us"
        yield KERNELS, words[width].format(whole, first, last)


def of_the_op() -> Iterator[tuple[str, str]]:
    op = report("linear_attention")["rows"]

    def figures(case: str, which: str, column: str) -> tuple[float, ...]:
        return tuple(row(op, **{"rows x tokens": case, "K": width, "pass": which})[column] for width in (64, 128))

    long, packed, both = "1 x 32768", "32 x 2048", "forward+backward"

    def cells(case: str, column: str, write: Callable[[float], str]) -> str:
        pairs = zip(*(figures(case, which, column) for which in ("forward", both)), strict=True)
        return " | ".join(", ".join(write(figure) for figure in pair) for pair in pairs)

    of_floor = cells(long, "of floor", lambda share: f"{100 * share:.0f} %")
    yield "README.md", f"at the speed of a copy ([why](docs/kernels.md)) | {of_floor} |"
    for case, words in ((long, "one row of 32,768"), (packed, "32 rows of 2,048")):
        equal = cells(case, "flash_bla equal / ours", lambda ratio: f"{ratio:.1f}")
        yield "README.md", f"| {words}: times as fast as flash_bla with equal work | {equal} |"
    bare = cells(packed, "flash_bla bare / ours", times)
    yield "README.md", f"| 32 rows of 2,048: times as fast as flash_bla's bare op, which has less to do | {bare} |"
    parts = report("op_parts")["rows"]
    ours, peer = (
        [row(parts, **{"rows x tokens": packed, "pass": which, "variant": variant})["ms"] for which in ("forward", both)]
        for variant in ("none of these", "flash_bla")
    )
    yield "README.md", f"| the same with that work left out of ours, too | {times(peer[0] / ours[0])}, {times(peer[1] / ours[1])} | |"
    share = row(parts, **{"rows x tokens": packed, "pass": "forward", "variant": "none of these"})["of floor"]
    yield KERNELS, costs_of_parts(parts, packed)
    bare_words = f"{1e3 * ours[0]:.0f} us, {100 * share:.0f} % of its floor, where flash_bla's bare op takes {1e3 * peer[0]:.0f}"
    yield KERNELS, f"{bare_words}; with backward {1e3 * ours[1]:.0f} and {1e3 * peer[1]:.0f}"
    bare_long = ["{:.1f}; {:.1f}".format(*figures(long, which, "flash_bla bare / ours")) for which in ("forward", both)]
    yield KERNELS, f"bare op on one row, {bare_long[0]} forward and {bare_long[1]} with backward."
    by_states = ["{:.1f}; {:.1f}".format(*figures("short, 4096 rows, mean 8.9", which, "state path / ours")) for which in ("forward", both)]
    yield KERNELS, f"as by way of states, {by_states[0]} and {by_states[1]}."
    floors = [[100 * share for share in figures("1 x 131072", which, "of floor")] for which in ("forward", both)]
    words = "{:.0f} and {:.0f} % of its floor forward on the H200, {:.0f} and {:.0f} % with backward".format(*floors[0], *floors[1])
    yield KERNELS, f"One row of 131,072 tokens has {words}"
    now = [1000 * figures(long, which, "ms")[1] for which in ("forward", both)]
    yield "README.md", f"where {report('linear_attention')['commit']} takes {now[0]:.0f} and {now[1]:.0f}"
    plain = row(op, **{"rows x tokens": "1 x 2048", "K": 128, "pass": both})
    yield KERNELS, f"at K = 128 takes {1e3 * plain['ms']:.0f} us, and as two products that torch.compile has compiled for that very length"
    yield KERNELS, f"for that very length {1e3 * plain['plain (ms)']:.0f}."
    of_budget = [short(max(shares_of_budgets(report(name)))) for name in ("linear_attention", "gbla_layer")]
    yield KERNELS, f"at most {of_budget[0]} of this budget in the report of the op, {of_budget[1]} in that of the layer"
    tiny = [1000 * figures("short, 4096 rows, mean 8.9", which, "ms")[0] for which in ("forward", both)]
    yield KERNELS, f"The latest report has {tiny[0]:.0f} and {tiny[1]:.0f}"


def costs_of_parts(parts: list[dict[str, Any]], packed: str) -> str:
    """Of the op's time, what it takes less without a part."""
    names = ("without key gate", "without output gate", "relu in place of elu1", "without norm")
    forward, both = (
        [f"{100 * (1 - row(parts, **{'rows x tokens': packed, 'pass': which, 'variant': name})['of the op']):.0f}" for name in names]
        for which in ("forward", "forward+backward")
    )
    costs = "the key gate {} %, the output gate {} %, elu1 against relu {} %, the norm {} %".format(*forward)
    return "cost of the forward: {}; with backward {}, {}, {} and {} %.".format(costs, *both)


def shares_of_budgets(found: dict[str, Any]) -> list[float]:
    """Of all errors that stand beside a budget."""
    shares = []
    for line in (line for lines in (found["rows"], *found.get("tables", {}).values()) for line in lines):
        for name, budget in line.items():
            if name.endswith("budget") and budget is not None:
                error = line.get(name.removesuffix("budget") + "error", line.get(name.removesuffix(" budget")))
                shares.append(error / budget)
    return shares


def of_an_h100() -> Iterator[tuple[str, str]]:
    """What README says of it, and the table of aims, where it stands beside an H200."""
    passes, long, packed = ("forward", "forward+backward"), "1 x 32768", "32 x 2048"
    layers, ops = ([report(f"{place}{name}")["rows"] for place in ("", "h100/")] for name in ("gbla_layer", "linear_attention"))

    def faster(layer: list[dict[str, Any]], length: int, width: int, which: str = "forward") -> float:
        return float(row(layer, **{"rows x tokens": f"1 x {length}", "D": width, "pass": which})["faster"])

    def figures(op: list[dict[str, Any]], case: str, column: str, which: str) -> list[float]:
        return [row(op, **{"rows x tokens": case, "K": width, "pass": which})[column] for width in (64, 128)]

    def beside(cells: Iterable[str]) -> tuple[str, str]:
        return KERNELS, f"| {' | '.join(cells)} |"

    for width, which in ((512, "forward"), (1024, "forward"), (512, "forward+backward")):
        yield beside(f"{faster(layer, 32768, width, which):.1f}" for layer in layers)
    yield beside(f"{faster(layer, 1536, 512):.3f} (2,048: {faster(layer, 2048, 512):.2f})".removeprefix("0") for layer in layers)
    for which in passes:
        pairs = [zip(*(figures(op, case, "of floor", which) for case in (long, packed)), strict=True) for op in ops]
        yield beside("; ".join(f"{100 * one:.0f}, {100 * many:.0f}" for one, many in of_op) for of_op in pairs)
    yield beside("; ".join(map(short, figures(op, packed, "flash_bla bare / ours", "forward"))) for op in ops)
    pairs = [zip(*(figures(op, packed, "flash_bla equal / ours", which) for which in passes), strict=True) for op in ops]
    yield beside("; ".join(f"{forward:.1f}, {both:.1f}" for forward, both in of_op) for of_op in pairs)

    of_layer = [faster(layers[1], 32768, width, which) for width in (512, 1024) for which in passes]
    words = "at 32,768 tokens, {1:.1f} with backward (D = 1,024: {2:.1f}, {3:.1f})".format(*of_layer)
    yield "README.md", f"give the layer {of_layer[0]:.1f} times the speed of softmax attention {words}"
    (one, wide), (both, both_wide) = ([100 * share for share in figures(ops[1], long, "of floor", which)] for which in passes)
    words = f"forward, {both:.0f} % with backward (heads of 128: {wide:.0f} %, {both_wide:.0f} %)"
    yield "README.md", f"its bytes alone would take {one:.0f} % of the op's time {words}"
    tiny = [1000 * figures(ops[1], "short, 4096 rows, mean 8.9", "ms", which)[0] for which in passes]
    yield KERNELS, f"that of an H100 {tiny[0]:.0f} and {tiny[1]:.0f}"


def of_the_ops_kernels() -> Iterator[tuple[str, str]]:
    names = ("state", "output", "query_backward", "key_backward")
    for name, words in zip(names, ("state", "output", "query side of backward", "key side of backward"), strict=True):
        line = row(report("kernel_counters")["rows"], **{"rows x tokens": "32 x 2048", "K": 64, "kernel": f"{name}_kernel"})
        shares = f"{line['memory (% of peak)']:.0f} % | {line['L1 (% of peak)']:.0f} %"
        selected = float(re.search(r"\bselected (\d+)%", line["waits"].replace("not selected", ""))[1])
        warps = line["warps a scheduler"]
        yield KERNELS, f"| {words} | {line['us']:.0f} | {shares} | {warps:.1f} | {warps * selected:.0f} % |"


def of_the_convolution() -> Iterator[tuple[str, str]]:
    conv = report("causal_conv1d")["rows"]

    def faster(peer: str, is_long: bool, which: str, digits: int) -> str:
        lines = [line for line in conv if line["pass"] == which and (line["rows x tokens"] != "1 x 2048") == is_long]
        ratios = [line[f"{peer} (ms)"] / line["fused (ms)"] for line in lines]
        return f"{min(ratios):.{digits}f} to {max(ratios):.{digits}f}".replace("0.", ".")

    for peer, digits in (("compiled", 2), ("apart", 1)):
        long, short = ([faster(peer, is_long, which, digits) for which in ("forward", "forward+backward")] for is_long in (True, False))
        times = (" times as fast forward", " with backward") if peer == "compiled" else ("", "")
        yield KERNELS, f"{long[0]}{times[0]} and {long[1]}{times[1]}; with 2,048 tokens {short[0]} and {short[1]}"


def of_softmax_attention() -> Iterator[tuple[str, str]]:
    lines, passes = report("softmax_attention")["rows"], ("forward", "forward+backward")
    even = [line["jagged / dense cuDNN"] for line in lines if line["rows x tokens"] in ("1 x 32768", "8 x 8192", "32 x 2048")]
    yield KERNELS, f"rows of one length, which are dense here too, {short(min(even))} to {max(even):.2f} of its time"
    of_dense = [line["jagged / dense cuDNN"] for line in lines if line.get("jagged / dense cuDNN") is not None]
    yield "docs/decisions/0005-kernels.md", f"It takes {short(min(of_dense))} to {max(of_dense):.2f} of the time of dense cuDNN"
    less, moved = (
        [
            f"{row(lines, **{'rows x tokens': case, 'K': width, 'pass': which})['jagged / dense cuDNN']:.2f}"
            for width in (64, 128)
            for which in passes
        ]
        for case in ("32 x 2048, one token less", "32 x 2048, one token moved")
    )
    yield KERNELS, "which makes them ragged, {} forward and {} with backward (K = 128: {}, {})".format(*less)
    yield KERNELS, "which has a launch of its own, {} and {} ({}, {})".format(*moved)
    ragged = [line["jagged (ms)"] / line["varlen (ms)"] for line in lines if line["rows x tokens"].startswith("Zipf")]
    aimed = [line["jagged / dense cuDNN"] for line in lines if line["rows x tokens"] in ("1 x 32768", "32 x 2048")]
    yield KERNELS, f"on packed rows of one length: {max(aimed):.2f} at most"
    cross = row(
        report("softmax_attention")["tables"]["Cross-attention"],
        **{"rows x keys x queries": "128 x 2048 x 128", "K": 128, "pass": "forward"},
    )
    yield KERNELS, f"`varlen_attn` takes {short(cross['faster'])} of our time forward at K = 128"
    yield KERNELS, f"Zipf lengths take {short(min(ragged))} to {short(max(ragged))} of the time of `varlen_attn`"


def of_the_step() -> Iterator[tuple[str, str]]:
    step = report("training_step")
    ratios = step["tables"]["Time of a step, one pattern against the other"]
    lengths = (32_768, 8_192, 2_048)
    of_budget = {"tokens/GPU": BUDGET, "compiled": True}
    faster = [row(ratios, history=length, **of_budget)["SSS / SGG"] for length in lengths]
    hybrid = [row(step["rows"], pattern="SGG", history=length, **of_budget) for length in lengths]
    rates = [line["tokens/s"] / 1e6 for line in hybrid]
    memory = [line["peak memory (GiB)"] for line in (*hybrid, *report("training_step_131072")["rows"])]
    yield "README.md", f"| hybrid, M tokens/s | {' | '.join(f'{rate:.1f}' for rate in reversed(rates))} |"
    yield "README.md", f"| times as fast as softmax attention | {' | '.join(times(ratio) for ratio in reversed(faster))} |"
    yield "README.md", f"{min(memory):.1f} to {max(memory):.1f} GiB from 2,048 to 131,072"
    fastest = max(line["tokens/s"] for line in step["rows"]) / 1e6
    yield "docs/training.md", f"The fastest step that was measured reads {fastest:.1f} M tokens/s"
    outside = sorted(line["outside kernels (%)"] for line in hybrid)
    yield "docs/training.md", f"is outside kernels for {outside[0]:.1f} to {outside[-1]:.1f} % of its time"
    small = {"tokens/GPU": 65_536, "history": 2_048, "compiled": True}
    line, ratio = row(step["rows"], pattern="SGG", **small), row(ratios, **small)["SSS / SGG"]
    late = f"it takes {line['ms/step']:.1f} ms, {line['outside kernels (%)']:.0f} % of them outside kernels"
    yield "docs/training.md", f"{late}, and the hybrid gains little there (SSS / SGG {ratio:.2f})"
    firsts = (line["first step (s)"], report("h100/weak_scaling_4")["rows"][0]["first step (s)"])
    yield "docs/training.md", f"The first step takes {firsts[0]:.0f} s on an H200 and {firsts[1]:.0f} s on four H100s"


def of_several_gpus() -> Iterator[tuple[str, str]]:
    yield from of_weak_scaling_on_h200s()
    yield from of_weak_scaling_on_h100s()
    times_of = {line["ranks"]: line["evaluation (s)"] for line in report("evaluation_ranks")["rows"]}
    yield "docs/training.md", f"{times_of[1]:.1f}, {times_of[2]:.1f} and {times_of[4]:.1f} s on 1, 2 and 4"
    outcomes = [line["outcome"] for line in report("multi_gpu_tests")["rows"]]
    passed, skipped = (sum(outcome.startswith(word) for outcome in outcomes) for word in ("passed", "skipped"))
    yield "docs/training.md", f"On two H200s {passed} passed, and {skipped} that need four GPUs were skipped"


def of_weak_scaling_on_h200s() -> Iterator[tuple[str, str]]:
    one, two = (report(f"weak_scaling_{ranks}") for ranks in (1, 2))
    quoted = f"{mega_rate(one)} and {mega_rate(two)} M tokens/s on 1 and 2 H200s, {of_even_scaling(two, 2, one)} of even scaling"
    for page in ("README.md", "docs/training.md"):
        yield page, f"{quoted}; dealt in turn {mega_rate(two, 'none')} M, {of_even_scaling(two, 2, one, 'none')}"
    alone = row(one["rows"], balance="cost")
    step = f"A step of Zipf lengths up to 32,768 takes {alone['ms/step']:.1f} ms"
    yield "docs/training.md", f"{step}, {alone['outside kernels (%)']:.0f} % of them outside kernels ([weak_scaling_1]"

    def of_ranks(balance: str) -> list[tuple[float, float]]:
        """Work and waiting of each rank, most work first."""
        ranks = [line for line in two["tables"]["Ranks"] if line["balance"] == balance]
        return sorted(((line["TFLOP/step"], line["waiting (% of step)"]) for line in ranks), reverse=True)

    (most, less), (most_in_turn, less_in_turn) = (of_ranks(balance) for balance in ("cost", "none"))
    work = f"{most[0]:.1f} and {less[0]:.1f} TFLOP by cost, {most_in_turn[0]:.1f} and {less_in_turn[0]:.1f} in turn"
    waits = f"{most[1]:.0f} and {less[1]:.0f} % of the profiled steps, and {most_in_turn[1]:.0f} and {less_in_turn[1]:.0f} %"
    yield "docs/training.md", f"{work}, and wait {waits}."


def of_weak_scaling_on_h100s() -> Iterator[tuple[str, str]]:
    one, two, four = (report(f"h100/weak_scaling_{ranks}") for ranks in (1, 2, 4))
    quoted = f"{mega_rate(one)}, {mega_rate(two)} and {mega_rate(four)} M"
    shares, in_turn = f"{of_even_scaling(two, 2, one)} and {of_even_scaling(four, 4, one)}", of_even_scaling(four, 4, one, "none")
    yield "README.md", f"{quoted} on 1, 2 and 4 H100s, {shares}; in turn, four reach {in_turn}"
    rate_in_turn = f"four that take histories in turn make {mega_rate(four, 'none')} M, {in_turn}."
    yield "docs/training.md", f"{quoted} tokens/s, 1, {shares} of even scaling; {rate_in_turn}"
    work = sorted((line["TFLOP/step"] for line in four["tables"]["Ranks"] if line["balance"] == "cost"), reverse=True)
    work_alone = one["tables"]["Ranks"][0]["TFLOP/step"]
    times = [row(scaling["rows"], balance="cost")["ms/step"] for scaling in (one, four)]
    load = f"on four its rank has {work[0]:.1f} TFLOP, where the others have {work[1]:.1f} and one GPU alone {work_alone:.1f}"
    yield "docs/training.md", f"{load}. The step takes {times[1]:.1f} ms, where one GPU takes {times[0]:.1f};"
    yield "docs/training.md", f"that rank's work in proportion to its TFLOP would be {times[0] * work[0] / work_alone:.1f}."


def mega_rate(scaling: dict[str, Any], balance: str = "cost") -> str:
    return f"{row(scaling['rows'], balance=balance)['tokens/s'] / 1e6:.2f}"


def of_even_scaling(scaling: dict[str, Any], ranks: int, alone: dict[str, Any], balance: str = "cost") -> str:
    """Tokens/s against those of as many GPUs that each go as fast as one alone."""
    rate, rate_alone = (row(rows["rows"], balance=kind)["tokens/s"] for rows, kind in ((scaling, balance), (alone, "cost")))
    return short(rate / rate_alone / ranks)


@pytest.mark.parametrize(("page", "words"), list(statements()))
def test_a_page_quotes_the_committed_report(page: str, words: str) -> None:
    text = " ".join((ROOT / page).read_text().split())
    assert words in text, f"by benchmarks/results, {page} must say: {words}"


@pytest.mark.parametrize("name", sorted(str(path.relative_to(RESULTS).with_suffix("")) for path in RESULTS.rglob("*.json")))
@pytest.mark.usefixtures("benchmarks_on_path")
def test_a_reports_page_is_that_of_its_json(name: str) -> None:
    from report import _markdown

    assert (RESULTS / f"{name}.md").read_text() == _markdown(report(name))


BESIDE_ERRORS = ("linear_attention", "gbla_layer", "causal_conv1d")


@pytest.mark.parametrize("name", ["softmax_attention", *BESIDE_ERRORS, *(f"h100/{name}" for name in BESIDE_ERRORS)])
def test_errors_of_the_committed_reports_are_within_their_budgets(name: str) -> None:
    shares = shares_of_budgets(report(name))
    assert len(shares) > 20 and max(shares) <= 1, f"{name}: an error of {max(shares):.2f} times its budget"
