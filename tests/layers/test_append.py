"""What a window keeps while decoding grows in place, and nobody who holds an older state ever sees it."""

import pytest
import torch

from senri.layers import append
from senri.layers.append import FEW, SPARE

KEEP = 7


def columns(*numbers):
    return torch.tensor(numbers, dtype=torch.float32)[None, None, :, None].expand(2, 3, -1, 4).clone()


def run(old, start, count, keep=KEEP):
    """States after each of ``count`` appends of one column."""
    states = []
    for i in range(start, start + count):
        both, old = append(old, columns(i), keep)
        states.append((both, old))
    return states


@torch.no_grad()
def test_many_appends_equal_a_concatenation_and_no_older_state_changes():
    count = 2 * SPARE + 5
    states = run(columns(-2, -1), 0, count)
    for i, (both, kept) in enumerate(states):
        expected = columns(*range(-2, i + 1))
        assert torch.equal(both, expected[:, :, -(KEEP + 1) :])
        assert torch.equal(kept, expected[:, :, -KEEP:])
    pointers = {kept.untyped_storage().data_ptr() for _, kept in states}
    assert len(pointers) == 3, "one copy in SPARE appends"


@torch.no_grad()
def test_forks_go_on_independently():
    *_, (_, base) = run(columns(-1), 0, 10)
    before = base.clone()
    one, two = run(base, 100, 5), run(base, 200, 5)
    three = run(one[2][1], 300, 5)  # from the middle of the first
    for states, numbers in ((one, range(100, 105)), (two, range(200, 205)), (three, [100, 101, 102, *range(300, 305)])):
        expected = columns(*range(-1, 10), *numbers)
        assert torch.equal(states[-1][1], expected[:, :, -KEEP:])
    assert torch.equal(base, before)
    assert torch.equal(one[2][1], columns(*range(-1, 10), 100, 101, 102)[:, :, -KEEP:])


@torch.no_grad()
def test_another_tensor_made_of_a_state_has_no_room():
    *_, (_, base) = run(columns(-1), 0, 10)
    rows = base.index_select(0, torch.tensor([1, 0]))
    ((_, kept),) = run(rows, 50, 1)
    assert torch.equal(kept, columns(*range(4, 10), 50))
    ((_, mine),) = run(base, 60, 1)
    assert torch.equal(mine, columns(*range(4, 10), 60))


def test_gradients_see_a_plain_concatenation():
    old, new = columns(1, 2).requires_grad_(), columns(3).requires_grad_()
    both, kept = append(old, new, 2)
    kept.sum().backward()
    assert torch.equal(old.grad, columns(0, 1))
    assert torch.equal(new.grad, columns(1))
    assert torch.equal(both, columns(1, 2, 3))


def test_a_state_goes_on_in_and_out_of_inference_mode():
    with torch.inference_mode():
        *_, (_, base) = run(columns(-1), 0, 3)
    with torch.no_grad():
        *_, (_, outside) = run(base, 3, 3)
    with torch.inference_mode():
        *_, (_, inside) = run(outside, 6, 3)
    assert torch.equal(inside, columns(*range(2, 9)))
    weight = torch.ones(4, requires_grad=True)
    (outside * weight).sum().backward()
    assert torch.equal(weight.grad, outside.sum((0, 1, 2)))


def test_what_autograd_kept_of_a_state_is_still_valid():
    with torch.no_grad():
        *_, (_, base) = run(columns(-1), 0, 3)
    weight = torch.ones(4, requires_grad=True)
    product = (base * weight).sum()  # keeps base
    with torch.no_grad():
        run(base, 3, 3)  # in the same buffer
    product.backward()
    assert torch.equal(weight.grad, base.sum((0, 1, 2)))


@pytest.mark.parametrize("steps", [1, FEW, FEW + 1, 40])
@torch.no_grad()
def test_any_number_of_columns(steps):
    both, kept = append(columns(1, 2, 3), columns(*range(10, 10 + steps)), 3)
    assert torch.equal(both, columns(1, 2, 3, *range(10, 10 + steps)))
    assert torch.equal(kept, both[:, :, -3:])
    both, kept = append(columns()[:, :, :0], columns(1), 3)
    assert torch.equal(both, columns(1))
    assert torch.equal(kept, columns(1))
