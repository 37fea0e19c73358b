"""Imports run one way, `import senri` stays light, and the public names are what they claim to be."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import senri

SRC = Path(__file__).parents[1] / "src"

LIBRARY = {"memory", "layers", "hf", "lm", "data", "session", "identity", "files"}
# What each part of senri may import of senri, itself aside.
MAY_IMPORT: dict[str, set[str]] = {
    "memory": set(),
    "identity": set(),
    "files": set(),
    "layers": {"memory"},
    # data knows no model: reading a text is a method of the model, cutting it into tokens is data's
    "hf": {"memory", "layers", "data", "files"},
    "lm": {"memory", "layers", "files"},
    "data": set(),
    "session": {"memory", "layers", "hf", "lm", "data"},
    "training": LIBRARY,
    "evaluation": LIBRARY,
    # above both: it times a training step and writes an evaluation's kind of report
    "benchmark": LIBRARY | {"training", "evaluation"},
    "config": set(),
    "cli": LIBRARY | {"training", "evaluation", "benchmark", "config"},
    "__main__": {"cli"},
}
# The same for imports that wait: inside a function, or for type checkers only.
MAY_IMPORT_LATE = {"config": {"hf"}}
# Other packages that a part must do without.
MUST_NOT_LOAD = {"memory": {"transformers"}, "layers": {"transformers"}, "config": {"torch", "transformers"}}


class Import(NamedTuple):
    module: str  # dotted and absolute; `from a import b` is a.b
    line: int
    late: bool


def imports_of(path: Path, src: Path) -> Iterator[Import]:
    """Every import of a file, wherever it stands."""
    package = path.relative_to(src).parent.parts
    tree = ast.parse(path.read_text(encoding="utf-8"))
    late = {id(node) for block in ast.walk(tree) if _waits(block) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = [*above, node.module] if node.module else above
            modules = [".".join([*base, name.name]) for name in node.names]
        else:
            continue
        yield from (Import(module, node.lineno, id(node) in late) for module in modules)


def _waits(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return ast.unparse(node.test).endswith("TYPE_CHECKING")
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def violations(src: Path) -> list[str]:
    """One line for each import under `src`/senri that the tables forbid."""
    found = []
    for path in sorted((src / "senri").rglob("*.py")):
        parts = path.relative_to(src / "senri").with_suffix("").parts
        if parts == ("__init__",):
            continue  # the public names: lazy, and free to come from anywhere
        for item in imports_of(path, src):
            if problem := _problem(parts[0], item):
                found.append(f"{'/'.join(parts)}.py:{item.line}: {problem}")
    return found


def _problem(part: str, item: Import) -> str | None:
    if part not in MAY_IMPORT:
        return f"{part} is in no table of tests/test_imports.py"
    top, _, rest = item.module.partition(".")
    if top != "senri":
        return f"{part} must not import {top}" if top in MUST_NOT_LOAD.get(part, ()) else None
    used = rest.partition(".")[0]
    allowed = MAY_IMPORT[part] | (MAY_IMPORT_LATE.get(part, set()) if item.late else set())
    if used == part or used in allowed or (used == "__version__" and part != "memory"):
        return None
    # A public name (`from senri import SenriConfig`) would hide where it comes from.
    return f"{part} must not import senri.{used}" if used else f"{part} must import a part of senri, not all"


def test_imports_run_one_way() -> None:
    assert violations(SRC) == []


@pytest.mark.parametrize(
    ("file", "code", "problem"),
    [
        ("memory/scan.py", "from senri.layers import gate", "memory must not import senri.layers"),
        ("memory/scan.py", "from ..hf import cache", "memory must not import senri.hf"),
        ("memory/kernels/gpu.py", "from ...data.text import read", "memory must not import senri.data"),
        ("memory/scan.py", "import transformers.cache_utils", "memory must not import transformers"),
        ("layers/mlp.py", "from transformers import Cache", "layers must not import transformers"),
        ("layers/mlp.py", "def f():\n    import senri.config", "layers must not import senri.config"),
        ("hf/cache.py", "from senri.lm.model import X", "hf must not import senri.lm"),
        ("hf/cache.py", "from senri import SenriConfig", "hf must not import senri.SenriConfig"),
        ("hf/cache.py", "import senri", "hf must import a part of senri, not all"),
        ("lm/model.py", "from senri import hf", "lm must not import senri.hf"),
        ("data/text.py", "from senri.memory import scan", "data must not import senri.memory"),
        ("session.py", "from senri.config import ConfigManager", "session must not import senri.config"),
        ("session.py", "from .cli import main", "session must not import senri.cli"),
        ("training/loop.py", "import senri.evaluation", "training must not import senri.evaluation"),
        (
            "evaluation/niah.py",
            "from senri.training import loop",
            "evaluation must not import senri.training",
        ),
        ("training/loop.py", "from senri.benchmark import work", "training must not import senri.benchmark"),
        ("evaluation/run.py", "from senri.benchmark import work", "evaluation must not import senri.benchmark"),
        ("benchmark/run.py", "from senri.config import ConfigManager", "benchmark must not import senri.config"),
        ("config/manager.py", "from senri.hf import cache", "config must not import senri.hf"),
        ("config/manager.py", "def f():\n    import senri.cli", "config must not import senri.cli"),
        ("novel/x.py", "import math", "novel is in no table of tests/test_imports.py"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, code: str, problem: str) -> None:
    path = tmp_path / "senri" / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    assert violations(tmp_path) == [f"{file}:{code.count(chr(10)) + 1}: {problem}"]


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("memory/scan.py", "import torch\nfrom senri.memory.state import MemoryState\nfrom . import rules"),
        ("layers/memory_attention.py", "from ..memory.scan import scan"),
        ("hf/modeling_senri.py", "import transformers\nfrom senri.layers import gate"),
        ("session.py", "from senri import __version__\nfrom senri.hf.cache import SenriCache"),
        ("config/manager.py", "def f():\n    from senri.hf.configuration_senri import SenriConfig"),
        ("config/manager.py", "if TYPE_CHECKING:\n    from senri.hf.configuration_senri import SenriConfig"),
        ("benchmark/run.py", "from senri.evaluation.report import Report\nfrom senri.training.trainer import Trainer"),
        ("cli/demo.py", "from senri.config import ConfigManager"),
        ("__main__.py", "from senri.cli import main"),
    ],
)
def test_allowed_imports_pass(tmp_path: Path, file: str, code: str) -> None:
    path = tmp_path / "senri" / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    assert violations(tmp_path) == []


@pytest.mark.parametrize("module", ["senri", "senri.config"])
def test_light_modules_load_neither_torch_nor_transformers(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(SRC)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[]"


def test_public_names_are_listed_once_and_seen_by_type_checkers() -> None:
    tree = ast.parse((SRC / "senri" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {name.name: node.module for node in block.body for name in node.names}
    assert seen == senri._HOMES
    assert sorted(senri.__all__) == sorted([*senri._HOMES, "__version__"])
    assert set(senri.__all__) <= set(dir(senri))


@pytest.mark.parametrize("name", senri.__all__)
def test_public_names_load(name: str) -> None:
    assert getattr(senri, name) is not None


def test_an_unknown_public_name_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'SenriModle'; it has: .*SenriModel"):
        _ = senri.SenriModle
