// One small chart: the last minutes of one or two figures, with what happened meanwhile. By pointer and by arrow keys it
// tells its values at a moment.

import { h, say, set, svg } from "./dom.js";
import { ago, time, words } from "./format.js";

const WIDTH = 600;
const HEIGHT = 92;
/** Above the curve, for the scale and the names of marks. */
const ROOM = 20;
/** At most so wide is a letter up there, in pixels. */
const LETTER = 7;
/** What is shown grows with what is known, up to five minutes. */
const LEAST_MS = 60_000;
const MOST_MS = 300_000;
/** Without a sample for so long, nothing is known of the time between. */
const GAP_MS = 4_000;

export class Chart {
  /** `read` gives the values of a sample, the larger first; `show` puts one into words. */
  constructor(label, read, show) {
    this.read = read;
    this.show = show;
    this.samples = [];
    this.marks = [];
    this.now = Date.now();
    this.span = LEAST_MS;
    this.at = null;
    this.gaps = svg("g");
    this.grid = svg("line", { class: "grid", x1: 0, x2: WIDTH, y1: HEIGHT - 0.5, y2: HEIGHT - 0.5 });
    this.areas = svg("path", { class: "area" });
    this.second = svg("path", { class: "second" });
    this.edge = svg("path", { class: "edge" });
    this.lines = svg("g");
    this.cross = svg("line", { class: "cross", y1: 0, y2: HEIGHT, visibility: "hidden" });
    this.svg = svg(
      "svg",
      { class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", tabindex: 0, role: "img", "aria-label": label },
      this.gaps, this.grid, this.areas, this.second, this.edge, this.lines, this.cross,
    );
    this.label = label;
    this.top = h("span", { class: "top" });
    this.left = h("span");
    this.right = h("span", {}, "now");
    this.flags = h("div", { class: "flags", "aria-hidden": "true" });
    this.node = h("div", { class: "plot live" }, this.top, this.flags, this.svg, h("div", { class: "scale" }, this.left, this.right));
    this.listen();
  }

  listen() {
    const point = (event) => {
      const box = this.svg.getBoundingClientRect();
      this.look(this.now - this.span + ((event.clientX - box.left) / box.width) * this.span);
    };
    this.svg.addEventListener("pointermove", point);
    this.svg.addEventListener("pointerdown", point);
    this.svg.addEventListener("pointerleave", () => this.look(null));
    this.svg.addEventListener("blur", () => this.look(null));
    this.svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -5_000, ArrowRight: 5_000, Home: -MOST_MS, End: MOST_MS }[event.key];
      if (event.key === "Escape") this.look(null);
      if (!step) return;
      event.preventDefault();
      this.look((this.at ?? this.now) + step);
    });
  }

  draw(samples, marks, now) {
    const first = samples.find((sample) => sample.at >= now - MOST_MS)?.at ?? now;
    // In steps, so that the picture does not creep.
    this.span = Math.min(MOST_MS, Math.max(LEAST_MS, Math.ceil((now - first) / 30_000) * 30_000));
    const begin = now - this.span;
    this.now = now;
    this.samples = samples.filter((sample) => sample.at >= begin - GAP_MS);
    this.marks = marks.filter((mark) => mark.at_ms >= begin);
    const most = Math.max(0, ...this.samples.map((sample) => this.read(sample)[0] ?? 0));
    const top = ceiling(most);
    const x = (at) => (Math.max(0, (at - begin) / this.span) * WIDTH).toFixed(1);
    const y = (value) => (HEIGHT - (value / top) * (HEIGHT - ROOM)).toFixed(1);
    const [large, small] = [0, 1].map((index) => this.pieces(index).map((piece) => piece.map(([at, value]) => `${x(at)},${y(value)}`)));
    set(this.edge, "d", large.map((piece) => `M${piece.join("L")}`).join(""));
    set(this.second, "d", small.map((piece) => `M${piece.join("L")}`).join(""));
    const floor = (point) => `${point.split(",")[0]},${HEIGHT}`;
    set(this.areas, "d", large.map((piece) => `M${floor(piece[0])}L${piece.join("L")}L${floor(piece.at(-1))}Z`).join(""));
    this.gaps.replaceChildren(...this.unknown(begin).map(([from, to]) => svg("rect", { class: "gap", x: x(from), width: x(to) - x(from), y: 0, height: HEIGHT })));
    this.lines.replaceChildren(...this.marks.map((mark) => this.line(mark, x(mark.at_ms))));
    say(this.top, most > 0 ? this.show(top) : "");
    this.flags.replaceChildren(...this.flagged(begin));
    this.look(this.at);
  }

  line(mark, x) {
    const about = mark.kind === "rebalance" ? "" : ` worker ${mark.kind}`;
    const title = svg("title", {}, `${time(mark.at_ms)} ${mark.worker} ${words(mark.kind)}`);
    return svg("line", { class: `mark${about}`, x1: x, x2: x, y1: 0, y2: HEIGHT }, title);
  }

  /** Names beside the lines of workers: who is gone first, then the newest, and none over another. */
  flagged(begin) {
    const width = this.svg.clientWidth;
    const taken = [[0, this.top.textContent.length * LETTER]];
    const flags = [];
    const gone = (mark) => Number(mark.kind === "left");
    for (const mark of this.marks.filter((each) => each.worker).sort((one, other) => gone(other) - gone(one) || other.at_ms - one.at_ms)) {
      const text = `${mark.worker} ${mark.kind === "left" ? "gone" : mark.kind}`;
      const long = text.length * LETTER + 10;
      const x = ((mark.at_ms - begin) / this.span) * width;
      const from = [x - long, x].find((start) => start >= 0 && start + long <= width && !taken.some(([left, right]) => start < right && start + long > left));
      if (from === undefined) continue;
      taken.push([from, from + long]);
      const flag = h("span", { class: `${mark.kind} ${from < x ? "before" : "after"}` }, text);
      flag.style.left = `${((100 * x) / width).toFixed(2)}%`;
      flags.push(flag);
    }
    return flags;
  }

  /** The values as points, in pieces between which nothing is known. */
  pieces(index) {
    const pieces = [];
    let last = -Infinity;
    for (const sample of this.samples) {
      const value = this.read(sample)[index];
      if (value === null || value === undefined) continue;
      if (sample.at - last > GAP_MS) pieces.push([]);
      pieces.at(-1).push([sample.at, value]);
      last = sample.at;
    }
    return pieces;
  }

  /** Stretches between samples that are too far apart. */
  unknown(begin) {
    const found = [];
    this.samples.forEach((sample, index) => {
      const before = this.samples[index - 1];
      if (before && sample.at - before.at > GAP_MS) found.push([Math.max(begin, before.at), sample.at]);
    });
    const last = this.samples.at(-1);
    if (last && this.now - last.at > GAP_MS) found.push([last.at, this.now]);
    return found;
  }

  /** Tell the values at a moment; null: stop telling. */
  look(at) {
    this.at = at === null ? null : Math.min(this.now, Math.max(this.now - this.span, at));
    set(this.cross, "visibility", this.at === null ? "hidden" : "visible");
    if (this.at === null) {
      say(this.left, ago(this.now - this.span, this.now));
      say(this.right, "now");
      set(this.svg, "aria-label", this.label);
      return;
    }
    const x = ((this.at - (this.now - this.span)) / this.span) * WIDTH;
    set(this.cross, "x1", x);
    set(this.cross, "x2", x);
    const nearest = this.samples.reduce((best, sample) => (best && Math.abs(best.at - this.at) <= Math.abs(sample.at - this.at) ? best : sample), null);
    const known = nearest && Math.abs(nearest.at - this.at) < GAP_MS;
    const values = known ? this.read(nearest).filter((value) => value !== undefined).map((value) => this.show(value)).reverse().join(" · ") : "not known";
    const near = this.marks.filter((mark) => Math.abs(mark.at_ms - this.at) < 4_000).map((mark) => `${mark.worker} ${words(mark.kind)}`.trim());
    say(this.left, `${time(this.at)} · ${ago(this.at, this.now)}`);
    say(this.right, [values, ...new Set(near)].join(" · "));
    set(this.svg, "aria-label", `${this.label}: ${time(this.at)}: ${values}`);
  }
}

/** The next round number, so that the scale does not move with each sample. */
function ceiling(value) {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 5, 7.5, 10].map((step) => step * power).find((step) => step >= value * 1.02) ?? 10 * power;
}
