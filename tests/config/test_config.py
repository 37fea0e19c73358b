"""The configuration files: what ships parses, and every slip is named with its mend."""

import shutil
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from senri.config import ConfigError, ConfigManager, ExperimentConfig, ModelConfig, TrainingConfig, manager

SHIPPED = Path(__file__).parents[2] / "config"
SECTIONS = {"model.yaml": ModelConfig, "training.yaml": TrainingConfig, "experiment.yaml": ExperimentConfig}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the shipped configuration, to be spoilt."""
    return Path(shutil.copytree(SHIPPED, tmp_path / "config"))


def change(folder: Path, file: str, key: str, value: object) -> None:
    """Sets the dotted `key` of a file."""
    content = yaml.safe_load((folder / file).read_text())
    *parents, last = key.split(".") if isinstance(key, str) else [key]
    mapping = content
    for parent in parents:
        mapping = mapping[parent]
    mapping[last] = value
    (folder / file).write_text(yaml.safe_dump(content))


def errors_of(folder: Path) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        ConfigManager(folder)
    return caught.value.errors


def test_every_shipped_file_has_a_section_and_parses() -> None:
    assert {path.name for path in SHIPPED.iterdir()} == set(SECTIONS)
    for name, section in SECTIONS.items():
        content = yaml.safe_load((SHIPPED / name).read_text())
        section.model_validate(content)
        assert set(content) == set(section.model_fields), f"{name} shows every key"
    shown = yaml.safe_load((SHIPPED / "model.yaml").read_text())["senri"]
    assert set(shown) == set(ModelConfig.model_fields["senri"].annotation.__annotations__)


def test_every_shipped_key_has_a_comment() -> None:
    for path in SHIPPED.glob("*.yaml"):
        for line in path.read_text().splitlines():
            is_section = line.endswith(":")
            assert not line or is_section or "#" in line, f"{path.name}: {line!r}"


def test_values_of_the_shipped_files() -> None:
    config = ConfigManager(SHIPPED)
    assert config.base_model_name == config.model.base_model_name == "smollm2-135m-instruct"
    assert config.batch_size == config.training.batch_size
    assert config.to_training_config() is config.training
    assert config.training.learning_rate == 3e-4
    assert config.training.bptt_pieces is None
    assert config.experiment.generation.max_new_tokens == 64
    assert config.senri_overrides()["update_rule"] == "slot"


@pytest.mark.parametrize("value", ["on", "off", "auto"])
def test_on_and_off_are_no_booleans(folder: Path, value: str) -> None:
    """As YAML reads them."""
    text = (folder / "model.yaml").read_text()
    assert "routing: auto" in text
    (folder / "model.yaml").write_text(text.replace("routing: auto", f"routing: {value}"))
    assert ConfigManager(folder).senri_overrides()["routing"] == value


def test_what_no_recall_takes_is_plain_text() -> None:
    from senri.data.mix import PARTS

    ratios = ConfigManager(SHIPPED).training.part_ratios
    assert tuple(ratios) == PARTS
    assert sum(ratios.values()) == pytest.approx(1)
    assert ratios["needle"] == ConfigManager(SHIPPED).training.niah_ratio


def test_to_senri_config_carries_the_overrides() -> None:
    config = ConfigManager(SHIPPED)
    senri_config = config.to_senri_config()
    for name, value in config.senri_overrides().items():
        if value is not None:  # null leaves the choice to SenriConfig
            assert getattr(senri_config, name) == value


def test_overrides_hold_what_is_given_and_nothing_else(folder: Path) -> None:
    change(folder, "model.yaml", "senri", {"chunk_size": 32, "feature_map": None})
    config = ConfigManager(folder)
    assert config.senri_overrides() == {"chunk_size": 32, "feature_map": None}
    config.senri_overrides()["chunk_size"] = 1
    assert config.senri_overrides()["chunk_size"] == 32


def test_the_senri_mapping_may_be_left_out(folder: Path) -> None:
    (folder / "model.yaml").write_text("base_model_name: x\nadapter: none\ndtype: auto\n")
    assert ConfigManager(folder).senri_overrides() == {}


def test_loaded_values_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ConfigManager(SHIPPED).training.batch_size = 3  # type: ignore[misc]


# A row: the key to change, its bad value, and the line that must name it; its file stands in the line.
BAD_VALUES = [
    (
        "senri.update_rule",
        "linaer",
        "model.yaml: senri.update_rule: 'linaer' is not one of: linear, delta, delta_token, gated_delta, slot",
    ),
    (
        "senri.feature_map",
        "elu",
        "model.yaml: senri.feature_map: 'elu' is not one of: elu_plus_one, relu, identity, dpfp, hedgehog, null",
    ),
    (
        "senri.store",
        "many",
        "model.yaml: senri.store: 'many' is not one of: single, routed, banks, multi, hierarchical",
    ),
    ("senri.routing", "sometimes", "model.yaml: senri.routing: 'sometimes' is not one of: auto, on, off"),
    ("senri.top_k_memories", 0, "model.yaml: senri.top_k_memories: 0 is not an integer > 0"),
    ("senri.memory_sharing", 1, "model.yaml: senri.memory_sharing: 1 is not true or false"),
    ("senri.alibi_scale", 0, "model.yaml: senri.alibi_scale: 0 is not a finite number > 0"),
    ("dtype", None, "model.yaml: dtype: null is not one of: auto, float32, bfloat16"),
    ("base_model_name", "", "model.yaml: base_model_name: '' is not a non-empty string"),
    ("base_model_name", 7, "model.yaml: base_model_name: 7 is not a non-empty string"),
    ("senri.chunk_size", 0, "model.yaml: senri.chunk_size: 0 is not an integer > 0"),
    ("senri.chunk_size", None, "model.yaml: senri.chunk_size: null is not an integer > 0"),
    ("batch_size", True, "training.yaml: batch_size: true is not an integer > 0"),
    ("batch_size", 2.0, "training.yaml: batch_size: 2.0 is not an integer > 0"),
    ("batch_size", "4", "training.yaml: batch_size: '4' is not an integer > 0"),
    ("bptt_pieces", 0, "training.yaml: bptt_pieces: 0 is not an integer > 0 or null"),
    ("seed", -1, "training.yaml: seed: -1 is not an integer >= 0 and < 4294967296"),
    (
        "curriculum",
        [{"max_length": 2000}],
        "training.yaml: curriculum[0].steps: missing key; it takes an integer > 0",
    ),
    ("curriculum", 5, "training.yaml: curriculum: 5 is not a list of mappings with the keys max_length, steps"),
    (
        "curriculum",
        [{"max_length": 2000, "steps": 400}, {"max_length": 2100, "steps": 600}],
        "training.yaml: curriculum: takes 1000 steps, and max_steps (1000) must be more",
    ),
    (
        "curriculum",
        [{"max_length": 1024, "steps": 4}],
        "training.yaml: curriculum[0].max_length: 1024 must be more than senri.sliding_window_size of model.yaml "
        "(1024), or the memory is never needed",
    ),
    (
        "recall_ratios.repeat",
        0.9,
        "training.yaml: niah_ratio and recall_ratios: add up to 1.4, more than 1",
    ),
    (
        "recall_ratios.babi",
        0.1,
        "training.yaml: recall_ratios.babi: needs the folder of bAbI's files in babi_folder, or must be 0",
    ),
    ("niah_ratio", 1.5, "training.yaml: niah_ratio: 1.5 is not a finite number >= 0 and <= 1"),
    ("learning_rate", float("nan"), "training.yaml: learning_rate: nan is not a finite number > 0"),
    ("learning_rate", float("inf"), "training.yaml: learning_rate: inf is not a finite number > 0"),
    ("learning_rate", "inf", "training.yaml: learning_rate: 'inf' is not a finite number > 0"),
    ("learning_rate", True, "training.yaml: learning_rate: true is not a finite number > 0"),
    ("learning_rate", "fast", "training.yaml: learning_rate: 'fast' is not a finite number > 0"),
    ("data", "books", "training.yaml: data: 'books' is not a list of non-empty strings"),
    ("data", ["books", 3], "training.yaml: data[1]: 3 is not a non-empty string"),
    ("warmup_steps", 1001, "training.yaml: warmup_steps: 1001 is more than max_steps (1000)"),
    ("generation.top_p", 0, "experiment.yaml: generation.top_p: 0 is not a finite number > 0 and <= 1"),
    ("demo", 5, "experiment.yaml: demo: 5 is not a mapping with the keys num_tokens"),
    ("reading", {}, "experiment.yaml: reading.piece_size: missing key; it takes an integer > 0"),
    (
        "reading.pace_size",
        1,
        "experiment.yaml: reading.pace_size: unknown key; did you mean 'piece_size'? allowed: piece_size",
    ),
    ("demo.zzz", 1, "experiment.yaml: demo.zzz: unknown key; allowed: num_tokens"),
]


@pytest.mark.parametrize(("key", "value", "line"), BAD_VALUES)
def test_bad_values_are_named_with_what_is_allowed(folder: Path, key: str, value: object, line: str) -> None:
    change(folder, line.partition(":")[0], key, value)
    assert errors_of(folder) == (line,)


@pytest.mark.parametrize("value", [5, None, ["chunk_size"]])
def test_senri_must_be_a_mapping(folder: Path, value: object) -> None:
    change(folder, "model.yaml", "senri", value)
    (line,) = errors_of(folder)
    assert "is not a mapping with the keys sliding_window_size, num_sink_tokens, chunk_size, " in line


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("model.yaml", "senri.feature_map", "dpfp"),
        ("model.yaml", "senri.update_rule", "gated_delta"),
        ("model.yaml", "base_model_name", "some/folder"),
        ("training.yaml", "bptt_pieces", 2),
        ("training.yaml", "niah_ratio", 0),
        ("training.yaml", "niah_ratio", 0.5),
        ("training.yaml", "data", ["books", "more/text.jsonl"]),
        ("training.yaml", "trainable", "memory+lora"),
        ("training.yaml", "weight_decay", 0),
        ("experiment.yaml", "generation.top_p", 0.9),
    ],
)
def test_good_values_load(folder: Path, file: str, key: str, value: object) -> None:
    change(folder, file, key, value)
    loaded = getattr(ConfigManager(folder), file.removesuffix(".yaml"))
    for name in key.split("."):
        loaded = loaded[name] if isinstance(loaded, dict) else getattr(loaded, name)
    assert (list(loaded) if isinstance(loaded, tuple) else loaded) == value


def test_numbers_with_an_exponent_are_numbers(folder: Path) -> None:
    path = folder / "training.yaml"
    path.write_text(path.read_text().replace("learning_rate: 3e-4", "learning_rate: 5e-5"))
    assert ConfigManager(folder).training.learning_rate == 5e-5


def test_an_unknown_key_gets_the_nearest_known_one(folder: Path) -> None:
    change(folder, "training.yaml", "learning_rat", 1)
    (line,) = errors_of(folder)
    assert line.startswith("training.yaml: learning_rat: unknown key; did you mean 'learning_rate'? allowed: ")
    assert line.endswith(", ".join(TrainingConfig.model_fields))
    change(folder, "training.yaml", "learning_rat", 1)
    change(folder, "model.yaml", "senri.chunk_siz", 1)
    line, _ = errors_of(folder)
    assert line.startswith("model.yaml: senri.chunk_siz: unknown key; did you mean 'chunk_size'? allowed: sliding_")


def test_a_key_that_is_no_string_is_unknown(folder: Path) -> None:
    change(folder, "experiment.yaml", "demo", {"num_tokens": 1, 3: 1})
    change(folder, "training.yaml", True, 1)
    change(folder, "model.yaml", "senri", {2: 1})
    assert [line.partition("; ")[0] for line in errors_of(folder)] == [
        "model.yaml: senri.2: unknown key",
        "training.yaml: true: unknown key",
        "experiment.yaml: demo.3: unknown key",
    ]


def test_errors_of_all_files_come_at_once(folder: Path) -> None:
    change(folder, "model.yaml", "dtype", "half")
    change(folder, "model.yaml", "senri.chunk_size", -1)
    change(folder, "training.yaml", "batch_size", 0)
    (folder / "experiment.yaml").unlink()
    with pytest.raises(ConfigError) as caught:
        ConfigManager(folder)
    lines = (
        "model.yaml: dtype: 'half' is not one of: auto, float32, bfloat16",
        "model.yaml: senri.chunk_size: -1 is not an integer > 0",
        "training.yaml: batch_size: 0 is not an integer > 0",
        "experiment.yaml: the file is missing",
    )
    assert caught.value.errors == lines
    assert str(caught.value).splitlines() == [f"the configuration in {folder} is not valid:", *lines]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "the file is empty; it needs the keys base_model_name, adapter, dtype, senri"),
        ("# only a comment\n", "the file is empty; it needs the keys base_model_name, adapter, dtype, senri"),
        ("- a\n", "holds a list, not a mapping with the keys base_model_name, adapter, dtype, senri"),
        ("dtype: auto\ndtype: float32\n", "line 2, column 1: not valid YAML: the key 'dtype' is given twice"),
        ("dtype: auto\nbase_model_name: [a\n", "line 3, column 1: not valid YAML: expected ',' or ']'"),
        ("dtype: auto\n\tbase_model_name: a\n", "line 2, column 1: not valid YAML: found character '\\t'"),
        ("dtype: 2020-13-45\n", "not valid YAML: month must be in 1..12"),
        ("? [a]\n: b\n", "line 1, column 3: not valid YAML: found unhashable key"),
        ("dtype: \x00\n", "not valid YAML: unacceptable character"),
    ],
)
def test_a_file_that_is_no_mapping(folder: Path, text: str, line: str) -> None:
    (folder / "model.yaml").write_text(text)
    (found,) = errors_of(folder)
    assert found.startswith(f"model.yaml: {line}")


def test_a_file_that_cannot_be_read(folder: Path) -> None:
    (folder / "model.yaml").unlink()
    (folder / "model.yaml").mkdir()
    (found,) = errors_of(folder)
    assert found.startswith("model.yaml: cannot be read: ")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert errors_of(tmp_path / "nowhere") == (f"{tmp_path / 'nowhere'}: is not a folder",)


def test_training_samples_must_be_longer_than_the_window(folder: Path) -> None:
    change(folder, "training.yaml", "max_length", 1024)
    assert errors_of(folder) == (
        "training.yaml: max_length: 1024 must be more than senri.sliding_window_size of model.yaml (1024), "
        "or the memory is never needed",
    )
    change(folder, "training.yaml", "max_length", 1025)
    ConfigManager(folder)


def test_samples_are_held_against_the_default_window_too(folder: Path) -> None:
    change(folder, "model.yaml", "senri", {})
    change(folder, "training.yaml", "max_length", 2)
    config = ConfigManager(folder)
    with pytest.raises(ConfigError, match="max_length: 2 must be more than"):
        config.to_senri_config()


def test_without_a_path_the_working_directory_comes_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(folder, "training.yaml", "batch_size", 77)
    monkeypatch.chdir(folder.parent)
    assert ConfigManager().batch_size == 77


def test_without_any_folder_the_defaults_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config").mkdir()  # somebody else's: it holds no model.yaml
    monkeypatch.chdir(tmp_path)
    assert ConfigManager().folder == SHIPPED.resolve()


def test_without_a_checkout_the_defaults_of_the_wheel(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site-packages" / "senri" / "config"
    shutil.copytree(folder, package / "defaults")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(manager, "__file__", str(package / "manager.py"))
    assert ConfigManager().folder == package / "defaults"


# models from scratch ----------------------------------------------------------------------------------------


def test_the_options_of_each_model_are_those_that_it_has() -> None:
    from senri.lm import MODELS, model_options

    lm = ConfigManager(SHIPPED).experiment.transformer_lm
    for name in MODELS:
        assert set(lm.options(name)) <= set(model_options(name))
        rest = {"vocab_size", "rope_theta", "layer_norm_eps", "feedback_scale"}  # elsewhere, and as Pythia has them
        assert set(model_options(name)) - set(lm.options(name)) <= rest


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.num_heads", 3, "transformer_lm.model.num_heads: 3 does not divide hidden_size (256)"),
        ("model.rotary_pct", 0.4, "transformer_lm.model.rotary_pct: 0.4 of heads of width 64 is odd"),
        ("memory.memory_head_dim", 100, "transformer_lm.memory.memory_head_dim: 100 does not divide hidden_size (256)"),
        ("evaluation.stride", 300, "transformer_lm.evaluation.stride: 300 is more than segment_length (256)"),
        ("evaluation.length", 1024, "transformer_lm.evaluation.length: 1024 must be more than a sample of training"),
        ("training.epochs", 0, "transformer_lm.training.epochs: 0 is not an integer > 0"),
        ("infini.banks", 2, "transformer_lm.infini.banks: unknown key"),
        ("seeds", [], "transformer_lm.seeds: [] is not a non-empty list of integers"),
    ],
)
def test_impossible_models_are_named(folder: Path, key: str, value: object, message: str) -> None:
    change(folder, "experiment.yaml", f"transformer_lm.{key}", value)
    (error,) = errors_of(folder)
    assert error.startswith(f"experiment.yaml: {message}")
