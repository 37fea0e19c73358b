"""Models from scratch: every token scored once under what it may see, controls that control, verdicts that hold."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from senri.data.corpus import Document
from senri.data.haystack import BookHaystack, Stretch
from senri.data.reversal import fact_sets
from senri.data.vocabulary import train_tokenizer
from senri.evaluation import perplexity
from senri.evaluation.report import Report
from senri.evaluation.scratch import (
    CARRIED,
    CROSSED,
    EMPTIED,
    ONE_CALL,
    RIGHT,
    SLIDING_CARRIED,
    SLIDING_EMPTIED,
    LMEvaluation,
    crossed,
    measure,
    readings,
    windowed_nll,
)
from senri.evaluation.scratch_report import Result, _verdict, sections
from senri.evaluation.write import to_json, write_report
from senri.lm import create_model

VOCABULARY = 97
SMALL = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "num_layers": 2}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(perplexity, "BLOCK", 3)  # logits in several blocks, the last one not full


def make(name: str = "infini", vocab_size: int = VOCABULARY):
    torch.manual_seed(0)
    options = SMALL if name == "pythia" else {**SMALL, "segment_size": 5}
    model = create_model(name, vocab_size=vocab_size, **options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def text(length: int, rows: int = 2) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def brute_force(model, ids, window, stride, carry):
    """Token by token: the first window that can predict it, on the memory of everything before that window."""
    out = []
    for target in range(1, ids.shape[1]):
        start = next(s for s in range(0, ids.shape[1], stride) if target <= s + window)
        state = None
        if carry:
            # softmax attention of the layers above changes nothing in the memory layer below them
            state = model(ids[:, :start]).state.next_segment() if start else None
        logits = model(ids[:, start:target], state).logits[:, -1]
        out.append(-logits.log_softmax(-1).gather(1, ids[:, target, None])[:, 0])
    return torch.stack(out, 1).numpy()


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize(("length", "window", "stride"), [(23, 8, 8), (23, 8, 3), (24, 8, 8), (25, 8, 8), (9, 12, 5)])
def test_every_token_is_scored_once_under_what_it_may_see(length, window, stride, carry) -> None:
    model, ids = make(), text(length)
    found = windowed_nll(model, ids, window, stride, carry=carry)
    assert found.shape == (2, length - 1)
    np.testing.assert_allclose(found, brute_force(model, ids, window, stride, carry), atol=1e-5)


def test_carried_and_emptied_differ_by_the_memory_alone() -> None:
    ids = text(30)
    found = readings(make(), ids, 8, 3)
    assert list(found) == [CARRIED, EMPTIED, SLIDING_CARRIED, SLIDING_EMPTIED, ONE_CALL]
    for carried, emptied in ((CARRIED, EMPTIED), (SLIDING_CARRIED, SLIDING_EMPTIED)):
        np.testing.assert_array_equal(found[carried][:, :8], found[emptied][:, :8])  # the first window
        assert (np.abs(found[carried] - found[emptied])[:, 8:] > 1e-6).all()
    whole = make()(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    np.testing.assert_allclose(found[ONE_CALL], -whole.detach().numpy(), atol=1e-5)


def test_a_model_without_memory_has_nothing_to_carry() -> None:
    assert list(readings(make("pythia"), text(30), 8, 3)) == [EMPTIED, SLIDING_EMPTIED, ONE_CALL]


def test_a_stride_beyond_the_window_would_leave_tokens_out() -> None:
    with pytest.raises(ValueError, match=r"stride \(9\) must be 1 to the window \(8\)"):
        windowed_nll(make(), text(30), 8, 9, carry=True)


# facts ------------------------------------------------------------------------------------------------------


def test_crossed_prompts_are_of_another_fact_of_the_same_kind() -> None:
    (pairs,) = fact_sets(None).values()
    found = crossed(pairs)
    for pair, other in zip(pairs, found, strict=True):
        assert (other.forward_completion, other.backward_completion) == (
            pair.forward_completion,
            pair.backward_completion,
        )
        assert other.forward_prompt != pair.forward_prompt
        (origin,) = [p for p in pairs if p.forward_prompt == other.forward_prompt and p.source == pair.source]
        assert other.backward_prompt == origin.backward_prompt
    capitals = [p for p in found if "capital" in p.source]
    assert {p.forward_prompt.startswith("The capital of") for p in capitals[::2]} == {True}
    assert {p.forward_prompt.startswith("The capital of") for p in capitals[1::2]} == {False}


# a whole measurement ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(real_text):
    """``(name)`` -> what a tiny model is measured at, on two texts of 300 tokens."""
    documents = [Document("Genesis", real_text[:4_000])]
    tokenizer = train_tokenizer(documents, 520)
    texts = BookHaystack(documents, tokenizer).disjoint(300, 3, __import__("random").Random(0))
    facts = {"facts": fact_sets(None)["well-known facts"][:6]}
    settings = LMEvaluation(length=300, samples=3, stride=20, batch_size=2)

    def run(name: str) -> dict:
        model = make(name, 520).float()
        found = measure(model, tokenizer, texts, facts, 32, settings)
        assert model.session is None
        return json.loads(json.dumps(found))

    return run


def test_a_model_is_measured(measured) -> None:
    found = measured("infini")
    assert found["memory_bytes"] == (2 * (16 * 16 + 16)) * 4 + 8
    assert found["segment_bytes"] == found["memory_bytes"] + 2 * 32 * 16 * 4
    assert found["edges"] == [0, 256, 300]
    assert len(found["texts"]) == 3
    for record in found["texts"]:
        assert all(sum(count for _, count in buckets) == 299 for buckets in record["arms"].values())
    scored = found["reversal"]["facts"]
    assert set(scored) == {RIGHT, CROSSED}
    assert [r["forward_tokens"] for r in scored[RIGHT]] == [c["forward_tokens"] for c in scored[CROSSED]]
    assert all(r["forward_nll"] != c["forward_nll"] for r, c in zip(scored[RIGHT], scored[CROSSED], strict=True))
    assert measured("pythia")["memory_bytes"] == 0


def result(model: str, seed: int, nats: dict[str, list[float]], edges=(0, 256, 1024, 4096)) -> Result:
    """A model whose texts have these nats a token in every bucket (``nats`` by reading)."""
    widths = [b - a for a, b in pairwise(edges)]
    count = len(next(iter(nats.values())))
    texts = [
        {"source": "t", "arms": {a: [[v[i] * w, w] for w in widths] for a, v in nats.items()}} for i in range(count)
    ]
    facts = {"forward_nll": 2.0 + seed, "forward_tokens": 2, "backward_nll": 6.0, "backward_tokens": 2}
    measured = {
        "parameters": 10, "memory_bytes": 8, "segment_bytes": 9, "reading_tokens_per_second": 5.0,
        "edges": list(edges), "texts": texts,
        "reversal": {"facts": {RIGHT: [facts] * 3, CROSSED: [{**facts, "forward_nll": 6.0}] * 3}},
    }  # fmt: skip
    training = {"tokens": 100, "seconds": 4.0, "losses": [5.0, 4.0, 3.0], "tokens_per_step": 33}
    return Result(model, seed, training, measured)


def both(carried: float, emptied: float, spread=(0.0, 0.001, 0.002)) -> dict[str, list[float]]:
    with_memory, without = [carried + s for s in spread], [emptied + 2 * s for s in spread]
    return {
        CARRIED: with_memory,
        EMPTIED: without,
        SLIDING_CARRIED: with_memory,
        SLIDING_EMPTIED: without,
        ONE_CALL: with_memory,
    }


def test_the_report_says_what_was_measured(tmp_path) -> None:
    pythia = {arm: [4.2, 4.3, 4.4] for arm in (EMPTIED, SLIDING_EMPTIED, ONE_CALL)}
    results = [result("pythia", s, pythia) for s in (0, 1)]
    results += [result("infini", s, both(4.0 + s / 100, 4.1 + s / 100)) for s in (0, 1)]
    report = Report("t", {}, tuple(sections(results, 1024)))
    models, texts, memory, reversal = report.sections
    assert [row[0] for row in models.tables[0].rows] == [
        "pythia, seed 0",
        "pythia, seed 1",
        "infini, seed 0",
        "infini, seed 1",
    ]
    assert models.tables[0].rows[0][5] == 25.0
    whole = {row[:2]: row for row in texts.tables[0].rows}
    assert whole["pythia", EMPTIED][2] == pytest.approx(np.exp(4.3))
    assert whole["infini", CARRIED][4] == f"{np.exp(4.001):.2f}, {np.exp(4.011):.2f}"
    against = {row[1]: row for row in texts.tables[2].rows}
    assert against[CARRIED][2].startswith("-0.2940 [")
    assert against[CARRIED][3:] == ("-0.2990, -0.2890", "better")
    beyond = {row[2]: row for row in memory.tables[0].rows}["beyond 1,024 tokens"]
    assert beyond[3].startswith("-0.1010 [")
    assert beyond[5] == "better"
    saved = {row[0]: row for row in reversal.tables[1].rows}
    assert saved["pythia, seed 0"][1:] == ("+2.000 [+2.000, +2.000]", "+0.000 [+0.000, +0.000]")
    assert saved["pythia, seed 1"][1].startswith("+1.500")
    to_json(report)
    files = {path.name for path in write_report(report, tmp_path)}
    assert {"memory_difference.png", "perplexity_segments.png", "training_loss.png", "report.md"} <= files


def test_seeds_that_disagree_show_nothing() -> None:
    spread = np.array([0.0, 0.001, 0.002])
    assert _verdict([spread - 1.0, spread - 0.9])[2] == "better"
    assert _verdict([spread - 1.0, spread + 0.01])[2] == "nothing shown: the seeds disagree"
    assert _verdict([spread - 0.0015, spread - 0.0012])[2] == "nothing shown"


def test_a_perplexity_that_is_too_good_is_flagged() -> None:
    results = [result("infini", 0, both(1.0, 4.0))]
    flags = sections(results, 1024)[1].flags
    assert [arm for arm in (CARRIED, EMPTIED, ONE_CALL) if any(arm in flag for flag in flags)] == [CARRIED, ONE_CALL]


def test_one_text_and_one_seed_make_a_report_without_intervals() -> None:
    results = [result("infini", 0, {arm: values[:1] for arm, values in both(4.0, 4.1).items()})]
    texts, memory = sections(results, 1024)[1:3]
    assert texts.tables[0].rows[0][3] is None
    assert memory.tables[0].rows[0][5] == "nothing shown: one text"


def test_models_without_memory_have_no_section_on_it() -> None:
    results = [result("pythia", 0, {arm: [4.0, 4.1] for arm in (EMPTIED, SLIDING_EMPTIED, ONE_CALL)})]
    titles = [section.title for section in sections(results, 1024)]
    assert titles == ["Models", "Perplexity of long texts", "Reversal curse: facts"]


def test_texts_come_in_batches_of_any_size(measured) -> None:
    stretch = Stretch(text(30, 1)[0].numpy().astype(np.int32), np.array([0, 30]), "x")
    assert stretch.ids.dtype == np.int32
    one, two = (readings(make(), text(30)[: n or 2], 8, 3)[CARRIED][0] for n in (1, 2))
    np.testing.assert_allclose(one, two, atol=1e-6)
