"""Download GPT-2 tokens of FineWeb-Edu (10B sample) to data/finewebedu10B: `python data/cached_finewebedu10B.py [N]`.

N training shards of 100M tokens (200 MB) each; the default is all 99 of them, 20 GB.
"""

from pathlib import Path

from shards import download_command

if __name__ == "__main__":
    folder = Path(__file__).parent / "finewebedu10B"
    download_command("kjj0/finewebedu10B-gpt2", folder, "finewebedu_%s_%06d.bin", default_chunks=99, max_chunks=99)
