"""Pictures of what a benchmark measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = (
    *("#4c566a", "#5e81ac", "#a3be8c", "#d08770", "#b48ead"),
    *("#bf616a", "#ebcb8b", "#88c0d0", "#3b7a57", "#8c5a3c"),
)


def grouped_bars(panels: Mapping[str, Mapping[str, Mapping[str, float]]], title: str, out: Path) -> None:
    """One panel per metric: {metric: {series: {group: value}}}, values written on the bars."""
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), layout="constrained", squeeze=False)
    for axis, (metric, series) in zip(axes[0], panels.items(), strict=True):
        groups = list(next(iter(series.values())))
        width = 0.8 / len(series)
        for i, (name, values) in enumerate(series.items()):
            at = [g + (i - (len(series) - 1) / 2) * width for g in range(len(groups))]
            bars = axis.bar(at, [values[g] for g in groups], width, label=name, color=COLOURS[i % len(COLOURS)])
            axis.bar_label(bars, fmt=_short, fontsize=7)
        axis.set_xticks(range(len(groups)), groups)
        axis.set_title(metric, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    _legend_below(figure, axes[0])
    figure.suptitle(title, fontsize=10)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _legend_below(figure: plt.Figure, axes: Sequence[plt.Axes]) -> None:
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)


def lines(
    panels: Mapping[str, Mapping[str, Mapping[float | str, float]]], title: str, out: Path, columns: int = 0
) -> None:
    """One panel per metric: {metric: {series: {x: value}}}, from zero up. `columns` in a row, with one legend for all;
    0: all panels in one, each with its own."""
    across = columns or len(panels)
    down = -(-len(panels) // across)
    size = (4.6 * across, 3.6 * down)
    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    figure, axes = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
    for axis, (metric, series) in zip(axes.flat, panels.items(), strict=False):
        for name, points in series.items():
            axis.plot(list(points), list(points.values()), "o-", ms=3, label=name, color=colours[name])
            if any(isinstance(x, str) for x in points):
                axis.tick_params("x", rotation=60, labelsize=7)
        axis.set_ylim(bottom=0)
        axis.set_title(metric, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        if len(series) > 1 and not columns:
            axis.legend(frameon=False, fontsize=8)
    if columns:
        _legend_below(figure, axes.flat)
    figure.suptitle(title, fontsize=10)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def grid(
    values: Mapping[tuple[int, int], float | None],
    names: tuple[str, str, str],
    title: str,
    out: Path,
    chosen: tuple[int, int] | None = None,
) -> None:
    """{(x, y): share, or None: given up} as squares; `names` of x, y and the shares. The chosen one has a frame."""
    figure, axis = plt.subplots(figsize=(7.0, 5.0), layout="constrained")
    known = {place: value for place, value in values.items() if value is not None}
    failed = [place for place, value in values.items() if value is None]
    if failed:
        axis.scatter(*zip(*failed, strict=True), marker="x", color=COLOURS[5], label="given up", zorder=2)
    if known:
        xs, ys = zip(*known, strict=True)
        dots = axis.scatter(xs, ys, c=[*known.values()], cmap="viridis", marker="s", s=90, vmin=0.5, vmax=1, zorder=2)
        figure.colorbar(dots, ax=axis, label=names[2])
    if chosen is not None:
        axis.scatter(*chosen, marker="s", s=260, facecolors="none", edgecolors=COLOURS[5], linewidths=2, label="chosen")
    axis.set_xlabel(names[0])
    axis.set_ylabel(names[1])
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if failed or chosen is not None:
        _legend_below(figure, [axis])
    figure.suptitle(title, fontsize=9, wrap=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)
