"""The model, validation and initial weights against the definition, written again from the description of record
#64 and of what later records added, token by token, without any function of train_gpt.py's model."""
import dataclasses
import math

import pytest
import torch
from conftest import REFERENCE, tables, tiny_config
from test_model import VIEW, model_and_inputs

import train_gpt
from train_gpt import GPT, Trainer, World


def norm(x):
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()


def turned(x, position, freqs):
    """x (D,): channel j turns against channel j + D / 4 by position * freqs[j]."""
    out, quarter = x.clone(), len(freqs)
    for j, freq in enumerate(freqs):
        c, s = math.cos(position * freq), math.sin(position * freq)
        out[j], out[j + quarter] = x[j] * c + x[j + quarter] * s, x[j + quarter] * c - x[j] * s
    return out


def corrections(x, w_in, w_out):
    hidden = x @ w_in.t()
    return 0.1 * (hidden * 0.5 * (1 + torch.erf(hidden / 2 ** 0.5))) @ w_out.t()


def attention(x, model, index, layer, value, extra, excluded, documents, window, freqs, scale):
    """One layer's heads, one query at a time; a paired layer's row 2t + p holds the p-th half of token t's heads."""
    shape, small = model.shape, train_gpt.unpack(model.small, model.small_shapes)
    slot, (heads, head_dim) = shape.attn_layers.index(index), (shape.heads, shape.head_dim)
    s_in, s_out = small["attn_lambdas"][slot]
    w_q, w_k = model.qk_bank[slot * heads:(slot + 1) * heads].reshape(2, heads * head_dim, shape.dim)
    w_v, w_o = model.vo_bank[2 * slot:2 * slot + 2]
    q, k, v = ((x @ (s_in * w).t()).view(len(x), heads, head_dim) for w in (w_q, w_k, w_v))
    if layer.value_embed:
        table = shape.value_layers.index(index)
        amount = 2 * torch.sigmoid(x[:, :12] @ small["value_gates"][table].t())
        v = v + amount[:, :, None] * value.view(len(x), heads, head_dim)
    v = v + extra.view(v.shape)
    halves = 2 if layer.paired else 1
    rows = [(t, half) for t in range(len(x)) for half in range(halves)]
    width, out = heads // halves, torch.zeros(len(x), heads, head_dim, dtype=x.dtype)
    for h in range(width):
        pick = [half * width + h for _, half in rows]
        queries = [turned(norm(q[t, n]), i, freqs) for i, ((t, _), n) in enumerate(zip(rows, pick, strict=True))]
        keys = [turned(norm(k[t, n]), i, freqs) for i, ((t, _), n) in enumerate(zip(rows, pick, strict=True))]
        if layer.key_offset:
            keys = [torch.cat((key[:head_dim // 2], keys[max(i - 1, 0)][head_dim // 2:])) for i, key in enumerate(keys)]
        for i, (t, _) in enumerate(rows):
            seen = [j for j in range(max(0, i - window), i + 1) if documents[rows[j][0]] == documents[t]]
            weights = torch.stack([queries[i] @ keys[j] * scale for j in seen]).softmax(0)
            out[t, pick[i]] = sum(w * v[rows[j][0], pick[j]] for w, j in zip(weights, seen, strict=True))
    out = out * torch.sigmoid(x[:, :12] @ small["attn_gates"][slot].t())[:, :, None]
    if layer.exclusive:
        for t in range(len(x)):
            for h in range(heads):
                along = out[t, h] @ v[t, h] / (v[t, h] @ v[t, h])
                out[t, h] -= torch.tanh(excluded[t, h]) * along * v[t, h]
    return out.flatten(1) @ (s_out * w_o).t()


def reference(model, tokens, documents, freqs, view):
    shape, small = model.shape, train_gpt.unpack(model.small, model.small_shapes)
    embedded = model.head[tokens]
    smear = small["smear_lambda"] * torch.sigmoid(embedded[:, :12] @ small["smear_gate"])
    x = x0 = norm(torch.stack([e + (smear[t] * embedded[t - 1] if t else 0) for t, e in enumerate(embedded)]))
    ids = model.kinds[tokens].tolist()
    hashed = [shape.bigram_rows - 1] + [(36313 * b ^ 27191 * a) % (shape.bigram_rows - 1)
                                        for a, b in zip(ids, ids[1:], strict=False)]
    signs = [((30011 * a ^ 48271 * b) % 2 ** 32) % len(model.signs) for a, b in zip([0, *ids], ids, strict=False)]
    bigram = model.bigram_embed[hashed] * model.signs[signs]
    x, outputs, tables = x + small["bigram_lambdas"][0] * bigram, [], []
    for i, layer in enumerate(shape.layers):
        h = norm(outputs[layer.reads] if layer.reads is not None else x)
        own = corrections(h, small["mix_in"][i], small["mix_out"][i])
        if layer.mixes is not None:
            old, (w_in, w_out) = outputs[layer.mixes], (small["layer_mix_in"][0], small["layer_mix_out"][0])
            by = [column[:, None] for column in corrections(norm(x), w_in, w_out).unbind(1)]
            extra = by[0] * x0 + by[1] * old + by[2] * x
            x = (1 + by[3]) * x + by[4] * x0 + by[5] * old
        x = (small["resid_lambdas"][i] * x + (small["x0_lambdas"][i] + own[:, :1]) * x0
             + (small["bigram_lambdas"][i + 1] + own[:, 1:2]) * bigram)
        if layer.window:
            value = model.value_embeds[len(tables) * shape.vocab + tokens] if layer.value_embed else None
            tables += [value] if layer.value_embed else []
            window = {"short": view.short, "long": view.long}[layer.window]
            added = extra if layer.mixes is not None else torch.zeros_like(x)
            y = attention(h, model, i, layer, value, added, own[:, 2:], documents, window, freqs, view.scale)
            x = x + y if layer.mixes is None else (1 + by[6]) * x + (1 + by[7]) * y + by[8] * x0 + by[9] * bigram
        y = (norm(x) @ model.mlp_bank[2 * i].t()).clamp_min(0) ** 2 @ model.mlp_bank[2 * i + 1]
        x = x + y if layer.mixes is None else (1 + by[10]) * x + (1 + by[11]) * y
        outputs.append(x)
    sources = [x0, *(y for y, layer in zip(outputs, shape.layers, strict=True) if layer.final is not None), *tables]
    own = corrections(norm(x), small["final_in"], small["final_out"])
    out, width, groups = x.clone(), shape.dim // shape.mix_groups, shape.mix_groups
    for k, source in enumerate(sources):
        for g in range(groups):
            channels = slice(g * width, (g + 1) * width)
            factor = small["final_lambdas"][k] + own[:, k * groups + g]
            out[:, channels] += factor[:, None] * source[:, channels]
    return norm(out)


def test_the_forward_pass_is_its_description():
    model, tokens, table, rotary = model_and_inputs(total=24)
    with torch.no_grad():
        model.small.add_(0.3 * torch.randn(len(model.small), generator=torch.Generator().manual_seed(2)))
        table = torch.tensor([0, 10, 11, 24, 24], dtype=torch.int32)
        documents = [0] * 10 + [1] + [2] * 13
        freqs, _ = train_gpt.yarn(dataclasses.replace(train_gpt.Config(), shape=model.shape), 0)
        ours = model(tokens[:-1], table, 24, *rotary, VIEW)
        theirs = reference(model, tokens[:-1].long(), documents, freqs, VIEW)
    assert (ours - theirs).norm() / theirs.norm() < 1e-5  # the rotary tables' angles are float32


def test_validation_is_the_mean_next_token_loss_with_the_last_window(shards):
    cfg = tiny_config(shards, dtype="float64")
    world = World(0, 1, torch.device("cpu"))
    trainer, validation = Trainer(cfg, world), train_gpt.read_validation(cfg, world)
    trainer.reset(0)
    for step, stage, view in ((0, 0, train_gpt.stage_view(cfg, 0)), (cfg.total_steps, 3, train_gpt.stage_view(
            cfg, 3)._replace(long=cfg.final_window))):
        losses, value = [], trainer.evaluate(step, validation)
        for tokens, table in validation.slices:
            with torch.no_grad():
                x = trainer.model(tokens[:-1], table, 60, *trainer.rotary[stage], view)
                z = 23 / (1 + torch.exp(-(x @ trainer.model.head.t() + 5) / 7.5))
            losses += (z.logsumexp(1) - z[range(len(z)), tokens[1:].long()]).tolist()
        assert len(losses) == cfg.val_tokens and value == pytest.approx(sum(losses) / len(losses), rel=1e-9)


def test_initial_weights_have_the_records_scales():
    model = GPT(train_gpt.SMOKE_SHAPE, torch.float32, REFERENCE, tables(train_gpt.SMOKE_SHAPE.vocab))
    model.init_weights(0)
    deviation = 0.5 / 128 ** 0.5
    assert model.qk_bank[:6].std().item() == pytest.approx(deviation, rel=0.02) and not model.qk_bank[6:].any()
    assert model.vo_bank[:6].std().item() == pytest.approx(deviation, rel=0.02) and not model.vo_bank[6:].any()
    assert model.mlp_bank[::2].std().item() == pytest.approx(deviation, rel=0.02)
    assert model.mlp_bank[1::2].abs().max() == 0 and model.bigram_embed.abs().max() == 0
    assert model.value_embeds.std().item() == pytest.approx(0.01, rel=0.02)
    assert model.head.std().item() == pytest.approx(0.005, rel=0.02)
    small = train_gpt.unpack(model.small, model.small_shapes)
    assert small["resid_lambdas"].tolist() == pytest.approx([1.1] * 4)
    assert small["final_lambdas"].tolist() == [0, -0.5, 0, 0]
    for name in ("mix_in", "layer_mix_in", "final_in"):
        assert small[name].std().item() == pytest.approx(128 ** -0.5 / 3 ** 0.5, rel=0.02)
    zeros = ("mix_out", "layer_mix_out", "final_out", "x0_lambdas", "attn_gates", "value_gates")
    assert not any(small[name].any() for name in zeros)
    assert small["attn_lambdas"].tolist() == [[0.5, 1.0]] * 3
    assert small["bigram_lambdas"].tolist() == pytest.approx([0.1] * 5)
