"""python -m records stats: is the mean val loss below the target, and do two sets of runs differ?"""
import hashlib
import math
import re
import textwrap
from collections.abc import Callable

import numpy as np
import scipy.stats

from records.logs import Log, LogError, read_log

TARGET, LEVEL, CONFIDENCE, MOST_RUNS = 3.28, 0.01, 0.95, 10**6
USAGE = "write `python -m records stats LOG... [--target 3.28] [-- LOG...]`"
UNLIKE = ("torch", "operations", "model", "data", "token tables")  # of the environment, that bear on the training
APART = {"seed", "trials", "name", "val_every", "log_every", "log_dir", "save_every", "keep"}  # change no training


def stats(argv: list[str]) -> int:
    """Prints what a set of logs says of its mean, and of a second set's. Raises LogError for sets that do not fit."""
    first, second, target = parse_arguments(argv)
    sets = [[read_log(path) for path in paths] for paths in (first, second) if paths]
    check_pair(sets)
    for logs in sets:
        print("\n".join(describe(logs, target)))
    if len(sets) == 2:
        print("\n".join(compare(*sets)))
    return 0


def parse_arguments(argv: list[str]) -> tuple[list[str], list[str], float]:
    """Paths of the first and of the second set, and the target. Raises LogError."""
    sets, target, words = [[]], TARGET, iter(argv)
    for word in words:
        if word == "--target":
            text = next(words, "nothing")
            if not re.fullmatch(r"\d+\.?\d*", text):
                raise LogError(f"--target needs a number, not {text}: {USAGE}")
            target = float(text)
        elif word in ("--", "--against"):
            sets.append([])
        elif word.startswith("-"):
            raise LogError(f"unknown option {word}: {USAGE}")
        else:
            sets[-1].append(word)
    if len(sets) > 2 or not all(sets):
        raise LogError(f"{'more than two sets' if len(sets) > 2 else 'a set without logs'}: {USAGE}")
    return sets[0], sets[1] if len(sets) == 2 else [], target


def track(log: Log) -> str:
    """The preset, or the track's folder where the log knows no preset and lies in a record folder."""
    dated = re.match(r"\d{4}-\d\d-\d\d_", log.path.absolute().parent.name)
    return log.config.get("preset") or (log.path.absolute().parent.parent.name if dated else "unknown")


def source_hash(log: Log) -> str:
    """First 12 hexadecimal digits over names and texts of the sources; "" where there are none."""
    return hashlib.sha256(repr(sorted(log.sources.items())).encode()).hexdigest()[:12] if log.sources else ""


def settings(log: Log) -> tuple[tuple[str, str], ...]:
    """The configuration as far as it bears on the training, the seed apart."""
    return tuple(sorted((key, value) for key, value in log.config.items() if key not in APART))


def check_set(logs: list[Log]) -> None:
    """Raises LogError unless the logs are finished runs of one thing that differ in their seeds."""
    for log in logs:
        if not log.finished:
            raise LogError(f"{log.path} is {'cut off in its last line' if log.cut else 'unfinished'}: leave it out")
        if log.resumed:
            raise LogError(f"{log.path} was resumed, its training began in another log: leave it out")
        if not math.isfinite(log.val_loss):
            raise LogError(f"{log.path} ends with val_loss {log.val_loss}: the run diverged, leave it out")
    check_new(logs)
    check_same(logs, "track", track)
    check_same(logs, "source", source_hash)
    check_same(logs, "hardware", lambda log: log.hardware)
    check_same(logs, "number of steps", steps_done)
    for key in sorted({key for log in logs for key, _ in settings(log)}):
        check_same(logs, f"setting {key}", lambda log, key=key: log.config.get(key))
    for key in UNLIKE:
        check_same([log for log in logs if key in log.environment], key, lambda log, key=key: log.environment[key])
    check_distinct(logs, "have the same seed, {}", lambda log: log.seed)


def check_new(logs: list[Log]) -> None:
    """Raises LogError where one run is there twice, be it under two names."""
    check_distinct(logs, "are the same run", lambda log: log.identity)
    check_distinct(logs, "are the same run", lambda log: repr(log.steps))


def check_distinct(logs: list[Log], sentence: str, key: Callable[[Log], object]) -> None:
    seen = {}
    for log in logs:
        value = key(log)
        if value in seen and value is not None:
            raise LogError(f"{seen[value].path} and {log.path} {sentence.format(value)}: give each run once")
        seen[value] = log


def check_same(logs: list[Log], what: str, key: Callable[[Log], object]) -> None:
    for log in logs:
        if key(log) != key(logs[0]):
            one, two = (textwrap.shorten(str(key(each)), 60, placeholder="...") for each in (logs[0], log))
            raise LogError(f"{logs[0].path} and {log.path} differ in {what}, {one} and {two}: take runs of one thing")


def check_pair(sets: list[list[Log]]) -> None:
    """Raises LogError unless each set is in order and no run is in both; they may differ in source, steps, hardware."""
    for logs in sets:
        check_set(logs)
    check_new([log for logs in sets for log in logs])
    check_same([logs[0] for logs in sets], "track", track)


def groups(logs: list[Log]) -> list[list[Log]]:
    """Runs of one folder, hardware, source and configuration, the seed apart; those without times by themselves."""
    found = {}
    for log in logs:
        key = (log.path.parent, log.hardware, log.processes, source_hash(log), settings(log), steps_done(log),
               log.train_time_ms is None)
        found.setdefault(key, []).append(log)
    return [sorted(group, key=lambda log: (log.seed is None, log.seed, log.run_id)) for group in found.values()]


def steps_done(log: Log) -> str:
    """For example 452, or 150 of 452 where the run stopped early."""
    steps = log.result["steps"]
    scheduled = log.result.get("scheduled_steps", steps)
    return f"{steps:,}" if steps == scheduled else f"{steps:,} of {scheduled:,}"


def losses(logs: list[Log]) -> np.ndarray:
    return np.array([log.val_loss for log in logs])


def seconds(logs: list[Log]) -> np.ndarray | None:
    """Training times; None if a log has none."""
    times = [log.train_time_ms for log in logs]
    return None if None in times else np.array(times) / 1e3


def below(values: np.ndarray, target: float) -> float | None:
    """One-sided p of a mean below the target, by Student's t; None for one value or no spread."""
    if len(values) < 2 or np.ptp(values) == 0:
        return None
    return float(scipy.stats.ttest_1samp(values, target, alternative="less").pvalue)


def runs_needed(mean: float, sd: float, n: int, target: float) -> int | None:
    """The least count of runs from n on whose p is below LEVEL at this mean and sd; None if there is none to be had."""
    if mean >= target:
        return None
    counts = np.arange(n, MOST_RUNS)
    enough = scipy.stats.t.cdf((mean - target) / sd * np.sqrt(counts), counts - 1) < LEVEL
    return int(counts[enough.argmax()]) if enough.any() else None


def describe(logs: list[Log], target: float) -> list[str]:
    """Lines about one set."""
    seeds = ", ".join(str(log.seed) for log in logs if log.seed is not None) or "unknown"
    many = "s" * (len(logs) > 1)
    lines = [f"{len(logs)} run{many} of {track(logs[0])} on {logs[0].hardware_class}, {steps_done(logs[0])} steps, "
             f"seed{many} {seeds}",
             f"{'':10}{'n':>4}{'mean':>12}{'sd':>12}{'min':>12}{'max':>12}"]
    for name, values, digits in (("val loss", losses(logs), 5), ("time, s", seconds(logs), 3)):
        if values is not None:
            sd = f"{values.std(ddof=1):.{digits}f}" if len(values) > 1 else "-"
            lines.append(f"{name:10}{len(values):4}{values.mean():12.{digits}f}{sd:>12}{values.min():12.{digits}f}"
                         f"{values.max():12.{digits}f}")
    return [*lines, *untold(logs), verdict(losses(logs), target)]


def untold(logs: list[Log]) -> list[str]:
    """Lines about what some log does not tell."""
    timeless = [str(log.path) for log in logs if log.train_time_ms is None]
    lines = [f"time, s   not compared: no time in {', '.join(timeless)}"] if 0 < len(timeless) < len(logs) else []
    told = {"sources": [log.sources for log in logs], "seeds": [log.seed is not None for log in logs],
            "hardware": [log.hardware != "unknown" for log in logs]}
    missing = [what for what, values in told.items() if not all(values)]
    return lines + [f"{', '.join(missing)} not told: not checked"] * bool(missing)


def verdict(values: np.ndarray, target: float) -> str:
    """The sentence about the target."""
    p = below(values, target)
    if p is None:
        return f"mean below {target:g}: no p, {'one run has no spread' if len(values) < 2 else 'all losses are equal'}"
    sentence = f"mean below {target:g}: p = {p:.3g} (one-sided t-test)"
    if p < LEVEL:
        return f"{sentence}, below {LEVEL}"
    if values.mean() >= target:
        return f"{sentence}; no number of runs with this mean reaches p < {LEVEL}"
    needed = runs_needed(values.mean(), values.std(ddof=1), len(values), target)
    more = f"{needed - len(values)}" if needed else f"over {MOST_RUNS:,}"
    return f"{sentence}; {more} more of the same mean and sd until p < {LEVEL}"


def compare(first: list[Log], second: list[Log]) -> list[str]:
    """Lines about the difference of two sets, first minus second."""
    if min(len(first), len(second)) < 2:
        return ["difference: no test, a set of one run has no spread"]
    lines = [f"difference, first minus second ({CONFIDENCE:.0%} confidence interval; Welch's test, two-sided)"]
    for name, one, two, digits in (("val loss", losses(first), losses(second), 5),
                                   ("time, s", seconds(first), seconds(second), 3)):
        if name == "time, s" and first[0].hardware != second[0].hardware:
            lines.append(f"{name:10}not compared: {first[0].hardware} and {second[0].hardware}")
        elif one is not None and two is not None:
            lines.append(f"{name:10}{welch(one, two, digits)}")
    return lines


def welch(one: np.ndarray, two: np.ndarray, digits: int) -> str:
    difference = f"{one.mean() - two.mean():+.{digits}f}"
    if np.ptp(one) == np.ptp(two) == 0:
        return f"{difference}, no p: neither set has a spread"
    test = scipy.stats.ttest_ind(one, two, equal_var=False)
    low, high = test.confidence_interval(CONFIDENCE)
    return f"{difference} ({low:+.{digits}f} to {high:+.{digits}f}), p = {test.pvalue:.3g}"


def interval(values: np.ndarray) -> tuple[float, float]:
    """The mean and half the width of its confidence interval, by Student's t."""
    quantile = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    return float(values.mean()), float(quantile * values.std(ddof=1) / np.sqrt(len(values)))


def paired(pairs: list[list[Log]]) -> list[str]:
    """Lines about pairs of runs A and B of a race: their differences' means, and a sentence each on what they show."""
    if len(pairs) < 2:
        return ["\none pair: no interval"] * len(pairs)
    a, b = (np.array([(log.train_time_ms / 1e3, log.val_loss) for log in logs]) for logs in zip(*pairs, strict=True))
    lines, sentences = [f"\n{len(pairs)} pairs: mean of B - A and its {CONFIDENCE:.0%} confidence interval"], []
    for name, values, digits, better in (("time, s", (b - a)[:, 0], 3, "is faster by {} s ± {} s a run"),
                                         ("time, %", 100 * (b[:, 0] / a[:, 0] - 1), 3, None),
                                         ("val loss", (b - a)[:, 1], 5, "has the lower val loss, by {} ± {}")):
        mean, half = interval(values)
        size, width = f"{abs(mean):.{digits}f}", f"{half:.{digits}f}"
        lines.append(f"{name:10}{mean:+.{digits}f} ± {width} ({mean - half:+.{digits}f} to {mean + half:+.{digits}f})")
        if better:
            sentences.append(f"{name.split(',')[0]}: no difference shown, the interval covers zero" if abs(mean) <= half
                             else f"{'B' if mean < 0 else 'A'} {better.format(size, width)}")
    return lines + sentences
