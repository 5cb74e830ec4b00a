"""
Make gpt2_tokens.npz, which the trainer reads: for each of GPT-2's 50,257 tokens

    prefix  int32, the longest proper prefix of its bytes that is a token itself; -1 where there is none
    kind    int32, the lowest token of the same text but for case, accents, form (Unicode NFKC) and outer white space

    python data/gpt2_tokens.py              with the vocabulary that tiktoken fetches
    python data/gpt2_tokens.py --vocab FILE a ranks file of "base64-of-token rank" lines
"""
import argparse
import unicodedata
from pathlib import Path

import numpy as np
from shards import END_OF_TEXT, gpt2_bpe, run


def plain(token):
    """What tokens of one kind have in common; bytes that are no text on their own are their own kind."""
    try:
        text = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", token.decode()))
    except UnicodeDecodeError:
        return token
    text = "".join(c for c in text if unicodedata.category(c) != "Mn").lower()
    return text.strip() or text


def token_tables(tokens):
    """tokens: the bytes of each id. Returns prefix and kind as defined above; the last row is <|endoftext|>'s."""
    ids = {token: i for i, token in enumerate(tokens)}
    prefix = [next((ids[token[:n]] for n in range(len(token) - 1, 0, -1) if token[:n] in ids), -1) for token in tokens]
    kinds = {}
    kind = [kinds.setdefault(plain(token), i) for i, token in enumerate(tokens)]
    return np.array([*prefix, -1], dtype=np.int32), np.array([*kind, len(tokens)], dtype=np.int32)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=Path, help="a ranks file of base64-of-token rank lines")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("gpt2_tokens.npz"))
    args = parser.parse_args(argv)
    bpe = gpt2_bpe(args.vocab)
    prefix, kind = token_tables([bpe.decode_single_token_bytes(i) for i in range(END_OF_TEXT)])
    np.savez_compressed(args.out, prefix=prefix, kind=kind)


if __name__ == "__main__":
    run(main)
