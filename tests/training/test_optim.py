"""Parameter groups, the schedule, and how far gates can move with it."""

from dataclasses import replace

import pytest
import torch

from senri.training.optim import (
    LEAST_TRAVEL,
    check_gate_travel,
    choose_trainable,
    gate_travel,
    group_of,
    make_optimizer,
    parameter_groups,
)
from senri.training.settings import Stage, TrainingError

from .conftest import SETTINGS

GATED = {"write_gate": "surprise", "memory_readout": "head", "update_rule": "gated_delta", "memory_conv_size": 2}


def names_in(groups, parameters):
    names = {id(p): n for n, p in parameters.items()}
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}


def test_gates_go_fast_and_do_not_decay(make_senri):
    parameters = choose_trainable(make_senri(**GATED), "memory", 0)
    settings = replace(SETTINGS, learning_rate=0.1, gate_learning_rate=0.7, weight_decay=0.3)
    groups = parameter_groups(parameters, settings)
    rates = {g["name"]: (g["lr"], g["weight_decay"]) for g in groups}
    assert rates == {"gates": (0.7, 0.0), "matrices": (0.1, 0.3), "vectors": (0.1, 0.0)}
    members = names_in(groups, parameters)
    assert sum(map(len, members.values())) == len(parameters), "each in one group"
    gates = {n.partition(".memory.")[2].partition(".weight")[0].partition(".bias")[0] for n in members["gates"]}
    assert {name.partition(".")[0] for name in gates} == {"read_gate", "forget_gate_proj", "write_gate"}
    assert {n.rpartition(".")[2] for n in members["vectors"]} == {"bias"}
    assert any(n.endswith("k_proj.weight") for n in members["matrices"])


def test_the_mix_gate_is_a_gate_and_the_mlp_gate_is_none(make_senri):
    parameters = choose_trainable(make_senri(memory_gate="infini", memory_head_dim=8), "all", 0)
    members = names_in(parameter_groups(parameters, SETTINGS), parameters)
    assert {n.rpartition(".")[2] for n in members["gates"]} == {"mix_gate"}
    assert "model.layers.0.mlp.gate_proj.weight" in members["matrices"]
    assert "model.norm.weight" in members["vectors"]


def test_what_is_trainable(make_senri):
    model = make_senri(**GATED)
    assert all(".memory." in name for name in choose_trainable(model, "memory", 0))
    assert not model.model.embed_tokens.weight.requires_grad
    lora = choose_trainable(model, "memory+lora", 2)
    assert {n.rpartition(".self_attn.")[2].partition(".lora_")[0] for n in lora if ".lora_" in n} == {
        "q_proj", "k_proj", "v_proj", "o_proj",
    }  # fmt: skip
    assert sum(".memory." in name for name in lora) == sum(".memory." in n for n, _ in model.named_parameters())
    assert all(".memory." in name or ".lora_" in name for name in lora)
    everything = choose_trainable(make_senri(**GATED), "all", 0)
    assert "model.embed_tokens.weight" in everything
    with pytest.raises(TrainingError, match="no memory to train"):
        choose_trainable(make_senri(num_memory_layers=0), "memory", 0)


def test_the_rates_rise_and_fall(make_senri):
    parameters = choose_trainable(make_senri(), "memory", 0)
    settings = replace(SETTINGS, max_steps=10, warmup_steps=2, learning_rate=1.0)
    optimizer, scheduler = make_optimizer(parameter_groups(parameters, settings), settings)
    seen = []
    for _ in range(10):
        seen.append(optimizer.param_groups[-1]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen[:3] == [0.0, 0.5, 1.0]
    assert seen[3:] == sorted(seen[3:], reverse=True)
    assert optimizer.param_groups[-1]["lr"] == pytest.approx(0.0)


def test_travel_is_what_adam_really_moves_a_gate(make_senri):
    settings = replace(SETTINGS, max_steps=50, warmup_steps=5, gate_learning_rate=0.1)
    gate = torch.nn.Parameter(torch.zeros(1))
    assert group_of("model.layers.1.memory.read_gate.bias", gate) == "gates"
    optimizer, scheduler = make_optimizer(
        parameter_groups({"model.layers.1.memory.read_gate.bias": gate}, settings), settings
    )
    for _ in range(settings.max_steps):
        gate.grad = torch.full((1,), 3.7)
        optimizer.step()
        scheduler.step()
    assert gate_travel(settings) == pytest.approx(-gate.item(), rel=1e-3)


def test_gates_that_cannot_move_stop_the_run():
    slow = replace(SETTINGS, max_steps=100, warmup_steps=10, gate_learning_rate=1e-3)
    with pytest.raises(TrainingError, match=r"less than 2\.0.*set gate_learning_rate to at least") as caught:
        check_gate_travel(slow)
    needed = float(str(caught.value).partition("at least ")[2].partition(" ")[0])
    fast = replace(slow, gate_learning_rate=needed)
    assert gate_travel(fast) >= LEAST_TRAVEL
    assert f"{gate_travel(fast):.2g} in 100 steps" in check_gate_travel(fast)


def test_a_curriculum_ends_at_the_full_length():
    settings = replace(SETTINGS, max_steps=10, max_length=64, curriculum=(Stage(16, 3), Stage(32, 2)))
    assert [settings.length_at(step) for step in range(10)] == [16] * 3 + [32] * 2 + [64] * 5
