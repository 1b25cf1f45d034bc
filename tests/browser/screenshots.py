"""Takes the pictures of the example that the docs show: ``make screenshots``."""

from __future__ import annotations

import tempfile
from pathlib import Path

from playwright.sync_api import Page, expect

from tests.browser.chromium import running
from tests.browser.people import PHONE, Devices, answers, begin, say, sign_in
from tests.chatting import copy_of_example

IMAGES = Path(__file__).parent.parent.parent / "docs" / "images"
#: Bytes of a picture; one that is larger takes longer to load than it is worth.
LARGEST = 60_000
NAME = "Ada"
#: What the devices page is to show, rather than a Chromium without a window.
AGENT = "Mozilla/5.0 ({}) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/156.0.0.0{} Safari/537.36"
SMALL_DESKTOP = {"viewport": {"width": 800, "height": 560}, "user_agent": AGENT.format("X11; Linux x86_64", "")}
DARK_PHONE = {**PHONE, "color_scheme": "dark", "user_agent": AGENT.format("Linux; Android 10; K", " Mobile")}


def main() -> None:
    """Take them all."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, running() as browser:
        server = copy_of_example(Path(folder), "--workers", "2", "--threads", "12", FLASK_CHAT_ADMINS=NAME)
        try:
            server.start()
            with Devices(browser, server) as devices:
                take_all(devices)
        finally:
            server.stop()


def take_all(devices: Devices) -> None:
    """Talk a little, and take each page."""
    desk = devices.new(**SMALL_DESKTOP)
    phone = devices.new(**DARK_PHONE)
    for page in (desk, phone):
        sign_in(page, NAME)
    for texts in (("an oak table",), ("a bicycle", "Trek", "FX 2")):
        begin(desk)
        converse(desk, *texts)
    take(desk, "chat-desktop")
    phone.goto(desk.url)
    take(phone, "chat-phone-dark")
    for path in ("devices", "operator"):
        desk.goto(f"/{path}")
        take(desk, path)


def converse(page: Page, *texts: str) -> None:
    """Say one thing after the other."""
    for text in texts:
        before = answers(page).count()
        say(page, text)
        expect(answers(page)).to_have_count(before + 1)


def take(page: Page, name: str) -> None:
    """Take the picture of a page."""
    picture = page.screenshot(animations="disabled", caret="hide")
    assert len(picture) <= LARGEST, f"{name}: {len(picture):,} bytes, {LARGEST:,} are the most"
    (IMAGES / f"{name}.png").write_bytes(picture)
    print(f"{name}.png: {len(picture):,} bytes")


if __name__ == "__main__":
    main()
