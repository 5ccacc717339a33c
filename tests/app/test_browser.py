"""The playground in a real browser: it is loaded, asked, compared, moved and given broken files."""

from __future__ import annotations

import itertools
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the extra 'app' is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium (apt-get install chromium)")
ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
PATIENCE = 120_000  # milliseconds; machines of tests are slow
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "foveate", "app", "--port", str(port), "--max-upload-mb", "1"])
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                assert server.poll() is None, "the server ended"
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield found
        found.close()


@pytest.fixture
def opened(browser, address):
    """Opens the page; afterwards nothing was asked of other hosts, and no script has failed."""
    pages = []

    def open_page(**options):
        page = browser.new_page(**options)
        page.set_default_timeout(PATIENCE)
        asked, failed = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: failed.append(str(error)))
        pages.append((page, asked, failed))
        page.goto(address)
        page.wait_for_selector(".fv-card")
        settled(page)
        return page

    yield open_page
    for page, asked, failed in pages:
        assert [url for url in asked if url.startswith("http") and not url.startswith(address)] == []
        assert failed == []
        page.close()


def settled(page) -> None:
    """Nothing runs and the cards stay as they are."""
    before = None
    for _ in range(120):
        page.wait_for_timeout(500)
        now = page.inner_html("#cards"), page.locator(".progress-text, .eta-bar, .translucent").count()
        if now == before:
            return
        before = now
    raise AssertionError("the page does not come to rest")


def cards(page) -> list[dict[str, str]]:
    """What each card says."""
    found = []
    for card in page.query_selector_all(".fv-card"):
        names = [each.inner_text() for each in card.query_selector_all("dt")]
        values = [each.inner_text() for each in card.query_selector_all("dd")]
        answer = card.query_selector(".fv-answer, .fv-problem").inner_text()
        found.append({"name": card.query_selector("h3").inner_text(), "answer": answer, **dict(zip(names, values, strict=True))})
    return found


def choose(page, number: int, method: str) -> None:
    box = page.get_by_label(f"Method {number}", exact=True)
    box.click()
    box.fill(method)
    page.get_by_role("option", name=method, exact=True).click()


def tokens(card: dict[str, str]) -> int:
    return int(re.match(r"\d+", card["visual tokens"])[0])


def test_load_ask_compare_and_move_the_slider(opened):
    page = opened(viewport={"width": 1400, "height": 1000})
    full, first, second = cards(page)
    assert full["name"] == "all tokens"
    assert tokens(full) == 576
    assert full["answer"]
    assert first["name"].startswith("prumerge+, its own rule")
    assert tokens(second) == 58
    assert all(each[name] for each in (full, first, second) for name in ("prefill", "end to end", "KV cache"))
    assert page.get_by_alt_text(re.compile("sorted scores of")).count() == 2

    page.fill("#question textarea, #question input", "how many objects are there ?")
    page.get_by_label("Method 3", exact=True).scroll_into_view_if_needed()
    choose(page, 3, "fastv")
    page.wait_for_selector(".fv-card >> nth=3")
    settled(page)
    page.click("#ask")
    settled(page)
    found = cards(page)
    assert found[0]["answer"].isdigit()
    assert found[3]["by layer"] == "576, 144 from 2"
    assert page.get_by_alt_text("visual tokens by layer").count() == 1

    slider = page.locator("#share-2 input[type=range]")
    slider.focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelectorAll('.fv-card h3')[2].innerText.includes('15%')")
    assert tokens(cards(page)[2]) == 86


def test_the_ways_of_looking(opened):
    page = opened(viewport={"width": 1400, "height": 1000})
    seen = set()
    for name in ("merged sources", "kept only", "scores as heat", "order"):
        page.get_by_label(name, exact=True).check()
        page.wait_for_function(f"document.querySelector('#cards').innerText.toLowerCase().includes('{name}:')")
        seen.add(page.locator(".fv-card img").nth(1).get_attribute("src"))
    assert len(seen) == 4


def test_another_model_and_its_clips(opened):
    page = opened(viewport={"width": 1400, "height": 1000})
    box = page.get_by_label("Model", exact=True)
    box.click()
    page.get_by_role("option", name="pocket-qwen", exact=True).click()
    page.wait_for_function("!document.querySelector('#cards').innerText.includes('576')")
    for _ in range(20):
        settled(page)
        if page.locator("#cards .fv-strip").count():
            break
        page.click("#surprise")
    assert page.locator("#cards .fv-strip").count() == 3
    assert page.locator("#cards .fv-strip").nth(1).locator("figure").count() > 1


def test_a_picture_of_ones_own(opened, tmp_path):
    page = opened()
    page.fill("#question textarea, #question input", "what color is the star ?")
    Image.effect_noise((300, 200), 60).convert("RGB").save(tmp_path / "own.png")
    page.set_input_files("#file input[type=file]", tmp_path / "own.png")
    page.wait_for_function("document.querySelector('#cards').innerText.includes('only its own drawn scenes')")
    assert len(cards(page)) == 3
    assert page.locator("#told .fv-alert").count() == 0


@pytest.mark.parametrize(
    ("name", "contents", "words"),
    [
        ("broken.png", b"\x89PNG\r\n\x1a\n and no more", "broken.png is"),
        ("words.jpg", b"these are words", "words.jpg is not a picture"),
        ("film.mp4", b"no film", "film.mp4"),
    ],
)
def test_files_that_are_broken(opened, tmp_path: Path, name, contents, words):
    page = opened(viewport=PHONE)
    (tmp_path / name).write_bytes(contents)
    page.set_input_files("#file input[type=file]", tmp_path / name)
    page.wait_for_selector("#told .fv-alert")
    assert words in page.inner_text("#told")
    assert "gradio" not in page.inner_text("#told")
    assert page.locator(".fv-card").count() == 0
    page.click("#surprise")
    page.wait_for_selector(".fv-card")
    assert page.locator("#told .fv-alert").count() == 0


def test_a_file_that_is_too_large(opened, tmp_path):
    page = opened()
    (tmp_path / "large.png").write_bytes(b"0" * 2**21)
    page.set_input_files("#file input[type=file]", tmp_path / "large.png")
    page.wait_for_selector("text=/exceed the maximum/i")


def test_what_is_typed_is_text(opened):
    page = opened()
    page.fill("#question textarea, #question input", "<img src=x onerror=alert(1)> ${1+1} ?")
    page.click("#ask")
    page.wait_for_function("document.querySelector('#cards').innerText.includes('onerror')")
    assert page.locator("#cards img[src=x]").count() == 0
    page.fill("#question textarea, #question input", "")
    page.click("#ask")
    page.wait_for_selector("text=the question is empty")


def test_the_width_of_a_phone(opened):
    page = opened(viewport=PHONE, device_scale_factor=2, has_touch=True)
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= PHONE["width"]
    boxes = [card.bounding_box() for card in page.query_selector_all(".fv-card")]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"] for box in boxes)
    assert all(above["y"] + above["height"] <= below["y"] for above, below in itertools.pairwise(boxes))


def test_with_the_keyboard_alone(opened):
    """Tab reaches everything that can be chosen, and Enter asks."""
    page = opened(viewport={"width": 1400, "height": 1000})
    page.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.closest('[id]')?.id ?? ''"))
        reached |= set(
            page.evaluate(
                "(() => { let e = document.activeElement, f = []; while (e) { if (e.id) f.push(e.id); "
                "e = e.parentElement } return f })()"
            )
        )
    assert {"model", "file", "surprise", "question", "ask", "method-1", "share-1", "method-3", "share-3", "view"} <= reached
    page.focus("#question textarea, #question input")
    page.keyboard.press("Control+a")
    page.keyboard.type("how many objects are there ?")
    page.keyboard.press("Enter")
    page.wait_for_function("/^\\d+$/.test(document.querySelector('.fv-answer').innerText)")


def test_several_users_at_once(opened):
    """Each sees the answer to a question of its own."""
    pages = [opened(), opened(), opened()]
    for page, share in zip(pages, (10, 50, 90), strict=True):
        page.fill("#share-2 input[type=number]", str(share))
        page.keyboard.press("Enter")
    for page, share in zip(pages, (10, 50, 90), strict=True):
        page.wait_for_function(f"document.querySelectorAll('.fv-card h3')[2].innerText.includes('{share}%')")
        settled(page)
        assert abs(tokens(cards(page)[2]) - share * 5.76) < 1
