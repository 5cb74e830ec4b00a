"""What the tensors of the MLPs hold in bf16 at a checkpoint's end: 35 of NOTES.md; from the project's folder

    python records/notes/35_ranges.py CHECKPOINT [option=value ...]      the options of its run

One slice of its last step. Each layer: |.|'s maximum, median and lowest hundredth of what is not 0, of the MLP's input,
matrices, hidden layer, and the gradients of its output and of the hidden layer before ReLU^2; of the hidden layer also
how many values are above the largest that FP8 holds by FP8_MLP."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch  # noqa: E402

import runtime  # noqa: E402
import train_gpt as t  # noqa: E402
import triton_kernels as tk  # noqa: E402

cfg = t.parse_options(sys.argv[2:] or ["preset=corpus"])
world = runtime.connect(runtime.start_world(cfg))
files = t.find_shards(cfg, "train_files")
plan, trainer = t.plan_run(cfg, files), t.Trainer(cfg, world, learns=False)
saved = runtime.read_checkpoint(Path(sys.argv[1]), t.SAVED)
trainer.load(saved["state"])
rows, mlp, largest = [], trainer.model.kernels.mlp, 448 * t.FP8_MLP[2]


def sizes(x):
    x = x.detach().float().abs().flatten()
    kept = x[x > 0]
    kept = kept[torch.randint(len(kept), (100_000,), device=x.device)].sort().values
    return f"{x.max():.3g} {kept[50_000]:.2g} {kept[1_000]:.2g}"


def spy(x, up, down, *_):
    (post,), layer = tk.relu_square(x.detach(), up.detach()), len(rows)
    rows.append([sizes(x), sizes(up), sizes(down), f"{sizes(post)}, {(post > largest).sum()} above {largest:g}"])
    y = mlp(x, up, down)
    y.register_hook(lambda g: rows[layer].extend((sizes(g), sizes(tk.relu_square(g.contiguous(), down, post)[0]))))
    return y


trainer.model.kernels = trainer.model.kernels._replace(mlp=spy)
step = saved["step"] - 1
i = t.stage_at(cfg, step)
stage, loader = cfg.stages[i], t.Loader(cfg, world, files, plan, step)
batch, weights = loader.next()[0], torch.tensor(t.target_weights(cfg, step), device=world.device)
loader.close()
loss = t.slice_loss(trainer.model, *batch, stage.max_doc, *trainer.rotary[i], t.stage_view(cfg, i), weights,
                    trainer.fp8)
(loss / cfg.slices).backward()
print(f"step {saved['step']}, stage {i}, loss {loss.item() / (len(batch.tokens) - 1) / sum(weights.tolist()):.4f}")
print("layer: x | up | down | post | g | dpre: each max, median, 1%")
for layer, row in enumerate(rows):
    print(layer, " | ".join(row), flush=True)
