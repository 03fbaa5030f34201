// The card of one guarantee: its promise, what became of the events, how fast they go.

import { Chart } from "./chart.js";
import { h, replace, say, set } from "./dom.js";
import { amount, capital, count, milliseconds, rate, short, words } from "./format.js";

/** What each guarantee promises never to do. */
const NEVER = {
  exactly_once: ["lost", "repeated"],
  at_least_once: ["lost"],
  at_most_once: ["repeated"],
};

/** At most once, more was lost than whoever lost it has told, or has still in hand. */
export function exceeds({ lost, reported, in_hand }) {
  return reported !== null && lost > reported + in_hand;
}

export class Card {
  constructor(guarantee) {
    this.guarantee = guarantee;
    this.title = h("span");
    this.promise = h("p", { class: "promise" });
    this.outcomes = {};
    const outcome = h("dl", { class: "outcome judged live" });
    for (const name of ["lost", "repeated", "set_aside"]) {
      const value = h("dd", { "data-figure": `${guarantee}.${name}` });
      const note = h("small");
      const box = h("div", {}, h("dt", {}, capital(words(name))), value, note);
      this.outcomes[name] = { box, value, note };
      outcome.append(box);
    }
    const called = capital(words(guarantee));
    this.rate = new Measure("Throughput", new Chart(`${called}, throughput`, (sample) => [sample.rate], (value) => `${rate(value)}/s`));
    this.latency = new Measure("Latency", new Chart(`${called}, latency`, (sample) => [sample.p99, sample.p50], milliseconds));
    this.lag = new Measure("Waiting", new Chart(`${called}, events that wait`, (sample) => [sample.lag], count));
    this.figures = h("dl", { class: "figures judged live" });
    const id = `card-${guarantee}`;
    this.node = h(
      "article",
      { class: "card", "data-guarantee": guarantee, "aria-labelledby": id },
      h("div", {}, h("div", { class: "card-head" }, h("h2", { id }, called), this.title), this.promise),
      outcome, this.rate.node, this.latency.node, this.lag.node, this.figures,
    );
  }

  show(card) {
    say(this.title, card.title);
    say(this.promise, card.promise);
    for (const name of ["lost", "repeated", "set_aside"]) this.outcome(name, card);
    this.rate.say(rate(card.rate), `${card.unit}/s`, `${this.guarantee}.rate`, card.rate);
    const { p50, p99 } = card.latency;
    this.latency.say(milliseconds(p50), p99 === undefined ? "no answers lately" : `median · 99%: ${milliseconds(p99)}`, `${this.guarantee}.p50`, p50);
    this.lag.say(count(card.lag), "events", `${this.guarantee}.lag`, card.lag);
    replace(this.figures, [...card.figures.map((figure) => this.figure(figure)), this.group(card)]);
  }

  outcome(name, card) {
    const { box, value, note } = this.outcomes[name];
    const number = card[name];
    say(value, short(number));
    set(value, "data-value", number ?? "");
    set(value, "title", number >= 1e6 ? count(number) : null);
    set(value, "class", value.textContent.length > 6 ? "long" : null);
    const forbidden = NEVER[this.guarantee].includes(name);
    const broken = number > 0 && (forbidden || (name === "lost" && exceeds(card)));
    set(box, "class", broken ? "broken" : forbidden && number === 0 ? "kept" : null);
    say(note, this.note(name, number, forbidden, broken, card));
  }

  note(name, number, forbidden, broken, card) {
    if (number === null) return "nobody counts it";
    if (broken) return forbidden ? "must be 0" : `more than ${count(card.reported + card.in_hand)} reported`;
    if (forbidden) return "as promised";
    if (name === "set_aside") return "dead letters";
    if (name === "lost") return card.reported === null ? "permitted" : `≤ ${count(card.reported)} reported`;
    return "permitted";
  }

  figure({ name, value, zero }) {
    const single = typeof value === "string";
    const parts = single ? [["", value]] : Object.entries(value).filter(([, number]) => zero || number !== "0").sort();
    const off = parts.some(([, number]) => number !== "0");
    const shown = parts.map(([label, number]) => h("span", { class: number === "0" ? null : "off", "data-label": label, "data-value": number }, label ? h("i", {}, label) : null, amount(number)));
    if (!shown.length) shown.push(h("span", {}, "nothing"));
    return h("div", { class: zero ? (off ? "nonzero" : "zero") : "plain" }, h("dt", {}, name), h("dd", {}, ...shown));
  }

  group(card) {
    const workers = card.members.length === 1 ? "1 worker" : `${count(card.members.length)} workers`;
    const state = card.state ? `${workers} · ${words(card.state.toLowerCase())}` : "not known yet";
    return h("div", { class: "plain" }, h("dt", { title: card.app_id }, "Consumer group"), h("dd", {}, h("span", {}, state)));
  }

  draw(samples, marks, now) {
    const own = samples.filter((sample) => sample[this.guarantee]).map((sample) => {
      const [perSecond, lag, p50, p99] = sample[this.guarantee];
      return { at: sample.at, rate: perSecond, lag, p50: p50 ?? undefined, p99: p99 ?? undefined };
    });
    const happened = marks.filter((mark) => !mark.guarantee || mark.guarantee === this.guarantee);
    for (const each of [this.rate, this.latency, this.lag]) each.chart.draw(own, happened, now);
  }
}

/** A figure in large, with its chart. */
class Measure {
  constructor(name, chart) {
    this.chart = chart;
    this.value = h("b");
    this.unit = h("span");
    this.node = h("div", {}, h("div", { class: "measure" }, h("h3", {}, name), h("p", { class: "live" }, this.value, " ", this.unit)), chart.node);
  }

  say(text, unit, figure, value) {
    say(this.value, text);
    say(this.unit, unit);
    set(this.value, "data-figure", figure);
    set(this.value, "data-value", value ?? "");
  }
}
