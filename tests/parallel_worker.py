"""Trains the tiny configuration and writes what happened: parallel_worker.py SHARDS OUT DTYPE, alone or by torchrun."""
import sys
from pathlib import Path

import torch
from conftest import tiny_config

import runtime
import train_gpt
from train_gpt import Loader, Trainer


def main(shards: Path, out: Path, dtype: str) -> None:
    cfg = tiny_config(shards, dtype=dtype)
    world = runtime.start_world(cfg)
    world = runtime.connect(world)
    files = train_gpt.find_shards(cfg, "train_files")
    plan, validation = train_gpt.plan_run(cfg, files), train_gpt.read_validation(cfg, world)
    trainer, losses, slices = Trainer(cfg, world), [], []
    trainer.reset(cfg.seed)
    loader = Loader(cfg, world, files, plan)
    for step in range(cfg.last_step):
        if step % cfg.val_every == 0:
            losses.append(trainer.evaluate(step, validation))
        batches = loader.next()
        slices.append([(batch.tokens, batch.cu_seqlens) for batch in batches])
        loss = trainer.train_step(step, batches)
        world.all_reduce(loss)[1].wait()
        losses.append(loss.item())
    losses.append(trainer.evaluate(cfg.last_step, validation))
    torch.save({"losses": losses, "slices": slices, "plan": plan, "shards_opened": loader.stream.opened,
                "weights": dict(trainer.model.state_dict())}, out / f"{world.size}_{world.rank}.pt")
    if world.size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
