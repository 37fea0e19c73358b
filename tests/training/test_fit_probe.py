"""Answers on held-out pages, counted of planted memories whose score is known beforehand."""

from random import Random

import pytest
import torch

import senri.training.fit as fit
from senri.training.fit import Reading
from senri.training.fit_probe import LEFT_ALONE, RIGHT, count_answers
from senri.training.settings import FeatureSettings

SETTINGS = FeatureSettings(
    streams=4, pages=2, page_size=160, questions=2, learns="all", gate_steps=5,
    write_rate=0.01, steps=2, texts=2,
    fact_pages=3, plain_pages=1, learning_rate=1e-3, gate_learning_rate=5e-3, weight_decay=0.0, save_steps=2,
)  # fmt: skip


def says(monkeypatch, reading, of):
    """Let the memories add what ``of`` makes of each question."""
    plain = torch.zeros(fit.SILENT, reading.embedding.shape[1])

    def added(texts):
        return [torch.cat([*(of(q) for q in (*text.asked, *text.unknown)), plain]) for text in texts], {}

    monkeypatch.setattr(reading, "added", added)


@pytest.fixture
def read_by(make_reader, make_features, monkeypatch):
    """``(rule)`` -> readings by a model with that rule."""
    monkeypatch.setattr(fit, "VOCABULARY", 512)

    def make(rule):
        model = make_reader(update_rule=rule)
        with torch.no_grad():  # the end, which pads, too, would be zeros
            model.model.embed_tokens.weight[2] = torch.linspace(-1, 1, model.config.hidden_size)
        return Reading(model, make_features(model), SETTINGS, 0)

    return make


@pytest.fixture
def reading(read_by):
    return read_by("delta_token")


def test_a_memory_that_says_every_answer_is_right_and_leaves_nothing_alone(read_by, monkeypatch):
    reading = read_by("slot")
    says(monkeypatch, reading, lambda question: 100 * reading.embedding[question.target])
    reading.embedding = torch.nn.functional.normalize(reading.embedding, dim=-1)
    found = count_answers(reading, 20, 1000)
    assert all(found[name][0] == found[name][1] > 0 for name in RIGHT), found
    assert all(found[name][0] < found[name][1] for name in LEFT_ALONE if found[name][1])


def test_an_answer_without_its_end_is_right_and_not_ended(read_by, monkeypatch):
    reading = read_by("slot")

    def value_alone(question):
        said = 100 * reading.embedding[question.target]
        return said.where(torch.arange(len(said))[:, None] < len(said) - 1, -100 * reading.embedding[2])

    says(monkeypatch, reading, value_alone)
    reading.embedding = torch.nn.functional.normalize(reading.embedding, dim=-1)
    found = count_answers(reading, 20, 1000)
    assert found["right"][0] == found["right"][1] > 0
    assert found["ended"][0] == 0 < found["ended"][1] < found["right"][1], "of chat turns alone"


def test_an_empty_memory_leaves_all_alone_and_is_hardly_ever_right(reading, monkeypatch):
    says(monkeypatch, reading, lambda question: torch.zeros_like(question.final))
    found = count_answers(reading, 20, 1000)
    assert found["ended"] == (0, 0), "a matrix knows no end"
    assert found["right"][0] < 0.1 * found["right"][1]
    assert all(found[name][0] == found[name][1] > 3 for name in LEFT_ALONE)


def test_what_several_memories_add_is_summed(reading):
    reading.rng = Random(0)
    text = reading.draw()
    with torch.no_grad():
        (added,), shares = reading.added([text])
        each = [reading.reads(i, m, [text])[0][0] for i, m in reading.model.model.memories.items()]
    assert len(each) == 2
    assert shares == {}, "a matrix has no slots"
    torch.testing.assert_close(added, sum(each))
