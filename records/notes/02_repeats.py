"""Experiment 2 of NOTES.md: one seed again and again, validated around the steps in question.

torchrun --standalone --nproc_per_node 4 records/notes/02_repeats.py 3, or python records/notes/02_repeats.py 1
"""
import os
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_gpt as t  # noqa: E402

STEPS = {50, 51, 74, 97, 98, 99, 100, 101, 102, 120, 140, 146, 147, 148, 149, 150, 151, 152}

cfg = t.parse_options(["preset=corpus", "train_files=data/corpus/corpus_train_000001.bin", "stop_after=152",
                       "val_tokens=2097152"])
world = t.start_world(cfg)
t.connect(world)
files = t.find_shards(cfg, "train_files")
plan, validation, trainer = t.plan_run(cfg, files), t.read_validation(cfg, world), t.Trainer(cfg, world)
for repeat in range(int(sys.argv[1])):
    trainer.reset(0)
    loader, begin, vals = t.Loader(cfg, world, files, plan), time.time(), {}
    for step in range(152):
        if step in STEPS:
            vals[step] = round(trainer.evaluate(step, validation), 4)
            if step in (100, 150):
                vals[f"{step}again"] = round(trainer.evaluate(step, validation), 4)
        trainer.train_step(step, loader.next())
    vals[152] = round(trainer.evaluate(152, validation), 4)
    sums = torch.stack([p.double().sum() for p in trainer.model.parameters()])
    everyone = [torch.zeros_like(sums) for _ in range(world.size)]
    if world.size > 1:
        torch.distributed.all_gather(everyone, sums)
    equal = world.size == 1 or all(torch.equal(other, sums) for other in everyone)
    if world.rank == 0:
        print("world", world.size, "rep", repeat, vals, "sec", round(time.time() - begin, 1),
              "ranks equal" if equal else "DIVERGED", flush=True)
os._exit(0)
