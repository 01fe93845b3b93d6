"""The pages: logic through AppTest, rendering and selection in a real headless Chromium."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from apps.common.settings import Settings, load_settings
from apps.common.ui.server import page_server
from apps.medical.bootstrap import open_medical
from apps.medical.service import MedicalService
from apps.medical.worker import run_worker
from tests.phantoms import HEAD, blob, dicom_slices, save_series
from tests.services import free_port

PAGES = Path(__file__).parents[2] / "apps" / "pages.py"
SCREENSHOTS = Path(__file__).parents[2] / "docs" / "images"
CHROMIUM = [
    *("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-first-run", "--disable-extensions"),
]


@pytest.fixture
def finished(settings: Settings, tmp_path: Path) -> Iterator[MedicalService]:
    """A store with a segmented head and a refused CT."""
    service, log = open_medical(settings)
    service.receive(save_series(dicom_slices(blob(), modality="CT", patient="Wrong^Modality"), tmp_path / "ct"), "test")
    service.receive(HEAD, "test")
    run_worker(service, log, threading.Event(), until_idle=True)
    yield service
    log.close()


def test_the_page_says_what_to_do_while_it_is_empty(settings: Settings) -> None:
    from streamlit.testing.v1 import AppTest

    def script() -> None:
        from apps.medical.ui.page import medical, page

        medical.clear()
        page()

    app = AppTest.from_function(script, default_timeout=60).run()
    assert not app.exception
    assert app.title[0].value == "Medical"
    assert "triscope medical listen" in app.info[0].value


def test_a_finished_study_shows_volumes_and_downloads_and_a_refused_one_its_reason(finished: MedicalService) -> None:
    from streamlit.testing.v1 import AppTest

    def script() -> None:
        import streamlit as st

        from apps.medical.ui.page import medical, page

        if "cleared" not in st.session_state:
            medical.clear()
            st.session_state["cleared"] = True
        page()

    done, refused = (next(s for s in finished.store.latest() if s.status == status) for status in ("done", "refused"))
    app = AppTest.from_function(script, default_timeout=90)
    app.session_state["medical_study"] = done.study_id
    app.run()
    assert not app.exception
    values = [metric.value for metric in app.metric]
    assert values == [f"{done.report['volumes_ml'][f'{side} hippocampus']:.2f} mL" for side in ("left", "right")]
    assert len(app.get("download_button")) == 4
    app.session_state["medical_study"] = refused.study_id
    app.run()
    assert "modality CT" in app.error[0].value
    app.session_state["medical_study"] = "no-such-study"
    app.run()
    assert "no study" in app.error[0].value


@pytest.fixture
def browser(program: Callable[[str], str]) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    binary = program("chromium")
    with sync_playwright() as player:
        opened = player.chromium.launch(executable_path=binary, args=CHROMIUM)
        yield opened
        opened.close()


def until(page: Any, check: Callable[[], bool], timeout: float = 30.0) -> None:
    """Wait for `check` while the page goes on; components live in shadow trees, which locators see through."""
    deadline = time.monotonic() + timeout
    while not check():
        assert time.monotonic() < deadline, f"not within {timeout} s"
        page.wait_for_timeout(50)


def rows(page: Any) -> list[str]:
    return [r.get_attribute("data-id") for r in page.locator(".worklist tbody tr").all()]


def test_the_pages_in_a_real_browser(finished: MedicalService, browser: Any) -> None:
    settings = load_settings().settings
    done, refused = (next(s for s in finished.store.latest() if s.status == status) for status in ("done", "refused"))
    page = browser.new_page(viewport={"width": 1400, "height": 1150})
    requests: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    with page_server("127.0.0.1", free_port()) as address:
        page.goto(address)
        page.get_by_text("Open the medical page").wait_for(timeout=60_000)
        page.goto(f"{address}/medical")
        page.locator(f'.worklist tr[data-id="{done.study_id}"]').click(timeout=60_000)
        page.locator(".mpr[data-draws]").wait_for(timeout=60_000)
        page.get_by_text("Left hippocampus").wait_for()
        _viewer(page)
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        page.wait_for_timeout(500)
        page.screenshot(path=SCREENSHOTS / "medical.png", full_page=True)
        _selection(page, finished, done.study_id, refused.study_id)
        page.emulate_media(color_scheme="dark")
        page.reload()
        page.locator(".worklist tbody tr").first.wait_for(timeout=60_000)
        page.wait_for_function("getComputedStyle(document.querySelector('.stApp')).backgroundColor !== 'rgb(255, 255, 255)'")
        page.locator(f'.worklist tr[data-id="{done.study_id}"]').click()
        page.get_by_text("Left hippocampus").wait_for()
        page.wait_for_timeout(500)
        page.screenshot(path=SCREENSHOTS / "medical_dark.png", full_page=True)
    outside = [url for url in requests if not url.startswith((address, "data:", "blob:", address.replace("http", "ws")))]
    assert outside == []
    assert [e for e in errors if "404" not in e] == []
    assert settings.ui_address == "127.0.0.1"


def _viewer(page: Any) -> None:
    """Scrolling and window/level happen in the browser; the sides are named."""
    viewer = page.locator(".mpr")

    def cross() -> list[int]:
        return [int(v) for v in viewer.get_attribute("data-cross").split(",")]

    frames: list[int] = []
    page.on("websocket", lambda socket: socket.on("framesent", lambda _: frames.append(1)))
    before = cross()
    axial = page.locator('canvas[data-plane="axial"]')
    axial.hover()
    for _ in range(5):
        page.mouse.wheel(0, -100)
    until(page, lambda: cross()[2] == before[2] + 5)
    box = axial.bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.5)
    until(page, lambda: cross()[:2] != before[:2])
    right = cross()[0]
    page.mouse.click(box["x"] + box["width"] * 0.7, box["y"] + box["height"] * 0.5)
    until(page, lambda: cross()[0] != right)
    assert cross()[0] < right, "radiological: the patient's right (large x) is on the left of the screen"
    left = cross()[0]
    page.locator(".radiological").uncheck()
    page.mouse.click(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.5)
    until(page, lambda: abs(cross()[0] - left) < 3)
    assert abs(cross()[0] - left) < 3, "neurological: the same place on the screen is the other side"
    page.locator(".radiological").check()
    window = viewer.get_attribute("data-window")
    page.mouse.move(box["x"] + 150, box["y"] + 150)
    page.mouse.down(button="right")
    page.mouse.move(box["x"] + 220, box["y"] + 190, steps=5)
    page.mouse.up(button="right")
    until(page, lambda: viewer.get_attribute("data-window") != window)
    page.locator(".preset").select_option("Full")
    page.locator('canvas[data-plane="sagittal"]').click()
    page.keyboard.press("ArrowUp")
    assert frames == [], "nothing of this went through the server"


def _selection(page: Any, service: MedicalService, chosen: str, other: str) -> None:
    """New rows arrive on top; the chosen study stays the chosen one, and a click takes the row that was clicked."""
    for number in range(4):
        service.store.add(f"new-{number}", source="test", blob="sha256:0", patient=f"New^{number}", description="just arrived")
    until(page, lambda: len(rows(page)) == 6)
    assert rows(page)[0].startswith("new-")
    selected = page.locator('.worklist tr[aria-selected="true"]')
    assert selected.get_attribute("data-id") == chosen
    page.get_by_text("Left hippocampus").wait_for()
    page.locator(f'.worklist tr[data-id="{other}"]').click()
    page.get_by_text("Refused:").wait_for(timeout=30_000)
    assert page.locator('.worklist tr[aria-selected="true"]').get_attribute("data-id") == other
