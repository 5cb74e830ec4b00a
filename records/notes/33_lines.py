"""How many lines name each mechanism, in train_gpt.py and in triton_kernels.py: python records/notes/33_lines.py

A measure of what goes with it, comments and rows of tables included; some lines belong to several."""
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAMED = {
    "value embeddings": r"value_(embed|layers|gates)|values = zip|embedded|if value is not|value\[|value = next",
    "key offset": r"key_offset|OFFSET",
    "bigrams": r"bigram",
    "mix of layers before the head": r"final: float|final_(lambdas|in|out)|sources = |amounts = |weigh\(amounts",
    "reading of layer 7": r"layer\.reads|reads=|\breads: ",
    "tokens' own coefficients": r"mix_in|mix_out|networks|network\b|_mix\b|mix_dim|def mix|gelu",
    "attention gates": r"attn_gates|gate_weight|gate_ptr|gate\)",
    "mixing into the last layer": r"layer_mix|\bmixes|extra is|extra =|extra:|by = mix|by\[|\bdeep\b|mixers",
    "exclusive heads": r"exclu|along = |tanh\(amount",
    "paired heads": r"paired|[/%*] PARTS|PARTS: tl|PARTS=|[/*] parts",
    "smear": r"smear",
    "FP8 head": r"fp8|FP8",
    "extension": r"extension|total_steps",
    "longer window at the end": r"final_window|final: bool|final else|final=step",
    "prefix target": r"(?<!name_)(?<!remove)(?<!sys\.)prefix",
    "sample of the vocabulary": r"\bsample|candidate",
    "further tokens": r"\bmtp|further_targets|target_weights|multi-token",
}
for name, pattern in NAMED.items():
    print(name, *(sum(bool(re.search(pattern, line)) for line in (ROOT / file).read_text().splitlines())
                  for file in ("train_gpt.py", "triton_kernels.py")))
