"""What the three configuration files may hold: names, types and ranges of their keys.

Values live in `config/*.yaml`, so nothing has a default here; what each key means stands there too.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, with_config
from typing_extensions import TypedDict  # pydantic asks for this one below Python 3.12

Dtype = Literal["auto", "float32", "bfloat16"]
UpdateRule = Literal["linear", "delta", "delta_token", "gated_delta", "slot"]
FeatureMap = Literal["elu_plus_one", "relu", "identity", "dpfp", "hedgehog"]
MemoryReadout = Literal["layer", "head"]
MemoryGate = Literal["additive", "infini"]
Store = Literal["single", "routed", "banks", "multi", "hierarchical"]
RoutingBasis = Literal["identity", "hadamard", "random"]
WriteGate = Literal["none", "hidden", "surprise"]
DecodingWeights = Literal["auto", "full", "int8"]
Trainable = Literal["memory", "memory+lora", "all"]
SuiteName = Literal["niah", "recall_by_writes", "perplexity", "capacity", "reversal", "ruler", "babilong"]
NiahTask = Literal[
    "single", "single_free", "passkey", "multikey", "multivalue", "multiquery", "overwritten", "shared", "together",
    "together_chat", "together_reworded", "wording_city", "wording_food", "wording_job", "wording_number",
    "wording_words",
]  # fmt: skip
RulerTask = Literal[
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe",
]  # fmt: skip
Measurement = Literal[
    "reading", "batch", "decoding", "memory", "training", "features", "conversion", "load", "peers",
]  # fmt: skip
Peer = Literal[
    "full_attention", "streaming_window", "llama_cpp", "infini_transformer_pytorch", "titans_pytorch",
]  # fmt: skip
LMKind = Literal["pythia", "infini", "multi_memory", "hierarchical"]
BabiTask = Literal["qa1", "qa2", "qa3", "qa4", "qa5", "qa6", "qa7", "qa8", "qa9", "qa10"]


def _no_bool(value: Any) -> Any:
    """Stops pydantic from reading `true` as 1.0."""
    if isinstance(value, bool):
        raise ValueError("a boolean is not a number")
    return value


def _on_off(value: Any) -> Any:
    """YAML reads `on` and `off` as booleans."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


Routing = Annotated[Literal["auto", "on", "off"], BeforeValidator(_on_off)]
# Strict: `batch_size: true` or `max_steps: 1.0` is a slip, not a number of things.
Count = Annotated[int, Strict(), Field(ge=0)]
Positive = Annotated[int, Strict(), Field(gt=0)]
Seed = Annotated[int, Strict(), Field(ge=0, lt=2**32)]
Counts = Annotated[tuple[Positive, ...], Field(min_length=1)]
Flag = Annotated[bool, Strict()]
Text = Annotated[str, Field(min_length=1)]
# Not strict: PyYAML hands over `3e-4` as a string. The bounds stand first, or the JSON schema that
# the error messages are made from loses them.
_NO_BOOL = BeforeValidator(_no_bool)
PositiveReal = Annotated[float, Field(gt=0, allow_inf_nan=False), _NO_BOOL]
NonNegativeReal = Annotated[float, Field(ge=0, allow_inf_nan=False), _NO_BOOL]
Ratio = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), _NO_BOOL]
NonZeroRatio = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), _NO_BOOL]


class Section(BaseModel):
    """A mapping in a file: no unknown keys, no changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# A TypedDict, for a key that is not given must stay out: SenriConfig's default holds for it.
@with_config(ConfigDict(extra="forbid"))
class SenriOverrides(TypedDict, total=False):
    """What model.yaml sets of SenriConfig."""

    sliding_window_size: Positive
    num_sink_tokens: Count
    chunk_size: Positive
    decoding_weights: DecodingWeights
    segment_size: Positive
    num_memory_layers: Count
    first_memory_layer: Count
    memory_layer_interval: Positive
    memory_num_heads: Positive
    memory_num_key_value_heads: Positive
    memory_head_dim: Positive
    memory_num_slots: Positive
    update_rule: UpdateRule
    feature_map: FeatureMap | None
    memory_readout: MemoryReadout
    memory_gate: MemoryGate
    memory_conv_size: Count
    memory_context_size: Count
    write_gate: WriteGate
    unigram_cache: Flag
    store: Store
    routing: Routing
    routing_basis: RoutingBasis
    top_k_memories: Positive
    num_memory_banks: Positive
    segments_per_bank: Positive
    num_memories: Positive
    memory_sharing: Flag
    use_alibi: Flag
    alibi_scale: PositiveReal


class ModelConfig(Section):
    """model.yaml."""

    base_model_name: Text
    adapter: Text
    dtype: Dtype
    senri: SenriOverrides = SenriOverrides()


class StageConfig(Section):
    """One of `curriculum` of training.yaml."""

    max_length: Positive
    steps: Positive


class RecallRatios(Section):
    """`recall_ratios` of training.yaml."""

    overwritten: Ratio
    chain: Ratio
    repeat: Ratio
    names: Ratio
    babi: Ratio


class FeaturesConfig(Section):
    """`features` of training.yaml."""

    streams: Positive
    pages: Positive
    page_size: Positive
    questions: Positive
    learns: Literal["all", "end"]
    gate_steps: Count
    write_rate: NonZeroRatio
    steps: Positive
    texts: Positive
    fact_pages: Positive
    plain_pages: Count
    learning_rate: PositiveReal
    gate_learning_rate: PositiveReal
    weight_decay: NonNegativeReal
    save_steps: Positive


class UnigramConfig(Section):
    """`unigram` of training.yaml."""

    texts: Positive
    length: Positive
    every: Positive
    background_tokens: Positive


class TrainingConfig(Section):
    """training.yaml."""

    method: Literal["features", "bptt", "unigram"]
    data: tuple[Text, ...]
    dataset: Text | None
    dataset_texts: Positive
    batch_size: Positive
    max_length: Positive
    curriculum: tuple[StageConfig, ...]
    niah_ratio: Ratio
    recall_ratios: RecallRatios
    chat_ratio: Ratio
    babi_folder: Text | None
    seed: Seed
    trainable: Trainable
    lora_rank: Positive
    init_adapter: Text
    piece_length: Positive
    bptt_pieces: Positive | None
    write_loss_weight: NonNegativeReal
    distillation_weight: NonNegativeReal
    learning_rate: PositiveReal
    gate_learning_rate: PositiveReal
    weight_decay: NonNegativeReal
    max_grad_norm: PositiveReal
    max_steps: Positive
    warmup_steps: Count
    gradient_accumulation_steps: Positive
    gradient_checkpointing: Flag
    bf16: Flag
    save_steps: Positive
    probe_steps: Positive
    features: FeaturesConfig
    unigram: UnigramConfig

    @property
    def part_ratios(self) -> dict[str, float]:
        """The share of each part of the training data; what is asked for nowhere is plain text."""
        parts = {"needle": self.niah_ratio, **self.recall_ratios.model_dump()}
        return {"book": max(1 - sum(parts.values()), 0.0), **parts}


class ReadingConfig(Section):
    """`reading` of experiment.yaml."""

    piece_size: Positive


class GenerationConfig(Section):
    """`generation` of experiment.yaml."""

    max_new_tokens: Positive
    do_sample: Flag
    temperature: PositiveReal
    top_p: NonZeroRatio


class CalibrationConfig(Section):
    """`calibration` of experiment.yaml."""

    num_tokens: Positive


class DemoConfig(Section):
    """`demo` of experiment.yaml."""

    num_tokens: Positive


class NiahConfig(Section):
    """`evaluation.niah` of experiment.yaml."""

    tasks: Annotated[tuple[NiahTask, ...], Field(min_length=1)]
    lengths: Counts
    depths: Annotated[tuple[Ratio, ...], Field(min_length=1)]
    samples: Positive
    shared_questions: Positive


class RulerConfig(Section):
    """`evaluation.ruler` of experiment.yaml."""

    tasks: Annotated[tuple[RulerTask, ...], Field(min_length=1)]
    lengths: Counts
    samples: Positive
    qa_file: Text | None


class BabilongConfig(Section):
    """`evaluation.babilong` of experiment.yaml."""

    folder: Text | None
    tasks: Annotated[tuple[BabiTask, ...], Field(min_length=1)]
    lengths: Counts
    samples: Positive


class RecallByWritesConfig(Section):
    """`evaluation.recall_by_writes` of experiment.yaml."""

    distances: Counts
    facts: Positive
    samples: Positive


class PerplexityConfig(Section):
    """`evaluation.perplexity` of experiment.yaml."""

    length: Annotated[int, Strict(), Field(ge=2)]
    samples: Positive


class CapacityConfig(Section):
    """`evaluation.capacity` of experiment.yaml."""

    pairs: Counts
    questions: Positive
    samples: Positive


class ReversalConfig(Section):
    """`evaluation.reversal` of experiment.yaml."""

    folder: Text | None
    facts: Positive


class EvaluationConfig(Section):
    """`evaluation` of experiment.yaml."""

    suites: Annotated[tuple[SuiteName, ...], Field(min_length=1)]
    data: tuple[Text, ...]
    full_attention: Flag
    niah: NiahConfig
    recall_by_writes: RecallByWritesConfig
    perplexity: PerplexityConfig
    capacity: CapacityConfig
    reversal: ReversalConfig
    ruler: RulerConfig
    babilong: BabilongConfig


class BenchmarkConfig(Section):
    """`benchmark` of experiment.yaml."""

    measurements: Annotated[tuple[Measurement, ...], Field(min_length=1)]
    lengths: Counts
    repeats: Positive
    batch_sizes: Counts
    batch_length: Positive
    decoding_after: Counts
    decoding_tokens: Positive
    training_length: Positive
    peers: tuple[Peer, ...]
    peer_lengths: Counts
    llama_cpp_python: Text | None


class LMModelConfig(Section):
    """`transformer_lm.model` of experiment.yaml: of all four models."""

    hidden_size: Positive
    num_layers: Positive
    num_heads: Positive
    intermediate_size: Positive
    rotary_pct: Ratio


class LMMemoryConfig(Section):
    """`transformer_lm.memory` of experiment.yaml: of the three models with a memory."""

    memory_head_dim: Positive | None
    use_delta_rule: Flag
    segment_size: Positive
    chunk_size: Positive


class LMInfiniConfig(Section):
    """`transformer_lm.infini` of experiment.yaml."""

    num_memory_banks: Positive
    segments_per_bank: Positive
    use_alibi: Flag
    alibi_scale: PositiveReal


class LMMemoriesConfig(Section):
    """`transformer_lm.multi_memory` and `hierarchical` of experiment.yaml."""

    num_memories: Positive


class LMTrainingConfig(Section):
    """`transformer_lm.training` of experiment.yaml."""

    samples: Positive
    epochs: Positive
    batch_size: Positive
    segment_length: Positive
    segments: Positive
    learning_rate: PositiveReal
    weight_decay: NonNegativeReal
    max_grad_norm: PositiveReal
    warmup_ratio: Ratio
    bf16: Flag
    save_steps: Positive


class LMEvaluationConfig(Section):
    """`transformer_lm.evaluation` of experiment.yaml."""

    length: Annotated[int, Strict(), Field(ge=2)]
    samples: Positive
    stride: Positive
    batch_size: Positive


class LMReversalConfig(Section):
    """`transformer_lm.reversal` of experiment.yaml."""

    folder: Text | None
    repeats: Positive


class TransformerLMConfig(Section):
    """`transformer_lm` of experiment.yaml."""

    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    data: tuple[Text, ...]
    dataset: Text | None
    dataset_texts: Positive
    held_out: tuple[Text, ...]
    tokenizer: Text
    vocab_size: Annotated[int, Strict(), Field(ge=512)]
    model: LMModelConfig
    memory: LMMemoryConfig
    infini: LMInfiniConfig
    multi_memory: LMMemoriesConfig
    hierarchical: LMMemoriesConfig
    training: LMTrainingConfig
    evaluation: LMEvaluationConfig
    reversal: LMReversalConfig

    def options(self, name: str) -> dict[str, Any]:
        """The options of `create_model(name)`, the vocabulary aside."""
        options = self.model.model_dump()
        if name != "pythia":
            options |= self.memory.model_dump() | getattr(self, name).model_dump()
        return options


class LCTUntilConfig(Section):
    """`lagged_cache.until` of experiment.yaml."""

    tolerance: PositiveReal
    passes: Positive


class LCTValidationConfig(Section):
    """`lagged_cache.validation` of experiment.yaml."""

    length: Annotated[int, Strict(), Field(ge=2)]
    samples: Positive
    batch_size: Positive


class LCTConvergenceConfig(Section):
    """`lagged_cache.convergence` of experiment.yaml."""

    lengths: Counts
    samples: Positive
    tolerance: PositiveReal


class LCTSpeedConfig(Section):
    """`lagged_cache.speed` of experiment.yaml."""

    lengths: Counts
    samples: Positive
    batch_size: Positive


class LCTSweepConfig(Section):
    """`lagged_cache.sweep` of experiment.yaml."""

    learning_rates: Annotated[tuple[PositiveReal, ...], Field(min_length=1)]
    samples: Positive
    epochs: Positive


class LaggedCacheConfig(Section):
    """`lagged_cache` of experiment.yaml."""

    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    kind: LMKind
    model: LMModelConfig
    feedback_scale: NonNegativeReal
    training: LMTrainingConfig
    passes: Counts
    until: LCTUntilConfig
    gap_samples: Positive
    gap_warning: PositiveReal
    cache_in_memory_gb: NonNegativeReal
    validation: LCTValidationConfig
    convergence: LCTConvergenceConfig
    speed: LCTSpeedConfig
    sweep: LCTSweepConfig


class ExperimentConfig(Section):
    """experiment.yaml."""

    output_dir: Text
    seed: Seed
    reading: ReadingConfig
    generation: GenerationConfig
    calibration: CalibrationConfig
    demo: DemoConfig
    evaluation: EvaluationConfig
    benchmark: BenchmarkConfig
    transformer_lm: TransformerLMConfig
    lagged_cache: LaggedCacheConfig
