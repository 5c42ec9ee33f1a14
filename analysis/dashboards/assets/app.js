"use strict";
// Addresses, keys, and the bar above every page.

let here = {}, shownAt = 0, wantsSearch = false;
const searchNext = () => { wantsSearch = true; };

const HELP = [["j, k", "next, previous: row, unit or token"], ["← →", "the same on a unit's page and a prompt"], ["↑ ↓", "rows of an index"],
  ["Enter", "open the row"], ["/", "search the index"], ["u", "up to the parent"], ["m", "model page"], ["i", "index of this group"], ["p", "prompts"], ["?", "this help"]];

async function route() {
  const moment = ++shownAt, site = registered.get("site");
  const [path, query = ""] = location.hash.slice(1).split("?"), parts = path.split("/").filter(Boolean).map(decoded);
  here.leave?.();
  here = {};
  let page;
  try {
    page = await pageAt(site, parts, new URLSearchParams(query));
  } catch (error) {
    page = { title: site.name, nodes: [h("h1", null, "Not here"), h("p", { class: "note" }, error.message), h("p", null, h("a", { href: "#/" }, "to the model page"))] };
  }
  if (moment !== shownAt) return; // another address was asked for meanwhile
  here = page;
  document.title = page.title;
  document.getElementById("tip").hidden = true;
  const main = document.getElementById("main");
  main.replaceChildren(...page.nodes.flat(Infinity).filter(Boolean));
  drawBar(site, parts);
  scrollTo({ top: 0, behavior: "instant" });
  main.focus({ preventScroll: true });
  page.ready?.();
  if (wantsSearch) document.getElementById("search")?.focus();
  wantsSearch = false;
}

function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

async function pageAt(site, [place, name, unit], query) {
  if (place === "g") return groupPage(site, name, query);
  if (place === "u") return unitPage(site, name, /^\d+$/.test(unit) ? Number(unit) : NaN);
  if (place === "p") return promptPage(site, Number(name ?? 0));
  if (place !== undefined) throw new Error(`there is no page #/${place} in this site`);
  return { title: `${site.name} · dashboards`, nodes: modelPage(site) };
}

function drawBar(site, [place, name]) {
  const group = place === "g" || place === "u" ? name : "";
  const choice = h("select", { "aria-label": "group", onchange: event => { location.hash = hrefOf.group(event.target.value); } },
    h("option", { value: "", disabled: true }, "units of…"), site.groups.map(own => h("option", { value: own.name }, `${own.name} · ${own.title}`)));
  choice.value = groupOf(group) ? group : "";
  document.getElementById("bar").replaceChildren(h("a", { class: "home", href: "#/" }, site.name), choice,
    ...(site.prompts.length ? [h("a", { href: hrefOf.prompt(0) }, "prompts")] : []),
    h("button", { type: "button", "aria-label": "keys", onclick: help }, "?"));
}

function help() {
  const dialog = document.getElementById("help");
  dialog.replaceChildren(h("h2", null, "Keys"), h("dl", { class: "keys" }, HELP.map(([key, does]) => h("div", null, h("dt", null, key), h("dd", null, does)))),
    h("form", { method: "dialog" }, h("button", null, "close")));
  dialog.showModal();
}

document.addEventListener("keydown", event => {
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || document.getElementById("help").open) return;
  const field = event.target.closest?.("input, select, textarea");
  if (field) {
    if (event.key === "Escape") field.blur();
    return;
  }
  if (event.key === "Enter" && event.target.closest?.("a, button, summary")) return; // it does what it is for
  const groups = registered.get("site")?.groups ?? [], [, , current] = location.hash.split(/[/?]/);
  const group = groupOf(decoded(current ?? "")) ?? groups.at(-1);
  const everywhere = { "?": help, m: () => { location.hash = "#/"; }, p: () => { location.hash = hrefOf.prompt(0); },
    i: () => { location.hash = hrefOf.group(group.name); }, "/": () => { searchNext(); location.hash = hrefOf.group(group.name); } };
  const does = here.keys?.[event.key] ?? everywhere[event.key];
  if (!does) return;
  event.preventDefault();
  does();
});

load("site").then(() => {
  addEventListener("hashchange", route);
  return route();
}).catch(error => document.getElementById("main").replaceChildren(h("p", { class: "note" }, error.message)));
