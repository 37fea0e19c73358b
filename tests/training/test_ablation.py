"""The ablations' questions, asked of planted memories whose score is known beforehand."""

import importlib.util
from pathlib import Path

import pytest
import torch

import senri.training.fit as fit
from senri.training.fit import Reading
from senri.training.settings import FeatureSettings

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ablation.py"
SETTINGS = FeatureSettings(
    streams=4, pages=2, page_size=160, questions=2, gate_steps=5, gate_negative_weight=8.0, steps=2, texts=2,
    fact_pages=3, plain_pages=1, learning_rate=1e-3, gate_learning_rate=5e-3, weight_decay=0.0, save_steps=2,
)  # fmt: skip
TOLD = ("right", "overwritten")
LEFT = ("untold", "unrelated", "messages")


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("ablation", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "TEXTS", 20)
    monkeypatch.setattr(fit, "VOCABULARY", 512)
    return module


def says(monkeypatch, reading, of):
    """Let the memories add what ``of`` makes of each question."""
    plain = torch.zeros(fit.SILENT, reading.embedding.shape[1])

    def added(texts):
        return [torch.cat([*(of(q) for q in (*text.asked, *text.unknown)), plain]) for text in texts], {}

    monkeypatch.setattr(reading, "added", added)


@pytest.fixture
def reading(script, make_reader, make_features):
    model = make_reader()
    return Reading(model, make_features(model), SETTINGS, 0)


def test_a_memory_that_says_every_answer_is_right_and_leaves_nothing_alone(script, reading, monkeypatch):
    says(monkeypatch, reading, lambda question: 100 * reading.embedding[question.target])
    reading.embedding = torch.nn.functional.normalize(reading.embedding, dim=-1)
    found = script.ask(reading)
    assert all(found[name][0] == found[name][1] > 0 for name in TOLD), found
    assert all(found[name][0] < found[name][1] for name in LEFT if found[name][1])


def test_an_empty_memory_leaves_all_alone_and_is_hardly_ever_right(script, reading, monkeypatch):
    says(monkeypatch, reading, lambda question: torch.zeros_like(question.final))
    found = script.ask(reading)
    assert found["right"][0] < 0.1 * found["right"][1]
    assert all(found[name][0] == found[name][1] > 3 for name in LEFT)


def test_what_several_memories_add_is_summed(script, reading):
    reading.rng = script.Random(0)
    text = reading.draw()
    with torch.no_grad():
        (added,), shares = reading.added([text])
        each = [reading.reads(i, m, [text])[0][0] for i, m in reading.model.model.memories.items()]
    assert len(each) == 2
    assert shares == {}, "a matrix has no slots"
    torch.testing.assert_close(added, sum(each))


def test_a_table_has_a_row_for_each_result(script):
    counts = {"right": (90, 100), "overwritten": (8, 10), "untold": (50, 60), "unrelated": (1, 2), "messages": (3, 4)}
    written = {"plain tokens written": (1, 1000), "value tokens written": (3, 4)}
    lines = script.table([{"name": "layer 6", **counts, **written}]).splitlines()
    assert lines[-1].startswith("| layer 6 | 90 of 100 [83%, 94%] | 8 of 10 [")
    assert lines[-1].endswith("| 0.10% | 75% |")
    assert len({line.count("|") for line in lines}) == 1
