"""Conversations that a seed decides: who asks what in which turn. What the model answers becomes part of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from sagellm_common.client.text import Tokenizer

PERSONAS = (
    (
        "a patient teacher",
        "explain each step in plain words, give one example from daily life, and end with a question",
    ),
    (
        "a travel guide",
        "name places and distances, warn of bad weather, and prefer trains to cars wherever it makes sense",
    ),
    ("a careful cook", "list what is needed first, mention what may be left out, and never forget how long it takes"),
    (
        "a software engineer",
        "answer in short sentences, name the trade-off, and say what you would measure before deciding",
    ),
)
RULES = (
    "Answer in the language of the question.",
    "Say so when you do not know something, and do not guess numbers.",
    "Keep an answer under eighty words unless you are asked for more.",
    "Do not repeat the question, and do not apologise.",
    "When a question has two parts, answer both, in the order in which they were asked.",
    "Use the metric system, dates in full, and no abbreviations that a child would not know.",
    "If somebody thanks you, answer briefly and ask what comes next.",
    "Never invent the name of a person, a book, a place or a product.",
)
TOPICS = (
    *("the tides", "a sourdough bread", "the night train to Lisbon", "a binary search tree", "the water cycle"),
    *("a rainy weekend in Bergen", "lentil soup", "a slow database query", "photosynthesis", "the old harbour"),
    *("pancakes without eggs", "a memory leak", "the phases of the moon", "the ferry timetable", "roasted carrots"),
)
OPENINGS = (
    "I have an hour and know nothing about {topic}. Where should I begin, and what can I safely ignore at first?",
    "A friend of mine told me about {topic} yesterday. What is the one thing about it that most people get wrong?",
    "Please help me with {topic}: what do I need before I start, and how do I notice that something went wrong?",
)
FOLLOW_UPS = (
    "That helps. Now tell me more about the second thing you said, with a little more detail this time.",
    "Why is that so? I would like to understand the reason, not only the rule.",
    "And what would you do differently if there were only half as much time?",
    "Can you compare that with {topic}? What do the two have in common?",
    "Thank you. Which of these would you try first, and how long would it take?",
)


@dataclass(frozen=True, slots=True)
class User:
    """Who shares a persona shares the beginning of the prompt."""

    system: str
    questions: tuple[str, ...]


def users(count: int, turns: int, seed: int) -> list[User]:
    rng = random.Random(seed)
    found = []
    for n in range(count):
        who, how = PERSONAS[n % len(PERSONAS)]
        system = " ".join([f"You are {who}. In every answer {how}.", *RULES])
        asked = [rng.choice(OPENINGS), *(rng.choice(FOLLOW_UPS) for _ in range(turns - 1))]
        found.append(User(system, tuple(question.format(topic=rng.choice(TOPICS)) for question in asked)))
    return found


class Conversation:
    """One user's token ids, turn by turn: a prompt is the last one, its answer as it was generated, and what follows.

    Nothing is tokenised twice, so each turn continues exactly the KV that the turn before has left.
    """

    _ANSWER = "\ufdd0"
    """No character: it cannot be in a template."""

    def __init__(self, user: User, tokenizer: Tokenizer) -> None:
        self._user = user
        self._tokenizer = tokenizer
        self._token_ids: list[int] = []
        self._turn = 0

    def ask(self) -> list[int]:
        """The prompt of the next turn."""
        question = {"role": "user", "content": self._user.questions[self._turn]}
        if self._turn == 0:
            text = self._tokenizer.render_chat([{"role": "system", "content": self._user.system}, question])
        else:
            before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": self._ANSWER}]
            text = self._tokenizer.render_chat([*before, question]).partition(self._ANSWER)[2]
        self._token_ids += self._tokenizer.encode(text, add_special_tokens=False).tolist()
        self._turn += 1
        return list(self._token_ids)

    def answered(self, token_ids: Sequence[int]) -> None:
        self._token_ids += token_ids
