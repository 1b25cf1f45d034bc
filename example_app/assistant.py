"""An assistant that helps to write a for-sale listing.

It keeps nothing between two calls: what it knows it reads from the dialogue, as a language model would. So a dialogue
can go on in any process, and another assistant can take its place behind the same interface.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Literal, Protocol, TypedDict


class Message(TypedDict):
    """One turn of a dialogue."""

    role: Literal["user", "assistant"]
    content: str


class AssistantError(Exception):
    """There is no answer; the text tells the user why, and what to do."""


class Assistant(Protocol):
    """Whatever can go on with a dialogue."""

    name: str

    def answer(self, dialogue: Sequence[Message]) -> Iterator[str]:
        """Yield the next thing to say, in pieces; for an empty dialogue, the greeting. Raises ``AssistantError``."""


class ListingAssistant:
    """Asks for one fact after the other, then writes the listing.

    :param pace: seconds to rest before each word but those of the greeting, so that one sees it being written.
    """

    name = "listing"

    def __init__(self, pace: float = 0.0) -> None:
        self._pace = pace

    def answer(self, dialogue: Sequence[Message]) -> Iterator[str]:
        """Yield what ``reply`` returns, word by word."""
        for word in WORD.findall(self.reply(dialogue)):
            if dialogue:
                time.sleep(self._pace)
            yield word

    def reply(self, dialogue: Sequence[Message]) -> str:
        """Return the next question with what is known so far, or the finished listing."""
        if not dialogue:
            return f"{GREETING} {FIELDS[0].question}"
        listing: Listing = {}
        asked: Field | None = None
        remark = ""
        for message in dialogue:
            if message["role"] == "assistant":
                asked = question_in(message["content"])
                listing = facts_in(message["content"]) or listing
            else:
                remark = take_in(message["content"], asked, listing)
        return next_line(listing, remark)


Listing = dict[str, str]
"""Facts by name of field, in the order they were given; empty where the user wants it left out."""


class Unclear(ValueError):
    """An answer that cannot be used; its text tells the user why."""


@dataclass(frozen=True)
class Field:
    """One fact of a listing: how to ask for it, and how to read the answer."""

    name: str
    question: str
    read: Callable[[str], str]


def take_in(text: str, asked: Field | None, listing: Listing) -> str:
    """Change the listing as the user says; return a remark where something is to be said about it."""
    text = " ".join(text.split())
    command = text.strip(" .!\"'“”").casefold()
    if command in START_OVER:
        listing.clear()
        return "Of course, a fresh start."
    if command in BACK:
        return step_back(listing)
    if change := CHANGE.fullmatch(text):
        return fill_in(BY_NAME[change["name"].lower()], change["value"], listing)
    if asked:
        return fill_in(asked, text, listing)
    return FINISHED if len(listing) == len(FIELDS) else ""


def fill_in(field: Field, answer: str | None, listing: Listing) -> str:
    """Put the answer into the listing, or take the fact out so that it is asked for again."""
    try:
        if answer is None:
            raise Unclear(f"Let us change the {field.name}.")
        listing[field.name] = field.read(answer)
    except Unclear as problem:
        listing.pop(field.name, None)
        return str(problem)
    return ""


def step_back(listing: Listing) -> str:
    """Forget the fact given last."""
    if not listing:
        return "We are at the beginning already."
    name, _ = listing.popitem()
    return f"Back to the {name}."


def question_in(content: str) -> Field | None:
    """Return the field that the assistant's message asks for.

    Counting the answers instead would go wrong as soon as the beginning of a long dialogue has been dropped.
    """
    return next((field for field in FIELDS if content.endswith(field.question)), None)


def facts_in(content: str) -> Listing:
    """Return the facts of a finished listing, which may be all that is left of a long dialogue; none of others."""
    if not content.startswith(FINISHED_TITLE):
        return {}
    item = re.search(r"^I am selling my (.*)\.$", content, re.MULTILINE)
    details = {name: re.search(rf"^{name.capitalize()}: (.*)$", content, re.MULTILINE) for name in DETAILS}
    found = {"item": item, **details}
    return {name: match[1] if match else "" for name, match in found.items()}


def next_line(listing: Listing, remark: str) -> str:
    """Ask for the first fact that is missing; with none missing, write the listing."""
    missing = next((field for field in FIELDS if field.name not in listing), None)
    if missing is None:
        return remark or finished(listing)
    known = headline(listing)
    opening = remark or (f"So far: {known}." if known else "")
    return f"{opening} {missing.question}".lstrip()


def headline(listing: Listing) -> str:
    """Return the facts known so far in one line, such as ``Trek FX 2 bicycle, 2019, € 250``."""
    thing = " ".join(filter(None, (listing.get(name) for name in ("brand", "model", "item"))))
    return ", ".join(filter(None, (thing, listing.get("year"), listing.get("price"))))


def finished(listing: Listing) -> str:
    """Write the listing."""
    details = [f"{name.capitalize()}: {listing[name]}" for name in DETAILS if listing[name]]
    return "\n".join(
        [
            FINISHED_TITLE,
            "",
            f"For sale: {headline(listing)}",
            "",
            f"I am selling my {listing['item']}.",
            "",
            *details,
            "",
            "Write to me if you would like to have a look.",
        ]
    )


def read_item(answer: str) -> str:
    """Return what is for sale, without the words around it."""
    if answer.strip(" .!,").casefold() in GREETINGS:
        raise Unclear("Hello to you, too!")
    item = LEAD_IN.sub("", answer).rstrip(" .!")
    if not any(map(str.isalpha, item)):
        raise Unclear("I need a word or two for it, such as “bicycle” or “oak table”.")
    return short(item)


def read_name(answer: str) -> str:
    """Return a brand or a model, or nothing where the user has none."""
    if is_unknown(answer):
        return ""
    if not any(map(str.isalnum, answer)):
        raise Unclear("I did not catch that. If there is none, say “none”.")
    return short(answer.rstrip(" .!"))


def read_year(answer: str) -> str:
    """Return the one year in the answer, or nothing where the user does not know it."""
    if is_unknown(answer):
        return ""
    newest = date.today().year + 1
    years = {int(digits) for digits in YEAR.findall(answer)}
    usable = sorted(year for year in years if OLDEST <= year <= newest)
    if len(usable) > 1:
        raise Unclear("I see more than one year there.")
    if not usable:
        raise Unclear(f"I need a year from {OLDEST} to {newest}, in four digits, or “unknown”.")
    return str(usable[0])


def read_price(answer: str) -> str:
    """Return the one amount in the answer as the user writes it, with its currency."""
    if answer.strip(" .!").casefold() in FREE:
        return "free"
    amounts = [match[0] for match in PRICE.finditer(answer)]
    if len(amounts) > 1:
        raise Unclear("I see more than one number there, and buyers want to know just one.")
    if not amounts:
        raise Unclear("I need a number, such as “50”, “$ 50” or “1,200 €”, or “free”.")
    if not re.search("[1-9]", amounts[0]):
        return "free"
    return short(amounts[0])


def is_unknown(answer: str) -> bool:
    """Tell whether the user says that there is no such thing, or that they do not know."""
    return answer.strip(" .!").replace("’", "'").casefold() in UNKNOWN


def short(answer: str) -> str:
    """Return the answer if it fits into a line of the listing."""
    if len(answer) > LONGEST:
        raise Unclear(f"That is rather long for a listing; up to {LONGEST} characters, please.")
    return answer


GREETING = (
    "Hello! I help you to write a for-sale listing: five questions, then the text."
    " You can say “back”, “change price to 50” or “start over” at any time."
)
FINISHED_TITLE = "Here is your listing:"
FINISHED = "Your listing is finished. Say “change price to 50” to change it, or “start over” to write another."

FIELDS = (
    Field("item", "What would you like to sell?", read_item),
    Field("brand", "Which brand is it?", read_name),
    Field("model", "Which model is it?", read_name),
    Field("year", "Which year is it from?", read_year),
    Field("price", "What should it cost?", read_price),
)
BY_NAME = {field.name: field for field in FIELDS}
DETAILS = ("brand", "model", "year", "price")

START_OVER = {"start over", "start again", "start anew", "restart", "reset", "begin again"}
BACK = {"back", "go back", "undo"}
CHANGE = re.compile(rf"change (?:the )?(?P<name>{'|'.join(BY_NAME)})(?: to (?P<value>.+))?[.!]*", re.IGNORECASE)

GREETINGS = {"hi", "hello", "hey", "good morning", "good evening", "good day"}
LEAD_IN = re.compile(
    r"(?:(?:i want to sell|i would like to sell|i['’]d like to sell|i am selling|i['’]m selling|it is|it['’]s) )?"
    r"(?:(?:an?|the|my|some|our) )?",
    re.IGNORECASE,
)
UNKNOWN = {"?", "-", "none", "no", "no idea", "unknown", "i don't know", "don't know", "not sure", "skip", "n/a"}
WORD = re.compile(r"\s*\S+\s*?")
YEAR = re.compile(r"\b\d{4}\b")
FREE = {"free", "for free", "nothing", "a gift"}
# The last condition refuses "50k" and "1.2.3" rather than take a part of them for the price.
PRICE = re.compile(
    r"(?<![\w.,-])(?:(?:[€$£]|eur|usd|gbp|chf)\s?)?"
    r"(?:\d{1,3}(?:[ .,'’]\d{3})+|\d{1,9})(?:[.,]\d{1,2})?"
    r"(?:\s?(?:[€$£]|eur|usd|gbp|chf))?(?![.,]?\w)",
    re.IGNORECASE,
)
OLDEST = 1800
LONGEST = 80
