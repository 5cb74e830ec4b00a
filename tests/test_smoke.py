"""The embedded default: what ./run.sh does on a machine without a GPU, end to end."""
import json
import math
import re
import subprocess
import sys

import pytest
from conftest import ROOT, run_trainer


@pytest.mark.parametrize("options, below", [(["steps=24", "val_every=16"], 3.4), pytest.param(
    ["val_every=40"], 3, marks=pytest.mark.slow)], ids=["shorter", "whole"])
def test_the_smoke_preset_learns_pythons_documentation(tmp_path, options, below):
    """From ln(vocabulary) to under 3 nats a token (a byte here; a table of byte frequencies reaches about 3.1); of a
    schedule of a third to under 3.4."""
    made = subprocess.run([sys.executable, "data/local_text.py", "--out", str(tmp_path / "text")], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    done = run_trainer("preset=smoke", f"train_files={tmp_path}/text/local_train_*.bin", f"log_dir={tmp_path}/logs",
                       f"val_files={tmp_path}/text/local_val_*.bin", *options, timeout=900)
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"val_loss:([\d.]+)", done.stdout)]
    assert abs(losses[0] - math.log(50304)) < 0.1 and losses[-1] < below
    log, = (tmp_path / "logs").glob("*_smoke/*.txt")
    assert log.name in done.stdout
    assert json.loads(log.read_text().splitlines()[-1])["val_loss"] == pytest.approx(losses[-1], abs=1e-4)


def test_one_long_text_of_ones_own_trains(tmp_path):
    """A text without an empty line, longer than a shard."""
    (tmp_path / "book.txt").write_text(" ".join(f"word{i % 997}" for i in range(60_000)))
    made = subprocess.run([sys.executable, "data/local_text.py", str(tmp_path / "book.txt"), "--out", str(tmp_path),
                           "--shard-tokens", "100000"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    done = run_trainer("preset=smoke", f"train_files={tmp_path}/local_train_*.bin", "stop_after=2", "val_every=0",
                       f"val_files={tmp_path}/local_val_*.bin", "val_tokens=4096", f"log_dir={tmp_path}/logs")
    assert done.returncode == 0 and "val_loss" in done.stdout, done.stderr
