"""The figures of a report, as SVG text; needs matplotlib, which the extra ``report`` brings."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "gbla",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
"""A fixed salt: the same figures give the same file. Text stays text."""

LINE_STYLES = ("o-", "s--", "^:")
"""Of ten lines each: there are ten colours."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval over users, and the means of the training seeds where there are several."""

    mean: float
    low: float
    high: float
    seeds: tuple[float, ...] = ()


@dataclass(frozen=True)
class TrainingCurve:
    """Steps and values of the training loss and of the validation NLL, in nats per target."""

    loss: Sequence[tuple[int, float]]
    validation: Sequence[tuple[int, float]]


def require_matplotlib() -> None:
    """``ModuleNotFoundError`` that says how to install matplotlib, unless it is there."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a report needs matplotlib for its plots; install it with: pip install 'gbla-rec[report]'") from error


def interval_plot(estimates: Mapping[str, Estimate], metric: str) -> str:
    """One row a method: the mean with its interval, small strokes for seeds."""

    def draw(axis: Any) -> None:
        for place, estimate in enumerate(reversed(list(estimates.values()))):
            _error_bar(axis, estimate, place, is_horizontal=True, color="C0")
            axis.plot(estimate.seeds, [place] * len(estimate.seeds), "|", color="C3", markersize=7)
        axis.set_yticks(range(len(estimates)), list(reversed(list(estimates))))
        axis.set(xlabel=metric, ylim=(-0.6, len(estimates) - 0.4))
        axis.grid(alpha=0.3, axis="x")

    return _figure(draw, height=1.0 + 0.32 * len(estimates))


def slice_plot(lines: Mapping[str, Sequence[Estimate | None]], labels: Sequence[str], metric: str, title: str) -> str:
    """One line a method over slices of users; None leaves a gap.

    Args:
        lines: by method, one estimate a slice.
        labels: of the slices.
        metric: on the vertical axis.
        title: of the horizontal axis.
    """

    def draw(axis: Any) -> None:
        for number, (label, estimates) in enumerate(lines.items()):
            color, style = f"C{number % 10}", LINE_STYLES[number // 10 % len(LINE_STYLES)]
            # beside each other: intervals at one place would hide each other
            shift = 0.4 * ((number + 0.5) / len(lines) - 0.5)
            places = [place + shift for place, estimate in enumerate(estimates) if estimate is not None]
            known = [estimate for estimate in estimates if estimate is not None]
            axis.plot(places, [estimate.mean for estimate in known], style, color=color, label=label, markersize=3.5, linewidth=1.2)
            for place, estimate in zip(places, known, strict=True):
                axis.plot([place, place], [estimate.low, estimate.high], color=color, linewidth=1, alpha=0.7)
        axis.set_xticks(range(len(labels)), labels)
        axis.set(xlabel=title, ylabel=metric)
        axis.grid(alpha=0.3, axis="y")
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))

    return _figure(draw)


def pattern_bars(by_pattern: Mapping[str, Mapping[str, Estimate]], metric: str) -> str:
    """Bars of runs, those of one encoder pattern side by side in one colour; intervals over users, small strokes for seeds."""

    def draw(axis: Any) -> None:
        place, names = 0.0, {}
        for number, (pattern, runs) in enumerate(by_pattern.items()):
            for run, estimate in runs.items():
                color = f"C{number % 10}"
                axis.bar(place, estimate.mean, color=color, alpha=0.6, label=pattern if run == next(iter(runs)) else None)
                _error_bar(axis, estimate, place, is_horizontal=False, color="k")
                axis.plot([place] * len(estimate.seeds), estimate.seeds, "_", color="C3", markersize=7)
                names[place] = run
                place += 1
            place += 0.6
        axis.set_xticks(list(names), list(names.values()), rotation=30, ha="right")
        axis.set(ylabel=metric)
        axis.grid(alpha=0.3, axis="y")
        axis.legend(title="pattern", fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))

    return _figure(draw)


def training_plot(curves: Mapping[str, Sequence[TrainingCurve]]) -> str:
    """Training loss (thin) and validation NLL (dots) of every run; the seeds of a group have one colour."""

    def draw(axis: Any) -> None:
        for number, (label, runs) in enumerate(curves.items()):
            color, named = f"C{number % 10}", label
            for run in runs:
                for values, style, width in ((run.loss, "-", 0.7), (run.validation, "o--", 1.2)):
                    if values:
                        axis.plot(*zip(*values, strict=True), style, color=color, linewidth=width, markersize=3, label=named)
                        named = "_"
        axis.set(xlabel="step", ylabel="nats per target: loss (line), validation (dots)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)

    return _figure(draw)


def _error_bar(axis: Any, estimate: Estimate, place: float, *, is_horizontal: bool, color: str) -> None:
    ends, places = [estimate.low, estimate.high], [place, place]
    axis.plot(*((ends, places) if is_horizontal else (places, ends)), color=color, linewidth=1.5)
    if is_horizontal:
        axis.plot([estimate.mean], [place], "o", color=color, markersize=4)


def _figure(draw: Callable[[Any], None], height: float = 3.6) -> str:
    """The SVG of one axis that ``draw`` fills."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        # no pyplot: it would choose a display
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.2, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.subplots())
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
