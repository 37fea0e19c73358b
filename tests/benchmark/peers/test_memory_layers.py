"""Layers side by side: both read the whole text in order, each from its own state."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from senri.benchmark.peers import infini_transformer_pytorch, memory_layers, titans_pytorch

TOKENS = 2500  # Senri's pieces do not divide it


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    torch.manual_seed(0)
    hidden = torch.randn(1, TOKENS, memory_layers.WIDTH)
    monkeypatch.setattr(memory_layers, "layer_inputs", lambda tokens: hidden[:, :tokens])
    return hidden


@pytest.mark.parametrize("rule", ["delta", "gated_delta"])
def test_both_read_all_of_the_text_in_order(hidden: Tensor, monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    ends: list[Any] = []
    monkeypatch.setattr(memory_layers, "nbytes", lambda memory: ends.append(memory) or 7)

    def step(part: Tensor, state: Any) -> list[Tensor]:
        assert not torch.is_grad_enabled()
        return [*(state or []), part]

    def all_of(state: list[Tensor]) -> int:
        assert [x.shape[1] for x in state] == [800, 800, 800, 100]
        assert torch.equal(torch.cat(state, 1), hidden)
        return 5

    row = memory_layers.race("x", step, 800, all_of, "how", tokens=TOKENS, repeats=3, heads=9, rule=rule)
    assert (len(row["seconds"]), len(row["senri_seconds"]), row["decode_seconds"]) == (3, 3, [])
    assert (row["state_bytes"], row["senri_state_bytes"]) == (5, 7)
    (memory,) = ends
    assert memory.written.tolist() == [TOKENS - memory_layers.WINDOW]
    assert memory.M.shape == (1, 9, 64, 64)
    assert memory.M.isfinite().all()
    assert memory.M.dtype == torch.float32


def test_inputs_are_the_text_normalised() -> None:
    found = memory_layers.layer_inputs(50)
    assert found.shape == (1, 50, memory_layers.WIDTH)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.square().mean(-1), torch.ones(1, 50), atol=1e-3, rtol=0)
    assert len(found[0].unique(dim=0)) > 20


@pytest.mark.parametrize("peer", [infini_transformer_pytorch, titans_pytorch])
def test_without_the_package_it_says_what_to_install(peer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    package = peer.__name__.rpartition(".")[2]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ValueError, match=rf"{package.replace('_', '-')} cannot be imported .*: pip install 'senri\[ben"
    ):
        peer.measure(8, 0, 1)


def test_the_infini_layer_without_attention_writes_what_the_whole_one_writes() -> None:
    package = pytest.importorskip("infini_transformer_pytorch.infini_transformer")
    torch.manual_seed(0)
    layer = package.CausalAttention(24, dim_head=8, heads=3, use_mem_delta_rule=True)
    step = infini_transformer_pytorch.memory_step(layer)
    mine = theirs = None
    for part in torch.randn(1, 30, 24).split(10, dim=1):
        mine = step(part, mine)
        _, _, theirs = layer(part, past_memories=theirs, return_new_memories=True)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b)
