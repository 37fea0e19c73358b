"""Layers of every kind: Pythia's is GPT-NeoX's, pieces equal the whole, the future changes nothing."""

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from senri.lm import (
    MODELS,
    HierarchicalLayer,
    InfiniLayer,
    MultiMemoryLayer,
    PythiaLayer,
    TransformerLM,
    create_model,
)
from senri.memory import Multi, reference
from senri.memory.alibi import alibi_slopes
from senri.memory.state import named_tensors

EXACT = {"rtol": 1e-10, "atol": 1e-10}
VOCABULARY, STEPS = 97, 33
# Segments and chunks that divide neither each other nor the text, and two heads a memory.
SMALL = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 24}
MEMORY = {"memory_head_dim": 8, "segment_size": 6, "chunk_size": 4}
KINDS = {
    "pythia": lambda: PythiaLayer(**SMALL, rotary_pct=0.5),
    "infini": lambda: InfiniLayer(**SMALL, **MEMORY),
    "linear": lambda: InfiniLayer(**SMALL, **MEMORY, use_delta_rule=False),
    "banks": lambda: InfiniLayer(**SMALL, **MEMORY, num_memory_banks=3, segments_per_bank=2),
    "alibi": lambda: InfiniLayer(**SMALL, **MEMORY, use_alibi=True, alibi_scale=4.0),
    "multi": lambda: MultiMemoryLayer(**SMALL, **MEMORY, num_memories=3),
    "hierarchical": lambda: HierarchicalLayer(**SMALL, **MEMORY, num_memories=3),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def make(*kinds: str) -> TransformerLM:
    """Layers of these kinds with weights that matter, in float64."""
    model = TransformerLM([KINDS[kind]() for kind in kinds], VOCABULARY).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3)
            if "norm.weight" in name:
                parameter.add_(1.0)
    return model


def text(steps: int = STEPS, rows: int = 2) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, steps), generator=torch.Generator().manual_seed(1))


def assert_same_state(found, expected) -> None:
    found, expected = named_tensors(found), named_tensors(expected)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **EXACT)


# GPT-NeoX ---------------------------------------------------------------------------------------------------


def test_a_stack_of_pythia_layers_is_transformers_gpt_neox() -> None:
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48,
        initializer_range=0.2, attn_implementation="sdpa",  # "eager" rounds its softmax to float32
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = GPTNeoXForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 1:  # biases of 0 and norms of 1 would hide where they go
                parameter.add_(0.3 * torch.randn_like(parameter))
    ours = create_model(
        "pythia", vocab_size=VOCABULARY, hidden_size=32, num_layers=3, num_heads=2, intermediate_size=48
    ).double()
    ours.load_state_dict({k.removeprefix("gpt_neox."): v for k, v in theirs.state_dict().items()})
    ids = text(40)
    expected, found = theirs(ids).logits, ours(ids).logits
    torch.testing.assert_close(found, expected, **EXACT)
    for logits in (expected, found):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = {k.removeprefix("gpt_neox."): p.grad for k, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], **EXACT)


# every kind -------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("cuts", [list(range(1, STEPS)), [5, 6, 19], [1, 30]])
def test_pieces_equal_the_whole(kind: str, cuts: list[int]) -> None:
    model, ids = make("pythia", kind, "infini"), text()
    whole = model(ids)
    state, parts = None, []
    for start, stop in zip([0, *cuts], [*cuts, STEPS], strict=True):
        out = model(ids[:, start:stop], state)
        state = out.state
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole.logits, **EXACT)
    assert_same_state(state, whole.state)


@each_kind
def test_the_future_changes_nothing(kind: str) -> None:
    model, ids = make(kind, "pythia"), text()
    changed = ids.clone()
    changed[:, 20] = (changed[:, 20] + 1) % VOCABULARY
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :20], after[:, :20])
    assert (before[:, 20:] != after[:, 20:]).any(-1).all()


@each_kind
def test_a_row_does_not_see_the_others(kind: str) -> None:
    model, ids = make(kind), text(rows=3)
    torch.testing.assert_close(model(ids).logits[1:2], model(ids[1:2]).logits, **EXACT)


@each_kind
def test_chunks_are_a_matter_of_speed(kind: str) -> None:
    model, ids = make(kind), text()
    expected = model(ids).logits
    for layer in model.layers:
        layer.attention.chunk_size = 64
    torch.testing.assert_close(model(ids).logits, expected, **EXACT)


@each_kind
def test_every_parameter_learns(kind: str) -> None:
    model = make(kind).train()
    model(text()).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_gradients_reach_what_an_earlier_segment_wrote() -> None:
    model, ids = make("infini", "pythia"), text()
    for cut in (False, True):
        state = model(ids[:, :16]).state.next_segment()
        embedding = model.embed_in(ids[:, :16])
        hidden, state = model.run_layers(embedding, model.init_state(2))
        state = state.next_segment()
        out = model(ids[:, 16:], state.detach() if cut else state)
        (gradient,) = torch.autograd.grad(out.logits.sum() + 0 * hidden.sum(), embedding)
        assert (gradient.abs().max() > 1e-6) != cut


# memory layers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["infini", "linear", "banks", "alibi", "multi", "hierarchical"])
def test_a_memory_layer_is_the_reference_token_by_token(kind: str) -> None:
    """With the segments, stores and gates that its arguments stand for."""
    layer = make(kind).layers[0].attention
    hidden = torch.randn(2, STEPS, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    q, k, v = layer.query_key_value(hidden).view(2, STEPS, 2, 24).split(8, -1)
    options = {}
    if kind == "alibi":
        gate = torch.zeros(2, STEPS, 2, dtype=torch.float64)
        gate[:, 6::6] = -4.0 * alibi_slopes(2)
        options["log_alpha"] = gate
    if kind == "hierarchical":
        options["expand"] = torch.sigmoid(hidden @ layer.expand_gate.weight.T + layer.expand_gate.bias)
    rule = "linear" if kind == "linear" else "delta"
    expected, state = reference.scan(q, k, v, rule=rule, segment_size=6, store=layer.store, **options)
    found, after = layer(hidden, layer.init_state(2, torch.float64, torch.device("cpu")))
    expected = expected.flatten(2) @ layer.dense.weight.T + layer.dense.bias
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(after.M, state.M, rtol=1e-8, atol=1e-8)


def test_one_head_as_wide_as_the_model_by_default() -> None:
    for name in ("infini", "multi_memory", "hierarchical"):
        attention = create_model(name, vocab_size=7, **SMALL).layers[0].attention
        assert (attention.num_heads, attention.head_dim, attention.rule) == (1, 16, "delta")
    assert isinstance(attention.store, Multi)
    assert attention.store.size == 4


def test_the_state_is_kept_in_float32_whatever_the_model() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        out = create_model("infini", vocab_size=VOCABULARY, **SMALL).to(dtype)(text())
        assert out.state.layers[0].M.dtype == torch.float32
        assert out.logits.dtype == dtype


def test_the_state_of_a_memory_layer_keeps_its_size() -> None:
    model = create_model("multi_memory", vocab_size=VOCABULARY, num_layers=2, **SMALL)
    empty = model.init_state(2).nbytes
    # two rows: four memories, with their snapshots, of 16 x 16 + 16 numbers; and the count of pairs
    assert empty == 2 * (4 * 2 * (16 * 16 + 16) * 4 + 8)
    assert model(text()).state.next_segment().nbytes == empty
    assert model(text()).state.nbytes > empty


@pytest.mark.parametrize(
    ("make_layer", "message"),
    [
        (lambda: PythiaLayer(16, 3, 24), "num_heads 3 does not divide hidden_size 16"),
        (lambda: PythiaLayer(24, 2, 24, rotary_pct=0.25), "rotary_pct 0.25 of heads of width 12 is 3"),
        (lambda: InfiniLayer(16, 2, 24, memory_head_dim=5), "memory_head_dim 5 does not divide hidden_size 16"),
        (lambda: InfiniLayer(16, 2, 24, segment_size=0), r"segment_size \(0\)"),
        (lambda: InfiniLayer(16, 2, 24, use_alibi=True, alibi_scale=0.0), "alibi_scale must be > 0"),
        (lambda: MultiMemoryLayer(16, 2, 24, num_memories=0), "num_memories must be >= 1"),
        (lambda: InfiniLayer(16, 2, 24, num_memory_banks=0), "num_memory_banks must be >= 1"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(make_layer, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_layer()


# create_model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_one_layer_of_its_kind_and_five_of_pythia(name: str) -> None:
    model = create_model(name, vocab_size=VOCABULARY, **SMALL)
    assert [type(layer) for layer in model.layers] == [MODELS[name], *[PythiaLayer] * 5]
    assert model(text()).logits.shape == (2, STEPS, VOCABULARY)
    assert model.has_memory == (name != "pythia")


def test_the_defaults_are_pythia_70m() -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in create_model("pythia").parameters())
    assert count == 70_426_624


def test_options_reach_their_layers() -> None:
    model = create_model("infini", num_memory_banks=2, segments_per_bank=3, rotary_pct=0.5, vocab_size=7, **SMALL)
    assert (model.layers[0].attention.store.size, model.layers[0].attention.store.segments_per_bank) == (2, 3)
    assert model.layers[1].attention.rotary_dim == 4
    assert (
        create_model("hierarchical", use_delta_rule=False, vocab_size=7, **SMALL).layers[0].attention.rule == "linear"
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "infinity",
            {},
            r"no model 'infinity' \(did you mean 'infini'\?\); models: pythia, infini, multi",
        ),
        ("pythia", {"num_memories": 2}, "model 'pythia' has no option 'num_memories'.*options: vocab_size, num_layers"),
        ("infini", {"num_memory_bank": 2}, "did you mean 'num_memory_banks'"),
        ("multi_memory", {"use_alibi": True}, "options: .*num_memories"),
        ("pythia", {"num_layers": 0}, "num_layers must be >= 1"),
    ],
)
def test_unknown_names_and_options_list_the_valid_ones(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(name, **options)
