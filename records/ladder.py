"""The rungs of records/ladder and what their logs say: loss at equal tokens, speed, time to a common loss."""
import math
import re
from pathlib import Path

import numpy as np

from records.logs import Log, find_logs, read_log

OPTIONS = ("tie", "softcap")  # of a rung, that make another run of it


def rung_folders(root: Path) -> list[Path]:
    """records/ladder/NN_name and A_name."""
    return sorted(root.glob("ladder/[0-9A-Z]*_*/"))


def rung_logs(folder: Path) -> list[Log]:
    """The whole runs of a rung."""
    return [log for log in map(read_log, find_logs(folder)) if is_whole(log) and log.train_time_ms
            and log.result["steps"]]


def is_whole(log: Log) -> bool:
    """Finished, with all of its scheduled steps in one log."""
    steps = log.result.get("steps")
    return log.finished and not log.resumed and steps == log.result.get("scheduled_steps", steps)


def tokens_done(log: Log, step: int) -> float:
    """Training tokens of the first `step` steps: by the lines about stages; where all steps are alike by the result, or
    the configuration if there is none; nan if untold."""
    stages = [re.match(r"steps (\d{1,18})-(\d{1,18}), (\d[\d,]{,23}) tokens a step", text)
              for key, text in log.environment.items() if key.startswith("stage ")]
    if not stages or stages == [None]:
        batch = log.config.get("batch_tokens", "")
        return (step * log.tokens / log.result["steps"] if log.tokens and log.result["steps"]
                else step * int(batch) if re.fullmatch(r"\d{1,18}", batch) else math.nan)
    if None in stages:
        return math.nan
    spans = [(int(stage[1]), int(stage[2]) + 1, int(stage[3].replace(",", ""))) for stage in stages]
    done = sum(count * max(0, min(step, end) - begin) for begin, end, count in spans)
    return done if step <= spans[-1][1] else math.nan


def val_points(log: Log) -> np.ndarray:
    """(validations, 3): seconds, tokens, loss; nan where one is untold."""
    return np.array([(math.nan if step.time_ms is None else step.time_ms / 1e3, tokens_done(log, step.step), step.loss)
                     for step in log.vals])


def equal_tokens(logs: list[Log]) -> float:
    """The most tokens that all logs that tell theirs reach; nan if none does."""
    return min((end for log in logs if math.isfinite(end := tokens_done(log, log.result["steps"]))), default=math.nan)


def loss_at(points: np.ndarray, tokens: float) -> float:
    """Loss on the line through the validations; nan outside of them."""
    told = points[np.isfinite(points[:, 1]), 1:]
    return float(np.interp(tokens, *told.T, left=math.nan, right=math.nan)) if len(told) else math.nan


def time_to(points: np.ndarray, loss: float) -> float:
    """Seconds until the line through the validations first comes down to the loss; nan if it does not."""
    low = np.flatnonzero(points[:, 2] <= loss)
    if not len(low) or low[0] == 0:
        return math.nan
    (before, _, high), (after, _, under) = points[low[0] - 1:low[0] + 1]
    return float(before + (after - before) * (high - loss) / (high - under))
