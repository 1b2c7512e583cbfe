"""Needle and multi-key recall: facts hidden in filler text, and one question about them at the end.

Prompts are put together from token ids, so that any tokenizer gives the exact length asked for; a model with a chat
template gets them as a user's message. An answer counts when every one of its tokens is the likeliest after the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .errors import UserError

NAMES = (
    "Anna Ben Clara David Emma Felix Grace Henry Iris James Kate Leo Mary Noah Olive Paul Rosa Sam Tom Vera Will Alice "
    "Bob Carol Edward Frank George Helen John Jane Lucy Mark Peter Ruth Sarah Simon"
).split()
STATEMENT, QUESTION = " The secret number of {name} is {value}. ", "\n\nWhat is the secret number of {name}?"
FILLER = (
    "The river bends twice before it reaches the mill, and in spring the meadow beside it stands under water. "
    "Nobody in the village remembers who built the bridge. On market days the carts come early, and by noon the square "
    "is loud with voices. The baker closes his shop when the last loaf is gone. In the evening the lamps are lit one "
    "after another along the street. A letter takes three days to the coast, longer when it snows. The teacher keeps "
    "a list of the birds that nest in the tower, and the children add to it. Some of the fields lie fallow this year. "
    "The road over the hill is shorter, but the one through the forest stays dry. Old tools hang in the barn, each on "
    "its own nail. When the wind turns to the north, the fishermen stay at home and mend their nets. The clock at the "
    "town hall has been slow since the autumn. Visitors ask for the garden, which is open on two days of the week. "
)


class Prompt(NamedTuple):
    """ids: prompt and answer, ``length`` + 1 tokens. answer: how many of the last ones are the answer."""

    ids: list[int]
    answer: int


def frame(tokenizer) -> tuple[list[int], list[int], str]:
    """(ids before a question, ids after it, what the answer begins with): a chat turn, or plain text."""
    mark = "\u2029mark\u2029"
    if tokenizer.has_chat_template:
        text = tokenizer.apply_chat_template([dict(role="user", content=mark)], add_generation_prompt=True)
        before, found, after = text.partition(mark)
        if found:
            encode = lambda part: tokenizer.encode(part, add_special_tokens=False) if part else []
            return encode(before), encode(after), ""
    return tokenizer.encode("\n"), tokenizer.encode("\nAnswer:", add_special_tokens=False), " "


def prompt(tokenizer, length: int, depth: float, keys: int, rng: np.random.Generator, filler: Sequence[int]) -> Prompt:
    """A Prompt of ``length`` + 1 tokens whose asked fact stands ``depth`` (0 to 1) of the way in, among ``keys`` facts.

    ``filler``: token ids to hide them in, read in a circle from a random place. Raises UserError when it does not fit.
    """
    if not 1 <= keys <= len(NAMES):
        raise UserError(f"--keys must lie in 1..{len(NAMES)}, not {keys}")
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
    before, after, lead = frame(tokenizer)
    names = rng.choice(NAMES, keys, replace=False)
    values = ["".join(map(str, rng.integers(0, 10, 4))) for _ in names]
    facts = [encode(STATEMENT.format(name=n, value=v)) for n, v in zip(names, values, strict=True)]
    question, answer = encode(QUESTION.format(name=names[0])), encode(lead + values[0])
    free = length + 1 - len(before) - sum(map(len, facts)) - len(question) - len(after) - len(answer)
    if free < 1:
        raise UserError(
            f"a prompt of {length} tokens is too short for {keys} facts and a question by {1 - free} tokens"
        )
    at = int(rng.integers(len(filler)))
    text = np.resize(np.roll(filler, -at), free).tolist()
    # The asked fact is first in ``facts``; others fall anywhere.
    cuts = [round(depth * free), *rng.integers(0, free + 1, keys - 1).tolist()]
    out, last = list(before), 0
    for i in sorted(range(keys), key=lambda i: cuts[i]):
        out += text[last : cuts[i]] + facts[i]
        last = cuts[i]
    return Prompt([*out, *text[last:], *question, *after, *answer], len(answer))


def rows(tokenizer, length: int, depths: Sequence[float], keys: int, trials: int, seed: int, filler: Sequence[int]):
    """(ids int32 [N, length + 1], answer mask bool [N, length], depth of each row [N]), ``trials`` rows a depth."""
    ids, masks, at = [], [], []
    for depth in depths:
        for trial in range(trials):
            rng = np.random.default_rng([seed, length, keys, round(depth * 1000), trial])
            made = prompt(tokenizer, length, depth, keys, rng, filler)
            ids.append(made.ids)
            masks.append(np.arange(length) >= length - made.answer)
            at.append(depth)
    return np.array(ids, np.int32), np.array(masks), np.array(at)
