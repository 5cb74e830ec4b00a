"""The rungs of records/ladder: they train, on any number of processes; neighbours differ in the mathematics alone."""
import ast
import importlib.util
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, random_stream, write_shard

from records.ladder import rung_folders
from records.logs import read_log

LADDER = ROOT / "records" / "ladder"
RUNGS = {  # folder: parameters, loss before training (None: it depends on the text), rung before
    "01_llmc": (124_439_808, None, None),
    "02_AdamW_rotary": (123_532_032, None, "01_llmc"),
    "04_Muon": (123_532_032, None, "02_AdamW_rotary"),
    "08_UntiedEmbed": (162_201_600, math.log(50304), "04_Muon"),
    "12_LongContext": (162_201_642, math.log(50304), "08_UntiedEmbed"),
    "20_Sub3Min": (275_598_388, math.log(50304), "12_LongContext"),
    "64_ValueOutInit": (543_818_888, None, None),  # published, less 4 of padding and 2 of a layer without attention
    "A_AdamW": (123_568_128, None, "12_LongContext"),
    "M_Muon": (162_165_504, math.log(50304), "A_AdamW"),
}
OWN = {  # what differs from the rung before, CONSTANTS apart
    "02_AdamW_rotary": "Attention Block Config GPT MLP lr_factor make_optimizers rms_norm rotary_tables rotate "
                       "update",
    "04_Muon": "Config Muon make_optimizers orthogonalise",
    "08_UntiedEmbed": "Attention Block Config GPT MLP Muon Shape make_optimizers orthogonalise rms_norm tied_logits",
    "12_LongContext": "Attention Block Config GPT Linear MLP attend make_optimizers momentum precision rotate update "
                      "view",
    "20_Sub3Min": "Attention Block Config Fp8Linear GPT Muon Shape attend block_mask choose_fp8 dense_mask "
                  "document_blocks fp8_matmul lr_factor make_optimizers ordered orthogonalise rotary_tables rotate "
                  "sparse_mask view window_mask",
    "A_AdamW": "Attention Block Config GPT Linear MLP Muon lr_factor make_optimizers momentum orthogonalise "
               "rotary_tables update",
    "M_Muon": "Config GPT Muon make_optimizers momentum orthogonalise update",
}
SHARED = [rung for rung in RUNGS if rung[:2] != "64"]  # of one trainer and loader; rung 64 has its own
CONSTANTS = set("BLOCK BOS CHOICES CLIP COOLDOWN FP8_GRAD FP8_W FP8_X LAST_WINDOW LEAST_ONE MOMENTUM_WARMUP "
                "PRESETS PUBLISHED_STEPS RUNG SEQ_UNIT WARMUP WINDOW".split())
TINY = ("preset=smoke", "steps=8", "val_every=8", "batch_tokens=512", "val_tokens=512")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Globs of three training shards, cut out of one stream, and of a validation shard."""
    folder = tmp_path_factory.mktemp("text")
    for i, tokens in enumerate(np.split(random_stream(0, 9000), 3)):
        write_shard(folder / f"train_{i}.bin", tokens)
    write_shard(folder / "val_0.bin", random_stream(1, 2000))
    return f"train_files={folder}/train_*.bin", f"val_files={folder}/val_*.bin"


def run(rung, *args, processes=1):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] * (processes > 1)
    return subprocess.run([sys.executable, *launch, f"records/ladder/{rung}/train_gpt.py", *args], cwd=ROOT, text=True,
                          capture_output=True, timeout=300, env={**os.environ, "CUDA_VISIBLE_DEVICES": "",
                          "OMP_NUM_THREADS": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"})


def trained(rung, folder, *args, processes=1):
    """The log of a run that ends well."""
    done = run(rung, *args, f"log_dir={folder}", processes=processes)
    assert done.returncode == 0, done.stderr
    path, = folder.glob("*/*.txt")
    return read_log(path)


def load(rung):
    """A rung as a module."""
    name = f"ladder_{rung}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, LADDER / rung / "train_gpt.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def test_every_rung_is_in_its_folder_and_the_tables_know_it():
    assert [folder.name for folder in rung_folders(ROOT / "records")] == list(RUNGS)


# The first, the first with Muon and the last; between neighbours only what OWN names differs.
@pytest.mark.parametrize("rung", [rung if rung in ("01_llmc", "04_Muon", "20_Sub3Min") else
                                  pytest.param(rung, marks=pytest.mark.slow) for rung in SHARED])
def test_a_rung_learns_and_writes_a_log(rung, text, tmp_path):
    log = trained(rung, tmp_path, *TINY, *text)
    assert log.dialect == "ours" and log.finished and log.seed == 0 and log.tokens == 8 * 512
    assert log.sources == {"train_gpt.py": (LADDER / rung / "train_gpt.py").read_text()}
    assert log.config["name"] == f"ladder_{rung.split('_')[0]}" and log.config["preset"] == "smoke"
    first, last = log.vals
    assert (first.step, last.step) == (0, 8) and last.loss < first.loss - 0.1
    if RUNGS[rung][1]:
        assert first.loss == pytest.approx(RUNGS[rung][1], abs=2e-4)


def test_rung_64_learns_through_its_stages_and_writes_a_log(text, tmp_path):
    log = trained("64_ValueOutInit", tmp_path, "preset=smoke", "steps=14", "extension=2", "val_every=14",
                  "val_tokens=512", *text)
    assert log.finished and log.tokens == 4 * (256 + 384) + 6 * 512
    assert [log.environment[f"stage {i}"].split(",")[0] for i in range(4)] == ["steps 0-3", "steps 4-7", "steps 8-11",
                                                                               "steps 12-13"]
    first, last = log.vals
    assert first.loss == pytest.approx(math.log(50304), abs=0.02) and last.loss < first.loss - 1


@pytest.mark.slow
@pytest.mark.parametrize("rung", ["02_AdamW_rotary", "12_LongContext"])
def test_two_processes_train_as_one(rung, text, tmp_path):
    """Over shard borders, with an odd seed; Muon rounds to bfloat16, so its losses agree less well."""
    args = (*TINY, *text, "steps=5", "val_every=1", "seed=3", "device_batch_size=1", "log_every=1")
    one, two = (trained(rung, tmp_path / str(n), *args, processes=n) for n in (1, 2))
    assert (one.processes, two.processes) == (1, 2) and len(one.steps) == len(two.steps) == 11
    for a, b in zip(one.steps, two.steps, strict=True):
        assert a[:3] == b[:3] and a.loss == pytest.approx(b.loss, abs=2e-4 if rung == "02_AdamW_rotary" else 0.02)


@pytest.mark.slow
def test_two_processes_train_rung_64_as_one(text, tmp_path):
    args = ("preset=smoke", "steps=8", "extension=2", "val_every=4", "log_every=1", "val_tokens=512", *text)
    one, two = (trained("64_ValueOutInit", tmp_path / str(n), *args, processes=n) for n in (1, 2))
    for a, b in zip(one.steps, two.steps, strict=True):
        assert a[:3] == b[:3] and a.loss == pytest.approx(b.loss, abs=0.02)


def test_rung_64_reads_whole_documents_once(text):
    module = load("64_ValueOutInit")
    cfg = module.parse_options(["preset=smoke", "steps=6", "extension=2", *text])
    documents = module.Documents(module.Stream(cfg, "train_files", 1), cfg)
    tokens, begin = random_stream(0, 9000), 0
    for step in range(cfg.steps):
        for piece in range(cfg.slices):
            got, table = documents.read(step, piece)
            assert np.array_equal(got, tokens[begin:begin + len(got)])
            starts = np.flatnonzero(got == module.BOS)
            assert np.array_equal(np.unique(np.minimum(starts, len(got) - 1)), np.unique(table)[:len(starts)])
            begin += len(got)
            begin += int(np.argmax(tokens[begin:] == module.BOS))  # the last one's rest is dropped
    with pytest.raises(module.UserError, match="end before 400 steps do"):
        module.Documents(documents.stream, module.parse_options(["preset=smoke", "steps=400", *text]))


def test_rung_64s_gradient_is_that_of_its_loss():
    module, draw = load("64_ValueOutInit"), torch.Generator().manual_seed(0)
    x, w = (torch.randn(shape, generator=draw, requires_grad=True) for shape in ((9, 8), (50, 8)))
    targets, weights = torch.randint(0, 50, (9,), generator=draw), torch.tensor((1, 0.5, 0.2))
    module.HeadLoss.apply(x, w, targets, weights, False).backward()
    logits = module.softcap(x @ w.t())
    wanted = sum(weight * torch.nn.functional.cross_entropy(logits[:9 - k], targets[k:], reduction="sum")
                 for k, weight in enumerate(weights))
    for got, grad in zip((x.grad, w.grad), torch.autograd.grad(wanted, (x, w)), strict=True):
        torch.testing.assert_close(got, grad)


@pytest.mark.parametrize("rung", RUNGS)
def test_parameters_are_as_many_as_published(rung):
    module = load(rung)
    with torch.device("meta"):
        model = module.GPT(module.Config(**{"seq_len": 1024} if rung in SHARED else {}), torch.float32)
    assert sum(p.numel() for p in model.parameters()) == RUNGS[rung][0]


@pytest.mark.parametrize("rung", SHARED)
def test_every_parameter_has_one_optimizer(rung):
    module = load(rung)
    cfg = module.parse_options(["preset=smoke"])
    model = module.GPT(cfg, torch.float32)
    optimizers = module.make_optimizers(model, cfg, module.World(0, 1, torch.device("cpu")), lambda function: function)
    owned = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("rung", [rung for rung in RUNGS if RUNGS[rung][2]])
def test_neighbours_differ_in_their_own_parts_alone(rung):
    a, b = (definitions(name) for name in (RUNGS[rung][2], rung))
    differ = {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)}
    assert differ - CONSTANTS == set(OWN[rung].split())


def definitions(rung):
    """Functions, classes and assigned names of a rung to their text."""
    source = (LADDER / rung / "train_gpt.py").read_text()
    found = {}
    for node in ast.parse(source).body[1:]:
        names = [node.name] if hasattr(node, "name") else [name.id for target in getattr(node, "targets", ())
                                                           for name in ast.walk(target) if isinstance(name, ast.Name)]
        found |= {name: ast.get_source_segment(source, node) for name in names}
    return found


@pytest.mark.parametrize("rung", ["04_Muon", "08_UntiedEmbed", "20_Sub3Min"])
@pytest.mark.parametrize("shape", [(96, 96), (64, 256), (256, 64)])
def test_orthogonalised_singular_values_are_near_one(rung, shape):
    out = load(rung).orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    values = torch.linalg.svdvals(out.float())
    assert out.shape == shape and values.max() < 1.25 and values.quantile(0.1) > 0.6


@pytest.mark.parametrize("rung", ["12_LongContext", "A_AdamW", "M_Muon"])
def test_attention_is_causal_within_window_and_document(rung, monkeypatch):
    """By the pairs that change the output; documents above max_doc are cut."""
    module = load(rung)
    monkeypatch.setattr(module, "WINDOW", 100)
    cfg = module.parse_options(["preset=smoke", "seq_len=512", "batch_tokens=1024", "max_doc=300", "max_docs=8"])
    tokens = np.full(1024, 5)
    tokens[[0, 50, 51, 700]] = module.BOS  # documents of 50, 1, 300 + 161 up to the sequence's end, 188, 300 + 24
    table, = module.view(cfg, 0, tokens)
    starts = [0, 50, 51, 351, 512, 700, 1000]
    assert table.tolist() == starts + [1024] * (17 - len(starts))
    at, docs = torch.arange(1024), torch.bucketize(torch.arange(1024), torch.tensor(starts), right=True)
    back = at[:, None] - at
    wanted = (back >= 0) & (back < 100) & (docs[:, None] == docs)
    zeros = torch.zeros(2, 512, 1, 1024)
    seen = module.attend(zeros, zeros, torch.eye(1024).view(2, 512, 1, 1024), table, 300, None).view(1024, 1024) > 0
    assert torch.equal(seen, wanted)
    with pytest.raises(module.UserError, match="give max_docs=16"):
        module.view(cfg, 0, np.full(1024, module.BOS))


@pytest.mark.parametrize("blocks", [0, 1, 3, 8])
def test_windows_in_blocks_keep_the_nearest(blocks, monkeypatch):
    module = load("20_Sub3Min")
    tokens, count = long_tokens(module), torch.tensor(blocks)
    dense = module.window_mask(tokens, count)[:, 0]
    docs, at = (tokens == module.BOS).cumsum(1), torch.arange(1024)
    allowed = (at[:, None] >= at) & (docs[:, :, None] == docs[:, None])
    assert not (dense & ~allowed).any()
    apart = at[:, None] // 128 - at // 128
    assert torch.equal(dense & (apart == 0), allowed & (apart == 0))  # its own block always
    if blocks == 8:
        assert torch.equal(dense, allowed)
    for query in range(0, 1024, 128):  # by hand: full blocks and others, nearest first
        for batch in range(2):
            full, other = [], []
            for key in range(query, -1, -128):
                a, b = docs[batch, query:query + 128], docs[batch, key:key + 128]
                if key < query and a[-1] == b[0]:
                    full.append(key)
                elif a[0] <= b[-1]:
                    other.append(key)
            kept = full[:max(0, blocks - 1)] + other[:max(1, blocks - len(full))]
            seen = {key for key in range(0, 1024, 128) if dense[batch, query:query + 128, key:key + 128].any()}
            assert seen <= set(kept) and set(full[:max(0, blocks - 1)]) <= seen
    monkeypatch.setattr(module, "dense_mask", module.sparse_mask)
    check_sparse(module.window_mask(tokens, count), dense)


def long_tokens(module):
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 500, (2, 1024), generator=draw)
    tokens[torch.rand(2, 1024, generator=draw) < 0.004] = module.BOS
    tokens[0, 300:900] = 5
    return tokens


def check_sparse(mask, wanted):
    """FlexAttention's mask says what the dense one does: no pair outside of its blocks, and all pairs of full ones."""
    def blocks(count, indices):
        out = torch.zeros(2, 8, 8, dtype=torch.bool)
        for batch in range(2):
            for row in range(8):
                out[batch, row, indices[batch, 0, row, :count[batch, 0, row]].long()] = True
        return out.repeat_interleave(128, 1).repeat_interleave(128, 2)

    partial = blocks(mask.kv_num_blocks, mask.kv_indices)
    full = blocks(mask.full_kv_num_blocks, mask.full_kv_indices)
    batch, at = torch.arange(2)[:, None, None], torch.arange(1024)
    assert torch.equal(full | partial & mask.mask_mod(batch, 0, at[:, None], at), wanted)
    assert not (full & ~wanted).any()


@pytest.mark.parametrize(("rung", "tie", "softcap"), [(rung, tie, cap) for rung in ("A_AdamW", "M_Muon")
                                                      for tie in (0, 1) for cap in (0, 1)])
def test_heads_of_the_two_baselines_can_be_made_equal(rung, tie, softcap):
    module = load(rung)
    cfg = module.parse_options(["preset=smoke", f"tie={tie}", f"softcap={softcap}"])
    model = module.GPT(cfg, torch.float32)
    model.init_weights(0)
    assert (model.head.weight is model.embed.weight) == bool(tie)
    tokens = torch.randint(0, 500, (1, cfg.seq_len), generator=torch.Generator().manual_seed(0))
    loss = model(tokens, tokens.roll(-1), *module.view(cfg, 0, tokens[0].numpy()))
    loss.backward()
    assert 8 < loss.item() < 18 and (tie or loss.item() == pytest.approx(math.log(50304), abs=1e-4))


@pytest.mark.parametrize(("args", "sentence"), [
    (["sede=1"], "unknown option 'sede': did you mean seed=...?"),
    (["steps"], "option 'steps' has no value: write steps=6200"),
    (["steps=many"], "steps='many' is not a number"),
    (["steps=0"], "steps=0 must be a number of at least 1"),
    (["lr_adam=nan"], "lr_adam=nan must be a number"),
    (["preset=big"], "unknown preset 'big': there are official, corpus, smoke"),
    (["dtype=half"], "dtype='half' is not one of auto"),
    (["name=a/b"], "name='a/b' cannot name a folder"),
    (["preset=smoke", "batch_tokens=500"], "batch_tokens=500 is not a whole number of sequences"),
    (["preset=smoke", "device_batch_size=3"], "do not divide into micro-batches of device_batch_size=3"),
    (["preset=smoke", "train_files=none_*.bin"], "train_files='none_*.bin' has 0 shard(s)"),
    (["preset=smoke", "steps=100"], "51,201 tokens are needed"),
    (["preset=smoke", "steps=8", "val_tokens=12800"], "12,801 tokens are needed"),
])
def test_bad_input_is_one_sentence(args, sentence, text, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    module = load("04_Muon")
    given = {argument.split("=")[0] for argument in args}
    code = module.main([*args, *(glob for glob in text if glob.split("=")[0] not in given)])
    err = capsys.readouterr().err
    assert code == 2 and sentence in err and err.count("\n") == 1 and err.startswith("error: ")


def test_a_shard_that_is_none_and_ids_above_the_vocabulary_are_refused(tmp_path, text):
    (tmp_path / "train_0.bin").write_bytes(b"not a shard")
    done = run("04_Muon", *TINY, f"train_files={tmp_path}/train_*.bin", text[1])
    assert done.returncode == 2 and "is not a token shard" in done.stderr and "Traceback" not in done.stderr
    write_shard(tmp_path / "train_0.bin", np.full(5000, 60_000))
    module = load("04_Muon")
    cfg = module.parse_options(["preset=smoke", f"train_files={tmp_path}/train_*.bin"])
    stream = module.Stream(cfg, "train_files", 1)
    with pytest.raises(module.UserError, match="token id 60000"):
        stream.read(0, 10)


def test_the_stream_joins_shards(text):
    module = load("04_Muon")
    stream = module.Stream(module.parse_options(["preset=smoke", *text]), "train_files", 9000)
    tokens = random_stream(0, 9000)
    for begin, count in ((0, 9000), (2990, 20), (2999, 3002), (3000, 3000), (8999, 1)):
        assert np.array_equal(stream.read(begin, count), tokens[begin:begin + count])


@pytest.mark.parametrize("rung", SHARED)
def test_the_official_fetch_gets_every_shard_that_the_run_reads(rung):
    module = load(rung)
    cfg = module.parse_options([])
    shards = int(module.fetch_command(cfg).split()[-1])
    assert (shards - 1) * 1e8 < cfg.steps * 524_288 + 1 <= shards * 1e8 and shards <= 103


@pytest.mark.parametrize("rung", RUNGS)
def test_corpus_runs_train_on_equally_many_tokens(rung):
    assert load(rung).parse_options(["preset=corpus"]).tokens == 119_537_664


@pytest.mark.parametrize("rung", SHARED)
def test_the_schedule_keeps_its_shape_at_other_lengths(rung):
    module = load(rung)
    long, short = module.parse_options([]), module.parse_options(["preset=corpus"])
    for share in (0.1, 0.3, 0.5, 0.7, 0.9, 1):
        a, b = (module.lr_factor(cfg, round(share * (cfg.steps - 1))) for cfg in (long, short))
        assert a == pytest.approx(b, abs=0.03)


@pytest.mark.parametrize("rung", ["20_Sub3Min", "64_ValueOutInit"])
def test_the_fp8_head_is_the_head_up_to_rounding(rung):
    module, draw = load(rung), torch.Generator().manual_seed(0)
    x = torch.nn.functional.rms_norm(torch.randn((64, 32), generator=draw), (32,)).bfloat16().requires_grad_()
    w = (0.05 * torch.randn((96, 32), generator=draw)).bfloat16().requires_grad_()
    targets, weights = torch.randint(0, 96, (64,), generator=draw), torch.tensor((1, 0.5))

    def loss(fp8):
        if rung[:2] == "64":
            return module.HeadLoss.apply(x, w, targets, weights, fp8)
        logits = module.Fp8Linear.apply(x, w) if fp8 else x @ w.t()
        return torch.nn.functional.cross_entropy(30 * torch.sigmoid(logits.float() / 7.5), targets)

    (rough, *rough_grads), (fine, *fine_grads) = ((loss(fp8), *torch.autograd.grad(loss(fp8), (x, w)))
                                                  for fp8 in (True, False))
    assert rough.item() == pytest.approx(fine.item(), rel=1e-3)
    for a, b in zip(rough_grads, fine_grads, strict=True):
        assert (a.float() - b.float()).norm() < 0.1 * b.float().norm()
