"""A trained model can be sampled, evaluated and exported."""
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY_SHAPE, TINY_STAGES

import evaluate
import sample
import train_gpt
from runtime import UserError, read_checkpoint, write_checkpoint


@pytest.fixture(scope="module")
def ckpt(whole):
    return str(next(whole.logs[0].parent.glob("*_step000014.pt")))


@pytest.fixture(scope="module")
def opened(ckpt):
    return sample.open_model(sample.Options(ckpt=ckpt, device="cpu"))


def command(program: str, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, program, *options], cwd=ROOT, text=True, capture_output=True, timeout=120)


def refused(done: subprocess.CompletedProcess, *fragments: str) -> None:
    assert done.returncode == 2 and re.fullmatch("error: [^\n]+\n", done.stderr), done.stderr
    for fragment in fragments:
        assert fragment in done.stderr


def test_the_configuration_comes_back_from_the_checkpoint(ckpt):
    saved = read_checkpoint(ckpt, train_gpt.SAVED)
    cfg = train_gpt.saved_config(saved["config"])
    assert (cfg.shape, cfg.stages) == (TINY_SHAPE, TINY_STAGES) and isinstance(cfg.shape.layers[0], train_gpt.Layer)
    with pytest.raises(UserError, match="another version of the trainer.*source=checkpoint"):
        train_gpt.saved_config({**saved["config"], "unheard_of": 1})


def test_the_loss_of_the_checkpoint_is_the_loss_in_its_log(whole, ckpt, capsys):
    evaluate.main(evaluate.Options(ckpt=ckpt, device="cpu"))
    loss = whole.results[0]["val_loss"]
    assert capsys.readouterr().out.startswith(f"val_loss {loss:.4f} over 512 tokens of ")


def test_the_loss_on_other_tokens_is_another(whole, ckpt, capsys):
    evaluate.main(evaluate.Options(ckpt=ckpt, device="cpu", val_tokens=256))
    found = re.match(r"val_loss (\S+) over 256 tokens", capsys.readouterr().out)
    assert found and float(found[1]) != round(whole.results[0]["val_loss"], 4)


def test_the_next_token_s_logits_give_the_loss_of_validation(opened):
    """Of each position of a document, one pass a token against one pass for all."""
    module, trainer, saved = opened
    tokens = [module.BOS, *range(3, 20)]
    batch = module.Batch(torch.tensor(tokens + [0] * 15).int(), torch.tensor([0] + [32] * 32).int())
    stage, view = module.validation_view(trainer.cfg, saved["step"])
    with torch.no_grad():
        x = trainer.hidden(batch.tokens[:-1], batch.cu_seqlens, 32, *trainer.rotary[stage], view)
        at_once = trainer.token_losses(x, trainer.model.head, batch.tokens[1:])
    for n in range(1, len(tokens)):
        logits = sample.next_logits(module, trainer, saved["step"], tokens[:n])
        every = module.capped_logits(x[n - 1:n], trainer.model.head)[0].detach()
        torch.testing.assert_close(logits, every[:module.VOCAB].float(), rtol=1e-4, atol=1e-4)
        assert abs(float(torch.logsumexp(every, 0) - every[tokens[n]]) - float(at_once[n - 1])) < 1e-4


def test_greedy_is_the_likeliest_token_and_draws_follow_the_seed(opened):
    module, trainer, saved = opened

    def text(seed=0, **options):
        return sample.sample(module, trainer, saved["step"], [5, 6], sample.Options(tokens=12, **options), seed)
    greedy = text(temperature=0)
    assert greedy == text(1, temperature=0) == text(2, top_k=1, temperature=3.0)
    assert text(3, temperature=1.5) == text(3, temperature=1.5) != text(4, temperature=1.5)
    tokens = [module.BOS, 5, 6]
    for token in greedy:
        assert token == int(sample.next_logits(module, trainer, saved["step"], tokens).argmax())
        tokens.append(token)


def test_draws_have_the_chances_of_the_softmax():
    logits, generator = torch.tensor([0.0, 1.0, 2.0, -1.0]), torch.Generator().manual_seed(0)
    drawn = torch.bincount(torch.tensor([sample.draw(logits, 2.0, 3, generator) for _ in range(4000)]), minlength=4)
    expected = torch.softmax(torch.tensor([0.0, 0.5, 1.0]), 0) * 4000
    assert drawn[3] == 0 and torch.allclose(drawn[:3].float(), expected, atol=4 * 1000**0.5)


def test_a_text_ends_with_its_document(opened, monkeypatch):
    module, trainer, saved = opened
    script = iter([7, 8, module.BOS, 9])
    monkeypatch.setattr(sample, "draw", lambda *arguments: next(script))
    assert sample.sample(module, trainer, saved["step"], [5], sample.Options(), 0) == [7, 8]


def test_bytes_come_back():
    encode, decode = sample.open_tokenizer("", "smoke")
    assert decode(encode("Zürich, 1 €\n")) == "Zürich, 1 €\n" and decode([50256]) == "?"


TASKS = [dict(ctx="", endings=["a b", "c", "dd e", "f"], label="1"),
         dict(ctx="the", endings=["x", "yy", "z", "w"], label=0)]


@pytest.mark.parametrize("pack", [32, 12])
def test_hellaswag_takes_the_ending_of_lowest_mean_loss(opened, monkeypatch, pack):
    """Against one document a pass; the documents packed to 32 tokens and to 12."""
    module, trainer, saved = opened
    monkeypatch.setattr(evaluate, "PACK", pack)
    encode, _ = sample.open_tokenizer("bytes", "")
    documents = [(encode(task["ctx"]), encode(" " + ending)) for task in TASKS for ending in task["endings"]]
    losses = evaluate.mean_losses(module, trainer, saved["step"], documents)
    for loss, (context, ending) in zip(losses, documents, strict=True):
        tokens, alone = [module.BOS, *context], 0.0
        for token in ending:
            logits = sample.next_logits(module, trainer, saved["step"], tokens)
            tokens, alone = [*tokens, token], alone + float(torch.logsumexp(logits, 0) - logits[token])
        assert math.isclose(loss, alone / len(ending), rel_tol=1e-3)
    best = [min(range(4), key=losses[4 * k:4 * k + 4].__getitem__) for k in range(2)]
    for labels, share in ((best, 1.0), ([best[0], (best[1] + 1) % 4], 0.5)):
        tasks = [{**task, "label": label} for task, label in zip(TASKS, labels, strict=True)]
        assert evaluate.hellaswag(module, trainer, saved["step"], tasks, encode) == share


def test_made_up_tasks_are_evaluated_by_the_command(ckpt, tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n".join(map(json.dumps, TASKS)))
    done = command("evaluate.py", f"ckpt={ckpt}", "device=cpu", "hellaswag=2", f"tasks={path}")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^hellaswag (0|1)\.\d{4} \(standard error 0\.\d{4}\) of 2 tasks$", done.stdout, re.M)
    path.write_text('{"ctx": "a"}\n')
    refused(command("evaluate.py", f"ckpt={ckpt}", "hellaswag=2", f"tasks={path}"), "no file of HellaSwag's tasks")


def test_exported_weights_are_the_checkpoint_s(ckpt, opened, tmp_path):
    safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed here")
    evaluate.main(evaluate.Options(ckpt=ckpt, device="cpu", export=f"{tmp_path}/model.safetensors"))
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        names, meta = set(file.keys()), file.metadata()
        assert names == set(dict(opened[1].model.named_parameters()))
        assert all(torch.equal(file.get_tensor(name), opened[2]["state"][name]) for name in names)
    assert json.loads(meta["step"]) == 14 and json.loads(meta["config"])["steps"] == 12
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_export_evaluates_nothing(ckpt, tmp_path):
    done = command("evaluate.py", f"ckpt={ckpt}", "device=cpu", f"export={tmp_path}/w.safetensors", "hellaswag=3",
                   "tasks=missing.jsonl")
    assert done.returncode == 0 and done.stdout.startswith("wrote ") and (tmp_path / "w.safetensors").exists(), done


def test_settings_that_no_trainer_takes_get_one_sentence(ckpt, tmp_path):
    contents = {key: value for key, value in read_checkpoint(Path(ckpt), {}).items() if key != "format"}
    config = contents["config"]
    layers = config["shape"]["layers"]
    for change in ({"steps": "12"}, {"stages": ()}, {"token_tables": "nope.npz"},
                   {"shape": config["shape"] | {"dim": "x"}},
                   {"shape": config["shape"] | {"layers": (layers[0] | {"reads": "short"}, *layers[1:])}}):
        write_checkpoint(tmp_path / "changed.pt", {**contents, "config": config | change})
        with pytest.raises(UserError):
            sample.open_model(sample.Options(ckpt=str(tmp_path / "changed.pt"), device="cpu"))


def test_the_checkpoint_s_own_trainer_reads_it(ckpt, tmp_path):
    """source=checkpoint runs the code in the file: here one whose logits make every next token a question mark."""
    saved = read_checkpoint(ckpt, train_gpt.SAVED)
    source = saved["sources"]["train_gpt.py"]
    wrong = "F.one_hot(torch.full((len(x),), 30), len(w)) + 0"
    changed = source.replace("    return 23 * torch", f"    return {wrong} * torch")
    assert changed != source
    contents = {k: v for k, v in saved.items() if k != "format"}
    write_checkpoint(tmp_path / "own.pt", {**contents, "sources": {**saved["sources"], "train_gpt.py": changed}})
    options = (f"ckpt={tmp_path}/own.pt", "device=cpu", "tokens=4", "temperature=0")
    done = command("sample.py", *options, "source=checkpoint")
    assert (done.returncode, done.stdout) == (0, "???? \n\n"), done.stderr
    here = command("sample.py", *options)
    assert here.returncode == 0 and here.stdout != done.stdout


@pytest.mark.parametrize("options, fragments", [
    ([], ["no checkpoint given"]),
    (["ckpt=nothing.pt"], ["there is no checkpoint"]),
    (["ckpt={}", "tokens=0"], ["tokens=0 must be a number of at least 1"]),
    (["ckpt={}", "temperature=nan"], ["temperature=nan"]),
    (["ckpt={}", "tokens=5000"], ["tokens=5000 more are longer than"]),
    (["ckpt={}", "tocens=5"], ["did you mean tokens=...?"]),
    (["ckpt={}", "vocab=missing.tiktoken"], ["there is no file vocab=missing.tiktoken"]),
    (["ckpt={}", "source=there"], ["source='there'"]),
    (["ckpt={}", "device=tpu"], ["device='tpu'"]),
    (["ckpt={}", f"seed={2**63}"], ["seed=9223372036854775808 is too large"]),
    (["ckpt={}", "prompt=\udcff"], ["prompt= is no text in UTF-8"]),
])
def test_bad_input_gets_one_sentence(ckpt, options, fragments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sample.py", *(option.format(ckpt) for option in options)])
    code = sample.start(sample.main, sample.Options, sample.__doc__)
    refused(subprocess.CompletedProcess([], code, *capsys.readouterr()), *fragments)


def test_a_state_that_holds_no_tensors_gets_one_sentence(ckpt, tmp_path):
    contents = {k: v for k, v in read_checkpoint(ckpt, train_gpt.SAVED).items() if k != "format"}
    for value in (3, "text", [1.0], {}, None):
        write_checkpoint(tmp_path / "odd.pt", {**contents, "state": {**contents["state"], "head": value}})
        with pytest.raises(UserError, match=r"odd\.pt cannot be used as a checkpoint \(its state holds what is no"):
            sample.open_model(sample.Options(ckpt=f"{tmp_path}/odd.pt", device="cpu"))
    refused(command("sample.py", f"ckpt={tmp_path}/odd.pt", "device=cpu"), "its state holds what is no tensor")


def test_paths_count_from_the_current_folder_else_from_the_project_s(ckpt, tmp_path, monkeypatch, capsys):
    here, project = tmp_path / "here", tmp_path / "project"
    for folder, text in ((here, "here"), (project, "project")):
        folder.mkdir()
        (folder / "both").write_text(text)
    (here / "mine").write_text("mine")
    (project / "theirs").write_text("theirs")
    (here / "folder").mkdir()
    (project / "folder").write_text("a file")
    monkeypatch.chdir(here)
    (project / "data").symlink_to(ROOT / "data")
    monkeypatch.setattr("runtime.ROOT", project)
    for name, text in (("both", "here"), ("mine", "mine"), ("theirs", "theirs"), ("folder", "a file"),
                       (f"{project}/both", "project"), ("../project/both", "project")):
        assert sample.find(name).read_text() == text
    assert sample.find("nothing") == project / "nothing" and sample.find("x" * 5000) == project / ("x" * 5000)

    for folder in (here, project):  # each option, found in the one and then in the other
        taken = []
        monkeypatch.setattr(sample, "gpt2_bpe", lambda vocab, taken=taken: taken.append(vocab) or SimpleNamespace(
            encode_ordinary=lambda text: [ord(letter) for letter in text], decode=str))
        (folder / "a.pt").hardlink_to(ckpt)
        (folder / "tasks.jsonl").write_text("\n".join(map(json.dumps, TASKS)))
        (folder / "ranks").write_text("")
        evaluate.main(evaluate.Options(ckpt="a.pt", vocab="ranks", tasks="tasks.jsonl", hellaswag=2, device="cpu"))
        assert "of 2 tasks" in capsys.readouterr().out and [path.resolve() for path in taken] == [folder / "ranks"]
        for name in ("a.pt", "tasks.jsonl", "ranks"):
            (folder / name).unlink()


@pytest.mark.parametrize("program, names", [("sample.py", ("ckpt=", "vocab=")),
                                            ("evaluate.py", ("ckpt=", "vocab=", "tasks="))])
def test_help_says_from_where_paths_count(program, names):
    sentence = re.search(r"Paths of .* count from the current folder if the file is there, else from the project's",
                         command(program, "help").stdout)[0]
    assert all(name in sentence for name in names)


def test_help_lists_the_options():
    done = command("evaluate.py", "help")
    assert done.returncode == 0 and all(f"  {key}= " in done.stdout for key in ("ckpt", "vocab", "tasks", "export"))


def test_help_may_end_in_a_closed_pipe():
    done = subprocess.run(f"{sys.executable} sample.py help | true", shell=True, cwd=ROOT, capture_output=True,
                          text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_trainer_does_not_know_of_them():
    for name in train_gpt.FILES:
        assert not re.search("import (sample|evaluate)|from (sample|evaluate)", (ROOT / name).read_text())
