"""Runs ``senri`` on every bad input and prints what it says, as a Markdown table: ``python scripts/bad_inputs.py``.

No options. A tiny random model with the real tokenizer stands in for the real one, so that it takes about two minutes.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, logging

from senri import SenriForCausalLM, convert_to_senri
from senri.data import iter_bible
from senri.hf.base import base_directory, load_tokenizer

CONFIG = Path(__file__).resolve().parents[1] / "config"
MEMORY = {"num_memory_layers": 1, "first_memory_layer": 1, "memory_num_heads": 1, "memory_head_dim": 256}
LINES = 3  # of an output that are shown


def main() -> None:
    """Make the inputs in a temporary folder, run every case there, print the table."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_models()
        make_files()
        print("| input | exit code | what it prints |\n| --- | --- | --- |")
        cases = (texts, questions, memory_files, outputs, full_disks, interruption, configurations, models, batches)
        for case in cases:
            for name, code, output in case():
                print(f"| {name} | {code} | {shown(output)} |", flush=True)


def make_models() -> None:
    """window-64, window-50 (another configuration), other-tokenizer; gpt2, which is not supported."""
    tokenizer = load_tokenizer(base_directory())
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    base = LlamaForCausalLM(LlamaConfig(**shape, **heads, **special))
    for name, window in (("window-64", 64), ("window-50", 50), ("other-tokenizer", 64)):
        torch.manual_seed(1)
        convert_to_senri(base, sliding_window_size=window, **MEMORY).save_pretrained(name)
        if name == "other-tokenizer":
            tokenizer.add_tokens(["<another>"])
        tokenizer.save_pretrained(name)
    small = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=50, n_positions=32, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(small).save_pretrained("gpt2")


def make_files() -> None:
    """Texts, good and bad; book.senri, a good memory."""
    bible = "".join(iter_bible())
    Path("book.txt").write_text(bible[:20_000])
    Path("long.txt").write_text(bible[:2_000_000])
    Path("empty.txt").touch()
    Path("start.txt").write_bytes(b"\xff" + bible[:1000].encode())
    Path("middle.txt").write_bytes(bible[:50_000].encode() + b"\xff" + bible[50_000:100_000].encode())
    Path("late.txt").write_bytes(bible[:300_000].encode() + b"\xff" + bible[300_000:310_000].encode())
    configure()
    code, output = senri("read", "book.txt", "-o", "book.senri")
    assert code == 0, output
    data = Path("book.senri").read_bytes()
    Path("truncated.senri").write_bytes(data[: len(data) // 2])
    flipped = bytearray(data)
    flipped[-200] ^= 1
    Path("corrupt.senri").write_bytes(flipped)


def configure(base: str = "window-64", **changes: dict[str, Any]) -> None:
    """Write ./config: the one that ships, with a tiny model and with ``changes`` of single files."""
    Path("config").mkdir(exist_ok=True)
    fixed = {"model": {"base_model_name": base, "adapter": "none", "dtype": "float32", "senri": {}}}
    for name in ("model", "training", "experiment"):
        values = yaml.safe_load((CONFIG / f"{name}.yaml").read_text())
        values |= {**fixed.get(name, {}), **changes.get(name, {})}
        Path(f"config/{name}.yaml").write_text(yaml.safe_dump(values))


def senri(*arguments: str, meanwhile: Callable[[subprocess.Popen[str]], None] | None = None) -> tuple[int, str]:
    """Exit status and output of the real command; ``meanwhile`` runs once it has shown that it reads."""
    command = [sys.executable, "-m", "senri", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # what is rescued from a full disk goes into the temporary folder, and away with it
    with subprocess.Popen(command, **pipes, env={**os.environ, "TMPDIR": os.getcwd()}) as process:
        assert process.stdout is not None
        output = ""
        if meanwhile is not None:
            output = process.stdout.readline()
            meanwhile(process)
        output += process.stdout.read()
        return process.wait(), output


def shown(output: str) -> str:
    """The first lines of an output, word for word, as one table cell."""
    lines = [line.rstrip().replace("|", "\\|") for line in output.splitlines() if line.strip()]
    rest = [f"({len(lines) - LINES} more lines)"] if len(lines) > LINES else []
    return "<br>".join([f"`{line}`" for line in lines[:LINES]] + rest)


Rows = Iterator[tuple[str, object, str]]


def texts() -> Rows:
    """Texts that cannot be read."""
    for name, path in (
        ("a missing file", "none.txt"),
        ("an empty file", "empty.txt"),
        ("undecodable bytes at the start", "start.txt"),
        ("undecodable bytes in the middle of a 100 KB file", "middle.txt"),
        ("undecodable bytes after 300 KB: what came before is kept", "late.txt"),
        ("a folder", "gpt2"),
    ):
        yield name, *senri("read", path, "-o", f"{Path(path).stem}.senri")


def questions() -> Rows:
    """Questions that cannot be asked."""
    yield "a question longer than the window", *senri("ask", "book.senri", "why " * 100)
    yield "an empty question", *senri("ask", "book.senri", "")


def memory_files() -> Rows:
    """Memory files that cannot be opened."""
    configure("window-50")
    yield "another model's memory file", *senri("ask", "book.senri", "Who?")
    configure("other-tokenizer")
    yield "another tokenizer's memory file", *senri("ask", "book.senri", "Who?")
    configure()
    yield "a truncated memory file", *senri("ask", "truncated.senri", "Who?")
    yield "a corrupt memory file (one bit flipped)", *senri("ask", "corrupt.senri", "Who?")
    yield "a missing memory file", *senri("inspect", "none.senri")
    yield "a text instead of a memory file", *senri("inspect", "book.txt")


def outputs() -> Rows:
    """Places where a memory cannot be written."""
    yield "an output that exists", *senri("read", "book.txt", "-o", "book.senri")
    yield "an output in a missing folder", *senri("read", "book.txt", "-o", "none/book.senri")


def full_disks() -> Rows:
    """A real file system of 1 MB without room left."""
    if shutil.which("mount") is None or os.geteuid():
        yield "a full disk", "", "not tried: mounting a small disk needs root"
        return
    with small_disk() as how:
        Path("disk/filler").write_bytes(bytes(os.statvfs("disk").f_bavail * os.statvfs("disk").f_frsize))
        yield f"a disk that is full before reading ({how})", *senri("read", "book.txt", "-o", "disk/book.senri")
        Path("disk/filler").unlink()

        def fill(process: subprocess.Popen[str]) -> None:
            Path("disk/filler").write_bytes(bytes(os.statvfs("disk").f_bavail * os.statvfs("disk").f_frsize))

        configure(experiment={"reading": {"piece_size": 128}})  # slow enough to be overtaken
        code, output = senri("read", "long.txt", "-o", "disk/book.senri", meanwhile=fill)
        left = sorted(set(os.listdir("disk")) - {"filler"})
        yield f"a disk that fills up while a text is read ({how})", code, tail(output)
        assert left == [], left
        configure()


@contextlib.contextmanager
def small_disk() -> Iterator[str]:
    """./disk of 1 MB."""
    Path("disk").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "disk"], check=True)
    try:
        yield "a tmpfs of 1 MB"
    finally:
        subprocess.run(["umount", "disk"], check=True)


def tail(output: str) -> str:
    """An output without the lines of progress that came before its end."""
    lines = output.splitlines()
    return "\n".join(line for line in lines if not line.startswith("read ") or line == lines[-1])


def interruption() -> Rows:
    """Ctrl-C while a text is read, and going on."""
    configure(experiment={"reading": {"piece_size": 128}})
    result = senri("read", "long.txt", "-o", "long.senri", meanwhile=lambda process: process.send_signal(signal.SIGINT))
    yield "Ctrl-C while reading", result[0], tail(result[1])
    yield "looking at what was kept", *senri("inspect", "long.senri")
    yield "going on with another text", *senri("read", "book.txt", "-o", "long.senri", "--resume")
    configure()


def configurations() -> Rows:
    """Configuration files with impossible values."""
    for name, changes in (
        ("an unknown name in model.yaml", {"model": {"dtype": "float64"}}),
        ("an impossible value in training.yaml", {"training": {"batch_size": 0}}),
        ("a wrong type in experiment.yaml", {"experiment": {"reading": {"piece_size": "many"}}}),
        ("a misspelt key in model.yaml", {"model": {"senri": {"slidingwindow_size": 5}}}),
        ("a memory that the model was not made with", {"model": {"senri": {"memory_head_dim": 8}}}),
    ):
        configure(**changes)
        yield name, *senri("read", "book.txt", "-o", "new.senri")
    configure()
    Path("config/training.yaml").unlink()
    yield "a missing training.yaml", *senri("read", "book.txt", "-o", "new.senri")
    configure()


def models() -> Rows:
    """Models that cannot be converted."""
    yield "an unsupported architecture", *senri("convert", "gpt2", "out")
    yield "a folder without a model", *senri("convert", "config", "out")
    Path("bad.gguf").write_bytes(b"GGUF" + bytes(100))
    yield "a damaged .gguf file", *senri("convert", "bad.gguf", "out")


def batches() -> Rows:
    """Through the Python API: another number of rows than the session has."""
    model = SenriForCausalLM.from_pretrained("window-64").eval()
    model.generation_config.max_new_tokens = 1
    model.reset_memory(batch_size=2)
    ids = torch.ones(3, 5, dtype=torch.long)
    for call, function in (("model", model), ("model.generate", model.generate)):
        try:
            function(ids, attention_mask=torch.ones_like(ids))
        except ValueError as error:
            yield f"`{call}(ids)` with 3 rows in a session of 2 (Python)", "", f"ValueError: {error}"


if __name__ == "__main__":
    main()
