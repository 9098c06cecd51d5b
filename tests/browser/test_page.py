"""Claims about the page as a reader has it, in Chromium."""

import numpy as np
import pytest

from headwater.evaluate.verification import Check, Verification
from headwater.report import Known, Tokens, write
from headwater.report.colours import TokenScores
from headwater.store.scores import Scores

QUERIES, ROWS = 20, 30
EVIL = "</script><img src=x onerror=alert(1)><b>bold</b>\u202egnp.exe\x07"


NAMES = [f"q/{k} & co" for k in range(QUERIES)]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A page of pictures: query k has label k % 4, and every fifth one is predicted wrongly."""
    rng = np.random.default_rng(0)
    images, labels = rng.random((ROWS, 8, 8)), np.arange(ROWS) % 4
    predictions = np.where(np.arange(QUERIES) % 5 == 0, (np.arange(QUERIES) + 1) % 4, np.arange(QUERIES) % 4)
    failed = Verification("Ekfac()", 8, 4, 0, 1e-3, (Check("plain gradients, own operator", 0.5, 1e-3),))
    return scores().report(
        tmp_path_factory.mktemp("pages") / "pictures.html",
        rows=(images, labels),
        queries=dict(zip(NAMES, zip(images, labels, strict=True), strict=False)),
        predictions=predictions,
        groups=["a group of a long name", "unbreakablylongwords"] * (ROWS // 2),
        self_influence=rng.random(ROWS),
        losses=rng.random(ROWS),
        checks=[failed],
    )


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A page of texts that mean no good, the rows in pieces with colours."""
    words = [EVIL, *(f"row {k} says this " * 60 for k in range(1, ROWS))]
    return scores().report(
        tmp_path_factory.mktemp("pages") / "texts.html",
        title=EVIL,
        rows=lambda row: Tokens([EVIL, " and", " more"], [1.0, -1.0, 0.0]) if row % 2 else words[row],
        queries=dict(zip(NAMES, [EVIL, *(f"query about {k}" for k in range(1, QUERIES))], strict=True)),
    )


@pytest.fixture(scope="session")
def table(tmp_path_factory):
    """A page of table rows, longer than what is shown at once."""
    rng = np.random.default_rng(0)
    rows = {f"column {c}": rng.integers(0, 3, ROWS) for c in range(14)} | {"city": list("xyz") * 10}
    return scores().report(
        tmp_path_factory.mktemp("pages") / "table.html",
        rows=rows,
        queries={name: {key: column[k] for key, column in rows.items()} for k, name in enumerate(NAMES)},
        groups="city",
    )


def scores():
    values = np.random.default_rng(1).normal(size=(QUERIES, ROWS)) * 1e-5
    ids = np.array(NAMES)
    return Scores(values, ids, np.arange(ROWS), unit="removal", n_train=float(ROWS), method="Ekfac()")


def chosen(page):
    return page.locator("#case h3 span").inner_text()


def listed(page):
    return page.locator("#list .name > .id").all_inner_texts()


def test_the_first_query_is_shown_with_its_rows(visit, pictures):
    page, top = visit(pictures), scores().top(5)
    assert chosen(page) == "q/0 & co" and page.locator("#count").inner_text() == "20 queries"
    for end, ids, values in (
        ("help", top.helpful_ids, top.helpful_scores),
        ("harm", top.harmful_ids, top.harmful_scores),
    ):
        column = page.locator(f".end:has(h4.{end})")
        assert column.locator(".id").all_inner_texts() == [str(i) for i in ids[0]]
        shown = [float(s.replace("\N{MINUS SIGN}", "-")) for s in column.locator(".score").all_inner_texts()]
        np.testing.assert_allclose(shown, values[0] * 1e6, rtol=0.005)
        assert "10⁻⁶" in column.locator("h4").inner_text()
        assert column.locator("img").count() == 5
    loaded = page.eval_on_selector_all("img", "all => all.filter(i => i.loading !== 'lazy').every(i => i.naturalWidth)")
    assert loaded


def test_queries_are_found_sorted_and_filtered(visit, pictures):
    page = visit(pictures)
    page.fill("#find", "q/13")
    assert listed(page) == ["q/13 & co"] and chosen(page) == "q/13 & co"
    assert page.locator("#count").inner_text() == "1 of 20 queries"
    page.fill("#find", "nothing like it")
    assert listed(page) == [] and page.locator("#next").is_disabled()
    page.fill("#find", "")
    page.select_option("#sort", "harm")
    worst = np.argsort(scores().values.min(1))
    assert listed(page) == [f"q/{k} & co" for k in worst]
    page.select_option("#sort", "id")
    assert listed(page) == [f"q/{k} & co" for k in range(QUERIES)]
    page.select_option("select[data-of=l]", "2")
    assert listed(page) == [f"q/{k} & co" for k in range(2, QUERIES, 4)]
    page.select_option("select[data-of=l]", "")
    page.check("#wrong")
    assert listed(page) == [f"q/{k} & co" for k in range(0, QUERIES, 5)]


def test_the_next_and_the_previous_query_are_a_button_and_a_key_away(visit, pictures):
    page = visit(pictures)
    assert page.locator("#previous").is_disabled()
    page.click("#next")
    assert chosen(page) == "q/1 & co"
    page.keyboard.press("j")
    page.keyboard.press("ArrowRight")
    assert chosen(page) == "q/3 & co"
    page.keyboard.press("k")
    assert chosen(page) == "q/2 & co" and page.locator("#list a[aria-current]").inner_text().startswith("q/2")
    page.keyboard.press("/")
    page.keyboard.type("jk")
    assert page.input_value("#find") == "jk"  # letters in a field are letters


def test_a_link_leads_to_its_query(visit, pictures):
    page = visit(pictures, fragment="#query=q%2F7%20%26%20co")
    assert chosen(page) == "q/7 & co"
    page.keyboard.press("j")
    assert page.url.endswith("#query=q%2F8%20%26%20co")
    page.click("#list a >> nth=2")
    assert chosen(page) == "q/2 & co" and page.url.endswith("#query=q%2F2%20%26%20co")
    page.go_back()
    assert chosen(page) == "q/8 & co"
    page.check("#wrong")
    page.evaluate("location.hash = '#query=' + encodeURIComponent('q/3 & co')")
    page.wait_for_function("document.querySelector('#case h3 span').textContent === 'q/3 & co'")
    assert not page.is_checked("#wrong")  # it would hide what the link asks for
    page.evaluate("location.hash = '#query=%E0%A4%A'")
    assert chosen(page) == "q/3 & co"


def test_everything_can_be_reached_with_the_keyboard_and_seen_there(visit, pictures):
    page, seen = visit(pictures), []
    for _ in range(9):
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate(
                "[document.activeElement.id || document.activeElement.getAttribute('href') || "
                "document.activeElement.className, getComputedStyle(document.activeElement).outlineStyle]"
            )
        )
    assert seen[0][0] == "#queries" and "find" in [name for name, _ in seen]
    assert all(style == "solid" for _, style in seen)
    names = "all => all.map(e => e.labels ? e.labels.length : 1)"
    assert all(page.eval_on_selector_all("input, select", names))


def test_text_from_data_stays_text(visit, texts):
    page = visit(texts)
    assert page.locator("h1").inner_text() == EVIL.replace("\u202e", "\\u202e").replace("\x07", "\\x07")
    for _ in range(QUERIES):
        assert page.locator("main b b, main .text b, [onerror], img[src=x]").count() == 0
        page.keyboard.press("j")
    assert "<img src=x onerror=alert(1)>" in page.locator("#list").inner_text()


def test_tokens_have_colours_and_their_numbers(visit, texts):
    page = visit(texts)
    piece = page.locator("#case .text .p5").first
    assert piece.get_attribute("title") == "+1"
    assert piece.evaluate("e => getComputedStyle(e).backgroundColor") != "rgba(0, 0, 0, 0)"


def test_long_texts_fold(visit, texts):
    page = visit(texts)
    more = page.locator("#case button.more").first
    text = more.locator("xpath=..")
    short = len(text.inner_text())
    more.click()
    assert len(text.inner_text()) > 2 * short and more.get_attribute("aria-expanded") == "true"


def test_columns_that_differ_from_the_query_are_marked(visit, table):
    page = visit(table)
    own = dict(cells(page.locator("#case .query")))
    row = page.locator("#case .end li").first
    row.locator("summary").click()
    assert len(cells(row)) == len(own) == 15
    for name, value in cells(row):
        cell = row.locator(f".cells div:has(dt:text-is('{name}'))")
        assert ("differs" in cell.get_attribute("class")) == (value != own[name])


def cells(where):
    return where.locator(".cells div").evaluate_all(
        "all => all.map(e => [e.querySelector('dt').textContent, e.querySelector('dd').lastChild.textContent])"
    )


CONTRAST = """() => {
  const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const luminance = (rgb) => rgb.slice(0, 3).map((v) => linear(v / 255))
    .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
  const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const under = (e) => {
    const layers = [];
    for (let at = e; at; at = at.parentElement) layers.unshift(parse(getComputedStyle(at).backgroundColor));
    return layers.reduce((below, [r, g, b, a]) => [r, g, b].map((v, k) => v * a + below[k] * (1 - a)), [255, 255, 255]);
  };
  const poor = [];
  for (const e of document.querySelectorAll("main *, header *, footer *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.offsetParent || e.disabled || e.closest("svg, option")) continue;
    const [one, two] = [luminance(parse(getComputedStyle(e).color)), luminance(under(e))].sort((a, b) => b - a);
    const contrast = (one + 0.05) / (two + 0.05);
    if (contrast < 4.5) poor.push([e.className, e.textContent.slice(0, 40), contrast]);
  }
  return poor;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_light_and_dark(visit, pictures, texts, table, scheme):
    papers = set()
    for file in (pictures, texts, table):
        page = visit(file, color_scheme=scheme)
        papers.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert page.evaluate(CONTRAST) == []
    (paper,) = papers
    assert (int(paper.removeprefix("rgb(").split(",")[0]) < 100) == (scheme == "dark")


def test_nothing_is_wider_than_a_phone(visit, pictures, texts, table):
    for file in (pictures, texts, table):
        page = visit(file, width=390, height=844)
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        boxes = page.locator("#case li").evaluate_all("all => all.map(e => e.getBoundingClientRect().right)")
        assert max(boxes) <= 390


def test_what_cannot_be_trusted_is_said_first(visit, pictures):
    page = visit(pictures)
    alarm = page.locator("header .alarm")
    assert "Do not rely on these scores yet" in alarm.inner_text()
    assert alarm.bounding_box()["y"] < page.locator("#queries").bounding_box()["y"]


def test_without_javascript_the_first_queries_are_shown(visit, pictures):
    page = visit(pictures, java_script_enabled=False)
    assert page.locator("noscript article.case").count() == 3
    assert page.locator("noscript article.case img").first.is_visible() and not page.locator("#browser").is_visible()


def test_the_page_can_be_printed(visit, pictures):
    page = visit(pictures)
    page.emulate_media(media="print")
    assert not page.locator(".side").is_visible() and not page.locator("nav").is_visible()
    assert page.locator("#case").is_visible() and len(page.pdf()) > 10_000


@pytest.fixture(scope="session")
def coloured(tmp_path_factory):
    """A page on which each pair has colours of its own: row 3 is [1, -1, ...] times its score; the evil is a token."""
    pieces = ["Once", " upon", EVIL, " a", " time"]
    shares = np.array([0.5, -0.25, 0.75, 0.0, 0.0])
    found = scores()
    values = {(q, n): shares * found[q, n] for q in range(QUERIES) for n in range(ROWS)}
    known = Known(tokens=TokenScores(lambda row: pieces, lambda query: ["asked ", str(query)], values))
    return write(found, tmp_path_factory.mktemp("pages") / "coloured.html", known)


def test_tokens_of_a_row_have_the_colours_of_the_query_that_they_stand_beside(visit, coloured):
    page, own = visit(coloured), scores()
    for query in (0, 1):
        for end in ("help", "harm"):
            row = page.locator(f".end:has(h4.{end}) li").first
            score = own[query, int(row.locator(".id").inner_text())]
            spans = row.locator(".text span[class]")
            said = [float(s.get_attribute("title").replace("\N{MINUS SIGN}", "-")) for s in spans.all()]
            # In the unit of the score that stands beside them.
            shown = float(row.locator(".score").first.inner_text().replace("\N{MINUS SIGN}", "-"))
            np.testing.assert_allclose(sum(said), shown, rtol=0.02)
            up, down = ("p", "n") if score > 0 else ("n", "p")
            assert [s.get_attribute("class") for s in spans.all()] == [up + "4", down + "2", up + "5", "z", "z"]
            assert "<b>bold</b>" in spans.nth(2).inner_text()
        page.keyboard.press("j")
    assert page.locator("#list .peek").first.inner_text() == "asked 0"
    page.fill("#find", "asked 13")
    assert page.locator("#count").inner_text() == "1 of 20 queries"
    narrow = visit(coloured, width=390, height=800)
    assert narrow.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("#influence .deck .text").first.inner_text().startswith("Once upon")
