"""python -m records table: the leaderboards of records/README.md and README.md and the ladder's, made from the logs."""
import math
from pathlib import Path

import numpy as np

from records.check import RECORDS, record_folders
from records.ladder import OPTIONS, equal_tokens, loss_at, rung_folders, rung_logs, time_to, val_points
from records.logs import Log, LogError, find_logs, read_log
from records.stats import TARGET, below, check_set, groups, losses, seconds, steps_done

BEGIN, END = "<!-- table: python -m records table -->", "<!-- end of table -->"
LADDER = "<!-- ladder: python -m records table -->"  # begins the ladder's tables, which END ends too
HEAD = ("record", "hardware", "processes", "n", "val loss", "time, s", f"p (< {TARGET})", "steps", "tokens", "logs")


def table(argv: list[str]) -> int:
    """Writes the tables, or with --check says whether a file differs (1). Raises LogError."""
    if argv not in ([], ["--check"]):
        raise LogError("table takes no argument but --check: write `python -m records table [--check]`")
    old = table_files(RECORDS)
    new = {path: replaced(path, text, leaderboards(RECORDS, path.parent)) for path, text in old.items()}
    for path, block in ladder_tables(RECORDS).items():
        old[path] = text_of(path)
        new[path] = replaced(path, old[path], block, LADDER)
    stale = [path for path in old if new[path] != old[path]]
    names = " and ".join(path.relative_to(RECORDS.parent).as_posix() for path in stale)
    if argv and stale:
        print(f"{names} differ{'s' * (len(stale) == 1)} from what the logs say: run `python -m records table`")
        return 1
    for path in stale:
        path.write_text(new[path], encoding="utf-8")
    print(f"{names}: written" if stale else "the tables are what the logs say")
    return 0


def table_files(root: Path) -> dict[Path, str]:
    """Path to text of the files that carry the tables, records/README.md and README.md. Raises LogError."""
    paths = root / "README.md", root.parent / "README.md"
    for path in paths:
        if not path.is_file():
            raise LogError(f"{path} is missing: make it, with the lines {BEGIN} and {END}")
    return {path: text_of(path) for path in paths}


def text_of(path: Path) -> str:
    """Raises LogError if it is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LogError(f"{path} has the byte {path.read_bytes()[error.start]:#x} at offset {error.start}, which is no "
                       "UTF-8: save it as UTF-8") from None


def replaced(path: Path, text: str, tables: str, marker: str = BEGIN) -> str:
    """The text with the tables between its markers. Raises LogError unless both stand there once, in order."""
    before, begin, rest = text.partition(marker)
    _, end, after = rest.partition(END)
    if not (begin and end) or marker in rest or END in before + after:
        raise LogError(f"{path} needs the line {marker} and after it the line {END}, each once")
    return f"{before}{marker}\n\n{tables}\n\n{END}{after}"


def leaderboards(root: Path, base: Path) -> str:
    """Markdown, a section a track, with links relative to the folder `base`. Raises LogError as stats would."""
    sections = []
    for track, folders in record_folders(root).items():
        logs = [read_log(path) for folder in folders for path in find_logs(folder)]
        rows = sorted(groups([log for log in logs if log.finished and not log.resumed]), key=order)
        for group in rows:
            check_set(group)
        lines = [f"### {track}", "", row(HEAD), row(["---"] * len(HEAD)), *(row(cells(group, base)) for group in rows)]
        counts = {"unfinished": sum(not log.finished for log in logs),
                  "resumed": sum(log.finished and log.resumed for log in logs)}
        if left := [f"{count} {word} log{'s' * (count > 1)}" for word, count in counts.items() if count]:
            lines += ["", f"Left out: {' and '.join(left)}."]
        sections.append("\n".join(lines))
    return "\n\n".join(sections)


def ladder_tables(root: Path) -> dict[Path, str]:
    """README of the ladder and of each rung to its table: of the runs of all rungs, and of its own."""
    rungs = {folder: groups(rung_logs(folder)) for folder in rung_folders(root)}
    for group in (group for found in rungs.values() for group in found):
        check_set(group)
    logs = [log for found in rungs.values() for group in found for log in group]
    at = equal_tokens(logs)
    goal = max((loss for log in logs if math.isfinite(loss := loss_at(val_points(log), at))), default=math.nan)
    head = ("rung", "hardware", "n", f"val loss at {at / 1e6:.4g} million tokens", "ms a step",
            "thousand tokens a second", f"s to val loss {goal:.4f}", "logs")
    tables = {}
    for base, folders in [(root / "ladder", list(rungs)), *((folder, [folder]) for folder in rungs)]:
        rows = [ladder_cells(group, base, at, goal) for folder in folders for group in rungs[folder]]
        missing = ", ".join(folder.name for folder in folders if not rungs[folder])
        lines = [row(head), row(["---"] * len(head)), *map(row, rows)] if rows else []
        lines += [""] * bool(rows and missing) + [f"Not measured: {missing}."] * bool(missing)
        tables[base / "README.md"] = "\n".join(lines)
    return tables if rungs else {}


def ladder_cells(group: list[Log], base: Path, at: float, goal: float) -> list[str]:
    """One row's texts: of runs of one rung with one source and configuration."""
    folder = group[0].path.parent
    points, times = [val_points(log) for log in group], np.array([log.train_time_ms for log in group])
    options = "".join(f" {key}={group[0].config[key]}" for key in OPTIONS if key in group[0].config)
    link = "" if folder == base else f"{folder.name}/"
    return [(f"[{folder.name}]({folder.name})" if link else folder.name) + options, group[0].hardware_class,
            str(len(group)), spread(np.array([loss_at(each, at) for each in points]), 4),
            spread(times / group[0].result["steps"], 1), spread((group[0].tokens or math.nan) / times, 0),
            spread(np.array([time_to(each, goal) for each in points]), 1),
            ", ".join(f"[{log.run_id[:8]}]({link}{log.path.name})" for log in group)]


def order(group: list[Log]) -> tuple:
    """Hardware, then mean time; runs of fewer steps than scheduled after the whole ones of their hardware."""
    result, times = group[0].result, seconds(group)
    short = result["steps"] < result.get("scheduled_steps", result["steps"])
    return group[0].hardware_class, short, math.inf if times is None else times.mean(), group[0].run_id


def cells(group: list[Log], base: Path) -> list[str]:
    """One row's texts, in the order of HEAD."""
    log, p, times = group[0], below(losses(group), TARGET), seconds(group)
    folder = log.path.parent.relative_to(base).as_posix()
    return [f"[{log.path.parent.name}]({folder})", log.hardware_class, dash(log.processes), str(len(group)),
            spread(losses(group), 4), "-" if times is None else spread(times, 2), "-" if p is None else f"{p:.2g}",
            steps_done(log), "-" if log.tokens is None else f"{log.tokens:,}",
            ", ".join(f"[{each.run_id[:8]}]({folder}/{each.path.name})" for each in group)]


def spread(values: np.ndarray, digits: int) -> str:
    """Mean, and the standard deviation where there are two values; "-" where one is untold."""
    if np.isnan(values).any():
        return "-"
    mean = f"{values.mean():.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {values.std(ddof=1):.{digits}f}"


def dash(value: object) -> str:
    return "-" if value is None else str(value)


def row(texts: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(texts)} |"
