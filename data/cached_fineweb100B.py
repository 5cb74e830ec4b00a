"""Download GPT-2 tokens of FineWeb (100B sample) to data/fineweb100B: `python data/cached_fineweb100B.py [N]`.

N training shards of 100M tokens (200 MB) each; the default is all 1030 of them, 206 GB.
"""

from pathlib import Path

from shards import download_command

if __name__ == "__main__":
    folder = Path(__file__).parent / "fineweb100B"
    download_command("kjj0/fineweb100B-gpt2", folder, "fineweb_%s_%06d.bin", default_chunks=1030, max_chunks=1030)
