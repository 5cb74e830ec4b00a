"""python -m records diff and extract: what differs between two runs, and a run's sources as a folder."""
import ast
import difflib
import hashlib
import itertools
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from records.logs import Log, LogError, encoded, read_log

PLAIN = re.compile(r"\w[\w.+-]{,99}\.py")
ROOT = Path(__file__).resolve().parent.parent
OPTION = re.compile(r"^    (\w+): \w+ = knob\(", re.M)  # a setting of the command line, in our trainer's source


def diff(argv: list[str]) -> int:
    """Prints in what two logs differ: settings, environment, result, validations, sources. Raises LogError."""
    if len(argv) != 2:
        raise LogError(f"diff takes two logs, not {len(argv)}: write `python -m records diff LOG LOG`")
    a, b = (read_log(path) for path in argv)
    print(f"A {a.path}\nB {b.path}")
    for title in ("config", "environment", "result"):
        print("\n".join(side_by_side(title, getattr(a, title), getattr(b, title))))
    print("\n".join(validations(a, b)))
    for line in source_diff(a, b):
        print(line)
    return 0


def side_by_side(title: str, a: dict, b: dict) -> list[str]:
    """A line for each entry that differs; "-" where one has none, the first unlike line where it has several."""
    names = [name for name in (a | b) if a.get(name) != b.get(name)]
    lines = [f"\n{title}: {len(names)} differ, {len(a | b) - len(names)} equal"]
    for name in names:
        left, right = excerpts(*(f"{entries.get(name, '-')}".split("\n") for entries in (a, b)))
        lines.append(f"  {name:<32} {left:<40} {right}")
    return lines


def excerpts(a: list[str], b: list[str], width: int = 60) -> list[str]:
    """Of the first lines that differ the beginnings, or what stands around the difference if it is farther on."""
    pairs = itertools.zip_longest(a, b, fillvalue="-")
    one, two = next((pair for pair in pairs if pair[0] != pair[1]), (a[0], b[0]))
    at = len(os.path.commonprefix([one, two]))
    start, dots = (at - width // 2, "...") if at >= width - 10 else (0, "")
    return [(dots + text[start:])[:width] for text in (one, two)]


def validations(a: Log, b: Log) -> list[str]:
    """Val losses at the steps that both logs validated."""
    left, right = ({step.step: step.loss for step in log.vals} for log in (a, b))
    common = sorted(left.keys() & right.keys())
    return [f"\nval loss at {len(common)} common steps",
            *(f"  {step:>6} {left[step]:8.4f} {right[step]:8.4f} {right[step] - left[step]:+8.4f}" for step in common)]


def source_diff(a: Log, b: Log) -> Iterator[str]:
    """Unified diffs of the embedded sources, function by function where both are Python."""
    for log in (a, b):
        if not log.sources:
            yield f"\n{log.path} embeds no source: nothing to compare"
            return
    for name in sorted(a.sources | b.sources):
        left, right = a.sources.get(name), b.sources.get(name)
        if left is None or right is None:
            yield f"\n{name}: only in {'B' if left is None else 'A'}"
        elif left == right:
            yield f"\n{name}: equal"
        elif left.splitlines() == right.splitlines():
            yield f"\n{name}: equal but for the ends of lines"
        else:
            yield f"\n{name}: {len(left.splitlines())} and {len(right.splitlines())} lines"
            yield from list(piece_diff(pieces(left), pieces(right))) or ["only moved code or empty lines"]


def piece_diff(a: dict[str, str], b: dict[str, str]) -> Iterator[str]:
    """A function that only moved is equal here; of one that only one source has, its name and lines."""
    for name in [*a, *(name for name in b if name not in a)]:
        if name not in a or name not in b:
            yield f"{'+++ added' if name in b else '--- removed'}: {name}, {len((a | b)[name].splitlines())} lines"
        elif a[name] != b[name]:
            yield f"@@@ {name}"
            hunks = difflib.unified_diff(a[name].splitlines(), b[name].splitlines(), lineterm="", n=2)
            yield from list(hunks)[2:]


def pieces(text: str) -> dict[str, str]:
    """Functions and methods by qualified name, and what is outside of them by its class or as "module"; all of it as
    "module" if it is not Python."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # of bytes that are no text, of deep nesting
        return {"module": text}
    lines, found, rest = text.splitlines(), {}, {}
    owner = dict.fromkeys(range(len(lines)), "module")
    for node, prefix in [(node, "") for node in tree.body] + [
            (node, f"{parent.name}.") for parent in tree.body if isinstance(parent, ast.ClassDef)
            for node in parent.body]:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name, first = f"{prefix}{node.name}", min([node, *node.decorator_list], key=lambda x: x.lineno).lineno
            while name in found:  # overloads, and functions that are all called _
                name += "'"
            found[name] = ""
            owner |= dict.fromkeys(range(first - 1, node.end_lineno), name)
    for i, line in enumerate(lines):
        rest.setdefault(owner[i], []).append(line)
    return {name: re.sub("\n{3,}", "\n\n", "\n".join(part)).strip("\n") for name, part in rest.items()}


def extract(argv: list[str]) -> int:
    """Writes a log's sources into a new folder, with a README that says how to run them. Raises LogError."""
    if len(argv) != 2 or not argv[1]:
        raise LogError("extract takes a log and a folder: write `python -m records extract LOG DIR`")
    log, folder = read_log(argv[0]), Path(argv[1])
    if not log.sources:
        raise LogError(f"{log.path} embeds no source: nothing to extract")
    for name in log.sources:
        if not PLAIN.fullmatch(name):
            raise LogError(f"{log.path} embeds a source called {name!r:.80}, not NAME.py: not extracted")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LogError(f"{folder} is there and not empty: name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in log.sources.items():
        (folder / name).write_bytes(encoded(text))
    data = link_data(log, folder)
    (folder / "README.md").write_text(readme(log, data), encoding="utf-8")
    print("\n".join(str(folder / name) for name in [*log.sources, "README.md", *["data"] * bool(data)]))
    return 0


def link_data(log: Log, folder: Path) -> str:
    """Links this checkout's data, unless the run read other token tables; what the folder's README says of it."""
    name, wanted = log.config.get("token_tables", ""), log.environment.get("token tables")
    content = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
    if wanted not in (None, f"sha256 {hashlib.sha256(content).hexdigest()}"):
        print(f"{name} is not here as the run read it ({wanted}): bring it before you run the folder")
        return ""
    (folder / "data").symlink_to(os.path.relpath(ROOT / "data", folder.resolve()))
    return "`data` is a link to the data of the checkout that extracted it. "


def readme(log: Log, data: str) -> str:
    versions = " ".join(f"{name} {log.environment[name]}" for name in ("python", "torch", "triton", "cuda")
                        if name in log.environment)
    time = "" if log.train_time_ms is None else f" after {log.train_time_ms / 1e3:.1f} s of training"
    result = f"val loss {log.val_loss:.4f}{time}" if log.finished else "unfinished"
    return (f"# Run {log.run_id}\n\nSources as its log embeds them. {data}It ran on {log.hardware} with "
            f"{versions or 'versions that the log does not name'}: {result}.\n\n"
            f"```\n{fetch(log)}{command(log)}\n```\n")


def fetch(log: Log) -> str:
    """The command line that makes the preset's missing shards, where the trainer has one."""
    keys = [key for key in ("preset", "train_files", "val_files") if key in log.config]
    words = [f"{key}={log.config[key]}" for key in keys]
    return shlex.join(["python", "train_gpt.py", "fetch", *words]) + "\n" if log.config.get("fetch") else ""


def command(log: Log) -> str:
    """The command line that repeats a run of ours: every setting but log_dir, this trial's seed, one trial."""
    options = {*OPTION.findall(log.sources.get("train_gpt.py", ""))} - {"log_dir"}
    settings = {key: value for key, value in log.config.items() if key in options and "\n" not in value}
    if log.seed is not None and "seed" in settings:
        settings |= {"seed": str(log.seed), **({"trials": "1"} if "trials" in settings else {})}
    words = [f"{key}={value}" for key, value in settings.items()]
    launch = f"torchrun --standalone --nproc_per_node {log.processes}" if (log.processes or 1) > 1 else "python"
    return shlex.join([*launch.split(), "train_gpt.py", *words])
