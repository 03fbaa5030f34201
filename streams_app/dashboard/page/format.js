// Numbers and times, for people.

const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const compact = new Intl.NumberFormat("en-US", { notation: "compact", minimumFractionDigits: 1, maximumFractionDigits: 2 });
const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const calendar = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "long" });

export const NONE = "–";

export function count(value) {
  return value === null || value === undefined ? NONE : whole.format(value);
}

/** For a narrow place: millions and more in three digits. */
export function short(value) {
  return value >= 1e6 ? compact.format(value) : count(value);
}

/** Amounts come as text: they pass what a number of JavaScript holds exactly. */
export function amount(text) {
  return whole.format(BigInt(text)).replace("-", "−");
}

export function rate(value) {
  if (value === null || value === undefined) return NONE;
  return value > 0 && value < 10 ? value.toFixed(1) : whole.format(value);
}

export function milliseconds(value) {
  if (value === null || value === undefined) return NONE;
  return value < 10_000 ? `${whole.format(value)} ms` : `${(value / 1000).toFixed(1)} s`;
}

export function seconds(value) {
  if (value < 90) return `${Math.round(value)} s`;
  if (value < 5_400) return `${Math.round(value / 60)} min`;
  return value < 172_800 ? `${Math.round(value / 3_600)} h` : `${Math.round(value / 86_400)} days`;
}

export function ago(ms, now) {
  const passed = Math.max(0, now - ms) / 1000;
  return passed < 2 ? "now" : `${seconds(passed)} ago`;
}

/** Whoever writes a record gives it its time: it may be none. */
function told(ms, tell) {
  const date = new Date(ms);
  return Number.isNaN(date.getTime()) ? "?" : tell(date);
}

export function time(ms) {
  return told(ms, (date) => clock.format(date));
}

/** Of a <time>: for programs, and with its day and zone for people. */
export function moment(ms) {
  return { datetime: told(ms, (date) => date.toISOString()), title: told(ms, (date) => calendar.format(date)) };
}

/** A name in so many letters: those in its middle say least. */
export function middle(name, most) {
  const half = (most - 1) >> 1;
  return name.length > most ? `${name.slice(0, half)}…${name.slice(-half)}` : name;
}

export function words(name) {
  return name.replaceAll("_", " ");
}

export function capital(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}
