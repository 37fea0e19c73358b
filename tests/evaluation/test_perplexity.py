"""Perplexity: every token scored once, given what the model can see; verdicts only where an interval says so."""

import math
from hashlib import sha256
from itertools import pairwise
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from senri.data.corpus import Document
from senri.data.haystack import BookHaystack, Stretch
from senri.data.samples import SampleError
from senri.evaluation import perplexity
from senri.evaluation.perplexity import (
    SEGMENTS,
    PerplexitySuite,
    by_position,
    position_edges,
    reading,
    sliding_window_nll,
    streamed_nll,
)
from senri.evaluation.readers import FullAttentionReader, SenriReader
from senri.evaluation.report import Report
from senri.evaluation.runner import FULL_ATTENTION, MEMORY, MEMORY_OFF, Log
from senri.evaluation.suites import Bench, Sources
from senri.evaluation.write import to_json, write_report

WINDOW, VOCABULARY = 7, 97
KINDS = pytest.mark.parametrize(
    "kind",
    [
        {"memory_readout": "layer", "update_rule": "linear"},
        {"memory_readout": "head", "update_rule": "delta_token", "memory_conv_size": 2},
        {"memory_readout": "layer", "update_rule": "delta", "write_gate": "surprise"},
    ],
    ids=["layer", "head", "surprise"],
)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(perplexity, "BLOCK", 3)  # logits in several blocks, the last one not full


@pytest.fixture(scope="module")
def memoryless(make_senri):
    return make_senri(num_memory_layers=0)


@pytest.fixture(scope="module")
def base(make_base):
    return make_base("llama")


def text(length, seed=0):
    return np.random.default_rng(seed).integers(3, VOCABULARY, length).astype(np.int32)


@torch.no_grad()
def direct(model, ids):
    """From one forward of the whole text."""
    ids = torch.from_numpy(ids.astype(np.int64))
    logp = model(ids[None]).logits[0].log_softmax(-1)
    return -logp[torch.arange(len(ids) - 1), ids[1:]].numpy()


# streams ------------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize(("length", "piece"), [(60, 11), (61, 4), (45, 1000), (41, 8), (42, 8), (8, 7), (2, 3)])
def test_a_streamed_text_is_scored_as_one(make_senri, memoryless, kind, length, piece):
    reader, ids = SenriReader(make_senri(**kind), None, piece_size=piece), text(length)
    on, off = streamed_nll(reader, ids), streamed_nll(reader, ids, memory=False)
    assert on.shape == off.shape == (length - 1,)
    np.testing.assert_allclose(on, direct(reader.model, ids), atol=1e-5)
    np.testing.assert_allclose(off, direct(memoryless, ids), atol=1e-5)
    if length > 40:
        assert np.abs(on - off).max() > 1e-2
        np.testing.assert_allclose(on[:WINDOW], off[:WINDOW], atol=1e-5)  # nothing has left the window yet


# windows ------------------------------------------------------------------------------------------------------


def brute_force(model, ids, window, stride):
    """Each token under the first window that holds it and something before it."""
    out = []
    for target in range(1, len(ids)):
        start = next(s for s in range(0, len(ids), stride) if target < s + window)
        out.append(direct(model, ids[start : target + 1])[-1] if start < target else np.nan)
    return np.array(out)


@pytest.mark.parametrize(
    ("length", "window", "stride"),
    [(30, 8, 3), (30, 8, 1), (30, 8, 7), (29, 10, 5), (12, 12, 4), (9, 12, 5), (13, 12, 11), (2, 4, 2)],
)
def test_a_sliding_window_scores_every_token_once_given_the_most_it_can(base, length, window, stride):
    ids = text(length)
    found = sliding_window_nll(base, ids, window, stride)
    assert found.shape == (length - 1,)
    np.testing.assert_allclose(found, brute_force(base, ids, window, stride), atol=1e-5)


@pytest.mark.parametrize("length", [5, 6, 7, 11, 12, 13, 25, 30, 31, 32])
def test_segments_alone_leave_their_first_tokens_out(base, length):
    ids = text(length)
    found = sliding_window_nll(base, ids, 6, stride=6)
    np.testing.assert_allclose(found, brute_force(base, ids, 6, 6), atol=1e-5)
    assert (np.flatnonzero(np.isnan(found)) + 1).tolist() == list(range(6, length, 6))


def test_a_window_computes_no_more_than_it_must(base, monkeypatch):
    lengths, whole = [], base.model.forward

    def forward(ids, **options):
        lengths.append(ids.shape[1])
        return whole(ids, **options)

    monkeypatch.setattr(base.model, "forward", forward)
    sliding_window_nll(base, text(30), 8, 3)
    assert lengths == [8] * 8 + [6]  # the ninth ends with the text
    lengths.clear()
    sliding_window_nll(base, text(30), 30)
    assert lengths == [30]


# positions ----------------------------------------------------------------------------------------------------


def test_edges_double():
    assert position_edges(100) == [0, 100]
    assert position_edges(257) == [0, 257]
    assert position_edges(258) == [0, 256, 258]
    assert position_edges(3000) == [0, 256, 512, 1024, 2048, 3000]
    assert position_edges(4096) == [0, 256, 512, 1024, 2048, 4096]


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 5000), st.randoms(use_true_random=False))
def test_every_token_is_in_one_bucket(length, rng):
    edges = position_edges(length)
    assert edges == sorted(set(edges))
    before = np.arange(1.0, length)  # tokens before each scored one: values that name themselves
    buckets = by_position(before, edges)
    for (low, high), (total, count) in zip(pairwise(edges), buckets, strict=True):
        inside = [n for n in range(max(low, 1), high)]
        assert count == len(inside) > 0
        assert total == sum(inside)
    assert sum(count for _, count in buckets) == length - 1
    missing = rng.sample(range(length - 1), (length - 1) // 3)
    before[missing] = np.nan
    buckets = by_position(before, edges)
    assert sum(count for _, count in buckets) == length - 1 - len(missing)
    assert sum(total for total, _ in buckets) == pytest.approx(np.nansum(before))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (1.5, "leak?"), (4.99, "leak?"), (5, "suspiciously low: known text?"), (29.9, "suspiciously low: known text?"),
        (30, "normal for a small model"), (499, "normal for a small model"), (500, "high"), (999, "high"),
        (1000, "untrained"), (50_000, "untrained"), (math.inf, "untrained"),
    ],
)  # fmt: skip
def test_what_a_perplexity_says(value, said):
    assert reading(value) == said


# sections -----------------------------------------------------------------------------------------------------

EDGES = [0, 256, 512, 1000]
SUITE = PerplexitySuite(None, 1000, 3)


def record(i, **arms):
    """``arm=[nats of each bucket]``; None: not scored there."""
    counts = [255, 256, 488]
    return {
        "key": f"perplexity/{i}",
        "source": "x",
        "edges": EDGES,
        "arms": {
            arm.replace("_", " "): [
                [0.0, 0] if nats is None else [nats * n, n] for nats, n in zip(values, counts, strict=True)
            ]
            for arm, values in arms.items()
        },
    }


def column(table, name):
    return [row[table.columns.index(name)] for row in table.rows]


def nats(values):
    return [math.log(v) for v in values]


def test_the_difference_is_paired_and_the_verdict_waits_for_its_interval():
    # texts as different as 20 and 400, and a memory that helps in the last bucket, harms in the middle one
    off = [3.0, 4.5, 6.0]
    gains = [[0.02, -0.01, -0.02], [0.3, 0.31, 0.32], [-0.10, -0.12, -0.11]]  # bucket by text
    records = [record(i, memory=[off[i] + g[i] for g in gains], memory_off=[off[i]] * 3) for i in range(3)]
    section = SUITE.section(records, 64)
    overall, table, _ = section.tables
    assert column(table, "tokens before") == ["0 to 256", "256 to 512", "512 to 1000"]
    assert column(table, "verdict") == ["nothing shown", "worse", "better"]
    half = 4.302653 * 0.01 / math.sqrt(3)  # t(2), the standard deviation of -0.10, -0.12, -0.11
    shown = f"-0.1100 [{-0.11 - half:+.4f}, {-0.11 + half:+.4f}]"
    assert column(table, "memory − memory off (nats)")[2] == shown
    assert column(table, MEMORY_OFF) == [pytest.approx(math.exp(4.5))] * 3
    assert column(table, MEMORY)[1] == pytest.approx(math.exp(4.5 + 0.31))
    # whole texts: weighted by tokens
    weighted = [(255 * gains[0][i] + 256 * gains[1][i] + 488 * gains[2][i]) / 999 for i in range(3)]
    assert column(overall, "perplexity")[0] == pytest.approx(math.exp(4.5 + sum(weighted) / 3))
    assert column(overall, "tokens scored") == [2997, 2997]
    assert column(overall, "reading") == ["normal for a small model"] * 2
    low, high = (math.exp(4.5 + sign * 4.302653 * 1.5 / math.sqrt(3)) for sign in (-1, 1))
    assert column(overall, "interval")[1] == f"[{low:.2f}, {high:.2f}]"
    assert section.flags == ()
    to_json(Report("x", {}, (section,)))


def test_equal_arms_show_nothing():
    records = [record(i, memory=[4.0 + i] * 3, memory_off=[4.0 + i] * 3) for i in range(2)]
    table = SUITE.section(records, 64).tables[1]
    assert column(table, "verdict") == ["nothing shown"] * 3
    assert set(column(table, "memory − memory off (nats)")) == {"+0.0000 [+0.0000, +0.0000]"}


@pytest.mark.parametrize(("value", "leaks"), [(4.9, 1), (5.1, 0)])
def test_a_perplexity_below_5_is_flagged(value, leaks):
    records = [record(i, memory=nats([value] * 3), memory_off=nats([40.0] * 3)) for i in range(2)]
    section = SUITE.section(records, 64)
    assert len(section.flags) == leaks
    if leaks:
        assert section.flags[0].startswith("LEAK?: memory: perplexity 4.90 is below 5")


def test_one_text_shows_numbers_and_no_intervals(tmp_path):
    section = SUITE.section([record(0, memory=[4.0, 3.0, 2.5], memory_off=[4.0, 3.5, 3.0])], None)
    overall, table, _ = section.tables
    assert column(overall, "interval") == [None, None]
    assert column(table, "verdict") == ["nothing shown: one text"] * 3
    assert column(table, "memory − memory off (nats)") == ["+0.0000", "-0.5000", "-0.5000"]
    assert all(s.low == s.high == () for s in section.figures[0].series)
    write_report(Report("x", {}, (section,)), tmp_path)  # no NaN anywhere
    assert "nan" not in (tmp_path / "report.md").read_text().lower()


def test_an_arm_is_shown_only_where_it_scored():
    arms = {"memory": [4.0] * 3, "memory_off": [4.0] * 3, "full_attention": [3.5, 3.0, None]}
    records = [record(i, **arms) for i in range(2)]
    for r in records:
        r["arms"][FULL_ATTENTION][1] = [3.0 * 200, 200]  # of 256: not the whole bucket
    section = SUITE.section(records, 64)
    overall, table, _ = section.tables
    assert column(table, FULL_ATTENTION) == [pytest.approx(math.exp(3.5)), None, None]
    assert column(overall, "tokens scored") == [1998, 1998, 2 * 455]
    curves = {s.name: s for s in section.figures[0].series}
    assert len(curves[FULL_ATTENTION].x) == 1
    assert len(curves[MEMORY].x) == 3
    assert SEGMENTS not in curves


# the suite ----------------------------------------------------------------------------------------------------


class Noise:
    def disjoint(self, length, count, rng):
        texts = [np.array(rng.choices(range(3, VOCABULARY), k=length), dtype=np.int32) for _ in range(count)]
        return [Stretch(ids, np.array([0, length]), f"noise {rng.random():.3f}") for ids in texts]


@pytest.fixture
def measure(make_senri, base, tmp_path):
    """``(log file, seed, full)`` -> records of a tiny run, and the number of passes it took."""
    reader = SenriReader(make_senri(), None, piece_size=50)

    def measure(file, seed=0, full=True, said=None):
        passes = []
        hook = reader.model.model.register_forward_pre_hook(lambda *_: passes.append(1))
        log = Log(tmp_path / file)
        control = FullAttentionReader(base, None) if full else None
        bench = Bench(reader, control, None, log, progress=[].append if said is None else said.append)
        try:
            PerplexitySuite(Sources(Noise(), None, seed), 300, 2).run(bench)
        finally:
            log.close()
            hook.remove()
        return log.records, len(passes)

    measure.model = reader.model
    return measure


def test_a_run_scores_all_arms_and_resumes_without_measuring_again(measure, base, memoryless, tmp_path):
    said = []
    records, passes = measure("a.jsonl", said=said)
    assert list(records) == ["perplexity/0", "perplexity/1"]
    assert len(said) == 2
    assert passes > 0
    for r in records.values():
        assert r["edges"] == [0, 256, 300]
        assert set(r["arms"]) == {MEMORY, MEMORY_OFF, FULL_ATTENTION, SEGMENTS}
        counts = {arm: [n for _, n in buckets] for arm, buckets in r["arms"].items()}
        assert counts[MEMORY] == counts[MEMORY_OFF] == [255, 44]
        assert counts[FULL_ATTENTION] == [255, 0]  # the base's context has 256 tokens
        assert sum(counts[SEGMENTS]) == 299 - 299 // WINDOW
    before = (tmp_path / "a.jsonl").read_bytes()
    again, passes = measure("a.jsonl", said=said)
    assert again == records
    assert (passes, len(said)) == (0, 2)
    assert (tmp_path / "a.jsonl").read_bytes() == before
    (tmp_path / "half.jsonl").write_bytes(before.splitlines(keepends=True)[1])
    assert measure("half.jsonl")[0] == records
    first = records["perplexity/0"]
    assert measure("b.jsonl", seed=1, full=False)[0]["perplexity/0"]["arms"][MEMORY] != first["arms"][MEMORY]


@pytest.mark.parametrize("kept", [0, 1])
def test_a_log_of_other_texts_is_not_continued(measure, tmp_path, kept):
    measure("a.jsonl", full=False)
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_bytes(lines[kept])
    with pytest.raises(ValueError, match=rf"^\S+b\.jsonl holds another text as perplexity/{kept}: name another folder"):
        measure("b.jsonl", seed=1, full=False)
    assert (tmp_path / "b.jsonl").read_bytes().startswith(lines[kept])
    (tmp_path / "c.jsonl").write_bytes(b"".join(lines))
    said = []
    with pytest.raises(ValueError, match=r"holds another text as perplexity/0"):
        measure("c.jsonl", seed=1, full=False, said=said)
    assert said == []
    assert (tmp_path / "c.jsonl").read_bytes() == b"".join(lines)


def test_a_record_is_the_text_scored(measure, base, memoryless, monkeypatch):
    texts = []
    disjoint = Noise.disjoint
    monkeypatch.setattr(Noise, "disjoint", lambda *a: texts.extend(disjoint(*a)) or texts)
    records, _ = measure("a.jsonl")
    assert [r["source"] for r in records.values()] == [t.source for t in texts]
    assert [r["text_sha256"] for r in records.values()] == [sha256(t.ids.tobytes()).hexdigest() for t in texts]
    first = records["perplexity/0"]
    ids = texts[0].ids
    assert first["source"] == texts[0].source
    expected = {
        MEMORY: direct(measure.model, ids),
        MEMORY_OFF: direct(memoryless, ids),
        FULL_ATTENTION: direct(base, ids[:256]),
    }
    for arm, values in expected.items():
        assert first["arms"][arm][0][0] == pytest.approx(values[:255].sum(), abs=1e-3)
    assert first["arms"][MEMORY][1][0] == pytest.approx(expected[MEMORY][255:].sum(), abs=1e-3)
    segments = np.nansum(brute_force(base, ids, WINDOW, WINDOW)[:255])
    assert first["arms"][SEGMENTS][0][0] == pytest.approx(segments, abs=1e-3)
    assert PerplexitySuite(None, 300, 2).section(list(records.values()), WINDOW).tables


# texts --------------------------------------------------------------------------------------------------------


class Letters:
    """A token a character, by its code point."""

    def __call__(self, text, **options):
        return {"input_ids": [ord(c) for c in text]}

    def __len__(self):
        return 1000

    def batch_decode(self, rows):
        return ["".join(map(chr, ids)) for ids in rows]


SIZES = {"a": 100, "b": 35, "c": 9, "d": 50}  # stretches of 10: 10, 3, none, 5


def places():
    """Books in which no token comes twice, so that a token is its place; and each book's tokens."""
    tokens = {n: range(b, b + size) for (n, size), b in zip(SIZES.items(), (100, 300, 400, 500), strict=True)}
    return BookHaystack([Document(n, "".join(map(chr, ids))) for n, ids in tokens.items()], Letters()), tokens


@pytest.mark.parametrize("count", [1, 2, 7, 17, 18])
@pytest.mark.parametrize("seed", range(5))
def test_disjoint_stretches_have_no_token_in_common(count, seed):
    books, tokens = places()
    found = books.disjoint(10, count, Random(seed))
    assert len(found) == count
    every = [token for stretch in found for token in stretch.ids.tolist()]
    assert len(set(every)) == len(every) == 10 * count
    for stretch in found:
        ids = stretch.ids.tolist()
        assert ids == list(range(ids[0], ids[0] + 10))  # as it stands in the book
        assert set(ids) <= set(tokens[stretch.source])  # in one book
        assert (stretch.cuts[0], stretch.cuts[-1]) == (0, 10)
    again = places()[0].disjoint(10, count, Random(seed))
    assert [(s.ids.tolist(), s.source) for s in again] == [(s.ids.tolist(), s.source) for s in found]


def test_disjoint_stretches_are_drawn_by_the_seed_and_from_all_books():
    books, _ = places()
    drawn = {tuple(int(s.ids[0]) for s in books.disjoint(10, 3, Random(seed))) for seed in range(20)}
    assert len(drawn) > 15
    assert {s.source for s in books.disjoint(10, 18, Random(0))} == {"a", "b", "d"}


@pytest.mark.parametrize(("length", "count", "there"), [(10, 19, 18), (50, 4, 3), (100, 2, 1), (101, 1, 0)])
def test_too_little_text_for_disjoint_stretches_is_refused(length, count, there):
    books, _ = places()
    said = rf"^the haystack has {there} separate stretches of {length} tokens and {count} are needed: give it more text"
    with pytest.raises(SampleError, match=said):
        books.disjoint(length, count, Random(0))
    suite = PerplexitySuite(Sources(books, None, 0), length, count)
    with pytest.raises(SampleError, match=said):
        suite.check()  # before anything is read
    if there:
        assert len(books.disjoint(length, there, Random(0))) == there
        PerplexitySuite(Sources(books, None, 0), length, there).check()


def test_disjoint_stretches_of_a_real_text(real_text, real_tokenizer):
    books = BookHaystack([Document("x", real_text[:20_000]), Document("y", real_text[-9000:])], real_tokenizer)
    whole = {d.name: books.ids(i).tolist() for i, d in enumerate(books.documents)}
    count = sum(len(ids) // 300 for ids in whole.values())
    taken = []
    for stretch in books.disjoint(300, count, Random(1)):
        ids = whole[stretch.source]
        (place,) = [i for i in range(len(ids) - 299) if ids[i : i + 300] == stretch.ids.tolist()]
        taken += [(stretch.source, i) for i in range(place, place + 300)]
        assert len(stretch.cuts) > 3
    assert len(set(taken)) == len(taken) == 300 * count
    with pytest.raises(SampleError):
        books.disjoint(300, count + 1, Random(1))
