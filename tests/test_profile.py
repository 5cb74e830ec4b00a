"""A profile is a trace and a table of time by region; the memory that a run will take is said before it."""
import contextlib
import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_config
from test_log import train

import runtime
import train_gpt
import triton_kernels
from runtime import REGIONS, UserError, expected_memory, region_table


def test_two_steps_are_profiled_into_a_trace_and_a_table(shards, tmp_path):
    run, plain = train(shards, tmp_path / "a", profile=6), train(shards, tmp_path / "b")
    trace = json.loads(next((tmp_path / "a").rglob("*.trace.json")).read_text())
    assert any("mm" in event.get("name", "") for event in trace["traceEvents"])
    rows = [line for line in run.lines if line.startswith("profile: ")]
    assert rows[0] == "profile: from step 6" and rows[1].startswith("profile: up to step 8, trace ")
    assert [re.match(r"profile: (.+?)  +\d+\.\d ms +\d+\.\d %$", row)[1] for row in rows[2:]] == [*REGIONS, "idle"]
    assert run.losses == plain.losses and any(line.startswith("untimed:profile ") for line in run.lines)
    assert not any(line.startswith("untimed:profile ") for line in plain.lines)


# A validation and a checkpoint stand before step 4, at whose end is step 2's.
@pytest.mark.parametrize("first", [pytest.param(4, marks=pytest.mark.slow), 2])
def test_validations_and_checkpoints_around_the_steps_are_not_profiled(shards, tmp_path, monkeypatch, first):
    begun, within = [], []

    def watch(table, name, note):
        function = getattr(table, name)
        monkeypatch.setattr(table, name, lambda self, step, *args: (note(self, step), function(self, step, *args))[1])
    watch(runtime.Profile, "begin", lambda profile, step: begun.extend(["begin"] * (step == profile.steps[0])))
    watch(runtime.Profile, "end", lambda profile, step: begun.extend(["end"] * (step == profile.steps[1])))
    for name in ("validate", "save"):
        watch(train_gpt.Trial, name, lambda trial, step, name=name: within.append((name, step, begun == ["begin"])))
    run = train(shards, tmp_path, profile=first, val_every=4, save_every=4)
    assert begun == ["begin", "end"] and not any(inside for *_, inside in within)
    assert {("validate", 4, False), ("save", 4, False)} <= set(within) and run.results[0]["steps"] == 14


def test_no_process_is_taken_for_stuck_while_a_trace_is_written(tmp_path, monkeypatch):
    """Writing takes as long as it takes: the watch over the processes is told."""
    busy, seen = [], []

    @contextlib.contextmanager
    def told():
        busy.append(True)
        yield
        busy.pop()
    fake = SimpleNamespace(events=list, **{name: lambda *args, name=name: seen.append((name, bool(busy)))
                                           for name in ("start", "stop", "export_chrome_trace")})
    monkeypatch.setattr(torch.profiler, "profile", lambda: fake)
    profile = runtime.Profile(runtime.Log(tmp_path / "a.txt"), 3, runtime.Clock(torch.device("cpu")),
                              SimpleNamespace(busy=told))
    for step in range(8):
        profile.end(step)
        profile.begin(step)
    assert seen == [("start", True), ("stop", True), ("export_chrome_trace", True)] and not busy


def event(name: str, start: int, end: int, cuda: bool = True) -> SimpleNamespace:
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    return SimpleNamespace(name=name, device_type=kind, time_range=SimpleNamespace(start=start, end=end),
                           self_device_time_total=end - start, self_cpu_time_total=end - start)


def test_kernels_are_counted_by_region_and_what_no_kernel_covers_is_idle():
    events = [event("nvjet_hsh_128x256", 0, 3000), event("ncclDevKernel_AllGather", 1000, 2000),  # beside one another
              event("_attention_forward", 4000, 5000), event("triton_red_fused_mul_mean", 5000, 6000),
              event("_cross_entropy_kernel", 8000, 9000), event("aten::mm", 0, 10_000, cuda=False)]
    table = dict(re.match(r"profile: (.+?)  +(\S+) ms", row).groups() for row in region_table(events, 0.010, cuda=True))
    assert table == {"communication": "1.0", "copies": "0.0", "loss": "1.0", "attention": "1.0", "optimizer": "0.0",
                     "GEMM": "3.0", "norms and other elementwise": "1.0", "idle": "4.0"}


@pytest.mark.parametrize("region, names", [
    ("attention", ["_attention_prepare", "_attention_forward", "_attention_dq", "_attention_dkdv"]),
    ("loss", ["_loss_dense", "_loss_at_targets"]),
    ("copies", ["Memcpy DtoH (Device -> Pageable)", "Memset (Device)", "memcpy128"]),
    ("GEMM", ["nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "_relu_square_tiles", "_hopper_relu_square_backward",
              "void cutlass::Kernel2<cutlass_75_tensorop_s1688gemm_bf16_64x64_nt_align1>",
              "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16, false>"]),
    ("optimizer", ["_symmetric_product", "triton_poi_fused__to_copy_copy__lerp_orthogonalise_rsub_0",
                   "triton_poi_fused__to_copy_add_copy_copy__div_gt_mul_pow_rsub_sqrt_sub_0"]),
    ("norms and other elementwise", ["triton_per_fused__fused_rms_norm_18", "_quantize_transpose", "_transpose",
     "void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::BFloat16>>"]),
])
def test_the_kernels_of_a_step_on_an_h200_have_their_regions(region, names):
    for name in names:
        rows = region_table([event(name, 0, 1000)], 0.001, cuda=True)
        assert [row.split("  ")[0] for row in rows if "100.0 %" in row] == [f"profile: {region}"], name


def test_the_product_s_rate_is_its_operations_over_its_time(monkeypatch):
    """With small matrices in place of the large ones, and a clock on which each product takes two seconds."""
    made, computed = [], []

    def timer(statement, globals):
        computed.append(eval(statement, globals).shape)
        return SimpleNamespace(timeit=lambda count: SimpleNamespace(mean=2.0))
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: made.append(shape) or torch.zeros(2, 3, 3))
    monkeypatch.setattr("torch.utils.benchmark.Timer", timer)
    assert runtime.product_rate(torch.device("cpu")) == pytest.approx(8192**3 / 1e12)
    assert made == [(2, 8192, 8192)] and computed == [(3, 3)]


def test_a_profile_past_the_end_is_refused(shards):
    with pytest.raises(UserError, match="profile=13 takes two steps from there, and the run has 14: lower it"):
        tiny_config(shards, profile=13)


def test_a_profile_with_a_validation_or_a_checkpoint_within_is_refused(shards):
    for option in ("val_every", "save_every"):
        with pytest.raises(UserError, match="profile=3 has a validation or checkpoint between .*: take another"):
            tiny_config(shards, **{"val_every": 0, "profile": 3, option: 4})
    tiny_config(shards, profile=4, val_every=4, save_every=4)


def held(mib: int) -> list[torch.Tensor]:
    return [torch.empty(mib, 2**20, dtype=torch.int8, device="meta")]


def test_the_expected_memory_is_what_the_corpus_run_took():
    """30,375 MiB with eleven layers (records/corpus/2026-11-28_Sampled), of which weights, gradients and optimizer
    state are 7,695."""
    cfg = train_gpt.parse_options(["preset=corpus"])
    eleven = dataclasses.replace(cfg, shape=cfg.shape._replace(layers=cfg.shape.layers[:11]))
    assert expected_memory(eleven, held(7695)) == pytest.approx(30_375, rel=0.01)


def test_fp8_wants_slices_and_samples_that_16_divides():
    cfg = train_gpt.Config()
    for change, able in (({}, True), ({"sample": 1000}, False), ({"tokens": 8 * 1000}, False)):
        stages = (cfg.stages[0]._replace(**change), *cfg.stages[1:])
        assert train_gpt.choose_fp8(dataclasses.replace(cfg, stages=stages), (9, 0), torch.bfloat16) == able


def test_the_preset_for_small_gpus_fits_well_into_24_gb_and_changes_nothing_but_the_slices():
    small, official = (train_gpt.parse_options([f"preset={name}"]) for name in ("24gb", "official"))
    expected, full, card = (*(expected_memory(cfg, held(7695)) for cfg in (small, official)), 24e9 / 2**20)
    assert 1.5 * expected < card < full
    changed = {name for name in vars(small) if getattr(small, name) != getattr(official, name)}
    assert changed == {"preset", "name", "slices", "val_slice_tokens"}


@pytest.mark.skipif(triton_kernels.triton is None, reason="triton cannot be imported")
@pytest.mark.parametrize("capability, dtype, attention, fp8", [
    ((7, 5), "float32", "reference", False),
    ((8, 0), "bfloat16", "library", False), ((8, 6), "bfloat16", "library", False),
    ((8, 9), "bfloat16", "library", True), ((9, 0), "bfloat16", "kernel", True),
    ((12, 0), "bfloat16", "library", True)])
def test_other_gpus_take_the_paths_they_can(monkeypatch, capability, dtype, attention, fp8):
    """By the table of capabilities; that the paths compute the same is shown in test_kernels.py and test_model.py."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found, _, kinds, head = train_gpt.choose(train_gpt.parse_options(["preset=24gb"]), torch.device("cuda"))
    assert (str(found), kinds["attention"], head) == (f"torch.{dtype}", attention, fp8)
    assert train_gpt.fp8_mlp(head, kinds) == (capability == (9, 0))
    assert not train_gpt.fp8_mlp(False, kinds)
