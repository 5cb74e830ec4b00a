"""One compilation, many runs of one seed, each with other rates: 26 of NOTES.md; from the project's folder

    python records/notes/26_sweep.py preset=corpus name=sweep -- lr_adam=0.01 lr_normuon=0.028,cooldown=0.7

Options before -- are every run's; each argument after it is one run's changes, of rates and schedules that no compiled
graph holds: lr_normuon, lr_adam, cooldown, lr_floor, momentum_warmup, momentum_cooldown, seed. One GPU a process.
"""
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import runtime  # noqa: E402
import train_gpt as t  # noqa: E402

FREE = ("lr_normuon", "lr_adam", "cooldown", "lr_floor", "momentum_warmup", "momentum_cooldown", "seed")


def main(argv: list[str]) -> None:
    cut = argv.index("--")
    runs = [argv[:cut] + change.split(",") for change in argv[cut + 1:]]
    base, configs = t.parse_options(argv[:cut]), [t.parse_options(options) for options in runs]
    for cfg in configs:
        fixed = {key: getattr(base, key) for key in FREE}
        assert dataclasses.replace(cfg, **fixed) == base, f"only {', '.join(FREE)} may change"
    world = runtime.connect(runtime.start_world(base))
    files = t.find_shards(base, "train_files")
    plan, validation = t.plan_run(base, files), t.read_validation(base, world)
    trainer = t.Trainer(base, world)
    trainer.reset(base.seed)
    trainer.warm_up(plan, validation, t.Console(base.last_step, plan.tokens, base.log_every, 0))
    for change, cfg in zip(argv[cut + 1:], configs, strict=True):
        trainer.cfg = trainer.optimizer.cfg = cfg
        log, clock = runtime.new_log(cfg, world), t.Clock(world.device)
        console = t.Console(cfg.last_step, plan.tokens, cfg.log_every, 0)
        t.log_header(log, cfg, world, trainer.describe(plan))
        log.write(f"sweep:{change}")
        trial = t.Trial(trainer, plan, clock, console, log, cfg.seed, {})
        try:
            result = trial.run(files, validation)
            runtime.finish_log(log, clock, console, result)
            print(f"{change}: {result['val_loss']:.4f} in {result['train_time_ms'] / 1000:.1f} s", flush=True)
        except t.UserError as error:  # a run that diverges ends alone
            print(f"{change}: {error}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
