"""The long text's script, with the real model on a short one: what it says of reading, and who knows the keys."""

import pytest

import senri
from senri.data.corpus import Document
from senri.data.haystack import BookHaystack
from senri.data.needles import shared_context

WINDOW, TOKENS = 256, 1500


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("long_text")


@pytest.mark.slow
def test_keys_behind_the_window_come_from_the_memory_alone(script, real_text):
    model, tokenizer = senri.load_base(sliding_window_size=WINDOW)
    books = BookHaystack([Document("Bible", real_text)], tokenizer)
    context = shared_context(books, tokenizer, lengths=[TOKENS], depths=(0.2, 0.5), per_cell=1, seed=0, sample=0)
    lines = []
    found = script.measure(model, tokenizer, context, lines.append)
    reading, rows = found["reading"], found["questions"]
    assert reading["tokens"] == min(question.at for question in context.questions)
    assert reading["memory_bytes"] < reading["state_bytes"] < reading["peak_bytes"] <= reading["process_peak_bytes"]
    assert all(WINDOW < row["tokens_ago"] < TOKENS for row in rows)
    right = {arm: sum(row[arm][1] for row in rows) for arm, value in rows[0].items() if isinstance(value, list)}
    assert right["memory off"] == right["chat, memory emptied"] == 0
    assert right["memory"] == len(rows)
    assert right["chat, memory"] == len(rows)
    assert len(lines) >= 1 + 3 * len(rows)


@pytest.mark.slow
def test_a_seed_decides_which_keys_are_told(script, real_text, tmp_path):
    (tmp_path / "bible.txt").write_text(real_text)
    one, again, other = (script.prepare(str(tmp_path), 4096, seed) for seed in (0, 0, 1))
    keys = [[question.answers for question in context.questions] for context in (one, again, other)]
    assert keys[0] == keys[1] != keys[2]
    assert len({*keys[0]}) == len(script.DEPTHS) * script.PER_DEPTH
    assert len(one.ids) <= 4096


def test_the_table_counts_by_depth_and_says_how_sure_the_whole_is(script):
    rows = [{"depth": depth, "memory": ["x", float(right)]} for depth, right in ((0.5, 1), (0.0, 0), (0.5, 1))]
    lines = script.table(rows).splitlines()
    assert lines[2:] == ["| 0 | 0 of 1 |", "| 0.5 | 2 of 2 |", "| all | 2 of 3 [21, 94] |"]
