"""The benchmark of stores: equal sizes, its measures, and the stores that it adds as bounds."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from senri.evaluation.capacity import recalled_bits
from senri.memory import Routed, orthogonal_basis, read, scan

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "stores.py"
PAIRS = 48


@pytest.fixture(scope="module")
def stores():
    spec = importlib.util.spec_from_file_location("benchmark_stores", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def text(stores):
    keys = torch.randn(PAIRS, 576)
    return stores.Text({"exact": keys, "elsewhere": keys}, torch.randint(32, (PAIRS,)))


@pytest.fixture
def codes(stores):
    return stores.Codes(torch.arange(32), 32)


def test_states_are_of_equal_size(stores):
    arms = [*stores.main_arms(), *stores.routing_arms(), *stores.basis_arms()]
    for arm in arms:
        assert abs(arm.floats / stores.FLOATS - 1) < 0.02, arm
    assert {arm.rule for arm in arms if arm.num_memories is None} == set(stores.RULES)


def test_bits_of_even_values_are_fanos(stores):
    frequency = torch.full((256,), 1 / 64, dtype=torch.float64)
    for count in (0, 4, 100, 200, 256):
        right = torch.arange(256) < count
        assert stores.recalled_bits(right, frequency) == pytest.approx(recalled_bits(count / 256, 64), abs=2e-3)
    assert stores.recalled_bits(torch.ones(256, dtype=torch.bool), frequency) == pytest.approx(6)


def test_the_commonest_answer_is_worth_nothing(stores):
    frequency = torch.cat([torch.full((60,), 0.6), torch.full((40,), 0.01)]).double()
    assert stores.recalled_bits(torch.arange(100) < 60, frequency) == pytest.approx(0, abs=1e-9)
    assert stores.recalled_bits(torch.arange(100) >= 60, frequency) > 1


def test_every_arm_recalls_one_pair(stores, codes):
    one = stores.Text({"exact": torch.randn(1, 576), "elsewhere": torch.randn(1, 576)}, torch.tensor([3]))
    arms = [*stores.main_arms(), *stores.basis_arms()]
    rows = list(stores.measure(arms, one, codes, (1,), ("exact",)))
    assert {row["top1"] for row in rows} == {1.0}
    assert {row["bits"] for row in rows} == {0.0}  # there is nothing else to confuse it with


def test_the_oracle_reads_where_the_pair_lies(stores, codes, text):
    basis = orthogonal_basis("identity", 64)
    reads = {"found": stores.one(Routed(basis, 1)), "told": stores.oracle(basis), "random": stores.dealt(64, 1)}
    arm = stores.Arm("routed", num_memories=64, store=reads["found"], reads=reads)
    top1 = {row["read"]: row["top1"] for row in stores.measure([arm], text, codes, (PAIRS,), ("exact",))}
    assert top1["found"] == top1["told"] > 0.9  # the key itself finds its memory
    assert top1["random"] < 0.3


def test_all_memories_summed_are_the_single_one(stores):
    x = torch.randn(1, PAIRS, 1, 16, dtype=torch.float64)
    basis = orthogonal_basis("random", 16)
    whole, state = scan(x, x, x, store=stores.Remixed(basis, 16))
    single, _ = scan(x, x, x)
    torch.testing.assert_close(whole, single)
    few = stores.Remixed(basis, 1)
    torch.testing.assert_close(read(x, state, store=few), read(x, state, store=Routed(basis, 1)))


def test_reading_the_selected_memory_alone(stores):
    x = torch.randn(PAIRS, 16)
    store = Routed(orthogonal_basis("identity", 16), 1)
    _, state = scan(*3 * [x[None, :, None]], store=store)
    expected = read(x[None, :, None], state, store=store)[0, :, 0]
    torch.testing.assert_close(stores.read_selected(state, x, store.basis), expected)


def test_cleaning_all_but_nothing_keeps_the_recall(stores, codes, text, monkeypatch):
    monkeypatch.setattr(stores, "CLEANED", (PAIRS,))
    rows = list(stores.cleaning(text, codes))
    kept = {row["arm"]: row["top1"] for row in rows if row["energy"] is None and row["rule"] == "delta_token"}
    assert kept["single"] == 1.0
    ranks = [row["rank"] for row in rows if row["rule"] == "delta_token" and row["energy"] is not None]
    assert ranks == sorted(ranks, reverse=True)
