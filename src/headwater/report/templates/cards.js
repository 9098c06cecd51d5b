// A case of the page: a query beside rows, or a row beside queries. Text goes in as textContent only, so that no data
// becomes markup. page.js or live.js follows, within one function: they say what is listed, and what is chosen of it.
const at = (id) => document.getElementById(id);
const MINUS = "\u2212", FOLD = 8, LONG = 420;
const QUERY = { kind: "query", one: "Query", asked: "the query", beside: "Training row", ends: ["Most helpful", "Most harmful"],
  none: ["No row helps this query.", "No row harms this query."] };
const ROW = { kind: "row", one: "Training row", asked: "the training row", beside: "Query", ends: ["Helps most", "Harms most"],
  none: ["It helps no query.", "It harms no query."] };
let data = JSON.parse(at("data").textContent), words = QUERY;

function el(tag, props, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(props || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") made.className = value;
    else if (name === "text") made.textContent = value;
    else if (name === "on") for (const [event, act] of Object.entries(value)) made.addEventListener(event, act);
    else made.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat()) if (child) made.append(child);
  return made;
}

function said(score, power) {
  const value = score / 10 ** (power || 0), size = Math.abs(value);
  const digits = size >= 99.95 ? 0 : size >= 9.995 ? 1 : size >= 0.0995 || size === 0 ? 2 : 3;
  return (value < 0 ? MINUS : "+") + size.toFixed(digits);
}

function bar(score, largest) {
  const svg = at("bar").content.firstElementChild.cloneNode(true);
  svg.classList.add(score < 0 ? "harm" : "help");
  svg.firstElementChild.setAttribute("width", largest ? (100 * Math.abs(score)) / largest : 0);
  return svg;
}

const amount = (text) => Number(text.replaceAll(",", "").replace(MINUS, "-"));

// Cards ------------------------------------------------------------------------------------------------------------

function picture(card, alt) {
  if (card.i === undefined) return null;
  return el("div", { class: "frame" }, el("img", { src: data.images[card.i], alt, loading: "lazy" }));
}

function leftOff(card, tokens, power) {
  const [largest, , rest] = tokens || [], added = rest ? `, ${said((rest / 1000) * largest, power)} in all` : "";
  return card.m ? el("span", { class: "cut", text: ` … ${card.m.toLocaleString("en")} more characters${added}` }) : null;
}

// The pieces of a text in the colours of one pair: what each adds to the score, in thousandths of the largest.
function coloured(card, tokens, power) {
  if (!tokens || !card.w) return null;
  const [largest, shares] = tokens;
  return card.w.map((piece, k) => {
    const share = shares[k], level = Math.min(5, Math.ceil(Math.abs(share) / 200 - 0.25));
    return [piece, level <= 0 ? "z" : (share > 0 ? "p" : "n") + level, said((share / 1000) * largest, power)];
  });
}

const whole = (card) => (card.w ? card.w.join("") : card.t);

function texts(card, tokens, power) {
  const drawn = card.k || coloured(card, tokens, power);
  if (drawn) {
    const pieces = drawn.map(([piece, colour, value]) => el("span", { class: colour, title: value, text: piece }));
    return el("p", { class: "text", dir: "auto" }, pieces, leftOff(card, card.k ? null : tokens, power));
  }
  const text = whole(card);
  if (text === undefined) return null;
  if (text.length <= LONG * 1.2) return el("p", { class: "text", dir: "auto" }, text, leftOff(card));
  const rest = el("span", { hidden: true }, text.slice(LONG), leftOff(card));
  const more = el("button", { type: "button", class: "more", "aria-expanded": "false", text: "… more" });
  more.addEventListener("click", () => {
    rest.hidden = !rest.hidden;
    more.textContent = rest.hidden ? "… more" : " less";
    more.setAttribute("aria-expanded", String(!rest.hidden));
  });
  return el("p", { class: "text", dir: "auto" }, text.slice(0, LONG), rest, more);
}

function cells(card, against) {
  if (!card.c) return null;
  const other = against && against.c ? new Map(against.c) : null;
  const differs = ([name, value]) => other !== null && other.has(name) && other.get(name) !== value;
  const entry = (cell) => {
    if (!differs(cell)) return el("div", { class: other ? "same" : null }, el("dt", { text: data.names[cell[0]] }), el("dd", { dir: "auto", text: cell[1] }));
    const theirs = other.get(cell[0]), by = amount(cell[1]) - amount(theirs), how = by > 0 ? "more" : by < 0 ? "less" : "other";
    return el("div", { class: "differs " + how, title: `${words.asked} has ${theirs}` }, el("dt", { text: data.names[cell[0]] }),
      el("dd", { dir: "auto" }, el("span", { class: "unseen", text: `${how} than ${words.asked}: ` }), cell[1]));
  };
  // Of a long row first what differs: the rest is folded away.
  const ordered = card.c.length <= FOLD + 2 ? card.c : [...card.c.filter(differs), ...card.c.filter((c) => !differs(c))];
  const made = el("div", {}, el("dl", { class: "cells" }, ordered.slice(0, ordered === card.c ? undefined : FOLD).map(entry)));
  if (ordered !== card.c) {
    const left = card.d ? `, of ${card.d} further ones nothing is on this page` : "";
    made.append(el("details", {}, el("summary", { text: `${ordered.length - FOLD} more columns${left}` }),
      el("dl", { class: "cells" }, ordered.slice(FOLD).map(entry))));
  }
  return made;
}

function body(card, alt, against, tokens, power) {
  return [picture(card, alt), texts(card, tokens, power), cells(card, against), card.n ? el("p", { class: "note", text: card.n }) : null];
}

function row([place, score, tokens], query, largest) {
  const r = data.rows[place], c = r.c, other = c.l !== undefined && query.c.l !== undefined && c.l !== query.c.l;
  const sign = score < 0 ? "harm" : "help";
  return el("li", {},
    el("div", { class: "head" },
      el("p", { class: "score " + sign }, said(score, query.x)),
      el("p", { class: "what" },
        c.l === undefined ? null : el("b", { dir: "auto", class: other ? "other" : null, title: other ? `not ${words.asked}'s label` : null, text: c.l }),
        el(r.link ? "a" : "span", { class: "id", dir: "auto", href: r.link, text: r.id }),
        r.g === undefined ? null : el("span", { class: "group", dir: "auto", title: r.g, text: r.g }),
        r.f === undefined ? null : el("span", { class: "doubt", text: r.f }))),
    bar(score, largest),
    body(c, `${words.beside} ${r.id}` + (c.l ? `, labelled ${c.l}` : ""), query.c, tokens, query.x));
}

function end(name, sign, pairs, query, largest) {
  const rows = pairs.map((pair) => row(pair, query, largest));
  if (!rows.length) rows.push(el("li", { class: "none", text: words.none[sign === "help" ? 0 : 1] }));
  const unit = query.x && pairs.length ? el("span", { class: "unit", text: query.u }) : null;
  return el("div", { class: "end" }, el("h4", { class: sign }, name, unit), el("ol", { class: "deck " + data.kind }, rows));
}

// place: among `count` that are listed, or -1; link: the list's own.
function draw(query, place, count, link) {
  const pane = at("case"), list = at("list"), c = query.c;
  const largest = Math.max(0, ...[...query.up, ...query.down].map(([, score]) => Math.abs(score)));
  const step = (by, name, key) => el("button", { type: "button", class: "step", id: by < 0 ? "previous" : "next",
    disabled: !count || place + by < 0 || place + by >= count, title: `${name} query (${key})`,
    on: { click: () => move(by) } }, name);
  const facts = [];
  if (c.l !== undefined) facts.push(["label", c.l]);
  if (query.p !== undefined) facts.push(["prediction", query.p, query.w]);
  if (query.s !== undefined) facts.push(["own loss", query.s]);
  if (query.g !== undefined) facts.push(["group", query.g]);
  pane.replaceChildren(
    el("div", { class: "bar-top" },
      el("h3", {}, words.one + " ", el("span", { dir: "auto", text: query.q })),
      words === ROW ? null : el("div", { class: "steps" }, step(-1, "Previous", "k or ←"),
        el("span", { class: "place", text: place < 0 ? "" : `${place + 1} of ${count}` }), step(1, "Next", "j or →"))),
    el("div", { class: "query " + data.kind }, el("div", { class: "thing" }, body(c, `${words.one} ${query.q}`)),
      el("div", { class: "about" },
        el("dl", {}, facts.map(([name, value, bad]) => el("div", { class: bad ? "bad" : null }, el("dt", { text: name }),
          el("dd", { dir: "auto" }, value, bad ? el("span", { class: "flag", text: "wrong" }) : null)))),
        query.r ? el("p", { class: "alarm bad", text: query.r }) : null)),
    el("div", { class: "ends " + data.kind }, end(words.ends[0], "help", query.up, query, largest), end(words.ends[1], "harm", query.down, query, largest)));
  at("said").textContent = `${words.one} ${query.q}` + (place < 0 ? "" : `, ${place + 1} of ${count.toLocaleString("en")}`);
  document.querySelectorAll("#list a[aria-current]").forEach((a) => a.removeAttribute("aria-current"));
  if (link) {
    link.setAttribute("aria-current", "true");
    const box = list.getBoundingClientRect(), mine = link.getBoundingClientRect();
    // Within the list alone: scrollIntoView would move the page.
    if (mine.top < box.top) list.scrollTop += mine.top - box.top;
    else if (mine.bottom > box.bottom) list.scrollTop += mine.bottom - box.bottom;
  }
}

// The list ---------------------------------------------------------------------------------------------------------

const peek = (c) => whole(c) || (c.k ? c.k.slice(0, 40).map(([piece]) => piece).join("") : "");

function item(query, href) {
  const c = query.c;
  return el("a", { href, class: c.i === undefined ? null : "pictured" },
    c.i === undefined ? null : el("img", { src: data.images[c.i], alt: "", loading: "lazy" }),
    el("span", { class: "name" }, el("span", { class: "id", dir: "auto", text: query.q }),
      el("span", { class: "peek", dir: "auto", text: peek(c).slice(0, 90) })),
    c.l === undefined && query.p === undefined ? null : el("span", { class: "tag" + (query.w ? " wrong" : "") },
      [c.l, query.p].filter((v) => v !== undefined).filter((v, k, all) => all.indexOf(v) === k).join(" → ")));
}

// The buttons of a case are new ones whenever it is drawn: the one that was pressed keeps the focus.
function keepFocus(focused) {
  if (focused !== "next" && focused !== "previous") return;
  const same = at(focused), other = at(focused === "next" ? "previous" : "next");
  (same.disabled ? other : same).focus();
}

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea, .wide, pre")) return;
  const by = { j: 1, ArrowRight: 1, k: -1, ArrowLeft: -1 }[event.key];
  if (event.key === "/") { event.preventDefault(); at("find").focus(); }
  if (by) { event.preventDefault(); move(by); }
});
