"""Claims about the page of `headwater serve` as a reader has it, in Chromium."""

import re
import threading

import numpy as np
import pytest

from headwater.report import Known
from headwater.report.live import Live
from headwater.report.server import Server
from headwater.store.scores import Scores

QUERIES, ROWS = 120, 30
EVIL = "</script><img src=x onerror=alert(1)><b>bold</b>\u202egnp.exe"


def scores():
    values = np.random.default_rng(1).normal(size=(QUERIES, ROWS)) * 1e-5
    ids = np.array([f"q/{k} & co" for k in range(QUERIES)])
    return Scores(values, ids, np.arange(ROWS), unit="removal", n_train=float(ROWS), method="Ekfac()")


@pytest.fixture(scope="module")
def address():
    rng = np.random.default_rng(0)
    images = rng.random((QUERIES, 8, 8))
    texts = [EVIL, *(f"row {k} says this " * 60 for k in range(1, ROWS))]
    known = Known(
        rows={"text": texts, "label": np.arange(ROWS) % 4},
        queries={f"q/{k} & co": (image, k % 4) for k, image in enumerate(images)},
        predictions=np.where(np.arange(QUERIES) % 5 == 0, (np.arange(QUERIES) + 1) % 4, np.arange(QUERIES) % 4),
        title="Live",
    )
    server = Server(Live(scores(), known))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server.address
    server.shutdown()
    thread.join()
    server.server_close()


def chosen(page, name):
    """Waits until the case is that one."""
    page.wait_for_function("name => document.querySelector('#case h3 span')?.textContent === name", arg=name)


def column(page, end):
    where = page.locator(f"#case .end:has(h4.{end})")
    values = [float(s.replace("\N{MINUS SIGN}", "-")) for s in where.locator(".score").all_inner_texts()]
    return where.locator(".what .id").all_inner_texts(), values


def test_a_query_is_typed_and_its_rows_are_there(visit, address):
    page, top = visit(address), scores().top(5)
    chosen(page, "q/0 & co")
    assert page.locator("#count").inner_text() == "120 queries" and page.locator("#list a").count() == 50
    page.fill("#find", "q/17 & co")
    chosen(page, "q/17 & co")
    for end, ids, values in (
        ("help", top.helpful_ids[17], top.helpful_scores[17]),
        ("harm", top.harmful_ids[17], top.harmful_scores[17]),
    ):
        shown, numbers = column(page, end)
        assert shown == [str(i) for i in ids]
        np.testing.assert_allclose(numbers, values * 1e6, rtol=0.005)
    assert page.locator("#count").inner_text() == "1 query" and page.locator("#next").is_disabled()
    page.select_option("#k", "10")
    page.wait_for_function("() => document.querySelectorAll('#case .end li').length === 20")


def test_next_and_previous_go_on_beyond_what_is_listed(visit, address):
    page = visit(address)
    chosen(page, "q/0 & co")
    page.click("#next")
    chosen(page, "q/1 & co")
    assert page.evaluate("document.activeElement.id") == "next" and page.url.endswith("#query=q%2F1%20%26%20co")
    page.keyboard.press("k")
    chosen(page, "q/0 & co")
    page.click("#list a >> nth=49")
    chosen(page, "q/49 & co")
    page.keyboard.press("j")
    chosen(page, "q/50 & co")
    assert page.locator("#list a").count() == 100 and page.locator("#case .place").inner_text() == "51 of 120"
    page.click("#rest button")
    page.wait_for_function("() => document.querySelectorAll('#list a').length === 120")
    assert page.locator("#rest").count() == 0
    page.check("#wrong")
    page.wait_for_function("() => document.querySelector('#count').textContent === '24 queries'")


def test_a_train_row_shows_what_it_acts_on_and_leads_back(visit, address):
    page = visit(address, fragment="#query=q%2F7%20%26%20co")
    chosen(page, "q/7 & co")
    row = int(scores().top(1).helpful_ids[7, 0])
    page.click("#case .end:has(h4.help) a.id >> nth=0")
    chosen(page, str(row))
    assert page.locator("#case h3").inner_text() == f"Training row {row}"
    values = scores().values[:, row]
    assert column(page, "help")[0] == [f"q/{q} & co" for q in np.argsort(-values)[:5]]
    assert column(page, "harm")[0] == [f"q/{q} & co" for q in np.argsort(values)[:5]]
    page.go_back()
    chosen(page, "q/7 & co")
    page.fill("#row", "12")
    page.press("#row", "Enter")
    chosen(page, "12")
    page.click("#list a >> nth=2")
    chosen(page, "q/2 & co")


def test_text_from_data_stays_text(visit, address):
    page = visit(address, fragment="#row=0")
    chosen(page, "0")
    assert "<img src=x onerror=alert(1)>" in page.locator("#case .text").first.inner_text()
    assert page.locator("main b b, main .text b, [onerror], img[src=x]").count() == 0


def test_what_goes_wrong_is_said_on_the_page(browser, address):
    page = browser.new_page()
    page.goto(f"{address}#row=99")
    page.wait_for_selector("#case [role=alert]")
    assert page.locator("#case [role=alert]").inner_text() == "There is no training row '99'."
    page.click("#list a >> nth=3")
    chosen(page, "q/3 & co")
    page.goto(re.sub("token=.*", "token=no", address))
    assert "token" in page.locator("body").inner_text()
    page.close()


def test_nothing_is_wider_than_a_phone_and_the_keyboard_reaches_all(visit, address):
    page = visit(address, width=390, height=844)
    chosen(page, "q/0 & co")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    names = "all => all.every(e => e.labels.length)"
    assert page.eval_on_selector_all("input, select", names)
