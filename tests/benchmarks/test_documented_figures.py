"""Figures of kernels in the README and in decision 5 are those of the committed reports: every number of a passage, in order."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
DECISION = (ROOT / "docs" / "decisions" / "0005-kernels.md").read_text()
DECIMALS = r"(?<![\d,])\d*\.\d+"
"""Ratios; sizes and lengths have no point."""
PERCENT = r"\d+(?= %)"
LONG, PACKED = "1 x 32768", "32 x 2048"
FORWARD, BACKWARD = "forward", "forward+backward"
Row = dict[str, Any]


def report(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return found


def row_of(rows: list[Row], **wanted: Any) -> Row:
    """The only row with these columns; ``case`` is the one of rows and tokens."""
    wanted = {"rows x tokens" if name == "case" else "pass" if name == "of" else name: value for name, value in wanted.items()}
    (found,) = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return found


def passage(text: str, start: str, end: str) -> str:
    """From ``start`` up to ``end``, on one line."""
    assert text.count(start) == 1, f"{start!r} must occur once, not {text.count(start)} times"
    begin = text.index(start)
    return " ".join(text[begin : text.index(end, begin + len(start))].split())


def cell(start: str) -> str:
    """The second cell of a row of the README's table."""
    line = passage(README, start, "\n")
    return line.split(" | ")[1]


def two(value: float) -> str:
    """``.78``, ``1.00``."""
    return f"{value:.2f}".removeprefix("0")


def one(value: float) -> str:
    return f"{value:.1f}"


def percent(value: float) -> str:
    return f"{100 * value:.0f}"


def test_readme_on_the_layer() -> None:
    rows = report("gbla_layer")["rows"]

    def faster(length: int, width: int = 512, of: str = FORWARD) -> float:
        return float(row_of(rows, case=f"1 x {length}", D=width, of=of)["faster"])

    expected = [
        two(faster(1536)),
        *(two(faster(length)) for length in (512, 1024)),
        *(one(faster(length)) for length in (4096, 8192, 32768)),
    ]
    expected += [*(one(faster(length, 1024)) for length in (4096, 8192, 32768)), two(faster(2048, 1024))]
    expected += [one(faster(32768, width, BACKWARD)) for width in (512, 1024)]
    assert re.findall(DECIMALS, cell("| one layer, GBLA against cuDNN")) == expected
    assert two(faster(2048)) == two(faster(1536)), "one figure for both"


def test_readme_on_the_op_against_its_peer() -> None:
    rows = report("linear_attention")["rows"]

    def times(case: str, of: str, column: str) -> list[float]:
        return [row_of(rows, case=case, K=width, of=of)[column] for width in (64, 128)]

    expected = [one(x) for case in (LONG, PACKED) for of in (FORWARD, BACKWARD) for x in times(case, of, "flash_bla equal / ours")]
    expected += [one(1 / x) for x in times(PACKED, FORWARD, "flash_bla bare / ours")]
    parts = report("op_parts")["rows"]
    bare, peer = (row_of(parts, case=PACKED, of=FORWARD, variant=name)["ms"] for name in ("none of these", "flash_bla"))
    assert re.findall(DECIMALS, cell("| the op with heads of 64 (128)")) == [*expected, two(bare / peer)]


def test_readme_on_the_op_against_its_floor() -> None:
    rows = report("linear_attention")["rows"]
    expected = [percent(row_of(rows, case=LONG, K=width, of=of)["of floor"]) for of in (FORWARD, BACKWARD) for width in (64, 128)]
    assert re.findall(PERCENT, cell("| the op against the bytes")) == expected


def test_readme_on_the_step_and_on_first_calls() -> None:
    steps = report("training_step")
    chosen = {"tokens/GPU": 262_144, "compiled": True}
    ratios = [row_of(steps["tables"]["Time of a step, one pattern against the other"], history=n, **chosen) for n in (32768, 8192, 2048)]
    hybrid = [row_of(steps["rows"], history=n, pattern="SGG", **chosen) for n in (32768, 8192, 2048)]
    memory = [row["peak memory (GiB)"] for row in (*hybrid, *report("training_step_131072")["rows"])]
    expected = [two(row["SSS / SGG"]) for row in ratios] + [one(row["tokens/s"] / 1e6) for row in hybrid]
    assert re.findall(DECIMALS, cell("| compiled training step")) == [*expected, one(min(memory)), one(max(memory))]
    first = [row for row in report("cold_start")["rows"] if row["Triton cache"] == "empty"]
    seconds = [f"{row[f'op {name} (s)']:.0f}" for name in ("forward", "backward") for row in first]
    assert re.findall(r"(\d+) to (\d+) s", cell("| first call of the op")) == [tuple(seconds[:2]), tuple(seconds[2:])]
    assert all(row["compiled by 100 more batches"] == 0 for row in first)


@pytest.mark.parametrize(
    ("line", "kernel"),
    [
        ("| state |", "state_kernel"),
        ("| output |", "output_kernel"),
        ("| query side of backward |", "query_backward_kernel"),
        ("| key side of backward |", "key_backward_kernel"),
    ],
)
def test_decision_on_hardware_counters(line: str, kernel: str) -> None:
    rows = report("kernel_counters")["rows"]
    row = row_of(rows, case=LONG, K=64, kernel=kernel)
    (selected,) = re.findall(r"selected (\d+)%", row["waits"].replace("not selected", ""))
    *found, warps, share = re.findall(r"[\d.]+", passage(DECISION, line, "\n"))
    assert found == [f"{row[name]:.0f}" for name in ("us", "memory (% of peak)", "L1 (% of peak)")]
    assert abs(float(warps) - row["warps a scheduler"]) <= 0.05 + 1e-9
    # of each warp's time, in whole percents
    assert abs(int(share) - row["warps a scheduler"] * int(selected)) <= row["warps a scheduler"]


def test_decision_on_the_parts_of_the_op() -> None:
    rows = report("op_parts")["rows"]
    names = ("without key gate", "without output gate", "relu in place of elu1", "without norm")

    def saved(of: str, name: str) -> str:
        return percent(1 - row_of(rows, case=PACKED, of=of, variant=name)["of the op"])

    found = re.findall(r"\d+(?= %|, \d| and \d)", passage(DECISION, "- Each part costs", "Leaving the normaliser").partition("):")[2])
    assert found == [saved(of, name) for of in (FORWARD, BACKWARD) for name in names]
    times = {(case, of, name): row_of(rows, case=case, of=of, variant=name) for case in (LONG, PACKED) for of in (FORWARD, BACKWARD)
             for name in ("none of these", "flash_bla")}  # fmt: skip
    pairs = [(PACKED, FORWARD), (PACKED, BACKWARD), (LONG, FORWARD)]
    us = [f"{1e3 * times[*pair, name]['ms']:.0f}" for pair in pairs for name in ("none of these", "flash_bla")]
    floor = percent(times[PACKED, FORWARD, "none of these"]["of floor"])
    text = passage(DECISION, "on mapped, contiguous inputs:", "So what flash_bla")
    assert re.findall(r"(?<![\d,])\d+(?![\d,]*\d)", text.replace("32,768", "")) == [us[0], floor, *us[1:]]


def test_decision_on_the_convolution() -> None:
    rows = report("causal_conv1d")["rows"]
    expected = []
    for peer in ("compiled (ms)", "apart (ms)"):
        for is_short in (False, True):
            for of in (FORWARD, BACKWARD):
                ratios = [
                    row[peer] / row["fused (ms)"] for row in rows if row["pass"] == of and (row["rows x tokens"] == "1 x 2048") == is_short
                ]
                text = two if peer.startswith("compiled") else one
                expected += [text(min(ratios)), text(max(ratios))]
    assert re.findall(DECIMALS, passage(DECISION, "on an H200, with 32,768 tokens and more:", "([causal_conv1d]")) == expected


def test_decision_on_what_was_not_reached() -> None:
    layer, op = report("gbla_layer"), report("linear_attention")["rows"]
    table = passage(DECISION, "| aim | reached |", "D = 512 reaches")

    def numbers(aim: str) -> list[str]:
        cells = passage(DECISION, aim, "\n").split(" | ")
        return [number for number in re.findall(r"\d*\.?\d+", cells[1].replace("K = 64", "").replace("K = 128", ""))]

    def of_floor(of: str) -> list[str]:
        return [percent(row_of(op, case=case, K=width, of=of)["of floor"]) for width in (64, 128) for case in (LONG, PACKED)]

    def equal(width: int) -> list[str]:
        return [one(row_of(op, case=PACKED, K=width, of=of)["flash_bla equal / ours"]) for of in (FORWARD, BACKWARD)]

    assert numbers("| layer 10.5 times as fast") == [one(row_of(layer["rows"], case=LONG, D=1024, of=FORWARD)["faster"])]
    assert numbers("| layer faster at 1,536") == [
        f"{row_of(layer['rows'], case='1 x 1536', D=512, of=FORWARD)['faster']:.3f}".removeprefix("0")
    ]
    assert numbers("| op at 75 %") == of_floor(FORWARD) and numbers("| with backward 55 %") == of_floor(BACKWARD)
    bare = [two(row_of(op, case=PACKED, K=width, of=FORWARD)["flash_bla bare / ours"]) for width in (64, 128)]
    assert numbers("| as fast as flash_bla bare") == bare
    assert numbers("| twice as fast with equal work") == [*equal(64), *equal(128)]
    parts = {row["D"]: row for row in layer["tables"]["Parts of the GBLA layer, forward, each alone"] if row["rows x tokens"] == LONG}
    peers = {width: row_of(layer["rows"], case=LONG, D=width, of=FORWARD) for width in (512, 1024)}
    again = peers[512]["SA cuDNN (ms)"] / parts[512]["layer (ms)"]
    assert re.findall(DECIMALS, passage(DECISION, "D = 512 reaches", "the aim of 20")) == [one(peers[512]["faster"]), one(again)]
    products = sum(parts[1024][name] for name in ("in-projection (ms)", "out-projection (ms)"))
    assert f"the two products, {1e3 * products:.0f} of {1e3 * parts[1024]['layer (ms)']:.0f} us" in table
