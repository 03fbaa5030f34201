// The panels below the cards: who holds what, what happened, dead letters, this worker.

import { $, h, replace, say } from "./dom.js";
import { ago, capital, count, middle, moment, rate, short, words } from "./format.js";

const SHOWN = 8;
const LETTERS_SHOWN = 5;
const KEY_CHARS = 32;
const NAME_CHARS = 13;
/** What happens to several groups within so long is one event. */
const TOGETHER_MS = 3_000;
const TOLD = {
  joined: ["joined", "a new member of the group"],
  left: ["is gone", "stopped or dead; the others take over its partitions"],
  restarted: ["restarted", "back under its name, as a new member"],
  rebalance: ["Partitions dealt anew", ""],
  page: ["This page’s worker restarted", "its own figures begin anew"],
};

const COUNTED = {
  events: "Events handled", batches: "Commits", rebalances: "Assignments", dead_letters: "Set aside", given_up: "Given up, at most",
  dropped_batches: "Batches dropped",
};
/** What failed, by its reason. */
const FAILED = { dropped: "Dropped:", troubles: "Tried anew:" };

export function showHolders(guarantees) {
  const workers = [...new Set(guarantees.flatMap((card) => card.members.map((member) => member.worker)))].sort();
  const rows = [];
  for (const card of guarantees) {
    const topics = [...new Set(card.partitions.map((each) => each.topic))];
    for (const topic of topics) {
      const own = card.partitions.filter((each) => each.topic === topic).sort((one, other) => one.number - other.number);
      rows.push(h(
        "div", { class: "topic" },
        h("h3", {}, topic, h("small", {}, words(card.guarantee))),
        h("div", { class: "cells" }, ...own.map((each) => cell(each, workers))),
      ));
    }
  }
  if (!rows.length) rows.push(h("p", { class: "empty" }, "Not known yet."));
  replace($("holders"), rows);
}

function cell(partition, workers) {
  const lag = Math.max(0, partition.end - (partition.committed ?? 0));
  const holder = partition.worker || "nobody";
  const color = partition.worker ? `who-${workers.indexOf(partition.worker) % 8}` : "nobody";
  const title = `${partition.topic}, partition ${partition.number}: ${holder}; ${count(partition.committed)} consumed of ${count(partition.end)}`;
  return h("div", { class: `cell live ${color}`, title }, h("b", {}, middle(holder, NAME_CHARS)), h("small", {}, `№ ${partition.number} · ${lag ? `${short(lag)} wait` : "done"}`));
}

export function showHappened(marks, now) {
  const events = [];
  for (const mark of [...marks].sort((one, other) => other.at_ms - one.at_ms)) {
    const same = events.find((event) => event.kind === mark.kind && event.worker === mark.worker && event.at_ms - mark.at_ms < TOGETHER_MS);
    if (same) same.guarantees.add(mark.guarantee);
    else events.push({ ...mark, guarantees: new Set([mark.guarantee]) });
  }
  const rows = events.slice(0, SHOWN).map((event) => {
    const [what, more] = TOLD[event.kind] ?? [event.kind, ""];
    const names = [...event.guarantees].filter(Boolean).sort();
    const where = names.length === 3 ? "all three guarantees" : names.map(words).join(", ");
    return h(
      "li", { class: event.kind === "left" ? "gone" : "" },
      h("time", moment(event.at_ms), ago(event.at_ms, now)),
      h("p", {}, h("b", {}, `${event.worker} ${what}`.trim()), " ", h("small", {}, [more, where].filter(Boolean).join(" · "))),
    );
  });
  if (!rows.length) rows.push(h("li", { class: "empty" }, "Nothing, so far."));
  replace($("happened"), rows);
}

export function showLetters(letters, reasons, now) {
  replace($("reasons"), reasons.map(([topic, error, number]) => h("li", {}, `${topic} `, h("b", {}, error || "without reason"), ` ${count(number)}`)));
  const rows = letters.map((letter) => h(
    "li", {},
    h("time", moment(letter.at_ms), ago(letter.at_ms, now)),
    h("div", {},
      h("p", {}, h("span", { class: "code" }, letter.error || "without reason"), ` ${letter.message}`),
      h("small", {}, [
        letter.source, letter.key && `key ${cut(letter.key)}`, letter.attempts > 1 && `${letter.attempts} attempts`, `lies at ${letter.place}`,
        letter.replayed && "sent back",
      ].filter(Boolean).join(" · "))),
  ));
  if (!rows.length) rows.push(h("li", { class: "empty" }, "None."));
  replace($("letters"), rows.slice(0, LETTERS_SHOWN));
  replace($("more-letters"), rows.slice(LETTERS_SHOWN));
  say($("more-title"), `${rows.length - LETTERS_SHOWN} older ones`);
  $("more").hidden = rows.length <= LETTERS_SHOWN;
}

function cut(key) {
  return key.length > KEY_CHARS ? `${key.slice(0, KEY_CHARS)}…` : key;
}

export function showWorker(process, now) {
  const guarantees = Object.keys(process.engines);
  say($("worker-hint"), `What ${process.worker || "it"} did since it started, ${ago(process.started_ms, now)}: only a worker itself knows its commits and failures.`);
  if (!guarantees.length) {
    replace($("engines"), [h("p", { class: "empty" }, "This process runs no agents; it shows what the others do.")]);
    return;
  }
  const row = (called, value, failed = false) => h(
    "tr", failed ? { class: "trouble" } : {},
    h("th", { scope: "row" }, called),
    ...guarantees.map((name) => h("td", {}, count(value(process.engines[name]) ?? 0))),
  );
  const counts = Object.entries(COUNTED).map(([name, called]) => row(called, (engine) => engine.counts[name]));
  const failures = Object.entries(FAILED).flatMap(([kind, called]) => {
    const reasons = [...new Set(guarantees.flatMap((name) => Object.keys(process.engines[name][kind])))].sort();
    return reasons.map((reason) => row(`${called} ${words(reason)}`, (engine) => engine[kind][reason], true));
  });
  replace($("engines"), [h(
    "table", { class: "live" },
    h("thead", {}, h("tr", {}, h("th", {}), ...guarantees.map((name) => h("th", { scope: "col" }, capital(words(name)))))),
    h("tbody", {}, ...counts, ...failures),
  )]);
}

export function showTotals(state) {
  const perSecond = state.guarantees.reduce((sum, card) => sum + (card.rate ?? 0), 0);
  const waiting = state.guarantees.reduce((sum, card) => sum + (card.lag ?? 0), 0);
  const workers = new Set(state.guarantees.flatMap((card) => card.members.map((member) => member.worker)));
  const parts = [["events/s", state.seen_ms ? rate(perSecond) : "–"], ["waiting", state.seen_ms ? count(waiting) : "–"], [workers.size === 1 ? "worker" : "workers", state.seen_ms ? count(workers.size) : "–"]];
  replace($("totals"), parts.map(([name, value]) => h("div", { class: "live" }, h("dt", {}, name), h("dd", {}, value))));
}
