"""
Text from a trained model, on a GPU or a CPU.

    python sample.py ckpt=records/runs/.../..._step001555.pt prompt="The ship left the harbour"

A run with save_every= leaves checkpoints beside its log. Each new token is one forward pass over the text so far.
Paths of ckpt= and vocab= count from the current folder if the file is there, else from the project's.
"""
import atexit
import dataclasses
import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent
sys.path.append(str(ROOT / "data"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from local_text import byte_token_ids  # noqa: E402
from shards import gpt2_bpe, need  # noqa: E402, F401

from runtime import UserError, fail, file_hash, find, knob, parse_arguments, print_help, read_checkpoint  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Model:
    """What every use of a checkpoint begins with."""
    ckpt: str = knob("", "checkpoint of a run with save_every=")
    vocab: str = knob("", "file of GPT-2's ranks (base64 rank), where tiktoken cannot fetch it; bytes: single bytes")
    source: str = knob("here", "trainer that reads it: here, or checkpoint, which runs the code kept in the file")
    device: str = knob("auto", "auto (a GPU where there is one), cuda or cpu")


@dataclasses.dataclass(frozen=True)
class Options(Model):
    prompt: str = knob("", "text to go on from; none: from the start of a document")
    tokens: int = knob(100, "tokens to add at most; the end of the document ends it before")
    temperature: float = knob(0.8, "0: always the likeliest token; 1: as the model says")
    top_k: int = knob(50, "draw among so many of the likeliest tokens; 0: among all")
    samples: int = knob(1, "texts to draw")
    seed: int = knob(0, "seed of the draws")


def open_trainer(sources: dict[str, str], source: str) -> ModuleType:
    """train_gpt of this checkout, or the one that a checkpoint carries, in a folder of its own."""
    if source == "checkpoint":
        folder = Path(tempfile.mkdtemp(prefix="trainer_"))
        atexit.register(shutil.rmtree, folder)
        for name, text in sources.items():
            (folder / Path(name).name).write_text(text, encoding="utf-8")
            sys.modules.pop(Path(name).stem, None)
        (folder / "data").symlink_to(ROOT / "data")
        sys.path.insert(0, str(folder))
    return importlib.import_module("train_gpt")


def open_model(options: Model, **changes):
    """A trainer that does not learn, with a checkpoint's weights; its module and the checkpoint. changes: of its
    configuration. Raises UserError."""
    if not options.ckpt:
        raise UserError("no checkpoint given: write ckpt=PATH, of what a run with save_every= left beside its log")
    if options.source not in ("here", "checkpoint"):
        raise UserError(f"source={options.source!r} is neither here nor checkpoint: leave it out for this trainer")
    cuda = torch.cuda.is_available()
    if options.device not in ("auto", "cpu", *["cuda"] * cuda):
        raise UserError(f"device={options.device!r} is not here: take auto or cpu")
    device = torch.device("cuda" if cuda and options.device != "cpu" else "cpu")
    saved = read_checkpoint(find(options.ckpt), {"step": int, "config": dict, "state": dict, "sources": dict,
                                                 "token_tables": str, "val_loss": float})
    module = open_trainer(saved["sources"], options.source)
    try:
        cfg = module.saved_config(saved["config"], **{"dtype": "auto", "fp8": "auto", "kernels": "auto",
                                                      "compile": "off", "resume": "", **changes})
        module.check_config(cfg)
        if options.source == "here" and saved["token_tables"] != file_hash(cfg.token_tables):
            raise UserError(f"{options.ckpt} was trained with another {cfg.token_tables}: restore that file")
        trainer = module.Trainer(cfg, module.World(0, 1, device), learns=False)
        trainer.load(saved["state"])
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise UserError(f"{options.ckpt} holds settings that no trainer takes ({error}): take another checkpoint") \
            from None
    return module, trainer, saved


def open_tokenizer(vocab: str, preset: str) -> tuple[Callable[[str], list[int]], Callable[[list[int]], str]]:
    """Text to GPT-2's tokens and back; single bytes for a model of the smoke preset, which saw no others."""
    if vocab == "bytes" or not vocab and preset == "smoke":
        ids = byte_token_ids()
        back = {int(token): byte for byte, token in enumerate(ids)}
        return (lambda text: ids[list(text.encode())].tolist(),
                lambda tokens: bytes(back.get(token, 63) for token in tokens).decode(errors="replace"))  # 63: "?"
    if vocab and not os.path.isfile(find(vocab)):
        raise UserError(f"there is no file vocab={vocab}: give GPT-2's ranks, or leave vocab= out to fetch them")
    bpe = gpt2_bpe(find(vocab) if vocab else None)
    return bpe.encode_ordinary, bpe.decode


def most_tokens(trainer) -> int:
    """How many tokens a forward pass takes: its rotary tables have two rows a token."""
    return len(trainer.rotary[0][0]) // 2


@torch.no_grad()
def next_logits(module: ModuleType, trainer, step: int, tokens: list[int]) -> torch.Tensor:
    """Of the token after `tokens`, which are one document: (50257,) float32."""
    device, count = trainer.world.device, min(-(-len(tokens) // 128) * 128, most_tokens(trainer))
    padded = torch.tensor(tokens + [module.BOS] * (count - len(tokens)), dtype=torch.int32, device=device)
    cu_seqlens = torch.from_numpy(module.seqlens(np.array([0]), count, module.table_rows(1))).to(device)
    stage, view = module.validation_view(trainer.cfg, step)
    x = trainer.hidden(padded, cu_seqlens, count, *trainer.rotary[stage], view)
    return module.capped_logits(x[len(tokens) - 1:len(tokens)], trainer.model.head)[0, :module.VOCAB].float()


def draw(logits: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    kept, ids = logits.topk(min(top_k or len(logits), len(logits)))
    chances = torch.softmax(kept.double() / temperature, 0).cpu()
    return int(ids[torch.multinomial(chances, 1, generator=generator).item()])


def sample(module: ModuleType, trainer, step: int, prompt: list[int], options: Options, seed: int) -> list[int]:
    """The tokens that follow a prompt."""
    tokens, generator = [module.BOS, *prompt], torch.Generator().manual_seed(seed)
    for _ in range(options.tokens):
        token = draw(next_logits(module, trainer, step, tokens), options.temperature, options.top_k, generator)
        if token == module.BOS:
            break
        tokens.append(token)
    return tokens[1 + len(prompt):]


def main(options: Options) -> None:
    for key, least in (("tokens", 1), ("temperature", 0), ("top_k", 0), ("samples", 1), ("seed", 0)):
        if not least <= getattr(options, key) < float("inf"):
            raise UserError(f"{key}={getattr(options, key)} must be a number of at least {least}")
    if options.seed + options.samples > 2**63:
        raise UserError(f"seed={options.seed} is too large: take one below 2**63")
    if any("\ud800" <= letter <= "\udfff" for letter in options.prompt):
        raise UserError("prompt= is no text in UTF-8: set your terminal to UTF-8")
    module, trainer, saved = open_model(options)
    encode, decode = open_tokenizer(options.vocab, trainer.cfg.preset)
    prompt = encode(options.prompt)
    longest = min(max(stage.max_doc for stage in trainer.cfg.stages), most_tokens(trainer))
    if 1 + len(prompt) + options.tokens > longest:
        raise UserError(f"a prompt of {len(prompt)} tokens and tokens={options.tokens} more are longer than the "
                        f"{longest} of the longest documents in training: give fewer")
    for k in range(options.samples):
        print(options.prompt + decode(sample(module, trainer, saved["step"], prompt, options, options.seed + k)), "\n")


def start(run: Callable, table: type, text: str) -> int:
    """Runs a command line; returns the exit code."""
    argv, program = sys.argv[1:], Path(sys.argv[0]).name
    if argv and argv[0] in ("help", "--help", "-h"):
        print_help(text, table)
        return 0
    try:
        run(table(**parse_arguments(argv, table, program)))
        return 0
    except torch.OutOfMemoryError:
        return fail("out of GPU memory: end what else runs on the GPU, or take device=cpu", 3)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except Exception as error:
        if type(error).__name__ not in ("UserError", "DataError"):  # by name: a checkpoint's trainer has its own
            raise
        return fail(str(error), 2)


if __name__ == "__main__":
    sys.exit(start(main, Options, __doc__))
