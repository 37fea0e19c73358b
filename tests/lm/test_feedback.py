"""FeedbackLM: passes over all tokens lead to the sequential states, exactly; generation, pieces, gradients, errors."""

from itertools import pairwise

import pytest
import torch

from senri.lm import (
    FeedbackLM,
    HierarchicalLayer,
    InfiniLayer,
    MultiMemoryLayer,
    PythiaLayer,
    TransformerLM,
    create_model,
    load_memory,
    relative_gap,
    save_memory,
)
from senri.memory.state import named_tensors

EXACT = {"rtol": 1e-10, "atol": 1e-10}
VOCABULARY, STEPS = 97, 15
SMALL = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 24}
MEMORY = {"memory_head_dim": 8, "segment_size": 6, "chunk_size": 4}
MIXES = {
    "pythia": lambda: [PythiaLayer(**SMALL, rotary_pct=0.5), PythiaLayer(**SMALL, rotary_pct=0.5)],
    "infini": lambda: [InfiniLayer(**SMALL, **MEMORY), PythiaLayer(**SMALL)],
    "banks": lambda: [PythiaLayer(**SMALL), InfiniLayer(**SMALL, **MEMORY, num_memory_banks=2, use_alibi=True)],
    "multi": lambda: [MultiMemoryLayer(**SMALL, **MEMORY, num_memories=3), PythiaLayer(**SMALL)],
    "hierarchical": lambda: [HierarchicalLayer(**SMALL, **MEMORY, num_memories=3), InfiniLayer(**SMALL, **MEMORY)],
}
each_mix = pytest.mark.parametrize("mix", MIXES)


def make(mix: str = "infini", seed: int = 0) -> FeedbackLM:
    """Weights that matter, in float64: what is fed back changes everything after it."""
    torch.manual_seed(seed)
    model = FeedbackLM(MIXES[mix](), VOCABULARY).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3)
            if "norm.weight" in name:
                parameter.add_(1.0)
    return model


def text(steps: int = STEPS, rows: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, steps), generator=torch.Generator().manual_seed(seed))


def assert_same_state(found, expected) -> None:
    found, expected = named_tensors(found), named_tensors(expected)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **EXACT)


# the recurrence ---------------------------------------------------------------------------------------------


@each_mix
def test_the_sequential_form_is_the_recurrence_written_plainly(mix: str) -> None:
    model, ids = make(mix), text()
    inputs, before = [], model.start.expand(2, -1)
    for t in range(STEPS):  # all layers anew on all inputs so far: no state, no cache
        inputs.append(model.embed_in(ids[:, t]) + before @ model.feedback.weight.T)
        hidden, _ = model.run_layers(torch.stack(inputs, 1), TransformerLM.init_state(model, 2))
        before = hidden[:, -1]
    torch.testing.assert_close(model(ids).logits, model.lm_head(hidden), **EXACT)


@each_mix
@pytest.mark.parametrize("cuts", [list(range(1, STEPS)), [3, 4, 13]])
def test_pieces_equal_the_whole(mix: str, cuts: list[int]) -> None:
    model, ids = make(mix), text()
    whole, cache = model(ids), torch.randn(2, STEPS, 16, dtype=torch.float64)
    at_once, _ = model.forward_with_cache(ids, cache)
    state, lagged, parts, passes = None, None, [], []
    for start, stop in zip([0, *cuts], [*cuts, STEPS], strict=True):
        out = model(ids[:, start:stop], state)
        one_pass, _ = model.forward_with_cache(ids[:, start:stop], cache[:, start:stop], lagged)
        state, lagged = out.state, one_pass.state
        parts.append(out.logits)
        passes.append(one_pass.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole.logits, **EXACT)
    assert_same_state(state, whole.state)
    torch.testing.assert_close(torch.cat(passes, 1), at_once.logits, **EXACT)
    assert_same_state(lagged, at_once.state)


def test_what_is_fed_back_matters_and_comes_from_the_past_only() -> None:
    model, ids = make(), text()
    changed = ids.clone()
    changed[:, 9] = (changed[:, 9] + 1) % VOCABULARY
    a, b = model(ids).logits, model(changed).logits
    assert torch.equal(a[:, :9], b[:, :9])
    assert (a[:, 9:] != b[:, 9:]).any(-1).all()
    cache = torch.randn(2, STEPS, 16, dtype=torch.float64)
    other = cache.clone()
    other[:, 9] += 1.0
    a, b = (model.forward_with_cache(ids, c)[0].logits for c in (cache, other))
    assert torch.equal(a[:, :10], b[:, :10])  # the state of token 9 is fed to token 10
    assert (a[:, 10:] != b[:, 10:]).any(-1).all()


# passes -----------------------------------------------------------------------------------------------------


@each_mix
def test_passes_lead_to_the_sequential_result_in_as_many_as_there_are_tokens(mix: str) -> None:
    """The n-th pass is exact in its first n positions, and not yet in the next one."""
    model, ids = make(mix), text()
    with torch.no_grad():
        expected = model(ids)
        true, _ = model.read(ids)
        cache = torch.randn(2, STEPS, 16, dtype=torch.float64)
        for n in range(1, STEPS + 1):
            out, cache = model.forward_with_cache(ids, cache)
            torch.testing.assert_close(cache[:, :n], true[:, :n], **EXACT)
            torch.testing.assert_close(out.logits[:, :n], expected.logits[:, :n], **EXACT)
            if n < 6:  # a fed back change is far above rounding there
                assert ((cache[:, n] - true[:, n]).norm(dim=-1) > 1e-6).all()
        out, again = model.forward_with_cache(ids, cache)  # fed the true states, it also ends in the true state
    torch.testing.assert_close(again, true, **EXACT)
    assert_same_state(out.state, expected.state)


def test_one_pass_is_not_yet_the_sequential_result() -> None:
    model, ids = make(), text()
    with torch.no_grad():
        true, _ = model.read(ids)
        assert relative_gap(model.refine(ids, None, 1).cache, true).min() > 1e-3
        assert relative_gap(model.refine(ids, None).cache, true).max() < 1e-12


def test_segments_of_a_pass_are_those_of_the_sequential_form() -> None:
    model, ids = make(), text()
    state, parts = None, []
    for part in ids.split(8, 1):
        hidden, state = model.read(part, state)
        state = state.next_segment()
        parts.append(hidden)
    true = torch.cat(parts, 1)
    torch.testing.assert_close(model.sequential_states(ids, 8), true, **EXACT)
    torch.testing.assert_close(model.refine(ids, None, segment_length=8).cache, true, **EXACT)
    assert relative_gap(model.read(ids)[0], true).min() > 1e-3


@pytest.mark.parametrize("scale", [0.1, 0.3, 0.5])
def test_a_fresh_model_forgets_what_was_fed_wrongly(scale: float) -> None:
    """Below 1 / sqrt(3) a pass takes away most of the error, and far fewer than T passes reach 1e-6."""
    torch.manual_seed(0)
    model = create_model("infini", vocab_size=VOCABULARY, hidden_size=64, num_heads=2, intermediate_size=128,
                         num_layers=3, feedback_scale=scale).double()  # fmt: skip
    ids = text(48)
    with torch.no_grad():
        model.start.normal_()
        true, _ = model.read(ids)
        fed = model.feedback(true).square().mean().sqrt() / model.embed_in(ids).square().mean().sqrt()
        assert abs(float(fed) / scale - 1) < 0.2
        cache, gaps = None, []
        for _ in range(25):
            cache = model.refine(ids, cache, 1).cache
            gaps.append(float(relative_gap(cache, true).max()))
    first = next(n for n, gap in enumerate(gaps, 1) if gap < 1e-6)
    assert first <= 24
    assert all(later < 0.8 * earlier for earlier, later in pairwise(gaps[:first]))


def test_refining_stops_by_tolerance_or_after_its_passes_and_leaves_no_graph() -> None:
    model, ids = make(), text()
    cache = torch.randn(2, STEPS, 16, dtype=torch.float64)
    found = model.refine(ids, cache, 5)
    assert found.changes.shape == (5, 2)
    expected = cache
    for _ in range(5):
        expected, before = model.forward_with_cache(ids, expected)[1].detach(), expected
    torch.testing.assert_close(found.cache, expected, **EXACT)
    torch.testing.assert_close(found.changes[-1], relative_gap(before, expected), **EXACT)
    loose = model.refine(ids, cache, tolerance=float(found.changes[2].max()) + 1e-9)
    first = next(n for n, moved in enumerate(found.changes.amax(1), 1) if moved <= found.changes[2].max() + 1e-9)
    assert len(loose.changes) == first < 5
    assert not found.cache.requires_grad
    assert torch.equal(model.refine(ids, cache, 0).cache, cache)


# gradients --------------------------------------------------------------------------------------------------


@each_mix
def test_gradients_are_those_of_one_step_written_plainly(mix: str) -> None:
    """The twin goes token by token, and what it feeds back is a constant."""
    model, ids, cache = make(mix).train(), text(), torch.randn(2, STEPS, 16, dtype=torch.float64)
    weights = torch.randn(2, STEPS, VOCABULARY, dtype=torch.float64)

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss, list(model.parameters())))

    out, hidden = model.forward_with_cache(ids, cache.requires_grad_())
    assert hidden.requires_grad
    found = gradients((weights * out.logits).sum())
    state, total = TransformerLM.init_state(model, 2), torch.zeros((), dtype=torch.float64)
    for t in range(STEPS):
        fed = cache[:, t - 1].detach() if t else model.start.expand(2, -1)
        x = model.embed_in(ids[:, t]) + fed @ model.feedback.weight.T
        one, state = model.run_layers(x[:, None], state)
        total = total + (weights[:, t] * model.lm_head(one[:, 0])).sum()
    for mine, theirs in zip(found, gradients(total), strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)
        assert mine.abs().max() > 0
    out, _ = model.forward_with_cache(ids, cache)
    assert torch.autograd.grad(out.logits.sum(), cache, allow_unused=True) == (None,)


def test_the_sequential_form_has_the_whole_gradient() -> None:
    """That of one step is not it, even where the states agree."""
    model, ids = make().train(), text()
    (whole,) = torch.autograd.grad(model(ids).logits.square().sum(), model.feedback.weight)
    state, total = model.init_state(2), torch.zeros((), dtype=torch.float64)
    for token in ids.split(1, 1):
        out = model(token, state)
        state = out.state
        total = total + out.logits.square().sum()
    (plain,) = torch.autograd.grad(total, model.feedback.weight)
    torch.testing.assert_close(whole, plain, **EXACT)
    out, _ = model.forward_with_cache(ids, model.refine(ids, None).cache)
    (one_step,) = torch.autograd.grad(out.logits.square().sum(), model.feedback.weight)
    assert (one_step - whole).norm() > 0.1 * whole.norm()


# generation and state ---------------------------------------------------------------------------------------


@each_mix
def test_generation_is_greedy_choice_by_full_recomputation(mix: str) -> None:
    model, ids = make(mix), text(7)
    expected = ids
    for _ in range(8):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(ids, 8), expected)


def test_a_token_costs_one_step_of_the_layers(monkeypatch) -> None:
    model, ids, seen = make(), text(9), []
    run = model.run_layers
    monkeypatch.setattr(model, "run_layers", lambda x, state: seen.append(x.shape[1]) or run(x, state))
    model.generate(ids, 5)
    assert seen == [1] * (9 + 4)


def test_a_session_goes_on_with_what_was_fed_back(tmp_path) -> None:
    model, ids = make(), text(rows=1)
    state = model(ids[:, :8]).state.next_segment()
    expected = model(ids[:, 8:], state).logits
    model.reset_memory()
    model(ids[:, :8])
    save_memory(tmp_path / "memory", model)
    torch.testing.assert_close(model(ids[:, 8:]).logits, expected, **EXACT)
    other = make()
    load_memory(tmp_path / "memory", other)
    torch.testing.assert_close(other(ids[:, 8:]).logits, expected, **EXACT)
    assert not torch.allclose(model(ids[:, 8:], state._replace(fed_back=state.fed_back + 1)).logits, expected)


def test_a_feedback_of_zero_is_the_plain_transformer() -> None:
    options = {**SMALL, "vocab_size": VOCABULARY, "num_layers": 2}
    torch.manual_seed(0)
    model = create_model("infini", feedback_scale=0.0, **options)
    plain = create_model("infini", **options)
    assert isinstance(model, FeedbackLM)
    assert not isinstance(plain, FeedbackLM)
    missing = plain.load_state_dict(model.state_dict(), strict=False)
    assert sorted(missing.unexpected_keys) == ["feedback.weight", "start"]
    torch.testing.assert_close(model(text()).logits, plain(text()).logits)
    assert model.numbers["feedback_scale"] == 0.0


# errors -----------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    model, ids = make(), text()
    for call, message in (
        (lambda: FeedbackLM(MIXES["pythia"](), VOCABULARY, feedback_scale=-1), "feedback_scale must be >= 0, not -1"),
        (
            lambda: model.run_lagged(ids, torch.zeros(2, STEPS - 1, 16)),
            r"prev_cache is \[2, 14, 16\], .* \[2, 15, 16\]",
        ),
        (lambda: model.run_lagged(ids[:, :0], None), r"a token or more, not \[2, 0\]"),
        (lambda: model.run_lagged(ids[0], None), r"must be \[batch, tokens\], a token or more, not \[15\]"),
        (lambda: model.run_lagged(ids, None, segment_length=0), "segment_length must be >= 1, not 0"),
        (lambda: model.refine(ids, None, 0), "passes must be >= 1 here, not 0"),
        (lambda: model(ids, model.init_state(3)), r"the state has 3 row\(s\), the input 2"),
        (lambda: model(ids, TransformerLM.init_state(model, 2)), "a model without feedback"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
