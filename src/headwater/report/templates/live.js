// The cases of a page whose server has them: asked for one by one, when they are wanted. Ids and places are the server's.
const list = at("list"), find = at("find"), wrong = at("wrong"), many = at("k"), AT_ONCE = 50;
const token = data.token;
let listed = [], total = 0, chosen = null, asking = null, searching = null, pause = 0;

// An answer's fields are those of a page's data. Errors come in words.
async function ask(route, fields, signal) {
  const answer = await fetch(`${route}?${new URLSearchParams(fields)}`, { headers: { "X-Headwater-Token": token }, signal });
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error);
  return found;
}

function wentWrong(error, place) {
  if (error.name === "AbortError") return;
  const text = error instanceof TypeError ? "The server does not answer. Is `headwater serve` still running?" : error.message;
  place.replaceChildren(el(place === list ? "li" : "p", { class: "alarm bad", role: "alert", text }));
}

// By its id, where that can be written; else by its place.
const address = (kind, at, id) => (id === null ? `#${kind}-at=${at}` : `#${kind}=` + encodeURIComponent(id));
const addressOf = (kind, entry, shown) => address(kind, entry.at, entry.o === undefined ? shown : entry.o);

// The list -----------------------------------------------------------------------------------------------------------

async function search(more) {
  if (searching) searching.abort();
  searching = new AbortController();
  const fields = { search: find.value.trim(), from: more ? listed.length : 0, count: AT_ONCE };
  if (wrong && wrong.checked) fields.wrong = 1;
  let found;
  try { found = await ask("queries", fields, searching.signal); } catch (error) { wentWrong(error, list); return; }
  data = found;
  if (!more) { listed = []; list.replaceChildren(); }
  const rest = at("rest");
  if (rest) rest.remove();
  for (const query of found.queries) {
    query.link = item(query, addressOf("query", query, query.q));
    listed.push(query);
    list.append(el("li", {}, query.link));
  }
  total = found.count;
  if (listed.length < total) list.append(el("li", { id: "rest" },
    el("button", { type: "button", class: "step", text: `${(total - listed.length).toLocaleString("en")} more`, on: { click: () => search(true) } })));
  at("count").textContent = `${total.toLocaleString("en")} ${total === 1 ? "query" : "queries"}`;
}

async function searchAndShow() {
  await search(false);
  if (!listed.length) { if (chosen) redraw(); return; }
  const here = chosen && chosen.words === QUERY && listed.some((query) => query.at === chosen.at);
  const typed = listed[0].q === find.value.trim();  // the server lists it first
  if (here && !typed) redraw(); else choose(QUERY, { at: listed[0].at });
}

// The case -----------------------------------------------------------------------------------------------------------

async function choose(kind, which, link) {
  if (asking) asking.abort();
  asking = new AbortController();
  const slow = setTimeout(() => { at("said").textContent = "Reading scores"; at("case").classList.add("waits"); }, 400);
  try {
    const answer = await ask(kind.kind, { ...which, k: many.value }, asking.signal);
    chosen = { words: kind, at: answer.queries[0].at, answer };
    redraw();
    if (link) history.replaceState(null, "", addressOf(kind.kind, answer.queries[0], answer.queries[0].q));
  } catch (error) {
    if (error.name !== "AbortError") chosen = null;
    wentWrong(error, at("case"));
  } finally {
    clearTimeout(slow);
    at("case").classList.remove("waits");
  }
}

function redraw() {
  const { answer } = chosen, other = chosen.words === QUERY ? "row" : "query";
  data = answer;
  words = chosen.words;
  for (const row of answer.rows) row.link = addressOf(other, row, row.id);
  const place = words === QUERY ? listed.findIndex((query) => query.at === chosen.at) : -1;
  draw(answer.queries[0], place, words === QUERY ? total : 0, place < 0 ? null : listed[place].link);
  if (answer.note) at("case").append(el("p", { class: "note", text: answer.note }));
}

async function move(by) {
  if (!chosen || chosen.words !== QUERY) return;
  const next = listed.findIndex((query) => query.at === chosen.at) + by;
  if (next === listed.length && next < total) await search(true);
  if (!listed[next]) return;
  const focused = document.activeElement;
  await choose(QUERY, { at: listed[next].at }, true);
  if (focused) keepFocus(focused.id);
}

function follow() {
  const found = /^#(query|row)(-at)?=(.*)$/.exec(location.hash);
  if (!found) return false;
  let name;
  try { name = decodeURIComponent(found[3]); } catch { return false; }
  choose(found[1] === "row" ? ROW : QUERY, found[2] ? { at: name } : { id: name });
  return true;
}

addEventListener("hashchange", follow);
find.addEventListener("input", () => { clearTimeout(pause); pause = setTimeout(searchAndShow, 120); });
if (wrong) wrong.addEventListener("change", searchAndShow);
many.addEventListener("change", () => { if (chosen) choose(chosen.words, { at: chosen.at }); });
at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const wanted = at("row").value.trim();
  const hash = address("row", null, wanted);
  if (location.hash === hash) follow(); else if (wanted) location.hash = hash;
});
at("browser").hidden = false;
search(false).then(() => { if (!follow() && listed.length) choose(QUERY, { at: listed[0].at }); });
