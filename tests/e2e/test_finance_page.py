"""The finance page: logic through AppTest, the live queue and the verdict in a real headless Chromium."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import date, datetime, timedelta
from typing import Any

import msgspec
import polars as pl
import pytest

from apps.common.settings import Settings
from apps.common.ui.server import page_server
from apps.finance.bootstrap import open_finance
from apps.finance.messages import LABELS, TRANSACTIONS, LabelMessage, TransactionMessage
from apps.finance.service import FinanceService
from apps.finance.transactions.generate import Generator, Population
from apps.finance.transactions.replay import replay_table
from apps.finance.worker import run_worker
from pipelines import Log
from tests.e2e.test_pages import SCREENSHOTS, browser, rows, until
from tests.services import free_port

__all__ = ["browser"]
FIRST = date(2025, 1, 1)
DAYS = 44


@pytest.fixture
def cards(settings: Settings) -> Iterator[tuple[FinanceService, Log]]:
    """A store with six weeks of decided transactions."""
    service, log = open_finance(settings)
    service.set_budget(8, "test")
    replay_table(pl.concat(Generator(Population(60, 120), FIRST, 5, 5.0).days(DAYS)), log)
    run_worker(service, log, threading.Event(), until_idle=True)
    yield service, log
    service.close()
    log.close()


def spend(cards: tuple[FinanceService, Log], number: int) -> str:
    """An amount that no card of these spends, on the day after the last: an alert."""
    service, log = cards
    when = datetime.combine(FIRST + timedelta(days=DAYS), datetime.min.time()) + timedelta(minutes=number)
    message = TransactionMessage(f"late-{number}", f"{when.isoformat()}Z", f"late-{number}", "7", 99_900)
    TRANSACTIONS.send(log, message, "test")
    run_worker(service, log, threading.Event(), until_idle=True)
    assert service.store.get(message.transaction_id).transaction.decision == "alert"
    return message.transaction_id


def script() -> None:
    import streamlit as st

    from apps.finance.ui.page import finance, page

    if "cleared" not in st.session_state:
        finance.clear()
        st.session_state["cleared"] = True
    page()


def test_the_page_says_what_to_do_while_it_is_empty(settings: Settings) -> None:
    from streamlit.testing.v1 import AppTest

    app = AppTest.from_function(script, default_timeout=60).run()
    assert not app.exception
    assert "triscope finance replay" in app.info[0].value
    assert "prove nothing about real ones" in app.caption[0].value


def test_an_alert_shows_why_and_takes_a_verdict(cards: tuple[FinanceService, Log]) -> None:
    from streamlit.testing.v1 import AppTest

    service, log = cards
    case = service.store.alerts()[0]
    chosen = case.transaction.transaction_id
    app = AppTest.from_function(script, default_timeout=90)
    app.session_state["finance_alert"] = chosen
    app.run()
    assert not app.exception
    values = {metric.label: metric.value for metric in app.metric}
    assert values["probability of fraud"] == f"{case.transaction.score:.1%}"
    assert values["amount"] == f"{case.transaction.amount_minor / 100:.2f} EUR"
    alerts, frauds = service.store.matured(service.store.latest().event_us - 7 * 86_400_000_000, 0)
    assert 0 < frauds <= alerts
    app.radio[0].set_value("genuine").run()
    app.selectbox[0].set_value("customer confirms it")
    app.text_area[0].set_value("on holiday")
    app.button[0].click().run()
    assert not app.exception
    assert "genuine: customer confirms it - on holiday" in app.success[0].value
    consumer = log.consumer("test", [LABELS.name])
    labels = []
    while any(consumer.behind().values()) or not labels:
        labels += [msgspec.json.decode(r.value, type=LabelMessage) for r in consumer.poll(1.0, 5000)]
    consumer.close()
    assert [(label.transaction_id, label.fraud) for label in labels if label.source.startswith("analyst")] == [(chosen, False)]
    app.number_input[0].set_value(9).run()
    assert service.store.budget() == 9
    service.set_budget(12, "a colleague")
    app.run()
    assert (service.store.budget(), app.number_input[0].value) == (12, 12), "a page that was open before undoes nothing"
    app.session_state["finance_alert"] = "nothing"
    app.run()
    assert "no transaction 'nothing'" in app.error[0].value


def test_the_queue_is_live_and_keeps_what_is_under_the_pointer(cards: tuple[FinanceService, Log], browser: Any) -> None:
    service, _ = cards
    first = spend(cards, 0)
    page = browser.new_page(viewport={"width": 1400, "height": 1500})
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    with page_server("127.0.0.1", free_port()) as address:
        page.goto(f"{address}/finance")
        page.locator(f'.worklist tr[data-id="{first}"]').click(timeout=60_000)
        page.get_by_text(f"Transaction {first}").wait_for(timeout=30_000)
        before = rows(page)
        under = page.locator(f'.worklist tr[data-id="{before[2]}"]')
        under.hover()
        place = under.bounding_box()["y"]
        second = spend(cards, 1)
        page.get_by_text("1 new; shown when the pointer leaves the list").wait_for(timeout=30_000)
        assert rows(page) == before
        assert under.bounding_box()["y"] == place
        page.mouse.move(5, 5)
        until(page, lambda: rows(page)[0] == second)
        assert page.locator('.worklist tr[aria-selected="true"]').get_attribute("data-id") == first
        page.get_by_text("raises the log-odds of fraud by").wait_for(timeout=30_000)
        page.locator("canvas, svg.marks").nth(2).wait_for(timeout=30_000)
        page.get_by_text("Alert budget and scores").click()
        page.wait_for_timeout(1500)
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENSHOTS / "finance.png", full_page=True)
        page.get_by_role("button", name="Save as fraud").click()
        page.get_by_text("fraud: customer denies it").wait_for(timeout=30_000)
        assert service.store.get(first).verdict == "fraud"
    assert [e for e in errors if "404" not in e] == []
