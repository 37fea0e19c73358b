"""Tables are what the rows say: every share and ratio by hand."""

import pytest

from senri.benchmark.plan import Settings, plan
from senri.benchmark.report import Rows, build_report, piece_speed, reading_shares, speed
from senri.config.schema import Measurement
from senri.evaluation.markdown import to_markdown

SITTING = {"sitting": "2026-01-01 00:00:00", "process_peak_bytes": 700e6, "peak_bytes": 600e6}


def bounds(name, linear=100e9):
    rates = {"bfloat16": {"linear": linear, "packed": None}, "float32": {"linear": 10e9, "packed": 40e9}}
    return {"key": f"bounds/{name}", "measurement": "bounds", "matrix": rates, "dtype": "bfloat16", **SITTING} | {
        "bandwidth": {"one thread": 5e9, "all threads": 10e9},
        "vector": 8e9,
    }


def reading(tokens, seconds, batch=1, key=None):
    return {"key": key or f"reading/{tokens}", "measurement": "reading", "tokens": tokens, "batch": batch} | {
        "seconds": seconds,
        "piece_seconds": [[0.9, *[0.5] * (tokens // 1000 - 1)]],
        "piece_size": 1000,
        "first_token_seconds": [1.0] * len(seconds),
        "work": {"weights": 60e9, "attention": 20e9},
        "all_layers": {"weights": 120e9, "attention": 40e9},
        "layers_a_token": 15.0,
        "layers": 30,
        "dtype": "bfloat16",
        "state_bytes": 30e6,
        **SITTING,
    }


def decoding(after, seconds):
    return {"key": f"decoding/{after}", "measurement": "decoding", "after": after, "tokens": 10, **SITTING} | {
        "seconds": seconds,
        "step_seconds": [0.04, 0.05, 0.06],
        "weight_bytes": 250e6,
        "state_bytes": 50e6,
    }


MEMORY = {"key": "memory", "measurement": "memory", "tokens": 9000, "piece_size": 1000, **SITTING} | {
    "reading": {"whole": [1.0, 2.0, 4.0], "memory": [0.1, 0.1, 0.1]},
    "predicting": {"whole": [1.0], "memory": [0.3]},
    "layer": [0.25, 0.25],
}
TRAINING = {"key": "training/all", "measurement": "training", "trainable": "all", "parameters": 1e6, **SITTING} | {
    "tokens": 2000,
    "dtype": "float32",
    "step_seconds": [4.0],
    "work": {"weights": 60e9, "attention": 20e9},
    "counted": "3 × all",
}
FEATURES = {"key": "features", "measurement": "features", "tokens": 600, "collect_seconds": 2.0, **SITTING} | {
    "gate_step_seconds": 0.1,
    "step_seconds": 0.2,
}


def peer(name, tokens, seconds, decode_seconds=(2.0,)):
    return {"key": f"peer/{name}/{tokens}", "measurement": "peer", "peer": name, "name": name.replace("_", " ")} | {
        "tokens": tokens,
        "seconds": [seconds],
        "decode": 10,
        "decode_seconds": list(decode_seconds),
        "state_bytes": 1e6,
        "note": "as it is",
        **SITTING,
    }


LOAD = {"key": "load/1", "measurement": "load", "import": 1.0, "load": 2.0, "first_token": 0.5, **SITTING}
CONVERSION = {"key": "conversion", "measurement": "conversion", "load_seconds": [1.0], "convert_seconds": [0.5]} | {
    "first_call": 20.0,
    **SITTING,
}
STATES = {"key": "states", "measurement": "states", "file_bytes": {"1000": 40e6}, **SITTING}
ALL = [
    bounds("at first"),
    LOAD,
    CONVERSION,
    reading(4000, [3.0, 2.0, 4.0]),
    reading(8000, [5.0]),
    reading(4000, [4.0], batch=2, key="batch/2"),
    reading(4000, [3.0], key="batch/1"),
    STATES,
    decoding(1000, [1.0]),
    decoding(8000, [0.8, 0.5, 0.4]),
    MEMORY,
    TRAINING,
    FEATURES,
    peer("full_attention", 4000, 20.0),
    {**peer("titans_pytorch", 4000, 4.0, ()), "senri_seconds": [1.0]},
    bounds("at the end", 110e9),
]
IDENTITY = {"model": "tiny", "threads": 2, "benchmark": {"repeats": 3}}


def built(rows, left_out=()):
    return build_report(rows, IDENTITY, {"torch": "2"}, left_out)


def tables(report):
    """By title: rows as dictionaries."""
    return {
        (section.title, table.title): [dict(zip(table.columns, row, strict=True)) for row in table.rows]
        for section in report.sections
        for table in section.tables
    }


def test_speeds():
    row = reading(4000, [3.0, 2.0, 4.0], batch=2)
    assert speed(row) == 4000 * 2 / 3.0
    assert piece_speed(row) == 1000 * 2 / 0.5, "the first piece aside"
    assert piece_speed({**row, "piece_seconds": [[0.9], [0.8]]}) is None


def test_shares_of_the_better_bound():
    r = Rows(ALL)
    assert r.matrix_bound("bfloat16") == 110e9
    assert r.matrix_bound("float32") == 40e9
    shares = reading_shares(r.one("reading/4000"), r.matrix_bound("bfloat16"))
    assert shares == {
        "done": pytest.approx(80 / 3 / 110),
        "weights": pytest.approx(60 / 3 / 110),
        "every layer": pytest.approx(160 / 3 / 110),
    }
    assert set(reading_shares(r.one("reading/4000"), None).values()) == {None}


def test_every_table():
    shown = tables(built(ALL))
    read = shown["Reading", ""]
    assert [row["tokens"] for row in read] == [4000, 8000], "rows of batches are not among them"
    assert read[1]["share of the matrix rate"] == pytest.approx(80 / 5 / 110)
    assert read[0]["peak of the process, MB"] == 700
    batch = shown["Several texts at once", ""]
    assert [row["texts"] for row in batch] == [1, 2]
    assert batch[1]["against one text"] == pytest.approx((8000 / 4) / (4000 / 3))
    decoded = shown["Decoding", ""][1]
    assert decoded["generate, tokens/s"] == 10 / 0.5
    assert decoded["generate, share of the bandwidth"] == pytest.approx(250e6 * 20 / 10e9)
    assert decoded["generate, weights and state"] == pytest.approx(300e6 * 20 / 10e9)
    assert decoded["bare steps, share"] == pytest.approx(250e6 / 0.05 / 10e9)
    writes, both, layer = shown["The memory path", ""]
    assert writes["share of the time"] == pytest.approx(0.05), "the median of the pieces' shares"
    assert both["share of the time"] == pytest.approx(0.3)
    assert layer["memory alone, tokens/s"] == 1000 / 0.25
    step = shown["Training", "Method bptt, one text a step"][0]
    assert step["share of the matrix rate"] == pytest.approx(80e9 / 4 / 40e9)
    assert shown["Training", "Method features"][0]["pages and questions, tokens/s"] == 300
    full, titans = shown["Peers", ""]
    # Senri: a reading and its first token, 3 + 1 s (median of three); full attention: 20 s
    assert full["Senri, times as fast"] == pytest.approx(5.0)
    assert full["Senri's decoding, times as fast"] == pytest.approx(15 / 5)  # median of 10 and 20 a second
    assert titans["Senri, times as fast"] == pytest.approx(4.0), "against the layer beside it"
    assert titans["decoding, tokens/s"] is None
    loading = {row["what"]: row["s"] for row in shown["Loading and conversion", ""]}
    assert loading["start to first token"] == 3.5
    assert loading["converting it"] == 0.5


def test_the_summary_says_what_the_aims_ask():
    lines = {row["what"]: row["measured"] for row in tables(built(ALL))["Summary", ""]}
    assert lines["reading 8,000 tokens, share of the bfloat16 matrix rate, layers computed"] == "14.5%"
    assert lines["median piece, 8,000 against 4,000 tokens"] == "+0.0%"
    assert lines["memory path, share of reading"] == "5.0%"
    assert lines["decoding after 8,000 tokens, against after 1,000"] == "+100.0%"
    assert lines["training step (all), share of the float32 matrix rate"] == "50.0%"
    assert lines["reading 4,000 tokens, times as fast as full attention"] == "5.00"


def test_flags():
    assert built([bounds("at first")]).sections[0].flags == ()
    drifted = built(ALL).sections[0].flags
    assert len(drifted) == 1
    assert drifted[0].startswith("DRIFT: the machine was 10% faster")
    two = built([bounds("at first"), {**LOAD, "sitting": "2026-01-02 00:00:00"}]).sections[0].flags
    assert two[0].startswith("MIXED: measured in 2 sittings")


def test_what_is_there_is_shown_and_what_is_left_out_said():
    report = built([LOAD], ["titans_pytorch is left out: not installed"])
    assert [section.title for section in report.sections] == ["Summary", "Loading and conversion"]
    assert "titans_pytorch is left out: not installed" in to_markdown(report, {})
    for row in ALL:  # each alone: no table needs another's row
        build_report([row], IDENTITY, {}, [])


@pytest.fixture
def settings():
    model = {"name": "tiny", "dtype": "auto", "adapter": "none", "overrides": {}}

    def make(**changes):
        values = {
            "measurements": Measurement.__args__,
            "lengths": (1024, 65536),
            "repeats": 3,
            "batch_sizes": (1, 2),
            "batch_length": 4096,
            "decoding_after": (4096, 1024),
            "decoding_tokens": 8,
            "training_length": 2048,
            "peers": ("full_attention", "llama_cpp"),
            "peer_lengths": (4096, 32768),
            "llama_cpp_python": "python3",
        }
        return Settings(
            **{**values, **changes}, model=model, piece_size=1024, training={"bf16": True}, features={"chat": 0.4}
        )

    return make


def test_a_plan(settings, tmp_path):
    specs = {spec["key"]: spec for spec in plan(settings(), tmp_path)}
    keys = list(specs)
    assert (keys[0], keys[-1]) == ("bounds/at first", "bounds/at the end")
    assert [spec["tokens"] for key, spec in specs.items() if key.startswith("reading/")] == [1024, 4096, 32768, 65536]
    assert specs["reading/65536"]["repeats"] == specs["peer/full_attention/32768"]["repeats"] == 1
    assert specs["reading/4096"]["repeats"] == specs["peer/llama_cpp/4096"]["repeats"] == 3
    assert keys.index("states") < keys.index("decoding/1024") < keys.index("decoding/4096")
    assert specs["peer/llama_cpp/4096"]["options"] == {"python": "python3"}
    assert specs["training/all"]["training"]["batch_size"] == 1
    assert all(spec["model"]["name"] == "tiny" for spec in specs.values())
    assert len({spec["measurement"] for spec in specs.values()}) == 10
    some = plan(settings(measurements=("reading",)), tmp_path)
    assert [spec["key"] for spec in some[1:-1]] == ["reading/1024", "reading/65536"]
