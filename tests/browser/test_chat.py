"""The chat of the example in a real browser: what people see, when, and in which tab."""

from __future__ import annotations

import re

from playwright.sync_api import Page, expect

from tests.browser.people import Devices, answers, begin, dialogue, growing, is_marked, mark, say

HELLO = re.compile("What would you like to sell\\?$")
BRAND = "So far: bicycle. Which brand is it?"
MODEL = "So far: Trek bicycle. Which model is it?"


def test_a_dialogue(devices: Devices) -> None:
    """Who signs in and answers the questions reads the finished listing."""
    page = devices.of("Ada")
    begin(page)
    for text in ("a bicycle", "Trek", "FX 2", "2019", "€ 250"):
        say(page, text)
        expect(page.get_by_role("textbox", name="Message")).to_have_value("")
        expect(page.get_by_role("button", name="Send")).to_be_enabled()

    expect(answers(page).last).to_contain_text("For sale: Trek FX 2 bicycle, 2019, € 250")
    expect(dialogue(page)).to_have_count(11)


def test_an_answer_grows_piece_by_piece(slow_devices: Devices) -> None:
    """An answer appears as it is written, each piece behind the one before."""
    page = slow_devices.of("Grace")
    begin(page)
    page.evaluate(
        """() => {
            window.seen = [];
            const look = () => window.seen.push(document.querySelector("li.pending p")?.textContent ?? "");
            new MutationObserver(look).observe(document.getElementById("dialogue"),
                                               {childList: true, subtree: true, characterData: true});
        }"""
    )
    say(page, "a bicycle")
    expect(page.get_by_role("log", name="Messages")).to_have_attribute("aria-busy", "true")
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    expect(answers(page)).to_have_text([HELLO, BRAND])

    pieces = list(dict.fromkeys(filter(None, page.evaluate("window.seen"))))
    assert len(pieces) >= 3
    assert all(later.startswith(earlier) for earlier, later in zip(pieces, [*pieces[1:], BRAND], strict=True))


def test_a_page_reloaded_in_the_middle_of_an_answer(slow_devices: Devices) -> None:
    """Reloading shows the dialogue with what there is of the answer, and the rest of it still comes, once."""
    page = slow_devices.of("Linus")
    begin(page)
    say(page, "a bicycle")
    expect(growing(page)).to_contain_text("So")

    page.reload()

    expect(growing(page)).to_contain_text("So")
    expect(dialogue(page)).to_have_text([HELLO, "a bicycle"])
    expect(dialogue(page)).to_have_text([HELLO, "a bicycle", BRAND])


def test_two_tabs_stay_in_step(devices: Devices) -> None:
    """What is said in one tab, its answer and a new title appear in the other one, and the other way round."""
    one = devices.of("Barbara")
    begin(one)
    other = one.context.new_page()
    other.goto(one.url)
    say(one, "a bicycle")
    expect(dialogue(other)).to_have_text([HELLO, "a bicycle", BRAND])

    say(other, "Trek")
    expect(dialogue(one)).to_have_text([HELLO, "a bicycle", BRAND, "Trek", MODEL])

    other.get_by_text("Rename").click()
    other.get_by_role("textbox", name="Title").fill("The blue one")
    other.get_by_role("button", name="Save title").click()
    expect(one.get_by_role("heading", level=1)).to_have_text("The blue one")
    expect(one).to_have_title("The blue one · Listing desk")


def test_many_tabs(devices: Devices) -> None:
    """However many tabs are open, one more works: those that nobody sees have no stream, and catch up when seen."""
    tabs = [devices.of("Frances")]
    begin(tabs[0])
    for _ in range(7):  # a browser opens six connections
        show(tabs[-1], False)
        tabs.append(tabs[0].context.new_page())
        tabs[-1].goto(tabs[0].url)
    say(tabs[-1], "a bicycle")
    expect(dialogue(tabs[-1])).to_have_text([HELLO, "a bicycle", BRAND])

    show(tabs[0], True)
    expect(dialogue(tabs[0])).to_have_text([HELLO, "a bicycle", BRAND])


def show(page: Page, visible: bool) -> None:
    """Tell a tab whether it is seen, as browsers do; here all tabs count as seen."""
    page.evaluate(
        """hidden => {
            Object.defineProperty(document, "hidden", {get: () => hidden, configurable: true});
            document.dispatchEvent(new Event("visibilitychange"));
        }""",
        not visible,
    )


def test_the_conversations_of_the_side_bar(devices: Devices) -> None:
    """Conversations take the title of what was said first, are found by it, and leave the list when they end."""
    page = devices.of("Alan")
    for item in ("an oak table", "a bicycle"):
        begin(page)
        say(page, item)
        expect(dialogue(page)).to_have_count(3)
    listed = page.get_by_role("navigation", name="Conversations").get_by_role("listitem")
    expect(listed).to_have_text(["a bicycle", "an oak table"])

    page.get_by_role("searchbox", name="Search conversations").fill("oak")
    page.get_by_role("button", name="Search").click()
    expect(listed).to_have_text(["an oak table"])

    listed.get_by_role("link").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("an oak table")
    page.get_by_role("link", name="End conversation").click()
    page.get_by_role("button", name="Yes, end it").click()
    expect(listed).to_have_text(["a bicycle"])


def test_a_conversation_ended_in_another_tab(devices: Devices) -> None:
    """A page whose conversation has ended says so, and takes no more messages."""
    page = devices.of("Edsger")
    begin(page)
    other = page.context.new_page()
    other.goto(f"{page.url}/end")
    other.get_by_role("button", name="Yes, end it").click()

    expect(page.get_by_role("alert").filter(has_text="ended")).to_be_visible()
    expect(page.get_by_role("textbox", name="Message")).to_be_hidden()


def test_a_double_click(devices: Devices) -> None:
    """A message sent with a double click is there once, with one answer."""
    page = devices.of("Tony")
    begin(page)
    page.get_by_role("textbox", name="Message").fill("a bicycle")
    page.get_by_role("button", name="Send").dblclick()
    expect(dialogue(page)).to_have_text([HELLO, "a bicycle", BRAND])
    page.reload()
    expect(dialogue(page)).to_have_text([HELLO, "a bicycle", BRAND])


def test_markup_in_a_message_is_text(devices: Devices) -> None:
    """A message with markup is shown as it was written, before and after a reload, and nothing of it runs."""
    markup = "<img src=x onerror=\"document.title='taken'\"><b>bold</b>"
    page = devices.of("Mallory")
    begin(page)
    say(page, markup)
    expect(dialogue(page)).to_contain_text([HELLO, markup, markup])
    page.reload()
    expect(dialogue(page)).to_contain_text([HELLO, markup, markup])
    expect(page.locator("#dialogue img, #dialogue b")).to_have_count(0)


def test_going_back_after_signing_out(devices: Devices) -> None:
    """The browser's “back” does not bring a dialogue back after signing out."""
    page = devices.of("Niklaus")
    begin(page)
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("button", name="Sign in")).to_be_visible()

    page.go_back()
    expect(page.get_by_role("button", name="Sign in")).to_be_visible()
    expect(page.get_by_role("log")).to_have_count(0)


def test_the_server_is_killed_in_the_middle_of_an_answer(slow_devices: Devices) -> None:
    """A server killed while it answers and started again finishes the answer on the page that is open, without a reload."""
    page = slow_devices.of("Margaret")
    begin(page)
    mark(page)
    say(page, "a bicycle")
    expect(growing(page)).to_contain_text("So")

    slow_devices.server.kill()
    slow_devices.server.start()

    expect(dialogue(page)).to_have_text([HELLO, "a bicycle", BRAND])
    say(page, "Trek")
    expect(dialogue(page)).to_have_text([HELLO, "a bicycle", BRAND, "Trek", MODEL])
    assert is_marked(page)
    slow_devices.forgive("net::ERR_")


def test_a_message_sent_while_the_server_is_away(slow_devices: Devices) -> None:
    """A message sent to a server that is just being started again is not lost, and is there once."""
    page = slow_devices.of("Radia")
    begin(page)
    mark(page)
    slow_devices.server.kill()
    say(page, "a bicycle")
    slow_devices.server.start()

    expect(dialogue(page)).to_have_text([HELLO, "a bicycle", BRAND])
    assert is_marked(page)
    slow_devices.forgive("net::ERR_")


def test_a_message_that_could_not_be_sent(devices: Devices) -> None:
    """When the server cannot be reached, the page says so and keeps the message, which can be sent again."""
    page = devices.of("Katherine")
    begin(page)
    page.context.set_offline(True)
    say(page, "a bicycle")
    problem = page.get_by_role("alert").filter(has_text="cannot be reached")
    expect(problem).to_be_visible()
    expect(page.get_by_role("textbox", name="Message")).to_have_value("a bicycle")

    page.context.set_offline(False)
    page.get_by_role("button", name="Send").click()
    expect(dialogue(page)).to_have_text([HELLO, "a bicycle", BRAND])
    expect(problem).to_be_hidden()
    devices.forgive("net::ERR_")


def test_a_dialogue_on_another_device(devices: Devices) -> None:
    """Whoever signs in on another device goes on where they stopped."""
    page = devices.of("Hedy")
    begin(page)
    say(page, "a bicycle")
    expect(dialogue(page)).to_have_count(3)

    other = devices.of("Hedy")
    expect(dialogue(other)).to_have_text([HELLO, "a bicycle", BRAND])
