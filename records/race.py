"""python -m records race: two script folders run in turn, A B A B, and the paired differences of time and loss."""
import contextlib
import datetime
import difflib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from records.check import RECORDS, RUNS
from records.compare import side_by_side
from records.logs import Log, LogError, read_log
from records.stats import check_pair, check_same, paired, settings, source_hash

USAGE = "write `python -m records race A B -n N [key=value ...]`, A and B folders with a train_gpt.py"
SCRIPT, PATIENCE = "train_gpt.py", 10  # seconds that an interrupted run has to end by itself


class Terminated(KeyboardInterrupt):
    """SIGTERM, which unlike Ctrl-C in a terminal reaches this process alone."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Within it SIGTERM raises Terminated, once."""
    def stop(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise Terminated
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def race(argv: list[str]) -> int:
    """Runs the pairs and prints each, then what they say. Raises LogError for arguments and where a run fails."""
    sides, count, first, given = parse_arguments(argv)
    launch, words, environment = launcher(given)
    folder = prepare(sides)
    where = os.path.relpath(folder)
    print(*(f"{side} {path}" for side, path in sides.items()), f"logs {where}",
          "no run is a warm-up: compilation is not timed", sep="\n", flush=True)
    pairs = []
    try:
        with terminable():
            for side in sides:  # what is wrong with either is known before any run
                run(side, "before the first pair", [sys.executable, SCRIPT, "fetch", *words], folder, environment)
            for seed in range(first, first + count):
                pair = []
                for side in sides:
                    logs = folder / f"{side}_{seed}"
                    run(side, f"with seed {seed}", [*launch, SCRIPT, *words, f"seed={seed}", f"log_dir={logs}"], folder,
                        environment)
                    pair.append(the_log(side, logs, given))
                check_pair([list(logs) for logs in zip(*pairs, pair, strict=True)])
                check_same(pair, "hardware", lambda log: log.hardware)
                print(table(*pair, first=not pairs), flush=True)
                pairs.append(pair)
    except (LogError, KeyboardInterrupt) as error:
        print("\n".join(paired(pairs)), flush=True)
        raise LogError(f"{str(error) or 'interrupted'}; {len(pairs)} of {count} pairs are complete, the logs are in "
                       f"{where}") from None
    print("\n".join(paired(pairs)))
    return 0


def parse_arguments(argv: list[str]) -> tuple[dict[str, Path], int, int, dict[str, str]]:
    """The sides' folders, the number of pairs, the first one's seed and the settings of both sides. Raises LogError."""
    folders, count, given, words = [], "nothing", {"seed": "0"}, iter(argv)
    for word in words:
        if word == "-n":
            count = next(words, "nothing")
        elif word.startswith("-"):
            raise LogError(f"unknown option {word}: {USAGE}")
        elif match := re.fullmatch(r"(\w+)=(.*)", word):
            given[match[1]] = match[2]
        else:
            folders.append(word)
    if len(folders) != 2:
        raise LogError(f"race takes two folders, not {len(folders)}: {USAGE}")
    if not re.fullmatch(r"\d{1,6}", count) or int(count) < 2:
        raise LogError(f"-n needs a number of pairs from 2 on, for an interval, not {count}: {USAGE}")
    if not re.fullmatch(r"\d{1,18}", given["seed"]):
        raise LogError(f"seed={given['seed']!r} is not a whole number: give the first pair's, for example seed=0")
    for key in {"trials", "log_dir"} & given.keys():
        raise LogError(f"{key}= is not for a race, which has one trial a run and its own folder of logs: leave it out")
    for key in {"train_files", "val_files"} & given.keys():  # count from the project's folder, not from a side's
        given[key] = str(RECORDS.parent / given[key])
    sides = dict(zip("AB", map(script_folder, folders), strict=True))
    return sides, int(count), int(given.pop("seed")), given


def script_folder(word: str) -> Path:
    """Raises LogError that names the nearest folder with a script."""
    folder = Path(word)
    if (folder / SCRIPT).is_file():
        return folder.resolve()
    found = sorted({str(path.parent) for base in (folder, folder.parent, Path()) if base.is_dir()
                    for pattern in (SCRIPT, f"*/{SCRIPT}") for path in base.glob(pattern)})
    near = difflib.get_close_matches(word, found, n=1, cutoff=0.0)
    hint = f"did you mean {near[0]}?" if near else "`python -m records extract LOG DIR` makes such a folder"
    raise LogError(f"{word} is no folder with a {SCRIPT}: {hint}")


def launcher(given: dict[str, str]) -> tuple[list[str], list[str], dict[str, str]]:
    """As run.sh has it, with this Python: the command before the script, the settings, the environment."""
    import torch
    gpus, cache = torch.cuda.device_count(), RECORDS.parent / ".cache"
    count = os.environ.get("NPROC") or str(max(n for n in (1, 2, 4, 8) if n <= max(gpus, 1)))
    if count not in ("1", "2", "4", "8"):
        raise LogError(f"NPROC={count}: give 1, 2, 4 or 8, for a step's 8 slices to be shared evenly")
    environment = {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "TRITON_CACHE_DIR": f"{cache}/triton"}
    if not gpus:
        given = {"preset": "smoke", **given}
        environment |= {"OMP_WAIT_POLICY": "PASSIVE", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count] if count != "1" else []
    return [sys.executable, *launch], [f"{key}={value}" for key, value in given.items()], environment | os.environ


def prepare(sides: dict[str, Path]) -> Path:
    """A new folder with a copy of each side's scripts, which may then be edited, beside the project's data."""
    folder = RECORDS.resolve() / RUNS / f"race_{datetime.datetime.now():%Y-%m-%d_%H%M%S_%f}"
    for side, source in sides.items():
        (folder / side).mkdir(parents=True)
        for path in source.glob("*.py"):
            shutil.copy(path, folder / side)
        (folder / side / "data").symlink_to(RECORDS.resolve().parent / "data")
    return folder


def run(side: str, when: str, command: list[str], folder: Path, environment: dict[str, str]) -> None:
    """A side's command, its output in a file. Raises LogError with its last words if it fails or is interrupted."""
    output = folder / f"{side} {when}.out".replace(" ", "_")
    environment = {**environment, "GIT_CEILING_DIRECTORIES": str(folder)}  # no commit around it describes a copy
    with open(output, "wb") as file, subprocess.Popen(command, cwd=folder / side, env=environment, stdout=file,
                                                      stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL) as child:
        try:
            code = child.wait()
        except KeyboardInterrupt as stop:  # which a terminal sends to the run as well
            if isinstance(stop, Terminated):
                child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(PATIENCE)
            child.terminate()
            raise LogError(f"interrupted in {side} {when}") from None
    if code:
        lines = [line.strip() for line in output.read_text(errors="replace").splitlines() if line.strip()]
        words = [line for line in lines if line.startswith("error: ")][-1:] or lines[-3:] or ["no output"]
        raise LogError(f"{side} failed {when}, exit code {code}: {' / '.join(words).removeprefix('error: ')}")


def the_log(side: str, folder: Path, given: dict[str, str]) -> Log:
    """The log of the run that wrote into a folder. Raises LogError."""
    paths = [*folder.glob("*/*.txt")]
    if len(paths) != 1:
        raise LogError(f"{side} wrote {len(paths)} logs into {os.path.relpath(folder)}, not one")
    log = read_log(paths[0])
    if log.dialect != "ours" or not log.finished:
        raise LogError(f"{side} ended without a result: {os.path.relpath(paths[0])} is unfinished")
    for key in given.keys() - log.config.keys():
        raise LogError(f"{side} does not know the setting {key}: {os.path.relpath(paths[0])} lacks it")
    return log


def table(a: Log, b: Log, first: bool) -> str:
    """A pair's row; before the first, what the sides differ in and the head."""
    one, two = a.train_time_ms / 1e3, b.train_time_ms / 1e3
    line = (f"{a.seed:>6}{one:12.3f}{two:12.3f}{two - one:+12.3f}"
            f"{a.val_loss:12.5f}{b.val_loss:12.5f}{b.val_loss - a.val_loss:+12.5f}")
    return "\n".join([
        *side_by_side("settings", dict(settings(a)), dict(settings(b))),
        f"sources: {'equal' if source_hash(a) == source_hash(b) else 'different'}\n",
        f"{'seed':>6}{'A, s':>12}{'B, s':>12}{'B - A':>12}{'A, loss':>12}{'B, loss':>12}{'B - A':>12}", line,
    ]) if first else line
