"use strict";
// The index of a group: all of its units, searched, sorted and filtered; its order is what next and previous follow.

const SORTS = ["frequency", "max", "entropy", "unit"];
const ONLY = [...FLAGS.map(([name]) => name), "page"];
const looks = new Map();

const lookAt = name => {
  if (!looks.has(name)) looks.set(name, { search: "", sort: "frequency", rising: false, only: [], unit: null });
  return looks.get(name);
};

// Numbers of the units that a look shows, in its order.
function orderOf(columns, look) {
  const wanted = look.search.toLowerCase(), number = wanted.trim();
  const units = [];
  for (let unit = 0; unit < columns.flags.length; unit++) {
    if (look.only.some(name => !has(columns, unit, name))) continue;
    if (wanted && !(number && String(unit).startsWith(number)) && !columns.token[unit].toLowerCase().includes(wanted)
      && !columns.label?.[unit].toLowerCase().includes(wanted)) continue;
    units.push(unit);
  }
  const column = look.sort === "unit" ? null : columns[look.sort], sign = look.rising ? 1 : -1;
  const exact = unit => String(unit) === number;
  return units.sort((a, b) => {
    if (exact(a) !== exact(b)) return exact(a) ? -1 : 1;
    if (!column) return sign * (a - b);
    const x = column[a], y = column[b];
    if (x === null || y === null) return x === y ? a - b : x === null ? 1 : -1; // dead units have no entropy
    return sign * (x - y) || a - b;
  });
}

const has = (columns, unit, name) =>
  name === "page" ? columns.page[unit] >= 0 : (columns.flags[unit] & FLAGS.find(flag => flag[0] === name)[1]) > 0;

async function groupPage(site, name, query) {
  const group = groupOf(name);
  if (!group) throw new Error(`there is no group ${name} in this site`);
  const columns = await indexOf(name), look = lookAt(name);
  readQuery(look, query);
  let order = [];
  const open = i => { location.hash = hrefOf.unit(name, order[i]); };
  const rows = new Rows(`units of ${group.title}`, (node, i) => drawRow(node, name, columns, order[i]), open);
  const shown = h("p", { class: "soft", role: "status" });
  const heads = SORTS_SHOWN.map(([sort, title, cell]) => h("button", { class: cell, type: "button", onclick: () => {
    look.rising = look.sort === sort ? !look.rising : sort === "unit";
    look.sort = sort;
    update();
  } }, title));
  const head = h("div", { class: "row heads" }, heads[0], h("span", null, columns.label ? "label or token" : "token"), heads.slice(1), h("span"));
  const search = h("input", { type: "search", id: "search", placeholder: columns.label ? "label, token or number" : "token or number", "aria-label": "search for a label, a token or a unit's number",
    autocomplete: "off", spellcheck: "false", oninput: () => { look.search = search.value; update(); } });
  search.value = look.search;
  search.addEventListener("keydown", event => {
    if (!["ArrowDown", "Enter"].includes(event.key)) return;
    event.preventDefault();
    rows.node.focus();
    if (event.key === "Enter" && order.length === 1) open(0);
  });
  const boxes = ONLY.map(only => {
    const box = h("input", { type: "checkbox", onchange: () => {
      look.only = box.checked ? [...look.only, only] : look.only.filter(other => other !== only);
      update();
    } });
    box.checked = look.only.includes(only);
    return h("label", null, box, only === "page" ? "has a page" : only);
  });
  function update(unit = null) {
    order = orderOf(columns, look);
    shown.textContent = `${count(order.length)} of ${count(group.n_units)} units`;
    heads.forEach((button, i) => {
      const [sort, title] = SORTS_SHOWN[i], now = sort === look.sort;
      button.textContent = now ? `${title} ${look.rising ? "↑" : "↓"}` : title;
      button.setAttribute("aria-pressed", now);
    });
    rows.show(order.length, Math.max(0, order.indexOf(unit)));
    head.style.paddingRight = `calc(.75rem + ${rows.node.offsetWidth - rows.node.clientWidth}px)`;
    history.replaceState(null, "", hrefOf.group(name) + writeQuery(look));
  }
  const down = () => rows.go(rows.at + 1), up = () => rows.go(rows.at - 1);
  return {
    title: `${name} · ${site.name}`,
    nodes: [h("p", { class: "kind" }, group.title), h("h1", null, name),
      h("p", { class: "soft" }, `${count(group.n_pages)} of ${count(group.n_units)} units have a page · L0 ${figure(group.l0)} · ${count(group.dead)} dead, ${count(group.zombie)} zombie, ${count(group.dense)} dense`),
      h("div", { class: "tools" }, search, h("fieldset", null, h("legend", { class: "hide" }, "only"), boxes)), shown,
      head, rows.node],
    keys: { j: down, k: up, ArrowDown: down, ArrowUp: up, Enter: () => order.length && open(rows.at), "/": () => search.focus() },
    leave: () => { look.unit = order[rows.at] ?? null; },
    ready: () => update(look.unit),
  };
}

const SORTS_SHOWN = [["unit", "unit", "unit"], ["frequency", "frequency", "n"], ["max", "largest act", "n max"], ["entropy", "entropy", "n entropy"]];

function drawRow(node, name, columns, unit) {
  node.setAttribute("href", hrefOf.unit(name, unit));
  node.classList.toggle("without", columns.page[unit] < 0);
  node.replaceChildren(h("b", { class: "unit" }, String(unit)), h("span", { class: "of" }, columns.label?.[unit] || (columns.token[unit] && token(columns.token[unit]))),
    h("span", { class: "n frequency", "--w": Math.sqrt(columns.frequency[unit]) }, percent(columns.frequency[unit])),
    h("span", { class: "n max" }, figure(columns.max[unit])), h("span", { class: "n entropy" }, figure(columns.entropy[unit])),
    h("span", { class: "flags" }, tagsOf(columns.flags[unit])));
}

// ---- A look in the address, so that it can be sent ----

function writeQuery(look) {
  const query = new URLSearchParams();
  if (look.search) query.set("q", look.search);
  if (look.sort !== "frequency" || look.rising) query.set("sort", look.sort + (look.rising ? "-up" : ""));
  if (look.only.length) query.set("only", look.only.join(","));
  return query.size ? `?${query}` : "";
}

function readQuery(look, query) {
  if (![...query.keys()].length) return;
  const [sort, rising] = (query.get("sort") ?? "frequency").split("-");
  look.search = query.get("q") ?? "";
  look.sort = SORTS.includes(sort) ? sort : "frequency";
  look.rising = rising === "up";
  look.only = (query.get("only") ?? "").split(",").filter(only => ONLY.includes(only));
}
