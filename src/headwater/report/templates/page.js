// The queries of a page that has them all: found, sorted, chosen.
const list = at("list"), find = at("find"), sort = at("sort"), wrong = at("wrong");
const filters = [...document.querySelectorAll("select.filter")];
let shown = [], chosen = null;

const address = (query) => "#query=" + encodeURIComponent(query.q);

data.queries.forEach((query, number) => {
  const c = query.c;
  query.number = number;
  query.l = c.l;
  query.find = [query.q, c.l, query.p, query.g, peek(c), ...(c.c || []).map(([n, v]) => data.names[n] + " " + v)].join("\n").toLowerCase();
  query.link = item(query, address(query));
  query.item = el("li", {}, query.link);
});

const first = (pairs) => (pairs.length ? pairs[0][1] : 0);
const names = new Intl.Collator("en", { numeric: true });
const orders = {
  given: (a, b) => a.number - b.number,
  id: (a, b) => names.compare(a.q, b.q),
  harm: (a, b) => first(a.down) - first(b.down),
  help: (a, b) => first(b.up) - first(a.up),
  loss: (a, b) => b.z - a.z,
  label: (a, b) => names.compare(a.l || "", b.l || ""),
};

function refresh() {
  const wanted = find.value.trim().toLowerCase();
  shown = data.queries.filter((q) => (!wanted || q.find.includes(wanted)) && (!wrong || !wrong.checked || q.w)
    && filters.every((f) => !f.value || q[f.dataset.of] === f.value));
  shown.sort((a, b) => orders[sort.value](a, b) || a.number - b.number);
  list.replaceChildren(...shown.map((q) => q.item));
  at("count").textContent = shown.length === data.queries.length ? `${shown.length} queries`
    : `${shown.length} of ${data.queries.length} queries`;
  if (shown.length && !shown.includes(chosen)) choose(shown[0]);
  else if (chosen) show(chosen);
}

function choose(query, link) {
  chosen = query;
  // A page inside of another one may not be allowed to have an address.
  if (link) try { history.replaceState(null, "", address(query)); } catch { /* it stays as it was */ }
  show(query);
}

function show(query) {
  draw(query, shown.indexOf(query), shown.length, query.link);
}

function move(by) {
  const next = shown[shown.indexOf(chosen) + by];
  if (!next) return;
  const focused = document.activeElement && document.activeElement.id;
  choose(next, true);
  keepFocus(focused);
}

function follow() {
  const found = /^#query=(.*)$/.exec(location.hash);
  if (!found) return false;
  let name;
  try { name = decodeURIComponent(found[1]); } catch { return false; }
  const query = data.queries.find((q) => q.q === name);
  if (!query) return false;
  if (!shown.includes(query)) {
    find.value = "";
    filters.forEach((f) => { f.value = ""; });
    if (wrong) wrong.checked = false;
    chosen = query;
    refresh();
  } else choose(query);
  return true;
}

addEventListener("hashchange", follow);
find.addEventListener("input", refresh);
[sort, wrong, ...filters].forEach((control) => control && control.addEventListener("change", refresh));
at("browser").hidden = false;
if (data.queries.length) { refresh(); follow(); }
