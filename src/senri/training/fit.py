"""Training on cached features: first the write gate, told what will be asked for; then what finds it again.

The write gate is a classifier of tokens. Learned through the answers alone, chance would have to show that one token of
a million was worth keeping; here the samples say which tokens hold what is asked for. Once it is fixed, a text is the
few pairs that it lets through, and texts of any length are put together from pages at the cost of those pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from senri.hf.calibrate import set_addresses, set_values
from senri.hf.modeling_senri import SenriForCausalLM
from senri.layers import MemoryAttention, WriteGate, taps_of
from senri.training.features import AskedFeatures, Features
from senri.training.settings import FeatureSettings, TrainingError

POSITIVES, NEGATIVES, HARD = 512, 4096, 1024  # tokens of one step of the write gate
PLAIN_WEIGHT = 8.0  # of writing a plain token, against missing one that is asked for
NOISE = 1.25  # of standardised inputs: on what it has learned by heart a gate writes the words before a value, too
AROUND_WEIGHT = 6.0  # of writing the words in which a value is told, for the same reason
STOP_WEIGHT = 2.0  # of missing a value's last token, its full stop: an answer that finds none says the last word again
SILENT = 64  # tokens of plain text in a text's loss: the memory must not disturb them
VOCABULARY = 8192  # most frequent tokens, beside all that answers hold, over which the loss is taken
STATISTICS = 65536  # tokens that the projections are calibrated on
# Of the read: all memories together add that many times calibration's HEIGHT to a recalled token. Rule slot's is not
# trained: what training asks for is found at less, but where the base begins an answer its own way that is not enough.
SCALE = 2.0
ANSWERS = 128  # answer tokens of one text at most
ADDRESS_WEIGHT = 1.0  # of finding the slot that holds an answer's token, where there are slots
UNKNOWN_WEIGHT = 2.0  # of straying from the base where the memory has no answer
# questions of a text that its memory does not answer: about facts not told, about anything, and messages that tell one
UNKNOWN, UNRELATED, MESSAGES = 3, 2, 2
NEITHER = 3  # kind of a token that no loss counts, beside 0 (answers), 1 (unknown) and 2 (plain text)


Show = Callable[[dict[str, Any]], None]
Save = Callable[[dict[str, Any]], None]
Pages = tuple[int, frozenset[int]]  # a page, and which of its facts are told


def check_model(model: SenriForCausalLM) -> None:
    """Raises TrainingError for a model that cannot be trained so.

    Its memory's inputs depend on the memory; or it has no write gate; or its rule or store makes something of a pair
    that is not written (it forgets, or counts it), and texts are put together without those.
    """
    config = model.config
    if config.store not in ("single", "routed") or config.memory_sharing or config.use_alibi:
        raise TrainingError(
            "method features needs store single or routed, memory_sharing false and use_alibi false: set them in "
            "config/model.yaml, or method bptt in config/training.yaml"
        )
    if config.memory_readout != "head" or config.write_gate == "none" or not config.num_memory_layers:
        raise TrainingError(
            "method features needs a memory with memory_readout head and write_gate hidden or surprise: set them in "
            "config/model.yaml, or method bptt in config/training.yaml"
        )
    if config.update_rule not in ("linear", "delta_token", "slot"):
        raise TrainingError(
            f"method features needs update_rule linear, delta_token or slot, not {config.update_rule}: set it in "
            "config/model.yaml, or method bptt in config/training.yaml"
        )


@torch.no_grad()
def prepare(model: SenriForCausalLM, features: Features, *, addresses: bool = True) -> None:
    """Step zero: calibrate the projections on the features, and let the memory speak where it finds something.

    Args:
        addresses: set keys and queries, too; else they stay what they are, and only the way of a value through the
            memory and its height are set.
    """
    every = max(len(features.ids) // STATISTICS, 1)
    set_values(model)
    for index, memory in model.model.memories.items():
        if addresses:
            set_addresses(memory, features.hidden[index][::every])
            memory.read_gate.reset_parameters()
        memory.read_gate.scale.fill_(SCALE / len(model.model.memories))


def fit_write_gates(
    model: SenriForCausalLM,
    features: Features,
    settings: FeatureSettings,
    seed: int,
    show: Show = lambda entry: None,
    *,
    anew: bool = True,
) -> None:
    """Train the write gate of every memory in place.

    Args:
        show: called now and then with ``stage``, ``step`` (one count for all gates) and the losses.
        anew: begin with random weights; else with those that it has.
    """
    for number, (index, memory) in enumerate(model.model.memories.items()):

        def count(entry: dict[str, Any], done: int = number * settings.gate_steps) -> None:
            show({**entry, "step": done + entry["step"]})

        _fit_write_gate(memory, features, index, settings, seed, count, anew)


def _fit_write_gate(
    memory: MemoryAttention,
    features: Features,
    index: int,
    settings: FeatureSettings,
    seed: int,
    show: Show,
    anew: bool,
) -> None:
    """Teach one memory's write gate to tell what is asked for from plain text, and set how strict it is.

    A classifier is surest where it has learned by heart: of values and wordings that no training has it misses those
    that it doubts. What it lets through beside them costs a slot, and the slots go to what it is surest of. So in the
    end its biases are set to let a share of plain tokens through, ``write_rate``. Inputs are standardised while it
    learns, and noisy, which keeps it from learning by heart (Bishop 1995, "Training with noise is equivalent to
    Tikhonov regularization"); the weights that are left take them as they are.
    """
    hidden = features.hidden[index]
    follows = _follows(features)
    asked = ((features.write == 1) & follows).nonzero()[:, 0]
    plain = ((features.write == 0) & follows).nonzero()[:, 0]
    around = ((features.write == -1) & follows).nonzero()[:, 0]  # the words in which a value is told
    others = torch.cat([plain, around])
    if not len(asked) or not len(plain):
        raise TrainingError("the pages hold no facts, or nothing but facts: there is nothing to tell apart")
    stops = asked[F.pad(asked[1:] != asked[:-1] + 1, (0, 1), value=True)]  # last tokens of values
    some = hidden[:: max(len(hidden) // 65536, 1)].float()
    mean, deviation = some.mean(0), some.std(0).clamp(min=1e-6)
    target, width = memory.write_gate, hidden.shape[1]
    gate = WriteGate(width, memory.num_key_value_heads, surprise=target.surprise)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        if anew:
            for weight in (gate.in_proj.weight, gate.out_proj.weight):
                bound = weight.shape[1] ** -0.5
                weight.copy_(torch.rand(weight.shape, generator=rng) * 2 * bound - bound)
            gate.in_proj.bias.zero_()
            gate.out_proj.bias.fill_(-3.0)
        else:
            gate.load_state_dict(target.state_dict())
            gate.in_proj.bias.add_(gate.in_proj.weight[:, : 2 * width] @ mean.repeat(2))
            gate.in_proj.weight[:, : 2 * width].mul_(deviation.repeat(2))

    def logits(rows: Tensor, noise: float = 0.0) -> Tensor:
        now, after = ((hidden[i].float() - mean) / deviation for i in (rows, rows + 1))
        if noise:
            now, after = (x + noise * torch.randn(x.shape, generator=rng) for x in (now, after))
        return gate(now, after, features.surprise[rows])

    def draw(rows: Tensor, count: int) -> Tensor:
        return rows[torch.randint(len(rows), (count,), generator=rng)]

    optimizer = torch.optim.AdamW(gate.parameters(), lr=2e-3, weight_decay=0.05)
    hard = draw(others, 8 * HARD)
    for step in range(settings.gate_steps):
        if step % 100 == 99:  # the others that are nearest to being written
            with torch.no_grad():
                scores = torch.cat([logits(part).amax(-1) for part in others.split(16384)])
            hard = others[scores.topk(min(8 * HARD, len(others))).indices]
        missed = F.softplus(-logits(draw(asked, POSITIVES), NOISE)).mean()
        written = F.softplus(logits(draw(plain, NEGATIVES), NOISE)).mean()
        written = written + 0.1 * F.softplus(logits(draw(hard, HARD), NOISE)).mean()
        stopped = F.softplus(-logits(draw(stops, POSITIVES), NOISE)).mean()
        loss = missed + STOP_WEIGHT * stopped + PLAIN_WEIGHT * written
        if len(around):
            loss = loss + AROUND_WEIGHT * F.softplus(logits(draw(around, POSITIVES), NOISE)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 99 or step == settings.gate_steps - 1:
            show({"stage": "write gate", "step": step + 1, "missed": missed.item(), "written": written.item()})
    with torch.no_grad():
        if settings.gate_steps:
            scores = torch.cat([logits(part) for part in plain.split(16384)])
            last = scores.topk(max(round(settings.write_rate * len(scores)), 1), dim=0).values[-1]
            gate.out_proj.bias.add_(WriteGate.shut() - last)
        target.in_proj.weight.copy_(gate.in_proj.weight)
        target.in_proj.weight[:, : 2 * width] /= deviation.repeat(2)
        target.in_proj.bias.copy_(gate.in_proj.bias - target.in_proj.weight[:, : 2 * width] @ mean.repeat(2))
        target.out_proj.load_state_dict(gate.out_proj.state_dict())


def _follows(features: Features) -> Tensor:
    """``[N]`` bool: tokens with a token behind them in their stream."""
    inside = torch.zeros(len(features.stream), dtype=torch.bool)
    inside[:-1] = features.stream[:-1] == features.stream[1:]
    return inside


def _before(features: Features, rows: Tensor, taps: int) -> tuple[Tensor, Tensor]:
    """``[n, K]``: each of ``rows`` and the tokens before it, newest first, and which of them are of its stream."""
    around = rows[:, None] - torch.arange(taps)
    inside = around.clamp(min=0)
    return inside, (around >= 0) & (features.stream[inside] == features.stream[rows, None])


class Text(NamedTuple):
    """Pages in order with the facts that are left in them, and what is asked behind them."""

    pages: list[Pages]
    asked: list[AskedFeatures]  # the memory, or what stands in sight, answers
    unknown: list[AskedFeatures]  # nothing does, or the message tells it: what the base says is right
    plain: int  # first token of a stretch of plain text


class Reading:
    """The second stage: keys, queries and read gate, under a write gate that stands.

    A text is a few pages in any order. Its pairs are written, in order, by the model's own scan; then its questions are
    asked.
    """

    def __init__(self, model: SenriForCausalLM, features: Features, settings: FeatureSettings, seed: int) -> None:
        self.model, self.features, self.settings, self.seed = model, features, settings, seed
        self.embedding = model.model.embed_tokens.weight.detach()
        self.ends = {memory.end_token for memory in model.model.memories.values()}
        self.pairs = {i: self._pairs(i, memory) for i, memory in model.model.memories.items()}
        self.by_page: dict[int, list[AskedFeatures]] = {}
        self.messages: dict[int, list[AskedFeatures]] = {}
        self.unrelated: list[AskedFeatures] = []
        for asked in features.asked:
            of_page = self.messages if asked.left_to_base else self.by_page
            (of_page.setdefault(asked.page, []) if asked.page >= 0 else self.unrelated).append(asked)
        self.fact_pages = sorted(self.by_page)
        self.plain_pages = [page for page, facts in enumerate(features.facts) if not facts]
        self.vocabulary, self.place = self._vocabulary()
        self.targets = self.embedding[self.vocabulary]
        stream = features.stream
        ends = torch.arange(len(stream)) + SILENT + 1
        taps = taps_of(model.config.memory_conv_size, model.config.memory_context_size)
        usable = ends < len(stream)
        usable[:taps] = False
        usable &= stream[ends.clamp(max=len(stream) - 1)] == stream
        usable[taps:] &= stream[:-taps] == stream[taps:]
        usable &= features.final_at >= 0
        self.silent = usable.nonzero()[:, 0]
        if not len(self.silent):
            raise TrainingError(
                f"the pages hold no {SILENT + taps} tokens of plain text in a row: raise streams (every third one is "
                "plain), pages or page_size"
            )

    def _vocabulary(self) -> tuple[Tensor, Tensor]:
        """The tokens that the loss is taken over, and the place of each among them (-1: not there)."""
        size = len(self.embedding)
        counts = torch.bincount(self.features.ids, minlength=size)
        for asked in self.features.asked:
            counts[asked.target] += len(self.features.ids)
        chosen = counts.topk(min(max(VOCABULARY, int((counts >= len(self.features.ids)).sum())), size)).indices
        place = torch.full((size,), -1)
        place[chosen] = torch.arange(len(chosen))
        return chosen, place

    @torch.no_grad()
    def _pairs(self, index: int, memory: MemoryAttention) -> list[tuple[Tensor, Tensor]]:
        """Of each page: the tokens that the gate lets through, and how strongly ``[n, H]``."""
        features = self.features
        hidden, size = features.hidden[index], features.page_size
        follows = _follows(features)
        made = []
        for start in range(0, len(features.ids), size):
            rows = torch.arange(start, start + size)
            rows = rows[follows[rows]]
            logits = memory.write_gate(hidden[rows].float(), hidden[rows + 1].float(), features.surprise[rows])
            strength = memory.write_gate.strength(logits)
            some = (strength > 0).any(-1)
            made.append((rows[some], strength[some]))
        return made

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """What learns: ``gates`` (read gates, convolutions, biases by distance) and ``rest``. Not the way of a value
        through the memory: calibration's loses nothing, a learned one serves the tokens that training asked for. Nor,
        with rule ``slot``, how loud it is read and how strictly in order, for the same reason.
        """
        groups: dict[str, list[nn.Parameter]] = {"rest": [], "gates": []}
        stay: tuple[str, ...] = ("write_gate.", "v_proj.", "o_proj.")
        if self.model.config.update_rule == "slot":
            stay = (*stay, "read_gate.", "slot_gate.jump_cost")
        for memory in self.model.model.memories.values():
            for name, parameter in memory.named_parameters():
                if self.settings.learns == "end":
                    groups["gates"] += [parameter] if name.startswith("slot_gate.end_") else []
                elif not name.startswith(stay):
                    quick = name.startswith(("read_gate.", "slot_gate.")) or name.endswith(("_conv", "context.bias"))
                    groups["gates" if quick else "rest"].append(parameter)
        return groups

    def train(
        self,
        show: Show,
        state: dict[str, Any] | None = None,
        save: Save = lambda state: None,
        probe: Callable[[int], None] = lambda step: None,
    ) -> None:
        """All steps, or those that follow a saved ``state``.

        Args:
            save: called every ``save_steps`` with the state to go on from.
            probe: called after each step with its number.

        Raises:
            TrainingError: a loss that is not finite.
        """
        settings, groups = self.settings, self.parameters()
        optimizer = torch.optim.AdamW(
            [
                {"params": groups["rest"], "lr": settings.learning_rate, "weight_decay": settings.weight_decay},
                {"params": groups["gates"], "lr": settings.gate_learning_rate, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.98),
        )
        parameters = [*groups["rest"], *groups["gates"]]
        first = 0
        if state is not None:
            first = state["step"]
            optimizer.load_state_dict(state["optimizer"])
            with torch.no_grad():
                for parameter, value in zip(parameters, state["parameters"], strict=True):
                    parameter.copy_(value)
        warmup = max(min(20, settings.steps // 5), 1)
        rates = (settings.learning_rate, settings.gate_learning_rate)
        for step in range(first, settings.steps):
            factor = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / settings.steps)))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            self.rng = Random(f"{self.seed}/{step}")  # so that going on needs no more than the step
            losses = self.losses([self.draw() for _ in range(settings.texts)])
            loss = losses["answers"] + UNKNOWN_WEIGHT * losses["unknown"] + losses["plain text"]
            if "address" in losses:
                loss = loss + ADDRESS_WEIGHT * losses["address"]
            if not loss.isfinite():
                raise TrainingError(f"the loss of step {step + 1} is not finite: lower the learning rates")
            for parameter, grad in zip(
                parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True
            ):
                parameter.grad = grad
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if (step + 1) % 25 == 0 or step == settings.steps - 1:
                said = {name: part.item() for name, part in losses.items()}
                show({"stage": "reading", "step": step + 1, **said})
            probe(step + 1)
            if (step + 1) % settings.save_steps == 0 or step == settings.steps - 1:
                save(
                    {"step": step + 1, "optimizer": optimizer.state_dict(), "parameters": [p.data for p in parameters]}
                )
        for parameter in parameters:
            parameter.grad = None

    def draw(self) -> Text:
        """A text by chance. From one fact to all: a memory that holds little must be read as surely as a full one."""
        rng, settings, known = self.rng, self.settings, self.features.facts
        told = rng.sample(self.fact_pages, min(rng.randint(1, settings.fact_pages), len(self.fact_pages)))
        pages = told + rng.sample(self.plain_pages, min(rng.randint(0, settings.plain_pages), len(self.plain_pages)))
        rng.shuffle(pages)
        facts = [(page, number) for page in pages for number in range(len(known[page]))]
        questions = [q for page in told for q in self.by_page[page]]
        askable = [(q.page, q.fact) for q in questions if q.fact >= 0]
        count = round(math.exp(rng.uniform(0.0, math.log(len(facts)))))
        kept = {*rng.sample(askable, min(1, len(askable))), *rng.sample(facts, count - 1)}
        last = {known[page][number]: (page, number) for page, number in facts if (page, number) in kept}
        true = set(last.values())  # said once more later, with another value, it is no longer
        asked = [q for q in questions if q.fact < 0 or (q.page, q.fact) in true]
        unknown = [q for q in questions if q.fact >= 0 and known[q.page][q.fact] not in last]
        rng.shuffle(asked)
        some, tokens = [], 0
        for question in asked:
            tokens += len(question.target)
            if tokens > ANSWERS:
                break
            some.append(question)
        unknown = rng.sample(unknown, min(UNKNOWN, len(unknown)))
        unknown += rng.sample(self.unrelated, min(UNRELATED, len(self.unrelated)))
        messages = [q for page in told for q in self.messages.get(page, [])]
        unknown += rng.sample(messages, min(MESSAGES, len(messages)))
        left = [(page, frozenset(number for p, number in kept if p == page)) for page in pages]
        return Text(left, some, unknown, int(self.silent[rng.randrange(len(self.silent))]))

    def losses(self, texts: list[Text]) -> dict[str, Tensor]:
        """In nats a token: ``answers``, their cross entropy; ``unknown``, the divergence from what the base says where
        nothing answers; ``plain text``, by how much the memory changes its cross entropy; and of rule ``slot``
        ``address``: the negative log share that a read gives to the slots which hold the answer's token.
        """
        features = self.features
        finals, targets, kinds = [], [], []
        for text in texts:
            rows = torch.arange(text.plain, text.plain + SILENT)
            asked = [*text.asked, *text.unknown]
            finals.append(torch.cat([*(q.final for q in asked), features.final[features.final_at[rows]]]).float())
            targets.append(torch.cat([*(q.target for q in asked), features.ids[rows + 1]]))
            sizes = [sum(len(q.target) for q in part) for part in (text.asked, text.unknown)]
            of_text = torch.tensor([0, 1, 2]).repeat_interleave(torch.tensor([*sizes, SILENT]))
            place = sizes[0]
            for question in text.unknown:
                stop = place + len(question.target)
                of_text[place:stop][self.given_end(question)] = NEITHER
                place = stop
            kinds.append(of_text)
        added, shares = self.added(texts)
        addressed = [self._addressed(index, texts, of_memory) for index, of_memory in shares.items()]
        final, target, kind = torch.cat(finals), self.place[torch.cat(targets)], torch.cat(kinds)
        weight = (target >= 0).float()
        with_memory = ((final + torch.cat(added)) @ self.targets.T).log_softmax(-1)
        with torch.no_grad():
            without = (final[kind > 0] @ self.targets.T).log_softmax(-1)
        score = with_memory.gather(1, target.clamp(min=0)[:, None])[:, 0]
        plain = kind == 2
        gained = score[plain] - without[kind[kind > 0] == 2].gather(1, target[plain].clamp(min=0)[:, None])[:, 0]
        unknown = kind == 1
        strayed = F.kl_div(with_memory[unknown], without[kind[kind > 0] == 1], log_target=True, reduction="sum")

        def mean(x: Tensor, part: Tensor) -> Tensor:
            return (x * weight[part]).sum() / weight[part].sum().clamp(min=1)

        losses = {
            "answers": mean(-score[kind == 0], kind == 0),
            "unknown": strayed / unknown.sum().clamp(min=1),
            "plain text": mean(-gained, plain),
        }
        if addressed:
            losses["address"] = torch.stack(addressed).mean()
        return losses

    def given_end(self, question: AskedFeatures) -> Tensor:
        """``[A]``: of a question that nothing answers, where its value ends. The value is only given, and ends as every
        one does: there what the base says is not what is right.
        """
        given = torch.zeros(len(question.target), dtype=torch.bool)
        given[-1:] = question.fact >= 0 and not question.left_to_base and int(question.target[-1]) in self.ends
        return given

    def _addressed(self, index: int, texts: list[Text], shares: list[Tensor]) -> Tensor:
        """Mean negative log of the share of each answer token's own slots, or of the end; ``shares`` ``[reads, pairs +
        1]`` a text.
        """
        features, losses = self.features, []
        end = self.model.model.memories[index].end_token
        end = -1 if end is None else end
        for text, share in zip(texts, shares, strict=True):
            left = [self._left(index, page, facts) for page, facts in text.pages]
            rows, strength = (torch.cat(parts) for parts in zip(*left, strict=True))
            ids, before, fact = features.ids[rows], features.ids[(rows - 1).clamp(min=0)], features.fact_of[rows]
            page, first = rows // features.page_size, 0
            for question in text.asked:
                own = (page == question.page) & (fact == question.fact) & (strength > 0).any(-1)
                if question.fact >= 0 and own.any():
                    target = question.target
                    holds = own & (ids == target[:, None])
                    # a value's first token follows on whatever words the fact and the answer begin with
                    holds[1:] &= before == target[:-1, None]
                    holds = torch.cat([holds, target[:, None] == end], 1)
                    asked = holds.any(1)
                    found = (share[first : first + len(target)] * holds).sum(1)
                    losses.append(-found[asked].clamp(min=1e-6).log())
                first += len(question.target)
        return torch.cat(losses).mean() if losses and sum(map(len, losses)) else shares[0].sum() * 0

    def _left(self, index: int, page: int, facts: frozenset[int]) -> tuple[Tensor, Tensor]:
        """A page's written tokens and their strength without those of facts that are left out; behind each run of
        them one that is not written, for that is what ends it.
        """
        rows, strength = self.pairs[index][page]
        fact = self.features.fact_of[rows]
        kept = (fact < 0) | torch.isin(fact, torch.tensor(sorted(facts), dtype=fact.dtype))
        rows, strength = rows[kept], strength[kept]
        ends = F.pad(rows[1:] != rows[:-1] + 1, (0, min(len(rows), 1)), value=True)
        twice = torch.arange(len(rows)).repeat_interleave(1 + ends.long())
        end = torch.zeros(len(twice), 1, dtype=torch.bool)
        end[1:, 0] = twice[1:] == twice[:-1]
        return rows[twice], strength[twice].masked_fill(end, 0.0)

    def added(self, texts: list[Text]) -> tuple[list[Tensor], dict[int, list[Tensor]]]:
        """What all memories together add, ``[n, hidden]`` a text, and of rule ``slot`` each one's shares: see
        :meth:`reads`.
        """
        total: list[Tensor] = []
        shares: dict[int, list[Tensor]] = {}
        for index, memory in self.model.model.memories.items():
            reads, of_memory = self.reads(index, memory, texts)
            total = [a + b for a, b in zip(total, reads, strict=True)] if total else reads
            if of_memory is not None:
                shares[index] = of_memory
        return total, shares

    @staticmethod
    def _queries(memory: MemoryAttention, asking: list[list[Tensor]], missing: list[list[int]]) -> list[Tensor]:
        """``[n, H * D]`` of each text, whose parts ``[K - 1 + T, hidden]`` stand one behind the other.

        Parts side by side, padded at the end: gathering for each position what it sees took a sixth of a step.
        """
        before, made = memory.taps - 1, {}
        for long in (False, True):  # questions, and stretches of plain text
            places = [
                (i, j)
                for i, parts in enumerate(asking)
                for j, part in enumerate(parts)
                if (len(part) - before > before) == long
            ]
            if not places:
                continue
            parts = [asking[i][j].float() for i, j in places]
            lengths = torch.tensor([len(part) for part in parts])[:, None]
            steps = torch.arange(int(lengths.max()))
            valid = (steps >= torch.tensor([missing[i][j] for i, j in places])[:, None]) & (steps < lengths)
            of_parts = memory.over("q", nn.utils.rnn.pad_sequence(parts, batch_first=True), valid)
            for place, part, own in zip(places, parts, of_parts, strict=True):
                made[place] = own[: len(part) - before]
        return [torch.cat([made[i, j] for j in range(len(parts))]) for i, parts in enumerate(asking)]

    def reads(self, index: int, memory: MemoryAttention, texts: list[Text]) -> tuple[list[Tensor], list[Tensor] | None]:
        """What the memory adds at each text's answer tokens and plain tokens, ``[n, hidden]`` a text; and of rule
        ``slot`` the share that each read has of each pair, and of the end, ``[n, pairs + 1]`` a text.
        """
        features, hidden, taps = self.features, self.features.hidden[index], memory.taps
        pairs: list[list[Tensor]] = []
        tokens: list[Tensor] = []  # of each text, at which it reads
        asking: list[list[Tensor]] = []  # of each text, inputs of its questions and its plain text, with those before
        missing: list[list[int]] = []  # of each of these how many are no tokens
        for text in texts:
            left = [self._left(index, page, facts) for page, facts in text.pages]
            pairs.append([torch.cat(parts) for parts in zip(*left, strict=True)])
            questions = [*text.asked, *text.unknown]
            plain = hidden[text.plain - taps + 1 : text.plain + SILENT]
            asking.append([*(q.hidden[index] for q in questions), plain])
            missing.append([*(q.missing for q in questions), 0])
            tokens.append(torch.cat([*(q.at for q in questions), features.ids[text.plain : text.plain + SILENT]]))
        queries = self._queries(memory, asking, missing)
        sizes = [len(of_text) for of_text in queries]
        key_rows, inside = _before(features, torch.cat([rows for rows, _ in pairs]), taps)
        needed, places = key_rows.unique(return_inverse=True)
        counts = [len(rows) for rows, _ in pairs]
        keys = memory.address("k", hidden[needed].float(), places, inside).split(counts)
        most, reads = max(*counts, 1), max(sizes)
        beta = torch.zeros(len(texts), most, memory.num_key_value_heads)
        mask = torch.zeros(len(texts), most, dtype=torch.bool)
        q_rows, k_rows, v_rows = [], [], []
        for i, (rows, strength) in enumerate(pairs):
            behind = (0, 0, 0, most - len(rows))
            k_rows.append(F.pad(keys[i], behind))
            v_rows.append(F.pad(memory.embedded(features.ids[rows], self.embedding), behind))
            q_rows.append(F.pad(queries[i], (0, 0, 0, reads - sizes[i])))
            beta[i, : len(rows)], mask[i, : len(rows)] = strength, True
        k_all = torch.stack(k_rows)
        # as many slots as pairs: none is given up
        empty = memory.empty_memory(len(texts), num_slots=most, training=memory.training)
        _, state = memory.write_and_read(
            k_all.new_zeros(*k_all.shape[:2], 0), k_all, torch.stack(v_rows), empty, beta=beta, mask=mask
        )
        q_all = torch.stack(q_rows)
        now = torch.zeros(len(texts), reads, hidden.shape[1])
        for i, (size, parts) in enumerate(zip(sizes, asking, strict=True)):
            now[i, :size] = torch.cat([part[taps - 1 :] for part in parts])
        end_value = memory.end_value(self.embedding)
        if state.slots is None:
            out = memory.read_out(now, memory.read_all(q_all, now, state))
            return [out[i, :size] for i, size in enumerate(sizes)], None
        # beside its value each slot holds its number; behind them all stands the end's
        numbers = torch.eye(most + 1, most).expand(*state.M.shape[:2], -1, -1)
        state = state._replace(M=torch.cat([state.M, numbers], -2))
        if end_value is not None:
            end_value = torch.cat(
                [end_value, numbers.new_zeros(len(end_value), most), torch.ones(len(end_value), 1)], 1
            )
        said = memory.embedded(nn.utils.rnn.pad_sequence(tokens, batch_first=True), self.embedding)
        said = F.pad(said.unflatten(-1, (-1, memory.head_dim)), (0, most + 1))
        found = memory.read_all(q_all, now, state, said, end_value)
        out, share = memory.read_out(now, found[..., : memory.head_dim]), found[..., memory.head_dim :]
        added = [out[i, :size] for i, size in enumerate(sizes)]
        ended = share[..., -1:].mean(2)
        written = ((beta > 0) & mask[..., None]).transpose(1, 2)  # [texts, memories, pairs]
        slot = most - written.sum(-1, keepdim=True) + written.cumsum(-1) - 1  # what was written last stands last
        groups = memory.num_heads // memory.num_key_value_heads
        slot, held = (x.repeat_interleave(groups, 1)[:, None] for x in (slot.clamp(min=0), written))
        share = (share.gather(-1, slot.expand(*share.shape[:3], -1)) * held).mean(2)
        return added, [torch.cat([share[i, :size, : counts[i]], ended[i, :size]], -1) for i, size in enumerate(sizes)]
