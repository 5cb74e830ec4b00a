"""CUDA graphs hold addresses: what they use stays in its place, and they compute what the functions do. And what torch
keeps of compiled functions is not taken for others."""
import dataclasses
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, tiny_config

import runtime
import train_gpt

QUIET = SimpleNamespace(say=lambda text: None)


def prepared(cfg, device="cpu"):
    """A trainer through its warm-up, the files, the plan and the validation of a run."""
    world = runtime.World(0, 1, torch.device(device))
    files, validation = train_gpt.find_shards(cfg, "train_files"), train_gpt.read_validation(cfg, world)
    plan, trainer = train_gpt.plan_run(cfg, files), train_gpt.Trainer(cfg, world)
    trainer.reset(cfg.seed)
    trainer.warm_up(plan, validation, QUIET)
    return trainer, files, plan, validation


def run(trainer, files, plan, validation) -> list[float]:
    """The losses of a run from the seed's weights."""
    cfg = trainer.cfg
    trainer.reset(cfg.seed)
    loader = train_gpt.Loader(cfg, trainer.world, files, plan)
    losses = [trainer.train_step(step, loader.next()).item() for step in range(cfg.last_step)]
    loader.close()
    return [*losses, trainer.evaluate(cfg.last_step, validation)]


def test_what_graphs_use_stays_in_its_place(shards):
    """Weights, state, gradients and sums are written, never replaced: by steps, a new trial or a checkpoint."""
    trainer, *data = prepared(tiny_config(shards, stop_after=6, val_every=0))

    def places():
        model, optimizer = trainer.model, trainer.optimizer
        grads = {f"{name} gradient": p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert len(grads) == len(train_gpt.PARAMS) - len(train_gpt.SUMMED)
        held = {**trainer.state(), **dict(model.named_buffers()), **optimizer.sums, **grads,
                **{f"rotary {i}": table for i, tables in enumerate(trainer.rotary) for table in tables}}
        return {name: tensor.data_ptr() for name, tensor in held.items()}

    before = places()
    run(trainer, *data)
    trainer.load(trainer.save())
    run(trainer, *data)
    assert places() == before


def test_a_captured_function_is_called_once_a_key_and_replayed_from_then_on(monkeypatch):
    """With a graph that stands for CUDA's: it runs what was captured again."""
    class Recorded:
        captured = None

        def pool(self):
            return "memory"

        def replay(self):
            Recorded.replays += 1
            self.result.copy_(self.function(*self.arguments))

    class Capture:
        def __init__(self, graph, pool, capture_error_mode):
            pools.append(pool)
            Recorded.captured = graph

        def __enter__(self): ...
        def __exit__(self, *error): ...

    def double(key, x):
        calls.append(key)
        if Recorded.captured is not None:
            graph, Recorded.captured = Recorded.captured, None
            graph.function, graph.arguments, graph.result = (lambda key, x: key * x), (key, x), torch.zeros_like(x)
            return graph.result
        return key * x

    Recorded.replays, pools, calls, graphs = 0, [], [], train_gpt.Graphs()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    assert [graphs.run(double, 2, torch.tensor(v)).item() for v in (1.0, 3.0)] == [2, 6] and calls == [2, 2]
    graphs.on = True
    given = torch.tensor(5.0)
    answers = [graphs.run(double, key, x).item() for key, x in
               ((2, given), (2, torch.tensor(7.0)), (3, given), (2, given))]
    assert answers == [10, 14, 15, 10] and given == 5.0
    assert calls == [2, 2, 2, 3] and pools == [None, "memory"] and Recorded.replays == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_graphs_train_and_evaluate_as_the_functions_do(shards):
    cfg = dataclasses.replace(tiny_config(shards, compile="on", stop_after=6, val_every=0),
                              shape=train_gpt.SMOKE_SHAPE)
    trainer, *data = prepared(cfg, "cuda")
    learned = {key for function, key in trainer.graphs.captured if function == trainer.learn_slice}
    assert trainer.graphs.on and learned == {0, 1} and len(trainer.graphs.captured) == 3
    outcomes = {}
    for on in (True, False):
        trainer.graphs.on = on
        outcomes[on] = run(trainer, *data), {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    (losses, weights), (expected, reference) = outcomes[True], outcomes[False]
    assert len(losses) == 7 and losses == pytest.approx(expected, rel=1e-3)
    for name, weight in reference.items():  # sums by atomic additions differ in their order
        assert (weights[name].float() - weight.float()).norm() < 0.05 * weight.float().norm(), name
    assert len(trainer.graphs.captured) == 3


CACHED = """
import sys, torch, runtime, train_gpt
from torch._dynamo.utils import counters
factor, tag = float(sys.argv[1]), sys.argv[2]
compiled = train_gpt.compiler(True)
assert torch.compiler.config.cache_key_tag == runtime.file_hash("triton_kernels.py")
runtime.file_hash = lambda name: tag
double = torch.library.custom_op("test::double", lambda x: x * 2, mutates_args=(), schema="(Tensor x) -> Tensor")
double.register_fake(torch.empty_like)
double.register_autograd(lambda ctx, g: g * factor)
class Tenfold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()
    @staticmethod
    def backward(ctx, g):
        return 10 * g
x = torch.ones(4, requires_grad=True)
train_gpt.compiler(True)(lambda x: Tenfold.apply(double(x)).sum())(x).backward()
print(x.grad[0].item(), counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler")
def test_compiled_functions_are_kept_and_an_operator_of_other_kernels_is_compiled_anew(tmp_path):
    """torch's key has an autograd.Function's code, but of a custom operator's backward pass the name alone: the tag."""
    def run(factor, tag):
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", CACHED, str(factor), tag], cwd=ROOT, env=environment, timeout=300,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert [run(2, "a"), run(2, "a"), run(3, "b")] == [["20.0", "0"], ["20.0", "1"], ["30.0", "0"]]


WORKER = """
import torch, runtime, train_gpt
from torch._inductor.async_compile import AsyncCompile
train_gpt.compiler(True)
seen = AsyncCompile.process_pool().submit(eval, "__import__('torch').compiler.config.cache_key_tag").result(200)
assert seen == torch.compiler.config.cache_key_tag == runtime.file_hash("triton_kernels.py"), seen
"""


def test_processes_that_compile_mark_what_they_keep_as_this_one_does(tmp_path):
    """Which tile a kernel runs best with is noted under the tag of the process that compiled it, and looked up under
    this one's: with another, every start would measure all of them again."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    environment.pop("TORCH_COMPILE_CACHE_KEY_TAG", None)
    done = subprocess.run([sys.executable, "-c", WORKER], cwd=ROOT, env=environment, timeout=300, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
