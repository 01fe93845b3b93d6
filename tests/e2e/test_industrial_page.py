"""The station's page and the start page: decisions through AppTest; lamp, selection and teaching in a real Chromium."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from apps.common.settings import Settings
from apps.common.ui.server import page_server
from apps.common.workers import reporting
from apps.industrial.acquisition.generated import GeneratedSource
from apps.industrial.anomaly.calibration import Rates
from apps.industrial.bootstrap import open_industrial
from apps.industrial.errors import InputError
from apps.industrial.evaluation.dataset import Sample
from apps.industrial.images import png
from apps.industrial.service import IndustrialService
from apps.industrial.synthesis.defects import add_defect
from apps.industrial.synthesis.textures import good_part
from apps.industrial.ui.job import Teaching, TeachingJobs
from apps.industrial.worker import REPORTS, run_worker
from pipelines import Log
from tests.e2e.test_pages import SCREENSHOTS, browser, rows, until
from tests.services import free_port

__all__ = ["browser"]
RECIPE = "brushed-plate"


def good_files(folder: Path, number: int, texture: str = "brushed") -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for i, (image, _) in enumerate(GeneratedSource(texture, number, defect_share=0.0, seed=1).parts()):
        (folder / f"{i:03d}.png").write_bytes(png(image))
    return sorted(folder.iterdir())


@pytest.fixture
def line(settings: Settings, tmp_path: Path) -> Iterator[tuple[IndustrialService, Log]]:
    """A recipe, and a lot of 80 parts that were judged by it."""
    service, log = open_industrial(settings)
    service.teach(RECIPE, [Sample(path, "good") for path in good_files(tmp_path / "good", 40)])
    for frame in GeneratedSource("brushed", 80, defect_share=0.12, seed=4).frames(threading.Event()):
        service.submit(frame.content, RECIPE, "station-1", frame.serial, "2026-47", frame.time)
    run_worker(service, log, threading.Event(), until_idle=True)
    yield service, log
    service.close()
    log.close()


def defective(service: IndustrialService, log: Log, number: int) -> str:
    """One more part, with a hole; its frame."""
    rng = np.random.default_rng(number)
    image, _ = add_defect(good_part("brushed", rng), "chip", rng)
    frame = service.submit(png(image), RECIPE, "station-1", f"P-{number}", "2026-47")
    run_worker(service, log, threading.Event(), until_idle=True)
    return frame


def script() -> None:
    import streamlit as st

    from apps.industrial.ui.page import industrial, page

    if "cleared" not in st.session_state:
        industrial.clear()
        st.session_state["cleared"] = True
    page()


def test_the_operator_overrules_and_the_next_teaching_takes_it(line: tuple[IndustrialService, Log], tmp_path: Path) -> None:
    from streamlit.testing.v1 import AppTest

    service, log = line
    frame = defective(service, log, 1)
    part = service.store.find(frame)
    assert part is not None
    assert part.verdict.verdict in ("review", "fail")
    app = AppTest.from_function(script, default_timeout=90)
    app.session_state["industrial_part"] = frame
    app.run()
    assert not app.exception
    values = {metric.label: metric.value for metric in app.metric}
    counts = service.store.counts(RECIPE, "2026-47")
    assert (values["parts"], values["failed"]) == (str(counts.total), str(counts.failed))
    assert f">{part.verdict.verdict.upper()}</div>" in "".join(m.value for m in app.markdown)
    assert any("parts wait" in caption.value for caption in app.caption)
    app.text_input(key=f"note_chosen_{frame}").set_value("only oil")
    app.button(key=f"good_chosen_{frame}").click().run()
    assert not app.exception
    assert any("good, says" in success.value and "only oil" in success.value for success in app.success)
    good, bad = service.learned_from_line(RECIPE, tmp_path)
    assert ([sample.path.stem.partition("-")[2] for sample in good], bad) == ([frame], [])
    app.session_state["industrial_tab"] = "Teach"
    app.run()
    next(button for button in app.button if button.label == "Teach").click().run()
    assert not app.exception
    deadline = time.monotonic() + 90
    while service.recipes.facts(RECIPE).good != 41:  # the 40 of before, which no one handed in again, and this one
        assert time.monotonic() < deadline
        time.sleep(0.1)
    queue = service.store.to_review()
    assert frame not in [waiting.verdict.frame_id for waiting in queue]
    app.button(key=f"defect_queue_{queue[0].verdict.frame_id}").click().run()
    assert len(service.learned_from_line(RECIPE, tmp_path)[1]) == 1
    assert any("ten more held about" in caption.value for caption in app.caption)


def test_the_station_in_a_real_browser(line: tuple[IndustrialService, Log], settings: Settings, browser: Any, tmp_path: Path) -> None:
    service, log = line
    first = defective(service, log, 2)
    page = browser.new_page(viewport={"width": 1400, "height": 1500})
    errors: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: requests.append(request.url))
    with page_server("127.0.0.1", free_port()) as address:
        page.goto(f"{address}/industrial")
        lamp = page.locator('[aria-label="verdict"]')
        lamp.wait_for(timeout=60_000)
        until(page, lambda: len(rows(page)) == 20)
        part = service.store.find(first)
        assert part is not None
        assert lamp.inner_text() == part.verdict.verdict.upper()
        assert lamp.bounding_box()["height"] > 100, "to be read from three metres"
        page.locator(f'.worklist tr[data-id="{first}"]').click()
        second = defective(service, log, 3)
        page.mouse.move(5, 5)
        until(page, lambda: rows(page)[0] == second)
        assert page.locator('.worklist tr[aria-selected="true"]').get_attribute("data-id") == first
        until(page, lambda: page.locator("img").count() >= 21)
        page.wait_for_timeout(1000)
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        page.mouse.move(700, 400)
        page.mouse.wheel(0, -3000)
        page.wait_for_timeout(500)
        page.screenshot(path=SCREENSHOTS / "industrial.png", full_page=True)
        assert page.get_by_role("tab", name="Chosen part").get_attribute("aria-selected") == "true", "a chosen row is shown"
        page.get_by_role("tab", name="Control charts").click()
        page.locator("canvas, svg.marks").first.wait_for(timeout=30_000)
        page.get_by_role("tab", name="Thresholds").click()
        page.get_by_label("Good parts that may fail [%]").fill("5")
        page.get_by_label("Good parts that may be looked at [%]").fill("20")
        page.get_by_role("button", name="Move the thresholds").click()
        until(page, lambda: service.recipes.facts(RECIPE).rates == Rates(0.2, 0.05))
        page.get_by_text("of good parts are expected there").first.wait_for()
        page.wait_for_timeout(1500)
        page.screenshot(path=tmp_path / "thresholds.png", full_page=True)
        page.get_by_role("tab", name="Teach").click()
        page.locator('[data-test-script-state="notRunning"]').first.wait_for()  # the page takes no files while it draws the tab
        page.wait_for_timeout(500)
        page.get_by_label("Name of the recipe").fill("wooden")
        files = good_files(tmp_path / "wood", 10, "wood")
        page.locator('input[type="file"]').first.set_input_files([str(path) for path in files])
        page.get_by_text("009.png").or_(page.get_by_text("000.png")).first.wait_for(timeout=30_000)
        page.get_by_role("button", name="Teach", exact=True).click()
        page.get_by_text("Recipe wooden:").wait_for(timeout=30_000)
        third = defective(service, log, 4)
        until(page, lambda: rows(page)[0] == third)  # the line goes on while a recipe is taught
        page.get_by_text("Recipe wooden: 10 good parts").wait_for(timeout=120_000)
        page.get_by_text("only 10 good parts").first.wait_for()
        assert service.recipes.facts("wooden").good == 10
    assert [e for e in errors if "404" not in e] == []
    assert [url for url in requests if not url.startswith((address, "data:", "blob:", address.replace("http", "ws")))] == []


def test_a_station_that_died_leaves_no_verdict_on_the_lamp(line: tuple[IndustrialService, Log], monkeypatch: pytest.MonkeyPatch) -> None:
    from streamlit.testing.v1 import AppTest

    from apps.industrial.ui import page as module

    service, log = line

    def lamp() -> str:
        module.waiting.clear()
        app.run()
        assert not app.exception
        return next(m.value for m in app.markdown if 'aria-label="verdict"' in m.value)

    clock = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    app = AppTest.from_function(script, default_timeout=90)
    lamp()
    clock[0] += 100
    assert "NO VERDICT" not in lamp(), "nothing waits: the last part is what lies there"
    service.submit(png(good_part("brushed", np.random.default_rng(5))), RECIPE, "station-1", "P-5", "2026-47")
    assert "NO VERDICT" not in lamp(), "it has just come"
    clock[0] += 6
    assert "NO VERDICT" in lamp()
    assert any("1 frames wait, and none was judged for 6 s" in error.value for error in app.error)
    run_worker(service, log, threading.Event(), until_idle=True)
    assert "NO VERDICT" not in lamp()


def test_one_teaching_at_a_time_and_what_went_wrong_is_said(tmp_path: Path) -> None:
    jobs, go = TeachingJobs(), threading.Event()

    def fails(folder: Path, report: Any) -> Any:
        report("learning", 0.5)
        assert go.wait(30)
        raise InputError("no image can be read")

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    jobs.start(Teaching("plate"), tmp_path / "a", fails)
    with pytest.raises(InputError, match="'plate' is being taught"):
        jobs.start(Teaching("cup"), tmp_path / "b", fails)
    assert not (tmp_path / "b").exists(), "its pictures are removed"
    go.set()
    deadline = time.monotonic() + 30
    while jobs.latest is None or jobs.latest.running or (tmp_path / "a").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert (jobs.latest.error, jobs.latest.step, jobs.latest.share) == ("no image can be read", "learning", 0.5)


def test_the_start_page_shows_workers_and_models(
    line: tuple[IndustrialService, Log], settings: Settings, browser: Any, tmp_path: Path
) -> None:
    service, log = line
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    stop = threading.Event()
    worker = threading.Thread(target=run_worker, args=(service, log, stop))
    with page_server("127.0.0.1", free_port()) as address, reporting(settings, REPORTS):
        worker.start()
        page.goto(address)
        page.get_by_text("a second").first.wait_for(timeout=60_000)
        page.get_by_text("0 waiting").first.wait_for(timeout=30_000)
        page.get_by_text("no finance worker is running").wait_for()
        page.get_by_role("heading", name="Models").wait_for(timeout=30_000)
        page.screenshot(path=tmp_path / "start.png", full_page=True)
        stop.set()
        worker.join(30)
