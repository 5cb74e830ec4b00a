"""Make shards from text on this machine, without any download: `python data/local_text.py`.

The default text is the documentation that ships with Python: the topics of pydoc and the docstrings of the standard
library. Files and folders of your own can be given in its place. Each byte becomes one of the 256 single-byte tokens of
GPT-2's vocabulary, so that no vocabulary file is needed; with --vocab the text is encoded with the real GPT-2 BPE.
"""

import argparse
import ast
import os
import random
import sysconfig
import warnings
from pathlib import Path

import numpy as np
from shards import END_OF_TEXT, DataError, ShardError, ShardWriter, check_shard, gpt2_bpe, run, shard_name, write_shard

NAME_PATTERN = "local_%s_%06d.bin"
SHARD_TOKENS = 2_000_000
MIN_TOKENS = 10_000
MIN_VAL_TOKENS = 140_000
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


# ---------------------------------------------------------------------------------------------------------------------
# Text


def python_documents():
    """Return the documentation that ships with Python as a list of str: the topics of pydoc and the docstrings of each
    module, one document each."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        topics = {}
    return [topics[name] for name in sorted(topics)] + stdlib_docstrings(sysconfig.get_path("stdlib"))


def paragraphs(text, limit=600):
    """Split text at empty lines into pieces of at most `limit` characters; a longer paragraph is cut at that length."""
    pieces = [""]
    for paragraph in text.split("\n\n"):
        for start in range(0, max(len(paragraph), 1), limit):
            part = paragraph[start : start + limit]
            if pieces[-1] and len(pieces[-1]) + 2 + len(part) > limit:
                pieces.append("")
            pieces[-1] += ("\n\n" if pieces[-1] else "") + part
    return pieces


def stdlib_docstrings(root):
    """Return a list of str, the docstrings of each module under `root`; the modules are parsed, never imported."""
    documents = []
    for path in walk_files(root, skip=lambda name: name in SKIPPED_FOLDERS):
        if path.suffix != ".py":
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old modules hold invalid escapes, no concern of ours
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):  # a template, or a file that cannot be read: the others will do
            continue
        docstrings = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, DOCUMENTED))
        documents.append("\n\n".join(filter(None, docstrings)))
    return documents


def file_documents(paths):
    """Return the text of each file as a list of str; in a folder, hidden files and those that are not text are skipped.

    Raises DataError for a path that does not exist and for a given file that is not UTF-8 text.
    """
    documents = []
    for path in map(Path, paths):
        if path.is_dir():
            files = walk_files(path, skip=lambda name: name.startswith("."))
            documents += [text for text in map(read_text, files) if text is not None]
            continue
        if not path.exists():
            raise DataError(f"there is no file or folder {path}: check the path")
        text = read_text(path)
        if text is None:
            raise DataError(f"{path} is not UTF-8 text: convert it or leave it out")
        documents.append(text)
    return documents


def walk_files(root, skip):
    """Yield the files under `root` in sorted order, without those that `skip(name)` rejects and folders it rejects."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not skip(name))
        yield from (Path(folder, name) for name in sorted(names) if not skip(name))


def read_text(path):
    """Return a file's text, or None where it is not UTF-8 text."""
    content = path.read_bytes()
    try:
        return None if b"\0" in content else content.decode()
    except UnicodeDecodeError:
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def byte_token_ids():
    """Return a uint16 array of shape (256,): the GPT-2 id of each single-byte token.

    GPT-2 numbers the printable bytes of Latin-1 first, then the others, each in increasing order.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted(set(range(256)) - set(printable))
    ids = np.empty(256, dtype=np.uint16)
    ids[printable + others] = np.arange(256)
    return ids


def make_encoder(vocab):
    """Return a function from str to a uint16 array of GPT-2 ids: single bytes, or the BPE of the ranks file `vocab`."""
    if vocab is None:
        ids = byte_token_ids()
        return lambda text: ids[np.frombuffer(text.encode(), dtype=np.uint8)]
    bpe = gpt2_bpe(vocab)
    return lambda text: np.array(bpe.encode_ordinary(text), dtype=np.uint16)


def split_documents(documents, val_fraction):
    """Split a list of token arrays into validation and training lists, of whole documents in the given order.

    Validation gets val_fraction of the tokens, but at least MIN_VAL_TOKENS, and never more than half. A single document
    is cut in two.
    """
    total = sum(map(len, documents))
    target = int(min(max(total * val_fraction, MIN_VAL_TOKENS), total // 2))
    if len(documents) == 1:
        return [documents[0][:target]], [documents[0][target:]]
    val, train, val_tokens = [], [], 0
    for document in documents:
        if val_tokens < target and val_tokens + len(document) <= total // 2:
            val.append(document)
            val_tokens += len(document)
        else:
            train.append(document)
    return val, train


# ---------------------------------------------------------------------------------------------------------------------
# Shards


def existing_shards(folder):
    """Return the paths of a whole set of shards in `folder`, or [] where it is missing, incomplete or broken."""
    count = len(list(folder.glob("local_*.bin")))
    paths = [folder / shard_name(NAME_PATTERN, index) for index in range(count)]
    try:
        for path in paths:
            check_shard(path)
    except FileNotFoundError:
        return []
    except ShardError as exc:
        print(f"{exc} (making all shards again)")
        return []
    return paths if len(paths) > 1 else []


def write_shards(folder, val, train, shard_tokens):
    """Write the validation and training documents, lists of token arrays, as the only shards of `folder`."""
    for stale in folder.glob("local_*.bin"):
        stale.unlink()
    with ShardWriter(folder, NAME_PATTERN, shard_tokens, first_index=1) as writer:
        for document in train:
            writer.add(document)
    # The validation shard comes last: existing_shards takes its presence as the sign of a finished run.
    with_ends = [part for document in val for part in ([END_OF_TEXT], document)]
    write_shard(folder / shard_name(NAME_PATTERN, 0), np.concatenate(with_ends).astype(np.uint16))
    return writer.paths


def make_shards(texts, folder, shard_tokens=None, val_fraction=0.05, vocab=None):
    """Encode texts (a list of str), shuffle them with a fixed seed, write them as shards and return a summary line.

    Without shard_tokens the training shards have 2,000,000 tokens, or half of the text's where that is less, so that
    training always meets a shard border. Raises DataError for less than 10,000 tokens of text.
    """
    encode = make_encoder(vocab)
    documents = [encode(text) for text in texts if text]
    total = sum(map(len, documents))
    if total < MIN_TOKENS:
        raise DataError(f"found only {total} tokens of text, at least {MIN_TOKENS} are needed: give more text files")
    random.Random(0).shuffle(documents)
    val, train = split_documents(documents, val_fraction)
    val_tokens, train_tokens = (sum(map(len, part)) + len(part) for part in (val, train))
    shard_tokens = shard_tokens or min(SHARD_TOKENS, -(-train_tokens // 2))
    paths = write_shards(folder, val, train, shard_tokens)
    kind = "single-byte" if vocab is None else "GPT-2 BPE"
    return (
        f"wrote {val_tokens:,} validation and {train_tokens:,} training tokens ({kind}, {len(documents)} documents) "
        f"as 1 + {len(paths)} shards to {folder}"
    )


def parse_args(argv):
    parser = argparse.ArgumentParser(description="Make shards from text on this machine, without any download.")
    parser.add_argument("texts", nargs="*", help="text files or folders of them (default: Python's documentation)")
    parser.add_argument("--out", type=Path, help="folder for the shards (default, for Python's own: data/local_text)")
    parser.add_argument("--shard-tokens", type=int, help="tokens a training shard (default 2,000,000, or half of all)")
    parser.add_argument("--val-fraction", type=float, default=0.05, help="share of validation tokens (default 0.05); "
                        "at least 140,000 tokens are taken, up to half of all")  # fmt: skip
    parser.add_argument("--pieces", type=int, default=600, help="characters a document, cut at empty lines where they "
                        "allow; 0: whole texts, of which training sees the first 96 to 2048 tokens")  # fmt: skip
    parser.add_argument("--vocab", type=Path, help="GPT-2 ranks file (`base64 rank` lines), for the real BPE")
    parser.add_argument("--force", action="store_true", help="make the shards again though they are there")
    args = parser.parse_args(argv)
    if not 0 < args.val_fraction < 1:
        raise DataError(f"--val-fraction was {args.val_fraction}: give a number between 0 and 1", exit_code=2)
    if args.texts and args.out is None:
        raise DataError("texts of your own need a folder of their own: name it with --out", exit_code=2)
    args.out = args.out or Path(__file__).parent / "local_text"
    if args.shard_tokens is not None and args.shard_tokens < 1:
        raise DataError(f"--shard-tokens was {args.shard_tokens}: give a number of at least 1", exit_code=2)
    return args


def main(argv=None):
    args = parse_args(argv)
    if not args.force and (paths := existing_shards(args.out)):
        print(f"{len(paths)} whole shards are already in {args.out}: nothing to do (--force makes them again)")
        return
    texts = file_documents(args.texts) if args.texts else python_documents()
    if args.pieces:
        texts = [piece for text in texts for piece in paragraphs(text, args.pieces)]
    print(make_shards(texts, args.out, args.shard_tokens, args.val_fraction, args.vocab))


if __name__ == "__main__":
    run(main)
