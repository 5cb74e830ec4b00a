"""Stages, rates and windows over the run; what the loader yields."""
import dataclasses

import numpy as np
import pytest
import torch
from conftest import random_stream, tiny_config, write_shard

import train_gpt
from train_gpt import BOS, Config, DocumentStream, World

ALONE = World(0, 1, torch.device("cpu"))


def test_the_official_schedule_is_record_64s_with_the_cooldown_of_records_72_and_73():
    cfg = Config()
    assert train_gpt.stage_ends(cfg) == [504, 1010, 1394, 1555]
    assert [train_gpt.lr_factor(cfg, s) for s in (0, 606, 909, 1009, 1212, 1515, 1554)] == pytest.approx(
        [1.0, 1.52, 1.0633, 0.9126, 0.6767, 0.15, 0.15], abs=1e-3)
    assert [train_gpt.momentum(cfg, s) for s in (0, 150, 300, 1505, 1530, 1555)] == pytest.approx(
        [0.85, 0.90, 0.95, 0.95, 0.90, 0.85])


def test_the_corpus_schedule_is_the_yardsticks():
    cfg = train_gpt.parse_options(["preset=corpus"])
    assert train_gpt.stage_ends(cfg) == [148, 296, 408, 452] and cfg.total_steps == 452
    assert [stage.tokens for stage in cfg.stages] == [131_072, 262_144, 393_216, 393_216]


def test_weights_of_further_tokens_and_of_the_prefix_change_linearly_within_a_stage():
    cfg = train_gpt.parse_options(["preset=corpus"])
    weights = {step: train_gpt.target_weights(cfg, step) for step in (0, 74, 148, 222, 296, 444)}
    assert weights == {0: [1, .5, .25, .25], 74: [1, .5, .125, .25], 148: [1, .5, .25], 222: [1, .25, .125],
                       296: [1], 444: [1]}
    assert [train_gpt.stage_view(cfg, stage).prefix for stage in range(4)] == [True, True, False, False]


@pytest.mark.parametrize("steps", range(3, 40))
def test_stages_follow_each_other_and_end_on_even_steps(steps):
    cfg = dataclasses.replace(Config(), steps=steps, extension=5)
    ends = train_gpt.stage_ends(cfg)
    assert ends == sorted(ends) and ends[-1] == steps + 5 and all(end % 2 == 0 for end in ends[:-1])
    stages = [train_gpt.stage_at(cfg, step) for step in range(cfg.total_steps)]
    assert stages == sorted(stages) and stages[-1] == 3


def documents(stream: np.ndarray) -> list[list[int]]:
    starts = np.flatnonzero(stream == BOS)
    return [part.tolist() for part in np.split(stream, starts)[1:]]


@pytest.fixture
def one_shard(tmp_path):
    stream = random_stream(5, 3000)
    return stream, write_shard(tmp_path / "a.bin", stream)


def test_slices_are_whole_documents_in_order_cut_at_the_maximum_and_to_fit(one_shard):
    stream, path = one_shard
    loader, rest = DocumentStream([path]), iter(documents(stream))
    for _ in range(9):
        tokens, starts = loader.take(101, 30)
        expected, expected_starts = [], []
        while len(expected) < 101:
            expected_starts.append(len(expected))
            expected += next(rest)[:30]
        assert tokens.tolist() == expected[:101] and starts.tolist() == expected_starts
        assert all(tokens[starts] == BOS) and tokens.dtype == np.int32


def test_a_dry_run_moves_like_a_real_one(one_shard):
    _, path = one_shard
    wet, dry = DocumentStream([path]), DocumentStream([path])
    for max_doc in (30, 30, 12, 50, 12):
        assert np.array_equal(wet.take(65, max_doc)[1], dry.take(65, max_doc, want=False)[1])
    assert np.array_equal(wet.take(65, 20)[0], dry.take(65, 20)[0])


def test_a_slice_goes_on_in_the_next_shard(tmp_path):
    a, b = random_stream(1, 100), random_stream(2, 400)
    b[:7] = 9  # the rest of a document that began in the first shard
    files = [write_shard(tmp_path / f"{i}.bin", x) for i, x in enumerate((a, b))]
    tokens, starts = DocumentStream(files).take(300, 1000)
    together = [token for document in documents(a) + documents(b) for token in document]
    assert tokens.tolist() == together[:300] and tokens[starts].tolist() == [BOS] * len(starts)


def test_a_document_may_run_on_through_a_whole_shard(tmp_path):
    a, b, c = random_stream(1, 100), np.full(50, 7), random_stream(2, 400)
    files = [write_shard(tmp_path / f"{i}.bin", x) for i, x in enumerate((a, b, c))]
    tokens, _ = DocumentStream(files).take(300, 1000)
    assert tokens.tolist() == [token for document in documents(a) + documents(c) for token in document][:300]


def test_the_stream_ends_with_its_shards(one_shard):
    _, path = one_shard
    loader = DocumentStream([path])
    with pytest.raises(train_gpt.OutOfTokens):
        for _ in range(1000):
            loader.take(101, 1000)


def test_the_plan_counts_shards_tokens_and_documents(shards):
    cfg = tiny_config(shards)
    files = train_gpt.find_shards(cfg, "train_files")
    plan = train_gpt.plan_run(cfg, files)
    loader, most = train_gpt.Loader(cfg, ALONE, files, plan), [0] * 4
    for step in range(cfg.last_step):
        for tokens, table in loader.next():
            total = len(tokens) - 1
            assert table[-1] == total and table[0] == 0 and (table.diff() >= 0).all()
            assert all(tokens[table[table < total].long()] == BOS)
            stage = train_gpt.stage_at(cfg, step)
            most[stage] = max(most[stage], int((table < total).sum()))
    assert plan.tokens == sum(cfg.stages[train_gpt.stage_at(cfg, s)].tokens for s in range(cfg.last_step))
    assert loader.stream.opened == plan.shards
    assert all(seen <= counted <= seen + 1 for seen, counted in zip(most, plan.documents, strict=True))


def test_validation_slices_are_the_stream_in_order_for_any_number_of_processes(shards):
    cfg = tiny_config(shards)
    whole = train_gpt.read_validation(cfg, ALONE)
    stream = torch.cat([tokens[:-1] for tokens, _ in whole.slices])
    assert len(stream) == cfg.val_tokens
    parts = [train_gpt.read_validation(cfg, World(rank, 4, torch.device("cpu"))) for rank in range(4)]
    for index, (tokens, table) in enumerate(whole.slices):
        theirs = parts[index % 4].slices[index // 4]
        assert torch.equal(tokens, theirs.tokens) and torch.equal(table, theirs.cu_seqlens)
        starts = set(table[table < 32].tolist())
        assert starts == {0} | set((tokens[:-1] == BOS).nonzero().flatten().tolist())
