"""records diff says what differs and no more; records extract gives back what ran."""
import dataclasses
import hashlib
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT
from test_records_logs import MODDED, RULE, ours

import train_gpt
from records import compare
from records.__main__ import main
from records.ladder import rung_folders
from records.logs import find_logs, read_log

KERNELS, HOPPER = (ROOT / "records/corpus" / name for name in ("2026-11-20_Kernels", "2026-11-25_Hopper"))
LOGS = find_logs(KERNELS) + find_logs(HOPPER)
A = '''import os

LIMIT = 1


def first(x):
    return x


class Box:
    size = 2

    def get(self):
        return self.size

    def put(self):
        pass


def gone():
    pass
'''
B = '''import os

LIMIT = 3


class Box:
    size = 2

    def get(self):
        return self.size + 1

    def put(self):
        pass


def first(x):
    return x


def new():
    pass
'''


def test_a_diff_names_what_changed_by_function_and_leaves_out_what_moved():
    lines = list(compare.piece_diff(compare.pieces(A), compare.pieces(B)))
    heads = [line for line in lines if line.startswith(("@@@", "+++", "---"))]
    assert heads == ["@@@ module", "@@@ Box.get", "--- removed: gone, 2 lines", "+++ added: new, 2 lines"]
    assert {"-LIMIT = 1", "+LIMIT = 3", "-        return self.size", "+        return self.size + 1"} <= set(lines)
    assert not any("first" in line or "put" in line for line in lines)


def test_pieces_hold_every_line_of_code_once():
    for log in map(read_log, LOGS[:2]):
        for text in log.sources.values():
            whole = sorted(line for line in text.splitlines() if line.strip())
            assert sorted(line for part in compare.pieces(text).values() for line in part.splitlines()
                          if line.strip()) == whole


def test_what_is_not_python_is_compared_as_a_whole():
    assert compare.pieces("def f(:\n") == {"module": "def f(:\n"}


def test_a_log_differs_from_itself_in_nothing(capsys):
    assert main(["diff", str(LOGS[0]), str(LOGS[0])]) == 0
    out = capsys.readouterr().out
    assert out.count(": 0 differ") == 3 and "train_gpt.py: equal" in out and "triton_kernels.py: equal" in out
    assert "+0.0000" in out and "@@@" not in out


def test_two_records_differ_in_hardware_seed_losses_and_the_kernels_that_changed(capsys):
    a, b = find_logs(KERNELS)[1], next(path for path in find_logs(HOPPER) if path.name.startswith("bf13a957"))
    assert main(["diff", str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert "4x NVIDIA H200" in out and "1x NVIDIA H100" in out and "+++ added: _hopper_multiply" in out
    x, y = (read_log(path).vals[-1].loss for path in (a, b))
    assert f"{x:8.4f} {y:8.4f} {y - x:+8.4f}" in out


def test_logs_of_others_are_compared_by_validations_and_by_source(tmp_path, capsys):
    modded, other, llmc = (tmp_path / name for name in ("modded.txt", "other.txt", "llmc.txt"))
    modded.write_text(f"import os\nLIMIT = 1\n{RULE}\n{MODDED}")
    other.write_text(f"import os\nLIMIT = 3\n{RULE}\n{MODDED.replace('3.2790', '3.2690')}")
    llmc.write_text("s:0 tel:11.0258\ns:0 trl:11.0\ns:20 tel:3.3790\n")
    assert main(["diff", str(modded), str(other)]) == main(["diff", str(modded), str(llmc)]) == 0
    first, second = capsys.readouterr().out.split(f"A {modded}\n")[1:]
    assert "     20   3.2790   3.2690  -0.0100" in first and "-LIMIT = 1\n+LIMIT = 3\n" in first
    assert "     20   3.2790   3.3790  +0.1000" in second and "llmc.txt embeds no source: nothing to compare" in second


def test_a_source_of_another_s_log_is_extracted_and_one_without_is_refused(tmp_path, capsys):
    modded, llmc = tmp_path / "modded.txt", tmp_path / "llmc.txt"
    modded.write_text(f"import os\n{RULE}\n{MODDED}")
    llmc.write_text("s:0 tel:11.0\ns:20 tel:3.3\n")
    assert main(["extract", str(modded), str(tmp_path / "run")]) == 0
    assert (tmp_path / "run/train_gpt.py").read_text() == "import os\n"
    readme = (tmp_path / "run/README.md").read_text()
    assert "It ran on unknown with versions that the log does not name: val loss 3.2790 after 2.0 s" in readme
    assert "\npython train_gpt.py\n" in readme
    assert main(["extract", str(llmc), str(tmp_path / "none")]) == 2 and not (tmp_path / "none").exists()


@pytest.mark.parametrize("error", [MemoryError, RecursionError, SyntaxError, ValueError])
def test_a_source_that_python_cannot_parse_is_compared_as_a_whole(monkeypatch, error):
    def parse(_):
        raise error
    monkeypatch.setattr(compare, "ast", SimpleNamespace(parse=parse))
    assert compare.pieces(A) == {"module": A}


@pytest.mark.parametrize("text", ["x = " + "(" * 5000, "x = " + "-" * 100_000 + "1\n", "x\0"])
def test_a_source_nested_too_deeply_is_compared_as_a_whole(text):
    assert compare.pieces(text) == {"module": text}


@pytest.mark.parametrize("name", ["data", "README.md", "a\0.py", "..", "a/b.py", "x" * 300 + ".py", ".py"])
def test_a_source_with_a_name_of_no_script_is_refused(tmp_path, capsys, name):
    path = ours(tmp_path / "log.txt")
    path.write_bytes(path.read_bytes().replace(b"source: triton_kernels.py", f"source: {name}".encode()))
    assert main(["extract", str(path), str(tmp_path / "run")]) == 2 and not (tmp_path / "run").exists()
    assert "not NAME.py: not extracted" in capsys.readouterr().err


def test_a_log_without_source_is_said_to_have_none(tmp_path, capsys):
    path = tmp_path / "other.txt"
    path.write_text(MODDED)
    assert main(["diff", str(path), str(path)]) == 0
    assert capsys.readouterr().out.rstrip().endswith("embeds no source: nothing to compare")


@pytest.mark.parametrize("path", LOGS, ids=lambda path: path.stem[:8])
def test_an_extracted_source_stands_in_its_log_byte_for_byte(path, tmp_path, capsys):
    assert main(["extract", str(path), str(tmp_path / "run")]) == 0
    whole = path.read_bytes()
    names = {"train_gpt.py", "triton_kernels.py"}
    assert {file.name for file in (tmp_path / "run").iterdir()} == names | {"README.md", "data"}
    for name in names:
        text = (tmp_path / "run" / name).read_bytes()
        assert len(text) > 1000 and b"\nsource: " + name.encode() + b"\n" + b"=" * 100 + b"\n" + text in whole


@pytest.mark.parametrize("folder", rung_folders(ROOT / "records"), ids=lambda path: path.name)
def test_the_script_extracted_from_a_rung_s_log_is_the_rung_s_to_the_last_byte(folder, tmp_path, capsys):
    assert main(["extract", str(find_logs(folder)[0]), str(tmp_path / "run")]) == 0
    assert (tmp_path / "run/train_gpt.py").read_bytes() == (folder / "train_gpt.py").read_bytes()


def test_bytes_of_a_source_that_are_no_text_survive_and_are_compared(tmp_path, capsysbinary):
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path, byte in zip(paths, (b"\xe9", b"\xff"), strict=True):
        path.write_bytes(ours(path, source="import os\nname = 'E'\n").read_bytes().replace(b"'E'", b"'" + byte + b"'"))
    assert main(["extract", str(paths[0]), str(tmp_path / "run")]) == 0
    assert (tmp_path / "run/train_gpt.py").read_bytes() == b"import os\nname = '\xe9'\n"
    assert main(["diff", *map(str, paths)]) == 0 and rb"+name = '\udcff'" in capsysbinary.readouterr().out


def test_the_commands_of_an_extracted_run_find_the_checkout_s_data_and_make_what_is_missing(tmp_path, capsys):
    path = next(ROOT.glob("records/smoke/2026-11-26_Mixing/*.txt"))
    assert main(["extract", str(path), str(tmp_path / "run")]) == 0
    assert (tmp_path / "run/data").samefile(ROOT / "data") and not (tmp_path / "run/data").readlink().is_absolute()
    fetch, train = (tmp_path / "run/README.md").read_text().split("```\n")[1].splitlines()
    assert shlex.split(fetch)[:4] == ["python", "train_gpt.py", "fetch", "preset=smoke"]
    assert train == compare.command(read_log(path))
    command = [sys.executable, *shlex.split(train)[1:], "train_files=none"]
    done = subprocess.run(command, cwd=tmp_path / "run", text=True, capture_output=True, timeout=120)
    assert done.returncode == 2 and "no shard matches train_files='none'" in done.stderr, done.stderr


def test_a_readme_among_the_sources_and_a_folder_without_a_name_are_refused(tmp_path, capsys):
    path = ours(tmp_path / "log.txt")
    assert main(["extract", str(path), ""]) == 2
    path.write_bytes(path.read_bytes().replace(b"source: triton_kernels.py", b"source: README.md"))
    assert main(["extract", str(path), str(tmp_path / "run")]) == 2 and not (tmp_path / "run").exists()
    error = capsys.readouterr().err
    assert "extract takes a log and a folder" in error and "a source called 'README.md'" in error


def test_a_difference_is_shown_from_where_it_is_seen():
    one, two = "x" * 70, "x" * 65 + "y" * 5
    assert compare.excerpts([one], [two]) == ["..." + "x" * 35, "..." + "x" * 30 + "y" * 5]
    assert compare.excerpts(["same", "a" * 70], ["same", "b"]) == ["a" * 60, "b"]
    assert compare.excerpts(["same"], ["same", "more"]) == ["-", "more"]
    lines = compare.side_by_side("config", {"a": "1", "b": one, "c": "0"}, {"b": two, "c": "0"})
    assert lines[0] == "\nconfig: 2 differ, 1 equal" and lines[1].split() == ["a", "1", "-"]
    assert lines[2].endswith("x" * 30 + "y" * 5)


def test_sources_that_differ_in_the_ends_of_lines_or_in_order_say_so(tmp_path):
    log = read_log(ours(tmp_path / "log.txt"))
    for text, sentence in ((A.replace("\n", "\r\n"), "train_gpt.py: equal but for the ends of lines"),
                           (A.replace("LIMIT = 1\n\n\n", "LIMIT = 1\n\n\n\n"), "only moved code or empty lines")):
        one, two = (dataclasses.replace(log, sources={"train_gpt.py": source}) for source in (A, text))
        assert list(compare.source_diff(one, two))[-1].strip() == sentence


def test_a_decorator_belongs_to_its_function():
    found = compare.pieces("import os\n\n\n@first\n@second\ndef f():\n    pass\n")
    assert found == {"module": "import os", "f": "@first\n@second\ndef f():\n    pass"}


def test_the_command_of_an_extracted_run_sets_what_the_log_says():
    log = next(log for log in map(read_log, find_logs(HOPPER)) if log.path.name.startswith("2293b417"))
    python, script, *options = shlex.split(compare.command(log))
    assert (python, script) == ("python", "train_gpt.py")
    cfg = train_gpt.parse_options(options)
    assert "log_dir" in log.config and not any(option.startswith("log_dir=") for option in options)
    assert (cfg.preset, cfg.seed, cfg.trials, cfg.val_every, cfg.steps) == ("corpus", 1, 1, 0, 444)
    four = read_log(find_logs(KERNELS)[0])
    assert compare.command(four).startswith("torchrun --standalone --nproc_per_node 4 train_gpt.py preset=corpus")


def test_the_token_tables_that_a_run_read_are_extracted_with_it_and_no_others(tmp_path, capsys):
    tables = (ROOT / "data" / "gpt2_tokens.npz").read_bytes()
    for name, digest in (("same", hashlib.sha256(tables).hexdigest()), ("other", "0" * 64)):
        path = ours(tmp_path / f"{name}.txt", token_tables="data/gpt2_tokens.npz")
        path.write_bytes(path.read_bytes().replace(b"\ngit:", f"\ntoken tables:sha256 {digest}\ngit:".encode()))
        assert main(["extract", str(path), str(tmp_path / name)]) == 0
    assert (tmp_path / "same/data/gpt2_tokens.npz").read_bytes() == tables and not (tmp_path / "other/data").exists()
    assert "`data` is a link" not in (tmp_path / "other/README.md").read_text()
    assert f"not here as the run read it (sha256 {'0' * 64})" in capsys.readouterr().out


def test_extract_overwrites_nothing_and_leaves_no_folder(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    assert main(["extract", str(LOGS[0]), str(tmp_path / "full")]) == 2
    assert (tmp_path / "full/file").read_text() == "mine" and len(list((tmp_path / "full").iterdir())) == 1
    path = tmp_path / "other.txt"
    path.write_text(MODDED)
    assert main(["extract", str(path), str(tmp_path / "none")]) == 2
    outside = ours(tmp_path / "outside.txt")
    outside.write_bytes(outside.read_bytes().replace(b"source: train_gpt.py", b"source: ../train_gpt.py"))
    assert main(["extract", str(outside), str(tmp_path / "none")]) == 2 and not (tmp_path / "none").exists()
    assert not (tmp_path.parent / "train_gpt.py").exists()
    error = capsys.readouterr().err
    assert "not empty: name a new folder" in error and "embeds no source" in error and "../train_gpt.py" in error
    assert len(error.splitlines()) == 3


@pytest.mark.parametrize("words", [["diff"], ["diff", "a", "b", "c"], ["extract", "a"]])
def test_wrong_counts_of_arguments_get_one_sentence(words, capsys):
    assert main(words) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
