"use strict";
// The model page: facts, every layer and level at a glance, curves, prompts, settings.

const MEASURES = [
  ["L0", "active units a token", group => group.l0, figure],
  ["NMSE", "of the level with those above, at the best scale and mean", group => group.nmse, figure],
  ["Dead", "never opens on this text", group => group.dead / group.n_units, percent],
  ["Zombie", "selected, yet writes next to nothing", group => group.zombie / group.n_units, percent],
  ["Dense", "open at over a tenth of the tokens", group => group.dense / group.n_units, percent],
];

function modelPage(site) {
  const many = site.groups.length > 1, [first] = site.groups;
  const seen = [["looked at", `${count(site.tokens)} tokens of ${count(site.documents)} documents`],
    ["windows", `${count(site.windows)} of ${count(site.n_ctx)} tokens`],
    ...(many ? [] : [["L0", figure(first.l0)], ["NMSE", figure(first.nmse)], ...FLAGS.map(([name]) => [name, count(first[name])])])];
  return [
    h("p", { class: "kind" }, KINDS[site.kind] ?? site.kind), h("h1", null, site.name),
    facts([...site.about, ...seen]),
    many && section("Layers", "Each cell leads to the index of its units.", h("div", { class: "maps" }, MEASURES.map(m => heatMap(site.groups, m)))),
    section("Units", "Every unit is in an index; those with a page have contexts, logits and company on it.", groupTable(site.groups)),
    site.prompts.length > 0 && section("Prompts", "Which units open at each token.",
      h("ul", { class: "plain" }, site.prompts.map((prompt, i) =>
        h("li", null, h("a", { href: hrefOf.prompt(i) }, prompt.title), h("span", { class: "soft" }, ` ${prompt.n_tokens} tokens`))))),
    site.sheets.map(sheetOf),
    site.figures.length > 0 && section("Training", null, site.figures.map(linesOf)),
    site.settings.length > 0 && section("Settings", null, settingsOf(site.settings)),
  ];
}

const sheetOf = ({ title, header, rows }) => section(title, null, tableOf(header, rows));

const KINDS = { cayley: "Cayley-GPT", molt: "MOLT", transcoder: "Transcoder", sae: "Sparse autoencoder" };

// A row a level, a column a layer; the deepest tint is the largest value of the map.
function heatMap(groups, [name, explain, of, show]) {
  const layers = [...new Set(groups.map(group => group.layer))], levels = [...new Set(groups.map(group => group.level))];
  const most = Math.max(...groups.map(of), 1e-12);
  const cell = (layer, level) => {
    const group = groups.find(group => group.layer === layer && group.level === level);
    return h("td", null, group && h("a", { href: hrefOf.group(group.name), "--o": (of(group) / most) * 0.85,
      "data-tip": `${group.title}: ${show(of(group))}` }, figure((show === percent ? 100 : 1) * of(group))));
  };
  return h("figure", { class: "map" }, h("figcaption", null, h("b", null, name), ` ${explain}${show === percent ? ", % of units" : ""}`),
    h("div", { class: "scroll" }, h("table", { "--n": layers.length },
      h("thead", null, h("tr", null, h("th", { scope: "col" }, "layer"), layers.map(layer => h("th", { scope: "col" }, String(layer))))),
      h("tbody", null, levels.map(level => h("tr", null,
        h("th", { scope: "row" }, level === null ? "" : `level ${level}`), layers.map(layer => cell(layer, level))))))));
}

const groupTable = groups => tableOf(["group", "units", "with a page", "L0", "NMSE", "dead", "zombie", "dense"], groups.map(group => [
  [h("a", { href: hrefOf.group(group.name) }, group.name), h("span", { class: "soft" }, ` ${group.title}`)],
  count(group.n_units), count(group.n_pages), figure(group.l0), figure(group.nmse), ...FLAGS.map(([name]) => count(group[name]))]), "groups");
