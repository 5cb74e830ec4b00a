"""python -m records plot: pictures of what logs say; the same logs give the same bytes."""
import contextlib
import difflib
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from records.check import RECORDS, record_folders
from records.ladder import OPTIONS, equal_tokens, is_whole, loss_at, rung_folders, rung_logs, tokens_done, val_points
from records.logs import Log, LogError, find_logs, read_log
from records.stats import groups, steps_done, track

USAGE = "write `python -m records plot [records|curves|ladder] [LOG...] [--out DIR]`, LOGs for the curves only"
KINDS = ("records", "curves", "ladder")
TRACK = "corpus"  # whose curves are drawn where no log is named
WIDTH, DPI, ROW = 7.0, 200, 0.18  # inches, dots an inch, inches a row
INK, FAINT = "#1a1a1a", "#707070"
COLORS = (INK, "#1f5a99", "#c8553d", "#e0a458")  # dark to light: told apart in grey print
MIN_LIGHTNESS = 12  # least difference in CIE L* between two of COLORS, and between one of them and white
MARKERS, DASHES = "os^Dv", ("-", (0, (4, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1, 1.5)))
LOSS_TICKS = (0.01, 0.1, 0.3, 0.5, 1, 1.5, 2, 2.5, 3, 3.2, 3.4, 3.6, 4, 4.5, 5, 6, 7, 8, 10, 12, 20, 50, 100)
STYLE = {"font.family": "DejaVu Sans", "font.size": 7.5, "axes.edgecolor": FAINT, "axes.linewidth": 0.6,
         "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
         "grid.color": "#e4e4e4", "grid.linewidth": 0.6, "text.color": INK, "axes.labelcolor": INK,
         "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
         "xtick.major.width": 0.6, "ytick.major.width": 0.6, "lines.markersize": 3.5, "lines.linewidth": 0.9,
         "legend.frameon": False, "legend.fontsize": 7, "figure.dpi": DPI, "axes.formatter.useoffset": False,
         "text.parse_math": False}


class Row(NamedTuple):
    """Runs of one thing: a line of dots."""
    group: str
    name: str
    times: list[float]          # seconds of the run; ladder: milliseconds a step
    losses: list[float]         # ladder: at equal tokens, nan where a log does not tell
    steps: str = ""
    whole: bool = True          # False: stopped before the last scheduled step


class Panel(NamedTuple):
    """Values by row on an axis, with columns of text at its right: title to a text a row."""
    label: str
    values: list[list[float]]
    columns: dict[str, list[str]]
    log: bool = True


class Curve(NamedTuple):
    """A run; train and val have a row (seconds, tokens, loss) for each line from step 1 on, nan where it is untold."""
    name: str
    train: np.ndarray
    val: np.ndarray


def plot(argv: list[str]) -> int:
    """Writes the pictures asked for. Returns 1 if there was nothing to draw. Raises LogError."""
    kinds, paths, out = parse_arguments(argv)
    draw = {"records": draw_records, "curves": lambda: draw_curves(paths), "ladder": draw_ladder}
    with style():
        figures = {kind: draw[kind]() for kind in kinds}
        for kind, figure in figures.items():
            if figure:
                out.mkdir(parents=True, exist_ok=True)
                figure.savefig(out / f"{kind}.png", metadata={"Software": None})  # without matplotlib's version
                print(os.path.relpath(out / f"{kind}.png"))
    return 0 if any(figures.values()) else 1


def parse_arguments(argv: list[str]) -> tuple[tuple[str, ...], list[str], Path]:
    """Pictures, logs of the curves, folder. Raises LogError."""
    kinds = (argv[0],) if argv and argv[0] in KINDS else KINDS
    words, paths, out = iter(argv[kinds is not KINDS:]), [], RECORDS.parent / "img"
    for word in words:
        if word == "--out":
            if not (folder := next(words, "")):
                raise LogError(f"--out needs a folder: {USAGE}")
            out = Path(folder)
        elif word.startswith("-") or not Path(word).is_file():
            near = difflib.get_close_matches(word, KINDS, n=1)
            hint = f"did you mean {near[0]}?" if near else USAGE
            raise LogError(f"{word} is no {'option' if word.startswith('-') else 'log'}: {hint}")
        else:
            paths.append(word)
    if paths and "curves" not in kinds:
        raise LogError(f"{kinds[0]} takes no log: {USAGE}")
    return kinds, paths, out


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr)


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Within it STYLE holds, whatever the user's matplotlibrc says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


########################################
#                 Data                 #
########################################


def folder_name(log: Log) -> str:
    return log.path.absolute().parent.name.replace("_", " ", 1)


def record_rows(logs: list[Log]) -> list[Row]:
    """A row for the runs of one folder, hardware, source and configuration; by track, hardware, date and time."""
    rows = []
    for group in groups([log for log in logs if log.finished and not log.resumed and log.train_time_ms]):
        log = group[0]
        rows.append((Row(f"{track(log)}, {log.hardware_class}", folder_name(log),
                         [each.train_time_ms / 1e3 for each in group], [each.val_loss for each in group],
                         steps_done(log), is_whole(log)), log.run_id))
    rows.sort(key=lambda item: (item[0][:2], not item[0].whole, np.mean(item[0].times)))
    named = [row[:2] for row, _ in rows]
    return [row._replace(name=f"{row.name}, {run_id[:8]}") if row[:2] in named[:i] else row
            for i, (row, run_id) in enumerate(rows)]


def curve(log: Log, name: str) -> Curve:
    points = {"train": [], "val": []}
    for step in log.steps:
        if step.step and math.isfinite(step.loss):
            seconds = math.nan if step.time_ms is None else step.time_ms / 1e3
            points[step.kind].append((seconds, tokens_done(log, step.step), step.loss))
    return Curve(name, *(np.array(rows, float).reshape(-1, 3) for rows in points.values()))


def curves_of(logs: list[Log]) -> list[Curve]:
    """Curves whose names tell the run, the hardware and the end."""
    names, curves = [folder_name(log) for log in logs], []
    for log, name in zip(logs, names, strict=True):
        run = f" {log.run_id[:8]}" if names.count(name) > 1 else ""
        time = "" if log.train_time_ms is None else f" in {log.train_time_ms / 1e3:.1f} s"
        cut = "" if log.finished else ", unfinished"
        curves.append(curve(log, f"{name}{run}, {log.hardware_class}: val {log.val_loss:.4f}{time}{cut}"))
    return curves


def fastest_logs() -> list[Log]:
    """Of each record folder of TRACK the whole run of the least time."""
    found = ([log for log in map(read_log, find_logs(folder)) if is_whole(log) and log.train_time_ms]
             for folder in record_folders(RECORDS).get(TRACK, []))
    return [min(logs, key=lambda log: (log.train_time_ms, log.run_id)) for logs in found if logs]


def read_rungs() -> dict[tuple[str, str], list[Log]]:
    """Hardware and name to the whole runs of each rung."""
    rungs = {}
    for log in (log for folder in rung_folders(RECORDS) for log in rung_logs(folder)):
        options = "".join(f" {key}={log.config[key]}" for key in OPTIONS if key in log.config)
        rungs.setdefault((log.hardware_class, folder_name(log) + options), []).append(log)
    return dict(sorted(rungs.items()))


def ladder_rows(rungs: dict[tuple[str, str], list[Log]]) -> tuple[list[Row], float]:
    """A row a rung, and the tokens at which losses are read."""
    at = equal_tokens([log for logs in rungs.values() for log in logs])
    return [Row(*key, [log.train_time_ms / log.result["steps"] for log in logs],
                [loss_at(val_points(log), at) for log in logs]) for key, logs in rungs.items()], at


########################################
#               Figures                #
########################################


def draw_records() -> Figure | None:
    logs = [read_log(path) for folders in record_folders(RECORDS).values() for folder in folders
            for path in find_logs(folder)]
    rows = record_rows(logs)
    return records_figure(rows) if rows else say("records: no finished log, so nothing to draw")


def draw_curves(paths: list[str]) -> Figure | None:
    curves = curves_of([read_log(path) for path in paths] or fastest_logs())
    for each in curves:
        if not len(each.train) + len(each.val):
            say(f"curves: {each.name}: no loss after step 0 is finite, so it is not drawn")
    curves = [each for each in curves if len(each.train) + len(each.val)]
    told = [[bool(np.isfinite(np.vstack(each[1:])[:, column]).any()) for each in curves] for column in (0, 1)]
    for word, flags in zip(("time", "tokens"), told, strict=True):
        for each, flag in zip(curves, flags, strict=True):
            if not flag:
                say(f"curves: {each.name}: the log does not tell {word}, so the panel of {word} is without it")
    return curves_figure(curves) if any(map(any, told)) else say("curves: nothing to draw")


def draw_ladder() -> Figure | None:
    rungs = read_rungs()
    if not rungs:
        return say("ladder: no folder records/ladder/NN_name has the log of a whole run: nothing to draw")
    rows, at = ladder_rows(rungs)
    for row in rows:
        if not np.isfinite(row.losses).all():
            say(f"ladder: {row.name}: a log does not tell its loss at equal tokens, so that panel is without it")
    return ladder_figure(rows, at)


def records_figure(rows: list[Row]) -> Figure:
    """Training time by record."""
    return rows_figure(rows, [Panel("training time, s (mean and range of the runs; open: stopped early)",
                                    [row.times for row in rows],
                                    {"mean, s": means([row.times for row in rows], 1),
                                     "val loss": means([row.losses for row in rows], 4),
                                     "runs": [str(len(row.times)) for row in rows],
                                     "steps": [row.steps for row in rows]})])


def ladder_figure(rows: list[Row], at: float) -> Figure:
    """Val loss at equal tokens and time a step, by rung."""
    losses = [[loss for loss in row.losses if math.isfinite(loss)] for row in rows]
    times = [row.times for row in rows]
    told = f" at {at / 1e6:.4g} million tokens" if math.isfinite(at) else ""
    return rows_figure(rows, [Panel(f"val loss{told}", losses, {"mean": means(losses, 4)}, log=False),
                              Panel("time a step, ms", times, {"mean, ms": means(times, 1)})])


def means(values: list[list[float]], digits: int) -> list[str]:
    return [f"{np.mean(row):.{digits}f}" if row else "-" for row in values]


def rows_figure(rows: list[Row], panels: list[Panel]) -> Figure:
    """A line a row from top to bottom, under the name of its group; every panel has dots, whiskers and columns."""
    changes = np.cumsum([i == 0 or row.group != rows[i - 1].group for i, row in enumerate(rows)])
    heights = [i + 1.3 * change - 0.3 for i, change in enumerate(changes)]
    figure = Figure((WIDTH, 0.55 + ROW * (heights[-1] + 1)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    axes[0].set_ylim(heights[-1] + 0.7, -0.7)
    axes[0].set_yticks(heights, [row.name for row in rows])
    for row, y, change, last in zip(rows, heights, changes, [0, *changes], strict=False):
        if change != last:
            put(axes[0], y - 1, -3.5, row.group, weight="bold")
    for ax, panel in zip(axes, panels, strict=True):
        ax.tick_params(axis="y", length=0)
        ax.set_xlabel(panel.label)
        for row, y, values in zip(rows, heights, panel.values, strict=True):
            dots(ax, y, values, row.whole)
        put_columns(ax, heights, panel.columns)
        if panel.log:
            ax.set_xscale("log")
            times = [value for values in panel.values for value in values]
            set_ticks(ax.xaxis, enclosing(time_ticks(times), times))
    return figure


def dots(ax: Axes, y: float, values: list[float], filled: bool) -> None:
    """A whisker from the least to the greatest value and a dot at their mean."""
    if len(values) > 1:
        ax.plot([min(values), max(values)], [y, y], color=INK, marker="|", markersize=7, zorder=3)
    if values:
        face = COLORS[1] if filled else "white"
        ax.plot([np.mean(values)], [y], "o", color=COLORS[1], markerfacecolor=face, zorder=4)


def put_columns(ax: Axes, heights: list[float], columns: dict[str, list[str]]) -> None:
    right = 0.0
    for title, texts in columns.items():
        right += 8 + 4.8 * max(map(len, [title, *texts]))  # a digit is 4.8 points wide
        for y, text in zip([0, *heights], [title, *texts], strict=True):
            put(ax, y, right, text, x=1, color=FAINT if text is title else INK)


def put(ax: Axes, y: float, right: float, text: str, x: float = 0, **look) -> None:
    """Text at the height of a row that ends `right` points right of the axes' fraction x."""
    ax.annotate(text, (x, y), (right, 0), ("axes fraction", "data"), "offset points", ha="right",
                va="center_baseline", annotation_clip=False, **look)


def time_ticks(values: list[float]) -> list[float]:
    """Round numbers, fewer a decade where the values span many."""
    decades = math.log10(max(values) / min(values))
    digits = (1, 2, 3, 5, 7) if decades < 1.2 else (1, 3) if decades < 2.5 else (1,)
    return [float(f"{digit}e{power}") for power in range(-4, 9) for digit in digits]


def enclosing(ticks: Sequence[float], values: Iterable[float]) -> Sequence[float]:
    """From the last tick below all values to the first one above them."""
    first, last = np.searchsorted(ticks, min(values)), np.searchsorted(ticks, max(values), "right")
    return ticks[max(first - 1, 0):last + 1]


def set_ticks(axis: Axis, ticks: Sequence[float]) -> None:
    """These ticks and no others, written as plain numbers, from end to end of the axis."""
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.axes.set(**{f"{axis.axis_name}lim": (ticks[0], ticks[-1])})


def curves_figure(curves: list[Curve]) -> Figure:
    """Loss against training time and against tokens."""
    columns = 2 if len(curves) > 1 and max(len(each.name) for each in curves) <= 55 else 1
    figure = Figure((WIDTH, 3.2 + 0.15 * math.ceil(len(curves) / columns)), layout="constrained")
    axes, handles = figure.subplots(1, 2, sharey=True), []
    for i, each in enumerate(curves):
        look = {"color": COLORS[i % len(COLORS)], "markerfacecolor": "white", "zorder": 3 + i / len(curves)}
        dash, marker = DASHES[(i + i // len(COLORS)) % len(DASHES)], MARKERS[i % len(MARKERS)]
        for ax, column, scale in zip(axes, (0, 1), (1, 1e6), strict=True):
            ax.plot(each.train[:, column] / scale, each.train[:, 2], linestyle=dash, **look)
            if np.isfinite(each.val[:, column]).any():  # what is not clipped and nowhere squeezes the picture
                ax.plot(each.val[:, column] / scale, each.val[:, 2], marker, clip_on=False, **look)
        handles.append(Line2D([], [], linestyle=dash, marker=marker, label=each.name, **look))
    losses = np.concatenate([part[:, 2] for each in curves for part in each[1:]])
    axes[0].set(yscale="log", ylabel="loss (lines: training, markers: validation)", xlabel="training time, s")
    axes[1].set(xlabel="training tokens, millions")
    set_ticks(axes[0].yaxis, enclosing(LOSS_TICKS, losses))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, handlelength=3)
    return figure
