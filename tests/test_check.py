"""./run.sh check: a table of what there is, one remedy a line for what is missing."""
import subprocess
import sys

import torch
from conftest import ROOT, write_shard


def check(*args):
    return subprocess.run([sys.executable, "tests/check_machine.py", *args], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)


def test_too_few_shards_fail_the_check_with_a_remedy(shards):
    done = check("preset=smoke", f"train_files={shards}/train_*.bin", f"val_files={shards}/val_*.bin")
    assert done.returncode == 1, done.stderr
    rows = {line[5:24].strip(): line[:3] for line in done.stdout.splitlines() if line[:3] in ("ok ", "BAD")}
    assert {"python", "torch", "CUDA", "device", "head", "MLP", "operations", "disk"} <= set(rows)
    assert rows["torch"] == "ok " and rows["training shards"] == "BAD"
    assert "remedy for training shards: the schedule of 80 steps needs about" in done.stdout


def test_enough_shards_pass_the_check(tmp_path):
    text = [50256, *[7] * 99] * 3000
    for name in ("train_0.bin", "val_0.bin"):
        write_shard(tmp_path / name, text)
    done = check("preset=smoke", f"train_files={tmp_path}/train_*.bin", f"val_files={tmp_path}/val_*.bin")
    assert done.returncode == 0 and "1 found, 1 needed" in done.stdout and "BAD" not in done.stdout, done.stdout


def test_the_check_says_which_products_are_in_fp8(monkeypatch):
    import check_machine

    import train_gpt
    cfg, world = train_gpt.Config(), train_gpt.World(0, 1, torch.device("cpu"))
    for fp8, kind in ((False, "kernel"), (True, "reference"), (True, "kernel")):
        chosen = torch.float32, None, {"mlp": kind}, fp8
        monkeypatch.setattr(train_gpt, "choose", lambda *_, chosen=chosen: chosen)
        rows = {what: shown for what, shown, _ in check_machine.hardware_rows(cfg, world)}
        assert rows["MLP"] == ("fp8" if fp8 and kind == "kernel" else "float32")


def test_an_unknown_option_is_refused():
    done = check("sede=1")
    assert done.returncode == 2 and "seed" in done.stderr and "Traceback" not in done.stderr
