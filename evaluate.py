"""
What a trained model is worth: validation loss on any shards, HellaSwag, and its weights for other programs.

    python evaluate.py ckpt=records/runs/.../..._step001555.pt    loss on its run's validation shards
    python evaluate.py ckpt=... val_files='my/shards/val_*.bin' val_tokens=1048576
    python evaluate.py ckpt=... hellaswag=10042                   and HellaSwag, of so many tasks
    python evaluate.py ckpt=... export=model.safetensors          writes the weights, evaluates nothing

Paths of ckpt=, vocab= and tasks= count from the current folder if the file is there, else from the project's; that of
val_files= from the project's, that of export= from the current one.
"""
import dataclasses
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from runtime import UserError, find, knob
from sample import Model, most_tokens, need, open_model, open_tokenizer, start

HELLASWAG = ("Rowan/hellaswag", "data/validation-00000-of-00001.parquet")  # 10,042 tasks, arXiv 1905.07830
PACK = 4096  # tokens of HellaSwag a forward pass


@dataclasses.dataclass(frozen=True)
class Options(Model):
    val_files: str = knob("", "glob of validation shards; default: those of the checkpoint's run")
    val_tokens: int = knob(0, "tokens of them, from their start; default: as its run")
    val_slice_tokens: int = knob(0, "tokens a forward pass; default: as its run; lower it to save memory")
    hellaswag: int = knob(0, "tasks of HellaSwag, which has 10042; 0: none")
    tasks: str = knob("", "its file, .parquet or .jsonl; default: from the Hugging Face Hub")
    export: str = knob("", "file to write the weights to, .safetensors; nothing is then evaluated")


def read_tasks(path: Path) -> list[dict]:
    """Rows with ctx, endings (4) and label. Raises UserError."""
    try:
        if path.suffix == ".parquet":
            rows = need("pyarrow.parquet", "pyarrow").read_table(path).to_pylist()
        else:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        tasks = [dict(ctx=str(row["ctx"]), endings=[str(ending) for ending in row["endings"]], label=int(row["label"]))
                 for row in rows]
        if not tasks or any(not 0 <= task["label"] < len(task["endings"]) for task in tasks):
            raise ValueError("no tasks, or a label without its ending")
        return tasks
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no file of HellaSwag's tasks ({type(error).__name__}: {error}): give its "
                        "validation set with tasks=") from None


def fetch_tasks() -> Path:
    from huggingface_hub import hf_hub_download
    try:
        return Path(hf_hub_download(HELLASWAG[0], HELLASWAG[1], repo_type="dataset"))
    except Exception as error:  # the network's, the Hub's and the disk's many kinds
        raise UserError(f"cannot fetch HellaSwag from the Hugging Face Hub ({type(error).__name__}): connect to the "
                        "network, or give its file with tasks=") from None


@torch.no_grad()
def mean_losses(module: ModuleType, trainer, step: int, documents: list[tuple[list[int], list[int]]]) -> list[float]:
    """Of each (context, ending) in tokens, the mean loss of the ending's tokens; packed as in training."""
    cfg, device, results = trainer.cfg, trainer.world.device, []
    whole = [[module.BOS, *context, *ending] for context, ending in documents]
    size, longest = min(PACK, most_tokens(trainer)), max(map(len, whole))
    if longest > size:
        raise UserError(f"a task of {longest} tokens is longer than a forward pass of {size}: take fewer tasks")
    stage, view = module.validation_view(cfg, step)
    while len(results) < len(documents):
        first, starts, stream = len(results), [], []
        while first + len(starts) < len(whole) and len(stream) + len(whole[first + len(starts)]) <= size:
            starts.append(len(stream))
            stream += whole[first + len(starts) - 1]
        filled = np.arange(len(stream), size, longest)  # what is left over: documents nobody reads
        tokens = torch.tensor(stream + [module.BOS] * (size + 1 - len(stream)), dtype=torch.int32, device=device)
        rows = module.table_rows(len(starts) + len(filled))
        cu_seqlens = torch.from_numpy(module.seqlens(np.array([*starts, *filled]), size, rows)).to(device)
        x = trainer.hidden(tokens[:-1], cu_seqlens, longest, *trainer.rotary[stage], view)
        losses = trainer.token_losses(x, trainer.model.head, tokens[1:]).tolist()
        for begin, document, (_, ending) in zip(starts, whole[first:], documents[first:], strict=False):
            end = begin + len(document) - 1  # the loss at a position is that of the token after it
            results.append(sum(losses[end - len(ending):end]) / len(ending))
    return results


def hellaswag(module: ModuleType, trainer, step: int, tasks: list[dict], encode) -> float:
    """Share of the tasks whose right ending has the lowest mean loss."""
    documents = [(encode(task["ctx"]), encode(" " + ending)) for task in tasks for ending in task["endings"]]
    losses, right = iter(mean_losses(module, trainer, step, documents)), 0
    for task in tasks:
        mine = [next(losses) for _ in task["endings"]]
        right += mine.index(min(mine)) == task["label"]
    return right / len(tasks)


def export(path: Path, trainer, saved: dict) -> None:
    """Weights by their names in train_gpt.GPT; its configuration, step and loss as metadata."""
    save_file = need("safetensors.torch", "safetensors").save_file
    weights = {name: saved["state"][name].contiguous() for name in dict(trainer.model.named_parameters())}
    part = path.with_name(path.name + ".partial")
    try:
        save_file(weights, part, {key: json.dumps(saved[key]) for key in ("step", "val_loss", "config")})
        part.replace(path)
    except Exception as error:  # the operating system's and the writer's own
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write export={path} ({error}): name a folder with space that can be written") from None
    print(f"wrote {path}: {sum(w.numel() for w in weights.values()):,} parameters")


def main(options: Options) -> None:
    changes = {key: getattr(options, key) for key in ("val_files", "val_tokens", "val_slice_tokens")
               if getattr(options, key)}
    if options.hellaswag < 0:
        raise UserError(f"hellaswag={options.hellaswag} must not be negative")
    if options.export:
        _, trainer, saved = open_model(options, **changes)
        return export(Path(options.export), trainer, saved)
    tasks = read_tasks(find(options.tasks) if options.tasks else fetch_tasks()) if options.hellaswag else []
    module, trainer, saved = open_model(options, **changes)
    step, cfg = saved["step"], trainer.cfg
    validation = module.read_validation(cfg, trainer.world)
    print(f"val_loss {trainer.evaluate(step, validation):.4f} over {cfg.val_tokens:,} tokens of {cfg.val_files} "
          f"(in its run at step {step}: {saved['val_loss']:.4f} over {saved['config']['val_tokens']:,} of "
          f"{saved['config']['val_files']})", flush=True)
    if tasks:
        tasks = tasks[:options.hellaswag]
        share = hellaswag(module, trainer, step, tasks, open_tokenizer(options.vocab, cfg.preset)[0])
        error = math.sqrt(share * (1 - share) / len(tasks))
        print(f"hellaswag {share:.4f} (standard error {error:.4f}) of {len(tasks):,} tasks")


if __name__ == "__main__":
    sys.exit(start(main, Options, __doc__))
