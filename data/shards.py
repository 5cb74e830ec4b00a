"""Token shards: their format, a writer that cuts documents into them, and their download from the Hugging Face Hub.

A shard is a header of 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros), followed by that
many little-endian uint16 GPT-2 tokens. The end-of-text token 50256 stands before each document. In a folder of shards,
shard 0 is for validation and shards 1, 2, ... are for training.
"""

import argparse
import base64
import errno
import importlib
import os
import socket
import sys
import time
from pathlib import Path

import numpy as np

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
END_OF_TEXT = 50256
VOCAB_SIZE = 50257
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


class DataError(Exception):
    """A failure the user can act on: its text is one sentence with the value found and the remedy."""

    def __init__(self, message, exit_code=1):
        super().__init__(message)
        self.exit_code = exit_code


class ShardError(DataError, ValueError):
    """A file that is not a whole shard of the expected format."""


def run(main):
    """Call main() as a script: a failure the user can act on becomes one `error:` line on stderr and an exit status."""
    try:
        main()
        return
    except DataError as exc:
        message, exit_code = str(exc), exc.exit_code
    except KeyboardInterrupt:
        message, exit_code = "interrupted; the shards finished so far are kept", 130
    except OSError as exc:
        message, exit_code = _disk_full_message(exc) or f"{exc}; check the path and its permissions", 1
    print(f"error: {message}", file=sys.stderr)
    sys.exit(exit_code)


def need(module, install=None):
    """Import and return an optional module; DataError says what to install where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        raise DataError(f"cannot import {module} ({exc}): run `pip install {install or module}`") from exc


# ---------------------------------------------------------------------------------------------------------------------
# Reading and writing


def read_header(path):
    """Return the number of tokens that the shard's header states.

    Raises ShardError where the header is cut short or has the wrong magic number or version, and FileNotFoundError.
    """
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(HEADER_BYTES), dtype=np.uint8)
    remedy = "delete it, then download or make it again"
    if header.nbytes < HEADER_BYTES:
        raise ShardError(f"{path} has {header.nbytes} bytes, fewer than a shard's {HEADER_BYTES}-byte header: {remedy}")
    magic, version, num_tokens = (int(value) for value in header.view("<i4")[:3])
    if magic != MAGIC:
        raise ShardError(f"{path} starts with magic number {magic}, a token shard with {MAGIC}: {remedy}")
    if version != VERSION:
        raise ShardError(f"{path} has shard version {version}, only version {VERSION} can be read: {remedy}")
    return num_tokens


def check_shard(path):
    """Return the number of tokens of a whole shard; raises as read_header, and ShardError for a wrong file size."""
    num_tokens = read_header(path)
    size, expected = os.path.getsize(path), HEADER_BYTES + 2 * num_tokens
    if size != expected:
        state = "truncated" if size < expected else "too long"
        raise ShardError(
            f"{path} is {state}: it has {size} bytes where its header states {num_tokens} tokens, "
            f"that is {expected} bytes: delete it, then download or make it again"
        )
    return num_tokens


def write_shard(path, tokens):
    """Write tokens, a 1-d array of GPT-2 ids (0..50256, any integer dtype), as the shard `path`.

    The file appears under its final name only when it is whole. Raises ValueError for tokens out of range.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(f"tokens must be a 1-d integer array, got {tokens.dtype} of shape {tokens.shape}")
    _check_ids(tokens)
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(header.data)
            file.write(np.ascontiguousarray(tokens, dtype="<u2").data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _check_ids(tokens):
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < VOCAB_SIZE:
        raise ValueError(f"tokens must be in 0..{VOCAB_SIZE - 1}, got {tokens.min()}..{tokens.max()}")


def shard_name(name_pattern, index):
    """Return the name of shard `index`, for a pattern such as "fineweb_%s_%06d.bin"; shard 0 is the validation one."""
    return name_pattern % ("val" if index == 0 else "train", index)


class ShardWriter:
    """Context manager that cuts a stream of documents into shards of shard_tokens tokens each.

    Each document gets an end-of-text token before it, and goes on in the next shard where one is full. Only the last
    shard may be smaller; it is written when the block ends without an exception. With first_index=0 the first shard is
    the validation one, with first_index=1 all are for training. `paths` lists the shards written.
    """

    def __init__(self, folder, name_pattern, shard_tokens, first_index=0):
        if shard_tokens < 1:
            raise DataError(f"a shard cannot have {shard_tokens} tokens: give a shard size of at least 1", exit_code=2)
        self.folder, self.name_pattern = Path(folder), name_pattern
        self.index = first_index
        self.paths = []
        self.buffer = np.empty(shard_tokens, dtype=np.uint16)
        self.filled = 0

    def add(self, document):
        """Append one document: its GPT-2 ids as a list or 1-d integer array, without the end-of-text token."""
        tokens = np.concatenate(([END_OF_TEXT], np.asarray(document, dtype=np.int64)))
        _check_ids(tokens)
        while tokens.size:
            taken = min(tokens.size, self.buffer.size - self.filled)
            self.buffer[self.filled : self.filled + taken] = tokens[:taken]
            self.filled += taken
            tokens = tokens[taken:]
            if self.filled == self.buffer.size:
                self._flush()

    def _flush(self):
        path = self.folder / shard_name(self.name_pattern, self.index)
        write_shard(path, self.buffer[: self.filled])
        self.paths.append(path)
        self.index += 1
        self.filled = 0

    def __enter__(self):
        return self

    def __exit__(self, exc_type, exc, traceback):
        if exc_type is None and self.filled:
            self._flush()


def gpt2_bpe(vocab=None):
    """Return tiktoken's GPT-2 encoding, built from the ranks file `vocab` ("base64 rank" lines) where one is given."""
    tiktoken = need("tiktoken")
    if vocab is None:
        try:
            return tiktoken.get_encoding("gpt2")
        except OSError as exc:  # tiktoken fetches the vocabulary through requests, whose errors are OSErrors
            raise DataError(
                f"tiktoken cannot fetch the GPT-2 vocabulary ({type(exc).__name__}): "
                "connect to the network or give a ranks file: --vocab, or vocab= of sample.py and evaluate.py"
            ) from exc
    try:
        pairs = (line.split() for line in Path(vocab).read_bytes().splitlines() if line)
        ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    except ValueError as exc:
        raise DataError(f"{vocab} is no ranks file ({exc}): each line must be `base64-of-token rank`") from exc
    if sorted(ranks.values()) != list(range(END_OF_TEXT)):
        raise DataError(f"{vocab} has {len(ranks)} ranks: a GPT-2 ranks file has {END_OF_TEXT}, from 0 without a gap")
    special = {"<|endoftext|>": END_OF_TEXT}
    return tiktoken.Encoding("gpt2", pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens=special)


# ---------------------------------------------------------------------------------------------------------------------
# Download


def download_command(repo, folder, name_pattern, default_chunks, max_chunks):
    """The whole of a downloader script: parse the optional number of training chunks and download them."""
    parser = argparse.ArgumentParser(description=f"Download the validation shard and N training shards of {repo}.")
    parser.add_argument(
        "chunks",
        metavar="N",
        nargs="?",
        type=int,
        default=default_chunks,
        help=f"training shards of 100M tokens (200 MB) each, 1 to {max_chunks} (default {default_chunks})",
    )
    run(lambda: download(repo, folder, name_pattern, parser.parse_args().chunks, max_chunks))


def download(repo, folder, name_pattern, chunks, max_chunks, tries=5):
    """Bring the validation shard and training shards 1..chunks of a Hub dataset repository into `folder`.

    Whole shards that are there already are kept, broken ones are fetched again. A shard arrives in `folder`/.download
    and moves to its final name once it has passed check_shard, so that a killed download can be started again.
    Raises DataError: chunks out of range, no network, disk full, refused by the Hub, or still failing after `tries`.
    """
    if not 1 <= chunks <= max_chunks:
        message = f"the number of training shards was {chunks}: {repo} has {max_chunks}, give a number from 1 to "
        raise DataError(message + str(max_chunks), exit_code=2)
    folder = Path(folder)
    names = [shard_name(name_pattern, index) for index in range(chunks + 1)]
    missing = [name for name in names if not _is_whole(folder / name)]
    if not missing:
        print(f"all {len(names)} shards are already in {folder}")
        return
    bar = need("tqdm").tqdm(total=len(names), initial=len(names) - len(missing), unit="shard", desc=folder.name)
    with bar:
        for done, name in enumerate(missing):
            try:
                _fetch(repo, folder, name, tries)
            except _Offline as exc:
                raise DataError(
                    f"{len(missing) - done} of {len(names)} shards are missing from {folder}, the first is {name}, and "
                    f"{exc}; connect and run this again, or make shards from local text with data/local_text.py"
                ) from exc
            bar.update()


class _Offline(Exception):
    """The Hub cannot be reached at all, and waiting a few seconds would not change that."""


def _say(message):
    need("tqdm").tqdm.write(message, file=sys.stderr)  # print would write into the progress bar's line


def _is_whole(path):
    """Whether `path` is a whole shard; a broken one is removed, so that no trainer can pick it up."""
    try:
        check_shard(path)
    except FileNotFoundError:
        return False
    except ShardError as exc:
        _say(f"{exc} (removed, fetching {path.name} again)")
        path.unlink()
        return False
    return True


def _fetch(repo, folder, name, tries):
    """Download one shard, trying again with doubling pauses where the failure may pass."""
    hub = need("huggingface_hub", "huggingface_hub tqdm")
    for attempt in range(1, tries + 1):
        try:
            # A subfolder is on the file system of the final place, so that the move at the end is atomic.
            arrived = hub.hf_hub_download(
                repo_id=repo, filename=name, repo_type="dataset", local_dir=folder / ".download"
            )
            _accept(Path(arrived), folder / name)
            return
        except ShardError as exc:
            reason = str(exc)
        except Exception as exc:  # noqa: BLE001 - the hub's errors come from several packages without a common base class
            reason = _passing_reason(exc, repo, name)
        if attempt < tries:
            pause = 2**attempt
            _say(f"{name}: {reason}; trying again in {pause} s (try {attempt + 1} of {tries})")
            time.sleep(pause)
    raise DataError(
        f"cannot download {name} from {repo}: {tries} tries failed, the last with {reason}; "
        "run the same command again later, the shards that have arrived are kept"
    )


def _accept(arrived, path):
    """Move a downloaded shard to its final name if it is whole; else remove it, lest the hub take it for cached."""
    try:
        check_shard(arrived)
    except ShardError:
        arrived.unlink()
        raise
    os.replace(arrived, path)


def _passing_reason(exc, repo, name):
    """Return in a few words why a download failed if trying again may help; raise DataError or _Offline if not."""
    causes = list(_causes(exc))
    if message := _disk_full_message(exc):
        raise DataError(message) from exc
    if any(type(cause).__name__ == "OfflineModeIsEnabled" for cause in causes):
        raise _Offline("offline mode is on (HF_HUB_OFFLINE)") from exc
    # No address for the hub's name means no network: huggingface_hub itself has tried for a while by now.
    if any(isinstance(cause, socket.gaierror) for cause in causes):
        raise _Offline("there is no network connection to the Hugging Face Hub") from exc
    for cause in causes:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status in (408, 429) or (status is not None and status >= 500):
            return f"HTTP {status}"
        if status is not None:
            raise DataError(
                f"cannot download {name} from {repo}: HTTP {status}; check that the dataset still exists "
                "under this name, and log in with `hf auth login` if it asks for that"
            ) from exc
    # httpx and requests name their classes after these; their own classes are not imported, since the hub's choice
    # of HTTP package has changed before. A plain OSError of the hub without errno is a file of the wrong size.
    names = {base.__name__ for cause in causes for base in type(cause).__mro__}
    if names & {"ConnectionError", "TimeoutError", "Timeout", "TransportError", "XetDownloadError"}:
        return f"connection failed ({type(causes[-1]).__name__})"
    if type(exc) is OSError and exc.errno is None:
        return "incomplete file"
    raise DataError(
        f"cannot download {name} from {repo}: {type(exc).__name__} ({_first_line(exc)}); "
        "check the folder's permissions and the installed huggingface_hub"
    ) from exc


def _causes(exc):
    while exc is not None:
        yield exc
        exc = exc.__cause__ or exc.__context__


def _first_line(exc):
    return str(exc).strip().partition("\n")[0]


def _disk_full_message(exc):
    for cause in _causes(exc):
        # hf_xet, written in Rust, gives the system's text only, without errno.
        if getattr(cause, "errno", None) == errno.ENOSPC or "No space left on device" in str(cause):
            where = f" while writing {cause.filename}" if getattr(cause, "filename", None) else ""
            return f"the disk is full{where}: free some space and run the same command again, whole shards are kept"
    return None
