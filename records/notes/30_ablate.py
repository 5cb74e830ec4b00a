"""What each mechanism is worth in one stage: 30 of NOTES.md; from the project's folder

    python records/notes/30_ablate.py WORKERS NAME ...     NAMEs of VARIANTS, or all

Each variant is a process that compiles beside others, then trains alone on the GPU (a lock), `SEEDS` times. One line a
run: name, seed, loss, seconds; of whole runs also the loss without the longer window at the end. A log each under
records/runs_ablate. With SMOKE=1 the smoke preset's tables, on a CPU.
"""
import dataclasses
import fcntl
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch  # noqa: E402

import runtime  # noqa: E402
import train_gpt as t  # noqa: E402

SMOKE = os.environ.get("SMOKE") == "1"
SEEDS = int(os.environ.get("SEEDS", 1))


def layers(cfg, **changes):
    rows = tuple(layer._replace(**changes) for layer in cfg.shape.layers)
    return dataclasses.replace(cfg, shape=cfg.shape._replace(layers=rows))


def stages(cfg, **changes):
    return dataclasses.replace(cfg, stages=tuple(stage._replace(**changes) for stage in cfg.stages))


def frozen(*names):
    """These parts of the packed parameters stay at zero: no gain and no gradient step; their time stays."""
    def change(cfg):
        for name in names:
            t.SMALL_PARAMS[name] = t.SMALL_PARAMS[name]._replace(lr_mul=(0.0,), wd_mul=0.0)
        init = t.GPT.init_weights

        def zeroed(self, seed):
            init(self, seed)
            with torch.no_grad():
                for name in names:
                    t.unpack(self.small, self.small_shapes)[name].zero_()
        t.GPT.init_weights = zeroed
        return cfg
    return change


def fewer_layers(cfg):
    rows = list(cfg.shape.layers)
    del rows[9 if len(rows) > 9 else -2]  # which no other row names
    return dataclasses.replace(cfg, shape=cfg.shape._replace(layers=tuple(rows)))


def one_sign(cfg):
    """The bigram table without its signs."""
    init = t.GPT.__init__

    def made(self, *args, **options):
        init(self, *args, **options)
        self.signs.fill_(1)
    t.GPT.__init__ = made
    return cfg


def bf16_mlp(cfg):
    t.FP8_MLP = ()
    return cfg


def every_token_its_own_kind(cfg):
    read = t.read_token_tables

    def own(cfg):
        prefix, kind = read(cfg)
        return prefix, torch.arange(len(kind), dtype=kind.dtype)
    t.read_token_tables = own
    return cfg


VARIANTS = {
    "whole run": lambda cfg: cfg,  # the preset's own schedule
    "whole run, no paired heads": lambda cfg: layers(cfg, paired=False),
    "whole run, no exclusive heads": lambda cfg: layers(cfg, exclusive=False),
    "whole run, no smear (frozen)": frozen("smear_lambda"),
    "whole run, no extension": lambda cfg: dataclasses.replace(cfg, steps=cfg.total_steps, extension=0),
    "base": lambda cfg: cfg,
    "no gates of value embeddings (frozen at 1)": frozen("value_gates"),
    "no signs of bigrams": one_sign,
    "no kinds of tokens": every_token_its_own_kind,
    "no value embeddings": lambda cfg: layers(cfg, value_embed=False),
    "no paired heads": lambda cfg: layers(cfg, paired=False),
    "no key offset": lambda cfg: layers(cfg, key_offset=False),
    "no exclusive heads": lambda cfg: layers(cfg, exclusive=False),
    "no reading of layer 7": lambda cfg: layers(cfg, reads=None),
    "no mixing into the last layer": lambda cfg: layers(cfg, mixes=None),
    "no mix of layers before the head": lambda cfg: layers(cfg, final=None),
    "no further tokens": lambda cfg: stages(cfg, mtp=((1,), (1,))),
    "no prefix": lambda cfg: stages(cfg, prefix=(0, 0)),
    "whole vocabulary": lambda cfg: stages(cfg, sample=0),
    "bf16 MLP": bf16_mlp,
    "bf16 head and MLP": lambda cfg: dataclasses.replace(cfg, fp8="off"),
    "eleven layers": fewer_layers,
    "no bigrams (frozen)": frozen("bigram_lambdas"),
    "no coefficients of tokens' own (frozen)": frozen("mix_out"),
    "no smear (frozen)": frozen("smear_lambda"),
    "no attention gates (frozen at a half)": frozen("attn_gates"),
    "attention on PyTorch's and references' code": lambda cfg: dataclasses.replace(cfg, kernels="library"),
}


def one(name: str, lock: str) -> None:
    preset = "smoke" if SMOKE else "corpus"
    cfg = t.parse_options([f"preset={preset}", "log_dir=records/runs_ablate"])
    if not name.startswith("whole run"):
        cfg = dataclasses.replace(cfg, stages=cfg.stages[:1], steps=10 if SMOKE else 182, extension=8, val_every=0,
                                  final_window=cfg.stages[0].long, name="Ablate")
    cfg = VARIANTS[name](cfg)
    world = runtime.connect(runtime.start_world(cfg))
    files = t.find_shards(cfg, "train_files")
    plan, validation = t.plan_run(cfg, files), t.read_validation(cfg, world)
    trainer, console = t.Trainer(cfg, world), t.Console(cfg.last_step, plan.tokens, cfg.log_every, 1)
    trainer.reset(0)
    trainer.warm_up(plan, validation, console)
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for seed in range(SEEDS):
            log, clock = runtime.new_log(cfg, world), t.Clock(world.device)
            t.log_header(log, cfg, world, trainer.describe(plan))
            log.write(f"ablation:{name}\nseed:{seed}")
            result = t.Trial(trainer, plan, clock, console, log, seed, {}).run(files, validation)
            runtime.finish_log(log, clock, console, result)
            print(f"{name} | {seed} | {result['val_loss']:.4f} | {result['train_time_ms'] / 1000:.2f} s | "
                  f"{result['peak_memory_allocated_mib']} MiB", flush=True)
            if name.startswith("whole run") and cfg.extension:  # step 444's view of the weights: compiled, other window
                print(f"    with the last stage's long window, {cfg.stages[-1].long}, in place of {cfg.final_window}: "
                      f"{trainer.evaluate(cfg.total_steps - 1, validation):.4f}", flush=True)


def main(argv: list[str]) -> None:
    if argv[0] == "one":
        return one(*argv[1:])
    names, lock = argv[1:] or [*VARIANTS], os.environ.get("LOCK", "/tmp/ablate.lock")

    def run(name: str) -> None:
        done = subprocess.run([sys.executable, __file__, "one", name, lock], capture_output=True, text=True)
        print(done.stdout if done.returncode == 0 else f"{name} failed: {done.stderr[-1500:]}", end="", flush=True)

    with ThreadPoolExecutor(int(argv[0])) as pool:
        list(pool.map(run, names))


if __name__ == "__main__":
    main(sys.argv[1:])
