"use strict";
// A unit's page: its family, figures, contexts, logits, company. Without a page of its own, what the index knows.

async function unitPage(site, name, unit) {
  const group = groupOf(name);
  if (!group || !(unit >= 0 && unit < group.n_units)) throw new Error(`there is no unit ${unit} in a group ${name} of this site`);
  const columns = await indexOf(name), [page, tree] = await Promise.all([pageOf(name, unit), treeOf(group, unit, columns)]);
  const look = lookAt(name), order = orderOf(columns, look), place = order.indexOf(unit);
  look.unit = unit;
  const previous = order[place - 1], next = place < 0 ? order[0] : order[place + 1];
  const to = other => { if (other !== undefined) location.hash = hrefOf.unit(name, other); };
  const keys = { j: () => to(next), k: () => to(previous), ArrowRight: () => to(next), ArrowLeft: () => to(previous),
    u: () => { if (group.parent_group) location.hash = hrefOf.unit(group.parent_group, parentOf(group, unit)); } };
  const step = (other, text, rel) => other === undefined ? h("span", { class: "soft" }, text) : h("a", { href: hrefOf.unit(name, other), rel }, text);
  return {
    title: `${name} ${unit} · ${site.name}`,
    keys,
    nodes: [
      h("p", { class: "kind" }, h("a", { href: hrefOf.group(name) }, group.title)),
      h("h1", null, `${name} · ${unit} `, tagsOf(columns.flags[unit])),
      h("nav", { "aria-label": "units" }, step(previous, "← previous", "prev"), step(next, "next →", "next"),
        h("a", { href: hrefOf.unit(name, unit), rel: "bookmark" }, "permalink")),
      facts(factsOf(columns, unit, page, site)), tree,
      ...(page ? await partsOf(site, group, columns, page) : [h("p", { class: "note" }, columns.flags[unit] & DEAD
        ? "This unit never opened on the text that was looked at."
        : `This unit has no page of its own: build the site with --features ${name}:${unit} beside the others.`)]),
    ],
  };
}

function factsOf(columns, unit, page, site) {
  const rows = [["frequency", percent(columns.frequency[unit])], ["largest act", figure(columns.max[unit])],
    ["entropy of its tokens", columns.entropy[unit] === null ? "—" : `${figure(columns.entropy[unit])} bits`]];
  if (page?.label) rows.push(["label", [page.label.name, h("span", { class: "soft" },
    ` told ${percent(page.label.score)} of ${count(page.label.contexts)} contexts right, half by chance; by ${page.label.provider}`)]]);
  if (columns.token[unit] !== "") rows.push(["most often at", token(columns.token[unit])]);
  if (page) rows.push(["mean act", figure(page.mean_act)], ["documents", `${count(page.documents)} of ${count(site.documents)}`],
    ["tokens in one of them", `${figure(page.tokens_a_document)}, at most ${count(page.busiest_tokens)} in document ${page.busiest_document}`]);
  return rows;
}

async function partsOf(site, group, columns, page) {
  const chips = (rows, show) => h("div", { class: "chips" }, rows.map(([unit, ...rest]) => chip(group.name, unit, columns, show(...rest))));
  const { nearest } = page.extra;
  return [
    section("Contexts", "Tokens tinted by the unit's act; point at one for its value.", contextsOf(page)),
    section("Where", null, h("div", { class: "charts" }, histogramOf(page.histogram), positionsOf(page.by_position, site.n_ctx))),
    page.promoted.length > 0 && section("Logits", "Moved by what it writes at its strongest events, on the direct path: no later layer in between.", movedOf(page)),
    ...extraOf(group, page),
    nearest?.length > 0 && section("Nearest", ...nearestOf(group, page.extra, chips)),
    page.co_firing.length > 0 && section("Company", "Units of this group that are open where it is: share of its sampled events, and how many times their frequency that is.",
      chips(page.co_firing, (share, lift) => `${percent(share)}, ${figure(lift)}×`)),
  ];
}

function nearestOf(group, { nearest, as_near: asNear }, chips) {
  if (group.kind !== "cayley") return ["By the cosine of decoder rows.", chips(nearest, signed)];
  if (nearest.every(([, inner]) => inner === 0)) return ["The atoms of this level are orthogonal: every inner product is 0, exactly."];
  return [`Atoms of this level by inner product, exact by algebra. ${count(asNear)} of ${count(group.n_units - 1)} are as near as the first; those of lowest number are shown.`, chips(nearest, signed)];
}

function movedOf({ promoted, suppressed, strings }) {
  const most = Math.max(...[...promoted, ...suppressed].map(([, logit]) => Math.abs(logit)), 1e-12);
  const list = (title, rows, below) => h("div", null, h("h3", null, title), h("ol", { class: `moved${below ? " below" : ""}` }, rows.map(([string, logit]) =>
    h("li", { "--w": Math.abs(logit) / most }, token(strings[string]), h("span", { class: "n" }, signed(logit))))));
  return h("div", { class: "two" }, list("Promoted", promoted, false), list("Suppressed", suppressed, true));
}

// ---- The family of a Cayley feature: the parent has its low bits, children have it as theirs ----

const parentOf = (group, unit) => unit % groupOf(group.parent_group).n_units;

async function treeOf(group, unit, columns) {
  if (!group.parent_group && !group.child_group) return null;
  const rows = [];
  if (group.parent_group) {
    const above = await indexOf(group.parent_group), parent = parentOf(group, unit), step = groupOf(group.parent_group).n_units;
    const all = familyOf(parent, step, group.n_units), place = all.indexOf(unit);
    const beside = [all[place - 1], all[place + 1]].map((other, i) => other !== undefined &&
      h("a", { class: "chip", href: hrefOf.unit(group.name, other), rel: i ? "next" : "prev" }, i ? `${other} →` : `← ${other}`));
    rows.push(["parent", chip(group.parent_group, parent, above)], ["siblings", [beside,
      h("details", null, h("summary", null, `all ${count(all.length - 1)}`), h("div", { class: "chips" },
        byFrequency(all.filter(other => other !== unit), columns).map(other => chip(group.name, other, columns))))]]);
  }
  if (group.child_group) {
    const below = await indexOf(group.child_group), all = familyOf(unit, group.n_units, groupOf(group.child_group).n_units);
    rows.push(["children", byFrequency(all, below).map(child => chip(group.child_group, child, below))]);
  }
  return h("dl", { class: "tree" }, rows.map(([name, content]) =>
    h("div", null, h("dt", null, name), h("dd", { class: `chips ${name}` }, content))));
}

const familyOf = (parent, step, n) => Array.from({ length: Math.ceil((n - parent) / step) }, (_, i) => parent + i * step);
const byFrequency = (units, columns) => units.sort((a, b) => columns.frequency[b] - columns.frequency[a] || a - b);
