"""Plot of milliseconds against row length, one panel per group, both axes logarithmic."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from report import RESULTS

Points = Sequence[tuple[int, float]]
STYLE = {"svg.hashsalt": "gbla", "svg.fonttype": "none", "font.size": 9}
"""A fixed salt: the same figures give the same file. Text stays text."""


def plot_times(name: str, panels: Mapping[str, Mapping[str, Points]], *, directory: Path = RESULTS) -> Path:
    """Write ``<directory>/<name>.svg``.

    Args:
        name: of the file.
        panels: by panel title, by line label, ``(tokens of the row, milliseconds)``. A label that begins with ``floor`` is dashed.
        directory: where the file goes; made if need be.

    Returns:
        The file.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, len(panels), figsize=(4.6 * len(panels), 4), squeeze=False, layout="constrained")
        for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
            for label, points in lines.items():
                if points:
                    lengths, times = zip(*sorted(points), strict=True)
                    is_floor = label.startswith("floor")
                    axis.plot(lengths, times, "k--" if is_floor else "o-", label=label, markersize=3, linewidth=1.2)
            axis.set(title=title, xscale="log", yscale="log", xlabel="tokens of the row", ylabel="milliseconds")
            axis.set_xscale("log", base=2)
            axis.grid(alpha=0.3)
            if axis.get_legend_handles_labels()[0]:
                axis.legend()
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{name}.svg"
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
    return path
