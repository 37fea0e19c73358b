"""Gradients: through the memory of earlier pieces, cut where asked, the same with checkpointing; Trainer and PEFT."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import senri.hf.model as modeling
from senri.memory import RULES

from ..conftest import STORES

CASES = [
    {"update_rule": rule, "memory_readout": readout, "write_gate": "surprise", "memory_conv_size": 3}
    for rule in RULES
    for readout in ("layer", "head")
]
CASES.append({"memory_gate": "infini", "memory_head_dim": 8, "write_gate": "hidden"})
CONTEXT = [
    {"update_rule": rule, "memory_readout": readout, "write_gate": "surprise", "memory_context_size": 5}
    for rule, readout in (("linear", "layer"), ("delta_token", "head"))
]
CASES += CONTEXT
CASES += [
    {"memory_readout": readout, "write_gate": "hidden", "memory_context_size": 4} | store
    for store in STORES
    for readout in ("layer", "head")
]
SPREAD = 4  # times the write gate's logits: some tokens are not written, and not all others wholly


def name(options) -> str:
    return "-".join(map(str, options.values()))


def gradients(model) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def checkpointing_on(model):
    """transformers 5.17 has the one name, later versions the other."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    assert model.model.gradient_checkpointing


def two_pieces(model, ids, cut=None):
    """Loss of both halves, the second reading what the first wrote; ``cut`` is done to the cache in between."""
    half = ids.shape[1] // 2
    cache = model.model.new_cache()
    first = model(ids[:, :half], labels=ids[:, :half], past_key_values=cache).loss
    if cut is not None:
        cache = cut(cache)
    return first, model(ids[:, half:], labels=ids[:, half:], past_key_values=cache).loss


@pytest.mark.parametrize("options", CASES, ids=name)
def test_every_memory_parameter_learns_beyond_the_window(make_senri, tokens, options):
    model, ids = make_senri(**options).train(), tokens(2, 30)
    for memory in model.model.memories.values():
        if (
            memory.rule == "slot" and memory.writes
        ):  # a gate that never closes makes one run of all, and nothing weakens anything
            with torch.no_grad():
                memory.write_gate.out_proj.weight.mul_(SPREAD)
                memory.write_gate.out_proj.bias.zero_()
    model(ids, labels=ids).loss.backward()
    found = gradients(model)
    silent = [n for n, p in model.named_parameters() if n not in found or not found[n].abs().max() > 1e-9]
    assert silent == []
    assert all(g.isfinite().all() for g in found.values())


@pytest.mark.parametrize("options", CASES, ids=name)
def test_inside_the_window_the_memory_gets_no_gradient(make_senri, tokens, options):
    model, ids = make_senri(**options).train(), tokens(2, 7)
    model(ids, labels=ids).loss.backward()
    for parameter, gradient in gradients(model).items():
        if ".memory." in parameter and "mix_gate" not in parameter:
            assert gradient.abs().max() < 1e-9, parameter


@pytest.mark.parametrize("options", [*CASES[:2], *CONTEXT], ids=name)
def test_at_its_silent_start_the_branch_can_begin_to_learn(make_senri, tokens, options):
    model, ids = make_senri(random=False, **options).train(), tokens(2, 30)
    model(ids, labels=ids).loss.backward()
    gate = "read_gate.scale" if options["memory_readout"] == "head" else "o_proj.weight"
    for layer in model.config.memory_layers:
        memory = model.model.layers[layer].memory
        assert memory.get_parameter(gate).abs().max() == 0
        assert memory.get_parameter(gate).grad.abs().max() > 1e-4


@pytest.mark.parametrize("options", CASES, ids=name)
def test_gradient_checkpointing_changes_nothing(make_senri, tokens, monkeypatch, options):
    ids = tokens(2, 30)
    found, calls = {}, []
    monkeypatch.setattr(modeling, "checkpoint", lambda *args, **kwargs: calls.append(1) or checkpoint(*args, **kwargs))
    for checkpointing in (False, True):
        model = make_senri(**options).train()
        if checkpointing:
            checkpointing_on(model)
        first, second = two_pieces(model, ids)
        (first + second).backward()
        found[checkpointing] = (first.item(), second.item(), gradients(model))
    assert len(calls) >= 6, "three layers, two pieces"
    assert found[True][:2] == pytest.approx(found[False][:2], rel=1e-12)
    assert found[True][2].keys() == found[False][2].keys()
    for parameter, gradient in found[False][2].items():
        torch.testing.assert_close(found[True][2][parameter], gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", CASES, ids=name)
def test_the_pieces_of_a_sample_give_the_gradient_of_the_whole(make_senri, tokens, options):
    model, ids = make_senri(**options).train(), tokens(2, 30)
    labels = ids.clone()
    labels[:, :15] = -100  # the second piece's own labels start after its first token
    labels[:, 15] = -100
    model(ids, labels=labels).loss.backward()
    whole = gradients(model)
    model.zero_grad()
    two_pieces(model, ids)[1].backward()
    for parameter, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, whole[parameter], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("options", CASES, ids=name)
def test_gradient_reaches_what_an_earlier_piece_wrote_unless_it_is_cut(make_senri, tokens, options):
    model, ids = make_senri(**options).train(), tokens(1, 32)

    def write_path_gradient(cut):
        """Of the second piece's loss with respect to the state that the first one handed over."""
        model.zero_grad()
        cache = model.model.new_cache()
        model(ids[:, :16], past_key_values=cache)
        memory = cache.state.layers[1].memory.memory
        memory.M.retain_grad()
        model(ids[:, 16:], labels=ids[:, 16:], past_key_values=cache.detach() if cut else cache).loss.backward()
        return None if memory.M.grad is None else memory.M.grad.abs().max().item()

    assert write_path_gradient(cut=False) > 1e-8
    carried = gradients(model)
    assert write_path_gradient(cut=True) is None
    cut = gradients(model)
    for layer in [i for i, memory in model.model.memories.items() if memory.writes]:
        for parameter in ("k_proj.weight", "v_proj.weight"):
            key = f"model.layers.{layer}.memory.{parameter}"
            assert (carried[key] - cut[key]).abs().max() > 1e-8, key


def test_one_loss_after_another_never_walks_a_freed_graph(make_senri, tokens):
    model = make_senri().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    cache, losses = model.model.new_cache(), []
    for seed in range(3):
        ids = tokens(1, 16, seed=seed)
        loss = model(ids, labels=ids, past_key_values=cache).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        cache = cache.detach()
        losses.append(loss.item())
    assert cache.tokens_read == [48]
    assert all(map(math.isfinite, losses))


def test_the_cache_of_a_training_step_does_not_reach_the_next(make_senri, tokens):
    model, ids = make_senri().train(), tokens(1, 20)
    model.reset_memory()  # a session is no business of train()
    assert model(ids).logits.equal(model(ids).logits)
    assert model.session.tokens_read == [0]


def test_trainer(make_senri, tokens, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = make_senri(dtype=torch.float32, write_gate="surprise", memory_readout="head")
    samples = [{"input_ids": row, "labels": row} for row in tokens(8, 24)]
    checkpointing_on(model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        dataloader_pin_memory=False,
        learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", per_device_eval_batch_size=4,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=samples, eval_dataset=samples)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(1 < loss < 30 for loss in losses)
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {n for n in before if ".memory." in n} <= moved


def test_peft_lora(make_senri, tokens):
    from peft import LoraConfig, get_peft_model

    ids = tokens(2, 24)
    model = make_senri(update_rule="delta_token")
    expected = model(ids).logits.detach()
    lora = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2, lora_alpha=4, task_type="CAUSAL_LM"))
    torch.testing.assert_close(lora(input_ids=ids).logits, expected)
    trained = {n for n, p in lora.named_parameters() if p.requires_grad}
    # three attentions and two memories, two matrices each
    assert len(trained) == 10
    assert sum(".memory.q_proj.lora_" in n for n in trained) == 4
    lora.train()
    optimizer = torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(4):
        loss = lora(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    lora.eval()
    out = lora.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape == (2, 27)
