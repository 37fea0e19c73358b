"""Training on cached features: the write gate finds what is asked for, and what learns is the model itself."""

import copy
import io
import math
from dataclasses import replace
from random import Random

import pytest
import torch
import torch.nn.functional as F

import senri.training.fit as fit
from senri.layers import WriteGate
from senri.training.features import Features, memory_left_out
from senri.training.fit import SCALE, Reading, Text, check_model, fit_write_gates, prepare
from senri.training.settings import FeatureSettings, TrainingError

from ..conftest import STORES

SETTINGS = FeatureSettings(
    streams=4,
    pages=2,
    page_size=160,
    questions=2,
    learns="all",
    gate_steps=400,
    write_rate=0.01,
    steps=6,
    texts=2,
    fact_pages=2,
    plain_pages=1,
    learning_rate=1e-2,
    gate_learning_rate=5e-2,
    weight_decay=0.01,
    save_steps=3,
)


CONTEXT = {"memory_conv_size": 0, "memory_context_size": 40}  # more than stands before the shortest questions


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch):
    monkeypatch.setattr(fit, "VOCABULARY", 512)
    for name, count in (("POSITIVES", 64), ("NEGATIVES", 256), ("HARD", 64)):
        monkeypatch.setattr(fit, name, count)


@pytest.fixture(scope="module")
def features(make_reader, make_features):
    return make_features(make_reader())


@pytest.fixture(scope="module")
def context_features(make_reader, make_features):
    return make_features(make_reader(**CONTEXT))


@torch.no_grad()
def write_some(model, features):
    """Write gates that let through a quarter of all tokens, of any kind."""
    for index, memory in model.model.memories.items():
        gate, hidden = memory.write_gate, features.hidden[index]
        gate.out_proj.weight *= 8
        logits = gate(hidden[:-1], hidden[1:], features.surprise[:-1])
        gate.out_proj.bias -= logits.quantile(0.75, 0) + math.log(11)  # below: exactly 0
    return model


@pytest.fixture
def make_reading(make_reader, features):
    """``(features, options, **settings)`` -> a new model that is about to learn to read."""

    def make(features=features, options=None, **changes):
        model = write_some(make_reader(**(options or {})), features)
        prepare(model, features)
        return Reading(model, features, replace(SETTINGS, **changes), seed=0)

    return make


# the write gate --------------------------------------------------------------------------------------------------


@pytest.fixture
def separable():
    """Features of three streams in which what is asked for differs from the rest; far from mean 0 and variance 1."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    tokens = 3000
    kinds = torch.rand(tokens, generator=generator)
    write = (kinds < 0.1).to(torch.int8) - ((kinds >= 0.1) & (kinds < 0.15)).to(torch.int8)
    hidden = {}
    for index in (1, 2):
        width = random(32).exp()
        mark = random(32).sign() * 2
        hidden[index] = 10 * random(32) + width * (random(tokens, 32) + mark * (write == 1)[:, None])
    stream = torch.arange(tokens) // 1000
    nothing = torch.zeros(tokens, 1)
    surprise, fact_of = random(tokens).abs(), torch.full((tokens,), -1, dtype=torch.int16)
    return Features(
        500, torch.zeros(tokens).long(), write, stream, nothing, torch.arange(tokens), surprise, hidden, [], fact_of, []
    )


@pytest.mark.parametrize("write_gate", ["hidden", "surprise"])
def test_a_gate_is_shut_for_plain_text_and_open_for_what_is_asked(make_senri, separable, write_gate, monkeypatch):
    learned = []

    class Kept(WriteGate):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            learned.append(self)

    monkeypatch.setattr(fit, "WriteGate", Kept)
    model = make_senri(dtype=torch.float32, write_gate=write_gate, memory_readout="head")
    shown = []
    fit_write_gates(model, separable, SETTINGS, 0, shown.append)
    assert [entry["step"] for entry in shown] == [100, 200, 300, 400, 500, 600, 700, 800], "one count for both gates"
    assert shown[3]["missed"] < shown[0]["missed"]
    inside = torch.ones(3000, dtype=torch.bool)
    inside[999::1000] = False  # nothing follows
    asked, plain = ((separable.write == kind) & inside for kind in (1, 0))
    for (index, memory), gate in zip(model.model.memories.items(), learned, strict=True):
        hidden, surprise = separable.hidden[index], separable.surprise
        with torch.no_grad():
            strength = memory.write_gate.strength(memory.write_gate(hidden, hidden.roll(-1, 0), surprise))
            written = (strength[plain] > 0).float().mean()
            assert abs(written - SETTINGS.write_rate) < 0.002, "of the plain tokens as many as are asked for"
            assert strength[asked].min() > 0.5
            # the weights that are left take the inputs as they are
            double = hidden.double()
            standard = (double - double.mean(0)) / double.std(0)
            expected = gate.double()(standard, standard.roll(-1, 0), surprise.double())
            raw = copy.deepcopy(memory.write_gate).double()
            found = raw(double, double.roll(-1, 0), surprise.double())
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)


def test_a_gate_is_shut_for_the_words_around_a_value(make_senri, separable):
    """They look like values where nothing tells the gate otherwise: half of what makes a value is their mark, too."""
    around = separable.write == -1
    for index, hidden in separable.hidden.items():
        mark = hidden[separable.write == 1].mean(0) - hidden[separable.write == 0].mean(0)
        hidden[around] += mark * (torch.arange(32) % 2)
        separable.hidden[index] = hidden
    model = make_senri(dtype=torch.float32, write_gate="hidden", memory_readout="head")
    fit_write_gates(model, separable, SETTINGS, 0)
    inside = torch.ones(3000, dtype=torch.bool)
    inside[999::1000] = False  # nothing follows
    for index, memory in model.model.memories.items():
        hidden = separable.hidden[index]
        with torch.no_grad():
            strength = memory.write_gate.strength(memory.write_gate(hidden, hidden.roll(-1, 0)))
        assert strength[around & inside].mean() < 0.05
        assert strength[(separable.write == 1) & inside].mean() > 0.9


def test_doubtful_tokens_are_stops_before_they_are_words_around_a_value(make_senri, separable, monkeypatch):
    """Last tokens of values, words around them and some plain tokens look alike: what each counts decides."""
    write = torch.zeros(3000, dtype=torch.int8)
    starts = torch.arange(10, 2990, 20)
    stops, around, plain = starts + 1, starts + 5, starts[::3] + 10
    write[starts], write[stops], write[around] = 1, 1, -1
    separable.write = write
    generator = torch.Generator().manual_seed(1)
    for index, hidden in separable.hidden.items():
        hidden = torch.randn(hidden.shape, generator=generator)
        hidden[starts, :8] += 4
        hidden[torch.cat([stops, around, plain]), 8:16] += 4
        separable.hidden[index] = hidden
    found = []
    for weights in ((0.0, 1.0), (fit.STOP_WEIGHT, 1.0), (fit.STOP_WEIGHT, fit.AROUND_WEIGHT)):
        for name, weight in zip(("STOP_WEIGHT", "AROUND_WEIGHT"), weights, strict=True):
            monkeypatch.setattr(fit, name, weight)
        model = make_senri(dtype=torch.float32, write_gate="hidden", memory_readout="head")
        fit_write_gates(model, separable, SETTINGS, 0)
        memory, hidden = model.model.memories[1], separable.hidden[1]
        with torch.no_grad():
            logits = memory.write_gate(hidden, torch.zeros_like(hidden), separable.surprise)[:, 0]
        low, high = logits[write == 0].median(), logits[starts].median()
        found.append(((logits[plain].median() - low) / (high - low)).item())  # 0: as plain text, 1: as a value
    as_others, stops_more, around_more = found
    assert stops_more > as_others + 0.03
    assert around_more < stops_more - 0.1


def test_noise_keeps_a_gate_from_learning_by_heart(make_senri, separable, monkeypatch):
    """Labels that mean nothing can be learned no other way."""
    kinds = torch.where(separable.write == 1, 0, separable.write)
    kinds[torch.randperm(3000, generator=torch.Generator().manual_seed(0))[:60]] = 1
    separable.write = kinds
    missed = []
    for noise in (0.0, fit.NOISE):
        monkeypatch.setattr(fit, "NOISE", noise)
        model, shown = make_senri(dtype=torch.float32, write_gate="hidden", memory_readout="head"), []
        fit_write_gates(model, separable, SETTINGS, 0, shown.append)
        missed.append(shown[-1]["missed"])
    assert missed[1] > 2 * missed[0]


def test_a_gate_is_the_same_whenever_it_is_fitted(make_senri, separable):
    models = [make_senri(dtype=torch.float32, write_gate="hidden", memory_readout="head") for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        torch.manual_seed(seed + len(models))  # of no account
        fit_write_gates(model, separable, replace(SETTINGS, gate_steps=5), seed)
    one, two, other = (dict(model.model.memories[1].write_gate.named_parameters()) for model in models)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["in_proj.weight"], other["in_proj.weight"])


def test_a_gate_goes_on_from_what_it_is(make_senri, separable):
    model = make_senri(dtype=torch.float32, write_gate="hidden", memory_readout="head")
    fit_write_gates(model, separable, SETTINGS, 0)
    memories = model.model.memories.items()

    def logits(gate, index):
        hidden = separable.hidden[index]
        return gate(hidden, hidden.roll(-1, 0), separable.surprise)

    with torch.no_grad():
        before = {index: logits(memory.write_gate, index) for index, memory in memories}
        fit_write_gates(model, separable, replace(SETTINGS, gate_steps=0), 0, anew=False)
        for index, memory in memories:  # from the standardised inputs and back
            torch.testing.assert_close(logits(memory.write_gate, index), before[index], rtol=1e-3, atol=2e-3)
    first, again = [], []
    fit_write_gates(model, separable, replace(SETTINGS, gate_steps=1), 0, first.append, anew=False)
    fit_write_gates(model, separable, replace(SETTINGS, gate_steps=1), 0, again.append)
    assert all(one["missed"] < 0.2 * other["missed"] for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("kind", [0, 1])
def test_without_both_kinds_of_tokens_there_is_nothing_to_learn(make_senri, separable, kind):
    model = make_senri(dtype=torch.float32, write_gate="hidden", memory_readout="head")
    with pytest.raises(TrainingError, match="hold no facts, or nothing but facts"):
        fit_write_gates(model, replace(separable, write=torch.full((3000,), kind)), SETTINGS, 0)


@pytest.mark.parametrize(
    "config",
    [{"memory_readout": "layer"}, {"write_gate": "none"}, {"num_memory_layers": 0}],
    ids=["layer", "no gate", "no memory"],
)
def test_a_model_that_features_cannot_train(make_senri, config):
    options = {"memory_readout": "head", "write_gate": "hidden", "update_rule": "delta_token"}
    check_model(make_senri(**options))
    check_model(make_senri(**{**options, "write_gate": "surprise"}))
    with pytest.raises(TrainingError, match="memory_readout head and write_gate hidden or surprise") as error:
        check_model(make_senri(**{**options, **config}))
    assert "\n" not in str(error.value)
    assert "method bptt" in str(error.value)


@pytest.mark.parametrize("rule", ["delta", "gated_delta"])
def test_rules_that_count_what_is_not_written_are_refused(make_senri, rule):
    """A text put together from pages has only the pairs that were let through."""
    with pytest.raises(TrainingError, match=f"update_rule linear, delta_token or slot, not {rule}"):
        check_model(make_senri(memory_readout="head", write_gate="hidden", update_rule=rule))


@pytest.mark.parametrize("store", STORES, ids=str)
def test_a_store_that_counts_what_is_not_written_is_refused(make_senri, store):
    model = make_senri(**{"memory_readout": "head", "write_gate": "hidden", **store})
    if store.get("store") == "routed":
        check_model(model)
        return
    with pytest.raises(
        TrainingError, match="store single or routed, memory_sharing false and use_alibi false"
    ) as error:
        check_model(model)
    assert "\n" not in str(error.value)


# a text put together from features is what the model reads -------------------------------------------------------


def questions(pages, streams):
    """Of the questions that are asked in a window of their own, the last of the features, in order: the token ids, and
    where what predicts the answer stands.
    """
    found = []
    for page in (page for index in streams for page in pages.stream(index)):
        for question in (question for question in page.questions if not question.late):
            exchange = question.exchange
            ids = [*question.lead.tolist(), *exchange.prompt, *exchange.answer]
            found.append((torch.tensor([ids]), slice(len(ids) - len(exchange.answer) - 1, len(ids) - 1)))
    return sorted(found, key=lambda item: item[0].shape[1])


@torch.no_grad()
def read(model, text):
    """A whole text read, its window flushed."""
    cache = model.model.new_cache()
    model.model(text[None], past_key_values=cache)
    model.model.flush(cache)
    return cache


@torch.no_grad()
def heard(model, text, ids, part):
    """What the memory of a text adds to a question's hidden states; and the logits."""
    cache = text.fork()
    assert model.config.sliding_window_size >= ids.shape[1], "nothing of the question is written"
    out = model.model(ids, past_key_values=cache).last_hidden_state
    with memory_left_out(model):
        silent = model.model(ids).last_hidden_state
    return (out - silent)[0, part], model.lm_head(out)[0, part]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"write_gate": "surprise", "memory_conv_size": 2},
        {"update_rule": "linear", "memory_conv_size": 3},
        {"update_rule": "linear", "store": "routed", "top_k_memories": 3, "routing": "on"},
        {"memory_conv_size": 0, "memory_num_heads": 4, "memory_num_key_value_heads": 2, "memory_head_dim": 6},
        CONTEXT,
        {**CONTEXT, "memory_context_size": 5, "memory_num_heads": 4, "memory_num_key_value_heads": 2},
        {**CONTEXT, "update_rule": "slot"},
        {"update_rule": "slot", "memory_num_heads": 4, "memory_num_key_value_heads": 2, "memory_head_dim": 6},
    ],
    ids=[
        "four taps",
        "surprise",
        "linear",
        "routed",
        "heads",
        "context",
        "context of heads",
        "slots",
        "slots of heads",
    ],
)
def test_a_text_of_pages_is_what_the_model_reads(make_reader, make_features, pages, options):
    model, streams = make_reader(**options), [index for index in range(24) if index % 3 != 2]
    features = make_features(model, [*streams, 5])  # the last one plain, for the silent part
    write_some(model, features)
    reading = Reading(model, features, SETTINGS, seed=0)
    asked, size, count = questions(pages, streams), pages.size * pages.pages, pages.pages
    window, known = model.config.sliding_window_size, [q for q in features.asked if not q.left_to_base][-len(asked) :]
    of_page = [(q, *of) for q, of in zip(known, asked, strict=True) if of[0].shape[1] <= window]
    start = int(reading.silent[0])
    texts, real, first_tokens, shares = [], [], 0, []
    for place in range(len(streams)):
        rows = slice(place * size, (place + 1) * size)
        mine = [p for p in range(len(features.facts)) if p // count == place]
        of_text = [of for of in of_page if of[0].page in mine][:6]
        last = rows.stop - 1
        for index, memory in model.model.memories.items():
            row = features.hidden[index][last]
            gate = memory.write_gate
            if gate.strength(gate(row, torch.zeros_like(row), features.surprise[last])).any():
                break  # features leave out what nothing follows
        else:
            told = [(p, frozenset(range(len(features.facts[p])))) for p in mine]
            every = [q for q, *_ in of_text]
            texts.append(Text(told, every[:4], every[4:], start))
            text = read(model, features.ids[rows])
            real.append([heard(model, text, ids, part) for _, ids, part in of_text])
            written = [torch.cat([reading.pairs[i][p][0] for p in mine]) for i in (1, 2)]
            first_tokens += sum(int((w < rows.start + max(reading_taps(model) - 1, 3)).sum()) for w in written)
            shares += [len(w) / size for w in written]
    assert len(texts) >= 2, "texts of different numbers of pairs side by side"
    assert first_tokens, "whose convolution begins before the text"
    assert 0.02 < min(shares) < max(shares) < 0.8
    missing = [q.missing for text in texts for q in (*text.asked, *text.unknown)]
    assert (max(missing) > 0) == (reading_taps(model) > 20), "questions with less before them than a query sees"
    added = all_reads(reading, texts)
    for i, (parts, text) in enumerate(zip(real, texts, strict=True)):
        expected, logits = (torch.cat([part[k] for part in parts]) for k in (0, 1))
        found = sum(layer[i] for layer in added)[: len(expected)]
        assert expected.abs().max() > 0.05, "the memory is silent"
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        final = torch.cat([q.final for q in (*text.asked, *text.unknown)])
        torch.testing.assert_close(model.lm_head(final + found), logits, rtol=1e-3, atol=3e-4)
    # and so the losses are the model's own, over a part of the vocabulary
    with torch.no_grad():
        found = reading.losses(texts)
    answers, strangers = (torch.cat([p[1] for parts in real for p in parts[part]])[:, reading.vocabulary]
                          for part in (slice(4), slice(4, None)))  # fmt: skip
    asked, unknown = ([q for text in texts for q in text[part]] for part in (1, 2))
    target = torch.cat([q.target for q in asked])
    chosen = {token: i for i, token in enumerate(reading.vocabulary.tolist())}
    target = torch.tensor([chosen[token] for token in target.tolist()])
    assert found["answers"].item() == pytest.approx(F.cross_entropy(answers, target).item(), rel=1e-4)
    counts = torch.cat([~reading.given_end(q) for q in unknown])
    slots = model.config.update_rule == "slot"
    given = [q for q in unknown if slots and not q.left_to_base and q.fact >= 0 and q.target[-1] == 2]
    assert int((~counts).sum()) == len(given), "the ends of values that nothing told"
    strangers = strangers[counts]
    base = model.lm_head(torch.cat([q.final for q in unknown])[counts])[:, reading.vocabulary].softmax(-1)
    strayed = (base * (base.log() - strangers.log_softmax(-1))).sum(-1).mean().item()
    assert strayed > 1e-3
    assert found["unknown"].item() == pytest.approx(strayed, rel=1e-2)


def reading_taps(model):
    """K: tokens that a key or a query is made of."""
    return next(iter(model.model.memories.values())).taps


@torch.no_grad()
def all_reads(reading, texts):
    """What both memories add to each text's questions and to its plain tokens."""
    return [reading.reads(index, memory, texts)[0] for index, memory in reading.model.model.memories.items()]


def text_of(reading, told, asked, unknown=()):
    return Text(told, list(asked), list(unknown), int(reading.silent[0]))


def test_of_a_fact_that_is_left_out_nothing_is_written(make_reading):
    """Of a text of one fact: its pairs, and what the gate lets through of plain text."""
    reading = make_reading()
    features, pairs = reading.features, {index: list(pages) for index, pages in reading.pairs.items()}
    page = max(range(len(features.facts)), key=lambda p: len(features.facts[p]))
    every, questions = frozenset(range(len(features.facts[page]))), reading.by_page[page]
    assert len(every) > 2
    text = text_of(reading, [(page, every)], questions)
    (full,) = zip(*all_reads(reading, [text]), strict=True)
    for facts in (frozenset(), *(frozenset([number]) for number in every), frozenset([0, 2]), every):
        for index in pairs:
            rows, strength = pairs[index][page]
            numbers = features.fact_of[rows].tolist()
            kept = torch.tensor([number == -1 or number in facts for number in numbers])
            assert len({-1} | set(numbers)) > 4, "the gate lets through some of several"
            left, how = reading._left(index, page, facts)
            written = (how > 0).any(-1)
            assert torch.equal(left[written], rows[kept])
            assert torch.equal(how[written], strength[kept])
            runs = sum(row + 1 not in left.tolist() for row in rows[kept].tolist())
            assert left.tolist() == sorted(left.tolist())
            assert runs == int((~written).sum()), "each run of what is written has its end"
            assert torch.equal(left[~written], left[:-1][~written[1:]]), "which is no other token's"
            assert set(features.fact_of[left].tolist()) == {-1, *facts} & set(numbers)
            reading.pairs[index][page] = rows, strength * kept[:, None]
        (expected,) = zip(*all_reads(reading, [text]), strict=True)
        for index in pairs:
            reading.pairs[index][page] = pairs[index][page]
        (found,) = zip(*all_reads(reading, [text._replace(pages=[(page, facts)])]), strict=True)
        for index, layer, other, whole in zip(pairs, found, expected, full, strict=True):
            torch.testing.assert_close(layer, other, rtol=1e-4, atol=1e-5)
            numbers = set(features.fact_of[pairs[index][page][0]].tolist())
            assert ((layer - whole).abs().max() > 1e-2) == (not numbers <= {-1, *facts})


SLOTS = {"update_rule": "slot", "memory_num_heads": 4, "memory_num_key_value_heads": 2, "memory_head_dim": 6}


@torch.no_grad()
def test_the_shares_of_slots_are_those_of_their_pairs(make_reading):
    """The values of the pairs, by their shares, are what is read: so a share is that of the pair it stands for."""
    reading = make_reading(options={**SLOTS, "memory_num_heads": 1, "memory_num_key_value_heads": 1})
    features, pages = reading.features, reading.fact_pages[:3]
    texts = [
        text_of(
            reading, [(page, frozenset(range(len(features.facts[page])))) for page in some], reading.by_page[some[0]]
        )
        for some in (pages, pages[:1])
    ]
    for index, memory in reading.model.model.memories.items():
        added, shares = reading.reads(index, memory, texts)
        for text, found, share in zip(texts, added, shares, strict=True):
            rows = torch.cat([reading._left(index, *page)[0] for page in text.pages])
            values = memory.embedded(features.ids[rows], reading.embedding)
            values = torch.cat([values, memory.end_value(reading.embedding)])  # behind them all
            expected = memory.o_proj(memory.read_gate.scale * (share @ values))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            assert share[:, :-1].max() > 1e-6
            assert share[:, -1].max() > 1e-6


@torch.no_grad()
def test_an_address_is_that_of_the_answers_own_tokens(make_reading):
    reading = make_reading(options=SLOTS)
    features = reading.features
    question = next(
        q for page in reading.fact_pages for q in reading.by_page[page] if q.fact >= 0
        and set(features.ids[reading.pairs[1][page][0]].tolist()) & set(q.target.tolist())
        and q.target[-1] == 2
    )  # fmt: skip
    told = [(page, frozenset(range(len(features.facts[page])))) for page in reading.fact_pages[:4]]
    told = [*(item for item in told if item[0] != question.page), (question.page, frozenset([question.fact]))]
    text = text_of(reading, told, [question])
    rows = torch.cat([reading._left(1, *page)[0] for page in told])
    share, holders = torch.zeros(len(question.target), len(rows)), 0
    for place in range(len(question.target)):
        for n, row in enumerate(rows.tolist()):
            own = row // features.page_size == question.page and features.fact_of[row] == question.fact
            follows = place == 0 or features.ids[row - 1] == question.target[place - 1]
            again = n and row == rows[n - 1]  # the end of a run, which is not written
            if own and follows and features.ids[row] == question.target[place] and not again:
                share[place, n] = 0.25
                holders += 1
    assert holders
    end = reading.model.model.memories[1].end_token
    share = torch.cat([share, torch.zeros(len(share), 1)], 1)  # what the end has
    share[question.target == end, -1] = 0.25
    places = (share > 0).sum(1)
    expected = -(0.25 * places[places > 0]).log().mean()
    torch.testing.assert_close(reading._addressed(1, [text], [share]), expected)
    share += 0.01 * (share == 0)  # what the others have counts for nothing
    torch.testing.assert_close(reading._addressed(1, [text], [share]), expected)
    in_sight = replace(question, fact=-1)
    assert reading._addressed(1, [text._replace(asked=[in_sight])], [share]) == 0


@pytest.mark.parametrize("where", ["on another page", "on its page"])
def test_no_question_is_asked_that_is_contradicted_later_in_the_text(make_reading, features, where):
    """And none whose own fact is left out: unless it stands in sight, or is asked as one that nothing answers."""
    asked_of_pages = [q for q in features.asked if not q.left_to_base]
    messages = [q for q in features.asked if q.left_to_base and q.page >= 0]
    question = next(q for q in asked_of_pages if 0 <= q.fact < len(features.facts[q.page]) - 1)
    words = features.facts[question.page][question.fact]
    if where == "on its page":
        again = question.page, question.fact + 1
    else:
        again = next(q.page for q in asked_of_pages if q.page != question.page), 0
    facts = [list(said) for said in features.facts]
    facts[again[0]][again[1]] = words
    reading = make_reading(replace(features, facts=facts))
    seen, shares, whole, strange, in_sight, contradicted = set(), set(), 0, 0, 0, 0
    for i in range(3000):  # what must be seen at least once is rare on some pages
        reading.rng = Random(i)
        text = reading.draw()
        asked, places = text.asked, [page for page, _ in text.pages]
        assert len(set(places)) == len(places) <= SETTINGS.fact_pages + SETTINGS.plain_pages
        assert all(numbers <= set(range(len(facts[page]))) for page, numbers in text.pages)
        told = [(page, number) for page, numbers in text.pages for number in sorted(numbers)]
        shares.add(len(told) / sum(len(facts[page]) for page in places))
        assert told
        rest = [[facts[p][n] for p, n in told[place + 1 :]] for place in range(len(told))]
        true = {fact for fact, later in zip(told, rest, strict=True) if facts[fact[0]][fact[1]] not in later}
        could = [q for q in asked_of_pages if q.page in places and (q.fact == -1 or (q.page, q.fact) in true)]
        in_sight += any(q.fact == -1 for q in asked)
        assert len({id(q) for q in asked}) == len(asked)
        assert {id(q) for q in asked} <= {id(q) for q in could}
        if sum(len(q.target) for q in could) <= fit.ANSWERS:
            assert len(asked) == len(could), "all that can be"
            whole += 1
        if len(told) == 1:
            assert could, "there is something to ask for"
        assert sum(len(q.target) for q in asked) <= fit.ANSWERS
        said = {facts[page][number] for page, number in told}
        no_answer = [
            q for q in asked_of_pages if q.page in places and q.fact >= 0 and facts[q.page][q.fact] not in said
        ]
        unknown = [q for q in text.unknown if not q.left_to_base]
        unrelated, said = ([q for q in text.unknown if q.left_to_base and (q.page == -1) == alien] for alien in (1, 0))
        could_say = [q for q in messages if q.page in places]
        assert {id(q) for q in said} <= {id(q) for q in could_say}
        assert len({id(q) for q in said}) == len(said) == min(len(could_say), fit.MESSAGES)
        contradicted += sum((q.page, q.fact) in true for q in said)
        assert {id(q) for q in unknown} <= {id(q) for q in no_answer}
        assert len({id(q) for q in unknown}) == len(unknown) == min(len(no_answer), fit.UNKNOWN)
        assert len({id(q) for q in unrelated}) == len(unrelated) == fit.UNRELATED
        strange += len(unknown)
        own = question.page, question.fact
        if own in told:
            later = again in told and told.index(again) > told.index(own)
            seen.add((again in told, later, any(q is question for q in asked)))
        else:
            assert not any(q is question for q in asked)
    order = {(True, True, False), (False, False, True)}
    assert seen - {(False, False, False), (True, False, False)} == (  # those were one too many
        order if where == "on its page" else order | {(True, False, True)}
    )
    assert min(shares) < 0.2
    assert max(shares) == 1.0
    assert whole > 100
    assert strange > 100
    assert contradicted > 100
    assert in_sight > 0


# learning --------------------------------------------------------------------------------------------------------


def parameters_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def test_a_run_that_starts_from_an_adapter_keeps_its_keys_and_gates_alone(make_reader, features):
    def memories(addresses):
        model = make_reader()
        for memory in model.model.memories.values():
            for parameter in memory.parameters():
                parameter.copy_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)))
        before = parameters_of(model)
        prepare(model, features, addresses=addresses)
        return {n for n, old in before.items() if not torch.equal(model.get_parameter(n), old)}, parameters_of(model)

    (kept, started), (anew, calibrated) = memories(False), memories(True)
    ways = ("v_proj.weight", "v_proj.bias", "o_proj.weight", "read_gate.scale")
    assert kept == {name for name in anew if name.endswith(ways)}
    assert len(kept) == 2 * len(ways)
    assert all(torch.equal(started[name], calibrated[name]) for name in kept)
    assert {name.split("memory.")[1] for name in anew - kept} > {"q_proj.weight", "k_proj.weight", "q_proj.bias"}


@pytest.mark.parametrize("options", [{}, CONTEXT], ids=["conv", "context"])
def test_only_what_reads_learns(make_reading, features, context_features, options):
    reading = make_reading(context_features if options else features, options)
    before, shown = parameters_of(reading.model), []
    reading.train(shown.append)
    assert [entry["step"] for entry in shown] == [SETTINGS.steps]
    assert [*shown[0]] == ["stage", "step", "answers", "unknown", "plain text"]
    changed = {name for name, old in before.items() if not torch.equal(reading.model.get_parameter(name), old)}
    fixed = (".write_gate.", ".v_proj.", ".o_proj.")
    assert changed == {n for n in before if ".memory." in n and not any(part in n for part in fixed)}
    assert all(parameter.grad is None for parameter in reading.model.parameters())


def test_how_loud_slots_are_and_how_strict_their_order_is_set_and_not_learned(make_reading, features):
    reading = make_reading(features, SLOTS)
    before = parameters_of(reading.model)
    loud, strict = ([n for n in before if n.endswith(end)] for end in ("read_gate.scale", "slot_gate.jump_cost"))
    assert len(loud) == len(strict) == len(reading.model.model.memories)
    assert all((before[name] == SCALE / len(loud)).all() for name in loud)
    reading.train(lambda entry: None)
    assert all(torch.equal(reading.model.get_parameter(name), before[name]) for name in (*loud, *strict))


def test_the_loss_falls(make_reading):
    reading = make_reading(steps=30)
    reading.rng = Random(0)
    texts = [reading.draw() for _ in range(4)]

    def loss():
        reading.rng = Random(1)
        with torch.no_grad():
            return reading.losses(texts)["answers"].item()

    before = loss()
    reading.train(lambda entry: None)
    assert loss() < before - 0.3


def test_a_memory_that_speaks_where_it_knows_nothing_strays_from_the_base(make_reading):
    reading = make_reading()
    texts = []
    for i in range(6):
        reading.rng = Random(i)
        texts.append(reading.draw())
    pages = {q.page == -1 for text in texts for q in text.unknown}
    assert pages == {True, False}, "some could be told and are not, some nothing could answer"
    losses = []
    for loudness in (0.0, 1.0, 5.0, 25.0):
        for memory in reading.model.model.memories.values():
            memory.read_gate.scale.data.fill_(loudness)
        with torch.no_grad():
            losses.append(reading.losses(texts))
    assert losses[0]["unknown"].item() == pytest.approx(0.0, abs=1e-5)
    assert losses[0]["plain text"].item() == pytest.approx(0.0, abs=1e-5)
    strayed = [found["unknown"].item() for found in losses]
    assert strayed == sorted(strayed)
    assert strayed[-1] > strayed[1] > 1e-5
    nothing = [text._replace(unknown=[]) for text in texts]
    assert reading.losses(nothing)["unknown"].item() == 0
    assert reading.losses(nothing)["answers"].item() == pytest.approx(losses[-1]["answers"].item(), rel=1e-4)


class Killed(BaseException):
    pass


def test_killed_and_resumed_is_bit_for_bit_the_training_in_one_go(make_reading):
    straight, killed, resumed = make_reading(), make_reading(), make_reading()
    straight.train(lambda entry: None)
    saved = io.BytesIO()

    def save_and_die(state):
        torch.save(state, saved)
        raise Killed

    with pytest.raises(Killed):
        killed.train(lambda entry: None, save=save_and_die)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    assert state["step"] == 3
    steps = []
    resumed.train(lambda entry: None, state, lambda state: steps.append(state["step"]))
    assert steps == [6]
    expected, stopped = parameters_of(straight.model), parameters_of(killed.model)
    for name, found in parameters_of(resumed.model).items():
        assert torch.equal(found, expected[name]), name
    assert any(not torch.equal(stopped[name], expected[name]) for name in expected)


def test_a_loss_that_is_no_number_ends_the_training(make_reading):
    reading = make_reading()
    before = parameters_of(reading.model)
    with torch.no_grad():
        reading.model.model.memories[1].o_proj.weight[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="the loss of step 1 is not finite: lower the learning rates"):
        reading.train(lambda entry: None)
    after = parameters_of(reading.model)
    assert all(torch.equal(after[n], before[n]) for n in before if "o_proj" not in n)
