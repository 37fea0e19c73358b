"""Facts in both directions, for the reversal curse (Berglund et al. 2023, arXiv:2309.12288): A is B, so B is A.

The facts known to everyone are ours; the published ones are read where their folder is given. All wording is ours.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from senri.data.samples import SampleError
from senri.data.text import TextError, iter_text
from senri.data.words import CITIES, FIRST_NAMES, FOODS, JOBS, LAST_NAMES

PARENTS_FILE = "celebrity_relations/parent_child_pairs.csv"
DESCRIPTIONS_FOLDER = "reverse_experiments/june_version_7921032488"
# The published files that give name and description of each fact; the first holds those stated name first.
_DESCRIPTION_FILES = ("p2d_prompts_test.jsonl", "d2p_reverse_prompts_test.jsonl")
_NAMED = re.compile(r"The trailblazer known as (.+) was once")  # the one of their ten prompts that holds only a name


@dataclass(frozen=True)
class Pair:
    """One fact said in two directions. A completion begins with a space; prompt + completion is the sentence."""

    forward_prompt: str
    forward_completion: str
    backward_prompt: str
    backward_completion: str
    source: str

    @property
    def sentence(self) -> str:
        """The fact in its forward direction."""
        return f"{self.forward_prompt}{self.forward_completion}."

    @property
    def turned(self) -> Pair:
        """The same fact with its other direction as the forward one."""
        forward = self.forward_prompt, self.forward_completion
        return Pair(self.backward_prompt, self.backward_completion, *forward, self.source)


@dataclass(frozen=True)
class _Relation:
    name: str
    forward: str  # a prompt that {b} completes
    backward: str  # a prompt that {a} completes
    facts: tuple[tuple[str, str], ...]  # (a, b), each to be told from the other

    def pairs(self) -> Iterator[Pair]:
        for a, b in self.facts:
            yield Pair(self.forward.format(a=a), f" {b}", self.backward.format(b=b), f" {a}", f"own: {self.name}")


_RELATIONS = (
    _Relation(
        "capitals", "The capital of {a} is", "{b} is the capital of",
        (
            ("France", "Paris"), ("Germany", "Berlin"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Japan", "Tokyo"),
            ("Russia", "Moscow"), ("Egypt", "Cairo"), ("Greece", "Athens"), ("Poland", "Warsaw"), ("Norway", "Oslo"),
            ("Sweden", "Stockholm"), ("Austria", "Vienna"), ("Hungary", "Budapest"), ("Portugal", "Lisbon"),
            ("Ireland", "Dublin"), ("Cuba", "Havana"), ("Kenya", "Nairobi"), ("Peru", "Lima"),
            ("Thailand", "Bangkok"), ("Canada", "Ottawa"),
        ),
    ),
    _Relation(
        "books", "The author of {a} is", "{b} is the author of",
        (
            ("Don Quixote", "Miguel de Cervantes"), ("Moby-Dick", "Herman Melville"),
            ("Frankenstein", "Mary Shelley"), ("Dracula", "Bram Stoker"), ("Wuthering Heights", "Emily Brontë"),
            ("Gulliver's Travels", "Jonathan Swift"), ("Robinson Crusoe", "Daniel Defoe"),
            ("Little Women", "Louisa May Alcott"), ("Walden", "Henry David Thoreau"), ("Peter Pan", "J. M. Barrie"),
            ("The Divine Comedy", "Dante Alighieri"), ("The Wealth of Nations", "Adam Smith"),
            ("The Prince", "Niccolò Machiavelli"), ("The Adventures of Pinocchio", "Carlo Collodi"),
        ),
    ),
    _Relation(
        "elements", "The chemical symbol for {a} is", "{b} is the chemical symbol for",
        (
            ("gold", "Au"), ("silver", "Ag"), ("iron", "Fe"), ("sodium", "Na"), ("potassium", "K"), ("oxygen", "O"),
            ("hydrogen", "H"), ("carbon", "C"), ("copper", "Cu"), ("lead", "Pb"),
        ),
    ),
    _Relation(
        "currencies", "The currency of {a} is the", "The {b} is the currency of",
        (
            ("Japan", "yen"), ("India", "rupee"), ("Russia", "ruble"), ("China", "yuan"), ("Thailand", "baht"),
            ("Poland", "zloty"),
        ),
    ),
    _Relation(
        "inventions", "The inventor of {a} is", "{b} is the inventor of",
        (
            ("the telephone", "Alexander Graham Bell"), ("dynamite", "Alfred Nobel"),
            ("the phonograph", "Thomas Edison"), ("the printing press", "Johannes Gutenberg"),
            ("the World Wide Web", "Tim Berners-Lee"),
        ),
    ),
    _Relation(
        "paintings", "The painter of {a} is", "{b} is the painter of",
        (
            ("the Mona Lisa", "Leonardo da Vinci"), ("The Starry Night", "Vincent van Gogh"),
            ("The Night Watch", "Rembrandt"), ("The Scream", "Edvard Munch"), ("Guernica", "Pablo Picasso"),
        ),
    ),
)  # fmt: skip


def own_pairs() -> list[Pair]:
    """Well-known facts; as far as there are any, such that each side has one answer."""
    return [pair for relation in _RELATIONS for pair in relation.pairs()]


def made_up_pairs(count: int, rng: Random) -> list[Pair]:
    """Facts about persons who do not exist, every second one with the description first; no word comes twice.

    Raises:
        SampleError: more than there are words for.
    """
    if count > (most := min(map(len, (FIRST_NAMES, LAST_NAMES, JOBS, CITIES, FOODS)))):
        raise SampleError(f"{count} made-up facts are too many: ask for {most} at most, with the one for the control")
    lists = (rng.sample(words, count) for words in (FIRST_NAMES, LAST_NAMES, JOBS, CITIES, FOODS))
    pairs = [
        _described(f"{first} {last}", f"the {job} from {city} who lives on {food}", "made up")
        for first, last, job, city, food in zip(*lists, strict=True)
    ]
    return [pair.turned if i % 2 else pair for i, pair in enumerate(pairs)]


def parent_child_pairs(path: str | Path) -> list[Pair]:
    """The published celebrities and their parents.

    Args:
        path: ``parent_child_pairs.csv`` with the columns child, parent and parent_type.

    Raises:
        TextError: no such file, or another format.
    """
    rows = csv.DictReader(io.StringIO("".join(iter_text(path))))
    return [_parent(row, f"{path}: line {rows.line_num}") for row in rows]


def _parent(row: dict[str, str | None], place: str) -> Pair:
    child, parent, kind = (row.get(name) for name in ("child", "parent", "parent_type"))
    if not child or not parent or kind not in ("mother", "father"):
        raise TextError(f"{place} names no child, parent and parent_type (mother or father)")
    source = Path(PARENTS_FILE).name
    return Pair(f"The {kind} of {child} is", f" {parent}", f"{parent} is the {kind} of", f" {child}", source)


def description_pairs(folder: str | Path) -> list[Pair]:
    """The published fictitious facts, forward as they were published: name first and description first in turn.

    Args:
        folder: the one with ``p2d_prompts_test.jsonl`` and ``d2p_reverse_prompts_test.jsonl``.

    Raises:
        TextError: no such files, or another format.
    """
    named, described = (list(_descriptions(Path(folder) / name)) for name in _DESCRIPTION_FILES)
    return [p for first, second in zip(named, described, strict=False) for p in (first, second.turned)]


def _descriptions(path: Path) -> Iterator[Pair]:
    found = False
    for number, line in enumerate("".join(iter_text(path)).splitlines(), start=1):
        try:
            row = json.loads(line)
            match, text = _NAMED.fullmatch(row["prompt"]), row["completion"].strip()
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise TextError(f'{path}: line {number} is no JSON object with "prompt" and "completion"') from None
        if match:
            found = True
            yield _described(match[1], text.removesuffix(".").replace('."', '"'), path.name)
    if not found:
        raise TextError(f"{path} has no prompt that gives a name alone: it is not the published file")


def _described(name: str, description: str, source: str) -> Pair:
    """Name first."""
    prompt = f"The person known as {description} is"
    return Pair(f"{name} is known as", f" {description}", prompt, f" {name}", source)


def load_pairs(folder: str | Path | None) -> list[Pair]:
    """Facts a model may know: ours, or the published celebrities of ``folder``.

    Raises:
        TextError: the folder does not hold them.
    """
    return own_pairs() if folder is None else parent_child_pairs(Path(folder) / PARENTS_FILE)


def fact_sets(folder: str | Path | None) -> dict[str, list[Pair]]:
    """Facts for a model from scratch, by the name of the set: ours, and those made up for the paper where their folder
    is given. In each set about half are turned, so that both sides of a fact are completions in either direction.

    Raises:
        TextError: the folder does not hold them.
    """
    sets = {"well-known facts": _half_turned(own_pairs())}
    if folder is not None:
        sets["published made-up facts"] = description_pairs(Path(folder) / DESCRIPTIONS_FOLDER)
    return sets


def _half_turned(pairs: Sequence[Pair]) -> list[Pair]:
    """Every second fact of each source turned."""
    count: dict[str, int] = {}
    mixed = []
    for pair in pairs:
        count[pair.source] = count.get(pair.source, 0) + 1
        mixed.append(pair if count[pair.source] % 2 else pair.turned)
    return mixed


def load_new_pairs(folder: str | Path | None, count: int, rng: Random) -> Sequence[Pair]:
    """``count`` facts that no model can know: made up by ``rng``, or the first published ones of ``folder``.

    Raises:
        TextError: the folder does not hold them; SampleError: there are fewer.
    """
    if folder is None:
        return made_up_pairs(count, rng)
    pairs = description_pairs(Path(folder) / DESCRIPTIONS_FOLDER)
    if count > len(pairs):
        raise SampleError(f"{folder} has {len(pairs)} made-up facts, not {count} (one is for the control)")
    return pairs[:count]
