"use strict";
// A prompt: the tokens in a line; of the one that is chosen, the open units of every group.

async function promptPage(site, number) {
  if (!site.prompts[number]) throw new Error(`there is no prompt ${number} in this site`);
  const prompt = await load(`prompts-${number}`);
  let at = prompt.tokens.length - 1;
  const tokens = prompt.tokens.map((string, i) => h("button", { type: "button", class: "t", onclick: () => choose(i) }, prompt.strings[string]));
  const panel = h("div", { class: "panel", "aria-live": "polite" });
  function choose(i) {
    at = Math.max(0, Math.min(i, tokens.length - 1));
    tokens.forEach((node, j) => node.setAttribute("aria-pressed", j === at));
    tint(null);
    panel.replaceChildren(h("h2", null, "At ", token(prompt.strings[prompt.tokens[at]]), h("span", { class: "soft" }, ` token ${at + 1} of ${tokens.length}`)),
      ...site.groups.map(group => h("div", { class: "open" }, h("h3", null, h("a", { href: hrefOf.group(group.name) }, group.name), h("span", null, group.title)),
        h("div", { class: "chips" }, chipsOf(group.name)))));
  }
  function chipsOf(name) {
    const own = prompt.acts[name][at], most = Math.max(...own.map(([, act]) => Math.abs(act)), 1e-12);
    if (!own.length) return h("span", { class: "soft" }, "none is open");
    return own.map(([unit, act]) => {
      const node = chip(name, unit, null, figure(act), prompt.common[name][unit]);
      node.style.setProperty("--o", 0.12 + (0.5 * Math.abs(act)) / most);
      for (const event of ["pointerenter", "focus"]) node.addEventListener(event, () => tint(actsOf(name, unit)));
      for (const event of ["pointerleave", "blur"]) node.addEventListener(event, () => tint(null));
      return node;
    });
  }
  const actsOf = (name, unit) => prompt.acts[name].map(row => row.find(([other]) => other === unit)?.[1] ?? 0);
  // The acts of the unit that the pointer is on, at all tokens.
  function tint(acts) {
    const most = acts && Math.max(...acts.map(Math.abs), 1e-12);
    tokens.forEach((node, i) => {
      node.classList.toggle("on", Boolean(acts?.[i]));
      node.classList.toggle("below", Boolean(acts?.[i] < 0));
      if (acts?.[i]) node.style.setProperty("--o", 0.15 + (0.75 * Math.abs(acts[i])) / most);
    });
  }
  const others = site.prompts.map((other, i) => h("a", { href: hrefOf.prompt(i), "aria-current": i === number ? "page" : null }, other.title));
  const step = by => () => choose(at + by);
  return {
    title: `${prompt.title} · ${site.name}`,
    nodes: [h("p", { class: "kind" }, "Prompt"), h("h1", null, prompt.title), h("nav", { "aria-label": "prompts" }, others),
      h("p", { class: "explain" }, "Choose a token; point at a unit to see where else it is open."), h("div", { class: "text" }, tokens), panel],
    keys: { j: step(1), k: step(-1), ArrowRight: step(1), ArrowLeft: step(-1) },
    ready: () => choose(at),
  };
}
