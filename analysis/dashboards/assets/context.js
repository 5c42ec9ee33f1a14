"use strict";
// A context: the tokens about an event, tinted by the unit's act, in columns about the token that it is of.

function contextsOf(page) {
  const kinds = [["strongest", "Strongest", "at most one a window"], ["middle", "Middle", "nearest the median |act| of a random sample"],
    ["random", "Random", "others of that sample"]];
  const most = Math.max(...page.contexts.flatMap(context => context.acts.map(Math.abs)), 1e-12);
  return kinds.map(([which, title, explain]) => {
    const own = page.contexts.filter(context => context.which === which);
    return own.length > 0 && h("div", { class: "contexts" }, h("h3", null, title, h("span", null, explain)),
      own.map(context => drawContext(context, page.strings, most)));
  });
}

function drawContext({ tokens, acts, peak, document: number, window: at }, strings, most) {
  const spans = tokens.map((string, i) => actToken(strings[string], acts[i], most, i === peak));
  return h("div", { class: "context", "data-document": number },
    h("div", null, spans.slice(0, peak)), h("div", null, spans.slice(peak)),
    h("span", { class: "act", "data-tip": `document ${number}, window ${at}` }, figure(acts[peak])));
}

function actToken(string, act, most, isPeak) {
  const open = act !== 0;
  return h("span", { class: `t${open ? (act < 0 ? " on below" : " on") : ""}${isPeak ? " peak" : ""}`,
    "--o": open ? 0.15 + 0.75 * Math.min(1, Math.abs(act) / most) : null, "data-tip": open ? `${string} · ${figure(act)}` : null }, string);
}
