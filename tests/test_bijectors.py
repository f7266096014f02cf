from __future__ import annotations

import pytest
import torch
from cases import (
    BIJECTORS,
    DIMS,
    WITHOUT_LENGTHS,
    alternate,
    build_bijector,
    code,
    enumerate_all,
    randomize,
)
from torch import nn

from dflow.bijectors import Autoregressive, Chain, Coupling, Inverse, Permute, Reverse
from dflow.core import Context, Elementwise
from dflow.elementwise import ModAffine, ModRank, ModShift
from dflow.nn.made import MADE
from dflow.ops.modular import one_hot

every = pytest.mark.parametrize(("name", "K"), [(name, K) for name in BIJECTORS for K in DIMS])
each = pytest.mark.parametrize("name", BIJECTORS)


@every
def test_permutation_with_exact_inverse(name, K):
    bijector, x = build_bijector(name, K), enumerate_all(K, DIMS[K])
    z, log_det = bijector.forward(x)
    assert z.dtype == torch.int64
    assert torch.equal(code(z, K).sort().values, torch.arange(len(x)))
    assert torch.equal(log_det, torch.zeros_like(log_det))
    assert log_det.shape == (len(x),)
    back, log_det = bijector.inverse(z)
    assert torch.equal(back, x)
    assert torch.equal(log_det, torch.zeros_like(log_det))
    assert torch.equal(bijector.forward(bijector.inverse(x)[0])[0], x)


@every
def test_modes_agree(name, K):
    bijector, x = build_bijector(name, K), enumerate_all(K, DIMS[K])
    rows = one_hot(x, K, torch.float64)
    for move in (bijector.forward, bijector.inverse):
        found, log_det = move(rows)
        assert torch.equal(found, one_hot(move(x)[0], K, torch.float64))
        assert torch.equal(log_det, torch.zeros(len(x), dtype=torch.float64))


@every
def test_gradients_reach_the_data_and_every_parameter(name, K):
    bijector, x = build_bijector(name, K), enumerate_all(K, DIMS[K])
    weights = torch.randn(len(x), DIMS[K], K, generator=torch.Generator().manual_seed(0)).double()
    for move in (bijector.forward, bijector.inverse):
        bijector.zero_grad()
        rows = one_hot(x, K, torch.float64).requires_grad_()
        (move(rows)[0] * weights).sum().backward()
        for parameter_name, parameter in (*bijector.named_parameters(), ("x", rows)):
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.isfinite().all()
            assert parameter.grad.abs().sum() > 0, parameter_name


@each
def test_absent_entries_stay_and_influence_nothing(name):
    K, dim = 3, DIMS[3]
    bijector, x = build_bijector(name, K), enumerate_all(K, dim)
    if name in WITHOUT_LENGTHS:
        with pytest.raises(ValueError, match="absent"):
            bijector.forward(x, Context(lengths=torch.full((len(x),), 2)))
        return
    for T in range(dim + 1):
        context = Context(lengths=torch.full((len(x),), T))
        z, _ = bijector.forward(x, context)
        assert torch.equal(z[:, T:], x[:, T:])
        # Rows that share their first T entries share the first T latents.
        first = code(x[:, :T], K) * K ** (dim - T)
        assert torch.equal(z[:, :T], z[first][:, :T])
        assert torch.equal(bijector.inverse(z, context)[0], x)
        assert len(code(z, K).unique()) == len(x)
    # Rows of all lengths in one batch.
    context = Context(lengths=torch.arange(len(x)) % (dim + 1))
    z, _ = bijector.forward(x, context)
    assert torch.equal(bijector.inverse(z, context)[0], x)
    rows = one_hot(x, K, torch.float64)
    assert torch.equal(bijector.forward(rows, context)[0], one_hot(z, K, torch.float64))
    assert torch.equal(bijector.inverse(one_hot(z, K, torch.float64), context)[0], rows)


@each
def test_full_lengths_are_no_lengths(name):
    K, dim = 5, DIMS[5]
    bijector, x = build_bijector(name, K), enumerate_all(K, dim)
    full = Context(lengths=torch.full((len(x),), dim))
    assert torch.equal(bijector.forward(x, full)[0], bijector.forward(x)[0])


@each
def test_state_survives_saving(name):
    one, other = build_bijector(name, 6), build_bijector(name, 6)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    # A buffer left out of the state comes back as garbage where a loader builds on the meta device.
    assert {name for name, _ in one.named_buffers()} <= set(one.state_dict())
    other.load_state_dict(one.state_dict())
    x = enumerate_all(6, DIMS[6])
    assert torch.equal(one.forward(x)[0], other.forward(x)[0])


def test_training_mode_changes_nothing():
    bijector, x = build_bijector("chain", 6), enumerate_all(6, DIMS[6])
    z = bijector.train().forward(x)[0]
    assert torch.equal(bijector.eval().forward(x)[0], z)


class Counted(nn.Module):
    """Counts the sequential calls of a net."""

    def __init__(self, net):
        super().__init__()
        self.net, self.calls = net, 0

    def forward(self, x, context=None):
        self.calls += 1
        return self.net(x, context)

    def start(self, batch, context=None):
        return self.net.start(batch, context)

    def step(self, x_prev, state):
        self.calls += 1
        return self.net.step(x_prev, state)


def test_num_calls_is_what_an_inverse_takes():
    chain = build_bijector("chain", 5)
    counters = []
    for module in list(chain.modules()):
        if isinstance(module, (Coupling, Autoregressive)):
            module.net = Counted(module.net)
            counters.append(module.net)
    x = enumerate_all(5, DIMS[5])
    for bijector, move in ((chain, chain.inverse), (Inverse(chain), chain.forward)):
        for counter in counters:
            counter.calls = 0
        move(x)
        assert bijector.num_calls == sum(counter.calls for counter in counters)
    assert chain.num_calls == 1 + (DIMS[5] + 1) + 0 + 1 + 1
    assert Reverse().num_calls == Permute(torch.arange(2)).num_calls == Inverse(Reverse()).num_calls == 0
    assert Inverse(Inverse(chain)).num_calls == chain.num_calls


class Sloppy(MADE):
    """A cached path that disagrees with the parallel one now and then, as rounding makes it."""

    def step(self, x_prev, state):
        params = super().step(x_prev, state)
        noise = torch.randn(params.shape, generator=self.generator, dtype=params.dtype)
        return params + self.amount * noise


@pytest.mark.parametrize("family", [ModShift, ModAffine, ModRank])
@pytest.mark.parametrize("amount", [0.05, 100.0])
def test_inverse_is_exact_whatever_the_cached_path_says(family, amount):
    K, dim = 5, 5
    net = randomize(Sloppy(dim, K, family(K).num_params, [16]))
    net.generator, net.amount = torch.Generator().manual_seed(0), amount
    bijector, x = Autoregressive(family(K), net, dim), enumerate_all(K, dim)
    z, _ = bijector.forward(x)
    assert torch.equal(bijector.inverse(z)[0], x)


def test_inverse_refuses_a_net_that_changes_its_mind():
    class Restless(MADE):
        def forward(self, x, context=None):
            return torch.randn(*x.shape[:2], self.num_params)

    torch.manual_seed(0)
    bijector = Autoregressive(ModShift(5), Restless(4, 5, 5, [8]), 4)
    with pytest.raises(RuntimeError, match="eval"):
        bijector.inverse(enumerate_all(5, 4))


def test_inverse_stops_at_the_longest_sequence():
    net = Counted(randomize(MADE(6, 3, 3, [8])))
    bijector = Autoregressive(ModShift(3), net, 6)
    x = torch.tensor([[1, 2, 0, 0, 0, 0], [2, 2, 1, 0, 0, 0]])
    z, _ = bijector.forward(x, Context(lengths=torch.tensor([2, 3])))
    net.calls = 0
    assert torch.equal(bijector.inverse(z, Context(lengths=torch.tensor([2, 3])))[0], x)
    assert net.calls == 3 + 1
    empty = x[:0]
    assert bijector.inverse(empty, Context(lengths=torch.zeros(0, dtype=torch.int64)))[0].shape == (0, 6)


@pytest.mark.parametrize("name", [name for name in BIJECTORS if name.startswith("autoregressive")])
@pytest.mark.parametrize("K", [2, 5, 6])
def test_jacobi_and_loop_invert_alike(name, K):
    bijector, z = build_bijector(name, K), enumerate_all(K, DIMS[K])
    lengths = Context(lengths=torch.arange(len(z)) % (DIMS[K] + 1))
    for context in (None, lengths):
        found = {}
        for inversion in ("loop", "jacobi"):
            bijector.inversion, bijector.calls = inversion, 0
            found[inversion] = bijector.inverse(z, context)[0]
            assert 1 <= bijector.calls <= bijector.num_calls
        assert torch.equal(found["loop"], found["jacobi"])
        assert torch.equal(bijector.forward(found["jacobi"], context)[0], z)


class Previous(nn.Module):
    """Shifts by the symbol before, times ``factor``, plus ``offset``."""

    def __init__(self, factor, offset):
        super().__init__()
        self.factor, self.offset = factor, offset

    def forward(self, x, context=None):
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        return one_hot((self.factor * before + self.offset) % 7, 7)


@pytest.mark.parametrize(
    ("factor", "offset", "calls"),
    [
        (0, 0, 1),  # the identity: the start is right, and one call says so
        (0, 3, 2),  # a net that ignores its input: one call, and one that verifies
        (1, 0, 6),  # x is constant from its first entry on, which is right from the start
        (1, 1, 7),  # every entry waits for the one before
    ],
)
def test_jacobi_counts_its_calls(factor, offset, calls):
    bijector = Autoregressive(ModShift(7), Previous(factor, offset), 6, "jacobi")
    z = torch.tensor([[1, 0, 0, 0, 0, 0]])
    x, _ = bijector.inverse(z)
    assert bijector.calls == calls
    assert torch.equal(bijector.forward(x)[0], z)
    bijector.inverse(z)
    assert bijector.calls == 2 * calls
    assert bijector.num_calls == 7
    with pytest.raises(ValueError, match="'loop' or 'jacobi', found 'newton'"):
        Autoregressive(ModShift(7), nn.Identity(), 6, "newton")


def test_a_coupling_shows_its_net_the_known_entries_only():
    seen = []

    class Spy(nn.Module):
        def forward(self, x, context=None):
            seen.append((x, context))
            return torch.zeros(x.shape[0], 2, 5)

    mask = torch.tensor([True, False, False, True, False])
    hidden = torch.tensor([False, True, False, False, True])
    coupling = Coupling(ModShift(5), Spy(), mask, hidden)
    x, context = torch.tensor([[4, 3, 2, 1, 0]]), Context(given=(torch.tensor([[1.0, 2.0]]),))
    coupling.forward(x, context)
    assert seen[0][0].tolist() == [[4, 1]]
    assert seen[0][1] is context
    assert coupling.known_index.tolist() == [0, 3]
    assert coupling.hidden_index.tolist() == [1, 4]
    assert coupling.params(x).shape == (1, 2, 5)


@pytest.mark.parametrize("name", ["coupling rank", "autoregressive affine"])
def test_mixed_precision_changes_no_parameter(name):
    bijector = build_bijector(name, 9).float()
    x = enumerate_all(9, DIMS[9])
    expected, params = bijector.forward(x)[0], bijector.params(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bijector.params(x), params)
        assert torch.equal(bijector.forward(x)[0], expected)
        assert torch.equal(bijector.forward(one_hot(x, 9))[0], one_hot(expected, 9))
        assert torch.equal(bijector.inverse(expected)[0], x)


def test_permute_and_reverse():
    x = torch.tensor([[10, 11, 12, 13]])
    permutation = torch.tensor([1, 0, 3, 2])
    assert Permute(permutation).forward(x)[0].tolist() == [[11, 10, 13, 12]]
    assert Reverse().forward(x, Context(lengths=torch.tensor([3])))[0].tolist() == [[12, 11, 10, 13]]
    # This permutation keeps the first two among themselves, but not the first one or three.
    assert Permute(permutation).forward(x, Context(lengths=torch.tensor([2])))[0].tolist() == [
        [11, 10, 13, 12]
    ]
    with pytest.raises(ValueError, match=r"lengths \[1\]"):
        Permute(permutation).forward(x, Context(lengths=torch.tensor([1])))


def test_chain_is_a_sequence():
    parts = [Reverse(), build_bijector("coupling shift", 3)]
    chain = Chain(parts)
    assert len(chain) == 2
    assert list(chain) == parts
    assert chain[1] is parts[1]


def test_arguments_are_checked():
    net, mask = nn.Identity(), alternate(4)
    line = torch.ones(4, dtype=torch.bool)
    for bad in (mask.long(), mask[None], line, ~line):
        with pytest.raises(ValueError, match="at least one True"):
            Coupling(ModShift(3), net, bad)
    with pytest.raises(ValueError, match=r"\[0, 2\] are known and hidden"):
        Coupling(ModShift(3), net, mask, mask)
    with pytest.raises(ValueError, match="4 entries, hidden 5"):
        Coupling(ModShift(3), net, mask, alternate(5))
    coupling = build_bijector("coupling shift", 3, 4)
    with pytest.raises(ValueError, match="expected 4 entries"):
        coupling.forward(torch.zeros(1, 5, dtype=torch.int64))
    coupling.elementwise = ModAffine(3)
    with pytest.raises(ValueError, match="the net gave params"):
        coupling.forward(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="dim"):
        Autoregressive(ModShift(3), net, 0)
    with pytest.raises(ValueError, match="expected 5 entries"):
        build_bijector("autoregressive shift", 3, 5).forward(torch.zeros(1, 4, dtype=torch.int64))
    for bad in ([0, 0], [1, 2], [[0, 1]]):
        with pytest.raises(ValueError, match="not a permutation"):
            Permute(torch.tensor(bad))
    with pytest.raises(ValueError, match="expected 2 entries"):
        Permute(torch.tensor([1, 0])).forward(torch.zeros(1, 3, dtype=torch.int64))


class Stretch(Elementwise):
    """A family on the reals, to hold the layers to what they promise beyond Z/K."""

    num_params = 2

    def forward(self, x, params):
        return x * params[..., 0].exp() + params[..., 1], params[..., 0]

    def inverse(self, z, params):
        return (z - params[..., 1]) * (-params[..., 0]).exp(), -params[..., 0]


class Lower(nn.Module):
    """A sequence net on reals."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, dim, dim))

    def forward(self, x, context=None):
        return torch.einsum("bj,pij->bip", torch.sin(x), self.weight.tril(-1))


class Plain(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, dim // 2, dim - dim // 2))

    def forward(self, x, context=None):
        return torch.einsum("bj,pij->bip", torch.sin(x), self.weight)


@pytest.mark.parametrize("kind", ["coupling", "autoregressive"])
def test_layers_on_reals_have_the_log_det_of_autodiff(kind):
    dim = 5
    layer = (
        Coupling(Stretch(), Plain(dim), alternate(dim))
        if kind == "coupling"
        else Autoregressive(Stretch(), Lower(dim), dim)
    )
    layer = randomize(Chain([layer, Reverse()]))
    x = torch.randn(3, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for context in (None, Context(lengths=torch.tensor([5, 3, 0]))):
        z, log_det = layer.forward(x, context)
        jacobian = torch.autograd.functional.jacobian(lambda x, c=context: layer.forward(x, c)[0].sum(0), x)
        expected = [torch.linalg.slogdet(jacobian[:, b]).logabsdet for b in range(3)]
        torch.testing.assert_close(log_det, torch.stack(expected))
        assert log_det.abs().max() > 0.1
        back, back_log_det = layer.inverse(z, context)
        torch.testing.assert_close(back, x)
        torch.testing.assert_close(back_log_det, -log_det)
    assert log_det[2].item() == 0
    assert torch.equal(z[1, 3:], x[1, 3:])
