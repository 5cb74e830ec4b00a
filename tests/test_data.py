"""What holds for the data folder: the shard format, the downloader (against a fake Hub), and text made into shards."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

DATA = Path(__file__).resolve().parents[1] / "data"
sys.path.insert(0, str(DATA))

import fineweb  # noqa: E402
import gpt2_tokens  # noqa: E402
import local_text  # noqa: E402
import shards  # noqa: E402

PATTERN = "fineweb_%s_%06d.bin"
NAMES = ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]


def read_tokens(path):
    num_tokens = shards.check_shard(path)
    return np.fromfile(path, dtype="<u2", offset=shards.HEADER_BYTES, count=num_tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Format


def make_shard(path, num_tokens=100):
    shards.write_shard(path, np.arange(num_tokens) % shards.VOCAB_SIZE)
    return path


def test_a_written_shard_reads_back(tmp_path):
    tokens = np.array([50256, 0, 1, 50255, 50256], dtype=np.uint16)
    path = tmp_path / "new" / "a.bin"
    shards.write_shard(path, tokens)
    assert shards.read_header(path) == shards.check_shard(path) == 5
    assert np.array_equal(read_tokens(path), tokens)
    header = np.fromfile(path, dtype="<i4", count=256)
    assert header[:3].tolist() == [20240520, 1, 5] and not header[3:].any()
    assert os.path.getsize(path) == 1024 + 2 * 5


@pytest.mark.parametrize("tokens", [[50257], [-1], [65536], [0.5], [[1, 2]]])
def test_what_is_no_token_array_is_not_written(tmp_path, tokens):
    with pytest.raises(ValueError, match="tokens must be"):
        shards.write_shard(tmp_path / "a.bin", np.array(tokens))
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing_and_keeps_the_old_shard(tmp_path, monkeypatch):
    path = make_shard(tmp_path / "a.bin", 10)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.os, "replace", fail)
    with pytest.raises(OSError):
        make_shard(path, 20)
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"] and shards.check_shard(path) == 10


def patch_header(path, position, value):
    header = np.memmap(path, dtype="<i4", mode="r+", shape=256)
    header[position] = value
    header.flush()


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda path: patch_header(path, 0, 7), ["magic number 7", "20240520"]),
        (lambda path: patch_header(path, 1, 2), ["version 2", "version 1"]),
        (lambda path: patch_header(path, 2, 101), ["truncated", "1224 bytes", "101 tokens"]),
        (lambda path: patch_header(path, 2, 99), ["too long", "1224 bytes", "99 tokens"]),
        (lambda path: os.truncate(path, 1223), ["truncated", "1223 bytes", "100 tokens"]),
        (lambda path: os.truncate(path, 8), ["8 bytes", "1024-byte header"]),
        (lambda path: os.truncate(path, 0), ["0 bytes", "1024-byte header"]),
    ],
)
def test_a_broken_shard_is_named_with_value_and_remedy(tmp_path, damage, words):
    path = make_shard(tmp_path / "a.bin")
    damage(path)
    with pytest.raises(shards.ShardError) as info:
        shards.check_shard(path)
    message = str(info.value)
    assert isinstance(info.value, ValueError) and "\n" not in message
    for word in [str(path), "delete it, then download or make it again", *words]:
        assert word in message


def test_shard_writer_cuts_documents_without_losing_a_token(tmp_path):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 50256, size) for size in [3, 0, 25, 10, 9, 1, 40]]
    with shards.ShardWriter(tmp_path, PATTERN, 10) as writer:
        for document in documents:
            writer.add(document.tolist())
    pieces = [read_tokens(path) for path in writer.paths]
    assert [path.name for path in writer.paths[:3]] == NAMES
    assert all(piece.size == 10 for piece in pieces[:-1]) and 0 < pieces[-1].size <= 10
    expected = np.concatenate([np.append(50256, document) for document in documents])
    assert np.array_equal(np.concatenate(pieces), expected)


def test_shard_writer_writes_no_empty_last_shard(tmp_path):
    with shards.ShardWriter(tmp_path, PATTERN, 5, first_index=1) as writer:
        writer.add([1, 2, 3, 4])
    assert [path.name for path in tmp_path.iterdir()] == [NAMES[1]]


def test_shard_writer_drops_the_unfinished_shard_of_a_failed_run(tmp_path):
    with pytest.raises(KeyError), shards.ShardWriter(tmp_path, PATTERN, 5) as writer:
        writer.add([1, 2, 3, 4, 5, 6])
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == [NAMES[0]]


def test_shard_writer_refuses_ids_that_would_wrap_around(tmp_path):
    with pytest.raises(ValueError, match="65537"), shards.ShardWriter(tmp_path, PATTERN, 5) as writer:
        writer.add([65537])


# ---------------------------------------------------------------------------------------------------------------------
# Download


class HTTPError(OSError):
    def __init__(self, status_code):
        super().__init__(f"server says {status_code}")
        self.response = SimpleNamespace(status_code=status_code)


class OfflineModeIsEnabled(ConnectionError):
    """Carries the name of the Hub's own error."""


class FakeHub:
    """Serves shards of 100 tokens; before each of them it does the next of `faults`: raises it, or calls it."""

    def __init__(self, tmp_path):
        self.original = make_shard(tmp_path / "original.bin").read_bytes()
        self.faults, self.calls = [], []

    def hf_hub_download(self, repo_id, filename, repo_type, local_dir):
        assert (repo_id, repo_type) == ("some/repo", "dataset")
        self.calls.append(filename)
        arrived = Path(local_dir) / filename
        arrived.parent.mkdir(parents=True, exist_ok=True)
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, BaseException):
            arrived.with_suffix(".incomplete").write_bytes(self.original[:50])
            raise fault
        arrived.write_bytes(self.original[:fault])
        return str(arrived)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path)
    fake.folder = tmp_path / "data"
    fake.pauses = []
    fake.download = lambda chunks=2: shards.download("some/repo", fake.folder, PATTERN, chunks, 103)
    fake.present = lambda: sorted(path.name for path in fake.folder.glob("*.bin"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    monkeypatch.setattr(shards.time, "sleep", fake.pauses.append)
    return fake


def test_download_brings_validation_and_training_shards_once(hub):
    hub.download(chunks=2)
    assert hub.present() == sorted(NAMES) and hub.calls == NAMES
    hub.download(chunks=2)
    assert hub.calls == NAMES
    hub.download(chunks=3)
    assert hub.calls == [*NAMES, "fineweb_train_000003.bin"]


def test_killed_download_leaves_no_bad_shard_and_goes_on_where_it_stopped(hub):
    hub.faults = [None, KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        hub.download()
    assert hub.present() == NAMES[:1]
    assert (hub.folder / ".download" / "fineweb_train_000001.incomplete").exists()  # the Hub's own, for it to resume
    hub.download()
    assert hub.present() == sorted(NAMES) and hub.calls == [*NAMES[:2], *NAMES[1:]]


def test_broken_shard_is_fetched_again_and_said_so(hub, capsys):
    hub.download()
    os.truncate(hub.folder / NAMES[1], 1100)
    hub.calls.clear()
    hub.download()
    assert hub.calls == [NAMES[1]] and shards.check_shard(hub.folder / NAMES[1]) == 100
    assert f"fetching {NAMES[1]} again" in capsys.readouterr().err


@pytest.mark.parametrize("fault", [HTTPError(429), HTTPError(500), HTTPError(503), ConnectionResetError("reset"), 1100])
def test_passing_failure_is_tried_again_with_doubling_pauses(hub, capsys, fault):
    hub.faults = [fault] * 3
    hub.download(chunks=1)
    assert hub.present() == sorted(NAMES[:2]) and hub.pauses == [2, 4, 8]
    assert "trying again in 2 s (try 2 of 5)" in capsys.readouterr().err


@pytest.mark.parametrize("fault", [HTTPError(503), 1100])
def test_lasting_failure_ends_after_five_tries(hub, fault):
    hub.faults = [fault] * 9
    with pytest.raises(shards.DataError, match="5 tries failed"):
        hub.download()
    assert len(hub.calls) == 5 and hub.present() == []


@pytest.mark.parametrize("status", [401, 403, 404])
def test_refusal_is_not_tried_again(hub, status):
    hub.faults = [HTTPError(status)] * 9
    with pytest.raises(shards.DataError, match=f"{NAMES[0]} from some/repo: HTTP {status}"):
        hub.download()
    assert len(hub.calls) == 1


def no_address():
    error = FileNotFoundError("cannot locate the file on the Hub")
    error.__cause__ = shards.socket.gaierror(-2, "Name or service not known")
    return error


@pytest.mark.parametrize("fault", [OfflineModeIsEnabled("offline"), no_address()])
def test_offline_says_what_is_missing_and_what_to_do(hub, fault):
    hub.faults = [None, fault]
    with pytest.raises(shards.DataError) as info:
        hub.download()
    for words in ["2 of 3 shards are missing", str(hub.folder), NAMES[1], "connect and run this again"]:
        assert words in str(info.value)
    assert len(hub.calls) == 2 and info.value.exit_code == 1


def test_offline_is_no_failure_when_all_shards_are_there(hub):
    hub.download()
    hub.faults = [OfflineModeIsEnabled("offline")]
    hub.download()


def test_full_disk_is_one_sentence(hub):
    hub.faults = [OSError(28, "No space left on device")]
    with pytest.raises(shards.DataError, match="the disk is full.*free some space"):
        hub.download()
    assert len(hub.calls) == 1


@pytest.mark.parametrize("chunks", [-1, 0, 104])
def test_number_of_shards_out_of_range_names_the_range(hub, chunks):
    with pytest.raises(shards.DataError, match=f"was {chunks}: .* from 1 to 103") as info:
        hub.download(chunks)
    assert info.value.exit_code == 2 and hub.calls == []


def test_missing_package_is_named_with_its_remedy(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(shards.DataError, match="pip install huggingface_hub tqdm"):
        hub.download()


@pytest.mark.parametrize("failure, code", [(shards.DataError("bad", 2), 2), (shards.ShardError("bad"), 1),
                                           (KeyboardInterrupt(), 130), (OSError(28, "full"), 1),
                                           (PermissionError(13, "bad", "x"), 1)])  # fmt: skip
def test_run_ends_with_one_error_line(capsys, failure, code):
    def main():
        raise failure

    with pytest.raises(SystemExit) as info:
        shards.run(main)
    err = capsys.readouterr().err
    assert info.value.code == code and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("script, most", [("fineweb10B", 103), ("fineweb100B", 1030), ("finewebedu10B", 99)])
def test_each_downloader_script_knows_its_range(script, most):
    command = [sys.executable, str(DATA / f"cached_{script}.py"), str(most + 1)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and f"from 1 to {most}" in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_downloader_script_offline_with_the_real_hub_package(tmp_path):
    pytest.importorskip("huggingface_hub")
    for name in ["shards.py", "cached_fineweb10B.py"]:
        (tmp_path / name).write_bytes((DATA / name).read_bytes())
    command = [sys.executable, str(tmp_path / "cached_fineweb10B.py")]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd="/", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last_line = done.stderr.splitlines()[-1]
    assert last_line.startswith("error: 10 of 10 shards are missing") and "HF_HUB_OFFLINE" in last_line


# ---------------------------------------------------------------------------------------------------------------------
# Local text


def test_byte_tokens_are_those_of_gpt2():
    ids = local_text.byte_token_ids()
    assert sorted(ids.tolist()) == list(range(256))
    known = {"!": 0, "~": 93, "\xa1": 94, "\xac": 105, "\xae": 106, "\xff": 187, "\0": 188, "\n": 198, " ": 220}
    known |= {"\x7f": 221, "\xa0": 254, "\xad": 255, "A": 32}
    assert {char: int(ids[ord(char)]) for char in known} == known


def decode(path):
    """The documents of a shard that begins with a document."""
    to_byte = np.argsort(local_text.byte_token_ids()).astype(np.uint8)
    tokens = read_tokens(path)
    assert tokens[0] == 50256
    ends = np.flatnonzero(tokens == 50256)
    return [to_byte[tokens[a + 1 : b]].tobytes().decode() for a, b in zip(ends, [*ends[1:], len(tokens)], strict=True)]


@pytest.fixture(scope="module")
def default_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    local_text.main(["--out", str(folder)])
    return folder


def test_default_text_gives_validation_and_at_least_two_training_shards(default_shards):
    names = sorted(path.name for path in default_shards.iterdir())
    assert names[-1] == "local_val_000000.bin" and names[:2] == ["local_train_000001.bin", "local_train_000002.bin"]
    assert shards.check_shard(default_shards / names[-1]) >= 140_000
    assert read_tokens(default_shards / names[0])[0] == 50256


def test_default_text_is_the_same_each_time(default_shards, tmp_path):
    local_text.main(["--out", str(tmp_path)])
    for path in default_shards.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_default_validation_text_is_whole_documents(default_shards):
    documents = {piece for text in local_text.python_documents() for piece in local_text.paragraphs(text)}
    assert all(text in documents for text in decode(default_shards / "local_val_000000.bin"))


def test_python_without_its_documentation_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    monkeypatch.setattr(local_text.sysconfig, "get_path", lambda _: str(tmp_path / "none"))
    with pytest.raises(shards.DataError, match="found only 0 tokens of text, at least 10000"):
        local_text.main(["--out", str(tmp_path)])


def write_texts(folder):
    folder.mkdir()
    texts = [f"Text number {i}: naïve \N{SNOWMAN}.\n" * 200 for i in range(12)]
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text, encoding="utf-8")
    (folder / "picture.png").write_bytes(b"\x89PNG\0")
    (folder / ".hidden").write_text("hidden")
    return texts


def test_own_texts_decode_back(tmp_path):
    texts = write_texts(tmp_path / "texts")
    local_text.main([str(tmp_path / "texts"), "--out", str(tmp_path / "out"), "--shard-tokens", "1000000", "--pieces",
                     "0"])
    val, train = (decode(tmp_path / "out" / name) for name in ["local_val_000000.bin", "local_train_000001.bin"])
    assert val and train and sorted(val + train) == sorted(texts)


def test_single_text_is_cut_in_two(tmp_path):
    text = "".join(f"{i} " for i in range(10_000))
    (tmp_path / "a.txt").write_text(text)
    local_text.main([str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--shard-tokens", "1000000", "--pieces",
                     "0"])
    val, train = (decode(tmp_path / "out" / name) for name in ["local_val_000000.bin", "local_train_000001.bin"])
    assert val[0] + train[0] == text


def test_pieces_keep_paragraphs_whole_where_they_fit_and_lose_nothing():
    text = "\n\n".join(["a" * 100, "b" * 350, "c" * 200, "d" * 1500, "e"])
    pieces = local_text.paragraphs(text, 600)
    assert pieces == ["a" * 100 + "\n\n" + "b" * 350, "c" * 200, "d" * 600, "d" * 600, "d" * 300 + "\n\ne"]


def test_own_texts_need_a_folder_of_their_own(tmp_path):
    write_texts(tmp_path / "texts")
    with pytest.raises(shards.DataError, match="--out"):
        local_text.main([str(tmp_path / "texts")])


def test_existing_shards_are_kept_broken_or_forced_ones_made_again(tmp_path, capsys):
    write_texts(tmp_path / "texts")
    out = tmp_path / "out"
    arguments = [str(tmp_path / "texts"), "--out", str(out), "--shard-tokens", "20000"]
    local_text.main(arguments)
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert len(before) > 2 and "wrote" in capsys.readouterr().out
    local_text.main(arguments)
    assert "nothing to do" in capsys.readouterr().out
    os.truncate(out / "local_train_000001.bin", 2000)
    local_text.main(arguments)
    assert "again" in capsys.readouterr().out and {path: path.read_bytes() for path in out.iterdir()} == before
    (out / "local_val_000000.bin").unlink()  # as when the first run was killed before its end
    local_text.main(arguments)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    local_text.main([*arguments[:-1], "1000000", "--force"])
    assert len(list(out.iterdir())) == 2


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["missing.txt"], "there is no file or folder missing.txt"),
        (["--val-fraction", "2"], "--val-fraction was 2.0"),
        (["--shard-tokens", "0"], "--shard-tokens was 0"),
    ],
)
def test_bad_arguments_are_one_sentence(tmp_path, arguments, words):
    with pytest.raises(shards.DataError, match=words):
        local_text.main(["--out", str(tmp_path), *arguments])


def test_vocab_without_tiktoken_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(shards.DataError, match="pip install tiktoken"):
        local_text.main([str(DATA / "shards.py"), "--out", str(tmp_path), "--vocab", "ranks"])


@pytest.mark.parametrize("content, words", [("IQ== 0\n", "has 1 ranks"), ("not ranks at all", "is no ranks file")])
def test_file_that_is_no_gpt2_vocabulary_is_named(tmp_path, monkeypatch, content, words):
    monkeypatch.setitem(sys.modules, "tiktoken", SimpleNamespace())
    (tmp_path / "ranks").write_text(content)
    with pytest.raises(shards.DataError, match=words):
        shards.gpt2_bpe(tmp_path / "ranks")


# ---------------------------------------------------------------------------------------------------------------------
# Raw text through fineweb.py, with single-byte tokens in the place of the BPE


class ByteEncoding:
    def encode_ordinary(self, text):
        return local_text.byte_token_ids()[np.frombuffer(text.encode(), dtype=np.uint8)].tolist()


@pytest.fixture
def byte_encoding(monkeypatch):
    monkeypatch.setattr(fineweb, "gpt2_bpe", lambda vocab: ByteEncoding())
    # Worker processes see the replaced encoding only where they are forked.
    context = fineweb.multiprocessing.get_context("fork")
    monkeypatch.setattr(fineweb, "multiprocessing", SimpleNamespace(Pool=context.Pool))


def test_fineweb_shards_hold_the_documents_in_order(tmp_path, byte_encoding):
    texts = [f"document {i}\n" * (i + 1) for i in range(40)]
    (tmp_path / "a.txt").write_text(texts[0])
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts[1:]) + "\n\n")
    out = tmp_path / "out"
    fineweb.main(["--files", str(tmp_path / "*.txt"), str(tmp_path / "*.jsonl"), "-o", str(out), "-s", "1000"])
    paths = [out / shards.shard_name(fineweb.NAME_PATTERN, i) for i in range(len(list(out.iterdir())))]
    assert all(shards.check_shard(path) == 1000 for path in paths[:-1])
    shards.write_shard(tmp_path / "joined.bin", np.concatenate([read_tokens(path) for path in paths]))
    assert decode(tmp_path / "joined.bin") == texts
    with pytest.raises(shards.DataError, match="holds shards already"):
        fineweb.main(["--files", str(tmp_path / "a.txt"), "-o", str(out)])


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.txt", b"too short", "leaves none for training"),
        ("a.txt", b"\xff\xfe", "is not UTF-8 text"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": 1}\n', 'line 2: expected a JSON object with a "text" field'),
        ("a.jsonl", b"no json\n", "line 1: expected"),
        ("a.pdf", b"", "--files takes .txt, .jsonl, .parquet files"),
        ("b", b"", "no file matches"),
    ],
)
def test_fineweb_input_errors_are_one_sentence(tmp_path, byte_encoding, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(shards.DataError, match=words):
        fineweb.main(["--files", str(tmp_path / "a*"), "-o", str(tmp_path / "out"), "-s", "1000"])


def test_fineweb_dataset_comes_through_datasets(tmp_path, byte_encoding, monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return [{"text": "word " * 100}] * 5

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    fineweb.main(["--dataset", "10B", "-o", str(tmp_path / "out"), "-s", "1000"])
    assert asked == [(("HuggingFaceFW/fineweb",), {"name": "sample-10BT", "split": "train"})]
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_fineweb_without_datasets_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(shards.DataError, match="pip install datasets tiktoken"):
        fineweb.main(["--dataset", "10B", "-o", str(tmp_path)])


########################################
#            Tables of tokens          #
########################################


def test_a_tokens_prefix_is_the_longest_that_is_a_token_itself():
    tokens = [b"a", b"b", b"ab", b"abcd", b"abc", b" ", b" abx"]
    prefix, _ = gpt2_tokens.token_tables(tokens)
    assert prefix.tolist() == [-1, -1, 0, 4, 2, -1, 5, -1] and prefix.dtype == np.int32


def test_tokens_of_one_text_but_for_case_accents_form_and_outer_space_are_one_kind():
    texts = ["e", "E", " e", " \u00e9", "\uff25", "ee", "e e", "\u00a0e", " ", "\n", "\n\n"]
    tokens = [*(text.encode() for text in texts), b"\xc3", b" \xc3"]
    _, kind = gpt2_tokens.token_tables(tokens)
    assert kind.tolist() == [0, 0, 0, 0, 0, 5, 6, 0, 8, 9, 10, 11, 12, 13]


def test_the_tables_in_the_repository_are_of_gpt2s_tokens():
    with np.load(DATA / "gpt2_tokens.npz") as tables:
        prefix, kind = tables["prefix"], tables["kind"]
    ids = np.arange(shards.VOCAB_SIZE)
    assert prefix.shape == kind.shape == ids.shape and prefix.dtype == kind.dtype == np.int32
    single = np.flatnonzero(prefix < 0)  # every merged token has a prefix, a single byte and the end of text have none
    assert sorted(single) == [*range(256), shards.END_OF_TEXT]
    assert (kind <= ids).all() and (kind[kind] == kind).all() and len(np.unique(kind)) == 32_985
    letters = local_text.byte_token_ids()
    assert kind[letters[ord("A")]] == kind[letters[ord("a")]] and kind[262] == kind[1169]  # " the" and "the"
    assert prefix[262] == 294 and prefix[294] == 256 and prefix[256] == letters[ord(" ")]  # " the", " th", " t", " "


def test_the_tables_can_be_made_again(monkeypatch, tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 256, b"AB": 257}
    bpe = tiktoken.Encoding("tiny", pat_str=".+", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(gpt2_tokens, "gpt2_bpe", lambda vocab: bpe)
    monkeypatch.setattr(gpt2_tokens, "END_OF_TEXT", len(ranks))
    gpt2_tokens.main(["--out", str(tmp_path / "made.npz")])
    with np.load(tmp_path / "made.npz") as tables:
        assert tables["prefix"][256:].tolist() == [97, 65, -1] and tables["kind"][256:].tolist() == [256, 256, 258]
