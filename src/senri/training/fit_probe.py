"""What a memory that is trained on features answers on pages that it does not learn from."""

from __future__ import annotations

from random import Random

import torch

from senri.training.fit import Reading

# Answers that are counted: of all facts and of those told again, and those in the chat format that end behind their
# value; and those that the memory should leave to the base: to facts that were not told, to what no page answers, and
# to messages that tell a fact themselves.
RIGHT, LEFT_ALONE = ("right", "overwritten", "ended"), ("untold", "unrelated", "messages")
PLAIN, VALUES = "plain tokens written", "value tokens written"


@torch.no_grad()
def count_answers(reading: Reading, texts: int, seed: int) -> dict[str, tuple[int, int]]:
    """Good and all, of answers by kind and of the tokens written.

    An answer is right when every token of its value is the most probable one behind the right ones before it; a chat
    turn is ended when behind the right value its full stop and its end are; it is left alone when every token that the
    base would say still is.

    Args:
        reading: of held-out pages; its memories as they are by now.
        texts: put together from the pages, as training's are.
        seed: of these texts.
    """
    count = {name: [0, 0] for name in (*RIGHT, *LEFT_ALONE)}
    for number in range(texts):
        reading.rng = Random(f"{seed}/{number}")
        text = reading.draw()
        questions = [*text.asked, *text.unknown]
        ((added,), _), sizes = reading.added([text]), [len(question.target) for question in questions]
        for place, (question, more) in enumerate(zip(questions, added[: sum(sizes)].split(sizes), strict=True)):
            final = question.final.float()
            now, before = ((x @ reading.embedding.T).argmax(-1) for x in (final + more, final))
            if place >= len(text.asked):
                kind = "untold" if not question.left_to_base else "messages" if question.page >= 0 else "unrelated"
                kinds, good = [kind], bool((now == before)[~reading.given_end(question)].all())
            elif question.fact < 0:
                continue
            else:
                facts = reading.features.facts[question.page]
                kinds = ["right", *(["overwritten"] if facts.count(facts[question.fact]) > 1 else [])]
                hit, behind = now == question.target, len(question.target) - 2  # the full stop, and the answer's end
                good = bool(hit[:behind].all())
                if int(question.target[-1]) in reading.ends:
                    count["ended"][0] += bool(hit[behind:].all())
                    count["ended"][1] += 1
            for kind in kinds:
                count[kind][0] += good
                count[kind][1] += 1
    for name, mask in ((PLAIN, reading.features.write == 0), (VALUES, reading.features.write == 1)):
        written = torch.zeros_like(mask)
        for pairs in reading.pairs.values():
            written[torch.cat([rows for rows, _ in pairs])] = True
        count[name] = [int((written & mask).sum()), int(mask.sum())]
    return {name: (good, total) for name, (good, total) in count.items()}
