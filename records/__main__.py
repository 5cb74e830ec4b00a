"""python -m records COMMAND: one tool a command, each in the module that COMMANDS names."""
import difflib
import importlib
import importlib.util
import os
import sys

from records.logs import LogError

COMMANDS = {"table": "records.table", "stats": "records.stats", "diff": "records.compare",
            "extract": "records.compare", "plot": "records.plot", "race": "records.race",
            "check": "records.check"}
USAGE = """usage: python -m records COMMAND ARGUMENTS, from the project's folder
  table [--check]                       write the leaderboards of records/README.md and README.md from the logs
  stats LOG... [--target 3.28] [-- LOG...]   mean, deviation and p of a set of runs; a second set is compared with it
  diff LOG LOG                          what two logs differ in: settings, result, sources by function
  extract LOG DIR                       a log's sources, and the command that runs them again
  plot [records|curves|ladder] [LOG...] [--out img]   times of records; loss over time and tokens; the ladder
  race A B -n N [key=value ...]         run the scripts of two folders in turn, A B A B: paired differences
  check                                 say what is amiss in the record folders"""


def fail(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 2


def main(argv: list[str]) -> int:
    """Runs a command and returns its exit code: 2 after one sentence where input or arguments are bad."""
    if sys.stdout is None:
        return fail("the output is closed: give one, or >/dev/null")
    if not argv or argv[0] in ("help", "-h", "--help"):
        print(USAGE)
        return 0
    name, *arguments = argv
    sys.stdout.reconfigure(errors="backslashreplace")  # a source may have bytes that are no text
    if name not in COMMANDS:
        near, = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)
        return fail(f"unknown command {name!r}: did you mean {near}? There are {', '.join(COMMANDS)}")
    if importlib.util.find_spec(COMMANDS[name]) is None:
        return fail(f"the command {name} is not there: {COMMANDS[name].replace('.', '/')}.py is missing")
    try:
        code = getattr(importlib.import_module(COMMANDS[name]), name)(arguments)
        sys.stdout.flush()
        return code
    except LogError as error:
        return fail(str(error))
    except ModuleNotFoundError as error:
        return fail(f"{error.name} is not installed: python -m pip install -r requirements-dev.txt brings it")
    except OSError as error:
        if error.filename is None:  # of the output; what is still buffered must not fail again at the exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # `| head` has seen enough
            return 0
        return fail(f"cannot use {error.filename or 'the output'}: {error.strerror}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
