"""2,400 damaged inputs: each is refused in one sentence or harmless; no traceback, no hang, no lost file."""
import dataclasses
import random
import string

import pytest
import torch
from conftest import random_stream, tiny_config, write_shard

import train_gpt
from records.logs import LogError, read_log
from runtime import UserError, option_fields, read_checkpoint

ROUNDS, EACH = 12, 50  # 600 of each of four kinds


def damage(draw: random.Random, data: bytes) -> bytes:
    """Cut, doubled, bytes changed, a stretch moved or overwritten, or something else altogether."""
    where, length = draw.randrange(len(data) + 1), draw.choice((1, 4, 64, 1000))
    return draw.choice((
        lambda: data[:where], lambda: data[where:], lambda: data + data[:where],
        lambda: data[:where] + draw.randbytes(length) + data[where + length:],
        lambda: data[:where] + draw.randbytes(length) + data[where:],
        lambda: data[:where] + data[where + length:], lambda: data[:where] + bytes(length) + data[where + length:],
        lambda: draw.randbytes(draw.randrange(3000))))()


def refused_or(sentence_of: type, call) -> bool:
    """Whether it was refused; the refusal has to be one sentence."""
    try:
        call()
        return False
    except sentence_of as error:
        assert str(error) and "\n" not in str(error), str(error)
        return True


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_options(seed, tmp_path):
    draw, refusals, fields = random.Random(seed), 0, option_fields(train_gpt.Config)
    text = ("", "0", "-1", "1", "3", "7", "1e400", "nan", "inf", "auto", "on", "../..", "/", "*", "é\n", "0x10", "1_0",
            "9" * 400)
    for _ in range(EACH):
        argv = []
        for _ in range(draw.randint(1, 4)):
            key = draw.choice((*fields, *fields, "".join(draw.choices(string.printable, k=draw.randrange(8)))))
            value = draw.choice((*text, str(draw.randrange(10**6)), str(fields[key].default) if key in fields else "x"))
            argv.append(draw.choice((f"{key}={value}", f"{key}={value}", f"--{key}", key)))
        refusals += refused_or(UserError, lambda argv=argv: train_gpt.parse_options(argv))
    assert 0 < refusals <= EACH


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_shards(seed, tmp_path):
    draw, refusals = random.Random(seed), 0
    whole = [write_shard(tmp_path / f"{kind}_{i}.bin", random_stream(i, 4500, longest=40))
             for i, kind in enumerate(("train", "val"))]
    data = [path.read_bytes() for path in whole]
    cfg = tiny_config(tmp_path)

    def read():
        plan = train_gpt.plan_run(cfg, train_gpt.find_shards(cfg, "train_files"))
        validation = train_gpt.read_validation(cfg, train_gpt.World(0, 1, torch.device("cpu")))
        assert plan.tokens > 0 and len(validation.slices) == cfg.val_tokens // cfg.val_slice_tokens
    for _ in range(EACH):
        which = draw.randrange(2)
        whole[which].write_bytes(changed := damage(draw, data[which]))
        refusals += refused_or(UserError, read)
        assert whole[which].read_bytes() == changed and sorted(tmp_path.iterdir()) == sorted(whole)
        whole[which].write_bytes(data[which])
    assert 0 < refusals <= EACH


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_logs(seed, whole, tmp_path):
    draw, refusals = random.Random(seed), 0
    ours = whole.logs[0].read_bytes()
    ours = ours[:400] + ours[ours.index(b"\n" + b"=" * 100 + b"\nenvironment"):]  # its sources are most of it
    theirs, llmc = ("".join(line.format(k, 5 - k / 9, 2 * k) for k in range(10)).encode() for line in (
        "step:{}/9 val_loss:{:.4f} train_time:{}ms step_avg:1.5ms\n", "s:{0} tel:{1:.4f}\ns:{0} trl:{1:.4f}\n"))
    for _ in range(EACH):
        path = tmp_path / "log.txt"
        path.write_bytes(changed := damage(draw, draw.choice((ours, theirs, llmc))))
        refusals += refused_or(LogError, lambda path=path: read_log(path))
        assert path.read_bytes() == changed
    assert 0 < refusals <= EACH


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_checkpoints(seed, whole, shards, tmp_path):
    """Damaged ones, also in a place with no checksum, and whole ones with entries of other types."""
    draw, refusals, path = random.Random(seed), 0, tmp_path / "checkpoint.pt"
    saved = read_checkpoint(next(whole.logs[0].parent.glob("*_step000014.pt")), train_gpt.SAVED)
    saved["state"] = {name: tensor[:4].clone() if tensor.dim() else tensor for name, tensor in saved["state"].items()}
    torch.save(saved, path)
    data = path.read_bytes()
    cfg = dataclasses.replace(tiny_config(shards), resume=str(path))
    plan = train_gpt.plan_run(cfg, train_gpt.find_shards(cfg, "train_files"))
    for k in range(EACH):
        if k % 5:
            path.write_bytes(damage(draw, data))
        else:
            name = draw.choice((*train_gpt.SAVED, "format"))
            torch.save({**saved, name: draw.choice((None, "x", -1, [], {"shape": 3}, float("nan")))}, path)
        kept = path.read_bytes()
        refusals += refused_or(UserError, lambda: train_gpt.read_resume(cfg, torch.float32, plan))
        assert path.read_bytes() == kept
    assert 0 < refusals <= EACH
    assert list(tmp_path.iterdir()) == [path]
