"""The invariants of the memory core (SPEC section 2) as properties, for every store, rule, shape and cut."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from senri.memory import (
    RULES,
    STORES,
    Banks,
    Hierarchical,
    MemoryState,
    Multi,
    Routed,
    SlotParameters,
    orthogonal_basis,
    reference,
    scan,
)
from senri.memory.state import map_tensors, named_tensors

EXACT = {"rtol": 1e-10, "atol": 1e-10}
each_store = pytest.mark.parametrize("store", ["single", *STORES])


def draw_store(draw, name, key_dim):
    if name == "routed":
        kinds = ["identity", "random", *(["hadamard"] if key_dim != 6 else [])]
        basis = orthogonal_basis(draw(st.sampled_from(kinds)), key_dim)[: draw(st.integers(1, key_dim))]
        return Routed(basis, top_k_memories=draw(st.integers(1, 9)), routing=draw(st.integers(0, 3)) > 0)
    if name == "banks":
        return Banks(draw(st.integers(1, 3)), segments_per_bank=draw(st.integers(1, 3)))
    return {"multi": Multi, "hierarchical": Hierarchical}[name](draw(st.integers(1, 4)))


class Case:
    """Random inputs of one scan; ``draw`` decides shapes and options, a seed the numbers."""

    def __init__(self, draw, store, dtype=torch.float64, batch=None, steps=None):
        self.rule = rule = draw(st.sampled_from(sorted(RULES if store == "single" else STORES[store].rules)))
        B = batch or draw(st.integers(1, 3))
        T = steps or draw(st.integers(1, 14))
        H, G = draw(st.integers(1, 2)), draw(st.integers(1, 3))
        Dk, Dv = draw(st.integers(1, 4)) * 2, draw(st.integers(1, 5))
        gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

        def randn(*shape):
            return torch.randn(*shape, generator=gen, dtype=dtype)

        self.q, self.k, self.v = randn(B, T, H * G, Dk), randn(B, T, H, Dk), randn(B, T, H, Dv)
        self.options = {
            "rule": rule,
            "delay": draw(st.integers(0, 6)),
            "chunk_size": draw(st.integers(1, 9)),
            "segment_size": draw(st.integers(1, 7)),
        }
        if store != "single":
            self.options["store"] = draw_store(draw, store, Dk)
        if RULES[rule].normalised:
            self.options["feature_map"] = draw(st.sampled_from(["elu_plus_one", "dpfp", "hedgehog", None]))
        self.gates = {"expand": torch.rand(B, T, H * G, generator=gen, dtype=dtype)} if store == "hierarchical" else {}
        if rule == "slot":
            self.options["num_slots"] = draw(st.integers(1, 9))
            # so that keys of few dimensions are the same in part
            self.options["slot"] = SlotParameters(*(x + 0.1 * randn(H).abs() for x in (4.0, 0.3, 5.0, 2.0)))
            if draw(st.booleans()):
                end = {"end_key": 3 * randn(H, Dk), "end_bias": randn(H), "end_value": randn(H, Dv)}
                self.options["slot"] = self.options["slot"]._replace(**end)
            if draw(st.booleans()):
                self.gates["null"] = randn(B, T, H * G)
            if draw(st.booleans()):
                self.gates["said"] = randn(B, T, H, Dv)
            if draw(st.booleans()):
                self.gates["importance"] = randn(B, T, H)
        if draw(st.booleans()):
            self.gates["beta"] = randn(B, T, H).sigmoid()
            if draw(st.booleans()):  # a write gate that closes
                self.gates["beta"] *= torch.rand(B, T, H, generator=gen) > 0.4
        if RULES[rule].forgets and draw(st.booleans()):
            self.gates["log_alpha"] = -randn(B, T, H).exp() * 0.1
        if draw(st.booleans()):
            self.gates["mask"] = torch.rand(B, T, generator=gen) > 0.3

    def cut(self, start, stop, rows=slice(None)):
        part = (rows, slice(start, stop))
        return [self.q[part], self.k[part], self.v[part]], {n: x[part] for n, x in self.gates.items()}

    def run(self, fn=scan, state=None, start=0, stop=None, rows=slice(None), **changes):
        tensors, gates = self.cut(start, stop, rows)
        return fn(*tensors, state, **gates, **{**self.options, **changes})


def assert_states_equal(left, right, **tolerance):
    left, right = named_tensors(left), named_tensors(right)
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], check_dtype=False, msg=name, **tolerance)


@each_store
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_streaming_equals_parallel(store, data):
    case = Case(data.draw, store)
    T = case.q.shape[1]
    whole, final = case.run()
    cuts = sorted({0, T, *data.draw(st.lists(st.integers(0, T), max_size=T))})
    state, parts = None, []
    for start, stop in pairwise(cuts):
        out, state = case.run(state=state, start=start, stop=stop, chunk_size=data.draw(st.integers(1, 9)))
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, **EXACT)
    assert_states_equal(state, final, **EXACT)


@each_store
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_fast_path_equals_reference_with_every_gradient(store, data):
    case = Case(data.draw, store, batch=2)
    # a state that already holds something, so that its gradient is tested too
    _, start = Case.run(case)
    start = map_tensors(lambda t: t.detach(), start)
    results = []
    for fn in (scan, reference.scan):
        state = map_tensors(lambda t: t.clone().requires_grad_() if t.is_floating_point() else t, start)
        inputs = [t.detach().clone().requires_grad_() for t in (case.q, case.k, case.v)]
        gates = {n: g.clone().requires_grad_() if g.is_floating_point() else g for n, g in case.gates.items()}
        options, learnt = dict(case.options), []
        if "slot" in options:
            slot = [None if x is None else x.clone().requires_grad_() for x in options["slot"]]
            options["slot"], learnt = SlotParameters(*slot), [x for x in slot if x is not None]
        out, final = fn(*inputs, state, **gates, **options)
        loss = sum(
            (t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t)).sum()
            for t in [out, *named_tensors(final).values()]
            if t.is_floating_point()
        )
        leaves = [
            *inputs,
            *learnt,
            *(g for g in gates.values() if g.requires_grad),
            *(t for t in named_tensors(state).values() if t.requires_grad),
        ]
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        results.append(
            (
                out,
                final,
                [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)],
            )
        )
    (out, final, grads), (out_ref, final_ref, grads_ref) = results
    torch.testing.assert_close(out, out_ref, rtol=1e-8, atol=1e-9)
    assert_states_equal(final, final_ref, rtol=1e-8, atol=1e-9)
    for grad, grad_ref in zip(grads, grads_ref, strict=True):
        torch.testing.assert_close(grad, grad_ref, rtol=1e-6, atol=1e-7)


@each_store
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_without_queries_the_state_is_the_same(store, data):
    case = Case(data.draw, store)
    _, expected = case.run()
    case.q = case.q[:, :, :0]
    case.gates = {name: gate[:, :, :0] if name in ("null", "expand") else gate for name, gate in case.gates.items()}
    out, state = case.run()
    assert out.shape == (*case.q.shape[:3], case.v.shape[-1])
    assert_states_equal(state, expected, rtol=0, atol=0)


@each_store
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_float32_agrees_with_reference(store, data):
    case = Case(data.draw, store, dtype=torch.float32)
    out, state = case.run()
    out_ref, state_ref = case.run(fn=reference.scan)
    assert out.dtype == torch.float32
    assert state.M.dtype == torch.float32
    # a normaliser near eps amplifies rounding without bound; there only the state is comparable
    torch.testing.assert_close(state.M, state_ref.M.float(), rtol=1e-4, atol=1e-4)
    if not RULES[case.rule].normalised or "feature_map" not in case.options or case.options["feature_map"] is None:
        torch.testing.assert_close(out, out_ref.float(), rtol=1e-3, atol=1e-4)


@each_store
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_causality(store, data):
    case = Case(data.draw, store)
    T = case.q.shape[1]
    t = data.draw(st.integers(0, T - 1))
    before, _ = case.run()
    case.q, case.k, case.v = case.q.clone(), case.k.clone(), case.v.clone()
    for x in (case.q, case.k, case.v):
        x[:, t] += 1.0
    case.gates = {n: g.clone() for n, g in case.gates.items()}
    if "beta" in case.gates:
        case.gates["beta"][:, t] *= 0.5
    if "mask" in case.gates:
        case.gates["mask"][:, t] ^= True
    after, _ = case.run()
    torch.testing.assert_close(before[:, :t], after[:, :t], rtol=0, atol=0 if t == 0 else 1e-12)
    # the pair itself must not be read before `delay` steps have passed
    delay = case.options["delay"]
    if "mask" not in case.gates and delay:
        torch.testing.assert_close(before[:, t + 1 : t + delay], after[:, t + 1 : t + delay], rtol=0, atol=1e-12)


@each_store
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_rows_are_independent_and_padding_is_never_written(store, data):
    case = Case(data.draw, store)
    case.gates.pop("mask", None)
    B, T = case.q.shape[:2]
    pads = data.draw(st.lists(st.integers(0, T - 1), min_size=B, max_size=B))
    mask = torch.arange(T)[None] >= torch.tensor(pads)[:, None]
    case.gates["mask"] = mask
    batched, state = case.run()
    for row, pad in enumerate(pads):
        alone, alone_state = case.run(rows=slice(row, row + 1), start=pad)
        torch.testing.assert_close(batched[row : row + 1, pad:], alone, **EXACT)
        got = map_tensors(lambda t, row=row: t[row : row + 1], state._replace(pending=None))
        assert_states_equal(got, alone_state._replace(pending=None), **EXACT)


@each_store
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_packed_documents_never_mix(store, data):
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    case = Case(data.draw, store, batch=1, steps=sum(lengths))
    case.gates.pop("mask", None)
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    for fn in (scan, reference.scan):
        packed, states = case.run(fn=fn, cu_seqlens=torch.tensor(bounds))
        for n, (start, stop) in enumerate(pairwise(bounds)):
            alone, state = case.run(start=start, stop=stop)
            torch.testing.assert_close(packed[:, start:stop], alone, **EXACT)
            torch.testing.assert_close(states.M[n : n + 1], state.M, **EXACT)


@each_store
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_window_and_memory_partition_the_past(store, data):
    """Token s influences output t through the memory exactly when it lies outside the window (t - W, t]."""
    case = Case(data.draw, store, batch=1)
    case.gates.pop("mask", None)
    case.options["delay"] = W = data.draw(st.integers(1, 5))
    case.options["feature_map"] = None  # DPFP can map two vectors to exactly orthogonal ones
    if store == "routed":  # what is not selected has no influence
        case.options["store"] = Routed(case.options["store"].basis)
    T = case.q.shape[1]
    v = case.v.clone().requires_grad_()
    out, _ = scan(case.q, case.k, v, **case.gates, **case.options)
    for t in range(T):
        (grad,) = torch.autograd.grad(out[0, t].sum(), v, retain_graph=True, allow_unused=True)
        reached = torch.zeros(T, dtype=torch.bool) if grad is None else grad[0].abs().sum((1, 2)) > 0
        assert not reached[max(0, t - W + 1) :].any()
    if W < T and "beta" not in case.gates:
        (grad,) = torch.autograd.grad(out[0, T - 1].sum(), v)
        assert grad[0, T - 1 - W].abs().sum() > 0


@each_store
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_delay_is_a_shift_of_the_stream(store, data):
    """scan(delay=W) equals scan(delay=0) with the queries W steps ahead: one memory, read later."""
    case = Case(data.draw, store)
    W, T = case.options["delay"], case.q.shape[1]
    out, _ = case.run()
    kept = max(T - W, 0)
    expected = torch.zeros_like(out)
    if kept:
        gates = {n: g[:, W:] if n in ("null", "said", "expand") else g[:, :kept] for n, g in case.gates.items()}
        expected[:, W:], _ = scan(
            case.q[:, W:], case.k[:, :kept], case.v[:, :kept], **gates, **{**case.options, "delay": 0}
        )
    torch.testing.assert_close(out, expected, **EXACT)


@pytest.mark.parametrize("rule", RULES)
def test_an_empty_memory_reads_as_exact_zeros(rule):
    q = torch.randn(2, 5, 2, 4)
    out, state = scan(q, q, q, rule=rule, delay=8)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(state.M, torch.zeros_like(state.M))
    assert state.written.tolist() == [0, 0]


def test_gqa_query_heads_read_their_own_group():
    q, k, v = torch.randn(1, 6, 4, 4), torch.randn(1, 6, 2, 4), torch.randn(1, 6, 2, 3)
    out, _ = scan(q, k, v)
    changed = v.clone()
    changed[:, :, 1] += 1
    other, _ = scan(q, k, changed)
    same = (out == other).all(dim=(0, 1, 3))
    assert same.tolist() == [True, True, False, False]


@pytest.mark.parametrize("rule", RULES)
def test_gradient_crosses_pieces_until_it_is_cut(rule):
    q, k, v = (torch.randn(1, 8, 1, 4, dtype=torch.float64) for _ in range(3))
    for cut in (False, True):
        v_early = v[:, :4].clone().requires_grad_()
        _, state = scan(q[:, :4], k[:, :4], v_early, rule=rule)
        state = state.detach() if cut else state
        out, _ = scan(q[:, 4:], k[:, 4:], v[:, 4:], state, rule=rule)
        if cut:
            assert not out.requires_grad
        else:
            (grad,) = torch.autograd.grad(out.sum(), v_early)
            assert grad.abs().sum() > 0


def test_half_precision_inputs_keep_a_float32_state():
    q = torch.randn(1, 20, 1, 4).bfloat16()
    out, state = scan(q, q, q, delay=3)
    assert out.dtype == torch.bfloat16
    assert state.M.dtype == state.z.dtype == torch.float32


@pytest.mark.parametrize("rule", RULES)
def test_long_streams_stay_finite(rule):
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(1, 20_000, 1, 8, generator=gen) * 10
    out, state = scan(q, q, q, rule=rule)
    assert out.isfinite().all()
    assert state.M.isfinite().all()


def test_state_knows_its_size_and_moves():
    state = MemoryState.zeros(2, 3, 4, 5, rule="delta")
    assert state.nbytes == 2 * (2 * 3 * 4 * 5 + 2 * 3 * 5) * 4 + 2 * 8
    assert state.to("cpu").M.device.type == "cpu"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "hebb"}, "rule 'hebb' is not one of: linear, delta, delta_token, gated_delta, slot"),
        ({"feature_map": "exp"}, "feature_map 'exp' is not one of"),
        ({"rule": "delta_token", "log_alpha": torch.zeros(1, 4, 2)}, "has no forget gate"),
        ({"rule": "delta", "importance": torch.ones(1, 4, 2)}, "gives up no slots"),
        ({"delay": -1}, "delay must be >= 0"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens needs one packed row"),
        ({"cu_seqlens": torch.tensor([1, 4])}, "must begin at 0"),
    ],
)
def test_bad_arguments_are_named(change, message):
    q = torch.randn(1, 4, 2, 4)
    with pytest.raises(ValueError, match=message):
        scan(q, q, q, **change)


def test_shapes_that_do_not_fit_are_named():
    q = torch.randn(1, 4, 3, 4)
    with pytest.raises(ValueError, match="do not fit"):
        scan(q, q[:, :, :2], q[:, :, :2])


@pytest.mark.parametrize("rule", RULES)
def test_autocast_does_not_reach_the_state(rule):
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(1, 64, 2, 8, generator=gen)
    out, state = scan(q, q, q, rule=rule)
    with torch.autocast("cpu", torch.bfloat16):
        out_autocast, state_autocast = scan(q, q, q, rule=rule)
    assert torch.equal(out, out_autocast)
    assert torch.equal(state.M, state_autocast.M)


def test_a_gate_of_exactly_zero_forgets_everything():
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(1, 6, 1, 4, generator=gen, dtype=torch.float64)
    log_alpha = torch.zeros(1, 6, 1, dtype=torch.float64)
    log_alpha[:, [2, 3]] = -torch.inf
    for rule in ("linear", "gated_delta"):
        out, _ = scan(q, q, q, rule=rule, log_alpha=log_alpha)
        fresh, _ = scan(q[:, 3:], q[:, 3:], q[:, 3:], rule=rule)
        torch.testing.assert_close(out[:, 3:], fresh, **EXACT)


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        ({"rule": "delta_token"}, {"rule": "linear"}, "made by another rule than 'linear'"),
        ({"rule": "linear"}, {"rule": "delta"}, "made by another rule than 'delta'"),
        ({"delay": 4}, {"delay": 2}, "made with delay=4, not 2"),
        ({"delay": 4}, {"delay": 0}, "made with delay=4, not 0"),
        ({"delay": 2}, {"delay": 2, "beta": torch.ones(2, 6, 1)}, "made with other gates"),
    ],
)
def test_a_state_goes_on_only_as_it_was_made(first, then, message):
    q = torch.randn(2, 6, 1, 4)
    _, state = scan(q, q, q, **first)
    with pytest.raises(ValueError, match=message):
        scan(q, q, q, state, **then)
    with pytest.raises(ValueError, match=r"the state has 2 row\(s\), the input 1"):
        scan(q[:1], q[:1], q[:1], state, **first)
