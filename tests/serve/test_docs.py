"""The API page (/docs): complete, offline, and within its Content-Security-Policy."""

import re
import shutil
from hashlib import sha256
from pathlib import Path

import pytest

from ced.serve.app import STATIC
from ced.serve.schema import CLASSIFY, MODEL, STREAM

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FOLDER = STATIC / "vendor" / "swagger-ui"


def test_the_files_of_swagger_ui_are_those_of_the_package() -> None:
    sums = re.findall(r"^    ([0-9a-f]{64})  (\S+)$", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert len(sums) == 2
    for digest, name in sums:
        assert sha256((FOLDER / name).read_bytes()).hexdigest() == digest
    assert "Apache License" in (FOLDER / "LICENSE").read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_browser_shows_all_routes_and_tries_one_out(address: str, tmp_path: Path) -> None:
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        messages: list[str] = []
        page.on("console", lambda message: messages.append(message.text))
        hosts: set[str] = set()
        page.on("request", lambda request: hosts.add(request.url))
        page.goto(f"{address}/docs")
        for path in (CLASSIFY, STREAM, MODEL):
            page.get_by_text(path, exact=True).first.wait_for()
        page.get_by_text(MODEL, exact=True).first.click()
        page.get_by_role("button", name="Try it out").click()
        page.get_by_role("button", name="Execute").click()
        page.get_by_text('"model": "small"').first.wait_for()
        browser.close()
    assert all(url.startswith((address, "data:", "blob:")) for url in hosts)
    assert [message for message in messages if "Content Security Policy" in message or "Refused" in message] == []
