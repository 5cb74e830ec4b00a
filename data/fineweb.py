"""Tokenize raw text into shards with the GPT-2 BPE, FineWeb or files of your own.

    python data/fineweb.py --dataset 10B              # HuggingFaceFW/fineweb, sample-10BT -> data/fineweb10B
    python data/fineweb.py --files 'texts/*.jsonl' -o data/mine

Files are .txt (one document each), .jsonl (one document a line, in "text") or .parquet (column "text"). Shard 0 is for
validation, the others are for training.
"""

import argparse
import glob
import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
from shards import DataError, ShardWriter, gpt2_bpe, need, run

NAME_PATTERN = "fineweb_%s_%06d.bin"


def hub_texts(dataset):
    """Yield the documents (str) of HuggingFaceFW/fineweb, of its sample "10B" or "100B"."""
    datasets = need("datasets", "datasets tiktoken")
    try:
        rows = datasets.load_dataset("HuggingFaceFW/fineweb", name=f"sample-{dataset}T", split="train")
    except (OSError, datasets.exceptions.DatasetsError) as exc:
        raise DataError(
            f"cannot load HuggingFaceFW/fineweb sample-{dataset}T ({type(exc).__name__}): "
            "check the connection and the free disk space, or give texts of your own with --files"
        ) from exc
    return (row["text"] for row in rows)


def file_texts(patterns):
    """Return an iterator over the documents (str) of the files that match the glob patterns, sorted by name.

    Raises DataError for a pattern without a file and for a file of another kind than .txt, .jsonl or .parquet.
    """
    paths = []
    for pattern in patterns:
        found = sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise DataError(f"no file matches {pattern!r}: check the path given to --files")
        paths += found
    for path in paths:
        if Path(path).suffix not in READERS:
            raise DataError(f"cannot read {path}: --files takes {', '.join(READERS)} files")
    return (text for path in paths for text in READERS[Path(path).suffix](path))


def read_txt(path):
    """Yield the file's whole text as one document."""
    try:
        yield Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise DataError(f"{path} is not UTF-8 text ({exc.reason} at byte {exc.start}): convert it first") from exc


def read_jsonl(path):
    """Yield the "text" field of each line that is not blank."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as exc:
                raise DataError(f'{path}, line {number}: expected a JSON object with a "text" field') from exc


def read_parquet(path):
    """Yield the "text" column's values."""
    parquet = need("pyarrow.parquet", "pyarrow")
    try:
        for batch in parquet.ParquetFile(path).iter_batches(columns=["text"]):
            yield from batch.column("text").to_pylist()
    except (ValueError, KeyError) as exc:  # pyarrow's ArrowInvalid is a ValueError; a missing column is a KeyError
        raise DataError(f'{path} is no parquet file with a "text" column: check what --files matches') from exc


READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".parquet": read_parquet}


def start_worker(vocab):
    """Load the BPE once in each worker process."""
    global bpe
    bpe = gpt2_bpe(vocab)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent alone speaks, and ends the workers


def tokenize(text):
    """Return a document's GPT-2 ids as a uint16 array, without the end-of-text token."""
    return np.array(bpe.encode_ordinary(text), dtype=np.uint16)


def write_shards(texts, folder, shard_tokens, vocab=None, processes=1):
    """Tokenize texts (an iterable of str) in worker processes and return the paths of the shards written."""
    gpt2_bpe(vocab)  # a missing package or vocabulary fails here once, where a worker would fail and be restarted
    tqdm = need("tqdm").tqdm
    with (
        ShardWriter(folder, NAME_PATTERN, shard_tokens) as writer,
        multiprocessing.Pool(processes, start_worker, (vocab,)) as pool,
    ):
        for document in tqdm(pool.imap(tokenize, texts, chunksize=16), unit="doc"):
            writer.add(document)
    return writer.paths


def parse_args(argv):
    parser = argparse.ArgumentParser(description="Tokenize raw text into shards with the GPT-2 BPE.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset", choices=["10B", "100B"], help="sample of HuggingFaceFW/fineweb")
    source.add_argument("--files", metavar="GLOB", nargs="+", help=".txt, .jsonl or .parquet files")
    parser.add_argument("-o", "--out", type=Path, help="folder for the shards (default fineweb10B, fineweb100B or "
                        "custom beside this script)")  # fmt: skip
    parser.add_argument("-s", "--shard-tokens", type=int, default=100_000_000, help="tokens a shard (default 100M)")
    parser.add_argument("--vocab", type=Path, help="GPT-2 ranks file, where tiktoken cannot fetch its own")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    folder = args.out or Path(__file__).parent / (f"fineweb{args.dataset}" if args.dataset else "custom")
    if any(folder.glob("fineweb_*.bin")):
        raise DataError(f"{folder} holds shards already: delete them or choose another folder with -o")
    texts = hub_texts(args.dataset) if args.dataset else file_texts(args.files)
    processes = max(1, (os.cpu_count() or 1) - 2)
    paths = write_shards(texts, folder, args.shard_tokens, args.vocab, processes)
    if len(paths) < 2:
        raise DataError(
            f"the text filled {len(paths)} shards of {args.shard_tokens} tokens, which leaves none for training: "
            "delete them, then give more text or a smaller -s"
        )
    print(f"wrote 1 validation and {len(paths) - 1} training shards to {folder}")


if __name__ == "__main__":
    run(main)
