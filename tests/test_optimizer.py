"""The optimizer's mathematics, and its books."""
import pytest
import torch
from conftest import REFERENCE, tables, tiny_config

import train_gpt
from train_gpt import Optimizer, World
from triton_kernels import orthogonalise_reference

ALONE = World(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 48, 16), (2, 16, 48)])
def test_polar_express_gives_singular_values_near_one(shape):
    torch.manual_seed(0)
    out = orthogonalise_reference(torch.randn(shape, dtype=torch.float64))
    values = torch.linalg.svdvals(out)
    assert values.min() > 0.85 and values.max() < 1.15
    u, _, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    assert (orthogonalise_reference(u @ vh) - u @ vh).norm() / (u @ vh).norm() < 0.1


@pytest.mark.parametrize("shape", [(2, 24, 8), (2, 8, 24), (2, 8, 8)])
def test_normuon_keeps_the_frobenius_norm_and_evens_out_the_rows(shape):
    torch.manual_seed(0)
    g = torch.randn(shape, dtype=torch.float64)
    g[:, 0] *= 30
    momentum, (n, rows, cols) = torch.zeros_like(g), shape
    second = torch.zeros((n, rows, 1) if rows >= cols else (n, 1, cols), dtype=torch.float64)
    mu = torch.tensor(0.9, dtype=torch.float64)
    update = train_gpt.normuon_direction(g, momentum, second, mu, 0.95, orthogonalise_reference)
    plain = orthogonalise_reference(g * (1 - mu) * (1 + mu))  # the first Nesterov step
    assert torch.allclose(update.norm(dim=(1, 2)), plain.norm(dim=(1, 2)), rtol=1e-6)
    assert torch.allclose(momentum, 0.1 * g)
    sizes = update.norm(dim=-1 if rows >= cols else -2)
    assert (sizes.amax(1) / sizes.amin(1)).max() < 1.0001  # after one step the running mean is this step's


def test_weights_decay_only_where_the_update_agrees_in_sign():
    torch.manual_seed(0)
    p, g = torch.randn(2, 8, 8), torch.randn(2, 8, 8)
    buffers = [torch.zeros(2, 8, 8), torch.zeros(2, 8, 1)]
    update = train_gpt.normuon_direction(g, *[b.clone() for b in buffers], torch.tensor(0.9), 0.95,
                                         orthogonalise_reference)
    out, lr, decay = p.clone(), torch.full((2, 1, 1), 0.1), torch.full((2, 1, 1), 0.01)
    train_gpt.normuon_step(out, g, *buffers, None, lr, decay, torch.tensor(0.9), orthogonalise_reference)
    expected = p - 0.1 * update - torch.where(update * p >= 0, 0.01 * p, 0.0)
    assert torch.allclose(out, expected, atol=1e-6)


def test_the_mantissa_side_car_makes_bfloat16_weights_float32():
    torch.manual_seed(0)
    x = torch.randn(1000) * 10.0 ** torch.randint(-20, 20, (1000,))
    high, low = train_gpt.split_float(x)
    assert high.dtype == torch.bfloat16 and low.dtype == torch.int16
    assert torch.equal(train_gpt.join_float(high, low), x)


def test_a_bfloat16_bank_follows_the_float32_bank_over_many_small_steps():
    torch.manual_seed(0)
    start = torch.randn(1, 8, 8).bfloat16()
    wide, narrow, low = start.float(), start.clone(), torch.zeros(1, 8, 8, dtype=torch.int16)
    buffers = [(torch.zeros(1, 8, 8), torch.zeros(1, 8, 1)) for _ in range(2)]
    lr, mu = torch.full((1, 1, 1), 1e-4), torch.tensor(0.9)
    for _ in range(50):
        g = torch.randn(1, 8, 8).bfloat16().float()
        update = train_gpt.normuon_direction(g, *buffers[0], mu, 0.9, orthogonalise_reference)
        wide -= lr * update
        train_gpt.normuon_step(narrow, g, *buffers[1], low, lr, 0 * lr, mu, orthogonalise_reference)
    assert torch.allclose(train_gpt.join_float(narrow, low), wide, atol=1e-6)


def test_the_running_mean_of_the_rows_remembers_19_parts_in_20():
    torch.manual_seed(0)
    momentum, second, mu = torch.zeros(1, 24, 8), torch.full((1, 24, 1), 7.0), torch.tensor(0.0)
    g = torch.randn(1, 24, 8)
    train_gpt.normuon_direction(g, momentum, second, mu, 0.95, orthogonalise_reference)
    power = orthogonalise_reference(g).square().mean(-1, keepdim=True)
    assert torch.allclose(second, 0.95 * 7 + 0.05 * power, rtol=1e-5)


def test_small_parameters_take_their_rows_rates(shards):
    """Adam's first step moves every element by its learning rate, whatever the gradient."""
    model, optimizer = optimizer_with_grads(shards, 1)
    before = train_gpt.unpack(model.small.data.clone(), model.small_shapes)
    optimizer.step(1)
    after = train_gpt.unpack(model.small.data, model.small_shapes)
    rate = optimizer.cfg.lr_adam * train_gpt.lr_factor(optimizer.cfg, 1)
    for name, row in train_gpt.SMALL_PARAMS.items():
        moved = (after[name] - before[name]).abs()
        expected = torch.full_like(moved, rate * row.lr_mul[0])
        assert torch.allclose(moved, expected, rtol=0.01), name


def test_adam_is_torchs_adam_without_decay():
    torch.manual_seed(0)
    p, q = torch.nn.Parameter(torch.randn(5, 3)), torch.randn(5, 3)
    q.copy_(p.data)
    theirs = torch.optim.Adam([p], lr=0.01, betas=(0.7, 0.95), eps=1e-10)
    m, v = torch.zeros_like(q), torch.zeros_like(q)
    for count in range(1, 6):
        p.grad = torch.randn(5, 3)
        train_gpt.adam_step(q, p.grad, m, v, torch.tensor(float(count)), torch.tensor(0.01), torch.tensor(0.0), 0.7,
                            0.95)
        theirs.step()
    assert torch.allclose(p.data, q, rtol=1e-5, atol=1e-7)


def test_adam_decays_only_where_the_update_agrees_in_sign():
    torch.manual_seed(0)
    start, g = torch.randn(50, 3), torch.randn(50, 3)

    def step(decay):
        p, m, v = start.clone(), torch.zeros(50, 3), torch.zeros(50, 3)
        train_gpt.adam_step(p, g, m, v, torch.tensor(1.0), torch.tensor(0.01), torch.tensor(decay), 0.7, 0.95)
        return p

    agrees = g * start > 0  # the first update has the gradient's sign
    assert agrees.any() and not agrees.all()
    assert torch.allclose(step(0.1), step(0.0) - 0.1 * start * agrees, atol=1e-6)


def optimizer_with_grads(shards, step):
    cfg = tiny_config(shards)
    model = train_gpt.GPT(cfg.shape, torch.float32, REFERENCE, tables(cfg.shape.vocab))
    model.init_weights(0)
    optimizer = Optimizer(model, cfg, ALONE, compiled=False)
    torch.manual_seed(step)
    for name, p in model.named_parameters():
        if name in optimizer.sums:
            optimizer.sums[name].normal_()
        else:
            p.grad = torch.randn_like(p)
    return model, optimizer


def test_adams_parameters_move_on_odd_steps_and_keep_their_gradient_on_even_ones(shards):
    for step in (0, 1):
        model, optimizer = optimizer_with_grads(shards, step)
        before = {name: p.data.clone() for name, p in model.named_parameters()}
        optimizer.step(step)
        for name, p in model.named_parameters():
            moves = train_gpt.PARAMS[name].algorithm == "normuon" or step % 2 == 1
            assert torch.equal(p.data, before[name]) != moves, name
            gradient = optimizer.gradient(name)
            assert (gradient is None or not gradient.any()) == moves, name


def test_each_matrix_of_a_bank_has_its_rate(shards):
    """Up 1 and down 2, times sqrt(rows / columns); padding matrices, whose gradient is zero, stay zero."""
    model, optimizer = optimizer_with_grads(shards, 0)
    model.mlp_bank.data.zero_()
    model.mlp_bank.grad[1] = model.mlp_bank.grad[0]
    model.vo_bank.grad[6:] = 0
    model.vo_bank.data[6:] = 0
    optimizer.step(0)
    up, down = model.mlp_bank.data[:2].norm(dim=(1, 2))
    assert down / up == pytest.approx(2, rel=1e-5)
    assert model.vo_bank.data[6:].abs().max() == 0


def test_each_of_8_processes_has_the_rates_of_its_own_matrices():
    """The official bank of 24 gives each of 8 processes 3 matrices: up and down alternate across the borders."""
    shape, row = (24, 3072, 768), train_gpt.PARAMS["mlp_bank"]
    rates = []
    for rank in range(8):
        books = Optimizer.__new__(Optimizer)
        books.world = World(rank, 8, torch.device("cpu"))
        books.params = {"mlp_bank": torch.nn.Parameter(torch.empty(shape, device="meta"))}
        own = books.own("mlp_bank")
        books.own = lambda name, own=own: torch.empty(own.shape)
        rates.append(books.new_rates("mlp_bank").flatten())
    assert torch.equal(torch.cat(rates), 2 * torch.tensor(row.lr_mul).repeat(12))


def test_every_reduction_and_gather_is_waited_for(shards):
    waited = []

    class Handle:
        def __init__(self, what):
            self.what = what

        def wait(self):
            waited.append(self.what)

    class Recorder(World):
        def reduce_scatter(self, full):
            return full, Handle("reduce")

        def all_reduce(self, full):
            return full, Handle("reduce")

        def all_gather(self, full):
            return Handle("gather")

    model, optimizer = optimizer_with_grads(shards, 1)
    optimizer.world = Recorder(*ALONE)
    optimizer.step(1)
    banks = len(train_gpt.PARAMS) - 1  # the packed small parameters are replicated: nothing to gather
    assert waited.count("reduce") == banks + 1 and waited.count("gather") == banks


def test_the_tables_cover_every_parameter_once(shards):
    cfg = tiny_config(shards)
    for shape in (cfg.shape, train_gpt.SMOKE_SHAPE):
        model = train_gpt.GPT(shape, torch.float32, REFERENCE, tables(shape.vocab))
        assert set(train_gpt.PARAMS) == {name for name, _ in model.named_parameters()}
        assert list(train_gpt.SMALL_PARAMS) == list(model.small_shapes)
