"""model.read(): any source, any piece size, interrupted anywhere."""

import platform

import psutil
import pytest
import torch

from senri.hf import session_mixin
from senri.hf.session_mixin import ReadProgress

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def assert_states_equal(left, right):
    left, right = left.named_tensors(), right.named_tensors()
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        torch.testing.assert_close(tensor, right[key], msg=lambda m, key=key: f"{key}: {m}", **EXACT)


@pytest.fixture
def tiny_tokenizer():
    """Characters as tokens, so that a tiny model can read text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {chr(i): i - 30 for i in range(33, 127)} | {"Ġ": 0}
    backend = Tokenizer(models.BPE(alphabet, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@torch.no_grad()
def read(model, source, *args, **options):
    model.end_session()
    progress = model.read(source, *args, **options)
    return progress, model.get_memory_state()


def test_every_source_gives_the_same_state(make_senri, tiny_tokenizer, real_text):
    model = make_senri(write_gate="surprise", memory_readout="head")
    text = real_text[:100].replace("\n", " ")[:60]
    ids = tiny_tokenizer(text)["input_ids"]
    assert len(ids) == 60
    progress, expected = read(model, torch.tensor([ids]))
    assert progress[:2] == (60, 60)
    assert progress.state_bytes == expected.nbytes
    sources = [ids, torch.tensor(ids), iter([ids[:7], ids[7:31], ids[31:]]), [ids[:1], ids[1:]]]
    texts = [text, iter([text[:11], text[11:12], text[12:]]), [text]]
    for source in sources:
        assert_states_equal(read(model, source)[1], expected)
    for source in texts:
        progress, state = read(model, source, tiny_tokenizer)
        assert progress.tokens == 60
        assert_states_equal(state, expected)
    for piece_size in (1, 7, 13, 59, 60, 61):
        assert_states_equal(read(model, ids, piece_size=piece_size)[1], expected)


def test_reading_is_the_models_own_forward(make_senri, tokens):
    model, ids = make_senri(), tokens(2, 30)
    _, state = read(model, ids, piece_size=11)
    with torch.no_grad():
        assert_states_equal(state, model.model(ids).past_key_values)
    assert state.batch_size == 2


def test_reading_computes_no_logits(make_senri, tokens, monkeypatch):
    model = make_senri()
    monkeypatch.setattr(model.lm_head, "forward", lambda *_: pytest.fail("logits that nobody asked for"))
    read(model, tokens(1, 30))
    with pytest.raises(pytest.fail.Exception, match="logits that nobody asked for"):
        model(tokens(1, 30))


def test_reading_goes_on_in_an_open_session(make_senri, tokens):
    model, ids = make_senri(), tokens(1, 40)
    _, expected = read(model, ids)
    read(model, ids[:, :17])
    model.read(ids[:, 17:])
    assert_states_equal(model.get_memory_state(), expected)


def test_progress_is_reported_after_each_piece(make_senri, tokens, capsys):
    model, seen = make_senri(), []
    read(model, tokens(1, 25), piece_size=10, progress=seen.append)
    assert [(p.tokens, p.total) for p in seen] == [(10, 25), (20, 25), (25, 25)]
    assert all(p.tokens_per_second > 0 for p in seen)
    assert seen[0].seconds <= seen[1].seconds <= seen[2].seconds
    assert ReadProgress(10, None, 2.0, 0).tokens_per_second == 5
    read(model, tokens(1, 25), progress=True)
    assert "reading" in capsys.readouterr().err


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="its heap is what grows")
def test_what_the_heap_keeps_is_given_back_while_a_text_is_read(make_senri, tokens, monkeypatch):
    """A heap with holes: half of many small blocks freed, in between the others."""
    monkeypatch.setattr(session_mixin, "TRIM_AFTER", 2)
    model = make_senri().eval()
    resident = []
    blocks = [b"x" * (60_000 + i) for i in range(4000)]

    def progress(now):
        resident.append(psutil.Process().memory_info().rss)
        if len(resident) == 1:
            del blocks[::2]

    model.read(tokens(1, 16)[0], piece_size=4, progress=progress)
    assert len(resident) == 4
    assert resident[0] - resident[-1] > 80_000_000


def test_nothing_to_read(make_senri, tiny_tokenizer):
    model = make_senri()
    for source in ("", [], torch.zeros(1, 0, dtype=torch.long), iter([""])):
        with pytest.raises(ValueError, match="nothing to read: the text is empty"):
            model.read(source, tiny_tokenizer)
    with pytest.raises(ValueError, match=r"needs its tokenizer: model\.read\(text, tokenizer\)"):
        model.read("text")
    with pytest.raises(ValueError, match="piece_size must be at least 1, not 0"):
        model.read([1], piece_size=0)


@pytest.mark.parametrize(("readout", "layer"), [("layer", 0), ("layer", 1), ("layer", 2), ("head", 0), ("head", 1)])
def test_an_interrupt_inside_a_piece_leaves_the_last_finished_one(make_senri, tokens, monkeypatch, readout, layer):
    model, ids = make_senri(memory_readout=readout, update_rule="delta"), tokens(1, 50)
    _, expected = read(model, ids, piece_size=10)
    module = model.model.layers[layer]
    forward, calls = module.forward, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        out = forward(*args, **kwargs)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return out

    monkeypatch.setattr(module, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read(model, ids, piece_size=10)
    assert model.session.tokens_read == [20]
    with torch.no_grad():
        model.read(ids[:, 20:], piece_size=10)
    assert_states_equal(model.get_memory_state(), expected)


def test_an_error_in_the_source_keeps_what_was_read(make_senri, tokens):
    def source():
        yield tokens(1, 10)[0].tolist()
        raise OSError("the disk is gone")

    model = make_senri()
    with pytest.raises(OSError, match="the disk is gone"):
        model.read(source(), piece_size=5)
    assert model.session.tokens_read == [10]


def test_a_real_text(make_real, real_text, real_tokenizer):
    model = make_real(random=True, memory_readout="head", update_rule="delta_token", write_gate="surprise")
    text = real_text[1000:1500]
    ids = torch.tensor([real_tokenizer(text)["input_ids"]])
    progress, state = read(model, text, real_tokenizer, piece_size=40)
    assert progress.tokens == ids.shape[1]
    with torch.no_grad():
        whole = model.model(ids).past_key_values
    for key, tensor in state.named_tensors().items():
        torch.testing.assert_close(tensor, whole.named_tensors()[key], rtol=1e-3, atol=2e-3)
    # window: 31 keys and values of 3 x 64 in 30 layers; two memories of 9 x 64 x 64
    assert state.memory_nbytes == 2 * (9 * 64 * 64 * 4 + 8)
    assert state.nbytes < 2_000_000


def test_the_name_of_a_file_is_no_text(make_senri, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("In the beginning")
    with pytest.raises(ValueError, match="is the name of a file, not a text"):
        make_senri().read(str(book), tokenizer=object())
