"use strict";
// Elements are made one by one, and every string from the data becomes text or an attribute's value, never markup.

const SVG = "http://www.w3.org/2000/svg";
const h = (name, props, ...children) => fill(document.createElement(name), props, children);
const svg = (name, props, ...children) => fill(document.createElementNS(SVG, name), props, children);

function fill(node, props, children) {
  for (const [key, value] of Object.entries(props ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key.startsWith("--")) node.style.setProperty(key, value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter(child => child !== null && child !== undefined && child !== false));
  return node;
}

const hrefOf = {
  group: name => `#/g/${encodeURIComponent(name)}`,
  unit: (name, unit) => `#/u/${encodeURIComponent(name)}/${unit}`,
  prompt: i => `#/p/${i}`,
};

// ---- Numbers ----

const count = n => n.toLocaleString("en");
const figure = x => (x === null || x === undefined ? "—" : x === 0 ? "0" : Math.abs(x) >= 1e5 || Math.abs(x) < 1e-4
  ? x.toExponential(1) : String(Number(x.toPrecision(3)))).replace("-", "−");
const percent = share => (share === null ? "—" : `${figure(100 * share)} %`);
const signed = x => (x > 0 ? "+" : "") + figure(x);

// ---- Parts that several pages have ----

const token = string => h("span", { class: "tok" }, string);
const section = (title, explain, ...content) =>
  h("section", null, h("h2", null, title), explain && h("p", { class: "explain" }, explain), ...content);
const facts = rows => h("dl", { class: "facts" }, rows.map(([label, value]) =>
  h("div", null, h("dt", null, label), h("dd", null, value))));
const settingsOf = rows => h("dl", { class: "settings" }, rows.map(([label, value]) =>
  h("div", null, h("dt", null, label), h("dd", null, value))));
const tagsOf = flags => FLAGS.filter(([, bit]) => flags & bit).map(([name]) => h("span", { class: `tag ${name}` }, name));

// The first cell of a row heads it; cells of text are figures, others are elements.
function tableOf(header, rows, className) {
  const kind = (cell, i) => (i && typeof cell === "string" ? "n" : null);
  return h("div", { class: "scroll" }, h("table", { class: className },
    h("thead", null, h("tr", null, header.map((name, i) => h("th", { scope: "col", class: kind(rows[0]?.[i], i) }, name)))),
    h("tbody", null, rows.map(([name, ...cells]) => h("tr", null, h("th", { scope: "row" }, name),
      cells.map(cell => h("td", { class: kind(cell, 1) }, cell)))))));
}

// A unit as a link: with the columns of its index, or with what is known of it.
function chip(group, unit, columns, value, string = columns?.token[unit]) {
  const share = columns?.frequency[unit], dead = columns && columns.flags[unit] & DEAD;
  return h("a", { class: `chip${dead ? " dead" : ""}`, href: hrefOf.unit(group, unit) },
    h("b", null, String(unit)), string && token(string),
    h("span", { class: "soft" }, value ?? (share === undefined ? "" : percent(share))));
}

// ---- What the pointer is on, or the focus ----

function showTip(event) {
  const tip = document.getElementById("tip"), of = event.target.closest?.("[data-tip]");
  tip.hidden = !of;
  if (!of) return;
  tip.textContent = of.dataset.tip;
  const box = of.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const left = Math.min(Math.max(4, box.x + box.width / 2 - own.width / 2), innerWidth - own.width - 4);
  const above = box.y - own.height - 6;
  tip.style.left = `${left + scrollX}px`;
  tip.style.top = `${(above < 4 ? box.bottom + 6 : above) + scrollY}px`;
}
document.addEventListener("pointerover", showTip);
document.addEventListener("focusin", showTip);
