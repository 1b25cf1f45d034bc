"""Signing out, as a real browser sees it: from another device, by the cap, and when it happens to an open page."""

from __future__ import annotations

import re

from playwright.sync_api import Page, expect

from tests.browser.people import Devices, begin, is_marked, mark, say

REVOKED = "You were signed out here: this session was ended from elsewhere."
EVICTED = "You were signed out here: you signed in on another device, and only 2 sessions are allowed at once."


def test_another_device_is_signed_out(devices: Devices) -> None:
    """An open page that is signed out from another device says so by itself, and its link leads to the sign-in."""
    lost, here = devices.of("Ada"), devices.of("Ada")
    begin(lost)
    mark(lost)

    sign_out_other(here)

    expect_told(lost, REVOKED)
    assert is_marked(lost)
    lost.get_by_role("link", name="Sign in").click()
    expect(lost.get_by_role("status")).to_have_text(REVOKED)
    expect(lost.get_by_role("textbox", name="Your name")).to_be_focused()


def test_a_device_signed_out_in_the_middle_of_an_answer(slow_devices: Devices) -> None:
    """What was being written stops on the device that is signed out, and is complete for the user elsewhere."""
    lost, here = slow_devices.of("Grace"), slow_devices.of("Grace")
    begin(lost)
    say(lost, "a bicycle")
    expect(lost.get_by_role("log")).to_have_attribute("aria-busy", "true")

    sign_out_other(here)

    expect_told(lost, REVOKED)
    expect(lost.get_by_role("log")).to_have_attribute("aria-busy", "false")
    here.goto("/")
    expect(here.get_by_role("log")).to_contain_text("Which brand is it?")


def test_the_devices_page(devices: Devices) -> None:
    """The page marks this device, and says what has been done."""
    here, _ = devices.of("Linus"), devices.of("Linus")
    here.get_by_role("link", name="Devices").click()
    listed = here.get_by_role("main").get_by_role("listitem")
    expect(listed).to_have_count(2)
    expect(listed.filter(has_text="This device")).to_have_count(1)

    here.get_by_role("button", name="Sign out all other devices").click()
    expect(here.get_by_role("status")).to_contain_text("Done.")
    expect(listed).to_have_count(1)


def test_the_cap(devices: Devices) -> None:
    """Signing in on one device too many signs out the oldest one, whose open page says why; the other one stays."""
    first, second = devices.of("Barbara"), devices.of("Barbara")
    begin(first)
    mark(first)

    devices.of("Barbara")

    expect_told(first, EVICTED)
    assert is_marked(first)
    second.reload()
    expect(second.get_by_role("button", name="Sign out")).to_be_visible()
    first.get_by_role("link", name="Sign in").click()
    expect(first.get_by_role("status")).to_have_text(EVICTED)


def test_another_tab_of_the_same_device(devices: Devices) -> None:
    """Signing out in one tab is told in the other one."""
    page = devices.of("Alan")
    begin(page)
    other = page.context.new_page()
    other.goto(page.url)
    mark(other)

    page.get_by_role("button", name="Sign out").click()

    expect_told(other, "You have signed out.")
    assert is_marked(other)


def test_a_message_after_being_signed_out(devices: Devices) -> None:
    """A message from a page that was signed out a moment ago is refused in words, and is not stored."""
    lost, here = devices.of("Edsger"), devices.of("Edsger")
    begin(lost)
    lost.route("**/events*", lambda route: route.abort())
    lost.reload()
    sign_out_other(here)

    say(lost, "too late")

    expect(lost.get_by_role("alert").filter(has_text="signed")).to_be_visible()
    here.goto("/")
    expect(here.get_by_role("log")).not_to_contain_text("too late")
    devices.forgive("ERR_FAILED|status of 401")


def sign_out_other(page: Page) -> None:
    page.goto("/devices")
    others = page.get_by_role("listitem").filter(has_not_text="This device")
    others.get_by_role("button", name=re.compile("^Sign out")).click()
    expect(others).to_have_count(0)


def expect_told(page: Page, words: str) -> None:
    """Expect that the page says so, and takes no more messages."""
    expect(page.get_by_role("alert").filter(has_text=words)).to_be_visible()
    expect(page.get_by_role("textbox", name="Message")).to_be_hidden()
