r"""The pictures of a suite, drawn from what experiments/report.py found in its results.

The functions that take an ``axis`` are for notebooks as well, the others write a file. A mean comes with its interval
as (mean, half of the 95 % interval), where half is nan if there is only one seed. Colours come with line styles,
markers and hatches, so that no reader depends on them.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from evaluate import COLOURS, STYLES, new_figure

Interval = tuple[float, float]  # mean, half of the 95 % interval


def few_shot_curves(axis, shots: Sequence[int], curves: dict[str, dict[int, Interval]]) -> None:
    """Score against the number of examples k (0: all of them, drawn last); curves[label][k] in %."""
    for i, (label, points) in enumerate(curves.items()):
        x = [at + 0.05 * (i - (len(curves) - 1) / 2) for at, k in enumerate(shots) if k in points]
        mean, half = zip(*(points[k] for k in shots if k in points))
        axis.errorbar(x, mean, half, fmt=STYLES[i % len(STYLES)], color=COLOURS[i % len(COLOURS)], capsize=2,
                      label=label)
    axis.set(xticks=range(len(shots)), xticklabels=[k or "full" for k in shots], xlabel="examples of a target task",
             ylabel="score, mean of the target tasks (%)")
    axis.legend(fontsize="small", title="method (parameters stored for a target)", title_fontsize="small")


def difference_bars(axis, differences: dict[str, tuple[float, float, str]]) -> None:
    """Paired differences; differences[name] = points, half interval, verdict ("lower": orange, "higher": green)."""
    for y, (mean, half, verdict) in enumerate(differences.values()):
        colour, hatch = {"higher": (COLOURS[2], ".."), "lower": (COLOURS[1], "//")}.get(verdict, ("#888888", None))
        axis.barh(y, mean, color=colour, hatch=hatch, xerr=half, capsize=2)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(xlabel="points above TA-LoRA", yticks=range(len(differences)), yticklabels=list(differences),
             ylim=(len(differences) - 0.5, -0.5), axisbelow=True)
    axis.grid(linewidth=0.4)


def draw_differences(path: Path, panels: dict[str, dict]) -> None:
    """A panel of bars for each setting; names that all of them share stand at the left."""
    rows = max(map(len, panels.values()))
    with new_figure(path, len(panels), (11, 1.2 + 0.3 * rows), squeeze=False) as (_, axes):
        for axis, (where, differences) in zip(axes[0], panels.items()):
            difference_bars(axis, differences)
            axis.set_title(where)
            if all(list(other) == list(differences) for other in panels.values()):
                axis.label_outer()


def draw_mechanism(path: Path, logged: dict[str, list[dict]]) -> None:
    """What training left behind, means over seeds; logged[name]: the last row of metrics.jsonl of each seed's multitask
    stage. Gates without their sign, which differs by seed."""
    panels = {"gates": "gates |tanh g| (white: none)", "theta0_norms": "shared prompt |theta0|",
              "step_norms": "a task's step |s B A_i|"}
    with new_figure(path, 4, (13, 1.4 + 0.28 * len(logged)), sharey=True) as (figure, axes):
        for axis, (what, title) in zip(axes, panels.items()):
            none = [math.nan] * max(len(row[what]) for rows in logged.values() for row in rows if what in row)
            by_layer = [[statistics.mean(map(abs, layer)) for layer in zip(*(row.get(what, none) for row in rows))]
                        for rows in logged.values()]  # (names, layers)
            figure.colorbar(axis.imshow(by_layer, aspect="auto", cmap="viridis", vmin=0), ax=axis)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.set(title=title, xlabel="layer", yticks=range(len(logged)), yticklabels=list(logged))
        for y, rows in enumerate(logged.values()):
            pairs = [[c for i, line in enumerate(row["cosines"]) for c in line[i + 1 :]] for row in rows]  # by seed
            mean, largest = statistics.mean(map(statistics.mean, pairs)), statistics.mean(map(max, pairs))
            axes[3].plot([mean, largest], [y, y], "o-", color=COLOURS[0], markevery=[0])
        axes[3].set(title="|cos| of two tasks", xlabel="mean (dot) to largest", xlim=(0, None))
        axes[3].grid(linewidth=0.4)
