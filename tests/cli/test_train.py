"""``senri train`` as a user types it, on a tiny model with the real vocabulary."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from senri.cli.eval import held_out
from senri.cli.train import notes_of, training_texts
from senri.config import ConfigManager
from senri.data.corpus import load_documents, split_documents
from senri.hf.adapter import read_adapter_header

from .conftest import CONFIG, MEMORY

ROOT = Path(__file__).parents[2]
TRAINING = {
    "method": "bptt",
    "data": ["texts"],
    "batch_size": 1,
    "max_length": 192,
    "niah_ratio": 0.5,
    "recall_ratios": {"overwritten": 0.0, "chain": 0.0, "repeat": 0.0, "names": 0.0, "babi": 0.0},
    "chat_ratio": 0.0,
    "piece_length": 100,
    "gate_learning_rate": 1.0,
    "max_steps": 4,
    "warmup_steps": 1,
    "save_steps": 2,
    "probe_steps": 2,
}


@pytest.fixture
def training(senri, configure, base_folder, real_text, tmp_path):
    """``(model={...}, **changes of training.yaml)`` configures a converted tiny Llama and two small texts."""
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "one.txt").write_text(real_text[:60_000], encoding="utf-8")
    (texts / "two.txt").write_text(real_text[200_000:260_000], encoding="utf-8")

    def write(model=None, base=base_folder, **changes):
        configure(
            base,
            model={"senri": {**MEMORY, "memory_readout": "head"}, **(model or {})},
            training={**TRAINING, **changes},
            experiment={"calibration": {"num_tokens": 256}},
        )

    write()
    return write


def log_of(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def test_a_training_with_all_its_files_and_its_adapter_read_with(senri, training):
    result = senri("train", "-o", "run")
    assert (result.code, result.err) == (0, ""), result
    for word in ("the run goes to run", "calibrated on", "logit can move by about", "parameters learn (memory)"):
        assert word in result.out, word
    for word in ("step 2: recalls", "step 4/4", "saved run/adapter.safetensors: name it as adapter in config"):
        assert word in result.out, word
    names = {p.name for p in Path("run").iterdir()}
    assert {"run.json", "log.jsonl", "adapter.safetensors", "checkpoint-00000002", "checkpoint-00000004"} <= names
    assert [entry["step"] for entry in log_of("run")] == [1, 2, 3, 4]
    header = read_adapter_header("run/adapter.safetensors")
    digests = {d.digest for d in load_documents(["texts"])}
    notes = header["notes"]
    assert notes["config"]["learning_rate"] == 3e-4
    assert (notes["steps"], notes["seed"], notes["command"]) == (4, 0, "senri train -o run")
    assert set(notes["data_digests"]) <= digests
    assert 0 <= notes["probe"]["answers"] <= 1
    training(model={"adapter": "run/adapter.safetensors"})
    assert senri("read", "texts/one.txt", "-o", "one.senri").code == 0
    again = senri("train", "-o", "run")
    assert again.code == 0
    assert "going on after step 4" in again.out
    assert len(log_of("run")) == 4


@pytest.mark.slow
def test_the_default_folder_and_training_from_an_adapter(senri, training):
    first = senri("train")
    assert first.code == 0, first
    (folder,) = Path("runs/train").iterdir()
    training(init_adapter=str(folder / "adapter.safetensors"))
    second = senri("train", "-o", "second")
    assert second.code == 0, second
    assert "calibrated" not in second.out
    assert "loss" in log_of("second")[0]


def test_ctrl_c_saves_and_says_how_to_go_on(senri, training, monkeypatch):
    from senri.data.mix import TrainingMix

    straight = senri("train", "-o", "straight")
    assert straight.code == 0
    whole = TrainingMix.__getitem__

    def interrupted(self, index):
        if index == 2 and self.seed == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return whole(self, index)

    monkeypatch.setattr(TrainingMix, "__getitem__", interrupted)
    result = senri("train", "-o", "my run")
    assert result.code == 130
    assert "interrupted; all 3 steps are kept in my run, go on with: senri train -o 'my run'" in result.err
    monkeypatch.setattr(TrainingMix, "__getitem__", whole)
    assert senri("train", "-o", "my run").code == 0
    bytes_ = [
        Path(folder, "checkpoint-00000004", "weights.safetensors").read_bytes() for folder in ("straight", "my run")
    ]
    assert bytes_[0] == bytes_[1]


def test_a_data_set_is_trained_on_and_evaluation_keeps_apart_from_it(training, real_text, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    texts = [real_text[start : start + 9_000] for start in (300_000, 320_000, 340_000)]
    Path("set").mkdir()
    Path("set/train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    training(dataset="./set", dataset_texts=2)
    config = ConfigManager()
    assert [d.text for d in training_texts(config, [])] == texts[:2]
    assert [d.name for d in training_texts(config, ["texts"])] == ["one.txt", "two.txt"], "what is named counts"
    parts = [text for document in held_out(config) for text in texts if document.text in text]
    assert 1 <= len(parts) <= 2
    trained = split_documents(training_texts(config, []), "training")
    assert all(document.text != part.text for document in trained for part in held_out(config))


@pytest.mark.slow
def test_another_text_and_other_settings_are_other_runs(senri, training, one_line):
    assert senri("train", "-o", "run", "--data", "texts/one.txt").code == 0
    one_line(senri("train", "-o", "run"), r"run holds a training with other settings \(data_digests\): name another")
    training(learning_rate=1e-3)
    result = senri("train", "-o", "run", "--data", "texts/one.txt")
    one_line(result, r"other settings \(settings.learning_rate\)")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"data": ["nowhere"]}, "nowhere: no such file"),
        ({"dataset": "./nowhere"}, "the data set ./nowhere cannot be loaded"),
        ({"gate_learning_rate": 1e-3}, "less than 2.0: it would stay where it starts; set gate_learning_rate to"),
        ({"init_adapter": "none.safetensors"}, "none.safetensors: no such adapter file"),
        ({"max_length": 80}, "80 tokens do not hold a fact beyond the window of 64"),
        ({"niah_ratio": 0.0, "recall_ratios": {**TRAINING["recall_ratios"], "babi": 0.5}, "babi_folder": "x"}, "babi"),
    ],
    ids=["data", "dataset", "gates", "adapter", "length", "babi"],
)
def test_bad_input_is_one_line(senri, training, one_line, changes, line):
    training(**changes)
    result = senri("train", "-o", "run")
    one_line(result, line)


def test_a_folder_that_is_something_else(senri, training, one_line):
    one_line(senri("train", "-o", "texts"), "texts exists and is no training")


@pytest.mark.slow
def test_full_weights_and_a_saved_senri_model(senri, training, senri_folder):
    training(trainable="all", distillation_weight=0.5)
    result = senri("train", "-o", "run")
    assert result.code == 0, result
    assert "name it as base_model_name" in result.out
    assert json.loads(Path("run/model/training.json").read_text())["data_digests"]
    training(base="run/model", model={"senri": {}})
    assert senri("read", "texts/one.txt", "-o", "one.senri").code == 0
    assert "calibrated" not in senri("train", "-o", "more").out


@pytest.mark.slow
def test_lora_cannot_be_trained_further(senri, training, one_line):
    training(trainable="memory+lora")
    assert senri("train", "-o", "run").code == 0
    training(model={"adapter": "run/adapter.safetensors"})
    assert senri("read", "texts/one.txt", "-o", "one.senri").code == 0
    for method in ("bptt", "unigram"):
        training(init_adapter="run/adapter.safetensors", method=method)
        one_line(senri("train", "-o", "more"), "has LoRA weights, which cannot be trained further")


def test_an_adapter_that_starts_from_another_names_its_texts_too(monkeypatch):
    """And a text counts as trained on whole if either training saw it whole."""

    def document(digest, part_of=None):
        return SimpleNamespace(name=f"{digest}.txt", digest=digest, part_of=part_of)

    earlier = {"data": ["a.txt", "b.txt"], "data_digests": ["a", "b"], "data_parts": ["b"], "seed": 3}
    monkeypatch.setattr("senri.hf.adapter.read_adapter_header", lambda path: {"notes": earlier})
    config = SimpleNamespace(
        base_model_name="tiny", training=SimpleNamespace(model_dump=lambda mode: {"method": "bptt"})
    )
    documents = [document("a", part_of="a"), document("b", part_of="b"), document("c", part_of="c"), document("d")]
    notes = notes_of(config, documents, Path("adapter.safetensors"))
    assert notes["data"] == ["a.txt", "b.txt", "c.txt", "d.txt"]
    assert notes["data_digests"] == ["a", "b", "c", "d"]
    assert notes["data_parts"] == ["b", "c"], "of a the earlier training saw all"
    assert notes["before"] == earlier
    alone = notes_of(config, documents, None)
    assert "before" not in alone
    assert alone["data_parts"] == ["a", "b", "c"]


def test_evaluation_refuses_the_texts_of_the_adapter(senri, training, one_line, real_text):
    assert senri("train", "-o", "run").code == 0
    trained = read_adapter_header("run/adapter.safetensors")["notes"]["data"]
    assert len(trained) in (1, 2)
    Path("other.txt").write_text(real_text[500_000:560_000], encoding="utf-8")

    def evaluation(data):
        training(model={"adapter": "run/adapter.safetensors"}, data=["other.txt"])
        values = yaml.safe_load((CONFIG / "experiment.yaml").read_text())
        values["evaluation"] |= {"data": data, "suites": ["capacity"], "full_attention": False}
        values["evaluation"]["capacity"] = {"pairs": [4], "questions": 4, "samples": 1}
        Path("config/experiment.yaml").write_text(yaml.safe_dump(values))
        return senri("eval", "-o", "evaluated")

    name = trained[0].partition(" (")[0]
    one_line(evaluation([f"texts/{name}"]), rf"{name} was trained on \(the adapter adapter.safetensors\)")
    Path("third.txt").write_text(real_text[900_000:960_000], encoding="utf-8")
    assert evaluation(["third.txt"]).code == 0


def test_the_part_kept_back_of_the_trained_text_may_be_evaluated(senri, training):
    from senri.cli.eval import held_out
    from senri.config import ConfigManager

    training(data=["texts/one.txt"])
    assert senri("train", "-o", "run").code == 0
    training(data=["texts/one.txt"], model={"adapter": "run/adapter.safetensors"})
    assert [d.name for d in held_out(ConfigManager())] == ["one.txt (last part)"]


# method features -------------------------------------------------------------------------------------------------

FEATURES = {
    "streams": 3,
    "pages": 2,
    "page_size": 160,
    "questions": 1,
    "learns": "all",
    "gate_steps": 20,
    "write_rate": 0.01,
    "steps": 4,
    "texts": 2,
    "fact_pages": 2,
    "plain_pages": 1,
    "learning_rate": 1e-3,
    "gate_learning_rate": 5e-3,
    "weight_decay": 0.01,
    "save_steps": 2,
}
GATED = {**MEMORY, "memory_readout": "head", "write_gate": "hidden", "memory_conv_size": 4}


def test_a_training_on_features_and_its_adapter_read_with(senri, training):
    training(model={"senri": GATED}, method="features", features=FEATURES, chat_ratio=0.3)
    result = senri("train", "-o", "run")
    assert (result.code, result.err) == (0, ""), result
    for word in ("the run goes to run", "1 of 1 parts read, 960 tokens and", "write gate: step 20", "reading: step 24"):
        assert word in result.out, word
    assert "saved run/adapter.safetensors: name it as adapter in config" in result.out
    assert {"run.json", "log.jsonl", "features-1.pt", "write_gates.pt", "reading.pt"} <= {
        p.name for p in Path("run").iterdir()
    }
    stages = [(entry["stage"], entry["step"]) for entry in log_of("run")]
    assert stages == [("write gate", 20), ("probe", 20 + 2), ("reading", 20 + 4), ("probe", 20 + 4)]
    assert re.search(
        r"held-out pages: step 22   right \d+%.*; left alone: untold .*; written \d+% of values, ", result.out
    )
    notes = read_adapter_header("run/adapter.safetensors")["notes"]
    assert set(notes["data_digests"]) <= {d.digest for d in load_documents(["texts"])}
    assert notes["data_digests"]
    assert (notes["seed"], notes["command"], notes["settings"]) == (0, "senri train -o run", FEATURES)
    first = Path("run/adapter.safetensors").read_bytes()
    again = senri("train", "-o", "run")
    assert again.code == 0, again
    assert "features of 960 tokens and" in again.out
    assert "reading pages" not in again.out
    assert Path("run/adapter.safetensors").read_bytes() == first
    assert sorted((entry["stage"], entry["step"]) for entry in log_of("run")) == sorted(stages), "each once"
    training(model={"senri": GATED, "adapter": "run/adapter.safetensors"})
    read = senri("read", "texts/one.txt", "-o", "one.senri")
    assert read.code == 0, read


@pytest.mark.slow
def test_a_training_on_features_goes_on(senri, training, monkeypatch):
    from senri.training.fit import Reading

    training(model={"senri": GATED}, method="features", features=FEATURES)
    assert senri("train", "-o", "straight").code == 0
    whole = Reading.losses

    def interrupted(self, texts):
        interrupted.calls += 1
        if interrupted.calls == 4:
            raise KeyboardInterrupt
        return whole(self, texts)

    interrupted.calls = 0
    monkeypatch.setattr(Reading, "losses", interrupted)
    result = senri("train", "-o", "my run")
    assert result.code == 130
    assert "interrupted; what was saved stands in my run, go on with: senri train -o 'my run'" in result.err
    assert not Path("my run/adapter.safetensors").exists()
    assert senri("train", "-o", "my run").code == 0
    assert interrupted.calls == 4 + 2, "after the two steps that were saved"
    logs = [[{**entry, "seconds": None} for entry in log_of(folder)] for folder in ("straight", "my run")]
    assert logs[0] == logs[1]
    one, two = (load_file(Path(folder, "adapter.safetensors")) for folder in ("straight", "my run"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("senri_fields", "changes", "line"),
    [
        (GATED, {"trainable": "memory+lora"}, r"trains the memory alone, not memory\+lora: set method to bptt"),
        ({**GATED, "memory_readout": "layer"}, {}, "needs a memory with memory_readout head and write_gate hidden or"),
        ({**GATED, "write_gate": "none"}, {}, "needs a memory with memory_readout head and write_gate hidden or"),
        (
            GATED,
            {"features": {**FEATURES, "pages": 1, "page_size": 68}},
            r"no 68 tokens of plain text in a row: raise streams",
        ),
        (GATED, {"features": {**FEATURES, "pages": 2000}}, r"the haystack has [\d,]+ tokens and a sample needs"),
    ],
    ids=["trainable", "readout", "gate", "short", "text"],
)
def test_what_features_cannot_train_is_one_line(senri, training, one_line, senri_fields, changes, line):
    training(model={"senri": senri_fields}, **{"method": "features", "features": FEATURES, **changes})
    one_line(senri("train", "-o", "run"), line)
    assert not Path("run/adapter.safetensors").exists()


def test_features_run_in_one_process(senri, training, one_line, monkeypatch):
    monkeypatch.setattr("senri.training.trainer.processes", lambda: SimpleNamespace(num_processes=2))
    training(model={"senri": GATED}, method="features", features=FEATURES)
    one_line(senri("train", "-o", "run"), "method features runs in one process")
    assert not Path("run").exists()


@pytest.mark.slow
def test_the_script_in_two_processes(training, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    launch = ["torch.distributed.run", "--nproc_per_node", "2", str(ROOT / "scripts" / "train.py"), "-o", "run"]
    done = subprocess.run([sys.executable, "-m", *launch], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("parameters learn") == 1, done.stdout
    assert (tmp_path / "run" / "adapter.safetensors").is_file()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 2
