"""./run.sh test shares the tests out to several workers where pytest-xdist is, and what the user gives wins."""
import os
import subprocess
from types import SimpleNamespace

import pytest
import torch
from conftest import LONG, ROOT, cores, pytest_collection_modifyitems, pytest_xdist_auto_num_workers

# A Python that has everything, but for xdist where the environment says so, and prints how pytest was called.
FAKE = """#!/bin/sh
case "$*" in
    *"import xdist"*) exit $XDIST_MISSING ;;
    *pytest*) echo "$*" ;;
esac
"""


@pytest.mark.parametrize("missing, given, called", [
    (0, ["-x", "-k", "data"], "-m pytest -o testpaths=tests -n auto -x -k data"),
    (0, ["-n", "0", "tests/test_log.py"], "-m pytest -o testpaths=tests -n auto -n 0 tests/test_log.py"),
    (1, ["-x"], "-m pytest -o testpaths=tests -x"),
])
def test_run_sh_gives_workers_where_xdist_is_and_the_user_s_arguments_last(tmp_path, missing, given, called):
    (tmp_path / "python").write_text(FAKE)
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run(["./run.sh", "test", *given], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "XDIST_MISSING": str(missing)})
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == called, done
    assert done.stderr.count("\n") == missing == done.stderr.count("pytest-xdist is not installed here")


@pytest.mark.parametrize("files, capture, several", [
    ([], "fd", True), (["tests/kernels"], "fd", True), (["tests/test_log.py", "tests/kernels"], "fd", True),
    (["tests/test_log.py"], "fd", False), (["tests/test_log.py::test_x", "tests/test_use.py"], "fd", False),
    ([], "no", False),
])
def test_single_files_and_shown_output_need_no_workers(files, capture, several):
    config = SimpleNamespace(option=SimpleNamespace(file_or_dir=files, capture=capture))
    workers = pytest_xdist_auto_num_workers(config)
    assert workers == 0 or several and 2 <= workers <= min(cores(), 8)
    assert workers or not several or cores() == 1 or torch.cuda.is_available()
    assert torch.cuda.is_available() or workers <= 4


def test_long_files_begin_first_in_a_worker_and_are_there():
    assert not set(LONG) - {path.name for path in (ROOT / "tests").glob("test_*.py")}
    names = ["test_data.py", LONG[1], "test_style.py", LONG[0]]
    items = [SimpleNamespace(path=ROOT / "tests" / name, keywords=()) for name in names]
    option = SimpleNamespace(markexpr="")
    pytest_collection_modifyitems(SimpleNamespace(option=option), items)
    assert [item.path.name for item in items] == names
    pytest_collection_modifyitems(SimpleNamespace(option=option, workerinput={}), items)
    assert [item.path.name for item in items] == [LONG[0], LONG[1], "test_data.py", "test_style.py"]
