"""python -m records table: the leaderboards of records/README.md and README.md, made from the logs."""
import math
from pathlib import Path

import numpy as np

from records.check import RECORDS, record_folders
from records.logs import Log, LogError, find_logs, read_log
from records.stats import TARGET, below, losses, seconds, settings, source_hash

BEGIN, END = "<!-- table: python -m records table -->", "<!-- end of table -->"
HEAD = ("record", "hardware", "processes", "n", "val loss", "time, s", f"p (< {TARGET})", "steps", "tokens", "logs")


def table(argv: list[str]) -> int:
    """Writes the tables, or with --check says whether a file differs (1). Raises LogError."""
    if argv not in ([], ["--check"]):
        raise LogError("table takes no argument but --check: write `python -m records table [--check]`")
    old = table_files(RECORDS)
    new = {path: replaced(path, text, leaderboards(RECORDS, path.parent)) for path, text in old.items()}
    stale = [path for path in old if new[path] != old[path]]
    names = " and ".join(path.relative_to(RECORDS.parent).as_posix() for path in stale)
    if argv and stale:
        print(f"{names} differs from what the logs say: run `python -m records table`")
        return 1
    for path in stale:
        path.write_text(new[path], encoding="utf-8")
    print(f"{names}: written" if stale else "the tables are what the logs say")
    return 0


def table_files(root: Path) -> dict[Path, str]:
    """Path to text of the files that carry the tables: records/README.md, and README.md if it has the markers."""
    inner, outer = root / "README.md", root.parent / "README.md"
    texts = {path: path.read_text(encoding="utf-8") for path in (inner, outer) if path.is_file()}
    if inner not in texts:
        raise LogError(f"{inner} is missing: make it, with the lines {BEGIN} and {END}")
    return {path: text for path, text in texts.items() if path == inner or BEGIN in text}


def replaced(path: Path, text: str, tables: str) -> str:
    """The text with the tables between its markers. Raises LogError unless both stand there once, in order."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in before + after:
        raise LogError(f"{path} needs the line {BEGIN} and after it the line {END}, each once")
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def leaderboards(root: Path, base: Path) -> str:
    """Markdown, a section a track, with links relative to the folder `base`."""
    sections = []
    for track, folders in record_folders(root).items():
        logs = [read_log(path) for folder in folders for path in find_logs(folder)]
        rows = sorted(groups([log for log in logs if log.finished]), key=order)
        lines = [f"### {track}", "", row(HEAD), row(["---"] * len(HEAD)), *(row(cells(group, base)) for group in rows)]
        if unfinished := sum(not log.finished for log in logs):
            lines += ["", f"Left out: {unfinished} unfinished log{'s' * (unfinished > 1)}."]
        sections.append("\n".join(lines))
    return "\n\n".join(sections)


def groups(logs: list[Log]) -> list[list[Log]]:
    """Runs of one folder, hardware, source and configuration, the seed apart."""
    found = {}
    for log in logs:
        key = log.path.parent, log.hardware_class, log.processes, source_hash(log), settings(log), log.result["steps"]
        found.setdefault(key, []).append(log)
    return [sorted(group, key=lambda log: (log.seed is None, log.seed, log.run_id)) for group in found.values()]


def order(group: list[Log]) -> tuple:
    """Hardware, then mean time; runs of fewer steps than scheduled after the whole ones of their hardware."""
    result, times = group[0].result, seconds(group)
    short = result["steps"] < result.get("scheduled_steps", result["steps"])
    return group[0].hardware_class, short, math.inf if times is None else times.mean(), group[0].run_id


def cells(group: list[Log], base: Path) -> list[str]:
    """One row's texts, in the order of HEAD."""
    log, p, times = group[0], below(losses(group), TARGET), seconds(group)
    steps, scheduled = log.result["steps"], log.result.get("scheduled_steps")
    folder = log.path.parent.relative_to(base).as_posix()
    return [f"[{log.path.parent.name}]({folder})", log.hardware_class, dash(log.processes), str(len(group)),
            spread(losses(group), 4), "-" if times is None else spread(times, 2), "-" if p is None else f"{p:.2g}",
            str(steps) if scheduled in (None, steps) else f"{steps} of {scheduled}",
            "-" if log.tokens is None else f"{log.tokens:,}",
            ", ".join(f"[{each.run_id[:8]}]({folder}/{each.path.name})" for each in group)]


def spread(values: np.ndarray, digits: int) -> str:
    """Mean, and the standard deviation where there are two values."""
    mean = f"{values.mean():.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {values.std(ddof=1):.{digits}f}"


def dash(value: object) -> str:
    return "-" if value is None else str(value)


def row(texts: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(texts)} |"
