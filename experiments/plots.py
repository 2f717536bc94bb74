r"""Every picture of the project, drawn from plain rows and records: what training logged, what the suite found.

The functions that take an ``axis`` are for notebooks as well; the others write a file. Colours are those of Okabe and
Ito, which colour-blind readers can tell apart, together with line styles and markers for readers in grey.
"""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from checkpoint import atomic

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("o-", "s--", "^-.", "v:", "D-", "x--")  # another number than colours: pairs repeat after 42


def new(rows: int = 1, columns: int = 1, size: tuple[float, float] = (6, 3.5), **options):
    """A figure and its axes, drawn into a file: no display needed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=size, layout="constrained", **options)


def save(figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    with atomic(path) as file:
        figure.savefig(file, dpi=130, format="png")
    plt.close(figure)


def read_metrics(folder: Path) -> list[dict]:
    """The rows that training logged."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------------------------------- one run

def draw_run(folder: Path) -> None:
    """Pictures of a stage from its metrics.jsonl: loss.png, and of a gated method gates.png and cosines.png."""
    rows = read_metrics(folder)
    steps, dev = [row for row in rows if "loss" in row], [row for row in rows if "dev_loss" in row]
    figure, axis = new()
    axis.plot([r["step"] for r in steps], [r["loss"] for r in steps], color=COLOURS[0], label="training batch")
    axis.plot([r["step"] for r in dev], [r["dev_loss"] for r in dev], "s--", color=COLOURS[1], label="development rows")
    axis.set(xlabel="step", ylabel="cross-entropy of an answer token (nats)", ylim=(0, None), title="Task loss")
    axis.legend()
    save(figure, folder / "loss.png")

    gates = [row for row in rows if "gates" in row and ("rates" in row or row["step"] == 0)]
    if gates:
        figure, axis = new()
        figure.colorbar(gates_over_steps(axis, gates), label="|tanh g|")
        save(figure, folder / "gates.png")

    cosines = [row for row in rows if "cosines" in row]
    if cosines:
        draw_cosines(folder / "cosines.png", cosines[0], cosines[-1])


def gates_over_steps(axis, rows: Sequence[dict]):
    """|tanh g| of every layer (up) at every step that was logged (across) -> the image, for a colorbar."""
    layers = range(len(rows[0]["gates"]))
    image = axis.pcolormesh([row["step"] for row in rows], layers, list(zip(*(row["gates"] for row in rows))),
                            shading="nearest", cmap="viridis", vmin=0)
    axis.set(xlabel="step", ylabel="layer", yticks=layers, title="How far each layer's gate is open")
    return image


def draw_cosines(path: Path, first: dict, last: dict) -> None:
    """Picture of |cos(A_i, A_j)|, the mean over layers, at two steps; first, last: rows of metrics.jsonl."""
    top = max(c for row in (first, last) for i, line in enumerate(row["cosines"]) for j, c in enumerate(line) if i != j)
    figure, axes = new(1, 2, (10, 5.4), sharey=True)
    for axis, row, when in zip(axes, (first, last), ("before", "after")):
        image = cosine_matrix(axis, row["tasks"], row["cosines"], top)
        axis.set_title(f"{when} training (step {row['step']})")
    figure.colorbar(image, ax=axes, label="|cos| between tasks, mean over layers")
    save(figure, path)


def cosine_matrix(axis, names: Sequence[str], cosines: Sequence[Sequence[float]], top: float | None = None):
    """Heat map of the cosines of every two tasks; the diagonal is left white. -> the image, for a colorbar."""
    others = [[c if i != j else math.nan for j, c in enumerate(line)] for i, line in enumerate(cosines)]
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axis.set_yticks(range(len(names)), names)
    return axis.imshow(others, cmap="viridis", vmin=0, vmax=top)


def draw_targets(folder: Path, tasks: Sequence[str]) -> None:
    """Picture of a target stage: targets.png, the share of development rows that are right, for every task."""
    figure, axes = new(1, len(tasks), (1 + 1.6 * len(tasks), 2.6), sharey=True, squeeze=False)
    for axis, task in zip(axes[0], tasks):
        dev = [row for row in read_metrics(folder / task) if "dev_loss" in row]
        axis.plot([row["step"] for row in dev], [100 * row["dev_accuracy"] for row in dev], "o-", color=COLOURS[0])
        axis.set(xlabel="step", title=task, ylim=(0, 103))
        axis.title.set_size("small")
    axes[0][0].set_ylabel("development rows right (%)")
    save(figure, folder / "targets.png")


# ------------------------------------------------------------------------------------------------------- the suite
# A mean with its interval is (mean, half of the 95 % interval), where half is nan if there is only one seed.

def few_shot_curves(axis, shots: Sequence[int], curves: dict[str, dict[int, tuple[float, float]]]) -> None:
    """Accuracy against the number of examples (0: all of them, last); curves[label][k] = mean, half interval in %."""
    for i, (label, points) in enumerate(curves.items()):
        x = [at + 0.03 * (i - len(curves) / 2) for at, k in enumerate(shots) if k in points]
        mean, half = zip(*(points[k] for k in shots if k in points))
        axis.errorbar(x, mean, bars(half), fmt=STYLES[i % 6], color=COLOURS[i % 7], capsize=2, label=label)
    axis.set(xticks=range(len(shots)), xticklabels=[k or "full" for k in shots], xlabel="examples of a target task",
             ylabel="score, mean of the target tasks (%)")
    axis.legend(fontsize="small")


def sizes_against_scores(axis, points: dict[str, tuple[int, float, float]]) -> None:
    """Score against the numbers stored for a task; points[method] = numbers, mean, half interval in %.

    The names stand in two columns beside the points, the small methods' on the left and the others' on the right, in
    the order of their scores, so that none covers another.
    """
    low, high = (of(mean + sign * (0 if math.isnan(half) else half) for _, mean, half in points.values())
                 for of, sign in ((min, -1), (max, 1)))
    middle = statistics.median(math.log10(size) for size, _, _ in points.values())
    for left in (True, False):
        column = [item for item in points.items() if (math.log10(item[1][0]) < middle) == left]
        column.sort(key=lambda item: item[1][1])
        step = max((high - low) / 14, 1e-6)
        at = [mean for _, (_, mean, _) in column]
        for i in range(1, len(at)):  # from below: each at least a line above the one before ...
            at[i] = max(at[i], at[i - 1] + step)
        over = max(0.0, at[-1] - high) if at else 0.0
        at = [y - over for y in at]  # ... and none above the highest bar
        for (method, (size, mean, half)), y in zip(column, at):
            own = method == "talora"
            axis.errorbar(size, mean, bars([half]), fmt="D" if own else "o", color=COLOURS[1 if own else 0], capsize=2)
            axis.annotate(method, (size, mean), (0.01 if left else 0.99, y), fontsize="small", va="center",
                          textcoords=axis.get_yaxis_transform(), ha="left" if left else "right",
                          arrowprops=dict(arrowstyle="-", color="#bbbbbb", linewidth=0.6, shrinkA=0, shrinkB=3))
    sizes = [size for size, _, _ in points.values()]
    axis.set(xscale="log", xlabel="numbers stored for a target task", xlim=(min(sizes) / 40, max(sizes) * 60))


def difference_bars(axis, differences: dict[str, tuple[float, float, str]]) -> None:
    """Paired differences; differences[name] = points, half interval, verdict (orange and hatched: lower, green and
    dotted: higher)."""
    colours = {"higher": COLOURS[2], "lower": COLOURS[1]}
    for y, (_, (mean, half, verdict)) in enumerate(differences.items()):
        axis.barh(y, mean, color=colours.get(verdict, "#888888"), hatch={"lower": "//", "higher": ".."}.get(verdict),
                  xerr=bars([half]), capsize=2)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(xlabel="points against TA-LoRA", yticks=range(len(differences)), yticklabels=list(differences),
             ylim=(len(differences) - 0.5, -0.5))


def layer_heat_map(axis, rows: dict[str, Sequence[float]]):
    """One value per layer (across) for every name (up) -> the image, for a colorbar."""
    image = axis.imshow(list(rows.values()), aspect="auto", cmap="viridis", vmin=0)
    axis.set(xlabel="layer", xticks=range(len(next(iter(rows.values())))), yticks=range(len(rows)),
             yticklabels=list(rows))
    return image


def mean_and_most(axis, values: Sequence[tuple[float, float]]) -> None:
    """A dot at the mean and a line up to the largest value, for every row of the panels beside it."""
    for y, (mean, most) in enumerate(values):
        axis.plot([mean, most], [y, y], "-", color="#888888")
        axis.plot(mean, y, "o", color=COLOURS[0])
    axis.set_xlim(left=0)


def bars(half: Sequence[float]) -> list[float]:
    """Lengths of error bars; none where there is no interval."""
    return [0 if math.isnan(h) else h for h in half]


def mean_by_layer(rows: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.mean(layer) for layer in zip(*rows)]
