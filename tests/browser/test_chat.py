"""The chat of the example in a real browser: what people see, when, and in which tab."""

from __future__ import annotations

import re

from playwright.sync_api import expect

from tests.browser.people import Devices, answers, begin, dialogue, growing, say

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
    expect(answers(page)).to_have_text([HELLO, BRAND])

    pieces = list(dict.fromkeys(filter(None, page.evaluate("window.seen"))))
    assert len(pieces) >= 3
    assert all(later.startswith(earlier) for earlier, later in zip(pieces, [*pieces[1:], BRAND], strict=True))
