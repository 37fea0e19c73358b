"""The fit of the unigram cache: it finds what makes a text's own words likelier, and leaves the rest alone."""

import pytest
import torch

from senri.data.corpus import Document
from senri.training.settings import TrainingError
from senri.training.unigram import UNSEEN, UnigramSettings, background, fit_unigram_cache

SETTINGS = UnigramSettings(texts=2, length=500, every=3, background_tokens=3000)


@pytest.fixture(scope="module")
def documents(real_text):
    return [Document(f"book {i}", real_text[i * 500_000 : i * 500_000 + 9000]) for i in range(3)]


def test_the_background_counts_the_beginnings(documents, real_tokenizer):
    tokens = 600
    found = background(documents, real_tokenizer, tokens, 49152).double().exp()
    assert found.sum() == pytest.approx(1, abs=1e-4)
    ids = [real_tokenizer(d.text[: round(4.3 * tokens / 3)])["input_ids"] for d in documents]
    counts = torch.bincount(torch.tensor([i for text in ids for i in text]), minlength=49152) + UNSEEN
    torch.testing.assert_close(found, (counts / counts.sum()).double(), rtol=1e-4, atol=0)


def test_it_fits_on_texts_and_changes_nothing_else(make_reader, documents, real_tokenizer):
    model = make_reader()
    before = {name: p.clone() for name, p in model.named_parameters()}
    progress = []
    report = fit_unigram_cache(
        model, documents, real_tokenizer, SETTINGS, 0, piece_size=64, show=lambda *now: progress.append(now)
    )
    assert model.config.unigram_cache
    assert report.predictions == pytest.approx(2 * (500 - 2 * 112) / 3, abs=3)
    assert progress[-1] == (2 * 500 - 1, 2 * 500)
    assert report.loss_with < report.loss_without - 0.05, "a model that knows nothing gains from a text's own words"
    assert report.strength > 0.05
    assert model.unigram_cache.strength.item() == pytest.approx(report.strength)
    frequency = background(documents, real_tokenizer, 3000, 49152)
    expected = -frequency - torch.tensor(report.smoothing).log()
    torch.testing.assert_close(model.unigram_cache.log_rarity.data, expected)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    again = fit_unigram_cache(model, documents, real_tokenizer, SETTINGS, 0, piece_size=64)
    assert again.strength == pytest.approx(report.strength, rel=1e-3), "it starts anew"


def test_what_was_fitted_is_what_the_model_computes(make_reader, documents, real_tokenizer, tokens):
    model = make_reader()
    fit_unigram_cache(model, documents, real_tokenizer, SETTINGS, 0, piece_size=64)
    ids = torch.tensor(real_tokenizer(documents[0].text)["input_ids"])[None, :400]
    with torch.no_grad():
        loss = [model(ids, labels=ids).loss.item()]
        model.unigram_cache.strength.zero_()
        loss.append(model(ids, labels=ids).loss.item())
    assert loss[0] < loss[1]


def test_texts_that_are_too_short_are_refused(make_reader, documents, real_tokenizer):
    settings = UnigramSettings(texts=1, length=200, every=3, background_tokens=1000)
    with pytest.raises(TrainingError, match=r"unigram\.length is 200 and must be more than two windows"):
        fit_unigram_cache(make_reader(), documents, real_tokenizer, settings, 0)
