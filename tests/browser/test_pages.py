"""The pages of the example for everybody: on a phone, in the dark, by keyboard, with a screen reader, without scripts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Locator, Page, expect

from tests.browser.people import DESKTOP, PHONE, SMALLEST, Devices, answers, begin, dialogue, is_narrow, say, sign_in

BRAND = "So far: bicycle. Which brand is it?"

CONTROLS_BEYOND = """
    width => [...document.querySelectorAll("a, button, input:not([type=hidden]), textarea, summary")]
        .filter(control => control.checkVisibility() && !control.matches(".skip"))
        .filter(control => {
            const box = control.getBoundingClientRect();
            return box.left < 0 || box.right > width;
        })
        .map(control => control.outerHTML)
"""


def tour(devices: Devices, **options: Any) -> Iterator[tuple[str, Page]]:
    """An operator looks at each page in turn."""
    page = devices.new(**options)
    page.goto("/sign-in")
    yield "sign-in", page
    page.get_by_role("textbox", name="Your name").fill(" ")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_contain_text("Please enter a name.")
    yield "a refused name", page
    sign_in(page, devices.full("Olga"))
    yield "no conversation", page
    begin(page)
    say(page, "an old bicycle with a basket, and a bell that one hears from far away")
    expect(dialogue(page)).to_have_count(3)
    yield "a conversation", page
    if is_narrow(page):
        page.get_by_role("button", name="Show conversations").click()
        yield "side bar", page
    address = page.url
    page.goto(f"{address}?find=bicycle&q=bicycle")
    yield "searches", page
    page.goto(f"{address}/end")
    yield "ending", page
    page.goto("/devices")
    yield "devices", page
    page.goto("/operator")
    expect(page.get_by_role("heading", name="Operator")).to_be_visible()
    yield "operator", page
    page.goto("/conversations/nobody")
    yield "an error", page
    devices.forgive("status of 4")


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_accessibility(devices: Devices, size: dict[str, Any]) -> None:
    """No rule of axe is broken, light or dark: names, roles, contrast, order of headings, landmarks, size of targets."""
    options = {"resultTypes": ["violations"], "rules": {"target-size": {"enabled": True}}}
    broken = ""
    for name, page in tour(devices, **size):
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            found = Axe().run(page, options=options)
            broken += f"{name}, {scheme}\n{found.generate_report()}" if found.violations_count else ""
    assert not broken, broken


def test_nothing_is_wider_than_a_phone(devices: Devices) -> None:
    """On a screen of 320 pixels no page scrolls sideways, and every control lies within it."""
    for name, page in tour(devices, **SMALLEST):
        assert page.evaluate("document.documentElement.scrollWidth") <= 320, name
        assert page.evaluate(CONTROLS_BEYOND, 320) == [], name


def test_a_chat_on_a_phone(devices: Devices) -> None:
    """On a phone the message field and the newest message are always in view, and the side bar opens over them."""
    page = devices.of("Ada", **PHONE)
    begin(page)
    for text in ("a bicycle", "Trek", "FX 2", "2019", "€ 250"):
        say(page, text)
        expect(page.get_by_role("textbox", name="Message")).to_have_value("")
        expect(page.get_by_role("button", name="Send")).to_be_enabled()
        expect(page.get_by_role("button", name="Send")).to_be_in_viewport(ratio=1)
        expect(answers(page).last).to_be_in_viewport()
    page.reload()
    expect(answers(page).last).to_be_in_viewport()
    expect(page.get_by_role("textbox", name="Message")).to_be_in_viewport(ratio=1)

    side = page.get_by_role("navigation", name="Conversations")
    expect(side).to_be_hidden()
    page.get_by_role("button", name="Show conversations").tap()
    expect(side.get_by_role("link", name="a bicycle")).to_be_in_viewport(ratio=1)
    page.keyboard.press("Escape")
    expect(side).to_be_hidden()


def test_dark(devices: Devices) -> None:
    """Who prefers dark pages gets dark ones."""
    light, dark = devices.new(color_scheme="light"), devices.new(color_scheme="dark")
    for page in (light, dark):
        page.goto("/sign-in")
    assert brightness(dark, "backgroundColor") < 60 < 195 < brightness(dark, "color")
    assert brightness(light, "color") < 60 < 195 < brightness(light, "backgroundColor")


def test_by_keyboard(devices: Devices) -> None:
    """Everything is done without a mouse, and what has the focus is seen to have it."""
    page = devices.new()
    page.goto("/sign-in")
    expect(page.get_by_role("textbox", name="Your name")).to_be_focused()
    page.keyboard.type("Grace")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Sign out")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    tab_to(page, page.get_by_role("button", name="New conversation"))
    page.keyboard.press("Enter")

    message = page.get_by_role("textbox", name="Message")
    expect(message).to_be_focused()
    page.keyboard.type("a bicycle")
    page.keyboard.press("Enter")
    expect(dialogue(page)).to_contain_text(["sell?", "a bicycle", BRAND])
    expect(message).to_be_focused()
    page.keyboard.type("Trek")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("or so")
    expect(message).to_have_value("Trek\nor so")

    tab_to(page, page.get_by_text("Rename"))
    page.keyboard.press("Enter")
    tab_to(page, page.get_by_role("textbox", name="Title"))
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("The blue one")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("The blue one")

    tab_to(page, page.get_by_role("button", name="Sign out"))
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Sign in")).to_be_visible()


def test_what_a_screen_reader_finds(devices: Devices) -> None:
    """The dialogue is a log of messages that say whose they are, and the field is named."""
    page = devices.of("Linus")
    begin(page)
    say(page, "a bicycle")
    expect(dialogue(page)).to_have_count(3)
    expect(page.get_by_role("main")).to_match_aria_snapshot(
        f"""
        - main:
          - heading "a bicycle" [level=1]
          - region "Dialogue":
            - log "Messages":
              - list:
                - listitem:
                  - text: "Assistant:"
                  - paragraph: /Hello!/
                - listitem:
                  - text: "You:"
                  - paragraph: a bicycle
                - listitem:
                  - text: "Assistant:"
                  - paragraph: "{BRAND}"
          - status
          - textbox "Message"
          - button "Send"
        """
    )


def test_without_scripts(devices: Devices) -> None:
    """Signing in, sending, reading, renaming and signing out work where no script runs."""
    page = devices.of("Barbara", java_script_enabled=False)
    begin(page)
    say(page, "a bicycle")
    expect(dialogue(page)).to_contain_text(["sell?", "a bicycle", BRAND])
    page.get_by_text("Rename").click()
    page.get_by_role("textbox", name="Title").fill("The blue one")
    page.get_by_role("button", name="Save title").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("The blue one")
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("button", name="Sign in")).to_be_visible()


def test_a_slow_answer_without_scripts(slow_devices: Devices) -> None:
    """Where no script runs, a page that waits for its answer says so, and shows it once it is there."""
    page = slow_devices.of("Alan", java_script_enabled=False)
    begin(page)
    say(page, "a bicycle")
    expect(page.get_by_role("status")).to_have_text("The assistant is writing…")
    expect(dialogue(page)).to_contain_text(["sell?", "a bicycle", BRAND])


def test_the_watch_over_the_pages(devices: Devices) -> None:
    """These tests notice a script in a page, which the policy stops, and a request to another host."""
    page = devices.new()
    page.goto("/sign-in")
    page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.ran = true";
            document.body.append(script);
            fetch("http://elsewhere.invalid/").catch(() => {});
        }"""
    )
    assert page.evaluate("window.ran") is None
    with pytest.raises(AssertionError):
        devices.check()
    devices.forgive("Content Security Policy|elsewhere")


def tab_to(page: Page, target: Locator) -> None:
    """Press Tab until it has the focus; whatever has it on the way must look so."""
    for _ in range(40):
        page.keyboard.press("Tab")
        assert page.evaluate(
            """() => document.activeElement === document.body
                     || getComputedStyle(document.activeElement).outlineStyle !== "none" """
        ), page.evaluate("document.activeElement.outerHTML")
        if target.evaluate("element => element === document.activeElement"):
            return
    raise AssertionError(f"Tab does not lead to {target}")


def brightness(page: Page, of: str) -> float:
    """How bright a colour of the page is, from 0 to 255."""
    shown: list[int] = page.evaluate(
        """of => {
            const paper = document.createElement("canvas").getContext("2d");
            paper.fillStyle = getComputedStyle(document.body)[of];
            paper.fillRect(0, 0, 1, 1);
            return [...paper.getImageData(0, 0, 1, 1).data].slice(0, 3);
        }""",
        of,
    )
    return sum(shown) / 3
