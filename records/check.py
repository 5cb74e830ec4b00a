"""python -m records check: is every record folder complete and readable?"""
import contextlib
import datetime
import re
from pathlib import Path

from records.ladder import is_whole, rung_folders
from records.logs import UUID, Log, LogError, encoded, find_logs, lines_from, parts, read_log

RECORDS = Path(__file__).resolve().parent
RUNS = "runs"  # every run's log, not committed
NO_TRACKS = (RUNS, "ladder", "__pycache__")
KINDS = (".md", ".txt", ".py", ".png")  # of files in a record folder
STARTS = re.compile(r"\d{4}-\d\d-\d\d")
DATED = re.compile(r"(\d{4}-\d\d-\d\d)_\w[\w.+-]*")
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:root|home|opt|tmp)\b\S*")


def check(argv: list[str]) -> int:
    """Prints a line for every problem and returns 1 if there is one. Raises LogError for arguments."""
    if argv:
        raise LogError("check takes no arguments: write `python -m records check`")
    folders = [folder for track in record_folders(RECORDS).values() for folder in track]
    rungs = rung_folders(RECORDS)
    problems = [problem for folder in folders for problem in folder_problems(folder)]
    problems += [problem for rung in rungs for problem in rung_problems(rung)]
    problems += misplaced(RECORDS)
    folders += rungs
    logs = [path for folder in folders for path in find_logs(folder)]
    problems += repeated(logs)
    print("\n".join(problems) or f"{len(folders)} folders, {len(logs)} logs: in order")
    return 1 if problems else 0


def record_folders(root: Path) -> dict[str, list[Path]]:
    """Track to its folders: a track is a folder under `root` with a subfolder that has a log or a date in its name."""
    tracks = {}
    for track in sorted(root.iterdir()):
        folders = sorted(path for path in track.glob("*/") if not path.name.startswith((".", "__")))
        if track.name not in NO_TRACKS and not STARTS.match(track.name) and any(
                STARTS.match(folder.name) or find_logs(folder) for folder in folders):
            tracks[track.name] = folders
    return tracks


def misplaced(root: Path) -> list[str]:
    """Sentences about records and logs outside of the folders of tracks, where no table finds them."""
    tracks = [root, *(root / track for track in record_folders(root)), *root.glob("ladder/")]
    return [f"{path.relative_to(root)} lies where no table finds it: move it into a folder TRACK/YYYY-MM-DD_Name"
            for track in tracks for path in sorted(track.iterdir())
            if path.is_file() and UUID.match(path.name) or track == root and path.is_dir() and STARTS.match(path.name)]


def strays(folder: Path) -> list[str]:
    """Sentences about what lies in a record folder and is neither its README, a log, a script nor a picture."""
    return [f"{path.name} is neither README.md, a log (.txt), a script (.py) nor a picture (.png)"
            for path in sorted(folder.iterdir()) if not path.name.startswith((".", "__"))
            and (path.is_dir() or path.suffix not in KINDS)]


def set_problems(logs: list[Log]) -> list[str]:
    """Why runs that share a row of a table are no set, as stats has it."""
    from records.stats import check_set, groups  # here, for the rest of this module needs no scipy
    problems = []
    for group in groups(logs):
        try:
            check_set(group)
        except LogError as error:
            problems.append(str(error))
    return problems


def folder_problems(folder: Path) -> list[str]:
    """Sentences about one record folder, those about its logs included."""
    name, problems = f"{folder.parent.name}/{folder.name}", []
    if not real_date(folder.name):
        problems.append(f"{name} is not named YYYY-MM-DD_Name with a date of the calendar")
    text = text_of(folder / "README.md")
    if not text.strip():
        problems.append(f"{name} has no README.md, or an empty one")
    logs = find_logs(folder)
    if not logs:
        problems.append(f"{name} has no log")
    problems += [f"{name}/{path.name} {problem}" for path in logs for problem in log_problems(path, text)]
    return problems + [f"{name}/{stray}" for stray in strays(folder)] + set_problems(
        [log for log in readable(logs) if log.finished and not log.resumed])


def rung_problems(folder: Path) -> list[str]:
    """Sentences about one rung of the ladder, which is a script with a README, and logs once it has run."""
    name = f"{folder.parent.name}/{folder.name}"
    problems = [f"{name} has no {file}, or an empty one" for file in ("README.md", "train_gpt.py")
                if not text_of(folder / file).strip()]
    problems += [f"{name}/{path.name} {problem}" for path in find_logs(folder) for problem in log_problems(path, "")]
    return problems + [f"{name}/{stray}" for stray in strays(folder)] + set_problems(
        [log for log in readable(find_logs(folder)) if is_whole(log)])


def readable(paths: list[Path]) -> list[Log]:
    """Of the logs those that can be read; of the others log_problems tells."""
    logs = []
    for path in paths:
        with contextlib.suppress(LogError):
            logs.append(read_log(path))
    return logs


def repeated(paths: list[Path]) -> list[str]:
    """Sentences about logs of a run that another log is of, by its id or its step lines."""
    seen, problems = {}, []
    for log in readable(paths):
        name = "/".join(log.path.parts[-3:])
        for key in (log.identity, repr(log.steps)):
            if seen.setdefault(key, name) != name:
                problems.append(f"{name} is the run of {seen[key]} again")
                break
    return problems


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def real_date(name: str) -> bool:
    match = DATED.fullmatch(name)
    try:
        return bool(match and datetime.date.fromisoformat(match[1]))
    except ValueError:
        return False


def log_problems(path: Path, readme: str) -> list[str]:
    """What is amiss in one log, as predicates of it."""
    try:
        log = read_log(path)
    except LogError as error:
        return [f"cannot be read: {error}"]
    problems = [f"lacks the source {name}" for name in needed_sources(log) if not log.sources.get(name, "").strip()]
    if not log.finished and not (log.run_id[:8] in readme and "cut off" in readme):
        end = "is cut off in its last line" if log.cut else "has no result"
        problems.append(f"{end}, and the README does not say that {log.run_id[:8]} was cut off")
    if log.resumed:
        problems.append("was resumed: its training began in another log")
    script = path.with_name("train_gpt.py")
    if script.is_file() and script.read_bytes() != encoded(log.sources.get(script.name, "")):
        problems.append(f"embeds another {script.name} than its folder has")
    for number, line in lines_from(path, parts(path)[1]):
        if match := MACHINE_PATH.search(line):
            problems.append(f"names a path of a machine in line {number}: {match[0]}")
    return problems


def needed_sources(log: Log) -> tuple[str, ...]:
    """A trainer of one file needs no second, one before November 27 no third."""
    source = log.sources.get("train_gpt.py", "")
    alone = log.dialect != "ours" or (source and "import triton_kernels" not in source)
    return ("train_gpt.py",) if alone else (
        "train_gpt.py", "triton_kernels.py", *["runtime.py"] * ("\nfrom runtime import" in source))
