"""The log tells all that happened in a run, and what it tells is so."""
import contextlib
import dataclasses
import datetime
import io
import json
import os
import platform
import re
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_config

import runtime
import train_gpt

VALIDATION = re.compile(r"step:(\d+)/(\d+) val_loss:(\d+\.\d{4}) train_time:(\d+)ms step_avg:(\d+\.\d\d)ms")
TRAINING = re.compile(r"step:(\d+)/(\d+) train_loss:(\d+\.\d{4}) train_time:(\d+)ms")
STEPS = 14  # of the tiny configuration


class Watched(train_gpt.Trainer):
    """A trainer that notes what it was shown, what it answered and what warm-up did to it."""

    def __init__(self, cfg, world):
        super().__init__(cfg, world)
        self.warming, self.made_up, self.slices, self.train_losses, self.val_losses = False, [], [], {}, {}
        self.resets = 0
        Watched.last = self

    def reset(self, seed):
        super().reset(seed)
        self.resets += 1  # of a GPT-2, seconds each
        self.train_losses, self.val_losses = {}, {}
        self.began = {name: tensor.clone() for name, tensor in self.everything().items()}

    def everything(self):
        grads = {f"{name}.grad": p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        return {**self.state(), **{f"{name}.sums": sums for name, sums in self.optimizer.sums.items()}, **grads}

    def warm_up(self, *args):
        self.warming = True
        super().warm_up(*args)
        self.warming = False
        self.warmed = {name: tensor.clone() for name, tensor in self.everything().items()}

    def train_step(self, step, batches):
        loss = super().train_step(step, batches)
        self.note(step, batches, loss.item(), self.train_losses)
        return loss

    def evaluate(self, step, validation):
        loss = super().evaluate(step, validation)
        self.note(step, validation.slices, loss, self.val_losses)
        return loss

    def note(self, step, batches, loss, losses):
        (self.made_up if self.warming else self.slices).extend(batch.tokens for batch in batches)
        if not self.warming:
            losses[step] = loss


class Run(NamedTuple):
    cfg: train_gpt.Config
    logs: list[Path]            # in the order in which they were begun
    console: str
    trainer: Watched

    @property
    def lines(self) -> list[str]:
        return self.logs[0].read_text().splitlines()

    @property
    def results(self) -> list[dict]:
        return [json.loads(log.read_text().splitlines()[-1]) for log in self.logs]

    @property
    def losses(self) -> tuple[dict[int, float], dict[int, float]]:
        """Of the last trial, every bit of them: of training and of validation, by step."""
        return self.trainer.train_losses, self.trainer.val_losses

    def fields(self, pattern: re.Pattern) -> list[tuple[str, ...]]:
        return [match.groups() for line in self.lines if (match := pattern.fullmatch(line))]


def train(shards: Path, folder: Path, trainer: type = Watched, **changes) -> Run:
    """Trains the tiny configuration in this process, as the command line does."""
    cfg, console = tiny_config(shards, log_dir=str(folder), **changes), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(console):
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            patch.delenv(name, raising=False)
        patch.setattr(train_gpt, "Trainer", trainer)
        patch.setattr(train_gpt, "parse_options", lambda argv: cfg)
        assert train_gpt.main([]) == 0
    logs = sorted(folder.rglob("*.txt"), key=lambda log: int(re.search(r"^seed:(\d+)$", log.read_text(), re.M)[1]))
    return Run(cfg, logs, console.getvalue(), Watched.last)


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> Run:
    """The whole tiny run with seed 0."""
    return train(shards, tmp_path_factory.mktemp("run"))


########################################
#          What stands in it           #
########################################


def test_the_log_s_path_is_the_folder_the_date_and_the_name_and_an_id(run):
    path, = run.logs
    folder, file = path.relative_to(run.cfg.log_dir).parts
    assert file == path.name and re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\.txt", file)
    date, name = folder.split("_")
    assert name == "tiny"
    assert datetime.date.today() - datetime.date.fromisoformat(date) <= datetime.timedelta(days=1)


def test_the_console_prints_the_path_of_the_log_last(run):
    assert run.console.splitlines()[-1] == f"log: {os.path.relpath(run.logs[0], ROOT)}"


def test_the_console_prints_every_validation_line_of_the_log(run):
    validations = [line for line in run.lines if VALIDATION.fullmatch(line)]
    assert [line for line in run.console.splitlines() if VALIDATION.fullmatch(line)] == validations


def test_the_console_tells_what_is_left_by_tokens_as_later_steps_are_larger(run):
    left = re.findall(r"^step (\d+)/14 .* ([\d,]+) tok/s  [\d.]+ s, about (\d+) s left$", run.console, re.M)
    sizes = [run.cfg.stages[train_gpt.stage_at(run.cfg, step)].tokens for step in range(14)]
    assert [int(step) for step, *_ in left] == list(range(1, 15)) and sizes[0] < sizes[-1]
    for step, rate, seconds in left:
        tokens, rate = sum(sizes[int(step):]), int(rate.replace(",", ""))
        rounding = 0.51 + tokens / (rate - 0.5) - tokens / rate
        assert float(seconds) == pytest.approx(tokens / rate, abs=rounding)


def test_a_run_that_goes_on_tells_the_rate_of_this_machine(capsys):
    console = runtime.Console(20, 1000, 1, 0)
    console.start(400, 1.0)
    console.step(12, 500, 3.0)
    assert "step 12/20  train_loss ...  50 tok/s  3.0 s, about 10 s left" in capsys.readouterr().out


def test_on_a_terminal_the_bar_is_full_after_the_last_token(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stderr", terminal)
    console = runtime.Console(20, 1000, 1, 0)
    for last in ("3.2000", "3.1000"):  # of the second of two trials no loss is known at its start either
        console.start(400, 1.0)
        assert console.loss == "..."
        console.step(12, 500, 1.5)
        assert (console.bar.n, console.bar.total) == (500, 1000)
        console.loss = last
        console.step(20, 1000, 2.0)
        console.stop()
        assert "1.00k/1.00k" in terminal.getvalue() and f"step 20/20, loss {last}" in terminal.getvalue()


def test_the_source_of_every_file_stands_first_byte_for_byte(run):
    rule, expected = b"=" * 100, b""
    for name in ("train_gpt.py", "triton_kernels.py", "runtime.py"):
        expected += rule + b"\nsource: " + name.encode() + b"\n" + rule + b"\n" + (ROOT / name).read_bytes() + b"\n"
    assert run.logs[0].read_bytes().startswith(expected + rule + b"\nenvironment\n")


def test_versions_hardware_and_git_state_follow_the_source(run):
    lines = run.lines[run.lines.index("environment") + 2:]
    versions = dict(word.split(":", 1) for word in lines[0].split())
    assert versions["python"] == platform.python_version()
    assert versions["torch"] == torch.__version__ and versions["numpy"] == np.__version__
    assert {"triton", "cuda"} <= set(versions)
    assert lines[1] == f"hardware:1x cpu ({platform.machine()}, {os.cpu_count()} cores)"
    assert lines[2].startswith("driver:")
    commit = runtime.shell("git", "rev-parse", "HEAD")
    if "(" in commit:  # a copy without its history
        assert lines[3] == "git:no commit here; the sources above are what ran"
    else:
        assert re.match(rf"git:{commit} changed files:\S", lines[3])


def test_every_field_of_the_configuration_is_in_the_log(run):
    for field in dataclasses.fields(run.cfg):
        value = "" if field.name in ("shape", "stages") else getattr(run.cfg, field.name)
        assert run.lines.count(f"config {field.name}={value}") == 1, field.name
    for row in (*run.cfg.shape.layers, *run.cfg.stages):
        assert f"  {row}" in run.lines
    shape = " ".join(f"{name}={value}" for name, value in run.cfg.shape._asdict().items() if name != "layers")
    assert f"  {shape}" in run.lines


def test_the_seed_stands_between_the_configuration_and_the_first_step(run):
    first = next(i for i, line in enumerate(run.lines) if line.startswith("step:"))
    assert run.lines[first - 1] == "seed:0"


def test_validation_lines_stand_at_every_val_every_and_at_the_end(run):
    validations = run.fields(VALIDATION)
    assert [(int(step), int(total)) for step, total, *_ in validations] == [(s, STEPS) for s in (0, 5, 10, STEPS)]
    for step, _, loss, train_time, average in validations:
        assert loss == f"{run.trainer.val_losses[int(step)]:.4f}"
        assert abs(float(average) * max(1, int(step)) - int(train_time)) <= 0.6 + 0.005 * STEPS


def test_training_lines_stand_at_every_log_every_with_the_loss_of_the_step(run):
    training = run.fields(TRAINING)
    assert [(int(step), int(total)) for step, total, *_ in training] == [(s, STEPS) for s in range(1, STEPS + 1)]
    assert [loss for _, _, loss, _ in training] == [f"{loss:.4f}" for loss in run.trainer.train_losses.values()]


def test_train_time_never_falls(run):
    times = [int(re.search(r" train_time:(\d+)ms", line)[1]) for line in run.lines if line.startswith("step:")]
    assert len(times) == STEPS + 4 and times == sorted(times) and times[-1] > 0


def test_the_untimed_regions_are_named_with_their_seconds(run):
    regions = dict(re.fullmatch(r"untimed:(.+) (\d+\.\d)s", line).groups() for line in run.lines
                   if line.startswith("untimed:"))
    assert list(regions) == ["check of shards", "process group and model", "compilation and warm-up",
                             "initial weights", "validation"]
    assert float(regions["compilation and warm-up"]) > 0


def test_peak_memory_and_tokens_stand_before_the_result(run):
    memory, tokens, _ = run.lines[-3:]
    assert 0 < int(re.fullmatch(r"peak memory:(\d+) MiB allocated, \d+ MiB reserved", memory)[1]) < 10_000
    scheduled = 4 * 8 * 16 + 4 * 8 * 24 + 6 * 8 * 32
    assert tokens == f"tokens:{scheduled}" and run.results[0]["tokens"] == scheduled


def test_the_last_line_is_the_result_and_agrees_with_the_lines_before_it(run):
    result, (*_, (_, _, loss, train_time, average)) = run.results[0], run.fields(VALIDATION)
    assert f"{result['val_loss']:.4f}" == loss and result["val_loss"] == round(run.trainer.val_losses[STEPS], 6)
    assert result["train_time_ms"] == int(train_time) and abs(result["step_avg_ms"] - float(average)) < 0.0056
    assert result["first_step_to_last_validation_ms"] >= result["train_time_ms"]
    assert (result["steps"], result["scheduled_steps"], result["seed"]) == (STEPS, STEPS, 0)
    assert (result["preset"], result["processes"]) == ("smoke", 1) and result["hardware"].startswith("1x cpu")
    assert result["peak_memory_allocated_mib"] > 0 and result["peak_memory_reserved_mib"] > 0


########################################
#        What the clock leaves out     #
########################################


def test_train_time_leaves_out_validation_and_the_total_has_it(shards, tmp_path):
    class Slow(Watched):
        def evaluate(self, step, validation):
            time.sleep(0 if self.warming else 0.25)
            return super().evaluate(step, validation)

    slow = train(shards, tmp_path, Slow)
    result = slow.results[0]
    assert result["first_step_to_last_validation_ms"] - result["train_time_ms"] >= 4 * 250
    regions = dict(line.removeprefix("untimed:").rsplit(" ", 1) for line in slow.lines if line.startswith("untimed:"))
    assert float(regions["validation"].rstrip("s")) >= 4 * 0.25


def test_train_time_has_the_whole_of_every_step(shards, tmp_path):
    class Slow(Watched):
        def train_step(self, step, batches):
            time.sleep(0 if self.warming else 0.1)
            return super().train_step(step, batches)

    assert train(shards, tmp_path, Slow, stop_after=4, val_every=0).results[0]["train_time_ms"] >= 4 * 100


########################################
#          Seeds, trials, stops        #
########################################


def test_the_same_seed_gives_the_same_losses_bit_for_bit(run, shards, tmp_path):
    assert train(shards, tmp_path).losses == run.losses


def test_trials_write_a_log_each_and_the_second_is_a_run_with_the_next_seed(run, shards, tmp_path):
    trials = train(shards, tmp_path / "trials", trials=2)
    alone = train(shards, tmp_path / "alone", seed=1)
    assert [result["seed"] for result in trials.results] == [0, 1]
    assert [result["val_loss"] for result in trials.results] == [run.results[0]["val_loss"],
                                                                alone.results[0]["val_loss"]]
    assert trials.losses == alone.losses != run.losses
    source = (ROOT / "train_gpt.py").read_text()
    for seed, log in enumerate(trials.logs):
        text = log.read_text()
        assert source in text and text.count("\nsource: train_gpt.py\n") == 1
        assert f"\nseed:{seed}\n" in text and f"\nseed:{1 - seed}\n" not in text
        assert f"log: {os.path.relpath(log, ROOT)}\n" in trials.console
        assert len(TRAINING.findall(text)) == STEPS
    losses = [result["val_loss"] for result in trials.results]
    assert trials.console.splitlines()[-1].startswith(f"2 trials: val_loss {np.mean(losses):.4f}, standard deviation")


@pytest.mark.parametrize("stop", [3, 9])
def test_a_run_that_stops_early_follows_the_whole_schedule_until_then(run, shards, tmp_path, stop):
    short = train(shards, tmp_path, stop_after=stop, log_every=4)
    train_losses, val_losses = run.losses
    assert short.trainer.train_losses == {step: train_losses[step] for step in range(stop)}
    both = short.trainer.val_losses.keys() & val_losses.keys()
    assert both == {step for step in (0, 5) if step < stop} and list(short.trainer.val_losses)[-1] == stop
    assert all(short.trainer.val_losses[step] == val_losses[step] for step in both)
    assert short.results[0]["steps"] == stop and short.results[0]["scheduled_steps"] == STEPS
    assert [int(step) for step, *_ in short.fields(TRAINING)] == [*range(4, stop, 4), stop]


########################################
#                Warm-up               #
########################################


class Learned(Watched):
    """Its warm-up begins with weights that learn something: from those of zero hardly a gradient comes."""

    def warm_up(self, *args):
        self.model.init_weights(9)
        super().warm_up(*args)


@pytest.mark.parametrize("options", [{}, dict(extension=1, val_every=0)], ids=["", "a stage too short for Adam"])
def test_a_run_begins_at_its_seed_whatever_the_warm_up_left(shards, tmp_path, options):
    trainer = train(shards, tmp_path, Learned, seed=3, **options).trainer
    fresh = train_gpt.Trainer(trainer.cfg, trainer.world)
    assert not any(p.any() for p in fresh.model.parameters())  # with what a warm-up begins
    fresh.reset(3)
    expected = fresh.state()
    assert trainer.resets == 1 and len(expected) > len(train_gpt.PARAMS)
    assert trainer.began.keys() == trainer.warmed.keys() > expected.keys()
    for name, tensor in trainer.began.items():
        assert torch.equal(tensor, expected.get(name, torch.zeros_like(tensor))), name
    left = {name for name, tensor in trainer.warmed.items() if not torch.equal(tensor, trainer.began[name])}
    assert left >= expected.keys() and (left > expected.keys()) == bool(options)


def test_warm_up_sees_no_token_of_the_shards(run, shards, tmp_path, monkeypatch):
    real = {tuple(tokens.tolist()) for tokens in run.trainer.slices}
    assert len(run.trainer.made_up) > 8 and len(real) > 8 * STEPS
    assert not any(tuple(tokens.tolist()) in real for tokens in run.trainer.made_up)

    class Blind(Watched):
        def warm_up(self, *args):
            with monkeypatch.context() as patch:
                patch.delattr(train_gpt.DocumentStream, "take")
                super().warm_up(*args)

    assert train(shards, tmp_path, Blind, stop_after=1).results[0]["steps"] == 1


def test_warm_up_runs_every_stage_with_and_without_adam_and_every_validation_view(shards, tmp_path):
    class Views(Watched):
        def train_step(self, step, batches):
            self.seen = getattr(self, "seen", [])
            self.seen += [(train_gpt.stage_at(self.cfg, step), step % 2)] * self.warming
            return super().train_step(step, batches)

        def evaluate(self, step, validation):
            self.views = getattr(self, "views", set())
            self.views |= {(train_gpt.stage_at(self.cfg, step), step == STEPS)} if self.warming else set()
            return super().evaluate(step, validation)

    trainer = train(shards, tmp_path, Views).trainer
    assert set(trainer.seen) == {(stage, odd) for stage in range(4) for odd in (0, 1)}
    assert trainer.views == {(0, False), (1, False), (2, False), (3, False), (3, True)}


def test_each_process_compiles_from_another_stage_on_and_waits_for_none(shards):
    cfg, cpu, orders = tiny_config(shards), torch.device("cpu"), []
    plan = train_gpt.plan_run(cfg, train_gpt.find_shards(cfg, "train_files"))
    validation = train_gpt.read_validation(cfg, runtime.World(0, 1, cpu))
    steps = [0, *train_gpt.stage_ends(cfg)]
    for rank in range(4):
        trainer = train_gpt.Trainer(cfg, runtime.World(rank, 4, cpu))  # without a group: to wait for others would raise
        trainer.reset(cfg.seed)
        learned, views = [], []
        trainer.slice_loss = lambda *args, slice_loss=trainer.slice_loss, learned=learned: (
            learned.append(args[6]), slice_loss(*args))[1]
        trainer.hidden = lambda *args, hidden=trainer.hidden, views=views: (views.append(args[5]), hidden(*args))[1]
        orders.append([stage for stage, _ in trainer.rehearse(plan, validation, alone=True)])
        assert learned == [train_gpt.stage_view(cfg, stage) for stage in orders[-1]]
        assert set(views) == {train_gpt.validation_view(cfg, step)[1] for step in steps}
    assert orders == [[0, 1, 2, 3], [1, 2, 3, 0], [2, 3, 0, 1], [3, 0, 1, 2]]
