"""The unigram cache: exact for any cut of a text, equal to its definition, silent while empty."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from senri.memory import UnigramStream
from senri.memory.unigram import count, rescale, rescale_one_by_one

V = 7
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def make(rows, steps, seed=0, filled=True, some=0.7):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    counts = (random(rows, V).abs() * 3).round() * filled
    ids = torch.randint(0, V, (rows, steps), generator=generator)
    valid = torch.rand(rows, steps, generator=generator) < some
    return random(rows, steps, V), UnigramStream(counts, ids, valid), random(()) / 2 + 0.7, random(V)


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 3), steps=st.integers(1, 9), seed=st.integers(0, 99), data=st.data())
def test_it_is_its_definition_and_so_is_every_gradient(rows, steps, seed, data):
    logits, stream, strength, rarity = make(rows, steps, seed, filled=seed % 3 > 0)
    at = torch.tensor(data.draw(st.lists(st.integers(0, steps - 1), min_size=1, max_size=steps + 2)))  # in any order
    found = []
    for function in (rescale, rescale_one_by_one):
        leaves = [x.clone().requires_grad_() for x in (logits[:, at], strength, rarity)]
        out = function(leaves[0], stream, at, leaves[1], leaves[2])
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        found.append([out, *torch.autograd.grad((out * weights).sum(), leaves)])
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, **EXACT)


@pytest.mark.parametrize("cuts", [(4,), (1, 2, 7), tuple(range(1, 10))])
def test_a_cut_changes_nothing(cuts):
    logits, stream, strength, rarity = make(2, 10)
    whole, parts, counts = rescale(logits, stream, torch.arange(10), strength, rarity), [], stream.counts
    for start, stop in itertools.pairwise([0, *cuts, 10]):
        piece = UnigramStream(counts, stream.ids[:, start:stop], stream.valid[:, start:stop])
        parts.append(rescale(logits[:, start:stop], piece, torch.arange(stop - start), strength, rarity))
        counts = count(piece)
    torch.testing.assert_close(torch.cat(parts, 1), whole, **EXACT)
    assert torch.equal(counts, count(stream))


def test_an_empty_cache_changes_no_bit():
    logits, stream, strength, rarity = make(2, 5, filled=False, some=0.0)
    assert rescale(logits, stream, torch.arange(5), strength, rarity) is logits


def test_a_row_does_not_depend_on_the_others():
    logits, stream, strength, rarity = make(3, 8)
    whole = rescale(logits, stream, torch.arange(8), strength, rarity)
    for row in range(3):
        alone = UnigramStream(*(x[row : row + 1] for x in stream))
        torch.testing.assert_close(
            rescale(logits[row : row + 1], alone, torch.arange(8), strength, rarity), whole[row : row + 1], **EXACT
        )


def test_what_was_seen_often_becomes_likelier():
    stream = UnigramStream(torch.tensor([[0.0, 1, 9, 0, 0, 0, 0]]), torch.zeros(1, 1).long(), torch.zeros(1, 1).bool())
    out = rescale(torch.zeros(1, 1, V), stream, torch.arange(1), torch.tensor(0.5), torch.zeros(V))[0, 0]
    torch.testing.assert_close(out[:4], 0.5 * torch.tensor([1.0, 2.0, 10.0, 1.0]).log())
