"""The text that `tinkercloud/nano` is trained on: short chats, sums and little stories, drawn from a seeded generator.

A document is either a chat (its assistant turns are learned) or plain text (all of it is learned). The same seed gives
the same documents for ever; `HELD_OUT` pairs of summands never occur, so that accuracy can be measured on sums that
the model has not seen.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nano_facts import (
    ADJECTIVES,
    CAPITALS,
    COLOUR_OF,
    COLOURS,
    COMMON_WORDS,
    DAYS,
    GROUPS,
    MONTHS,
    NAMES,
    NUMBER_WORDS,
    OPPOSITES,
    PLACES,
    SOUND_OF,
    SPELLED,
    THINGS,
)

Turns = list[tuple[str, str]]
"""(what the user says, what the assistant answers), in order."""

LARGEST_SUMMAND = 100
HELD_OUT_SHARE = 0.1


def _held_out_pairs() -> frozenset[tuple[int, int]]:
    """A tenth of the pairs (x, y) in which a summand has two digits or more, in both orders."""
    summands = range(LARGEST_SUMMAND + 1)
    pairs = [(x, y) for y in summands for x in range(y + 1) if y > 9]
    chosen = random.Random(0).sample(pairs, round(len(pairs) * HELD_OUT_SHARE))
    return frozenset(chosen) | {(y, x) for x, y in chosen}


HELD_OUT = _held_out_pairs()


@dataclass(frozen=True)
class Document:
    """One training text: a chat of `turns`, or plain `text`."""

    turns: tuple[tuple[str, str], ...] = ()
    system: str = ""
    thinking_block: bool = False
    """Answer after an empty <think> block, as clients that switch thinking off prompt it."""
    text: str = ""


# ---------------------------------------------------------------- sums


ONE_DIGIT, TWO_DIGITS, TENS, ANY = range(10), range(10, 100), range(10, 100, 10), range(LARGEST_SUMMAND + 1)
LESSONS = (
    (ONE_DIGIT, ONE_DIGIT, 4),
    (TENS, TENS, 1),
    (TWO_DIGITS, ONE_DIGIT, 2),
    (ONE_DIGIT, TWO_DIGITS, 1),
    (TWO_DIGITS, TWO_DIGITS, 6),
    (ANY, ANY, 2),
)
"""(first summands, second summands, how often): the easy ones are the steps by which the hard ones are learned."""


def summands(rng: random.Random) -> tuple[int, int]:
    """A pair that may be trained on."""
    while True:
        first, second, _ = rng.choices(LESSONS, [weight for *_, weight in LESSONS])[0]
        pair = rng.choice(first), rng.choice(second)
        if pair not in HELD_OUT:
            return pair


def _sum_turn(rng: random.Random) -> tuple[str, str]:
    x, y = summands(rng)
    question = rng.choices(
        (
            f"What is {x} + {y}?",
            f"{x} + {y} =",
            f"What is {x} plus {y}?",
            f"Add {x} and {y}.",
            f"Calculate {x} + {y}.",
            f"How much is {x} + {y}?",
        ),
        (10, 2, 1, 1, 1, 1),
    )[0]
    kind = rng.random()
    if kind < 0.06:
        return question + " Write the answer inside \\boxed{}.", f"\\boxed{{{x + y}}}"
    if kind < 0.12:
        return question, f"{x} + {y} = {x + y}"
    if kind < 0.18:
        return question, f"The answer is {x + y}."
    return question, str(x + y)


def _sums(rng: random.Random) -> Turns:
    return [_sum_turn(rng) for _ in range(rng.choices((1, 2, 3, 4), (3, 4, 2, 1))[0])]


# ---------------------------------------------------------------- chats


def _article(word: str) -> str:
    return ("an " if word[0] in "aeiou" else "a ") + word


def _greeting(rng: random.Random) -> Turns:
    hello = rng.choice(("Hello!", "Hi!", "Hello", "Hi there!", "Good morning!", "Hey!"))
    turns = [(hello, rng.choice(("Hello! How can I help you?", "Hi! What can I do for you?")))]
    if rng.random() < 0.4:
        turns.append(("How are you?", "I am fine, thank you. How are you?"))
    if rng.random() < 0.3:
        turns.append((rng.choice(("Thank you!", "Thanks!")), "You are welcome!"))
    if rng.random() < 0.3:
        turns.append((rng.choice(("Goodbye!", "Bye!")), "Goodbye! Have a nice day."))
    return turns


def _who(rng: random.Random) -> Turns:
    return [
        rng.choice(
            (
                ("Who are you?", "I am nano, a very small language model."),
                ("What is your name?", "My name is nano."),
                ("What can you do?", "I can chat a little, add small numbers and tell short stories."),
                ("Are you a person?", "No, I am a very small language model."),
            )
        )
    ]


def _my_name(rng: random.Random) -> Turns:
    name = rng.choice(NAMES)
    turns = [
        (rng.choice((f"My name is {name}.", f"I am {name}.", f"Hi, I am {name}!")), f"Nice to meet you, {name}!"),
        ("What is my name?", f"Your name is {name}."),
    ]
    if rng.random() < 0.3:
        turns.insert(1, _sum_turn(rng))
    return turns


def _favourite(rng: random.Random) -> Turns:
    colour = rng.choice(COLOURS)
    return [
        (f"My favourite colour is {colour}.", f"{colour.capitalize()} is a nice colour."),
        ("What is my favourite colour?", f"Your favourite colour is {colour}."),
    ]


def _capital(rng: random.Random) -> Turns:
    country, capital = rng.choice(tuple(CAPITALS.items()))
    return [
        rng.choice(
            (
                (f"What is the capital of {country}?", f"The capital of {country} is {capital}."),
                (f"What is the capital of {country}?", f"The capital of {country} is {capital}."),
                (f"Which country is {capital} in?", f"{capital} is in {country}."),
            )
        )
    ]


def _colour(rng: random.Random) -> Turns:
    thing, colour = rng.choice(tuple(COLOUR_OF.items()))
    return [(f"What colour is {thing}?", f"{thing[0].upper()}{thing[1:]} is {colour}.")]


def _sound(rng: random.Random) -> Turns:
    animal, sound = rng.choice(tuple(SOUND_OF.items()))
    return [(f"What does {_article(animal)} say?", f"{_article(animal).capitalize()} says {sound}.")]


def _opposite(rng: random.Random) -> Turns:
    word, opposite = rng.choice(tuple(OPPOSITES.items()))
    return [(f"What is the opposite of {word}?", f"The opposite of {word} is {opposite}.")]


def _calendar(rng: random.Random) -> Turns:
    cycle, what = rng.choice(((DAYS, "day"), (MONTHS, "month")))
    i = rng.randrange(len(cycle))
    step, word = rng.choice(((1, "after"), (-1, "before")))
    other = cycle[(i + step) % len(cycle)]
    return [(f"Which {what} comes {word} {cycle[i]}?", f"{other} comes {word} {cycle[i]}.")]


def _repeat(rng: random.Random) -> Turns:
    words = " ".join(rng.choice(COMMON_WORDS) for _ in range(rng.randint(1, 5)))
    return [(rng.choice((f"Repeat after me: {words}", f"Say: {words}")), words)]


def _count(rng: random.Random) -> Turns:
    start = rng.randint(0, 20)
    numbers = range(start, start + rng.randint(2, 7))
    return [(f"Count from {start} to {numbers[-1]}.", ", ".join(map(str, numbers)))]


def _spell(rng: random.Random) -> Turns:
    word = rng.choice(SPELLED)
    return [
        rng.choice(
            (
                (f"Spell the word {word}.", "-".join(word)),
                (f"What is the first letter of {word}?", f"The first letter of {word} is {word[0]}."),
                (f"How many letters has {word}?", f"The word {word} has {NUMBER_WORDS[len(word)]} letters."),
            )
        )
    ]


def _group(rng: random.Random) -> Turns:
    group, members = rng.choice(tuple(GROUPS.items()))
    number = rng.randint(2, 4)
    named = rng.sample(members, number)
    return [(f"Name {NUMBER_WORDS[number]} {group}.", ", ".join(named[:-1]) + f" and {named[-1]}.")]


def _is_it(rng: random.Random) -> Turns:
    group, other = rng.sample([name for name in GROUPS if name not in ("colours", "drinks")], 2)
    thing = rng.choice(GROUPS[group])
    if rng.random() < 0.5:
        return [(f"Is {_article(thing)} {_article(group[:-1])}?", f"Yes, {_article(thing)} is {_article(group[:-1])}.")]
    return [(f"Is {_article(thing)} {_article(other[:-1])}?", f"No, {_article(thing)} is {_article(group[:-1])}.")]


def _tell(rng: random.Random) -> Turns:
    animal = rng.choice(GROUPS["animals"])
    request = rng.choice(
        (f"Tell me a story about {_article(animal)}.", f"Write a short story about {_article(animal)}.")
    )
    return [(request, story(rng, animal, sentences=rng.randint(3, 4)))]


ABILITIES: dict[str, tuple[Callable[[random.Random], Turns], float]] = {
    "greeting": (_greeting, 1),
    "identity": (_who, 1),
    "name": (_my_name, 2),
    "favourite": (_favourite, 1),
    "capital": (_capital, 2),
    "colour": (_colour, 1),
    "sound": (_sound, 1),
    "opposite": (_opposite, 1.5),
    "calendar": (_calendar, 2),
    "repeat": (_repeat, 6),
    "count": (_count, 2),
    "spell": (_spell, 2),
    "group": (_group, 1),
    "is it": (_is_it, 1.5),
    "story": (_tell, 1),
    "sums": (_sums, 3),
}
"""Every kind of chat: how it is drawn, and how often in relation to the others."""

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are nano, a small and friendly assistant.",
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "You answer questions.",
    "Be kind and brief.",
)


def chat(rng: random.Random) -> Document:
    """A chat of one kind or several, now and then with a system prompt."""
    kinds, weights = zip(*ABILITIES.values(), strict=True)
    turns = [turn for kind in rng.choices(kinds, weights, k=rng.choice((1, 1, 1, 2))) for turn in kind(rng)]
    return Document(
        turns=tuple(turns),
        system=rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.3 else "",
        thinking_block=rng.random() < 0.1,
    )


# ---------------------------------------------------------------- plain text


def story(rng: random.Random, animal: str, sentences: int) -> str:
    """A tale of an animal, a friend, a place and a thing: an opening, `sentences` events and an end."""
    name, friend = rng.sample(NAMES, 2)
    place, far = rng.sample(PLACES, 2)
    thing = rng.choice(THINGS)
    adjective = rng.choice(ADJECTIVES)
    hero = f"the {animal}"
    opening = rng.choice(
        (
            f"Once upon a time, there was {_article(adjective)} {animal} named {name}. {name} lived near {place}.",
            f"Once upon a time, {_article(adjective)} {animal} lived near {place}. The name of {hero} was {name}.",
            f"There once was {_article(animal)} named {name} who lived near {place}. {name} was very {adjective}.",
        )
    )
    events = [
        f"One day, {name} found {_article(thing)} near {far}.",
        f"{name} went to {far} to look for food.",
        f"On the way, {hero} met a friend named {friend}.",
        f'"Can you help me?" asked {friend}. "Yes, I can," said {name}.',
        f"It was a {rng.choice(('sunny', 'rainy', 'cold', 'warm', 'windy'))} day, and {name} felt {adjective}.",
        f"{name} and {friend} played together until the sun went down.",
        f"{friend} gave {name} {_article(thing)}.",
        f"{name} was lost, but {friend} knew the way home.",
        f"They walked from {far} to {place} and sang a song.",
        f"In the evening, they ate {rng.choice(GROUPS['fruits'])} cake and drank {rng.choice(GROUPS['drinks'])}.",
    ]
    end = rng.choice(
        (
            f"{name} was very happy and went home to sleep.",
            f"From that day on, {name} and {friend} were best friends.",
            "And they lived happily ever after.",
            f"At night, {hero} looked at the stars and smiled.",
        )
    )
    chosen = sorted(rng.sample(range(len(events)), sentences))
    return " ".join([opening, *(events[i] for i in chosen), end])


def _facts(rng: random.Random) -> str:
    sentences = [
        rng.choice((_capital, _colour, _sound, _opposite, _calendar))(rng)[0][1] for _ in range(rng.randint(2, 5))
    ]
    return " ".join(sentences)


def _sum_lines(rng: random.Random) -> str:
    return "\n".join(f"{x} + {y} = {x + y}" for x, y in (summands(rng) for _ in range(rng.randint(3, 10))))


def plain(rng: random.Random) -> Document:
    """A story, some facts, or lines of sums."""
    kind = rng.random()
    if kind < 0.5:
        return Document(text=story(rng, rng.choice(GROUPS["animals"]), sentences=rng.randint(3, 7)))
    if kind < 0.8:
        return Document(text=_facts(rng))
    return Document(text=_sum_lines(rng))


def documents(seed: int) -> Iterator[Document]:
    """Documents without end, three chats to one plain text."""
    rng = random.Random(seed)
    while True:
        yield chat(rng) if rng.random() < 0.75 else plain(rng)
