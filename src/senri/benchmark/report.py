"""Rows of a run as tables and figures. All ratios are between rows of the one run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from senri.evaluation.report import Curves, Report, Section, Series, Table, Value
from senri.identity import Identity

Row = dict[str, Any]
DRIFT = 0.05  # relative; from here the machine was not the same machine all the time
SHORT = 4096  # tokens of the text that the longest is compared with: some pieces behind a full window
ALONG = 32  # points of the curve along the longest reading
_MB = 1e6
_SHARE, _RATE, _TIMES = ".1%", ",.0f", ".2f"


class Rows:
    """The rows of a run by what they measure, and what follows from them."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.all = list(rows)
        self.bounds = self._of("bounds")
        self.reading = sorted((r for r in self._of("reading") if r["key"].startswith("reading/")), key=_tokens)
        self.batch = sorted((r for r in self._of("reading") if r["key"].startswith("batch/")), key=lambda r: r["batch"])
        self.decoding = sorted(self._of("decoding"), key=lambda r: r["after"])
        self.training, self.loads, self.peers = self._of("training"), self._of("load"), self._of("peer")

    def _of(self, measurement: str) -> list[Row]:
        return [row for row in self.all if row["measurement"] == measurement]

    def one(self, key: str) -> Row | None:
        """The row of this key."""
        return next((row for row in self.all if row["key"] == key), None)

    def matrix_bound(self, dtype: str) -> float | None:
        """FLOP/s: the best kernel in the better of the run's rows."""
        rates = [rate for row in self.bounds for rate in row["matrix"][dtype].values() if rate is not None]
        return max(rates, default=None)

    def bandwidth(self) -> float | None:
        """Bytes/s with all threads, the better of the run's rows."""
        return max((row["bandwidth"]["all threads"] for row in self.bounds), default=None)

    def drift(self) -> float | None:
        """How much faster the machine was at one end of the run than at the other."""
        if len(self.bounds) < 2:
            return None
        first, last = (row["matrix"][row["dtype"]]["linear"] for row in self.bounds[:2])
        return max(first, last) / min(first, last) - 1


def _tokens(row: Row) -> int:
    return row["tokens"]


def speed(row: Row) -> float:
    """Tokens/s of whole readings, all texts together."""
    return row["tokens"] * row.get("batch", 1) / median(row["seconds"])


def piece_speed(row: Row) -> float | None:
    """Tokens/s of the median piece; the first of each reading, which sees no text before it, aside."""
    later = [s for pieces in row["piece_seconds"] for s in pieces[1:]]
    return row["piece_size"] * row["batch"] / median(later) if later else None


def _share(amount: float, seconds: float, bound: float | None) -> float | None:
    return None if bound is None else amount / seconds / bound


def reading_shares(row: Row, bound: float | None) -> dict[str, float | None]:
    """Of the matrix rate: what was done, of that the products with weights, and as if every layer had been computed."""
    seconds = median(row["seconds"])
    return {
        "done": _share(sum(row["work"].values()), seconds, bound),
        "weights": _share(row["work"]["weights"], seconds, bound),
        "every layer": _share(sum(row["all_layers"].values()), seconds, bound),
    }


def decoding_speed(row: Row) -> float:
    """Tokens/s of ``generate()``."""
    return row["tokens"] / median(row["seconds"])


def build_report(rows: list[Row], identity: Identity, versions: dict[str, Value], left_out: Sequence[str]) -> Report:
    """The report of what there is; sections without rows stay out."""
    r = Rows(rows)
    sections = (
        _summary(r, left_out),
        _bounds(r),
        _reading(r),
        _batch(r),
        _decoding(r),
        _memory(r),
        _training(r),
        _peers(r),
        _loading(r),
    )
    facts = {name: value for name, value in identity.items() if value is None or isinstance(value, str | int | float)}
    return Report(
        f"Speed of {identity['model']}",
        {**facts, **versions},
        tuple(section for section in sections if section is not None),
        json.loads(json.dumps(identity)),
    )


def _summary(r: Rows, left_out: Sequence[str]) -> Section:
    """What the aims are about, a line each."""
    lines: list[tuple[str, Value, str]] = []

    def add(what: str, value: float | None, spec: str) -> None:
        if value is not None:
            lines.append((what, format(value, spec), ""))

    longest = r.reading[-1] if r.reading else None
    if longest is not None:
        shares = reading_shares(longest, r.matrix_bound(longest["dtype"]))
        name = f"reading {longest['tokens']:,} tokens"
        add(f"{name}, tokens/s", speed(longest), _RATE)
        add(f"{name}, share of the {longest['dtype']} matrix rate, layers computed", shares["done"], _SHARE)
        add(f"{name}, the same, products with weights alone", shares["weights"], _SHARE)
        add(f"{name}, the same, as if all layers had been computed", shares["every layer"], _SHARE)
        add(f"{name}, peak memory of the process, MB", longest["process_peak_bytes"] / _MB, _RATE)
    flat = [row for row in r.reading if piece_speed(row) is not None]
    if len(flat) > 1:
        a, b = flat[-1], next((row for row in flat[:-1] if row["tokens"] >= SHORT), flat[0])
        ratio = (piece_speed(a) or 0) / (piece_speed(b) or 1) - 1
        add(f"median piece, {a['tokens']:,} against {b['tokens']:,} tokens", ratio, "+.1%")
    if row := r.one("memory"):
        add("memory path, share of reading", _memory_share(row["reading"]), _SHARE)
        add("memory path, share of predicting", _memory_share(row["predicting"]), _SHARE)
    if r.decoding:
        first, last = r.decoding[0], r.decoding[-1]
        name = f"decoding after {last['after']:,} tokens"
        add(f"{name}, tokens/s", decoding_speed(last), ".1f")
        seconds = 1 / decoding_speed(last)
        add(f"{name}, share of the memory bandwidth", _share(last["weight_bytes"], seconds, r.bandwidth()), _SHARE)
        if first is not last:
            against = decoding_speed(last) / decoding_speed(first) - 1
            add(f"{name}, against after {first['after']:,}", against, "+.1%")
    for row in r.training:
        share = _share(sum(row["work"].values()), median(row["step_seconds"]), r.matrix_bound(row["dtype"]))
        add(f"training step ({row['trainable']}), share of the {row['dtype']} matrix rate", share, _SHARE)
    for peer in r.peers:
        add(f"reading {peer['tokens']:,} tokens, times as fast as {peer['name']}", _against(r, peer), _TIMES)
    sittings = sorted({row["sitting"] for row in r.all})
    flags = []
    if len(sittings) > 1:
        flags.append(f"MIXED: measured in {len(sittings)} sittings ({', '.join(sittings)}): the machine may differ")
    if (drift := r.drift()) is not None and drift > DRIFT:
        flags.append(f"DRIFT: the machine was {drift:.0%} faster at one end of the run than at the other")
    table = Table("", ("what", "measured"), tuple(line[:2] for line in lines))
    text = "\n".join(f"- {line}" for line in left_out)
    return Section("Summary", text=text, flags=tuple(flags), tables=(table,) if lines else ())


def _bounds(r: Rows) -> Section | None:
    if not r.bounds:
        return None
    rows: list[tuple[Value, ...]] = []

    def add(what: str, values: list[float | None], unit: float) -> None:
        rows.append((what, *[None if v is None else v / unit for v in values]))

    for dtype, kernels in r.bounds[0]["matrix"].items():
        for kernel in kernels:
            values = [row["matrix"][dtype][kernel] for row in r.bounds]
            add(f"matrix products of a layer, {dtype}, {kernel}, GFLOP/s", values, 1e9)
    for name in r.bounds[0]["bandwidth"]:
        add(f"memory read, {name}, GB/s", [row["bandwidth"][name] for row in r.bounds], 1e9)
    add(f"vector products of all weights, {r.bounds[0]['dtype']}, GB/s", [row["vector"] for row in r.bounds], 1e9)
    names = tuple(row["key"].partition("/")[2] for row in r.bounds)
    note = "Shares below are of the better kernel and the better of the rows."
    formats = dict.fromkeys(names, ",.1f")
    return Section("The machine's bounds", tables=(Table("", ("what", *names), tuple(rows), formats, note),))


READING_COLUMNS = (
    "tokens", "tokens/s", "median piece, tokens/s", "layers a token", "share of the matrix rate",
    "weights alone", "as if all layers", "state, MB", "peak while reading, MB", "peak of the process, MB",
)  # fmt: skip


def _reading(r: Rows) -> Section | None:
    if not r.reading:
        return None
    rows = []
    for row in r.reading:
        shares = reading_shares(row, r.matrix_bound(row["dtype"]))
        memory = [row[name] / _MB for name in ("state_bytes", "peak_bytes", "process_peak_bytes")]
        rows.append(
            (row["tokens"], speed(row), piece_speed(row), row["layers_a_token"], *shares.values(), *memory),
        )
    table = Table(
        "",
        READING_COLUMNS,
        tuple(rows),
        {
            "tokens": ",",
            "tokens/s": _RATE,
            "median piece, tokens/s": _RATE,
            "layers a token": ".1f",
            **dict.fromkeys(READING_COLUMNS[4:7], _SHARE),
            "state, MB": ",.1f",
            **dict.fromkeys(READING_COLUMNS[8:], _RATE),
        },
        f"Of {r.reading[0]['layers']} layers, reading computes those that a memory needs. Counted are matrix products "
        "of layers: with weights, and of attention.",
    )
    senri = Series("Senri", tuple(float(row["tokens"]) for row in r.reading), tuple(speed(row) for row in r.reading))
    others: dict[str, list[Row]] = {}
    for peer in sorted((p for p in r.peers if "senri_seconds" not in p), key=_tokens):
        others.setdefault(peer["name"], []).append(peer)
    series = [
        Series(name, tuple(float(p["tokens"]) for p in rows), tuple(speed(p) for p in rows))
        for name, rows in others.items()
    ]
    figures = [
        Curves(
            "reading",
            "Reading speed by length",
            "tokens read",
            "tokens/s",
            (senri, *series),
            log_x=True,
            y_range=(0.0, 1.1 * max(y for s in (senri, *series) for y in s.y)),
        ),
        *_along(r.reading[-1]),
    ]
    return Section("Reading", tables=(table,), figures=tuple(figures))


def _along(row: Row) -> list[Curves]:
    """Speed from place to place of the longest reading."""
    pieces, size = row["piece_seconds"][-1], row["piece_size"]
    block = max(len(pieces) // ALONG, 1)
    starts = range(0, len(pieces) - block + 1, block)
    if len(starts) < 2:
        return []
    points = Series(
        f"{row['tokens']:,} tokens",
        tuple(float((start + block) * size) for start in starts),
        tuple(size / median(pieces[start : start + block]) for start in starts),
    )
    title, top = "Reading speed along the longest text", 1.1 * max(points.y)
    return [Curves("along", title, "tokens read so far", "tokens/s", (points,), y_range=(0.0, top))]


def _batch(r: Rows) -> Section | None:
    if not r.batch:
        return None
    one = next((speed(row) for row in r.batch if row["batch"] == 1), None)
    rows = tuple(
        (
            row["batch"],
            row["tokens"],
            speed(row),
            None if one is None else speed(row) / one,
            reading_shares(row, r.matrix_bound(row["dtype"]))["done"],
            row["process_peak_bytes"] / _MB,
        )
        for row in r.batch
    )
    columns = (
        "texts", "tokens of each", "tokens/s, all texts", "against one text", "share of the matrix rate",
        "peak of the process, MB",
    )  # fmt: skip
    formats = dict(zip(columns, ("", ",", _RATE, _TIMES, _SHARE, _RATE), strict=True))
    return Section("Several texts at once", tables=(Table("", columns, rows, formats),))


def _decoding(r: Rows) -> Section | None:
    if not r.decoding:
        return None
    bound = r.bandwidth()
    rows = []
    for row in r.decoding:
        seconds, step = 1 / decoding_speed(row), median(row["step_seconds"])
        rows.append(
            (
                row["after"],
                decoding_speed(row),
                1 / step,
                _share(row["weight_bytes"], seconds, bound),
                _share(row["weight_bytes"], step, bound),
                _share(row["weight_bytes"] + row["state_bytes"], seconds, bound),
                row["state_bytes"] / _MB,
                row["process_peak_bytes"] / _MB,
            )
        )
    columns = (
        "tokens read before", "generate, tokens/s", "bare steps, tokens/s", "generate, share of the bandwidth",
        "bare steps, share", "generate, weights and state", "state, MB", "peak of the process, MB",
    )  # fmt: skip
    formats = dict(zip(columns, (",", ".1f", ".1f", _SHARE, _SHARE, _SHARE, ",.1f", _RATE), strict=True))
    weights = r.decoding[0]["weight_bytes"] / _MB
    note = f"A token reads {weights:,.0f} MB of weights once; the share is of the bandwidth with all threads."
    return Section("Decoding", tables=(Table("", columns, tuple(rows), formats, note),))


def _memory_share(part: dict[str, list[float]]) -> float:
    return median(inside / whole for inside, whole in zip(part["memory"], part["whole"], strict=True))


def _memory(r: Rows) -> Section | None:
    row = r.one("memory")
    if row is None:
        return None
    size = row["piece_size"]
    rows: list[tuple[Value, ...]] = [
        (name, size / median(row[part]["whole"]), size / median(row[part]["memory"]), _memory_share(row[part]))
        for name, part in (("reading: it writes", "reading"), ("predicting: it writes and reads", "predicting"))
    ]
    rows.append(("the layer by itself, writing and reading", None, size / median(row["layer"]), None))
    columns = ("what", "model, tokens/s", "memory alone, tokens/s", "share of the time")
    formats = dict.fromkeys(columns[1:3], _RATE) | {columns[3]: _SHARE}
    note = f"Medians of pieces of {size:,} tokens behind a full window, of {row['tokens']:,} tokens."
    return Section("The memory path", tables=(Table("", columns, tuple(rows), formats, note),))


def _training(r: Rows) -> Section | None:
    tables = []
    if r.training:
        rows = tuple(
            (
                row["trainable"],
                row["parameters"] / 1e6,
                row["tokens"],
                row["dtype"],
                median(row["step_seconds"]),
                row["tokens"] / median(row["step_seconds"]),
                _share(sum(row["work"].values()), median(row["step_seconds"]), r.matrix_bound(row["dtype"])),
                row["counted"],
                row["peak_bytes"] / _MB,
            )
            for row in r.training
        )
        columns = (
            "what learns", "parameters, M", "tokens", "products in", "s a step", "tokens/s",
            "share of the matrix rate", "counted as", "peak, MB",
        )  # fmt: skip
        formats = dict(zip(columns, ("", ",.1f", ",", "", ".2f", _RATE, _SHARE, "", _RATE), strict=True))
        tables.append(Table("Method bptt, one text a step", columns, rows, formats))
    if row := r.one("features"):
        stages = (row["tokens"] / row["collect_seconds"], row["gate_step_seconds"], row["step_seconds"])
        names = ("pages and questions, tokens/s", "write gate, s a step", "reading, s a step", "peak, MB")
        formats = dict(zip(names, (_RATE, ".3f", ".3f", _RATE), strict=True))
        tables.append(Table("Method features", names, ((*stages, row["peak_bytes"] / _MB),), formats))
    return Section("Training", tables=tuple(tables)) if tables else None


def _against(r: Rows, peer: Row) -> float | None:
    """How many times as fast Senri reads as many tokens, up to where a peer is: its first token is known."""
    if "senri_seconds" in peer:  # its own race
        return median(peer["seconds"]) / median(peer["senri_seconds"])
    row = r.one(f"reading/{peer['tokens']}")
    if row is None:
        return None
    mine = median(a + b for a, b in zip(row["seconds"], row["first_token_seconds"], strict=True))
    return row["tokens"] / mine / speed(peer)


def _peers(r: Rows) -> Section | None:
    if not r.peers:
        return None
    decoding = median(decoding_speed(row) for row in r.decoding) if r.decoding else None
    rows = []
    for peer in r.peers:
        made = peer["decode"] / median(peer["decode_seconds"]) if peer["decode_seconds"] else None
        rows.append(
            (
                peer["name"],
                peer["tokens"],
                speed(peer),
                _against(r, peer),
                made,
                None if made is None or decoding is None else decoding / made,
                peer["state_bytes"] / _MB,
                (peer.get("peak_bytes") or peer["process_peak_bytes"]) / _MB,
                "; beside it: ".join(peer[name] for name in ("note", "senri_note") if name in peer),
            )
        )
    columns = (
        "peer", "tokens", "tokens/s", "Senri, times as fast", "decoding, tokens/s", "Senri's decoding, times as fast",
        "state, MB", "peak of the process, MB", "what",
    )  # fmt: skip
    formats = dict(zip(columns, ("", ",", _RATE, _TIMES, ".1f", _TIMES, ",.1f", _RATE, ""), strict=True))
    note = (
        "Language models are compared up to the first token after the text, memory layers with Senri's own of the same "
        "rule and shape, in one process. Senri's decoding is the median of its rows, for it does not follow length."
    )
    return Section("Peers", tables=(Table("", columns, tuple(rows), formats, note),))


def _loading(r: Rows) -> Section | None:
    rows: list[tuple[Value, ...]] = []
    for name, shown in (("import", "imports"), ("load", "weights"), ("first_token", "first token of an answer")):
        if r.loads:
            rows.append((shown, median(row[name] for row in r.loads)))
    if r.loads:
        rows.append(("start to first token", median(sum(_load(row)) for row in r.loads)))
    if row := r.one("conversion"):
        rows.append(("loading the unconverted base", median(row["load_seconds"])))
        rows.append(("converting it", median(row["convert_seconds"])))
        if row["first_call"] is not None:
            rows.append(("once: the GGUF file that pip ships into a copy in the cache", row["first_call"]))
    if row := r.one("states"):
        sizes = ", ".join(f"{size / _MB:.1f} MB after {int(n):,}" for n, size in row["file_bytes"].items())
        note = f"Saved memories with their windows, unflushed: {sizes} tokens."
    else:
        note = ""
    if not rows:
        return None
    return Section("Loading and conversion", tables=(Table("", ("what", "s"), tuple(rows), {"s": ".2f"}, note),))


def _load(row: Row) -> tuple[float, ...]:
    return row["import"], row["load"], row["first_token"]
