"""records.logs reads every dialect as it was written, and says which line it cannot read."""
import contextlib
import dataclasses
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, tiny_config

import runtime
import train_gpt
from records.check import needed_sources, record_folders
from records.ladder import tokens_done
from records.logs import LogError, Step, find_logs, read_log

RULE = "=" * 100
REAL = [path for track in record_folders(ROOT / "records").values() for folder in track for path in find_logs(folder)]
UUID = "0f1e2d3c-0000-4000-8000-00000000000{}"
SOURCE = f'import os\nx = """é\nstep:5/10 val_loss:1.0 train_time:3ms\n{RULE}x\n{{"val_loss": 1}}\ns:1 tel:2\n"""\n'
SMI = "".join(f"|   {i}  NVIDIA H100 80GB HBM3          On  |   00000000:19:00.0 Off |                    0 |\n"
              for i in range(8)) + "|    1   N/A  N/A     49667      C   /usr/bin/python              0MiB |\n"
MODDED = ("step:0/20 val_loss:10.8258 train_time:0ms step_avg:0.02ms\n"
          "step:1/20 train_time:380ms step_avg:379.58ms\n"
          "step:20/20 train_time:2000ms step_avg:100.00ms\n"
          "step:20/20 val_loss:3.2790 train_time:2010ms step_avg:100.50ms\n"
          "peak memory allocated: 31000 MiB reserved: 46000 MiB\n")


def ours(path: Path, seed: int = 0, val_loss: float = 3.27, ms: int = 2000, steps: int = 20, finished: bool = True,
         end: int = 2, hardware: str = "8x NVIDIA H100 80GB HBM3, compute capability 9.0", source: str = SOURCE,
         **config) -> Path:
    """Writes a log of ours, of the least size."""
    config = {"preset": "official", "name": path.parent.name, "seed": seed, **config}
    lines = [line for name in ("train_gpt.py", "triton_kernels.py") for line in (RULE, f"source: {name}", RULE, source)]
    lines += [RULE, "environment", RULE, "python:3.12.3 torch:2.11.0+cu130 cuda:13.0", f"hardware:{hardware}",
              "git:(git: exit 128) changed files:?? a.py", "?? b.py",
              *(f"config {key}={value}" for key, value in config.items()),
              "config stages=", "  Stage(end=1)", f"  Stage(end={end})",
              "stage 0: steps 0-19", "data: 1,000 training tokens", f"seed:{seed}",
              f"step:0/{steps} val_loss:10.8000 train_time:1ms step_avg:1.00ms",
              f"step:{steps}/{steps} train_loss:3.5000 train_time:{ms - 1}ms"]
    result = {"val_loss": val_loss, "train_time_ms": ms, "steps": steps, "scheduled_steps": steps, "tokens": 1000,
              "seed": seed, "preset": config["preset"], "processes": int(hardware[0]), "hardware": hardware}
    if finished:
        lines += [f"step:{steps}/{steps} val_loss:{val_loss:.4f} train_time:{ms}ms step_avg:1.00ms",
                  "untimed:validation 0.1s", "tokens:1000", json.dumps(result)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(("\n".join(lines) + "\n").encode())
    return path


@pytest.fixture
def read(tmp_path):
    def read(text: str | bytes, name: str = "log.txt"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_log(path)
    return read


########################################
#                 Ours                 #
########################################


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem[:8])
def test_every_log_of_the_project_is_read(path):
    log, data = read_log(path), path.read_bytes()
    top = b"".join(f"{RULE}\nsource: {name}\n{RULE}\n{text}\n".encode() for name, text in log.sources.items())
    assert {*needed_sources(log)} <= log.sources.keys() and data.startswith(top)
    assert log.dialect == "ours" and log.run_id == path.stem
    assert 0 <= log.seed - int(log.config["seed"]) < int(log.config["trials"])
    lines = data[len(top):].decode().splitlines()
    assert len(log.steps) == sum(line.startswith("step:") for line in lines)
    assert log.finished == lines[-1].startswith("{") and log.result == (json.loads(lines[-1]) if log.finished else {})
    assert len(log.config) == sum(line.startswith("config ") for line in lines)
    assert {"python", "torch", "numpy", "triton", "cuda", "hardware", "driver", "git", "data", "model", "stage 0"} \
        <= log.environment.keys()


def test_a_log_gives_what_its_lines_say():
    log = read_log(next(path for path in REAL if path.stem.startswith("738f278a")))
    assert (log.seed, log.val_loss, log.train_time_ms, log.tokens, log.processes) == (0, 3.322366, 48206, 119537664, 4)
    assert log.hardware == "4x NVIDIA H200, compute capability 9.0" and log.hardware_class == "4xH200"
    assert [step.step for step in log.vals] == [0, 148, 296, 444, 452]
    assert log.steps[:2] == (Step(0, 452, "val", 10.7951, 61.0), Step(10, 452, "train", 7.3535, 735.0))
    assert log.environment["torch"] == "2.11.0+cu130" and log.environment["operations"].startswith("attention kernel")
    assert log.config["fetch"] == "" and log.config["stages"].count("\n") == 3
    assert log.config["shape"].splitlines()[1].startswith("Layer(window='short'")


def test_a_log_without_its_result_is_unfinished_and_ends_where_it_was_cut_off():
    log = read_log(next(path for path in REAL if path.stem.startswith("f5928360")))
    assert not log.finished and log.result == {} and log.seed == 1 and log.processes == 4
    assert (log.val_loss, log.train_time_ms, log.tokens) == (3.6347, 47125, None)


def test_what_the_trainer_writes_is_read(shards, tmp_path):
    path, cfg = tmp_path / f"{UUID.format(1)}.txt", tiny_config(shards)
    world = SimpleNamespace(size=1, device=torch.device("cpu"))
    lines = ["stage 0: steps 0-13", "model: 5 parameters", "operations: mlp kernel", "memory: 5 MiB expected",
             "speed: 790"]
    written = train_gpt.Log(path)
    train_gpt.log_header(written, cfg, world, lines)
    for line in ("seed:7", "step:0/14 val_loss:10.5000 train_time:3ms step_avg:3.00ms",
                 "step:14/14 val_loss:2.5000 train_time:90ms step_avg:6.43ms"):
        written.write(line)
    result = {"val_loss": 2.5, "train_time_ms": 90, "steps": 14, "tokens": 5, "seed": 7, "processes": 1,
              "peak_memory_allocated_mib": 1, "peak_memory_reserved_mib": 2}
    runtime.finish_log(written, train_gpt.Clock(world.device), SimpleNamespace(say=lambda text: None), result)
    log = read_log(path)
    assert log.sources == train_gpt.SOURCES and log.result == result and log.seed == 7
    assert log.config.keys() == {field.name for field in dataclasses.fields(cfg)}
    assert log.config["val_files"] == cfg.val_files and log.environment["model"] == "5 parameters"
    found = [log.environment[name] for name in ("operations", "memory", "speed")]
    assert found == ["mlp kernel", "5 MiB expected", "790"]
    assert log.hardware_class == "cpu"


def test_rows_belong_to_the_entry_above_them(tmp_path):
    log = read_log(ours(tmp_path / "log.txt"))
    assert log.config["stages"] == "Stage(end=1)\nStage(end=2)"
    assert log.environment["git"] == "(git: exit 128) changed files:?? a.py\n?? b.py"


########################################
#            Other dialects            #
########################################


def test_modded_nanogpt_with_its_source_and_machine(read):
    log = read(f"{SOURCE}{RULE}\nRunning Python 3.10.12 (main)\nRunning PyTorch 2.9.0.dev compiled for CUDA 12.6\n"
               f"Running Triton version 3.4.0\n| NVIDIA-SMI 560  Driver Version: 560.35.03  CUDA Version: 12.6 |\n"
               f"{SMI}{RULE}\n{MODDED}")
    assert log.dialect == "modded" and log.sources == {"train_gpt.py": SOURCE} and log.finished
    assert log.environment == {"python": "3.10.12", "torch": "2.9.0.dev", "cuda": "12.6", "triton": "3.4.0",
                               "driver": "560.35.03", "hardware": "8x NVIDIA H100 80GB HBM3"}
    assert (log.hardware_class, log.processes, log.seed, log.tokens, log.config) == ("8xH100", None, None, None, {})
    assert log.result == {"val_loss": 3.279, "train_time_ms": 2010, "steps": 20, "scheduled_steps": 20,
                          "peak_memory_allocated_mib": 31000, "peak_memory_reserved_mib": 46000}
    assert [step.step for step in log.vals] == [0, 20]


def test_modded_nanogpt_without_source_has_the_same_steps(read):
    log = read(MODDED)
    assert log.sources == {} and log.hardware_class == "unknown" and len(log.steps) == 4 and log.val_loss == 3.279


def test_a_step_line_with_the_time_only_is_a_train_step_whose_loss_is_nan(read):
    step = read(MODDED).steps[1]
    assert step[:3] == (1, 20, "train") and math.isnan(step.loss) and step.time_ms == 380


def test_the_clock_of_2024_may_start_again_at_step_10_and_nowhere_else(read):
    lines = ["step:0/20 val_loss:16.0280 train_time:475.25ms step_avg:nanms",
             "step:10/20 train_loss:7.0160 train_time:36885ms step_avg:nanms",
             "step:11/20 train_loss:6.9676 train_time:83ms step_avg:nanms",
             "step:20/20 val_loss:3.3 train_time:900ms step_avg:100ms", "peak memory consumption: 31000 MiB"]
    log = read("\n".join(lines))
    assert log.train_time_ms == 900 and log.steps[0].time_ms == 475.25
    assert log.result["peak_memory_allocated_mib"] == 31000
    with pytest.raises(LogError, match="line 5.*goes backwards, from 900 to 899 ms"):
        read("\n".join([*lines[:4], lines[3].replace("900", "899")]))
    for before, after, fine in ((9, 10, True), (8, 9, False), (11, 12, False)):
        text = f"step:{before}/20 train_loss:7 train_time:90ms\nstep:{after}/20 train_loss:7 train_time:8ms\n"
        with contextlib.nullcontext() if fine else pytest.raises(LogError, match="goes backwards"):
            read(text)


def test_a_source_appended_to_another_is_a_source_of_its_own(read):
    log = read(f"import os\n\n\n{'-' * 40}\n# triton_kernels.py\n{'-' * 40}\n\nimport triton\n{RULE}\n{MODDED}")
    assert log.sources == {"train_gpt.py": "import os\n", "triton_kernels.py": "import triton\n"}


def test_a_source_may_stand_between_two_rules(read):
    assert read(f"{RULE}\n{SOURCE}{RULE}\n{MODDED}").sources == {"train_gpt.py": SOURCE}


def test_text_before_a_rule_that_imports_nothing_is_no_source(read):
    log = read(f"step:0/20 val_loss:10.8258 train_time:0ms\n{RULE}\n{MODDED}")
    assert log.sources == {} and len(log.steps) == 5


def test_llm_c(read):
    log = read("s:0 tel:11.0092\ns:0 trl:11.0091 lr:0.000001 norm:15.37\ns:1 trl:10.9\ns:2 eval:0.27\ns:2 tel:3.28\n")
    assert log.dialect == "llmc" and log.finished and log.result == {"val_loss": 3.28, "steps": 2}
    assert log.steps[:2] == (Step(0, None, "val", 11.0092, None), Step(0, None, "train", 11.0091, None))
    assert log.train_time_ms is None and not read("s:0 tel:11.0\ns:0 trl:11.0\n").finished


@pytest.mark.parametrize("last", ["step:19/20 val_loss:3.3 train_time:2020ms", "step:20/20 train_time:2020ms"])
def test_a_run_of_others_is_finished_with_the_validation_after_its_last_step(read, last):
    assert not read("\n".join([*MODDED.splitlines()[:2], last])).finished


@pytest.mark.parametrize("text,name", [
    ("8x NVIDIA H100 80GB HBM3, compute capability 9.0", "8xH100"), ("4x NVIDIA H200", "4xH200"),
    ("1x NVIDIA H100", "1xH100"), ("8x NVIDIA H100 PCIe", "8xH100 PCIe"),
    ("2x NVIDIA H100 NVL, compute capability 9.0", "2xH100 NVL"),
    ("2x NVIDIA A100-SXM4-80GB, compute capability 8.0", "2xA100"),
    ("1x NVIDIA GeForce RTX 4090, compute capability 8.9", "1xRTX 4090"), ("1x Tesla T4", "1xTesla T4"),
    ("2x cpu (x86_64, 96 cores)", "cpu"), ("", "unknown")])
def test_the_class_of_hardware(tmp_path, text, name):
    log = read_log(ours(tmp_path / "log.txt"))
    assert dataclasses.replace(log, result={}, environment={"hardware": text}).hardware_class == name


########################################
#          Bytes, sizes, names         #
########################################


def test_lines_of_the_source_that_look_like_steps_and_results_are_none(tmp_path):
    log = read_log(ours(tmp_path / "log.txt"))
    assert log.sources == {"train_gpt.py": SOURCE, "triton_kernels.py": SOURCE}
    assert [step.step for step in log.steps] == [0, 20, 20] and log.val_loss == 3.27


def test_a_log_with_windows_line_ends_says_the_same(tmp_path):
    path = ours(tmp_path / "log.txt")
    log = read_log(path)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    sources = {name: text.replace("\n", "\r\n") for name, text in log.sources.items()}
    assert read_log(path) == dataclasses.replace(log, sources=sources)
    modded = path.with_name("modded.txt")
    modded.write_bytes(f"{SOURCE}{RULE}\n{MODDED}".replace("\n", "\r\n").encode())
    assert read_log(modded).val_loss == 3.279 and read_log(modded).sources["train_gpt.py"] == sources["train_gpt.py"]


def test_bytes_of_a_source_that_are_no_utf_8_stay_and_the_rest_is_read(read):
    log = read(b"import os  # \xff\n" + f"{RULE}\n".encode() + b"\xfe\xff\n" + MODDED.encode())
    assert log.sources["train_gpt.py"].encode(errors="surrogateescape") == b"import os  # \xff\n"
    assert log.val_loss == 3.279


def test_a_large_log_is_read_in_seconds(read):
    count = 300_000
    text = "".join(f"step:{i}/{count} train_loss:3.2000 train_time:{i}ms step_avg:1.00ms lr:0.0012345\n"
                   for i in range(count))
    assert len(text) > 20e6
    begin = time.perf_counter()
    assert len(read(text).steps) == count and time.perf_counter() - begin < 30


def test_the_run_s_id_is_the_file_s_name_else_an_id_in_the_log_else_the_name(read):
    assert read(MODDED, f"{UUID.format(1)}.txt").run_id == UUID.format(1)
    assert read(f"run {UUID.format(2)}\n{MODDED}", "name.txt").run_id == UUID.format(2)
    assert read(f"import os  # {UUID.format(2)}\n{RULE}\n{MODDED}", "name.txt").run_id == "name"


def test_logs_of_one_name_without_an_id_are_two_runs(read, tmp_path):
    (tmp_path / "a").mkdir()
    assert read("s:0 tel:1\n", "main.log").identity != read("s:0 tel:1\n", "a/main.log").identity
    assert read(MODDED, f"{UUID.format(1)}.txt").identity == read(MODDED, f"a/{UUID.format(1)}.txt").identity


def test_find_logs_sorts_the_text_files_of_a_folder(tmp_path):
    for name in ("b.txt", "a.txt", "README.md"):
        (tmp_path / name).touch()
    assert find_logs(tmp_path) == [tmp_path / "a.txt", tmp_path / "b.txt"]


########################################
#               Refused                #
########################################

FIRST = "step:1/2 val_loss:3.1 train_time:5ms"


@pytest.mark.parametrize("line,reason", [
    ("step:2/2 val_loss:abc train_time:9ms", "'abc' is not a number; take the line from the original log"),
    ("step:2/2 val_loss:-1 train_time:9ms", "'-1' is not a number"),
    ("step:2/2 val_loss:3.1 train_time:9", "'9' is not a number of ms"),
    ("step:2/2 val_loss:3.1 train_time:nanms", "'nanms' is not a number of ms"),
    ("step:2/2 val_lo", "this is not a step line"), ("step:2/2", "this is not a step line"),
    ("step:x/2 val_loss:3.1 train_time:9ms", "this is not a step line"), ("s:2 tel", "this is not a step line"),
    ("step:2/2 lr:0.1", "needs val_loss, train_loss or train_time"),
    ("step:3/2 val_loss:3.1 train_time:9ms", "step 3 is above the total of 2"),
    ("step:0/2 val_loss:3.1 train_time:9ms", "step 0 follows step 1: if the file holds two runs, split it"),
    ("tep:2/2 val_loss:3.1 train_time:9ms", "this is not a step line; take the line from the original log"),
    (" s:2 tel:3.1", "this is not a step line"), ("2 trl:3.1 lr:0.1", "this is not a step line"),
])
def test_a_step_line_that_cannot_be_is_named_with_its_number_and_text(read, tmp_path, line, reason):
    with pytest.raises(LogError) as error:
        read(f"{SOURCE}{RULE}\n{FIRST}\n{line}\n")
    assert str(error.value).startswith(f"{tmp_path / 'log.txt'}, line {SOURCE.count(chr(10)) + 3}, {line!r}: ")
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_a_clock_of_ours_never_goes_backwards(tmp_path):
    path = ours(tmp_path / "log.txt")
    path.write_text(path.read_text().replace("val_loss:10.8000 train_time:1ms", "val_loss:10.8000 train_time:5000ms"))
    with pytest.raises(LogError, match="step:20/20 train_loss.*goes backwards, from 5000 to 1999 ms"):
        read_log(path)


@pytest.mark.parametrize("result,reason", [
    ('{"val_loss": 3.2, "train_t', "the result is cut off"), ('{"val_loss": "low"}', "val_loss is 'low'"),
    ('{"val_loss": 3.2, "train_time_ms": 1}', "steps is None"),
    ('{"val_loss": 3.2, "train_time_ms": 1, "steps": 2, "tokens": "many"}', "tokens is 'many'"),
    ('{"val_loss": true, "train_time_ms": 1, "steps": 2}', "val_loss is True"),
    ('{"val_loss": 3.2, "train_time_ms": -1, "steps": 2}', "train_time_ms is -1"),
    ('{"val_loss": 3.2, "train_time_ms": 1, "steps": 2}', "the result does not follow a validation")])
def test_a_broken_result_is_named(tmp_path, result, reason):
    path = ours(tmp_path / "log.txt", finished=False)
    path.write_text(path.read_text() + result)
    with pytest.raises(LogError, match=reason):
        read_log(path)


@pytest.mark.parametrize("old,new,reason", [
    ('"val_loss": 3.27,', '"val_loss": 3.1,', "val_loss is 3.1, the last validation's 3.27"),
    ('"val_loss": 3.27,', '"val_loss": NaN,', "val_loss is nan, the last validation's 3.27"),
    ('"train_time_ms": 2000', '"train_time_ms": 1990', "train_time_ms is 1990, the last validation's 2000.0"),
    ('"steps": 20', '"steps": 0', "steps is 0, the last validation's 20"),
    ('"scheduled_steps": 20', '"scheduled_steps": 19', "scheduled_steps is 19, the last validation's 20")])
def test_a_result_that_is_not_the_last_validation_s_is_refused(tmp_path, old, new, reason):
    path = ours(tmp_path / "log.txt")
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(LogError, match=f"line .*{reason}; take the line from the original log"):
        read_log(path)
    path.write_text(path.read_text().replace(new, old).replace('"val_loss": 3.27,', '"val_loss": 3.270049,'))
    assert read_log(path).val_loss == 3.270049


@pytest.mark.parametrize("lead", [b"\xef\xbb\xbf", b"\n", b"  \r\n"])
def test_what_an_editor_put_before_a_log_is_refused(tmp_path, lead):
    path = ours(tmp_path / "log.txt")
    path.write_bytes(lead + path.read_bytes())
    with pytest.raises(LogError, match="begins with a byte order mark or a blank line, .*: delete it"):
        read_log(path)


def test_a_byte_order_mark_before_a_step_is_refused_and_a_blank_line_is_none_of_the_log(read):
    with pytest.raises(LogError, match="begins with a byte order mark"):
        read(f"\ufeff{MODDED}")
    assert len(read(f"\n{MODDED}").steps) == 4


def test_lines_about_checkpoints_are_no_steps_and_a_resumed_run_is_known(tmp_path):
    path = ours(tmp_path / "log.txt")
    whole, text = read_log(path), path.read_text()
    last = "step:20/20 train_loss"
    path.write_text(text.replace(last, f"checkpoint:a_step_2.pt\ncheckpoint: none at step 4, free some space\n{last}"))
    assert read_log(path) == whole and not whole.resumed
    path.write_text(text.replace("seed:0\n", "resumed:a_step_2.pt at step 2, with its settings\nseed:0\n"))
    log = read_log(path)
    assert log.resumed and log.config == whole.config and log.environment["stage 0"] == whole.environment["stage 0"]
    path.write_text(text.replace('"seed": 0', '"seed": 0, "resumed_at": 2'))
    assert read_log(path).resumed


def test_a_loss_that_is_nan_is_read_as_nan(read):
    assert math.isnan(read(f"{FIRST}\nstep:2/2 val_loss:nan train_time:9ms\n").val_loss)


@pytest.mark.parametrize("text,reason", [("", "is empty"), ("hello\n", "has no step line"),
                                         (f"{SOURCE}{RULE}\n", "has no step line"),
                                         (f"{SOURCE}{RULE}\n{SMI}", "has no step line")])
def test_a_file_without_a_step_is_no_log(read, text, reason):
    with pytest.raises(LogError, match=reason):
        read(text)


def test_a_device_is_no_log():
    with pytest.raises(LogError, match="/dev/null is empty or no file"):
        read_log("/dev/null")


def test_what_cannot_be_opened_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "none.txt"):
        with pytest.raises(LogError, match=f"cannot read {path}: "):
            read_log(path)


@pytest.mark.parametrize("text", [
    f"{MODDED.split('peak')[0]}step:20/20 val_loss:3.2", MODDED[:MODDED.index("peak") - 1],
    MODDED.replace("3.2790 train_time:2010ms step_avg:100.50ms", "3.2"), "s:0 tel:11\ns:250 tel:6",
    "s:0 tel:11.0\ns:250 tel:6.123456"])
def test_a_log_of_others_that_ends_within_its_last_line_is_unfinished(read, text):
    log = read(text.replace("step:20/20 val_loss:3.2790 train_time:2010ms step_avg:100.50ms\nstep", "step"))
    assert log.cut and not log.finished


def test_a_last_line_that_is_whole_or_no_step_is_not_cut_off(read):
    untimed = "step:0/1 val_loss:9\nstep:1/1 val_loss:3\n"
    for text in (MODDED, MODDED.removesuffix("\n"), "s:0 tel:11\ns:250 tel:6\n", untimed):
        assert read(text).finished and not read(text).cut


def test_the_gpus_of_a_machine_are_counted_by_their_names(read):
    mixed = SMI.replace("H100 80GB HBM3", "A100-SXM4-40GB", 7)
    log = read(f"{SOURCE}{RULE}\n{mixed}{RULE}\n{MODDED}")
    assert log.hardware == "7x NVIDIA A100-SXM4-40GB + 1x NVIDIA H100 80GB HBM3"
    assert log.hardware_class == "7xA100 + 1xH100"


def test_numbers_of_thousands_of_digits_are_untold_or_refused(tmp_path, read):
    digits = "1" * 5000
    path = ours(tmp_path / "log.txt", finished=False)
    text = path.read_text()
    for old, new in (("\nseed:0", f"\nseed:{digits}"), ("hardware:8x", f"hardware:{digits}x"),
                     ("stage 0: steps 0-19", f"stage 0: steps 0-{digits}, {digits} tokens a step"),
                     ("stages=", f"batch_tokens={digits}")):
        log = read(text.replace(old, new))
        assert math.isnan(tokens_done(log, 5)) and log.processes in (None, 8) and log.seed in (None, 0)
    whole = ours(path).read_text()
    for old, new in (('"steps": 20', f'"steps": {digits}'), ('"tokens": 1000', f'"tokens": 1{"0" * 400}'),
                     ('"tokens": 1000', '"tokens": ' + "[" * 100_000), ('"tokens": 1000', '"x": [[1]]'),
                     ("step:20/", f"step:{digits}/"), ('"train_time_ms": 2000', '"train_time_ms": Infinity')):
        with pytest.raises(LogError) as error:
            read(whole.replace(old, new))
        assert len(str(error.value)) < 600 and "Exceeds" not in str(error.value)


def test_a_long_row_of_a_machine_s_table_is_read_in_time(read):
    begin = time.perf_counter()
    read(f"{SOURCE}{RULE}\n|   0  NVIDIA{' ' * 60_000}x\n|   0  {'NVIDIA ' * 9000}x\n{RULE}\n{MODDED}")
    assert time.perf_counter() - begin < 2


@pytest.mark.parametrize("old,new,reason", [
    ('"seed": 0', '"seed": 7', "the result's seed is 7, the header's 0"),
    ("\nhardware:8x NVIDIA H100", "\nhardware:8x NVIDIA B200", "is 8x NVIDIA H100 .*, the header's 8x NVIDIA B"),
    ("train_loss:3.5000 train_time:1999ms", "train_loss:3.5000", "a step line of ours needs train_time"),
    ("train_time:2000ms", f"train_time:{'9' * 400}ms", "is infinite"),
    ("step:20/20 train", "step:20/200 train", "the total of steps changes from 20 to 200"),
    ("step:20/20 train_loss:3.5000", "step:0/20 val_loss:10.9", "step 0 has two validations, 10.8 and 10.9")])
def test_a_log_that_contradicts_itself_is_refused(tmp_path, old, new, reason):
    path = ours(tmp_path / "log.txt")
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(LogError, match=reason):
        read_log(path)


def test_nothing_of_a_run_follows_its_result(tmp_path, read):
    text = ours(tmp_path / "log.txt").read_text()
    with pytest.raises(LogError, match="a step follows the result: if the file holds two runs, split it"):
        read(f"{text}step:20/20 train_loss:3.2 train_time:2001ms\n")
    with pytest.raises(LogError, match="this is a second result; the file holds two runs: split it"):
        read(text + text.splitlines()[-1])


def test_two_logs_in_one_file_are_to_be_split(tmp_path, read):
    whole, cut = ours(tmp_path / "a.txt").read_text(), ours(tmp_path / "b.txt", finished=False).read_text()
    script = f'import os\nprint(f"step:{{i}} val_loss:{{x}}")\n{RULE}\n{MODDED}'
    for text in (whole + whole, cut + whole, script + script):
        with pytest.raises(LogError, match="the file holds two runs: split it"):
            read(text)
    with pytest.raises(LogError, match="if the file holds two runs, split it"):
        read("s:0 tel:11\ns:9 tel:3\n" * 2)


def test_a_run_of_ours_begins_with_its_first_step_unless_it_was_resumed(tmp_path, read):
    for every, first, fine in ((5, 0, True), (5, 1, False), (0, 4, True), (0, 5, False)):
        text = ours(tmp_path / "a.txt", val_every=every, log_every=4).read_text()
        text = text.replace("step:0/20 val_loss:10.8000", f"step:{first}/20 train_loss:10.8000")
        with contextlib.nullcontext() if fine else pytest.raises(LogError, match=f"is of step {first}, .*missing"):
            read(text)
        assert read(text.replace("\nseed:0", "\nresumed:a_step_2.pt at step 2\nseed:0")).resumed
