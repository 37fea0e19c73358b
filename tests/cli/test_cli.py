"""The senri command: what each command does, and one line and an exit status for everything that goes wrong."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

import senri.data.text as text_module
from senri import __version__
from senri.hf.memory_file import read_header
from senri.memory.inspect import capacity
from senri.session import Session

OPTIONS = {"piece_size": 32, "generation": {"max_new_tokens": 5}}
QUESTION = "Who made the heaven?"


def same_memory(left, right):
    left, right = load_file(left), load_file(right)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_version(senri):
    result = senri("--version")
    assert (result.code, result.out.strip(), result.err) == (0, f"senri {__version__}", "")


# the way through -----------------------------------------------------------------------------------------------------


def test_read_inspect_ask(senri, book, open_model, real_tokenizer):
    steps = len(real_tokenizer(book.read_text())["input_ids"])
    result = senri("read", book, "-o", "book.senri")
    assert (result.code, result.err) == (0, "")
    assert f"saved book.senri: 0.00 MB for {steps} tokens; ask it with: senri ask book.senri" in result.out
    assert re.search(rf"read +{steps} tokens +[\d,]+ tokens/s +state 0.0\d MB", result.out)
    header = read_header("book.senri")
    assert (header["source"], header["complete"], header["tokens_read"]) == ("book.txt", True, [steps])

    shown = senri("inspect", "book.senri")
    assert (shown.code, shown.err) == (0, "")
    fields = dict(re.findall(r"^  (\w+) +(.*)$", shown.out, re.MULTILINE))
    assert fields["source"] == "book.txt"
    assert fields["tokens_read"] == f"[{steps}]"
    assert fields["update_rule"] == "delta_token"
    assert fields["sliding_window_size"] == "64"
    assert fields["memory_layers"] == "[1]"
    assert re.search(rf"│ +1 +│ +2 +│ +8 x 8 +│ +{steps} +│ +\d+\.\d\d +│ +[5678] of 8 +│", shown.out), shown.out

    load, overlap = re.search(r"│ +(\d+)% +│\n", shown.out)[1], re.search(r"│ +(0\.\d\d|1\.00) +│", shown.out)[1]
    assert int(load) == round(100 * steps / capacity(8, 8))
    assert 0 < float(overlap) <= 1

    before = Path("book.senri").read_bytes()
    answer = senri("ask", "book.senri", QUESTION)
    assert (answer.code, answer.err) == (0, "")
    session = Session(open_model, real_tokenizer, **OPTIONS)
    session.load("book.senri")
    assert answer.out.strip() == session.ask(QUESTION) != ""
    session.model.reset_memory()
    assert answer.out.strip() != session.ask(QUESTION), "this question does not show that the memory was opened"
    assert Path("book.senri").read_bytes() == before


def test_a_conversation(senri, book, open_model, real_tokenizer):
    assert senri("read", book, "-o", "book.senri").code == 0
    before = Path("book.senri").read_bytes()
    Path("my letter.txt").write_text("In the beginning was the Word. " * 5)
    lines = ["/memory", "", QUESTION, "and then?", "/memory", "/read my letter.txt", "/memory", "/save talk [b].senri"]
    lines += ["/nonsense", "/read", "/save", "/read none.txt", "/save none/talk.senri", "x " * 90, "/quit", "/memory"]
    result = senri("chat", "book.senri", stdin="\n".join(lines))
    assert result.code == 0

    session = Session(open_model, real_tokenizer, **OPTIONS)
    session.load("book.senri")
    counts = [session.state.tokens_read[0]]
    answers = [session.say(QUESTION), session.say("and then?")]
    counts.append(session.state.tokens_read[0])
    session.read_file("my letter.txt")
    counts.append(session.state.tokens_read[0])
    assert counts == sorted(set(counts))
    assert [
        int(n) for n in re.findall(r"(\d+) tokens read; state 0\.\d\d MB, of it memory 0.00 MB", result.out)
    ] == counts
    assert all(answer in result.out for answer in answers)
    assert f"book.senri: {counts[0]} tokens read\n" in result.out
    assert result.out.count("/quit  leave") == 2, "the help: once at the start, once for /nonsense"
    session.save("expected.senri")
    assert "saved talk [b].senri" in result.out
    assert same_memory("talk [b].senri", "expected.senri")
    assert Path("book.senri").read_bytes() == before
    errors = result.err.splitlines()
    assert errors[:3] == [
        "senri: /read needs a file: /read FILE",
        "senri: /save needs a file: /save FILE",
        "senri: none.txt: no such file",
    ]
    assert re.match(r"senri: the folder .*/none does not exist: make it first", errors[3])
    assert re.match(r"senri: the question has \d+ tokens, more than the window of 64", errors[4])
    assert len(errors) == 5


def test_a_conversation_without_a_memory_ends_with_its_input(senri):
    result = senri("chat", stdin="/memory\n")
    assert (result.code, result.err) == (0, "")
    assert "0 tokens read" in result.out


def test_ctrl_c_while_a_conversation_reads(senri, book, interrupt, real_tokenizer):
    Path("other.txt").write_text("And God said, Let there be light. " * 9)
    interrupt("forward", 4)
    result = senri("chat", stdin=f"/read {book}\n/memory\n/read other.txt\n/memory\n/read {book}\n/memory")
    assert result.code == 0
    assert "stopped after 96 tokens: interrupted. They are in the memory; /read book.txt goes on" in result.err
    other, whole = (len(real_tokenizer(Path(p).read_text())["input_ids"]) for p in ("other.txt", book))
    # another text is read from its start, and after it the first one, too
    assert [int(n) for n in re.findall(r"(\d+) tokens read;", result.out)] == [96, 96 + other, 96 + other + whole]


def test_ctrl_c_stops_an_answer_and_not_the_conversation(senri, book, interrupt):
    assert senri("read", book, "-o", "book.senri").code == 0
    tokens = read_header("book.senri")["tokens_read"]
    interrupt("forward", 3)
    result = senri("chat", "book.senri", stdin=f"{QUESTION}\n/memory\n{QUESTION}\n/save talk.senri")
    assert (result.code, result.err) == (0, "")
    assert "(stopped; /quit leaves, /save FILE.senri keeps the memory)" in result.out
    assert f"{tokens[0]} tokens read; state" in result.out, "the turn that was stopped left no trace"
    assert read_header("talk.senri")["tokens_read"] > tokens


def test_ctrl_c_while_a_conversation_reads_and_the_same_text_again(senri, book, interrupt, real_tokenizer):
    interrupt("forward", 4)
    result = senri("chat", stdin=f"/read {book}\n/read {book}\n/memory")
    steps = len(real_tokenizer(book.read_text())["input_ids"])
    assert f"{steps} tokens read;" in result.out


def test_standard_input(senri, book):
    assert senri("read", book, "-o", "file.senri").code == 0
    result = senri("read", "-", "-o", "piped.senri", stdin=book.read_bytes())
    assert (result.code, result.err) == (0, "")
    assert same_memory("file.senri", "piped.senri")
    assert read_header("piped.senri")["source"] == "-"


def test_a_pipe_is_no_empty_file(senri, book):
    os.mkfifo("pipe")
    with subprocess.Popen(["/bin/sh", "-c", f"cat {book} > pipe"]):
        result = senri("read", "pipe", "-o", "piped.senri")
    assert result.code == 0, result.err
    assert senri("read", book, "-o", "file.senri").code == 0
    assert same_memory("file.senri", "piped.senri")


# stopping and going on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nth", "after", "kept"),
    [
        ("forward", 2, False, 32),
        ("forward", 9, False, 256),
        ("forward", 9, True, 288),  # after the piece is in the state, before anyone counted it
        ("flush", 1, False, "all"),
        ("flush", 1, True, "all"),
    ],
)
def test_ctrl_c_and_resume_is_as_if_never_stopped(
    senri, book, interrupt, monkeypatch, real_tokenizer, name, nth, after, kept
):
    assert senri("read", book, "-o", "whole.senri").code == 0
    steps = read_header("whole.senri")["tokens_read"][0]
    kept = steps if kept == "all" else kept
    book = book.rename("my book.txt")
    with monkeypatch.context() as context:
        from senri.hf.modeling_senri import SenriModel

        context.setattr(SenriModel, name, getattr(SenriModel, name))  # taken back at the end
        interrupt(name, nth, after)
        stopped = senri("read", book, "-o", "part.senri")
        assert stopped.code == 130
        line = f"senri: stopped after {kept} tokens: interrupted. They are kept in part.senri; go on with: "
        assert stopped.err.startswith(line), stopped.err
        header = read_header("part.senri")
        assert (header["complete"], header["tokens_read"], header["read_tokens"]) == (False, [kept], kept)
    assert senri("ask", "part.senri", QUESTION).code == 0
    command = shlex.split(stopped.err.removeprefix(line))
    assert command == ["senri", "read", "my book.txt", "-o", "part.senri", "--resume"]
    done = senri(*command[1:])
    assert (done.code, done.err) == (0, "")
    assert same_memory("part.senri", "whole.senri")
    finished, whole = read_header("part.senri"), read_header("whole.senri")
    assert {k: v for k, v in finished.items() if k not in ("source", "checksum")} == {
        k: v for k, v in whole.items() if k not in ("source", "checksum")
    }


def test_ctrl_c_twice_and_other_pieces(senri, book, configure, senri_folder, interrupt, real_tokenizer):
    """The piece size changes while a reading is stopped: the text is still known again, each token read once."""
    steps = len(real_tokenizer(book.read_text())["input_ids"])
    interrupt("forward", 4)
    assert senri("read", book, "-o", "a.senri").code == 130  # 96 tokens
    configure(senri_folder, experiment={"reading": {"piece_size": 50}})
    interrupt("forward", 3)
    again = senri("read", book, "-o", "a.senri", "--resume")
    assert again.code == 130
    assert "stopped after 196 tokens" in again.err
    done = senri("read", book, "-o", "a.senri", "--resume")
    assert (done.code, done.err) == (0, "")
    header = read_header("a.senri")
    assert (header["complete"], header["tokens_read"]) == (True, [steps])
    assert load_file("a.senri")["layers.1.memory.memory.written"].tolist() == [steps]


def test_ctrl_c_before_anything_was_read(senri, book, interrupt, one_line):
    interrupt("forward", 1)
    result = senri("read", book, "-o", "a.senri")
    assert (result.code, result.err) == (130, "senri: interrupted\n")
    assert not Path("a.senri").exists()


def test_a_wrong_resume_is_refused(senri, book, interrupt, one_line):
    interrupt("forward", 9)
    assert senri("read", book, "-o", "a.senri").code == 130
    before = Path("a.senri").read_bytes()
    text = book.read_text()
    for name, wrong in {"other": text.replace("earth", "sea"), "shorter": text[:500], "much": "a"}.items():
        Path(name).write_text(wrong)
        one_line(senri("read", name, "-o", "a.senri", "--resume"), f"{name} is not the text whose reading was stopped")
    one_line(senri("read", book, "-o", "none.senri", "--resume"), "none.senri: no such file; make one with: senri read")
    one_line(senri("read", book, "-o", "a.senri"), "a.senri exists: name another file, or add --overwrite")
    assert Path("a.senri").read_bytes() == before
    Path("longer").write_text(text + " And more.")  # the stopped part is the same
    assert senri("read", "longer", "-o", "a.senri", "--resume").code == 0
    one_line(senri("read", book, "-o", "a.senri", "--resume"), "a.senri holds a finished reading: there is nothing to")


# where the memory goes --------------------------------------------------------------------------------------------


def test_outputs_that_cannot_be(senri, book, one_line, monkeypatch):
    def never(*args, **options):
        pytest.fail("the model was loaded before the output was checked")

    monkeypatch.setattr("senri.hf.base.load_model", never)
    Path("old.senri").write_text("old")
    Path("folder").mkdir()
    one_line(senri("read", book, "-o", "old.senri"), r"old.senri exists: .*--overwrite \(replace it\) or --resume")
    one_line(senri("read", book, "-o", "folder"), "folder is a folder: name a file, e.g. folder/book.senri")
    one_line(senri("read", book, "-o", "none/a.senri"), "the folder .*/none does not exist: make it first")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "folder")  # root may write anywhere
    one_line(senri("read", book, "-o", "folder/a.senri"), "folder is not writable: choose another place with -o")
    assert Path("old.senri").read_text() == "old"


def test_overwrite(senri, book):
    Path("a.senri").write_text("old")
    assert senri("read", book, "-o", "a.senri", "--overwrite").code == 0
    assert read_header("a.senri")["source"] == "book.txt"


def test_a_disk_that_is_too_full_is_seen_before_reading(senri, book, one_line, monkeypatch, interrupt):
    interrupt("forward", 1)  # reading would end with 130
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    result = senri("read", book, "-o", "a.senri")
    one_line(result, r"the disk of a.senri has 0.0 MB free and the memory may need 0.0 MB: make room")
    assert not Path("a.senri").exists()


def test_a_disk_that_fills_up_meanwhile(senri, book, monkeypatch, tmp_path):
    assert senri("read", book, "-o", "whole.senri").code == 0
    Path("full").mkdir()
    fsync = os.fsync

    def no_space(descriptor):
        if "/full/" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", no_space)
    result = senri("read", book, "-o", "full/a.senri")
    assert result.code == 1, "it is not where it was wanted"
    (rescue,) = re.findall(r"The memory is safe in (\S+)$", result.err, re.MULTILINE)
    assert re.match(r"senri: cannot write full/a.senri: No space left on device \(0.0 MB needed\); choose", result.err)
    assert f"saved {rescue}" in result.out
    assert same_memory(rescue, "whole.senri")
    assert os.listdir("full") == []
    shutil.rmtree(Path(rescue).parent)


# texts ------------------------------------------------------------------------------------------------------------


def test_texts_that_cannot_be_read(senri, one_line):
    Path("empty.txt").touch()
    Path("latin.txt").write_bytes("Ça commence".encode("latin-1"))
    Path("folder").mkdir()
    read = ("-o", "a.senri")
    one_line(senri("read", "none.txt", *read), "none.txt: no such file")
    one_line(senri("read", "folder", *read), "folder is a folder; name a text file")
    one_line(senri("read", "empty.txt", *read), "empty.txt is empty: there is nothing to read")
    one_line(senri("read", "-", *read), "- is empty: there is nothing to read")
    one_line(senri("read", "latin.txt", *read), r"latin.txt is not UTF-8 text \(byte 0\): convert it first, e.g. iconv")
    assert not Path("a.senri").exists()


def test_a_text_that_goes_bad_in_the_middle(senri, book, monkeypatch, real_text, real_tokenizer):
    monkeypatch.setattr(text_module, "FILE_BLOCK", 1000)
    monkeypatch.setattr(text_module, "TOKENIZER_BLOCK", 4500)
    text = real_text[:12_000]
    Path("good.txt").write_text(text)
    Path("bad.txt").write_bytes(text[:10_500].encode() + b"\xff" + text[10_500:].encode())
    assert senri("read", "good.txt", "-o", "whole.senri").code == 0
    result = senri("read", "bad.txt", "-o", "a.senri")
    assert result.code == 1
    assert "bad.txt is not UTF-8 text (byte 10500): convert it first" in result.err
    assert "once that is mended, go on with: senri read bad.txt -o a.senri --resume" in result.err
    (kept,) = re.findall(r"stopped after ([\d,]+) tokens", result.err)
    kept = int(kept.replace(",", ""))
    assert kept > 1000
    header = read_header("a.senri")
    assert (header["complete"], header["tokens_read"]) == (False, [kept])
    assert header["read_tokens"] == kept
    assert senri("read", "good.txt", "-o", "a.senri", "--resume").code == 0
    assert same_memory("a.senri", "whole.senri")


# questions and memories -------------------------------------------------------------------------------------------


@pytest.fixture
def saved(senri, book):
    assert senri("read", book, "-o", "book.senri").code == 0
    return Path("book.senri")


def test_questions_that_cannot_be_asked(senri, saved, one_line):
    one_line(senri("ask", saved, "  "), "the question is empty: ask something")
    one_line(senri("ask", saved, "why " * 70), r"the question has 1\d\d tokens, more than the window of 64: shorten it")
    result = senri("ask", saved)
    assert result.code == 2
    assert "Missing argument 'QUESTION'" in result.err


def test_memories_that_cannot_be_opened(senri, saved, one_line):
    data = saved.read_bytes()
    Path("short.senri").write_bytes(data[: len(data) // 2])
    flipped = bytearray(data)
    flipped[-100] ^= 1
    Path("flipped.senri").write_bytes(flipped)
    Path("text.senri").write_text("In the beginning")
    for command in (("ask", "{}", QUESTION), ("inspect", "{}"), ("chat", "{}")):
        for name, pattern in {
            "short": "short.senri is no Senri memory, or truncated or corrupt",
            "flipped": "flipped.senri is corrupt: its content does not match its checksum; read the text again",
            "text": "text.senri is no Senri memory, or truncated",
            "none": "none.senri: no such file; make one with: senri read TEXT -o none.senri",
        }.items():
            one_line(senri(*(part.format(f"{name}.senri") for part in command)), pattern)


def test_a_memory_of_another_model(senri, saved, configure, make_folder, base_folder, senri_folder, one_line):
    configure(make_folder(sliding_window_size=50))
    one_line(senri("ask", saved, QUESTION), r"does not fit this model: sliding_window_size is 64 in the file, 50 here")
    one_line(senri("chat", saved), "does not fit this model: sliding_window_size is 64")
    configure(make_folder(memory_head_dim=4))
    one_line(senri("ask", saved, QUESTION), r"memory_heads is \[2, 2, 8\] in the file, \[2, 2, 4\] here")
    configure(base_folder)  # the same base without these weights
    one_line(senri("ask", saved, QUESTION), "book.senri does not fit this model: ")
    configure(senri_folder)
    assert senri("ask", saved, QUESTION).code == 0


@pytest.mark.parametrize(
    ("fields", "number", "matrix", "load"),
    [
        ({"update_rule": "linear", "store": "routed", "routing_basis": "hadamard"}, 16, "8 x 8", r"\d+%"),
        ({"update_rule": "delta", "store": "banks", "num_memory_banks": 3}, 6, "8 x 8", r"\d+%"),
        ({"update_rule": "linear", "store": "hierarchical", "num_memories": 5}, 10, "8 x 8", r"\d+%"),
        ({"update_rule": "slot", "memory_num_slots": 40}, 2, "8 x 40", "100%"),
    ],
)
def test_inspect_of_every_store(senri, configure, make_folder, book, one_line, fields, number, matrix, load):
    configure(make_folder(**fields))
    assert senri("read", book, "-o", "book.senri").code == 0
    shown = senri("inspect", "book.senri")
    assert (shown.code, shown.err) == (0, "")
    row = rf"│ +1 +│ +{number} +│ +{matrix} +│ +\d+ +│ +\d+\.\d\d +│ +[1-8] of 8 +│ +[01]\.\d\d +│ +{load} +│"
    assert re.search(row, shown.out), shown.out
    assert senri("ask", "book.senri", QUESTION).code == 0
    for name in fields.keys() & {"store", "routing_basis", "num_memory_banks", "num_memories"}:
        assert re.search(rf"^  {name} +{fields[name]}$", shown.out, re.MULTILINE)
    if "store" in fields:
        configure(make_folder(update_rule=fields["update_rule"]))
        one_line(senri("ask", "book.senri", QUESTION), f"store is '{fields['store']}' in the file, 'single' here")


def test_without_an_adapter_every_process_makes_the_same_model(senri, configure, base_folder, book):
    """The added weights start at random where no file brings them."""
    configure(base_folder, model={"senri": {"memory_num_heads": 1, "memory_head_dim": 8}})
    assert senri("read", book, "-o", "a.senri").code == 0
    torch.rand(7)
    result = senri("ask", "a.senri", QUESTION)
    assert (result.code, result.err) == (0, "")


# configuration ----------------------------------------------------------------------------------------------------


def test_every_mistake_in_the_configuration_has_its_line(senri, configure, senri_folder, book):
    configure(
        senri_folder,
        model={"dtype": "float64", "adaptor": "none"},
        training={"batch_size": 0},
        experiment={"reading": {"piece_size": "many"}, "seed": -1},
    )
    result = senri("read", book, "-o", "a.senri")
    assert result.code == 1
    first, *lines = result.err.splitlines()
    assert first == "senri: the configuration in config is not valid:"
    assert sorted(line.split(": ")[:2] for line in lines) == [
        ["experiment.yaml", "reading.piece_size"],
        ["experiment.yaml", "seed"],
        ["model.yaml", "adaptor"],
        ["model.yaml", "dtype"],
        ["training.yaml", "batch_size"],
    ]
    assert "model.yaml: dtype: 'float64' is not one of: auto, float32, bfloat16" in lines
    assert senri("inspect", "none.senri").err == (
        "senri: none.senri: no such file; make one with: senri read TEXT -o none.senri\n"
    )


@pytest.mark.parametrize(
    ("model", "pattern"),
    [
        ({"senri": {"update_rule": "delta"}}, "update_rule is 'delta_token' in the model .* cannot become 'delta'"),
        ({"adapter": "memory.safetensors"}, "is a Senri model with a memory of its own: set adapter to none"),
        ({"base_model_name": "./nowhere"}, "cannot load a model from './nowhere'"),
        ({"base_model_name": "nowhere.gguf"}, "nowhere.gguf: no such file"),
        ({"base_model_name": "config"}, "config has neither config.json nor a .gguf file"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be(senri, book, configure, senri_folder, one_line, model, pattern):
    configure(senri_folder, model=model)
    one_line(senri("read", book, "-o", "a.senri"), pattern)


def test_an_impossible_memory_for_a_base(senri, book, configure, base_folder, one_line):
    for fields, pattern in [
        ({"memory_conv_size": 1}, "memory_conv_size 1 convolves nothing"),
        ({"first_memory_layer": 2}, r"memory layers \[2.*\] do not fit into 2 layers"),
        ({"update_rule": "linear", "feature_map": "identity"}, "feature_map 'identity' can be negative"),
    ]:
        configure(base_folder, model={"senri": fields})
        one_line(senri("read", book, "-o", "a.senri"), pattern)


# convert ----------------------------------------------------------------------------------------------------------


def test_convert_and_use(senri, configure, base_folder, book, one_line):
    result = senri("convert", base_folder, "model")
    assert (result.code, result.err) == (0, "")
    assert re.search(r"saved model: 0.0\dM added parameters in layers \[\d", result.out)
    fields = json.loads(Path("model/config.json").read_text())
    assert (fields["model_type"], fields["sliding_window_size"]) == ("senri", 1024)
    configure(Path("model").absolute())
    assert senri("read", book, "-o", "a.senri").code == 0
    assert senri("ask", "a.senri", QUESTION).code == 0
    weights = load_file("model/model.safetensors")
    one_line(senri("convert", base_folder, "model"), "model exists: name another place")
    one_line(senri("convert", base_folder, "b", "none.txt"), "none.txt: no such file")
    Path("short.txt").write_text("too little")
    one_line(senri("convert", base_folder, "b", "short.txt"), r"calibration needs at least 128 tokens of text, not \d")
    assert not Path("b").exists()
    # calibrated: the layer read-out gets its keys, and stays silent
    assert (result := senri("convert", base_folder, "calibrated", book)).code == 0
    assert re.search(r"calibrated on \d+ tokens: the layer read-out stays silent until it is trained", result.out)
    calibrated = load_file("calibrated/model.safetensors")
    changed = {name for name in weights if not torch.equal(weights[name], calibrated[name])}
    assert {name.split("memory.")[1] for name in changed} == {
        "q_proj.weight",
        "q_proj.bias",
        "k_proj.weight",
        "k_proj.bias",
    }


def test_convert_to_an_adapter_with_the_configured_memory(senri, configure, base_folder, book, real_text):
    fields = {"memory_readout": "head", "sliding_window_size": 64, "num_memory_layers": 1, "first_memory_layer": 1}
    fields |= {"memory_num_heads": 1, "memory_head_dim": 32, "update_rule": "delta_token", "memory_conv_size": 2}
    configure(base_folder, model={"senri": fields})
    Path("a.txt").write_text(real_text[:2500])
    Path("b.txt").write_text(real_text[100_000:102_500])
    result = senri("convert", base_folder, "a.safetensors", "a.txt", "b.txt")
    assert result.code == 0, result.err
    without, with_ = map(float, re.search(r"loss on repeated text ([\d.]+) -> ([\d.]+) nats", result.out).groups())
    assert with_ <= without
    configure(base_folder, model={"adapter": "a.safetensors", "senri": {"memory_head_dim": 16}})
    refused = senri("read", book, "-o", "book.senri")
    assert "memory_head_dim is 32 in the adapter a.safetensors and cannot become 16: leave it as it is" in refused.err
    configure(base_folder, model={"adapter": "a.safetensors"})
    assert senri("read", book, "-o", "book.senri").code == 0
    header = read_header("book.senri")
    assert (header["memory_readout"], header["memory_heads"]) == ("head", [1, 1, 32])


def test_convert_what_is_not_supported(senri, one_line, tmp_path, real_tokenizer):
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=50, n_positions=32, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained("gpt2")
    one_line(senri("convert", "gpt2", "out"), "architecture 'gpt2' is not supported: Senri converts Llama-architecture")
    Path("unknown").mkdir()
    Path("unknown/config.json").write_text('{"model_type": "unheard_of"}')
    one_line(senri("convert", "unknown", "out"), "cannot load a model from 'unknown': .*unheard_of")
    Path("bad.gguf").write_bytes(b"GGUF" + bytes(40))
    one_line(senri("convert", "bad.gguf", "out"), "cannot load a model from 'bad.gguf'")
    assert not Path("out").exists()


def test_convert_without_a_tokenizer(senri, one_line, base_folder):
    shutil.copytree(base_folder, "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    one_line(senri("convert", "bare", "out"), "cannot load a tokenizer from 'bare'")


# help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("read", ["TEXT", "FILE.senri", "--output", "--resume", "--overwrite", "Ctrl-C"]),
        ("ask", ["FILE.senri", "QUESTION"]),
        ("chat", ["[FILE.senri]"]),
        ("inspect", ["FILE.senri"]),
        ("convert", ["SOURCE", "OUT", "[TEXT]..."]),
        ("demo", ["--full"]),
        ("eval", ["--output", "--compare", "Ctrl-C", "experiment.yaml"]),
    ],
)
def test_help(senri, command, words):
    result = senri(command, "--help")
    assert (result.code, result.err) == (0, "")
    usage, text = result.out.split("\n", 1)
    assert usage.startswith(f"Usage: senri {command}") or command in usage
    assert all(word in result.out for word in words), result.out
    assert text.strip()


def test_usage_errors(senri):
    for arguments, words in [
        (("read", "book.txt"), "Missing option '--output' / '-o'"),
        (("reed",), "No such command 'reed'"),
        (("read", "--quick"), "No such option: --quick"),
    ]:
        result = senri(*arguments)
        assert result.code == 2
        assert words in result.err


def test_as_a_module_without_torch():
    code = "import sys, runpy; sys.argv = ['senri', '--help']\ntry: runpy.run_module('senri', run_name='__main__')\n"
    code += "except SystemExit as e: print(e.code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    commands = re.findall(r"^  (\w+) ", done.stdout.split("Commands:")[1], re.MULTILINE)
    assert commands == ["read", "ask", "chat", "inspect", "convert", "demo", "train", "eval", "bench"]
    assert done.stdout.splitlines()[-1] == "0 False False"
    module = subprocess.run([sys.executable, "-m", "senri", "--help"], capture_output=True, text=True, check=True)
    assert "read text of any length in constant memory" in module.stdout


@pytest.mark.slow
def test_the_real_model_with_the_configuration_as_it_ships(senri, book):
    shutil.rmtree("config")
    result = senri("read", book, "-o", "book.senri")
    assert (result.code, result.err) == (0, "")
    header = read_header("book.senri")
    assert (header["base"], header["memory_heads"]) == ("30 layers of 576", [1, 1, 576])
    answer = senri("ask", "book.senri", "What is 2 + 2? Answer with one number.")
    assert "4" in answer.out
