"""records.plot draws what the logs say, in the same bytes each time, readable in grey."""
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib, of requirements-dev.txt, is not installed")
pytest.importorskip("scipy", reason="scipy, of requirements-dev.txt, is not installed")

from matplotlib.colors import to_rgb  # noqa: E402

from records import plot  # noqa: E402
from records.__main__ import main  # noqa: E402
from records.check import record_folders  # noqa: E402
from records.logs import find_logs, read_log  # noqa: E402

RULE = "=" * 100
H200, H100 = "4x NVIDIA H200, compute capability 9.0", "1x NVIDIA H100 80GB HBM3, compute capability 9.0"
STAGES = "stage 0: steps 0-3, 1,000 tokens a step = 1\nstage 1: steps 4-7, 2,500 tokens a step = 1\n"
MODDED = ("step:0/8 val_loss:10.8 train_time:0ms step_avg:nanms\nstep:1/8 train_time:9ms step_avg:9ms\n"
          "step:4/8 val_loss:5.1 train_time:40ms step_avg:10ms\nstep:8/8 val_loss:4.2 train_time:80ms step_avg:10ms\n")


def write(path: Path, seed: int = 0, ms: int = 8000, loss: float = 4.25, end: int = 8, hardware: str = H200,
          stages: str = STAGES, source: str = "import torch\n") -> Path:
    """A log of ours: 8 scheduled steps on 14,000 tokens, stopped after `end`, with validations at 0, 4 and the end."""
    lines = [RULE, "source: train_gpt.py", RULE, source, RULE, "environment", RULE, "python:3.12.3 torch:2.11.0",
             f"hardware:{hardware}", "config preset=corpus", f"config seed={seed}", stages + f"seed:{seed}",
             "step:0/8 val_loss:10.8000 train_time:1ms step_avg:1.00ms"]
    for step in range(1, end + 1):
        time = f"train_time:{ms * step // 8}ms"
        lines.append(f"step:{step}/8 train_loss:{9 - step / 2:.4f} {time}")
        if step in (4, end):
            lines.append(f"step:{step}/8 val_loss:{loss + (end - step) / 4:.4f} {time} step_avg:1.00ms")
    lines.append(json.dumps({"val_loss": loss, "train_time_ms": ms * end // 8, "steps": end, "scheduled_steps": 8,
                             "tokens": 14000, "seed": seed, "processes": 1, "hardware": hardware}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A records folder: a record of three runs and one of another source, one stopped early, one on other hardware."""
    root = tmp_path / "records"
    for seed, ms in enumerate((8000, 8400, 8800)):
        write(root / f"corpus/2026-01-02_Two/b{seed}.txt", seed, ms, 4.2 + seed / 10)
    write(root / "corpus/2026-01-02_Two/other.txt", ms=9600, source="import math\n")
    write(root / "corpus/2026-01-01_One/a0.txt", ms=12000)
    write(root / "corpus/2026-01-01_One/short.txt", ms=12000, loss=5, end=4)
    write(root / "corpus/2026-01-03_Three/c0.txt", ms=32000, hardware=H100)
    monkeypatch.setattr(plot, "RECORDS", root)
    return root


def rungs(root: Path) -> None:
    write(root / "ladder/02_B/b.txt", ms=4000, loss=4)
    write(root / "ladder/01_A/a0.txt", ms=8000, loss=4.5)
    write(root / "ladder/01_A/a1.txt", 1, ms=8800, loss=4.7)
    for name in ("01_A", "02_B"):
        (root / "ladder" / name / "README.md").write_text("what changes\n")


def drawn(ax) -> list[tuple[list[float], list[float]]]:
    return [(list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))) for line in ax.lines]


def words(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def collisions(figure) -> list[tuple[str, str]]:
    """Pairs of visible texts whose boxes overlap, and texts that leave the picture."""
    figure.draw_without_rendering()
    unseen = {tick.label1 for ax in figure.axes for axis in (ax.xaxis, ax.yaxis) for tick in axis.get_major_ticks()
              if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())}
    boxes = [(text.get_text(), text.get_window_extent()) for text in figure.findobj(matplotlib.text.Text)
             if text.get_text() and text.get_visible() and text not in unseen]
    outside = [(name, "") for name, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > figure.bbox.x1
               or box.y1 > figure.bbox.y1]
    return outside + [(a, b) for (a, one), (b, two) in itertools.combinations(boxes, 2) if one.overlaps(two)]


def all_logs(root: Path) -> list:
    return [read_log(path) for folders in record_folders(root).values() for folder in folders
            for path in find_logs(folder)]


########################################
#                 Data                 #
########################################


def test_a_row_is_the_runs_of_one_thing_by_hardware_and_date(project):
    rows = plot.record_rows(all_logs(project))
    assert [(row.group, row.name, row.times, row.steps) for row in rows] == [
        ("corpus, 1xH100", "2026-01-03 Three", [32.0], "8"),
        ("corpus, 4xH200", "2026-01-01 One", [12.0], "8"),
        ("corpus, 4xH200", "2026-01-01 One, short", [6.0], "4 of 8"),
        ("corpus, 4xH200", "2026-01-02 Two", [8.0, 8.4, 8.8], "8"),
        ("corpus, 4xH200", "2026-01-02 Two, other", [9.6], "8")]
    assert [row.whole for row in rows] == [True, True, False, True, True] and rows[3].losses == [4.2, 4.3, 4.4]


def test_the_curves_are_those_of_the_fastest_whole_runs(project):
    assert [log.run_id for log in plot.fastest_logs()] == ["a0", "b0", "c0"]


def test_a_resumed_run_is_in_no_picture_of_records(project):
    rows = plot.record_rows(all_logs(project))
    path = write(project / "corpus/2026-01-01_One/resumed.txt", ms=800)
    path.write_text(path.read_text().replace('"processes"', '"resumed_at": 4, "processes"'))
    assert plot.record_rows(all_logs(project)) == rows
    assert [log.run_id for log in plot.fastest_logs()] == ["a0", "b0", "c0"]


def test_tokens_follow_the_stages(project, tmp_path):
    log = read_log(project / "corpus/2026-01-01_One/a0.txt")
    assert [plot.tokens_done(log, step) for step in (0, 1, 4, 5, 8)] == [0, 1000, 4000, 6500, 14000]
    assert math.isnan(plot.tokens_done(log, 9))
    assert plot.tokens_done(read_log(write(tmp_path / "log.txt", stages="stage 0: steps 0-7\n")), 4) == 7000
    (tmp_path / "modded.txt").write_text(MODDED)
    assert math.isnan(plot.tokens_done(read_log(tmp_path / "modded.txt"), 4))
    untold = write(tmp_path / "log.txt", stages="stage 0: steps 0-3\nstage 1: steps 4-7\n")
    assert math.isnan(plot.tokens_done(read_log(untold), 4))
    path = write(tmp_path / "log.txt", stages="config batch_tokens=1750\n")
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    assert plot.tokens_done(read_log(path), 4) == 7000  # unfinished


@pytest.mark.parametrize("log", [log for log in all_logs(ROOT / "records") if log.finished], ids=lambda log: log.run_id)
def test_the_stages_of_a_real_log_add_up_to_its_tokens(log):
    assert plot.tokens_done(log, log.result["steps"]) == log.tokens


def test_losses_of_the_ladder_are_read_at_equal_tokens(project):
    rungs(project)
    rows, at = plot.ladder_rows(plot.read_rungs())
    assert at == 14000 and [(row.name, row.losses, row.times) for row in rows] == [
        ("01 A", [4.5, 4.7], [1000, 1100]), ("02 B", [4], [500])]
    val = np.array([[1, 4000, 5.0], [2, 14000, 4.0], [3, math.nan, 1]])
    assert plot.loss_at(val, 9000) == 4.5
    assert math.isnan(plot.loss_at(val, 3000)) and math.isnan(plot.loss_at(val, 15000))


@pytest.mark.parametrize("values, ticks", [
    ([34, 219], [30, 50, 70, 100, 200, 300]), ([50], [30, 50, 70]), ([0.6, 1.1], [0.5, 0.7, 1, 2]),
    ([2, 80], [1, 3, 10, 30, 100]), ([2, 2000], [1, 10, 100, 1000, 10000])])
def test_ticks_are_round_and_enclose_the_values(values, ticks):
    assert plot.enclosing(plot.time_ticks(values), values) == ticks
    assert plot.enclosing(plot.LOSS_TICKS, [3.25, 7.4])[::8] == (3.2, 8)


########################################
#               Figures                #
########################################


def test_the_records_picture_has_means_ranges_and_columns(project):
    with plot.style():
        figure = plot.records_figure(plot.record_rows(all_logs(project)))
    (ax,), points = figure.axes, drawn(figure.axes[0])
    assert [x for x, _ in points] == [[32.0], [12.0], [6.0], [8.0, 8.8], pytest.approx([8.4]), [9.6]]
    assert [line.get_markerfacecolor() for line in ax.lines].count("white") == 1
    heights = [y[0] for _, y in points]
    assert heights == sorted(heights) and ax.yaxis_inverted() and ax.get_xscale() == "log"
    assert {"corpus, 1xH100", "corpus, 4xH200", "8.4", "4.3000", "3", "4 of 8", "2026-01-02 Two"} <= set(words(figure))
    assert not collisions(figure)


def test_the_curves_picture_has_every_step_line_of_the_log(project):
    log = read_log(project / "corpus/2026-01-01_One/a0.txt")
    with plot.style():
        figure = plot.curves_figure(plot.curves_of([log, read_log(project / "corpus/2026-01-02_Two/b1.txt")]))
    left, right = figure.axes
    train, val = [step for step in log.steps if step.kind == "train"], log.vals[1:]  # step 0 is not drawn
    for ax, tell in ((left, lambda step: step.time_ms / 1e3),
                     (right, lambda step: plot.tokens_done(log, step.step) / 1e6)):
        assert drawn(ax)[:2] == [([tell(step) for step in steps], [step.loss for step in steps])
                                 for steps in (train, val)]
    assert "2026-01-01 One, 4xH200: val 4.2500 in 12.0 s" in words(figure) and not collisions(figure)


def test_the_ladder_picture_has_both_panels(project):
    rungs(project)
    with plot.style():
        figure = plot.ladder_figure(*plot.ladder_rows(plot.read_rungs()))
    assert [x for x, _ in drawn(figure.axes[0])] == [[4.5, 4.7], pytest.approx([4.6]), [4]]
    assert [x for x, _ in drawn(figure.axes[1])] == [[1000, 1100], [1050], [500]]
    assert "val loss at 0.014 million tokens" in words(figure) and not collisions(figure)


def test_many_rows_with_long_names_do_not_collide():
    rows = [plot.Row(f"track, {i // 4}xH200", f"2026-01-01 A_name_that_is_long_{i}" + ", 01234567" * (i % 2),
                     [i + 1, 40.0 * i + 2], [3.28], "12,345 of 23,456") for i in range(24)]
    with plot.style():
        assert not collisions(plot.records_figure(rows))


def test_the_project_s_own_pictures_have_no_collisions():
    with plot.style():
        assert not collisions(plot.records_figure(plot.record_rows(all_logs(ROOT / "records"))))
        assert not collisions(plot.curves_figure(plot.curves_of(plot.fastest_logs())))


def test_a_run_without_a_validation_after_step_0_draws_no_marker_and_is_not_squeezed(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("step:0/8 val_loss:10.8 train_time:0ms\nstep:1/8 train_loss:9 train_time:9000ms\n"
                    "step:4/8 train_loss:7 train_time:40000ms\n")
    with plot.style():
        figure = plot.curves_figure(plot.curves_of([read_log(path)]))
    assert drawn(figure.axes[0]) == [([9, 40], [9, 7])] and not collisions(figure)


def test_names_are_drawn_as_they_stand():
    row = plot.Row("$a", "2026-01-01 $\\frac$", [1, 2], [3.28], "8")
    with plot.style():
        assert not collisions(plot.records_figure([row]))


def test_colours_are_told_apart_in_grey():
    def lightness(color: str) -> float:
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055)**2.4 for part in to_rgb(color)]
        return 116 * np.cbrt(np.dot((0.2126, 0.7152, 0.0722), linear)) - 16
    assert lightness("white") == pytest.approx(100) and plot.MIN_LIGHTNESS >= 12
    for one, other in itertools.combinations(map(lightness, (*plot.COLORS, "white")), 2):
        assert abs(one - other) >= plot.MIN_LIGHTNESS


def test_curves_differ_in_colour_marker_and_dashes(project):
    with plot.style():
        figure = plot.curves_figure(plot.curves_of([read_log(project / "corpus/2026-01-01_One/a0.txt")] * 8))
    lines = figure.axes[0].lines
    assert {line.get_color() for line in lines} == set(plot.COLORS)
    assert len({line.get_marker() for line in lines[1:8:2]}) == 4
    assert len({str(line._dash_pattern) for line in lines[:8:2]}) == 4
    assert len({(line.get_color(), str(line._dash_pattern)) for line in lines[::2]}) == 8
    assert len({(line.get_color(), line.get_marker()) for line in lines[1::2]}) == 8


########################################
#               Command                #
########################################


def test_the_same_logs_give_the_same_bytes(project, tmp_path, capsys):
    rungs(project)
    (tmp_path / "matplotlibrc").write_text("savefig.bbox: tight\nfont.size: 30\n")
    assert plot.plot(["--out", str(tmp_path / "one")]) == 0
    with matplotlib.rc_context(fname=tmp_path / "matplotlibrc"):
        assert plot.plot(["--out", str(tmp_path / "two")]) == 0
        assert matplotlib.rcParams["font.size"] == 30  # put back
    for name in ("records.png", "curves.png", "ladder.png"):
        data = (tmp_path / "one" / name).read_bytes()
        assert data == (tmp_path / "two" / name).read_bytes() and data.startswith(b"\x89PNG") and len(data) < 200_000
        assert int.from_bytes(data[16:20]) == 1400 and b"Software" not in data and b"tIME" not in data
    assert capsys.readouterr().out.count(".png\n") == 6


def test_one_picture_alone_and_logs_for_the_curves(project, tmp_path, capsys):
    (tmp_path / "modded.txt").write_text(MODDED)
    log = project / "corpus/2026-01-01_One/short.txt"
    assert plot.plot(["curves", str(log), str(tmp_path / "modded.txt"), "--out", str(tmp_path / "img")]) == 0
    assert [path.name for path in (tmp_path / "img").iterdir()] == ["curves.png"]
    name = tmp_path.name.replace("_", " ", 1)
    name = tmp_path.name.replace("_", " ", 1)
    assert capsys.readouterr().err == (f"curves: {name}, unknown: val 4.2000 in 0.1 s: the log does not tell tokens, "
                                       "so the panel of tokens is without it\n")


def test_a_log_of_llm_c_tells_neither_time_nor_tokens_and_is_in_no_panel(project, tmp_path, capsys):
    (tmp_path / "main.log").write_text("s:0 tel:11.0\ns:1 trl:10.9\ns:250 tel:6.1\n")
    assert plot.plot(["curves", str(tmp_path / "main.log"), "--out", str(tmp_path / "img")]) == 1
    error = capsys.readouterr().err
    assert "does not tell time" in error and "does not tell tokens" in error and "curves: nothing to draw" in error


def test_a_rung_s_log_of_others_is_in_the_picture_of_times_alone(project, tmp_path, capsys):
    rungs(project)
    (project / "ladder/02_B/theirs.txt").write_text(MODDED.replace("10.8 train_time:0ms step_avg:nanms", "10.8"))
    assert plot.plot(["ladder", "--out", str(tmp_path / "img")]) == 0
    assert "02 B: a log does not tell its loss at equal tokens" in capsys.readouterr().err
    assert (tmp_path / "img/ladder.png").is_file()


@pytest.mark.parametrize("column", ["val_loss:nan", "lr:0.1"])
def test_a_log_without_a_loss_is_said_to_have_none(project, tmp_path, capsys, column):
    path = tmp_path / "2026_nan" / "log.txt"
    path.parent.mkdir()
    path.write_text(f"step:0/8 val_loss:10.8 train_time:0ms\nstep:8/8 {column} train_time:9ms\n")
    assert plot.plot(["curves", str(path), "--out", str(tmp_path)]) == 1
    first, last = capsys.readouterr().err.splitlines()
    assert first.endswith("no loss after step 0 is finite, so it is not drawn") and last == "curves: nothing to draw"


@pytest.mark.skipif(matplotlib.__version__ != "3.11.2", reason="the project's pictures were made by matplotlib 3.11.2")
def test_the_project_s_pictures_are_what_its_logs_say(tmp_path, capsys):
    assert plot.plot(["--out", str(tmp_path)]) == 0
    for name in ("records.png", "curves.png", "ladder.png"):
        assert (tmp_path / name).read_bytes() == (ROOT / "img" / name).read_bytes(), "run `python -m records plot`"


def test_without_rungs_the_ladder_is_left_out(project, tmp_path, capsys):
    sentence = "ladder: no folder records/ladder/NN_name has the log of a whole run: nothing to draw\n"
    assert plot.plot(["--out", str(tmp_path / "all")]) == 0 and capsys.readouterr().err == sentence
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["curves.png", "records.png"]
    assert plot.plot(["ladder", "--out", str(tmp_path / "ladder")]) == 1 and capsys.readouterr().err == sentence
    assert not (tmp_path / "ladder").exists()


@pytest.mark.parametrize("argv, part", [
    (["--out"], "--out needs a folder"), (["--size", "3"], "--size is no option"),
    (["recrods"], "recrods is no log: did you mean records?"),
    (["none.txt"], "none.txt is no log: write `python -m records plot"),
    (["ladder", "LOG"], "ladder takes no log"), (["records", "LOG"], "records takes no log")])
def test_bad_arguments_give_one_sentence(project, capsys, argv, part):
    argv = [str(project / "corpus/2026-01-01_One/a0.txt") if word == "LOG" else word for word in argv]
    assert main(["plot", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {part}") and error.count("\n") == 1


def test_a_broken_log_gives_one_sentence_and_no_picture(project, tmp_path, capsys):
    with open(project / "corpus/2026-01-01_One/a0.txt", "a") as file:
        file.write("step:9/8 val_loss:4.0 train_time:9999ms\n")
    assert main(["plot", "--out", str(tmp_path / "img")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "a0.txt, line" in error
    assert not (tmp_path / "img").exists()


def test_without_matplotlib_one_sentence_names_the_remedy():
    script = "import sys; sys.modules['matplotlib'] = None; from records.__main__ import main; sys.exit(main(['plot']))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "requirements-dev.txt" in done.stderr and done.stderr.count("\n") == 1


def test_no_home_and_no_screen_are_needed(tmp_path):
    env = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "MPLCONFIGDIR")
           and not key.startswith("XDG_")}
    done = subprocess.run([sys.executable, "-m", "records", "plot", "records", "--out", str(tmp_path)], cwd=ROOT,
                          env={**env, "HOME": "/dev/null", "MPLBACKEND": "tkagg"}, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0 and (tmp_path / "records.png").stat().st_size > 10_000, done.stderr
