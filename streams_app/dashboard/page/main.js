// Listens to /events and shows what comes; says so when nothing comes.

import { Card, exceeds } from "./cards.js";
import { $, h, replace, say, set } from "./dom.js";
import { count, seconds, time, words } from "./format.js";
import { showHappened, showHolders, showLetters, showTotals, showWorker } from "./panels.js";

const KEPT_MS = 330_000;
/** The worker tells something every second. */
const SILENT_MS = 5_000;
const STALE_MS = 6_000;
const RETRY_MS = 2_000;
const LONGEST_RETRY_MS = 30_000;
/** What was judged longer ago says nothing of now. */
const JUDGED_MS = 30_000;
const HIDDEN_MS = 60_000;

const cards = new Map();
const samples = new Map();
const marks = new Map();
let state = null;
/** By the worker's clock: what is to be added to ours. */
let skew = 0;
let heard = 0;
let cutSince = null;
let source = null;
let retry = RETRY_MS;
/** Why what came is not shown. */
let failure = "";

function listen() {
  source?.close();
  source = new EventSource("events");
  source.addEventListener("history", (event) => hear(() => JSON.parse(event.data).forEach(keep)));
  source.addEventListener("state", (event) => hear(() => take(JSON.parse(event.data))));
  source.addEventListener("error", cut);
  heard = Date.now();
}

function hear(act) {
  heard = Date.now();
  cutSince = null;
  retry = RETRY_MS;
  try {
    act();
    failure = "";
  } catch (error) {
    failure = `This page does not understand what its worker says (${error.message}): reload it.`;
    showConnection();
    console.warn(error);
  }
}

function cut() {
  cutSince ??= state === null ? Date.now() : heard;
  showConnection();
  // The browser tries again by itself, but not when the answer was no stream.
  if (source.readyState !== EventSource.CLOSED) return;
  setTimeout(() => document.hidden || source.readyState !== EventSource.CLOSED || listen(), retry);
  retry = Math.min(2 * retry, LONGEST_RETRY_MS);
}

const now = () => Date.now() + skew;

function keep([at, figures]) {
  samples.set(at, { at, ...figures });
  for (const old of samples.keys()) if (old < at - KEPT_MS) samples.delete(old);
}

function note(mark) {
  marks.set(`${mark.at_ms} ${mark.guarantee} ${mark.kind} ${mark.worker}`, mark);
  for (const [key, old] of marks) if (marks.size > 400 && old !== mark) marks.delete(key);
}

function take(fresh) {
  // Behind a router another process may answer, which is no restart.
  const [was, is] = [state?.process, fresh.process];
  const restarted = was?.worker === is.worker && (was.pid !== is.pid || was.started_ms !== is.started_ms);
  const isNew = fresh.seen_ms && fresh.seen_ms !== state?.seen_ms;
  // A worker that has just restarted knows nothing yet: what was known stays, and is shown as stale.
  if (state !== null && !fresh.seen_ms) fresh = { ...state, now_ms: fresh.now_ms, remark: fresh.remark, trouble: fresh.trouble, process: fresh.process };
  state = fresh;
  skew = fresh.now_ms - Date.now();
  if (restarted) note({ at_ms: fresh.now_ms, guarantee: "", kind: "page", worker: "" });
  fresh.marks.forEach(note);
  if (isNew) {
    keep([fresh.seen_ms, Object.fromEntries(fresh.guarantees.map((card) => [card.guarantee, [card.rate, card.lag, card.latency.p50, card.latency.p99]]))]);
  }
  show();
}

function show() {
  for (const card of state.guarantees) {
    if (!cards.has(card.guarantee)) {
      cards.set(card.guarantee, new Card(card.guarantee));
      $("guarantees").append(cards.get(card.guarantee).node);
    }
    cards.get(card.guarantee).show(card);
  }
  const { process } = state;
  say($("from"), `seen from ${process.worker || "a process without agents"} · process ${process.pid}`);
  showTotals(state);
  showHolders(state.guarantees);
  showLetters(state.letters, state.reasons, now());
  showWorker(process, now());
  tick();
}

/** What changes by time alone. */
function tick() {
  showConnection();
  if (state === null) return;
  showVerdict(document.body.dataset.connection === "live");
  const drawn = [...samples.values()].sort((one, other) => one.at - other.at);
  const happened = [...marks.values()];
  for (const card of cards.values()) card.draw(drawn, happened, now());
  showHappened(happened, now());
}

function showConnection() {
  const silent = Date.now() - heard > SILENT_MS;
  if (silent) cutSince ??= heard;
  const age = state?.seen_ms ? now() - state.seen_ms : 0;
  let connection = state?.seen_ms ? "live" : "starting";
  let notice = "";
  if (cutSince !== null) {
    connection = "cut";
    notice = `The stream is cut since ${time(cutSince)} (${seconds((Date.now() - cutSince) / 1000)}). These are the last figures; trying again.`;
    if (state === null) notice = `No answer from the worker since ${time(cutSince)}; trying again.`;
  } else if (age > STALE_MS) {
    connection = "stale";
    notice = `These figures are ${seconds(age / 1000)} old. ${state.trouble || state.remark || "Kafka is slow to answer."}`;
  } else if (failure) {
    notice = failure;
  } else if (state?.judged?.trouble) {
    notice = `What is lost and repeated is not judged at the moment: ${state.judged.trouble}`;
  }
  set(document.body, "data-connection", connection);
  say($("pill-text"), { live: "Live", cut: "Cut off", stale: "Stale", starting: "Starting" }[connection]);
  // Read out when it begins and ends, not at each second of it.
  const node = $("notice");
  set(node, "aria-live", node.hidden === !notice ? "off" : "polite");
  say(node, notice);
  node.hidden = !notice;
  set(node, "class", connection === "cut" ? "notice bad" : "notice");
}

/** By the worker's clock, the moment up to which all was judged. */
const upTo = (judged) => judged.at_ms - judged.behind_s * 1000;

/** `live`: it is of now; else only what was so when it was last seen. */
function showVerdict(live) {
  const judged = state.judged;
  const found = Object.entries(judged?.anomalies ?? {}).flatMap(([name, kinds]) => Object.entries(kinds).map(([kind, number]) => [name, kind, number]));
  const total = found.reduce((sum, [, , number]) => sum + number, 0);
  const complete = Boolean(judged) && judged.behind_s !== null;
  const fresh = complete && !judged.trouble && now() - upTo(judged) < JUDGED_MS;
  const exceeded = state.guarantees.some(exceeds);
  const verdict = total ? "bad" : fresh && live && !exceeded ? "good" : "";
  set($("verdict"), "class", `verdict ${verdict}`.trim());
  set($("sign"), "d", { good: "m5 12.5 4.5 4.5L19 7.5", bad: "M6 6l12 12M18 6 6 18", "": "M12 6v7M12 17.5v.5" }[verdict]);
  let title = "Reading what was committed";
  if (total) title = `${count(total)} ${total === 1 ? "anomaly" : "anomalies"} found`;
  else if (exceeded) title = "More was lost than was reported, so far";
  else if (complete) title = fresh && live ? "Every guarantee holds" : "Every guarantee held, when last seen";
  say($("verdict-words"), title);
  say($("verdict-detail"), detail(judged, complete, fresh && live));
  for (const node of document.querySelectorAll(".cards")) node.classList.toggle("behind", !fresh);
  document.title = total ? `${title} – streams-app` : "streams-app";
  const recent = (judged?.recent ?? []).map((each) => h("li", {}, `${time(each.at_ms)} ${each.anomaly}: ${each.text}`));
  replace($("found"), total ? [...found.map(([name, kind, number]) => h("li", {}, h("b", {}, `${words(name)}: ${kind} ${count(number)}`))), ...recent] : []);
  $("found").hidden = !total;
}

function detail(judged, complete, live) {
  if (!judged) return "One moment: the first figures come within seconds.";
  const remarks = judged.remarks.length ? ` ${judged.remarks.join("; ")}.` : "";
  if (!complete) return `${count(judged.records)} committed records judged so far, ${count(judged.records_per_s)} a second; what follows is not complete yet.${remarks}`;
  const when = live ? `up to ${seconds(Math.max(1, (now() - upTo(judged)) / 1000))} ago` : `up to ${time(upTo(judged) - skew)}`;
  return `Judged from ${count(judged.records)} committed records, ${when}.${remarks}`;
}

/** A page that nobody sees costs nothing: what it missed is told when it is seen again. */
let leaving = null;
document.addEventListener("visibilitychange", () => {
  clearTimeout(leaving);
  leaving = null;
  if (document.hidden) leaving = setTimeout(() => source.close(), HIDDEN_MS);
  else if (source.readyState === EventSource.CLOSED) listen();
});

listen();
setInterval(() => {
  if (document.hidden) return;
  if (Date.now() - heard > 2 * SILENT_MS && source.readyState !== EventSource.CLOSED) listen();
  tick();
}, 1_000);
