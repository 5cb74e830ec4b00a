"""Download GPT-2 tokens of FineWeb (10B sample) to data/fineweb10B: `python data/cached_fineweb10B.py [N]`.

N training shards of 100M tokens; the default of 9 is enough for the official run, 103 are all of it.
"""

from pathlib import Path

from shards import download_command

if __name__ == "__main__":
    folder = Path(__file__).parent / "fineweb10B"
    download_command("kjj0/fineweb10B-gpt2", folder, "fineweb_%s_%06d.bin", default_chunks=9, max_chunks=103)
