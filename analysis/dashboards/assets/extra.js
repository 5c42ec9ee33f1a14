"use strict";
// What the page of a transform or of a feature shows besides.

function extraOf(group, { extra, strings, contexts }) {
  if (group.kind === "transform") return transformOf(extra, strings, contexts);
  if (group.kind !== "feature") return [];
  const rows = [["norm of the decoder row", extra.decoder_norm], ["cosine of encoder and decoder", extra.encoder_decoder_cosine]];
  return [section("Weights", null, facts(rows.filter(([, x]) => x !== undefined && x !== null).map(([label, x]) => [label, figure(x)])))];
}

function transformOf(extra, strings, contexts) {
  const known = [["rank", extra.rank], ["stable rank", extra.stable_rank], ["Frobenius norm", extra.frobenius],
    ["share of the power written", extra.share_written], ["NMSE of the whole map", extra.nmse], ["NMSE without it", extra.nmse_without],
    ["NMSE with it always open", extra.nmse_always], ["share of its worth that is the gate's", extra.gate_share]];
  const words = numbers => numbers.map(number => token(strings[number]));
  const strongest = contexts.filter(context => context.which === "strongest");
  return [
    section("The transform", null, facts(known.filter(([, x]) => x !== undefined && x !== null).map(([label, x]) => [label, figure(x)])),
      h("div", { class: "charts" }, Object.entries(extra.singular ?? {}).map(([name, values]) => h("figure", null,
        h("figcaption", null, `singular values, ${name} coordinates`), bars(values, i => `${i + 1}: ${figure(values[i])}`, `singular values, ${name}`),
        ends("1", String(values.length)))))),
    extra.pairs?.length > 0 && section("What it takes in and writes out", "Top singular pairs, read through the embedding and the unembedding.",
      tableOf(["gain", "reads", "against", "writes", "against"], extra.pairs.map(pair =>
        [figure(pair.gain), ...[pair.reads, pair.reads_against, pair.writes, pair.writes_against].map(words)]))),
    extra.serves?.length > 0 && section("Tokens it serves", `Those that say most of whether it is open, on ${count(extra.measured_on)} tokens.`,
      tableOf(["token", "times open", "of its openings", "of the token's occurrences"], extra.serves.map(([string, times, share, rate]) =>
        [token(strings[string]), count(times), percent(share), percent(rate)]))),
    extra.at?.length > 0 && section("In its contexts", "The vector that it adds at the token of each of its strongest contexts, and the logits that this moves.",
      extra.at.map(place => h("div", { class: "place" }, strongest[place.context] && drawContext(strongest[place.context], strings, Math.max(...strongest[place.context].acts.map(Math.abs), 1e-12)),
        h("p", { class: "soft" }, `norm ${figure(place.added_norm)}, ${percent(place.share_of_written)} of what is written there`),
        movedOf({ ...place, strings })))),
  ];
}
