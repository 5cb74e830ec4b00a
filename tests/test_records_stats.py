"""The tests of means, the leaderboards and the check of the record folders say what the logs say."""
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from test_records_logs import MODDED, RULE, SMI, SOURCE, UUID, ours

pytest.importorskip("scipy", reason="scipy, of requirements-dev.txt, is not installed")

import scipy.stats  # noqa: E402

from records import __main__ as command  # noqa: E402
from records import check, stats, table  # noqa: E402
from records.logs import read_log  # noqa: E402

LOSSES, TIMES = [3.2781, 3.2769, 3.2795, 3.2774], [81000, 81200, 80900, 81050]


def log_path(folder: Path, seed: int) -> Path:
    return folder / f"{UUID.format(seed)}.txt"


@pytest.fixture
def runs(tmp_path) -> list[str]:
    """Paths of four runs with seeds 0 to 3."""
    folder = tmp_path / "2026-01-02_Runs"
    return [str(ours(log_path(folder, seed), seed, loss, ms))
            for seed, (loss, ms) in enumerate(zip(LOSSES, TIMES, strict=True))]


@pytest.fixture
def others(tmp_path) -> list[str]:
    """Three runs of another source and other numbers, with seeds that the first set has too."""
    folder = tmp_path / "2026-01-03_Others"
    return [str(ours(log_path(folder, 4 + seed), seed, loss, ms, steps=30, source="import os\n"))
            for seed, (loss, ms) in enumerate([(3.2760, 79000), (3.2772, 79500), (3.2755, 79100)])]


@pytest.fixture
def run(capsys):
    """Runs a command line; gives its exit code, its output and its errors."""
    def run(*argv: str) -> tuple[int, str, str]:
        code = command.main(list(argv))
        return code, *capsys.readouterr()
    return run


def refused(run, *argv: str) -> str:
    """The sentence with which a command line is refused."""
    code, out, sentence = run(*argv)
    assert code == 2 and out == "" and sentence.startswith("error: ") and sentence.count("\n") == 1
    return sentence


########################################
#               stats                  #
########################################


def test_stats_gives_mean_deviation_and_extremes_of_loss_and_time(run, runs):
    code, out, _ = run("stats", *runs)
    head, _, loss, seconds, _ = out.splitlines()
    assert code == 0 and head == "4 runs of official on 8xH100, 20 steps, seeds 0, 1, 2, 3"
    for row, values, digits in ((loss, np.array(LOSSES), 5), (seconds, np.array(TIMES) / 1e3, 3)):
        numbers = [values.mean(), values.std(ddof=1), values.min(), values.max()]
        assert row.split()[-5:] == ["4", *(f"{number:.{digits}f}" for number in numbers)]


def test_p_is_student_s_one_sided(run, runs):
    values = np.array(LOSSES)
    t = (values.mean() - 3.28) / (values.std(ddof=1) / math.sqrt(4))
    p = scipy.stats.t.cdf(t, 3)
    assert stats.below(values, 3.28) == pytest.approx(p, rel=1e-12)
    assert f"mean below 3.28: p = {p:.3g} (one-sided t-test); " in run("stats", *runs)[1]
    assert stats.below(values, 3.275) > 0.5


def test_the_runs_still_needed_are_the_first_count_with_p_below_the_level(run, runs):
    mean, sd = np.mean(LOSSES), np.std(LOSSES, ddof=1)
    ps = {n: scipy.stats.t.cdf((mean - 3.2785) / sd * math.sqrt(n), n - 1) for n in range(4, 100)}
    first = next(n for n, p in ps.items() if p < 0.01)
    assert stats.runs_needed(mean, sd, 4, 3.2785) == first > 5
    assert f"; {first - 4} more of the same mean and sd until p < 0.01" in run("stats", *runs, "--target", "3.2785")[1]


def test_no_number_of_runs_brings_a_mean_above_the_target_below_it(run, runs):
    assert stats.runs_needed(3.28, 0.001, 4, 3.28) is None
    assert "no number of runs with this mean reaches p < 0.01" in run("stats", *runs, "--target", "3.27")[1]


def test_a_mean_below_the_target_is_said_to_be(run, runs):
    assert run("stats", *runs, "--target", "3.3")[1].splitlines()[-1].endswith("(one-sided t-test), below 0.01")


def test_one_run_or_equal_losses_give_no_p(run, runs, tmp_path):
    assert "mean below 3.28: no p, one run has no spread" in run("stats", runs[0])[1]
    equal = [str(ours(log_path(tmp_path / "equal", seed), seed, ms=2000 + seed)) for seed in (0, 1)]
    assert "mean below 3.28: no p, all losses are equal" in run("stats", *equal)[1]


@pytest.mark.parametrize("separator", ["--", "--against"])
def test_two_sets_are_compared_by_welch_s_test(run, runs, others, separator):
    out = run("stats", *runs, separator, *others)[1].splitlines()
    assert out[5].startswith("3 runs of official on 8xH100, 30 steps, seeds 0, 1, 2")
    for line, one, two, digits in ((out[-2], LOSSES, [3.2760, 3.2772, 3.2755], 5),
                                   (out[-1], np.array(TIMES) / 1e3, [79, 79.5, 79.1], 3)):
        (m, v, n), (m2, v2, n2) = ((np.mean(x), np.var(x, ddof=1), len(x)) for x in (one, two))
        error = math.sqrt(v / n + v2 / n2)
        freedom = error**4 / ((v / n)**2 / (n - 1) + (v2 / n2)**2 / (n2 - 1))
        p, half = 2 * scipy.stats.t.sf(abs(m - m2) / error, freedom), scipy.stats.t.ppf(0.975, freedom) * error
        assert line[10:] == (f"{m - m2:+.{digits}f} ({m - m2 - half:+.{digits}f} to {m - m2 + half:+.{digits}f}), "
                             f"p = {p:.3g}")


def test_times_of_other_hardware_are_not_compared(run, runs, tmp_path):
    slow = [str(ours(log_path(tmp_path / "slow", 4 + seed), seed, 3.27 + seed / 1e3, hardware="4x NVIDIA H200"))
            for seed in (0, 1)]
    out = run("stats", *runs, "--", *slow)[1].splitlines()
    assert "p = " in out[-2] and out[-1] == ("time, s   not compared: 8x NVIDIA H100 80GB HBM3, compute "
                                                    "capability 9.0 and 4x NVIDIA H200")


def test_a_second_set_of_one_run_is_described_without_a_test(run, runs, others):
    assert run("stats", *runs, "--", others[0])[1].splitlines()[-1].startswith("difference: no test")


def test_logs_without_a_clock_have_losses_only(run, tmp_path):
    for name, loss in (("a.txt", 3.27), ("b.txt", 3.26)):
        (tmp_path / name).write_text(f"s:0 tel:11\ns:9 tel:{loss}\n")
    out = run("stats", str(tmp_path / "a.txt"), str(tmp_path / "b.txt"))[1]
    assert "seeds unknown" in out and "val loss" in out and "time" not in out


CHANGES = {"seed, 0": {"seed": 0}, "source": {"source": "import sys\n"}, "hardware": {"hardware": "1x NVIDIA H200"},
           "number of steps": {"steps": 30}, "track": {"preset": "corpus"}, "setting lr_adam": {"lr_adam": 1},
           "setting stages": {"end": 3},
           "unfinished": {"finished": False}, "val_loss nan": {"val_loss": math.nan}}


@pytest.mark.parametrize("what", CHANGES)
def test_a_set_of_unlike_runs_is_refused_with_the_names_of_the_files(run, runs, tmp_path, what):
    odd = str(ours(log_path(tmp_path / "odd", 9), **{"seed": 9, **CHANGES[what]}))
    sentence = refused(run, "stats", runs[0], odd)
    assert what in sentence and odd in sentence
    assert (runs[0] in sentence) == (what not in ("unfinished", "val_loss nan"))


def test_a_run_that_is_given_twice_is_refused(run, runs, others):
    for argv in ((runs[0], runs[0]), (*runs, "--", runs[0])):
        assert f"{runs[0]} and {runs[0]} are the same run: give each run once" in refused(run, "stats", *argv)


def test_a_run_under_other_names_is_refused_and_two_files_of_one_name_are_two_runs(run, tmp_path):
    paths = [tmp_path / name for name in ("a/main.log", "b/main.log", "c.txt")]
    for path, loss in zip(paths, (3.27, 3.26, 3.27), strict=True):
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"s:0 tel:11\ns:9 tel:{loss}\n")
    first, second, copy = map(str, paths)
    assert run("stats", first, second)[0] == 0
    for argv in ((first, copy), (first, "--", copy)):
        assert f"{first} and {copy} are the same run: give each run once" in refused(run, "stats", *argv)


def test_a_seed_is_named_only_where_nothing_else_differs(run, runs, tmp_path):
    odd = str(ours(log_path(tmp_path / "odd", 9), seed=0, source="import sys\n"))
    assert "differ in source" in refused(run, "stats", runs[0], odd)


def test_runs_that_differ_in_checkpoints_alone_are_of_one_thing(run, runs, tmp_path):
    saving = str(ours(log_path(tmp_path / "saving", 9), seed=9, save_every=2, keep=0))
    assert run("stats", runs[0], saving)[0] == 0


def resume(path: Path) -> Path:
    path.write_text(path.read_text().replace('"processes"', '"resumed_at": 8, "processes"'))
    return path


def test_a_resumed_run_is_refused(run, runs, tmp_path):
    resumed = resume(ours(log_path(tmp_path / "resumed", 9), seed=9))
    for argv in ((*runs, str(resumed)), (*runs, "--", str(resumed))):
        assert refused(run, "stats", *argv) == f"error: {resumed} was resumed, its training began in another log: " \
            "leave it out\n"


def stop(path: Path, scheduled: int) -> Path:
    """The log as of a run of 20 steps of this schedule."""
    text = path.read_text().replace("/20 ", f"/{scheduled} ")
    path.write_text(text.replace('"scheduled_steps": 20', f'"scheduled_steps": {scheduled}'))
    return path


def test_stats_says_that_a_run_stopped_early(run, tmp_path):
    path = stop(ours(log_path(tmp_path / "short", 0)), 1200)
    assert run("stats", str(path))[1].startswith("1 run of official on 8xH100, 20 of 1,200 steps, seed 0\n")


def test_sets_of_two_tracks_are_refused(run, runs, tmp_path):
    other = str(ours(log_path(tmp_path / "other", 9), preset="corpus"))
    assert "differ in track, official and corpus" in refused(run, "stats", *runs, "--", other)


@pytest.mark.parametrize("argv,part", [
    ([], "a set without logs"), (["a.txt", "--"], "a set without logs"), (["a", "--", "b", "--", "c"], "two sets"),
    (["--target"], "needs a number, not nothing"), (["--target", "low"], "not low"), (["--tagret", "3"], "--tagret"),
    (["none.txt"], "cannot read none.txt: No such file")])
def test_bad_arguments_of_stats_are_one_sentence(run, argv, part):
    assert part in refused(run, "stats", *argv)


def test_a_log_that_was_cut_off_in_its_last_line_is_refused(run, tmp_path):
    path = tmp_path / "theirs.txt"
    path.write_text(f"{MODDED.split('step:20/20 val')[0]}step:20/20 val_loss:3.2")
    assert refused(run, "stats", str(path)) == f"error: {path} is cut off in its last line: leave it out\n"


def test_what_logs_do_not_tell_is_said_not_to_be_checked(run, runs, tmp_path):
    path = tmp_path / "theirs.txt"
    path.write_text(MODDED)
    assert "\nsources, seeds, hardware not told: not checked\n" in run("stats", str(path))[1]
    path.write_text(f"{SOURCE}{RULE}\n{SMI}{RULE}\n{MODDED}")
    assert "\nseeds not told: not checked\n" in run("stats", str(path))[1]
    assert "not told" not in run("stats", *runs)[1]


def test_a_log_without_times_among_others_is_named(run, tmp_path):
    paths = [tmp_path / "timed.txt", tmp_path / "other.txt"]
    paths[0].write_text(MODDED)
    paths[1].write_text("step:0/20 val_loss:10.8\nstep:20/20 val_loss:3.28\n")
    assert f"\ntime, s   not compared: no time in {paths[1]}\n" in run("stats", *map(str, paths))[1]


@pytest.mark.parametrize("one,two", [
    ("1x cpu (x86_64, 2 cores)", "1x cpu (aarch64, 128 cores)"),
    ("2x NVIDIA A100-SXM4-40GB", "2x NVIDIA A100-SXM4-80GB"),
    ("1x NVIDIA GeForce RTX 4090", "1x NVIDIA GeForce RTX 4090 Laptop GPU")])
def test_hardware_of_one_class_is_not_yet_one_hardware(run, tmp_path, one, two):
    a, b = (str(ours(log_path(tmp_path / "a", seed), seed, 3.27 + seed / 1e3, hardware=hardware))
            for seed, hardware in enumerate((one, two)))
    assert read_log(a).hardware_class == read_log(b).hardware_class
    assert f"differ in hardware, {one} and {two}" in refused(run, "stats", a, b)


@pytest.mark.parametrize("old,new,what", [
    ("torch:2.11.0+cu130", "torch:2.12.0", "torch, 2.11.0+cu130 and 2.12.0"),
    ("data: 1,000", "data: 2,000", "data, 1,000 training tokens and 2,000 training tokens"),
    ("data:", "operations: mlp kernel\ndata:", None), ("data:", "model: 9 parameters\ndata:", None)])
def test_an_environment_that_bears_on_the_training_is_one(run, runs, old, new, what):
    path = Path(runs[1])
    path.write_text(path.read_text().replace(old, new))
    if what:
        assert f"{runs[0]} and {runs[1]} differ in {what}: take runs of one thing" in refused(run, "stats", *runs)
    else:  # which the others do not tell
        assert run("stats", *runs)[0] == 0
        key = new.split(":")[0]
        Path(runs[2]).write_text(Path(runs[2]).read_text().replace(old, f"{key}: other\n{old}"))
        assert f"{runs[1]} and {runs[2]} differ in {key}, " in refused(run, "stats", *runs)


########################################
#               check                  #
########################################


@pytest.fixture
def root(tmp_path) -> Path:
    """A records folder in order, with two tracks and what is no track beside them."""
    root = tmp_path / "records"
    for name, seeds in (("official/2026-01-02_First", (0, 1)), ("smoke/2026-01-03_Second", (2,))):
        folder = root / name
        for seed in seeds:
            ours(log_path(folder, seed), seed, 3.27 + seed / 1e3, preset=folder.parent.name)
        (folder / "README.md").write_text("# What was changed\n")
    for other in ("notes", "runs/2026-01-04_Mine", "ladder/small"):
        (root / other).mkdir(parents=True)
    for readme in (root / "README.md", tmp_path / "README.md"):
        readme.write_text(f"# Records\n\n{table.BEGIN}\n{table.END}\n\nAfter.\n")
    return root


def problems(root: Path) -> list[str]:
    return [problem for track in check.record_folders(root).values() for folder in track
            for problem in check.folder_problems(folder)]


def test_the_project_s_records_are_in_order(run):
    code, out, _ = run("check")
    assert code == 0 and out.endswith("logs: in order\n")


def test_tracks_are_the_folders_with_dated_folders_and_runs_is_none(root):
    assert problems(root) == [] and list(check.record_folders(root)) == ["official", "smoke"]


@pytest.mark.parametrize("name", ["2026-02-30_Name", "2026-01-05", "2026-01-05-Name", "Name"])
def test_a_folder_needs_a_real_date_and_a_name(root, name):
    (root / "smoke" / "2026-01-03_Second").rename(root / "smoke" / name)
    (root / "smoke" / "2026-01-06_Good").mkdir()
    assert f"smoke/{name} is not named YYYY-MM-DD_Name with a date of the calendar" in problems(root)


def test_a_folder_needs_a_readme_and_a_log(root):
    folder = root / "smoke" / "2026-01-03_Second"
    (folder / "README.md").write_text(" \n")
    log_path(folder, 2).unlink()
    assert problems(root) == ["smoke/2026-01-03_Second has no README.md, or an empty one",
                              "smoke/2026-01-03_Second has no log"]


def test_a_log_must_be_readable_with_its_sources_and_no_path_of_a_machine(root):
    folder = root / "smoke" / "2026-01-03_Second"
    path, name = log_path(folder, 2), f"smoke/2026-01-03_Second/{UUID.format(2)}.txt"
    ours(path, source="", log_dir="/home/me/logs")
    number = path.read_text().splitlines().index("config log_dir=/home/me/logs") + 1
    assert problems(root) == [f"{name} lacks the source train_gpt.py", f"{name} lacks the source triton_kernels.py",
                              f"{name} names a path of a machine in line {number}: /home/me/logs"]
    path.write_text("step:1/2 val_loss:abc train_time:1ms\n")
    assert len(problems(root)) == 1 and problems(root)[0].startswith(f"{name} cannot be read: {path}, line 1, ")


@pytest.mark.parametrize("text,found", [("git:/root/x", "/root/x"), ("a (/tmp)", "/tmp)"), ("../../tmp/x", None),
                                        ("data/home/x", None), ("/optimizer", None), ("=/opt/conda", "/opt/conda")])
def test_a_path_of_a_machine_is_absolute(text, found):
    match = check.MACHINE_PATH.search(text)
    assert (match and match[0]) == found


def test_paths_in_the_source_are_no_problem(root):
    ours(log_path(root / "smoke" / "2026-01-03_Second", 2), 2, preset="smoke", source="import os\npath = '/root/x'\n")
    assert problems(root) == []


def test_an_unfinished_log_needs_the_readme_s_word_that_it_was_cut_off(root):
    folder = root / "smoke" / "2026-01-03_Second"
    path = ours(folder / "ab120000-0000-4000-8000-000000000000.txt", 5, finished=False, preset="smoke")
    assert problems(root) == [f"smoke/{folder.name}/{path.name} has no result, and the README does not say that "
                              "ab120000 was cut off"]
    for text in ("ab120000 ended at step 19\n", "a run was cut off at step 19\n"):
        (folder / "README.md").write_text(text)
        assert len(problems(root)) == 1
    (folder / "README.md").write_text("ab120000 was cut off at step 19\n")
    assert problems(root) == []


def test_a_resumed_run_is_no_record(root):
    path = resume(log_path(root / "smoke" / "2026-01-03_Second", 2))
    assert problems(root) == [f"smoke/2026-01-03_Second/{path.name} was resumed: its training began in another log"]


def test_a_run_that_stands_there_twice_is_found_by_its_id_and_by_its_steps(root, run, monkeypatch):
    monkeypatch.setattr(check, "RECORDS", root)
    first, second = root / "official/2026-01-02_First", root / "smoke/2026-01-03_Second"
    ours(log_path(second, 0), 7, 3.25, preset="smoke")
    (second / "renamed.txt").write_bytes(log_path(first, 1).read_bytes())
    assert run("check")[1].splitlines() == [
        f"smoke/{second.name}/{UUID.format(0)}.txt is the run of official/{first.name}/{UUID.format(0)}.txt again",
        f"smoke/{second.name}/renamed.txt is the run of official/{first.name}/{UUID.format(1)}.txt again"]


def test_check_counts_or_lists(root, run, monkeypatch):
    monkeypatch.setattr(check, "RECORDS", root)
    assert run("check") == (0, "2 folders, 3 logs: in order\n", "")
    (root / "smoke" / "2026-01-03_Second" / "README.md").unlink()
    assert run("check") == (1, "smoke/2026-01-03_Second has no README.md, or an empty one\n", "")
    assert "takes no arguments" in refused(run, "check", "all")


@pytest.mark.parametrize("change,sentence", [({"seed": 2}, "have the same seed, 2"),
                                             ({"seed": 9, "val_loss": math.nan}, "the run diverged")])
def test_check_and_table_refuse_rows_that_stats_refuses(root, run, monkeypatch, change, sentence):
    monkeypatch.setattr(table, "RECORDS", root)
    path = ours(log_path(root / "smoke" / "2026-01-03_Second", 9), preset="smoke", **{"val_loss": 3.29, **change})
    problem, = problems(root)
    assert sentence in problem and str(path) in problem and sentence in refused(run, "table")


def test_a_rung_s_runs_are_a_set_too(root, run, monkeypatch):
    monkeypatch.setattr(table, "RECORDS", root)
    folder = rung(root, "01_A", {}, {})
    ours(log_path(folder, 1), 0, 3.29, hardware="1x NVIDIA H200, compute capability 9.0")
    assert "have the same seed, 0" in check.rung_problems(folder)[0] and "same seed, 0" in refused(run, "table")


def test_records_and_logs_that_no_table_finds_are_named(root, run, monkeypatch):
    monkeypatch.setattr(check, "RECORDS", root)
    ours(root / "lone" / "Name" / "a.txt", 4, 3.26)
    ours(root / "2026-12-01_Root" / "b.txt", 5, 3.25)
    ours(log_path(root / "smoke", 6), 6, 3.24)
    (root / "smoke" / "2026-01-03_Second" / "x.log").write_text(MODDED)
    remedy = "lies where no table finds it: move it into a folder TRACK/YYYY-MM-DD_Name"
    assert run("check")[1].splitlines() == [
        "lone/Name is not named YYYY-MM-DD_Name with a date of the calendar",
        "lone/Name has no README.md, or an empty one",
        "smoke/2026-01-03_Second/x.log is neither README.md, a log (.txt), a script (.py) nor a picture (.png)",
        f"2026-12-01_Root {remedy}", f"smoke/{UUID.format(6)}.txt {remedy}"]


def test_the_readme_says_which_files_a_record_folder_may_hold():
    text = (Path(check.__file__).parent / "README.md").read_text()
    sentence, = re.findall(r"A record folder holds[^;]*;", text)
    assert re.findall(r"\((\.\w+)\)", sentence) == list(check.KINDS)


def test_logs_of_others_are_checked_and_have_rows(root, run, monkeypatch):
    monkeypatch.setattr(table, "RECORDS", root)
    folder = root / "smoke" / "2026-01-03_Second"
    (folder / "modded.txt").write_text(f"{SOURCE}{RULE}\n{SMI}{RULE}\n{MODDED}")
    (folder / "llmc.txt").write_text("s:0 tel:11.0\ns:250 tel:6.1\n")
    assert problems(root) == [f"smoke/{folder.name}/llmc.txt lacks the source train_gpt.py"]
    (folder / "llmc.txt").write_text("s:0 tel:11.0\ns:250 tel:6")
    assert f"smoke/{folder.name}/llmc.txt is cut off in its last line, and the README does not say" in problems(root)[1]
    assert run("table")[0] == 0 and "Left out: 1 unfinished log.\n" in (root / "README.md").read_text()
    (folder / "llmc.txt").write_text("s:0 tel:11.0\ns:250 tel:6.1\n")
    assert run("table")[0] == 0
    found = [row[1:7] for row in rows((root / "README.md").read_text()) if "Second" in row[0]]
    assert found == [["8xH100", "8", "1", "3.2720", "2.00", "-"], ["8xH100", "-", "1", "3.2790", "2.01", "-"],
                     ["unknown", "-", "1", "6.1000", "-", "-"]]


########################################
#               table                  #
########################################


@pytest.fixture
def tables(root, run, monkeypatch):
    """Runs `table` on the records folder and gives the text of its README."""
    monkeypatch.setattr(table, "RECORDS", root)

    def tables(*argv: str) -> str:
        assert run("table", *argv)[0] == 0
        return (root / "README.md").read_text()
    return tables


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| [")]
    return [line.strip("| ").split(" | ") for line in lines]


def test_the_project_s_tables_are_what_its_logs_say(run):
    assert run("table", "--check")[0] == 0


def test_a_section_a_track_stands_between_the_markers(tables):
    text = tables()
    assert text.startswith(f"# Records\n\n{table.BEGIN}\n\n### official\n") and "\n### smoke\n" in text
    assert text.endswith(f"\n\n{table.END}\n\nAfter.\n") and tables() == text and tables("--check") == text


def test_a_row_has_the_statistics_of_its_runs(tables, root):
    folder = root / "official" / "2026-01-02_First"
    first, second = [read_log(log_path(folder, seed)) for seed in (0, 1)]
    (name, hardware, processes, n, loss, seconds, p, steps, tokens, logs), other = rows(tables())
    assert name == "[2026-01-02_First](official/2026-01-02_First)" and (hardware, processes, n) == ("8xH100", "8", "2")
    values = np.array([first.val_loss, second.val_loss])
    assert loss == f"{values.mean():.4f} ± {values.std(ddof=1):.4f}" and seconds == "2.00 ± 0.00"
    assert p == f"{stats.below(values, 3.28):.2g}" and (steps, tokens) == ("20", "1,000")
    assert logs.split(", ")[1] == f"[{UUID[:8]}](official/2026-01-02_First/{UUID.format(1)}.txt)"
    assert other[3:7] == ["1", "3.2720", "2.00", "-"]


def test_rows_are_sorted_by_time_within_a_kind_of_hardware(tables, root):
    folder = root / "smoke" / "2026-01-03_Second"
    for seed, ms, hardware in ((5, 900, "8x NVIDIA H100"), (6, 9000, "1x NVIDIA H200"), (7, 3000, "8x NVIDIA H100")):
        ours(log_path(folder, seed), seed, ms=ms, hardware=hardware, lr_adam=seed, preset="smoke")
    found = [(row[1], row[5]) for row in rows(tables()) if "Second" in row[0]]
    assert found == [("1xH200", "9.00"), ("8xH100", "0.90"), ("8xH100", "2.00"), ("8xH100", "3.00")]


@pytest.mark.parametrize("change,count", [({"name": "b"}, 1), ({"val_every": 5}, 1), ({"trials": 9}, 1),
                                          ({"lr_adam": 5}, 2), ({"end": 3}, 2), ({"source": "import os\n"}, 2),
                                          ({"hardware": "8x NVIDIA H200"}, 2)])
def test_runs_of_one_thing_share_a_row(tables, root, change, count):
    ours(log_path(root / "smoke" / "2026-01-03_Second", 5), 5, **{"preset": "smoke", **change})
    assert len(rows(tables())) == 1 + count


def test_unfinished_logs_are_counted_and_no_row(tables, root):
    ours(log_path(root / "smoke" / "2026-01-03_Second", 5), 5, finished=False, preset="smoke")
    assert "\n\nLeft out: 1 unfinished log.\n" in tables() and len(rows(tables())) == 2


def test_resumed_logs_are_counted_and_no_row(tables, root):
    folder = root / "smoke" / "2026-01-03_Second"
    resume(ours(log_path(folder, 5), 5, preset="smoke"))
    ours(log_path(folder, 6), 6, finished=False, preset="smoke")
    text = tables()
    assert "\n\nLeft out: 1 unfinished log and 1 resumed log.\n" in text
    assert [row[3] for row in rows(text)] == ["2", "1"]


def test_runs_that_stopped_early_follow_the_whole_ones_of_their_hardware(tables, root):
    stop(ours(log_path(root / "smoke" / "2026-01-03_Second", 5), 5, ms=900, preset="smoke"), 30)
    found = [(row[5], row[7]) for row in rows(tables()) if "Second" in row[0]]
    assert found == [("2.00", "20"), ("0.90", "20 of 30")]


def test_a_log_of_others_has_a_row_too(tables, root):
    path = root / "smoke" / "2026-01-03_Second" / "theirs.txt"
    path.write_text(f"{SOURCE}{RULE}\n{MODDED}")
    assert rows(tables())[-1][1:9] == ["unknown", "-", "1", "3.2790", "2.01", "-", "20", "-"]


def test_the_project_s_readme_must_have_the_table_and_its_links_start_there(tables, root, run):
    readme = root.parent / "README.md"
    readme.write_text("# Project\n")
    assert f"{readme} needs the line {table.BEGIN}" in refused(run, "table")
    readme.unlink()
    assert f"{readme} is missing: make it, with the lines {table.BEGIN}" in refused(run, "table")
    readme.write_text(f"# Project\n{table.BEGIN}\nold\n{table.END}\n")
    inner, outer = tables(), readme.read_text()
    assert "old" not in outer and outer.count("](records/") == inner.count("](") > 0
    for text, base in ((inner, root), (outer, root.parent)):
        assert all((base / link.split(")")[0]).exists() for link in text.split("](")[1:])


@pytest.mark.parametrize("name", ["README.md", "records/README.md", "records/ladder/README.md"])
def test_what_the_project_s_readmes_link_is_there(name):
    path = ROOT / name
    links = [link for link in re.findall(r"\]\(([^)#]+)", path.read_text()) if not link.startswith("http")]
    assert [link for link in links if not (path.parent / link).exists()] == []
    assert name != "README.md" or {"img/records.png", "img/curves.png", "img/ladder.png"} <= set(links)


def rung(root: Path, name: str, *runs: dict) -> Path:
    """A rung with its README and logs of these arguments."""
    folder = root / "ladder" / name
    folder.mkdir()
    (folder / "train_gpt.py").write_text(SOURCE)
    for readme in (folder / "README.md", folder.parent / "README.md"):
        readme.write_text(f"Rungs\n{table.LADDER}\nold\n{table.END}\n")
    for seed, arguments in enumerate(runs):
        ours(log_path(folder, seed), seed, hardware="1x NVIDIA H200, compute capability 9.0", **arguments)
    return folder


def test_the_ladder_s_tables_are_at_equal_tokens_and_a_common_loss(tables, root):
    first = rung(root, "01_A", dict(val_loss=4.8, ms=4001), dict(val_loss=4.6, ms=6001))
    second = rung(root, "A_B", dict(val_loss=3.8, ms=2001, tie=0), dict(val_loss=3.8, ms=2001, tie=1))
    third = rung(root, "02_C", dict(finished=False))
    tables()
    text = (root / "ladder" / "README.md").read_text()
    assert "| val loss at 0.001 million tokens |" in text and "| s to val loss 4.8000 |" in text
    whole, *others = rows(text)
    assert whole[:6] == ["[01_A](01_A)", "1xH200", "2", "4.7000 ± 0.1414", "250.1 ± 70.7", "0 ± 0"]
    assert [row[0] for row in others] == ["[A_B](A_B) tie=0", "[A_B](A_B) tie=1"]
    seconds = 0.001 + 2 * (10.8 - 4.8) / (10.8 - 3.8)  # from 1 ms on, on the line between two validations
    assert [row[6] for row in others] == [f"{seconds:.1f}"] * 2 and "\n\nNot measured: 02_C.\n" in text
    assert "| 01_A | 1xH200 | 2 |" in (first / "README.md").read_text()
    assert f"]({UUID.format(1)}.txt) |" in (second / "README.md").read_text()
    assert (third / "README.md").read_text() == f"Rungs\n{table.LADDER}\n\nNot measured: 02_C.\n\n{table.END}\n"


def test_a_rung_needs_its_script_and_a_result_in_its_logs(root, run, monkeypatch):
    monkeypatch.setattr(check, "RECORDS", root)
    folder = rung(root, "01_A", dict(finished=False))
    (folder / "train_gpt.py").unlink()
    code, out, _ = run("check")
    assert code == 1 and out.splitlines()[0] == "ladder/01_A has no train_gpt.py, or an empty one"
    assert "has no result" in out


def test_a_rung_needs_a_readme_and_the_script_that_its_logs_ran(root):
    folder = rung(root, "01_A", {})
    assert check.rung_problems(folder) == []
    (folder / "README.md").write_text(" \n")
    (folder / "train_gpt.py").write_text("import os\n")
    assert check.rung_problems(folder) == [
        "ladder/01_A has no README.md, or an empty one",
        f"ladder/01_A/{UUID.format(0)}.txt embeds another train_gpt.py than its folder has"]
    (folder / "README.md").unlink()
    assert check.rung_problems(folder)[0] == "ladder/01_A has no README.md, or an empty one"


def test_check_changes_nothing_and_names_the_file_that_differs(tables, root, run):
    tables()
    path = root / "README.md"
    path.write_text(path.read_text().replace("2.00", "1.00"))
    old = path.read_text()
    assert run("table", "--check") == (1, "records/README.md differs from what the logs say: "
                                          "run `python -m records table`\n", "")
    assert path.read_text() == old
    (root.parent / "README.md").write_text(f"{table.BEGIN}\n{table.END}\n")
    assert run("table", "--check")[1].startswith("records/README.md and README.md differ from what the logs say")


@pytest.mark.parametrize("text", ["none", table.BEGIN, f"{table.END}{table.BEGIN}", table.BEGIN * 2 + table.END])
def test_missing_markers_are_named(tables, root, run, text):
    (root / "README.md").write_text(text)
    assert f"needs the line {table.BEGIN} and after it the line {table.END}" in refused(run, "table")
    assert (root / "README.md").read_text() == text


def test_a_log_without_times_takes_no_other_s_times_away(tables, root):
    folder = root / "smoke" / "2026-01-03_Second"
    (folder / "timed.txt").write_text(MODDED)
    (folder / "other.txt").write_text("step:0/20 val_loss:10.8\nstep:20/20 val_loss:3.28\n")
    assert [row[5] for row in rows(tables()) if row[1] == "unknown"] == ["2.01", "-"]


def test_a_rung_s_log_may_tell_no_tokens(tables, root):
    path = log_path(rung(root, "01_A", {}, dict(val_loss=3.28)), 0)
    path.write_text(path.read_text().replace('"tokens": 1000, ', ""))
    second = log_path(rung(root, "02_B", dict(val_loss=3.3)), 0)
    second.write_text(second.read_text().replace("step:0/20 val_loss:10.8000 train_time:1ms step_avg:1.00ms\n", ""))
    tables()
    assert [row[5] for row in rows((root / "ladder" / "README.md").read_text())] == ["-", "0"]


def test_a_rung_s_log_of_others_may_have_a_validation_without_a_time(tables, root):
    folder = rung(root, "01_A")
    (folder / "theirs.txt").write_text(MODDED.replace("10.8258 train_time:0ms", "10.8258"))
    tables()
    assert rows((root / "ladder" / "README.md").read_text())[0][:3] == ["[01_A](01_A)", "unknown", "1"]


@pytest.mark.parametrize("name", ["README.md", "../README.md", "ladder/01_A/README.md"])
def test_a_readme_that_is_no_text_is_named(root, run, monkeypatch, name):
    monkeypatch.setattr(table, "RECORDS", root)
    rung(root, "01_A", {})
    path = (root / name).resolve()
    path.write_bytes(b"caf\xff" + path.read_bytes())
    for argv in ((), ("--check",)):
        sentence = refused(run, "table", *argv)
        assert f"{path} has the byte 0xff at offset 3, which is no UTF-8: save it as UTF-8" in sentence


########################################
#             Command line             #
########################################


def test_every_command_has_a_line_of_usage(run):
    code, out, _ = run()
    assert code == 0 and run("help") == (code, out, "")
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(command.COMMANDS)


def test_an_unknown_command_names_the_nearest(run):
    assert "unknown command 'tabel': did you mean table?" in refused(run, "tabel")


def test_a_module_that_is_not_there_is_one_sentence(run, monkeypatch):
    monkeypatch.setitem(command.COMMANDS, "race", "records.nothing")
    assert "the command race is not there: records/nothing.py is missing" in refused(run, "race")
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    monkeypatch.delitem(sys.modules, "records.stats")
    assert "is not installed: python -m pip install -r requirements-dev.txt" in refused(run, "stats", "a.txt")


def test_the_module_is_a_program(tmp_path):
    done = subprocess.run([sys.executable, "-m", "records", "stats", str(tmp_path / "none.txt")], cwd=ROOT, text=True,
                          capture_output=True, timeout=60)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


def test_a_reader_that_has_seen_enough_is_no_error(runs):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as closed:
        done = subprocess.run([sys.executable, "-m", "records", "stats", *runs], cwd=ROOT, text=True, stdout=closed,
                              stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
def test_an_output_that_cannot_be_written_is_one_sentence(runs):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "records", "stats", *runs], cwd=ROOT, text=True, stdout=full,
                              stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 2 and done.stderr == "error: cannot use the output: No space left on device\n"


def test_a_closed_output_is_one_sentence(tmp_path):
    for command_line in ("check", ""):
        done = subprocess.run(["sh", "-c", f"'{sys.executable}' -m records {command_line} >&-"], cwd=ROOT, text=True,
                              stderr=subprocess.PIPE, timeout=60)
        assert (done.returncode, done.stderr) == (2, "error: the output is closed: give one, or >/dev/null\n")
