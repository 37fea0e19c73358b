"""What distinguishes the stores: where pairs go, how reads combine, and what equals the single memory."""

import pytest
import torch
import torch.nn.functional as F

from senri.memory import (
    RULES,
    STORES,
    Banks,
    Hierarchical,
    Multi,
    Routed,
    orthogonal_basis,
    read,
    scan,
)

EXACT = {"rtol": 1e-10, "atol": 1e-10}
STEPS, WIDTH = 40, 8  # two query heads a memory: more than 64 queries at once
STORE = {
    "routed": Routed(orthogonal_basis("random", WIDTH), top_k_memories=3),
    "banks": Banks(3, segments_per_bank=2),
    "multi": Multi(3),
    "hierarchical": Hierarchical(3),
}
PAIRS = [(name, rule) for name in STORES for rule in STORES[name].rules]


def inputs(seed=0):
    """Two rows, two memory heads, four query heads; gates of both kinds."""
    draw = torch.Generator().manual_seed(seed)

    def randn(heads, *width):
        return torch.randn(2, STEPS, heads, *width, dtype=torch.float64, generator=draw)

    gates = {"beta": randn(2).sigmoid(), "log_alpha": -randn(2).exp() * 0.1}
    return randn(4, WIDTH), randn(2, WIDTH), randn(2, 5), gates


def gate(name):
    """Of store ``hierarchical``, for the four query heads."""
    return {"expand": torch.linspace(0, 1, 2 * STEPS * 4).view(2, STEPS, 4)} if name == "hierarchical" else {}


@pytest.mark.parametrize("name", STORES)
def test_the_memories_sum_to_the_single_one(name):
    q, k, v, gates = inputs()
    _, single = scan(q, k, v, delay=2, segment_size=3, **gates)
    _, state = scan(q, k, v, delay=2, segment_size=3, store=STORE[name], **gates, **gate(name))
    assert (state.z.sum(-1) > 0).sum() > state.z.shape[0] * state.z.shape[1]  # not all in one
    torch.testing.assert_close(state.M.sum(2), single.M, **EXACT)
    torch.testing.assert_close(state.z.sum(2), single.z, **EXACT)


@pytest.mark.parametrize(
    ("store", "more"),
    [
        (Routed(orthogonal_basis("identity", WIDTH), routing=False), {}),
        (Hierarchical(3), {"expand": torch.zeros(2, STEPS, 4)}),
    ],
)
def test_a_store_that_does_not_expand_reads_as_the_single_one(store, more):
    q, k, v, gates = inputs()
    expected, _ = scan(q, k, v, delay=2, **gates)
    found, _ = scan(q, k, v, delay=2, segment_size=3, store=store, **gates, **more)
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize(
    ("name", "store"),
    [
        ("routed", Routed(torch.ones(1, WIDTH))),
        ("banks", Banks(1)),
        ("multi", Multi(1)),
        ("hierarchical", Hierarchical(1)),
    ],
)
def test_a_store_of_one_memory_is_the_single_one(name, store):
    for rule in store.rules:
        q, k, v, gates = inputs()
        if not RULES[rule].forgets:
            del gates["log_alpha"]
        options = {"rule": rule, "segment_size": 5, "chunk_size": 4}
        expected, single = scan(q, k, v, **gates, **options)
        found, state = scan(q, k, v, store=store, **gates, **gate(name), **options)
        torch.testing.assert_close(found, expected, **EXACT)
        torch.testing.assert_close(state.M[:, :, 0], single.M, **EXACT)


def test_a_query_that_expands_fully_reads_the_fine_memories():
    q, k, v, gates = inputs()
    expected, _ = scan(q, k, v, segment_size=3, store=Multi(3), **gates)
    found, _ = scan(q, k, v, segment_size=3, store=Hierarchical(3), expand=torch.ones(2, STEPS, 4), **gates)
    torch.testing.assert_close(found, expected, **EXACT)


def test_a_key_goes_to_the_memory_of_the_most_similar_basis_vector():
    k = torch.tensor([[3.0, 1, 0, 0], [0, -2, 1, 0], [0, 1, 0, 0], [1, 0, 2, -3]])[None, :, None]
    v = torch.eye(4)[None, :, None]
    _, state = scan(k, k, v, store=Routed(torch.eye(4)))
    held = state.M[0, 0].abs().sum(-1) > 0  # [n, Dv]: whose value is where
    assert held.tolist() == [
        [True, False, False, False],
        [False, True, True, False],
        [False, False, False, False],
        [False, False, False, True],
    ]


def test_a_query_reads_the_most_similar_memories_by_softmax():
    q, k, v, _ = inputs()
    store = STORE["routed"]
    _, state = scan(q, k, v, store=store)
    found = read(q, state, store=store)
    one = q[1, 5, 3]  # query head 3 reads memory head 1
    scores = (store.basis.double() @ one).abs()
    top = scores.topk(3)
    sigma = F.elu(one) + 1
    each = (state.M[1, 1] @ sigma) / (state.z[1, 1] @ sigma).clamp(min=1e-6)[:, None]
    torch.testing.assert_close(found[1, 5, 3], top.values.softmax(0) @ each[top.indices], **EXACT)


@pytest.mark.parametrize(
    ("store", "expected"),
    [
        (Banks(2, segments_per_bank=2), [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]),  # two pairs a segment
        (Multi(3), [0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2]),
        (Hierarchical(2), [0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1]),
    ],
)
def test_memories_take_turns(store, expected):
    q, v = torch.randn(1, 12, 1, 4), torch.eye(12)[None, :, None]
    more = {"expand": torch.ones(1, 12, 1)} if isinstance(store, Hierarchical) else {}
    _, state = scan(q, q, v, segment_size=2, store=store, **more)
    held = state.M[0, 0].abs().sum(-1) > 0  # [n, Dv]
    assert held.int().argmax(0).tolist() == expected
    assert (held.sum(0) == 1).all()


def test_banks_not_begun_do_not_weaken_the_read():
    q, k, v, _ = inputs()
    expected, _ = scan(q[:, :6], k[:, :6], v[:, :6])
    found, _ = scan(q[:, :6], k[:, :6], v[:, :6], segment_size=3, store=STORE["banks"])
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize(("name", "rule"), PAIRS)
def test_reading_alone_is_a_scan_that_writes_nothing(name, rule):
    q, k, v, gates = inputs()
    del gates["log_alpha"]
    options = {"rule": rule, "segment_size": 3, "store": STORE[name], **gate(name)}
    _, state = scan(q, k, v, **gates, **options)
    q, k, v, gates = inputs(seed=1)
    nothing = torch.zeros(2, STEPS, dtype=torch.bool)
    expected, after = scan(q, k, v, state, mask=nothing, **options)
    torch.testing.assert_close(read(q, state, **options), expected, **EXACT)
    torch.testing.assert_close(after.M, state.M, rtol=0, atol=0)
    assert expected.abs().min() > 1e-6


@pytest.mark.parametrize(("name", "rule"), PAIRS)
def test_stretches_without_a_write_are_read_as_they_are(name, rule):
    q, k, v, gates = inputs()
    sparse = torch.zeros_like(gates["beta"])
    sparse[:, [3, 4, 20]] = gates["beta"][:, [3, 4, 20]]
    options = {"rule": rule, "beta": sparse, "chunk_size": 4, "segment_size": 5, "store": STORE[name], **gate(name)}
    expected, state = scan(q, k, v, **options)
    with torch.no_grad():
        found, after = scan(q, k, v, **options)
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(after.M, state.M, **EXACT)


@pytest.mark.parametrize(("name", "rule"), PAIRS)
def test_an_empty_store_reads_as_exact_zeros(name, rule):
    q, k, v, _ = inputs()
    out, state = scan(q, k, v, rule=rule, delay=STEPS, store=STORE[name], **gate(name))
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(state.M, torch.zeros_like(state.M))


@pytest.mark.parametrize(("name", "rule"), PAIRS)
def test_long_streams_in_half_precision_stay_finite(name, rule):
    q = 10 * torch.randn(1, 3_000, 1, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    more = {"expand": torch.rand(1, 3_000, 1)} if name == "hierarchical" else {}
    out, state = scan(q, q, q, rule=rule, segment_size=100, store=STORE[name], **more)
    assert out.dtype == torch.bfloat16
    assert state.M.dtype == torch.float32
    assert out.isfinite().all()
    assert state.M.isfinite().all()


@pytest.mark.parametrize("kind", ["identity", "hadamard", "random"])
def test_a_basis_is_orthonormal(kind):
    basis = orthogonal_basis(kind, 16, seed=3)
    torch.testing.assert_close(basis @ basis.T, torch.eye(16), rtol=0, atol=1e-6)
    assert torch.equal(basis, orthogonal_basis(kind, 16, seed=3))
    assert torch.equal(basis, orthogonal_basis(kind, 16, seed=4)) == (kind != "random")
    if kind == "hadamard":
        torch.testing.assert_close(basis.abs(), torch.full((16, 16), 0.25))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"store": Multi(2), "rule": "delta_token"}, "'multi' works with rule: linear, delta; .* store: single, banks"),
        ({"store": Routed(torch.eye(4)), "rule": "delta"}, "'routed' works with rule: linear; rule 'delta' works with"),
        ({"store": Banks(2), "rule": "slot"}, "rule 'slot' works with store: single$"),
        ({"store": Hierarchical(2)}, "needs the gate expand"),
        ({"store": Multi(2), "expand": torch.ones(1, 4, 2)}, "no other store takes it"),
        ({"store": Routed(torch.eye(5))}, "vectors of width 5, the heads are 4 wide"),
    ],
)
def test_what_makes_no_sense_is_named(change, message):
    q = torch.randn(1, 4, 2, 4)
    with pytest.raises(ValueError, match=message):
        scan(q, q, q, **change)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Multi(0), "num_memories must be >= 1, not 0"),
        (lambda: Banks(2, 0), "segments_per_bank must be >= 1"),
        (lambda: Routed(torch.eye(4), top_k_memories=0), "top_k_memories must be >= 1"),
        (lambda: orthogonal_basis("hadamard", 12), "power of two, not 12"),
        (lambda: orthogonal_basis("fourier", 8), "not one of: identity, hadamard, random"),
    ],
)
def test_impossible_stores_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_state_goes_on_only_with_its_store():
    q = torch.randn(1, 4, 1, 4)
    _, state = scan(q, q, q, store=Multi(3))
    for store, message in (
        (None, "made with store 'multi', not 'single'"),
        (Banks(3), "made with store 'multi', not 'banks'"),  # of the same size
        (Multi(2), r"made with another number of memories: its M is \[1, 1, 3, 4, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            scan(q, q, q, state, store=store)
    assert read(q, state, store=Banks(3)).shape == q.shape  # reading writes nothing
    for store in (None, Multi(2)):
        with pytest.raises(ValueError, match="another number of memories"):
            read(q, state, store=store)
    with pytest.raises(ValueError, match="made with store 'single', not 'multi'"):
        scan(q, q, q, scan(q, q, q)[1], store=Multi(3))
