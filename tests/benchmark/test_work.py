"""What is counted as work is what the layers multiply."""

import pytest
import torch
from torch import nn

from senri import convert_to_senri
from senri.benchmark.work import Work, WorkMeter, layer_work, logit_work, training_work, weight_bytes

HEAD = {"memory_readout": "head", "memory_num_heads": 1, "memory_num_key_value_heads": 1, "num_memory_layers": 1}


@pytest.fixture
def multiplied():
    """``(model, call)`` -> FLOP of the decoder layers' products with weights, memories aside, by hooks."""

    def count(model, call):
        total = [0]

        def hook(module, args, out):
            total[0] += 2 * args[0].shape[:-1].numel() * module.in_features * module.out_features

        linears = [
            m for name, m in model.model.layers.named_modules() if isinstance(m, nn.Linear) and "memory" not in name
        ]
        hooks = [m.register_forward_hook(hook) for m in linears]
        call()
        for h in hooks:
            h.remove()
        return total[0]

    return count


def test_weights_of_a_forward_and_of_a_reading(make_senri, tokens, multiplied):
    model, ids = make_senri(**HEAD), tokens(2, 30)
    with WorkMeter(model) as meter:
        done = multiplied(model, lambda: model(ids))
    assert meter.work.weights == done > 0
    assert meter.layer_tokens == 3 * 2 * 30
    assert meter.work == layer_work(model.config, 30).times(2 * 3)
    with WorkMeter(model) as meter:
        done = multiplied(model, lambda: model.read(ids, piece_size=10))
    assert meter.work.weights == done
    # the first piece runs through all three layers, the others through the one below the memory's
    assert meter.layer_tokens == 2 * (3 * 10 + 1 * 20)
    with WorkMeter(model) as meter:
        pass
    assert meter.work == Work()


@pytest.mark.parametrize(("steps", "past"), [(1, 0), (5, 0), (7, 0), (20, 0), (4, 3), (10, 6), (3, 6)])
def test_attention_sees_the_window(make_senri, steps, past):
    config = make_senri().config
    seen = sum(min(past + step + 1, config.sliding_window_size) for step in range(steps))
    width = config.num_attention_heads * config.head_dim
    assert layer_work(config, steps, past).attention == 2 * 2 * seen * width


def test_pieces_add_up_to_the_whole(make_senri):
    config = make_senri().config
    window = config.sliding_window_size
    parts, read = Work(), 0
    for steps in (4, 1, 9, 2):
        parts = parts.plus(layer_work(config, steps, min(read, window - 1)))
        read += steps
    assert parts == layer_work(config, read)


def test_what_a_training_step_must_do(make_senri):
    config = make_senri(**HEAD).config
    layers, logits = layer_work(config, 20).times(3), logit_work(config, 19)
    everything, _ = training_work(config, 20, 19, "all")
    assert everything.total == pytest.approx(3 * (layers.total + logits.total))
    memory, counted = training_work(config, 20, 19, "memory")
    assert memory.total == pytest.approx(layers.total + 2 * logits.total)
    assert "no gradient passes a layer" in counted
    # read-outs into layers 1 and 2: gradients pass the two layers from the first of them on
    into, _ = training_work(make_senri(memory_readout="layer").config, 20, 19, "memory")
    assert into.weights == pytest.approx(layers.weights / 3 * 5 + 2 * logits.weights)


def test_a_tied_head_is_read_once(make_senri):
    tied, loose = make_senri(dtype=torch.float32), make_senri(dtype=torch.float32, tie_word_embeddings=False)
    assert weight_bytes(tied) == sum(p.numel() * 4 for p in tied.parameters())
    assert weight_bytes(loose) == weight_bytes(tied)


def test_weights_in_eight_bits_are_fewer_bytes(make_base):
    """A weight is a byte, and each 32 of a row have a scale and an offset of four bytes."""
    numbers = {"num_memory_layers": 0, "decoding_weights": "int8"}
    model = convert_to_senri(make_base(dtype=torch.float32, intermediate_size=64, head_dim=32), **numbers)
    layers = [x for layer in model.model.layers for x in layer.modules() if type(x) is torch.nn.Linear]
    layers.append(model.lm_head)
    rest = sum(p.nbytes for p in model.parameters()) - sum(x.weight.nbytes for x in layers)
    assert weight_bytes(model) == rest + sum(x.weight.numel() * (8 + 2) / 8 for x in layers)
