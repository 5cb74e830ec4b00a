"""Reads the log of a run: ours, modded-nanogpt's (`step:i/N val_loss:...`) or llm.c's (`s:i tel:...`)."""
import json
import math
import mmap
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

RULE = b"=" * 100
LEAD = re.compile(rb"\xef\xbb\xbf|\s+={100}\r?\n")  # what an editor may put before a log
TITLE = re.compile(rb"^={100}\r?\n(?:source: ([^\r\n]+)|environment)\r?\n={100}\r?\n", re.M)  # of a section of ours
APPENDED = re.compile(rb"\r?\n\r?\n-{40}\r?\n# (\S+\.py)\r?\n-{40}\r?\n\r?\n")  # a second source of modded-nanogpt
IMPORT = re.compile(rb"^(?:import|from) \w", re.M)
STEP = re.compile(r"step:(\d{1,18})/(\d{1,18})((?: \w+:\S*)+)")
LLMC_STEP = re.compile(r"s:(\d{1,18}) (tel|trl):(\S+)(?: .*)?")
MANGLED = re.compile(r"val_loss:| tel:| trl:")  # a line with one of these was a step line
ENTRY = re.compile(  # of our environment
    r"(hardware|driver|git|token tables|stage \d+|data|model|operations|memory|speed|resumed|seed): ?(.*)")
VERSIONS = (  # of modded-nanogpt's environment
    re.compile(r"Running Python (?P<python>\S+)"),
    re.compile(r"Running py?torch (?P<torch>\S+) compiled for CUDA (?P<cuda>\S+)", re.I),
    re.compile(r"Running Triton version (?P<triton>\S+)"),
    re.compile(r".*Driver Version: (?P<driver>\S+)"),
)
GPU_ROW = re.compile(r"\|\s+\d+\s+(\S+(?: \S+)*)\s+(?:On|Off|N/A)\s+\|")  # of nvidia-smi
PEAK = re.compile(r"peak memory (?:allocated|consumption): (\d{1,18}) MiB(?: reserved: (\d{1,18}) MiB)?")
UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
GPU_NAME = re.compile(r"\b([A-Z]{1,3}\d{2,4}[A-Z]*|RTX (?:PRO )?[A-Z]?\d{4})\b")
RESULT = {"val_loss": (int, float), "train_time_ms": (int, float), "steps": int}  # what every result of ours has
OPTIONAL = {"scheduled_steps": int, "tokens": int, "seed": int, "processes": int, "resumed_at": int, "hardware": str}
MOST = 10**20  # of any number in a result
MEND = "take the line from the original log, or delete it if the run was cut off there"
TWO_RUNS = "the file holds two runs: split it"
UNTIMED_STEPS = 10  # modded-nanogpt's clock of 2024 and early 2025 starts again at this step


class LogError(Exception):
    """One sentence about a log that cannot be read or used: the file, the line and its text, and the remedy."""


class Step(NamedTuple):
    """A line about a step; step counts from 1 for train lines and is the number of steps done for val lines."""
    step: int
    total: int | None       # scheduled steps; None for llm.c
    kind: str               # "val" or "train"
    loss: float             # nan where it is nan in the log and where a train line has the time only
    time_ms: float | None   # on the training clock; None for llm.c


@dataclass(frozen=True)
class Log:
    path: Path
    run_id: str                   # the file's stem where it is a UUID, else the UUID in the log, else the stem
    dialect: str                  # "ours", "modded" or "llmc"
    sources: dict[str, str]       # file name to the text as it stands in the log; {} where there is none
    environment: dict[str, str]   # versions, hardware, driver, git; ours: token tables, stage k, data, model, too
    config: dict[str, str]        # ours only; rows of tables (shape, stages) are separated by newlines
    steps: tuple[Step, ...]
    result: dict                  # our last line; else val_loss, train_time_ms, steps, ...; {} if unfinished
    seed: int | None
    cut: bool = False             # not ours: ends within the line of its last step, which counts as no result

    @property
    def finished(self) -> bool:
        return bool(self.result)

    @property
    def identity(self) -> str:
        """The id where it is a UUID, else the file, for another folder may have another run of its name."""
        return self.run_id if UUID.fullmatch(self.run_id) else str(self.path.resolve())

    @property
    def resumed(self) -> bool:
        """Whether the training began in another log, which left a checkpoint."""
        return "resumed" in self.environment or "resumed_at" in self.result

    @property
    def vals(self) -> list[Step]:
        return [step for step in self.steps if step.kind == "val"]

    @property
    def val_loss(self) -> float:
        """Of the last validation; nan if there was none."""
        vals = self.vals
        return self.result.get("val_loss", vals[-1].loss if vals else math.nan)

    @property
    def train_time_ms(self) -> float | None:
        return self.result.get("train_time_ms", self.steps[-1].time_ms)

    @property
    def tokens(self) -> int | None:
        """Training tokens in all; None where the log does not say."""
        return self.result.get("tokens")

    @property
    def hardware(self) -> str:
        return self.result.get("hardware", self.environment.get("hardware", "unknown"))

    @property
    def processes(self) -> int | None:
        count = re.match(r"(\d{1,6})x ", self.hardware) if self.dialect == "ours" else None
        return self.result.get("processes", int(count[1]) if count else None)

    @property
    def hardware_class(self) -> str:
        """For example 8xH100, 1xRTX 4090, 1xH100 + 7xA100, cpu or unknown."""
        return " + ".join(map(short_name, self.hardware.split(" + ")))


def short_name(hardware: str) -> str:
    """See `Log.hardware_class`."""
    match = re.match(r"(\d+)x ([^,]+)", hardware)
    if not match:
        return "unknown"
    count, name = match.groups()
    if name.startswith("cpu"):
        return "cpu"
    short = GPU_NAME.search(name)
    form = re.search(r" (?:PCIe|NVL)\b", name)  # slower than the SXM form that has no such word
    return f"{count}x{short[1] if short else name}{form[0] if form else ''}"


def find_logs(folder: str | Path) -> list[Path]:
    """The logs of a record folder, sorted by name."""
    return sorted(Path(folder).glob("*.txt"))


def read_log(path: str | Path) -> Log:
    """Reads one log, line by line whatever its size. Raises LogError."""
    path = Path(path)
    sources, start, ours = parts(path)
    reader = Reader(path, ours)
    reader.read(lines_from(path, start))
    if not reader.steps:
        raise LogError(f"{path} has no step line: it is no log of a run, or the run was cut off before its first step")
    dialect = "ours" if ours else "modded" if reader.steps[0].total is not None else "llmc"
    environment, result = reader.environment, reader.result if ours else derived_result(reader)
    seed = result.get("seed", told_seed(environment.pop("seed", "")))
    run_id = path.stem if UUID.fullmatch(path.stem) else reader.run_id or path.stem
    return Log(path, run_id, dialect, sources, environment, reader.config, tuple(reader.steps), result, seed,
               not ours and reader.cut)


def parts(path: Path) -> tuple[dict[str, str], int, bool]:
    """The sources at the top of a log, the offset of the first byte after them and whether it is ours. LogError."""
    try:
        if path.exists() and not path.is_dir() and path.stat().st_size == 0:
            raise LogError(f"{path} is empty or no file: it is no log of a run")
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if LEAD.match(data):
                raise LogError(f"{path} begins with a byte order mark or a blank line, as no run writes it: delete it")
            return embedded_sources(data)
    except OSError as error:
        raise LogError(f"cannot read {path}: {error.strerror}") from None


def lines_from(path: Path, start: int) -> Iterator[tuple[int, str]]:
    """Lines from an offset in bytes on, with their ends and their numbers in the file."""
    with open(path, "rb") as file:
        first = 1 + file.read(start).count(b"\n")
        for number, line in enumerate(file, first):
            yield number, decode(line)


def embedded_sources(data: mmap.mmap) -> tuple[dict[str, str], int, bool]:
    """See `parts`."""
    if not TITLE.match(data):
        return (*foreign_sources(data), False)
    sources, name, begin = {}, None, 0
    for title in TITLE.finditer(data):
        if name:  # the line break before the title is the log's
            sources[name] = exact(data[begin:title.start()].removesuffix(b"\n").removesuffix(b"\r"))
        name, begin = title[1] and decode(title[1]), title.end()
        if name is None:  # the environment: sources end here
            break
    return sources, begin, True


def foreign_sources(data: mmap.mmap) -> tuple[dict[str, str], int]:
    """Sources and the offset after them: what stands before the first rule, or between two, if it imports anything."""
    begin, end = 0, rule_offset(data, 0)
    if end == 0:
        begin = data.find(b"\n") + 1
        end = rule_offset(data, begin) if begin else -1
    head = data[begin:max(begin, end)]
    if not IMPORT.search(head):
        return {}, 0
    first, *others = APPENDED.split(head)
    named = dict(zip(map(decode, others[::2]), map(exact, others[1::2]), strict=True))
    return {"train_gpt.py": exact(first), **named}, end


def rule_offset(data: mmap.mmap, begin: int) -> int:
    """Offset of the first line from `begin` on that is 100 equals signs; -1 if there is none."""
    at = data.find(RULE, begin)
    while at >= 0 and not (data[max(at - 1, 0):at] in (b"", b"\n") and data[at + 100:at + 101] in (b"\r", b"\n", b"")):
        at = data.find(RULE, at + 1)
    return at


def decode(text: bytes) -> str:
    return text.decode("utf-8", errors="replace")


def exact(text: bytes) -> str:
    """Text whose bytes `encoded` gives back, what is no UTF-8 too."""
    return text.decode("utf-8", errors="surrogateescape")


def encoded(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogateescape")


class Reader:
    """What the lines after the sources say."""

    def __init__(self, path: Path, ours: bool):
        self.path, self.ours = path, ours
        self.environment, self.config, self.steps, self.result, self.peak, self.run_id = {}, {}, [], {}, {}, None
        self.gpus, self.last = [], (self.environment, "header")  # the entry that a row below belongs to
        self.val, self.cut = None, False  # the last validation; whether the last step line is cut off

    def read(self, lines: Iterable[tuple[int, str]]) -> None:
        """Takes every line with its number. Raises LogError."""
        for number, line in lines:
            text, count = line.rstrip(), len(self.steps)
            try:
                self.take(text)
            except ValueError as error:
                text = text if len(text) <= 120 else text[:117] + "..."
                raise LogError(f"{self.path}, line {number}, {text!r}: {error}") from None
            if len(self.steps) > count:
                self.cut = not line.endswith("\n")
        if self.gpus:
            self.environment["hardware"] = " + ".join(f"{n}x {name}" for name, n in Counter(self.gpus).items())

    def take(self, line: str) -> None:
        """One line. Raises ValueError with the reason if it is a step or a result that cannot be."""
        if line.startswith("step:") or (line.startswith("s:") and not self.ours):
            step = parse_step(line)
            if step is not None:
                self.take_step(step)
        elif self.steps and self.ours and line == RULE.decode():
            raise ValueError(TWO_RUNS)
        elif self.steps and MANGLED.search(line):
            raise ValueError(TWO_RUNS if self.ended and self.steps[-1].total else f"this is not a step line; {MEND}")
        elif self.steps:
            self.take_end(line)
        elif self.ours:
            self.take_header(line)
        else:
            self.take_foreign_header(line)

    @property
    def ended(self) -> bool:
        """Whether the last step line is the validation after the last step; of llm.c, which tells no total, any."""
        last = self.steps[-1]
        return last.kind == "val" and (last.total is None or last.step == last.total)

    def take_step(self, step: Step) -> None:
        """Raises ValueError where it does not fit what is above."""
        if self.result:
            raise ValueError(f"a step follows the result: if the file holds two runs, split it; else {MEND}")
        if self.ours:
            check_ours(step, None if self.steps or "resumed" in self.environment else self.config)
        if self.steps:
            check_order(self.steps[-1], step, self.ours)
        if step.kind == "val":
            if self.val and self.val.step == step.step and repr(self.val.loss) != repr(step.loss):
                raise ValueError(f"step {step.step} has two validations, {self.val.loss} and {step.loss}; {MEND}")
            self.val = step
        self.steps.append(step)

    def take_header(self, line: str) -> None:
        if line.startswith("config "):
            key, _, value = line.removeprefix("config ").partition("=")
            self.config[key], self.last = value, (self.config, key)
        elif line.startswith("python:"):
            self.environment.update(pair.split(":", 1) for pair in line.split() if ":" in pair)
        elif match := ENTRY.fullmatch(line):
            self.environment[match[1]], self.last = match[2], (self.environment, match[1])
        elif line:  # a row of a table, or of git's list of changed files
            entries, key = self.last
            entries[key] = f"{entries.get(key, '')}\n{line.strip()}".strip()

    def take_foreign_header(self, line: str) -> None:
        for pattern in VERSIONS:
            if match := pattern.match(line):
                self.environment.update(match.groupdict())
        if match := GPU_ROW.match(line):
            self.gpus.append(match[1])
        if self.run_id is None and (match := UUID.search(line)):
            self.run_id = match[0]

    def take_end(self, line: str) -> None:
        if self.ours and line.startswith("{"):
            if self.result:
                raise ValueError(f"this is a second result; {TWO_RUNS}")
            self.result = parse_result(line)
            check_result(self.result, self.steps[-1])
            check_header(self.result, self.environment)
        elif match := PEAK.match(line):
            self.peak = {f"peak_memory_{name}_mib": int(mib) for name, mib in
                         zip(("allocated", "reserved"), match.groups(), strict=True) if mib}


def parse_step(line: str) -> Step | None:
    """A step line; None for llm.c's other evaluations. Raises ValueError with the reason."""
    if match := LLMC_STEP.fullmatch(line):
        return Step(int(match[1]), None, "val" if match[2] == "tel" else "train", number(match[3]), None)
    if re.match(r"s:\d{1,18} eval:", line):
        return None
    match = STEP.fullmatch(line)
    if not match:
        raise ValueError(f"this is not a step line; {MEND}")
    step, total = int(match[1]), int(match[2])
    fields = dict(pair.split(":", 1) for pair in match[3].split())
    time = number(fields["train_time"], "ms") if "train_time" in fields else None
    if step > total:
        raise ValueError(f"step {step} is above the total of {total}")
    for kind in ("val", "train"):
        if f"{kind}_loss" in fields:
            return Step(step, total, kind, number(fields[f"{kind}_loss"]), time)
    if time is None:
        raise ValueError(f"a step line needs val_loss, train_loss or train_time; {MEND}")
    return Step(step, total, "train", math.nan, time)


def number(text: str, unit: str = "") -> float:
    """Raises ValueError if the text is not a number with its unit; losses may be nan and inf, times not."""
    if not re.fullmatch(r"\d+(\.\d*)?(e[+-]?\d+)?" + unit + ("" if unit else "|-?(nan|inf)"), text):
        raise ValueError(f"{text!r:.40} is not a number{' of ' * bool(unit)}{unit}; {MEND}")
    value = float(text.removesuffix(unit))
    if unit and math.isinf(value):
        raise ValueError(f"{text!r:.40} is infinite; {MEND}")
    return value


def told_seed(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\d{1,20}", text) else None


def check_ours(step: Step, config: dict[str, str] | None) -> None:
    """Raises ValueError unless a line of ours has its time and, where it is the first of a run with this configuration,
    is of step 0, or of the first steps if there are no validations but the last."""
    if step.time_ms is None:
        raise ValueError(f"a step line of ours needs train_time; {MEND}")
    every, first = ((config or {}).get(key, "") for key in ("val_every", "log_every"))
    least = first if every == "0" else "0" if every else ""
    if re.fullmatch(r"\d{1,18}", least) and step.step > int(least):
        raise ValueError(f"the first step line is of step {step.step}, that of a whole run of step {least}: "
                         "lines are missing, take them from the original log")


def check_order(last: Step, step: Step, ours: bool) -> None:
    """Raises ValueError where step or time goes backwards or the total changes; other clocks may start again after the
    untimed steps."""
    if step.step < last.step:
        raise ValueError(f"step {step.step} follows step {last.step}: if the file holds two runs, split it")
    if step.total != last.total:
        raise ValueError(f"the total of steps changes from {last.total} to {step.total}; {MEND}")
    untimed = not ours and last.step <= UNTIMED_STEPS <= step.step
    if None not in (step.time_ms, last.time_ms) and step.time_ms < last.time_ms and not untimed:
        raise ValueError(f"the training time goes backwards, from {last.time_ms:g} to {step.time_ms:g} ms")


def parse_result(line: str) -> dict:
    """Our last line. Raises ValueError if it is cut off, lacks what every result has or holds another type."""
    try:
        result = json.loads(line)
    except (ValueError, RecursionError):  # the former for a number of thousands of digits, too
        raise ValueError("the result is cut off or broken: without this line the run counts as unfinished") from None
    if any(isinstance(value, list | dict) for value in result.values()):
        raise ValueError(f"the result holds more than names and values: {MEND}")
    for key, kind in (RESULT | OPTIONAL).items():
        value = result.get(key)
        if (key in RESULT or key in result) and (
                not isinstance(value, kind) or isinstance(value, bool) or kind is not str and not (
                    0 <= value <= MOST or key == "val_loss" and (math.inf == value or value != value))):
            raise ValueError(f"the result's {key} is {value!r:.40}: {MEND}")
    return result


def check_header(result: dict, environment: dict[str, str]) -> None:
    """Raises ValueError where the result contradicts the header."""
    for key, told in (("hardware", environment.get("hardware")), ("seed", told_seed(environment.get("seed", "")))):
        given = result.get(key, told)
        if told is not None and given != told:
            raise ValueError(f"the result's {key} is {given}, the header's {told}: the log is of two runs, take the "
                             "original")


def check_result(result: dict, last: Step) -> None:
    """Raises ValueError unless the result is that of the last step line, but for what the line rounds."""
    if last.kind != "val":
        raise ValueError(f"the result does not follow a validation; {MEND}")
    told = {"val_loss": (last.loss, 6e-5), "train_time_ms": (last.time_ms, 1), "steps": (last.step, 0),
            "scheduled_steps": (last.total, 0)}
    for key, (value, rounding) in told.items():
        given = result.get(key, value)
        if value is not None and repr(given) != repr(value) and not abs(given - value) <= rounding:  # nan is nan
            raise ValueError(f"the result's {key} is {given}, the last validation's {value}; {MEND}")


def derived_result(reader: Reader) -> dict:
    """Of a log that is not ours: {} unless its last step line is the whole line of the validation after the last step,
    with the time if other validations have it."""
    last = reader.steps[-1]
    timed = any(step.time_ms is not None for step in reader.steps if step.kind == "val")
    reader.cut |= timed and last.kind == "val" and last.time_ms is None
    if reader.cut or not reader.ended:
        return {}
    time = {} if last.time_ms is None else {"train_time_ms": last.time_ms}
    total = {} if last.total is None else {"scheduled_steps": last.total}
    return {"val_loss": last.loss, **time, "steps": last.step, **total, **reader.peak}
