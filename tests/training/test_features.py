"""Cached features against the model itself, read text by text and question by question."""

from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F

from senri.layers import taps_of
from senri.training.features import (
    BATCH,
    REPLY_TOKENS,
    AskedFeatures,
    collect,
    join,
    load_features,
    memory_left_out,
    save_features,
)
from senri.training.settings import TrainingError

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
STREAMS = range(5)  # two batches, the second one smaller


@pytest.fixture(scope="module")
def model(make_reader):
    return make_reader()


@pytest.fixture(scope="module")
def features(model, make_features):
    return make_features(model, STREAMS)


@pytest.fixture(scope="module")
def run(make_reader):
    """``ids`` -> last hidden states and the memory layers' inputs, of the same base without a memory, in one go."""
    plain = make_reader(num_memory_layers=0)
    kept = {}
    for i in (1, 2):
        norm = plain.model.layers[i].input_layernorm
        norm.register_forward_hook(lambda module, args, out, i=i: kept.__setitem__(i, out[0]))

    @torch.no_grad()
    def run(ids):
        final = plain.model(torch.as_tensor(ids)[None].long()).last_hidden_state[0]
        return final, dict(kept), plain.lm_head(final)

    return run


def ids_of(stream):
    return torch.cat([torch.from_numpy(page.ids) for page in stream]).long()


def test_pages_are_what_the_model_reads_as_one_text(features, pages, run):
    size = pages.size * pages.pages
    assert features.page_size == pages.size
    assert len(features.ids) == len(features.final_at) == len(features.write) == len(features.facts) * pages.size
    assert features.fact_of.shape == features.ids.shape
    assert features.fact_of.max() > 0
    for place, index in enumerate(STREAMS):
        stream, rows = pages.stream(index), slice(place * size, (place + 1) * size)
        assert torch.equal(features.ids[rows], ids_of(stream))
        assert features.write[rows].tolist() == [label for page in stream for label in page.write.tolist()]
        assert features.facts[place * pages.pages : (place + 1) * pages.pages] == [list(page.facts) for page in stream]
        assert features.fact_of[rows].tolist() == [number for page in stream for number in page.fact_of.tolist()]
        assert (features.stream[rows] == features.stream[place * size]).all()
        final, hidden, _ = run(ids_of(stream))
        known = features.final_at[rows]
        if any(page.facts for page in stream):  # the memory's inputs are all that is needed of it
            assert (known == -1).all()
        else:
            torch.testing.assert_close(features.final[known], final, **CLOSE)
        assert features.hidden.keys() == hidden.keys() == {1, 2}
        for i in hidden:
            torch.testing.assert_close(features.hidden[i][rows], hidden[i], **CLOSE)
    assert len(features.stream.unique()) == len(STREAMS)
    assert features.final_at.max() + 1 == len(features.final) > 0
    assert (features.final_at == -1).any()


def test_a_surprise_gate_reads_all_streams_to_the_end(make_reader, make_features, pages, run):
    features = make_features(make_reader(write_gate="surprise"), STREAMS)
    assert torch.equal(features.final_at, torch.arange(len(features.ids)))
    final = torch.cat([run(ids_of(pages.stream(index)))[0] for index in STREAMS])
    torch.testing.assert_close(features.final, final, **CLOSE)


@pytest.mark.parametrize(("conv_size", "context_size"), [(0, 0), (4, 0), (0, 40)])
def test_questions_are_what_the_model_makes_of_each_alone(
    make_reader, make_features, pages, run, conv_size, context_size
):
    """So that neither the other questions of a batch nor the padding behind the shorter ones changes anything."""
    streams = (0, 1, 2)
    model = make_reader(memory_conv_size=conv_size, memory_context_size=context_size)
    running = ids_of(pages.stream(2)).tolist()
    found = [asked for asked in make_features(model, streams).asked if not asked.left_to_base]
    before = taps_of(conv_size, context_size) - 1
    expected = []
    for number, page in enumerate(page for index in streams for page in pages.stream(index)):
        for question in page.questions:
            exchange = question.exchange
            ids = [*question.lead.tolist(), *exchange.prompt, *exchange.answer]
            length = len(ids)
            if question.late:
                ids = [*running, *ids]
            final, hidden, _ = run(ids)
            part = slice(len(ids) - len(exchange.answer) - 1, len(ids) - 1)  # what predicts the answer
            missing = max(before - part.start, 0)  # the text begins behind them
            kept = slice(part.start - before + missing, part.stop)
            rest = (number, question.fact, exchange.answer, missing)
            behind = {i: F.pad(h[kept], (0, 0, missing, 0)) for i, h in hidden.items()}
            expected.append(((not question.late, length), rest, final[part], behind))
    expected.sort(key=lambda item: item[0])
    assert len({late for (late, _), *_ in expected}) == 2
    assert len(found) == len(expected) > BATCH
    assert len({length for length, *_ in expected[:BATCH]}) > 3, "there is padding"
    for asked, (_, rest, final, hidden) in zip(found, expected, strict=True):
        assert (asked.page, asked.fact, asked.target.tolist(), asked.missing) == rest
        torch.testing.assert_close(asked.final, final, **CLOSE)
        for i in (1, 2):
            torch.testing.assert_close(asked.hidden[i], hidden[i], **CLOSE)

    assert any(asked.missing for asked in found) == (context_size > 0)


def test_questions_behind_a_text_need_one(model, make_features):
    with pytest.raises(TrainingError, match="no stream is plain text to ask questions behind: raise streams"):
        make_features(model, (0, 1))


@pytest.mark.parametrize("what", ["no page answers", "a message tells"])
def test_the_base_answers(features, pages, make_reader, what):
    found = [asked for asked in features.asked if asked.left_to_base and (asked.page == -1) == (what[0] == "n")]
    if what == "no page answers":
        prompts = [(-1, -1, prompt, None) for prompt in pages.unrelated()]
    else:
        read = [page for index in STREAMS for page in pages.stream(index)]
        said = [(number, message) for number, page in enumerate(read) for message in page.messages]
        prompts = [(n, m.fact, [*m.lead.tolist(), *m.exchange.prompt], m.late) for n, m in said]
        assert {late for *_, late in prompts} == {True, False}
    plain, expected, late = make_reader(num_memory_layers=0), [], len(prompts) // 2
    for page, fact, prompt, _late in prompts:
        ids = torch.tensor([prompt])
        out = plain.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=REPLY_TOKENS, do_sample=False, pad_token_id=2
        )
        expected.append((page, fact, out[0, len(prompt) :].tolist()))
    assert expected
    assert sorted((asked.page, asked.fact, asked.target.tolist()) for asked in found) == sorted(expected)
    if what == "a message tells":
        late = sum(behind for *_, behind in prompts)
    own = [torch.equal(plain.lm_head(asked.final).argmax(-1), asked.target) for asked in found]
    assert sum(own) == len(found) - late, "nothing but the base's own words, but where it is asked behind a text"


def test_parts_are_joined_in_order(model, pages, features):
    """Every page, and every question to it; what is asked behind a text stands behind one of its part."""
    parts = [collect(model, pages, part, batch=2, unrelated=part.start == 0) for part in (range(3), range(3, 6))]
    joined, whole = join(parts), collect(model, pages, range(6), batch=3)
    for name in ("page_size", "facts"):
        assert getattr(joined, name) == getattr(whole, name)
    for name in ("ids", "write", "fact_of", "stream", "final_at", "surprise"):
        assert torch.equal(getattr(joined, name), getattr(whole, name)), name
    torch.testing.assert_close(joined.final, whole.final, **CLOSE)
    assert joined.hidden.keys() == whole.hidden.keys()
    for i, rows in whole.hidden.items():
        torch.testing.assert_close(joined.hidden[i], rows, **CLOSE)

    def asked(features):
        return sorted((q.page, q.fact, q.left_to_base, q.target.tolist(), q.missing) for q in features.asked)

    assert asked(joined) == asked(whole)
    assert {q.page for q in joined.asked} > {-1, 0, 6}, "pages of both parts, and what no page answers"


def test_all_is_shown_at_last(model, pages):
    seen = []
    features = collect(model, pages, [0, 2], batch=1, show=lambda done, total: seen.append((done, total)))
    done, totals = zip(*seen, strict=True)
    assert list(done) == sorted(set(done))
    assert set(totals) == {done[-1]}
    assert done[-1] > len(features.ids)


def test_saved_and_loaded_they_are_the_same(features, tmp_path):
    save_features(features, tmp_path / "features.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["features.pt"]
    loaded = load_features(tmp_path / "features.pt")

    def check(a, b):
        for field in fields(a):
            one, two = getattr(a, field.name), getattr(b, field.name)
            if field.name == "hidden":
                assert one.keys() == two.keys()
                assert all(torch.equal(one[i], two[i]) for i in one)
            elif isinstance(one, torch.Tensor):
                assert torch.equal(one, two)
                assert one.dtype == two.dtype
            elif field.name != "asked":
                assert one == two

    check(loaded, features)
    assert any(loaded.facts)
    assert all(isinstance(fact, str) for page in loaded.facts for fact in page)
    assert loaded.fact_of.dtype == torch.int16
    assert all(isinstance(question.fact, int) for question in loaded.asked)
    assert all(isinstance(question, AskedFeatures) for question in loaded.asked)
    for a, b in zip(loaded.asked, features.asked, strict=True):
        check(a, b)


def test_a_model_is_whole_again_afterwards(model, make_reader, tokens):
    ids = tokens(1, 150)
    with torch.no_grad():
        speaks, alone = model(ids).logits, make_reader(num_memory_layers=0)(ids).logits
        assert (speaks - alone).abs().max() > 1e-2
        with memory_left_out(model) as inputs:
            torch.testing.assert_close(model(ids).logits, alone, **CLOSE)
            assert inputs.keys() == {1, 2}
        assert torch.equal(model(ids).logits, speaks)
    assert not any(layer.input_layernorm._forward_hooks for layer in model.model.layers)


def test_a_model_is_whole_again_after_an_error(model):
    def interrupted():
        with memory_left_out(model):
            assert model.config.memory_layers == []
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert model.config.num_memory_layers == 2
    assert len(model.config.memory_layers) == 2
    assert not any(layer.input_layernorm._forward_hooks for layer in model.model.layers)


def test_surprise_is_there_where_a_gate_asks_for_it(features, make_reader, make_features, pages, run):
    assert not features.surprise.any()
    found = make_features(make_reader(write_gate="surprise"), (0, 1, 2)).surprise
    assert found.dtype == torch.float32
    for index, part in enumerate(found.chunk(3)):
        ids = ids_of(pages.stream(index))
        expected = F.cross_entropy(run(ids)[2][:-1], ids[1:], reduction="none")
        assert part[0] == 0, "nothing predicts a text's first token"
        torch.testing.assert_close(part[1:], expected, rtol=1e-4, atol=1e-3)
        assert expected.std() > 0.1
