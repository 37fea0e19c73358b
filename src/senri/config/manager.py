"""ConfigManager: the one way from a folder of YAML files to validated objects."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from pydantic import ValidationError

from senri.config.messages import describe_errors
from senri.config.schema import (
    ExperimentConfig,
    LaggedCacheConfig,
    LMModelConfig,
    ModelConfig,
    Section,
    TrainingConfig,
    TransformerLMConfig,
)

if TYPE_CHECKING:
    from senri.hf.configuration_senri import SenriConfig

MODEL, TRAINING, EXPERIMENT = "model.yaml", "training.yaml", "experiment.yaml"
_SectionT = TypeVar("_SectionT", bound=Section)


class ConfigError(ValueError):
    """Everything that is wrong with a configuration folder; `errors` has one line for each finding."""

    def __init__(self, folder: Path, errors: list[str]) -> None:
        self.folder, self.errors = folder, tuple(errors)
        super().__init__("\n".join([f"the configuration in {folder} is not valid:", *errors]))


class ConfigManager:
    """The configuration of a run.

    Args:
        path: folder with model.yaml, training.yaml and experiment.yaml. Without it: `./config` when
            that holds a model.yaml, else the defaults that come with the package.

    Raises:
        ConfigError: a file is missing or unreadable, or keys or values are not allowed. All errors
            of all three files are reported at once.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.folder = _default_folder() if path is None else Path(path)
        if not self.folder.is_dir():
            raise ConfigError(self.folder, [f"{self.folder}: is not a folder"])
        errors: list[str] = []
        model = _load(self.folder / MODEL, ModelConfig, errors)
        training = _load(self.folder / TRAINING, TrainingConfig, errors)
        experiment = _load(self.folder / EXPERIMENT, ExperimentConfig, errors)
        errors += _contradictions(model, training, experiment)
        if errors or model is None or training is None or experiment is None:
            raise ConfigError(self.folder, errors)
        self.model, self.training, self.experiment = model, training, experiment

    @property
    def base_model_name(self) -> str:
        """The pip-shipped model's name, a directory, a hub name or a .gguf file."""
        return self.model.base_model_name

    @property
    def batch_size(self) -> int:
        """Samples a training step and process."""
        return self.training.batch_size

    def to_training_config(self) -> TrainingConfig:
        """What training.yaml holds."""
        return self.training

    def senri_overrides(self) -> dict[str, Any]:
        """The fields of SenriConfig that model.yaml sets, and only those."""
        return dict(self.model.senri)

    def to_senri_config(self) -> "SenriConfig":
        """The SenriConfig of the configured base model with model.yaml's values on top.

        Raises:
            ConfigError: the base model cannot be found, SenriConfig finds the combination impossible, or training
                samples would fit the window.
        """
        from huggingface_hub.errors import StrictDataclassError

        from senri.hf.base import load_base_config
        from senri.hf.convert import senri_config

        try:
            config = senri_config(load_base_config(self.base_model_name), **self.senri_overrides())
        except (ValueError, StrictDataclassError) as error:
            raise ConfigError(self.folder, [f"{MODEL}: {error}"]) from error
        # Again, for model.yaml may leave the window to SenriConfig.
        if errors := _fits_window(self.training, config.sliding_window_size):
            raise ConfigError(self.folder, errors)
        return config


def _default_folder() -> Path:
    local = Path("config")
    if (local / MODEL).is_file():
        return local
    here = Path(__file__).resolve().parent
    packaged = here / "defaults"  # in a wheel
    # Of an editable install, src/senri/config stands in the checkout.
    return packaged if packaged.is_dir() else here.parents[2] / "config"


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice (YAML readers silently take the last) and leaves keys
    as they stand in the file (`on` and `3` are not booleans and numbers there)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
            if key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


def _load(path: Path, section: type[_SectionT], errors: list[str]) -> _SectionT | None:
    """The file's validated content, or None with the reasons appended to `errors`."""
    try:
        values = yaml.load(path.read_bytes(), _Loader)
    except FileNotFoundError:
        errors.append(f"{path.name}: the file is missing")
        return None
    except OSError as error:
        errors.append(f"{path.name}: cannot be read: {error.strerror}")
        return None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        errors.append(f"{path.name}: {_syntax_error(error)}")
        return None
    keys = ", ".join(section.model_fields)
    if values is None:
        errors.append(f"{path.name}: the file is empty; it needs the keys {keys}")
        return None
    if not isinstance(values, dict):
        errors.append(f"{path.name}: holds a {type(values).__name__}, not a mapping with the keys {keys}")
        return None
    try:
        return section.model_validate(values)
    except ValidationError as error:
        errors += [f"{path.name}: {line}" for line in describe_errors(error, section)]
        return None


def _syntax_error(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"not valid YAML: {' '.join(str(error).split())}"
    return f"line {mark.line + 1}, column {mark.column + 1}: not valid YAML: {getattr(error, 'problem', error)}"


def _contradictions(
    model: ModelConfig | None, training: TrainingConfig | None, experiment: ExperimentConfig | None
) -> list[str]:
    """What no single value is to blame for; files that did not load are left out."""
    errors = []
    if training is not None and training.warmup_steps > training.max_steps:
        errors.append(
            f"{TRAINING}: warmup_steps: {training.warmup_steps} is more than max_steps ({training.max_steps})"
        )
    if training is not None:
        errors += _impossible_plans(training)
    if model is not None and training is not None and "sliding_window_size" in model.senri:
        errors += _fits_window(training, model.senri["sliding_window_size"])
    if experiment is not None:
        errors += _impossible_models(experiment.transformer_lm)
        errors += _impossible_lags(experiment.lagged_cache)
    return errors


def _impossible_plans(training: TrainingConfig) -> list[str]:
    errors = []
    taken = sum(stage.steps for stage in training.curriculum)
    if taken >= training.max_steps:
        errors.append(f"{TRAINING}: curriculum: takes {taken} steps, and max_steps ({training.max_steps}) must be more")
    asked = training.niah_ratio + sum(training.recall_ratios.model_dump().values())
    if asked > 1 + 1e-9:
        errors.append(f"{TRAINING}: niah_ratio and recall_ratios: add up to {asked:.3g}, more than 1")
    if training.recall_ratios.babi and training.babi_folder is None:
        errors.append(f"{TRAINING}: recall_ratios.babi: needs the folder of bAbI's files in babi_folder, or must be 0")
    return errors


def _impossible_models(lm: TransformerLMConfig) -> list[str]:
    """What TransformerLM or its evaluation would refuse after the texts were read."""
    width, part = lm.model.hidden_size, lm.memory.memory_head_dim
    place, errors = f"{EXPERIMENT}: transformer_lm", _impossible_shapes(lm.model, "transformer_lm")
    if part is not None and width % part:
        errors.append(f"{place}.memory.memory_head_dim: {part} does not divide hidden_size ({width})")
    window = lm.training.segment_length
    if lm.evaluation.stride > window:
        errors.append(f"{place}.evaluation.stride: {lm.evaluation.stride} is more than segment_length ({window})")
    if lm.evaluation.length <= lm.training.segments * window:
        errors.append(
            f"{place}.evaluation.length: {lm.evaluation.length} must be more than a sample of training "
            f"({lm.training.segments * window}), or nothing long is read"
        )
    return errors


def _impossible_lags(lct: LaggedCacheConfig) -> list[str]:
    """What scripts/lagged_cache.py would refuse after the texts were read."""
    errors, segment = _impossible_shapes(lct.model, "lagged_cache"), lct.training.segment_length
    errors += [
        f"{EXPERIMENT}: lagged_cache.speed.lengths: {length} is above segment_length ({segment}) and no multiple of it"
        for length in lct.speed.lengths
        if length > segment and length % segment
    ]
    return errors


def _impossible_shapes(model: LMModelConfig, section: str) -> list[str]:
    """What the layers of TransformerLM would refuse."""
    width, heads = model.hidden_size, model.num_heads
    place, errors = f"{EXPERIMENT}: {section}", []
    if width % heads:
        errors.append(f"{place}.model.num_heads: {heads} does not divide hidden_size ({width})")
    elif int(width // heads * model.rotary_pct) % 2:
        errors.append(f"{place}.model.rotary_pct: {model.rotary_pct} of heads of width {width // heads} is odd")
    return errors


def _fits_window(training: TrainingConfig, window: int) -> list[str]:
    stages = {f"curriculum[{i}].max_length": stage.max_length for i, stage in enumerate(training.curriculum)}
    return [
        f"{TRAINING}: {key}: {length} must be more than senri.sliding_window_size of {MODEL} ({window}), or the "
        "memory is never needed"
        for key, length in {**stages, "max_length": training.max_length}.items()
        if length <= window
    ]
