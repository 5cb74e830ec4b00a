"""One stage of the corpus run (190 steps) by several versions in turn, A B C A B C, on one GPU: 31, 35 of NOTES.md

    python 31_ab.py TREE I N ROUNDS FOLDER      from the tree TREE, the I-th of N; start all N at once

Each compiles, waits in FOLDER until all have, then trains seed 0, 1, ... when it is its turn, alone.
Training does not begin while FOLDER has a file `hold`. PRESET and STEPS are to try it small."""
import dataclasses
import os
import sys
import time
from pathlib import Path

tree, folder = sys.argv[1], Path(sys.argv[5])
i, n, rounds = map(int, sys.argv[2:5])
sys.path.insert(0, tree)
os.chdir(tree)
import runtime  # noqa: E402
import train_gpt as t  # noqa: E402

cfg = t.parse_options([f"preset={os.environ.get('PRESET', 'corpus')}", "log_dir=records/runs_ab"])
cfg = dataclasses.replace(cfg, stages=cfg.stages[:1], steps=int(os.environ.get("STEPS", 182)), extension=8, val_every=0,
                          final_window=cfg.stages[0].long, name="AB")
world = runtime.connect(runtime.start_world(cfg))
files = t.find_shards(cfg, "train_files")
plan, validation = t.plan_run(cfg, files), t.read_validation(cfg, world)
trainer, console = t.Trainer(cfg, world), t.Console(cfg.last_step, plan.tokens, cfg.log_every, 1)
begin = time.time()
trainer.reset(0)
trainer.warm_up(plan, validation, console)
print(f"{tree[-1]} warm {time.time() - begin:.0f} s", flush=True)
(folder / f"ready{i}").touch()
while len(list(folder.glob("ready*"))) < n or (folder / "hold").exists():
    time.sleep(0.2)
for seed in range(rounds):
    while len(list(folder.glob("done*"))) < seed * n + i:
        time.sleep(0.2)
    log, clock = runtime.new_log(cfg, world), t.Clock(world.device)
    t.log_header(log, cfg, world, trainer.describe(plan))
    result = t.Trial(trainer, plan, clock, console, log, seed, {}).run(files, validation)
    runtime.finish_log(log, clock, console, result)
    print(f"{tree[-1]} | {seed} | {result['val_loss']:.4f} | {result['train_time_ms'] / 1000:.3f} s | "
          f"{result['peak_memory_allocated_mib']} MiB", flush=True)
    (folder / f"done{seed * n + i}").touch()
