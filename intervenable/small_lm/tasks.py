"""The three tasks that the shipped language model knows, and what it never saw while it learned them.

The grammar has one home: the training script writes its text from these tables, and tests, tutorials and the
model card take held-out prompts from the same functions. What "held out" means, task by task:

- facts: `(country, phrasing)` pairs. In each direction a country is held out of every fifth phrasing, and
  seen in the others; each phrasing is seen with four fifths of the countries.
- indirect objects: unordered pairs of names, and pairs of place and object. Training sentences contain no
  held-out pair of either kind, held-out sentences contain one of both.
- prices: brackets `(low, high)`. Training never shows a held-out bracket, with any amount.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from typing import NamedTuple

CAPITALS: dict[str, str] = {
    "Afghanistan": "Kabul",
    "Albania": "Tirana",
    "Algeria": "Algiers",
    "Angola": "Luanda",
    "Armenia": "Yerevan",
    "Australia": "Canberra",
    "Austria": "Vienna",
    "Azerbaijan": "Baku",
    "Bahrain": "Manama",
    "Bangladesh": "Dhaka",
    "Belarus": "Minsk",
    "Belgium": "Brussels",
    "Botswana": "Gaborone",
    "Brazil": "Brasilia",
    "Bulgaria": "Sofia",
    "Cameroon": "Yaounde",
    "Canada": "Ottawa",
    "Chile": "Santiago",
    "China": "Beijing",
    "Colombia": "Bogota",
    "Croatia": "Zagreb",
    "Cuba": "Havana",
    "Cyprus": "Nicosia",
    "Denmark": "Copenhagen",
    "Ecuador": "Quito",
    "Egypt": "Cairo",
    "Estonia": "Tallinn",
    "Fiji": "Suva",
    "Finland": "Helsinki",
    "France": "Paris",
    "Germany": "Berlin",
    "Ghana": "Accra",
    "Greece": "Athens",
    "Hungary": "Budapest",
    "Iceland": "Reykjavik",
    "Indonesia": "Jakarta",
    "Iran": "Tehran",
    "Iraq": "Baghdad",
    "Ireland": "Dublin",
    "Italy": "Rome",
    "Jamaica": "Kingston",
    "Japan": "Tokyo",
    "Kazakhstan": "Astana",
    "Kenya": "Nairobi",
    "Laos": "Vientiane",
    "Latvia": "Riga",
    "Lebanon": "Beirut",
    "Liberia": "Monrovia",
    "Libya": "Tripoli",
    "Lithuania": "Vilnius",
    "Malawi": "Lilongwe",
    "Mali": "Bamako",
    "Malta": "Valletta",
    "Mongolia": "Ulaanbaatar",
    "Morocco": "Rabat",
    "Mozambique": "Maputo",
    "Namibia": "Windhoek",
    "Nepal": "Kathmandu",
    "Nicaragua": "Managua",
    "Nigeria": "Abuja",
    "Norway": "Oslo",
    "Oman": "Muscat",
    "Pakistan": "Islamabad",
    "Paraguay": "Asuncion",
    "Peru": "Lima",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
    "Qatar": "Doha",
    "Romania": "Bucharest",
    "Russia": "Moscow",
    "Rwanda": "Kigali",
    "Senegal": "Dakar",
    "Serbia": "Belgrade",
    "Slovakia": "Bratislava",
    "Slovenia": "Ljubljana",
    "Spain": "Madrid",
    "Sweden": "Stockholm",
    "Switzerland": "Bern",
    "Syria": "Damascus",
    "Tanzania": "Dodoma",
    "Thailand": "Bangkok",
    "Tunisia": "Tunis",
    "Turkey": "Ankara",
    "Uganda": "Kampala",
    "Ukraine": "Kyiv",
    "Uruguay": "Montevideo",
    "Uzbekistan": "Tashkent",
    "Venezuela": "Caracas",
    "Vietnam": "Hanoi",
    "Yemen": "Sanaa",
    "Zambia": "Lusaka",
    "Zimbabwe": "Harare",
}
"""Country to capital; every name is one word, so that it is one token."""

# Several phrasings of each direction begin with the name: a name without its leading space is a token of its
# own, and a country held out of one of them must still have met that token in another.
CAPITAL_PHRASINGS: tuple[str, ...] = (
    "The capital of {country} is",
    "What is the capital of {country}? It is",
    "{country}'s capital is",
    "The capital city of {country} is",
    "{country} has a capital called",
    "She flew to {country} and stayed in its capital,",
    "Question: which city is the capital of {country}? Answer:",
    "{country} is governed from its capital,",
    "If you live in {country}, then your capital is",
    "{country} is a country with the capital",
)
"""Prompts that a capital completes."""

COUNTRY_PHRASINGS: tuple[str, ...] = (
    "{capital} is the capital of",
    "Which country has the capital {capital}? It is",
    "{capital} is the capital city of",
    "The city of {capital} is the capital of",
    "{capital} lies in the country of",
    "She stayed in {capital}, the capital of",
    "Question: {capital} is the capital of which country? Answer:",
)
"""Prompts that a country completes."""

NAMES: tuple[str, ...] = (
    *("Aaron", "Adam", "Alice", "Amy", "Andrew", "Anna", "Arthur", "Ben", "Brian", "Carl", "Carol"),
    *("Charles", "Clara", "Daniel", "David", "Diana", "Edward", "Ella", "Emily", "Emma", "Eric"),
    *("Frank", "Fred", "George", "Grace", "Greg", "Hannah", "Harry", "Helen", "Henry", "Jack"),
    *("James", "Jane", "Jason", "John", "Julia", "Karen", "Kate", "Kevin", "Laura", "Leo", "Lisa"),
    *("Louis", "Lucy", "Luke", "Mark", "Martin", "Mary", "Max", "Michael", "Nancy", "Nina"),
    *("Oliver", "Oscar", "Paul", "Peter", "Rachel", "Richard", "Robert", "Rose", "Ruth", "Sam"),
    *("Sarah", "Simon", "Susan", "Thomas", "Tom", "Walter"),
)
"""First names, each one token."""

PLACES: tuple[str, ...] = (
    *("store", "park", "school", "office", "library", "station", "museum", "garden", "beach"),
    *("market", "hospital", "theater", "restaurant", "bakery", "farm", "harbor", "hotel", "church"),
    *("cafe", "zoo"),
)
"""Where people meet in the indirect-object sentences."""

OBJECTS: tuple[str, ...] = (
    *("drink", "book", "ball", "ring", "card", "letter", "key", "map", "pen", "hat", "coat"),
    *("flower", "cake", "ticket", "camera", "phone", "bag", "toy", "photo", "necklace"),
)
"""What they give; each takes the article "a"."""

INDIRECT_OBJECT_PHRASINGS: tuple[str, ...] = (
    "When {first} and {second} went to the {place}, {giver} gave a {object} to",
    "After {first} and {second} met at the {place}, {giver} handed a {object} to",
    "While {first} and {second} were at the {place}, {giver} passed a {object} to",
    "{first} and {second} went to the {place}, and {giver} gave a {object} to",
    "Then {first} and {second} had fun at the {place}. {giver} gave a {object} to",
)
"""Prompts that are completed by whichever of the two people is not the giver."""

PRICE_BRACKET = "Please say yes only if it costs between {low} and {high} dollars, otherwise no."
"""The rule of a price prompt; both ends of the bracket belong to it."""

PRICE_QUESTION = "It costs {amount} dollars. Answer:"
"""What follows the rule, and " yes" or " no" completes."""

HELD_OUT_SHARE = 5
"""One in this many phrasings, pairs or brackets is held out."""


class Prompt(NamedTuple):
    """A text, the token that should follow it, and the token that a counterfactual of it would have there."""

    text: str
    answer: str
    """With its leading space, so that `text + answer` is the sentence."""
    foil: str
    """The same kind of token and wrong: another capital, the giver, the other of yes and no."""


def fact_prompts(*, held_out: bool = True) -> list[Prompt]:
    """All capital-of-country prompts, in both directions, that training left out.

    The foil is the answer for the next country that has the same phrasing in this list.

    Args:
        held_out: False gives the prompts that were trained on instead.

    Example:
        >>> prompts = fact_prompts() + fact_prompts(held_out=False)
        >>> next(prompt for prompt in prompts if prompt.text == "The capital of Spain is").answer
        ' Madrid'
    """
    return [prompt for prompts in facts_by_phrasing(held_out=held_out) for prompt in prompts]


def facts_by_phrasing(*, held_out: bool = True) -> list[list[Prompt]]:
    """As `fact_prompts`, with one list for each phrasing; the prompts of a list differ in one token.

    Example:
        >>> [prompt.text for prompt in facts_by_phrasing()[0]][:2]
        ['The capital of Afghanistan is', 'The capital of Australia is']
    """
    groups = []
    for phrasings, asks_for_capital in ((CAPITAL_PHRASINGS, True), (COUNTRY_PHRASINGS, False)):
        for row, phrasing in enumerate(phrasings):
            facts = [
                (phrasing.format(country=country, capital=capital), capital if asks_for_capital else country)
                for column, (country, capital) in enumerate(CAPITALS.items())
                if ((row + column) % HELD_OUT_SHARE == 0) == held_out
            ]
            answers = [answer for _, answer in facts]
            groups.append(
                [
                    Prompt(text, f" {answer}", f" {foil}")
                    for (text, answer), foil in zip(facts, answers[1:] + answers[:1], strict=True)
                ]
            )
    return groups


def indirect_object_prompts(count: int, seed: int = 0, *, held_out: bool = True) -> list[Prompt]:
    """`count` prompts whose answer is the person that receives; the foil is the giver.

    Both orders of names occur: "When Mary and John ..., John gave" and "When John and Mary ..., John gave".
    Wang et al. (2022), "Interpretability in the Wild", https://arxiv.org/abs/2211.00593.

    Args:
        count: How many prompts; they are drawn with replacement.
        seed: The same seed gives the same prompts.
        held_out: True draws names and place-object pairs that training left out, False those it used.

    Example:
        >>> [prompt] = indirect_object_prompts(1)
        >>> words = f" {prompt.text}"
        >>> words.count(prompt.answer), words.count(prompt.foil)
        (1, 2)
    """
    rng = random.Random(seed)
    prompts: list[Prompt] = []
    while len(prompts) < count:
        first, second = rng.sample(NAMES, 2)
        place, thing = rng.choice(PLACES), rng.choice(OBJECTS)
        if not (is_held_out(*sorted((first, second))) == is_held_out(place, thing) == held_out):
            continue
        giver, receiver = rng.choice([(first, second), (second, first)])
        text = rng.choice(INDIRECT_OBJECT_PHRASINGS).format(
            first=first, second=second, place=place, giver=giver, object=thing
        )
        prompts.append(Prompt(text, f" {receiver}", f" {giver}"))
    return prompts


def price_prompts(count: int, seed: int = 0, *, held_out: bool = True) -> list[Prompt]:
    """`count` prompts that ask whether an amount lies in a bracket; about half have the answer " yes".

    Brackets are 1.00 to 8.00 dollars wide, within 0.00 to 9.99; the amount is uniform inside the bracket or
    outside it. All prompts have the same number of tokens. After Wu et al. (2023), "Interpretability at
    Scale: Identifying Causal Mechanisms in Alpaca", https://arxiv.org/abs/2305.08809.

    Args:
        count: How many prompts; they are drawn with replacement.
        seed: The same seed gives the same prompts.
        held_out: True draws brackets that training left out, False those it used.

    Example:
        >>> sorted({prompt.answer for prompt in price_prompts(20)})
        [' no', ' yes']
    """
    return [series[0] for series in price_series(count, 1, seed, held_out=held_out)]


def price_series(count: int, length: int, seed: int = 0, *, held_out: bool = True) -> list[list[Prompt]]:
    """As `price_prompts`, with `length` amounts for each bracket; the later prompts are without the rule.

    Example:
        >>> [series] = price_series(1, 2)
        >>> series[1].text.startswith("It costs")
        True
    """
    rng = random.Random(seed)
    all_series: list[list[Prompt]] = []
    while len(all_series) < count:
        low = rng.randrange(0, 900)
        high = low + rng.randrange(100, 801)
        if high > 999 or is_held_out(dollars(low), dollars(high)) != held_out:
            continue
        rule = PRICE_BRACKET.format(low=dollars(low), high=dollars(high))
        series = []
        for index in range(length):
            inside = rng.random() < 0.5
            amounts = range(low, high + 1) if inside else (*range(low), *range(high + 1, 1000))
            question = PRICE_QUESTION.format(amount=dollars(rng.choice(amounts)))
            answer, foil = (" yes", " no") if inside else (" no", " yes")
            series.append(Prompt(question if index else f"{rule} {question}", answer, foil))
        all_series.append(series)
    return all_series


def every_word() -> Iterator[str]:
    """Texts that between them hold each word of the three tasks, with the space before it and without."""
    slots = {
        "country": tuple(CAPITALS),
        "capital": tuple(CAPITALS.values()),
        "first": NAMES,
        "place": PLACES,
        "object": OBJECTS,
    }
    for words in slots.values():
        for word in words:
            yield word
            yield f" {word}"
    blank = dict.fromkeys((*slots, "second", "giver", "low", "high", "amount"), "")
    for phrasing in (
        *CAPITAL_PHRASINGS,
        *COUNTRY_PHRASINGS,
        *INDIRECT_OBJECT_PHRASINGS,
        PRICE_BRACKET,
        PRICE_QUESTION,
    ):
        yield " ".join(phrasing.format(**blank).split())
        yield " " + " ".join(phrasing.format(**blank).split())
    yield " yes no"
    for digit in range(10):
        yield f" {digit}.{digit}"


def is_held_out(*names: str) -> bool:
    """Whether training left out what these name together: two people in order, a place and an object, a bracket."""
    # A checksum and not `hash`, which differs from one process to the next.
    return zlib.crc32("|".join(names).encode()) % HELD_OUT_SHARE == 0


def dollars(cents: int) -> str:
    """An amount as prompts write it, without the sign."""
    return f"{cents // 100}.{cents % 100:02d}"
