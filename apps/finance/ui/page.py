"""The finance page: the alert queue, the chosen alert with its reasons and timelines, the verdict, the budget."""

from __future__ import annotations

import getpass
import time

import streamlit as st

from apps.common.settings import load_settings
from apps.common.ui.outage import outage_said, page_of
from apps.common.ui.text import plain
from apps.common.ui.worklist import Row, worklist
from apps.finance.bootstrap import open_finance
from apps.finance.errors import FinanceError
from apps.finance.features.schema import CUSTOMER_SPAN, DAY, LABEL_DELAY
from apps.finance.messages import TRANSACTIONS
from apps.finance.service import VERDICT_REASONS, VERDICTS, FinanceService
from apps.finance.store import NOTHING, Case
from apps.finance.ui.charts import histogram_chart, moment, reasons_chart, timeline_chart
from apps.finance.worker import GROUP
from pipelines import Log, PipelineError

COLUMNS = ("Score", "Amount", "Card", "Terminal", "Time (UTC)", "Verdict", "First reason")
MATURED_DAYS = 14
SIMULATED = (
    "The models that travel with Triscope were trained on simulated cards, and so is the demo: their figures prove nothing about real ones."
)


@st.cache_resource
def finance() -> tuple[FinanceService, Log]:
    """The service and its log, opened once a server."""
    return open_finance(load_settings().settings)


@st.cache_data(ttl=3.0, show_spinner=False)
def waiting() -> int | None:
    """Transactions in the log that the worker has not decided; None while the log does not answer."""
    try:
        return sum(finance()[1].lag(GROUP, TRANSACTIONS.name).values())
    except PipelineError:
        return None


def row(case: Case) -> Row:
    """An alert as a row of the queue."""
    t = case.transaction
    reasons = t.message.reasons
    tone = {"fraud": "bad", "genuine": "good", "unsure": "warn"}.get(case.verdict or "", "")
    when = moment(t.event_us).strftime("%Y-%m-%d %H:%M:%S")
    cells = (f"{t.score:.3f}", f"{t.amount_minor / 100:.2f} {t.currency}", t.customer_id, t.terminal_id, when, case.verdict or "-")
    return Row(t.transaction_id, (*cells, reasons[0].text if reasons else "-"), tone)


def rate(total: int) -> float:
    """Decisions a second since the page was drawn last."""
    now = time.monotonic()
    before, at = st.session_state.get("finance_rate", (total, now - 2.0))
    st.session_state["finance_rate"] = (total, now)
    return float(max(0.0, (total - before) / max(now - at, 0.1)))


@st.fragment(run_every=2.0)
@outage_said
def queue() -> None:
    """The live queue; a new choice redraws the page."""
    service, _ = finance()
    store, latest = service.store, service.store.latest()
    if latest is None:
        st.info("No transaction yet. Start `triscope finance stream`, and send some with `triscope finance replay FILE`.")
        return
    behind, budget = waiting(), store.budget()
    today = latest.event_us // DAY * DAY
    figures = {
        "alerts today": f"{store.alerts_between(today, today + DAY)} of {budget}",
        "threshold": "budget spent" if latest.threshold >= NOTHING else f"{latest.threshold:.3f}",
        "decisions a second": f"{rate(store.total()):.0f}",
        "waiting in the log": "?" if behind is None else str(behind),
        "precision, matured labels": matured(service, latest.event_us),
    }
    for column, (label, value) in zip(st.columns(len(figures)), figures.items(), strict=True):
        column.metric(label, value)
    only_open = st.toggle("Only alerts without a verdict", key="finance_open")
    alerts = store.alerts(open_only=only_open)
    if not alerts:
        st.info("No alert to look at.")
        return
    chosen = worklist(COLUMNS, [row(case) for case in alerts], key="finance_worklist")
    if chosen and chosen != st.session_state.get("finance_alert"):
        st.session_state["finance_alert"] = chosen
        st.rerun()


def matured(service: FinanceService, now_us: int) -> str:
    """Precision of the alerts whose labels had seven days to come in, over two weeks of them."""
    until = now_us - LABEL_DELAY
    alerts, frauds = service.store.matured(until, until - MATURED_DAYS * DAY)
    return f"{frauds / alerts:.0%} of {alerts}" if alerts else "none matured"


def detail(case: Case) -> None:
    """The chosen alert."""
    t = case.transaction
    decision = t.message
    st.subheader(f"Transaction {plain(t.transaction_id)}")
    when, trace = f"{moment(t.event_us):%Y-%m-%d %H:%M:%S} UTC", t.traceparent[3:11]
    st.caption(f"{when} · {decision.model} · features v{decision.feature_version} · trace {trace}")
    service, _ = finance()
    history = service.store.timeline(customer=t.customer_id, until_us=t.event_us + DAY)
    known = range(t.event_us - CUSTOMER_SPAN, t.event_us)
    before = sorted(c.transaction.amount_minor / 100 for c in history if c.transaction.event_us in known)
    usual = before[(len(before) - 1) // 2] if before else None  # as AMOUNT_TO_MEDIAN has it
    figures = {
        "probability of fraud": f"{t.score:.1%}",
        "amount": f"{t.amount_minor / 100:.2f} {t.currency}",
        "card's usual amount": f"{usual:.2f}" if usual is not None else "-",
        "trees / sequence": " / ".join(f"{decision.scores.get(name, 0):.2f}" for name in ("boosting", "sequence")),
    }
    for column, (label, value) in zip(st.columns(len(figures)), figures.items(), strict=True):
        column.metric(label, value)
    left, right = st.columns([3, 2])
    with left:
        st.markdown("**Why**")
        if decision.reasons:
            st.altair_chart(reasons_chart(decision.reasons), width="stretch")
        st.caption(attention(decision.attention))
        st.markdown(f"**Card {plain(t.customer_id)}**")
        st.altair_chart(timeline_chart(history, t.transaction_id, usual), width="stretch")
        st.markdown(f"**Terminal {plain(t.terminal_id)}**")
        terminal = service.store.timeline(terminal=t.terminal_id, until_us=t.event_us + DAY)
        st.altair_chart(timeline_chart(terminal, t.transaction_id), width="stretch")
    with right:
        verdict_form(case)


def attention(shares: list[float]) -> str:
    """Where the sequence model looked, in words."""
    strongest = sorted(((share, len(shares) - 1 - i) for i, share in enumerate(shares)), reverse=True)[:3]
    places = {0: "this transaction", 1: "the one before"}
    return "The sequence model looked at " + ", ".join(
        f"{places.get(back, f'the {back}. before')} ({share:.0%})" for share, back in strongest
    )


def verdict_form(case: Case) -> None:
    """Fraud, genuine or unsure, with a reason from a list and a note."""
    t = case.transaction
    st.markdown("**Verdict**")
    if case.verdict:
        st.success(f"{case.verdict}: {case.verdict_reason}" + (f" - {plain(case.note)}" if case.note else ""))
    if case.fraud is not None:
        st.caption(f"label: {'fraud' if case.fraud else 'genuine'}")
    verdict = st.radio("Verdict", VERDICTS, horizontal=True, key=f"verdict_{t.transaction_id}", label_visibility="collapsed")
    with st.form(f"form_{t.transaction_id}", border=False):
        reason = st.selectbox("Reason", VERDICT_REASONS[verdict], key=f"reason_{verdict}_{t.transaction_id}")
        note = st.text_area("Note", key=f"note_{t.transaction_id}", max_chars=2000)
        if st.form_submit_button(f"Save as {verdict}", type="primary"):
            finance()[0].judge(t.transaction_id, verdict, reason, note, getpass.getuser())
            st.rerun()


@outage_said
def budget_panel() -> None:
    """The alert budget beside the distribution of scores."""
    service, _ = finance()
    latest = service.store.latest()

    def change() -> None:
        service.set_budget(int(st.session_state["finance_budget"]), getpass.getuser())

    with st.expander("Alert budget and scores", expanded=False):
        left, right = st.columns([1, 3])
        st.session_state["finance_budget"] = service.store.budget()  # what a colleague set meanwhile is shown, not overwritten
        left.number_input("Alerts a day", 1, 1_000_000, key="finance_budget", on_change=change)
        left.caption("The threshold follows: as many cards a day become alerts.")
        if latest is not None:
            right.altair_chart(histogram_chart(service.store.recent_scores(), latest.threshold), width="stretch")


@outage_said
def chosen_alert() -> None:
    """The alert that was chosen, or the newest."""
    chosen = st.session_state.get("finance_alert")
    if not chosen:
        newest = finance()[0].store.alerts(limit=1)
        chosen = newest[0].transaction.transaction_id if newest else None
    if chosen:
        try:
            detail(finance()[0].store.get(chosen))
        except FinanceError as error:
            st.error(plain(error))


@page_of
def page() -> None:
    """The whole page."""
    st.title("Finance")
    st.caption(SIMULATED)
    finance()
    queue()
    budget_panel()
    chosen_alert()
