"""The attention that makes keys and queries, against a loop over positions and heads."""

import pytest
import torch

import senri.layers.context_attention as module
from senri.layers.context_attention import SCORE_DIM, ContextAttention

EXACT = {"rtol": 1e-11, "atol": 1e-11}
HIDDEN, HEADS, WIDTH, CONTEXT, ROWS = 6, 2, 3, 4, 15


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def attention():
    """Random, with scores that matter."""
    made = ContextAttention(HIDDEN, HEADS, CONTEXT).double()
    with torch.no_grad():
        for seed, parameter in enumerate(made.parameters()):
            parameter.copy_(0.5 * random(*parameter.shape, seed=seed + 10))
    return made


def positions():
    """Rows of the tokens that each position sees, in two texts side by side with gaps, and which of them there are."""
    at = torch.arange(CONTEXT, ROWS)[:, None] - torch.arange(CONTEXT)
    at = torch.cat([at, at.roll(3, 0)])
    valid = torch.rand(at.shape, generator=torch.Generator().manual_seed(2)) < 0.7
    valid[3] = True
    valid[5], valid[9] = False, False  # sees nothing
    valid[7] = torch.tensor([False, True, False, True])  # not even itself
    return at, valid


def one_by_one(attention, hidden, projected, at, valid):
    weight, bias = attention.score_proj.weight, attention.score_proj.bias
    made = []
    for rows, there in zip(at.tolist(), valid.tolist(), strict=True):
        heads = []
        for head in range(HEADS):
            ask_rows = slice(head * SCORE_DIM, (head + 1) * SCORE_DIM)
            offer_rows = slice((HEADS + head) * SCORE_DIM, (HEADS + head + 1) * SCORE_DIM)

            def normed(row):
                x = hidden[row] - hidden[row].mean()
                return x / (x.square().mean() + 1e-5).sqrt()

            ask = (weight[ask_rows] @ normed(rows[0]) + bias[ask_rows]) * there[0]
            total, mixed = 0.0, torch.zeros(WIDTH, dtype=torch.float64)
            for back, (row, seen) in enumerate(zip(rows, there, strict=True)):
                if seen:
                    offer = weight[offer_rows] @ normed(row) + bias[offer_rows]
                    share = (ask @ offer / SCORE_DIM**0.5 + attention.bias[head, back]).exp()
                    total = total + share
                    mixed = mixed + share * projected[row, head * WIDTH : (head + 1) * WIDTH]
            heads.append(mixed / total if any(there) else mixed)
        made.append(torch.cat(heads))
    return torch.stack(made)


def both(attention, *functions):
    """What each function makes of the same inputs, and the gradients of all that goes in."""
    at, valid = positions()
    found = []
    for function in functions:
        hidden, projected = (random(ROWS, n, seed=n).requires_grad_() for n in (HIDDEN, HEADS * WIDTH))
        made = function(hidden, projected, at, valid)
        inputs = [hidden, projected, *attention.parameters()]
        found.append((made, torch.autograd.grad((made * random(*made.shape, seed=5)).sum(), inputs)))
    return found


def test_it_is_what_a_loop_over_positions_and_heads_gives(attention):
    (made, gradients), (expected, wanted) = both(attention, attention, lambda *inputs: one_by_one(attention, *inputs))
    assert made.shape == (2 * (ROWS - CONTEXT), HEADS * WIDTH)
    torch.testing.assert_close(made, expected, **EXACT)
    for gradient, other in zip(gradients, wanted, strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-10)


def test_a_position_that_sees_nothing_is_zeros_with_gradients(attention):
    at, valid = positions()
    ((made, gradients),) = both(attention, attention)
    nothing = ~valid.any(1)
    assert nothing.sum() >= 2
    assert (made[nothing] == 0).all()
    assert (made[~nothing].abs().amax(1) > 0).all()
    assert all(gradient.isfinite().all() for gradient in gradients)
    alone = attention(random(ROWS, HIDDEN), random(ROWS, HEADS * WIDTH), at[5:6], valid[5:6])
    for gradient in torch.autograd.grad(alone.sum(), list(attention.parameters())):
        assert (gradient == 0).all()


def test_what_is_not_seen_does_not_matter(attention):
    at, valid = positions()
    hidden, projected = random(ROWS, HIDDEN), random(ROWS, HEADS * WIDTH, seed=1)
    made = attention(hidden, projected, at, valid)
    for position in range(len(at)):
        seen = at[position][valid[position]].tolist()
        for row in set(range(ROWS)) - set(seen):
            other, else_ = hidden.clone(), projected.clone()
            other[row], else_[row] = 99.0 + random(HIDDEN, seed=8), -99.0
            found = attention(other, else_, at[position : position + 1], valid[position : position + 1])
            torch.testing.assert_close(found[0], made[position], **EXACT)


@pytest.mark.parametrize("block", [1, 5, 22])
def test_blocks_change_nothing(attention, monkeypatch, block):
    ((whole, gradients),) = both(attention, attention)
    monkeypatch.setattr(module, "BLOCK", block)
    ((made, others),) = both(attention, attention)
    assert len(whole) == 22
    torch.testing.assert_close(made, whole, **EXACT)
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, gradient, **EXACT)


def test_no_position_at_all(attention):
    at, valid = (x[:0] for x in positions())
    assert attention(random(ROWS, HIDDEN), random(ROWS, HEADS * WIDTH), at, valid).shape == (0, HEADS * WIDTH)


def test_at_first_the_distance_decides(attention):
    """Half of the heads see one token each, the others from near to far; no head prefers any token."""
    attention.reset_parameters()
    assert attention.bias.tolist()[0] == [0, -3, -6, -9]
    four = ContextAttention(HIDDEN, 4, CONTEXT)
    four.reset_parameters()
    assert four.bias.tolist()[:2] == [[0, -3, -6, -9], [-3, 0, -3, -6]]
    far = four.bias.detach()[2:]
    torch.testing.assert_close(far.diff(dim=1).exp(), torch.tensor([[0.5], [0.5**0.1]]).expand(2, 3))
    assert (far[:, 0] == 0).all()
    assert not attention.score_proj.bias.any()
    assert 0.01 < attention.score_proj.weight.std() < 0.03
    again = ContextAttention(HIDDEN, HEADS, CONTEXT).double()
    torch.manual_seed(7)  # of no account
    again.reset_parameters()
    assert torch.equal(again.score_proj.weight, attention.score_proj.weight)


def test_half_precision_weighs_in_single(attention):
    half, at_valid = ContextAttention(HIDDEN, HEADS, CONTEXT).bfloat16(), positions()
    half.load_state_dict(attention.state_dict())
    hidden, projected = random(ROWS, HIDDEN), random(ROWS, HEADS * WIDTH, seed=1)
    made = half(hidden.bfloat16(), projected.bfloat16(), *at_valid)
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(made.double(), attention(hidden, projected, *at_valid), rtol=0, atol=0.15)


@pytest.mark.parametrize("steps", [1, 3, 4, 5, 12])
def test_a_piece_is_the_same_by_blocks(attention, steps):
    """Against :meth:`forward`, padding and a position that sees nothing included, with all gradients."""
    batch, size = 2, CONTEXT - 1 + steps
    valid = torch.rand(batch, size, generator=torch.Generator().manual_seed(3)) < 0.7
    valid[0, :CONTEXT] = False
    valid[1] = True
    rows = torch.arange(batch * size).view(batch, size)[:, CONTEXT - 1 :, None] - torch.arange(CONTEXT)
    at = rows.flatten(0, 1)

    def gathered(hidden, projected):
        flat = attention(hidden.flatten(0, 1), projected.flatten(0, 1), at, valid.flatten()[at])
        return flat.unflatten(0, (batch, steps))

    found = []
    for function in (lambda *inputs: attention.of_piece(*inputs, valid), gathered):
        inputs = [random(batch, size, n, seed=n).requires_grad_() for n in (HIDDEN, HEADS * WIDTH)]
        made = function(*inputs)
        gradients = torch.autograd.grad((made * random(*made.shape, seed=5)).sum(), [*inputs, *attention.parameters()])
        found.append((made, gradients))
    (made, gradients), (expected, wanted) = found
    assert made.shape == (batch, steps, HEADS * WIDTH)
    assert (made[0, 0] == 0).all()
    torch.testing.assert_close(made, expected, **EXACT)
    for gradient, other in zip(gradients, wanted, strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-10)
