"""The example's assistant, which knows nothing but the dialogue it is shown."""

from datetime import date

import pytest

from example_app.assistant import ListingAssistant, Message

ANSWERS = ["A bicycle", "Trek", "FX 2", "2019", "€ 250"]


def talk(*texts: str, dialogue: list[Message] | None = None) -> list[Message]:
    """Say the texts one after the other, each time to an assistant that has just been made."""
    if dialogue is None:
        dialogue = [{"role": "assistant", "content": ListingAssistant().reply([])}]
    for text in texts:
        dialogue.append({"role": "user", "content": text})
        dialogue.append({"role": "assistant", "content": ListingAssistant().reply(dialogue)})
    return dialogue


def answer(*texts: str) -> str:
    """Return what the assistant says last."""
    return talk(*texts)[-1]["content"]


def test_greets() -> None:
    """An empty dialogue is opened with a greeting and the first question."""
    assert answer().startswith("Hello!")
    assert answer().endswith("What would you like to sell?")


def test_asks_one_thing_at_a_time() -> None:
    """Each answer leads to the next question."""
    questions = [message["content"] for message in talk(*ANSWERS[:4]) if message["role"] == "assistant"]
    words = ["sell?", "brand", "model", "year", "cost"]
    assert all(word in question for word, question in zip(words, questions, strict=True))


def test_tells_what_it_knows() -> None:
    """Each question says what is known so far."""
    assert answer(*ANSWERS[:3]).startswith("So far: Trek FX 2 bicycle.")


def test_writes_the_listing() -> None:
    """The last answer is followed by a text with every fact in it."""
    text = answer(*ANSWERS)
    assert "For sale: Trek FX 2 bicycle, 2019, € 250" in text
    assert "I am selling my bicycle." in text


def test_asks_nothing_when_finished() -> None:
    """Small talk after the listing leaves it as it is."""
    assert "finished" in answer(*ANSWERS, "thank you")


@pytest.mark.parametrize("said", range(6))
@pytest.mark.parametrize("words", ["start over", "Start over!", "  RESTART ", "“start again”"])
def test_starts_over(said: int, words: str) -> None:
    """Starting over is possible after any answer, and forgets all of them."""
    assert answer(*ANSWERS[:said], words).endswith("What would you like to sell?")
    assert "Garmin watch" in answer(*ANSWERS[:said], words, "watch", "Garmin")


def test_steps_back() -> None:
    """Going back asks for the last fact again."""
    assert "Which brand" in answer("bicycle", "Trak", "back")
    assert "Trek bicycle" in answer("bicycle", "Trak", "back", "Trek")


def test_steps_back_at_the_beginning() -> None:
    """There is nothing to go back to before the first answer."""
    assert "beginning" in answer("back")


def test_steps_back_from_the_listing() -> None:
    """Going back from the finished listing asks for the price again."""
    assert "Price: 300" in answer(*ANSWERS, "back", "300")


def test_changes_a_fact() -> None:
    """A fact of the finished listing can be changed, and the listing is written anew."""
    text = answer(*ANSWERS, "change the price to $50")
    assert "Price: $50" in text
    assert "250" not in text


def test_changes_a_fact_midway() -> None:
    """A change in the middle goes on with the question that was open."""
    reply = answer("bicycle", "Trek", "change item to city bike")
    assert "Trek city bike" in reply
    assert "Which model" in reply


def test_asks_for_the_new_value() -> None:
    """A change without a value asks for it."""
    assert "Which year" in answer(*ANSWERS, "change year")
    assert "Year: 2020" in answer(*ANSWERS, "change year", "2020")


def test_refuses_a_bad_change() -> None:
    """A change to something unusable says why and asks again."""
    reply = answer(*ANSWERS, "change price to a lot")
    assert "number" in reply
    assert reply.endswith("What should it cost?")


@pytest.mark.parametrize("text", ["", " ", "\n\t", "!!!", "123", "hello", "Hi!"])
def test_needs_a_thing(text: str) -> None:
    """What is for sale needs a word; a greeting is none."""
    assert answer(text).endswith("What would you like to sell?")


@pytest.mark.parametrize("text", ["bicycle", "a bicycle", "My bicycle.", "I want to sell my bicycle", "It’s a bicycle!"])
def test_drops_the_words_around_the_thing(text: str) -> None:
    """The thing is taken out of the sentence around it."""
    assert answer(text).startswith("So far: bicycle. ")


@pytest.mark.parametrize("text", ["none", "?", "I don’t know", "no idea", "skip"])
def test_leaves_out_what_is_unknown(text: str) -> None:
    """Brand, model and year may be unknown, and are not in the listing then."""
    reply = answer("oak table", text, text, text, "50")
    assert "For sale: oak table, 50\n" in reply
    assert not any(word in reply for word in ("Brand", "Model", "Year"))


@pytest.mark.parametrize("text", ["last year", "19", "99", "3019", "1066", "20199", "2018 or 2019", "!"])
def test_refuses_what_is_no_year(text: str) -> None:
    """A year that is none is asked for again."""
    assert answer("bicycle", "Trek", "FX 2", text).endswith("Which year is it from?")


@pytest.mark.parametrize("text", ["2019", "about 2019.", "05/2019", "bought in 2019, I think"])
def test_finds_the_year(text: str) -> None:
    """A year is found in the words around it."""
    assert "Trek FX 2 bicycle, 2019." in answer("bicycle", "Trek", "FX 2", text)


def test_next_year_is_a_year() -> None:
    """Next year's models are sold this year."""
    year = str(date.today().year + 1)
    assert answer("car", "VW", "Golf", year).endswith("What should it cost?")


@pytest.mark.parametrize("text", ["a lot", "fifty", "-5", "50 to 60", "50k", "1.2.3", "1e9", "9" * 30, "€"])
def test_refuses_what_is_no_price(text: str) -> None:
    """A price without exactly one number is asked for again."""
    assert answer(*ANSWERS[:4], text).endswith("What should it cost?")


@pytest.mark.parametrize(
    ("text", "price"),
    [
        ("50", "50"),
        ("$50", "$50"),
        ("about 50 €, I think", "50 €"),
        ("eur50", "eur50"),
        ("1,200.50 USD.", "1,200.50 USD"),
        ("1 200 €", "1 200 €"),
        ("50,-", "50"),
        ("0", "free"),
        ("For free!", "free"),
    ],
)
def test_finds_the_price(text: str, price: str) -> None:
    """A price is found in the words around it and stays as it was written."""
    assert f"Price: {price}\n" in answer(*ANSWERS[:4], text)


@pytest.mark.parametrize("said", range(3))
def test_refuses_what_is_too_long(said: int) -> None:
    """A very long answer is not put into the listing."""
    assert "rather long" in answer(*ANSWERS[:said], "word " * 10_000)


def test_goes_on_without_the_beginning() -> None:
    """When the beginning of the dialogue was dropped, answers still belong to their questions."""
    dialogue = talk(*ANSWERS[:3])[4:]
    reply = talk("2019", dialogue=dialogue)[-1]["content"]
    assert reply == "So far: FX 2, 2019. What would you like to sell?"


def test_only_reads_the_dialogue() -> None:
    """The dialogue is the same after a reply as before."""
    dialogue = talk(*ANSWERS)
    copy = [message.copy() for message in dialogue]
    ListingAssistant().reply(dialogue)
    assert dialogue == copy


def test_answers_word_by_word() -> None:
    """The pieces are words, and together the answer with its line breaks."""
    dialogue = talk(*ANSWERS[:4])
    dialogue.append({"role": "user", "content": ANSWERS[4]})
    pieces = list(ListingAssistant().answer(dialogue))
    assert "".join(pieces) == ListingAssistant().reply(dialogue)
    assert max(len(piece.split()) for piece in pieces) == 1


def test_a_finished_listing_is_enough_to_go_on() -> None:
    """Where only the end of a long dialogue is shown, the facts are taken from the listing in it."""
    end = talk(*ANSWERS)[-1:]
    assert "€ 99" in talk("change price to € 99", dialogue=end)[-1]["content"]
    assert "For sale: Trek FX 2 bicycle, 2019, € 99" in end[-1]["content"]


def test_what_was_left_out_stays_left_out() -> None:
    """A listing without a brand is read back as one, and nobody is asked for it again."""
    end = talk("table", "none", "none", "unknown", "free")[-1:]
    assert "For sale: table, free" in talk("change price to free", dialogue=end)[-1]["content"]
