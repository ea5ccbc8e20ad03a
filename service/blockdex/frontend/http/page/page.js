// Asks the server for one JSON object a second while somebody looks, and shows it. Nothing else is ever loaded.

const EVERY_MS = 1000;
const PATIENCE_MS = 2000;
const WINDOW = 60;
const STATES = {
  free: "no sequence",
  private: "one sequence",
  shared: "several sequences, as forks do",
  idle: "only sequences past their lease: may be evicted",
};
const TILES = [
  ["requests", "Requests/s"],
  ["decode_seconds", "Decode in the engine"],
  ["decode", "Decode tokens/s"],
  ["prefill", "Prefill tokens/s"],
  ["busy", "Engine busy"],
  ["errors", "Errors/s"],
];

const byId = (id) => document.getElementById(id);
let shown = null;

// --- Words ---

const grouped = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const rough = new Intl.NumberFormat("en", { maximumSignificantDigits: 2 });
const precise = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });

const count = (value) => grouped.format(value);

function compact(value) {
  if (value >= 1e9) return `${precise.format(value / 1e9)} G`;
  if (value >= 1e6) return `${precise.format(value / 1e6)} M`;
  if (value >= 1e5) return `${precise.format(value / 1e3)} k`;
  if (value >= 100) return grouped.format(value);
  return value >= 1 ? precise.format(value) : rough.format(value);
}

function time(seconds) {
  if (seconds === null) return "–";
  if (seconds < 1e-3) return `${precise.format(seconds * 1e6)} µs`;
  return seconds < 1 ? `${precise.format(seconds * 1e3)} ms` : `${precise.format(seconds)} s`;
}

function duration(seconds) {
  const [days, hours, minutes] = [86400, 3600, 60].map((unit) => Math.floor(seconds / unit));
  if (days) return `${days} d ${hours % 24} h`;
  if (hours) return `${hours} h ${minutes % 60} min`;
  return minutes ? `${minutes} min ${Math.floor(seconds % 60)} s` : `${Math.floor(seconds)} s`;
}

function bytes(value) {
  const power = Math.min(Math.floor(Math.log2(Math.max(value, 1)) / 10), 4);
  return `${precise.format(value / 1024 ** power)} ${["B", "KiB", "MiB", "GiB", "TiB"][power]}`;
}

const share = (part, whole) => `${(whole ? (100 * part) / whole : 0).toFixed(1)} %`;

// --- Elements ---

function element(tag, className = "", ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// The rows of a table part, one for each key, made anew only when the keys are others than before.
function rowsOf(part, keys, make) {
  if (part.dataset.keys !== keys.join()) {
    part.replaceChildren(...keys.map(make));
    part.dataset.keys = keys.join();
  }
  return [...part.rows];
}

function row(name, ...classes) {
  const head = element("th", "", ...[name].flat());
  head.scope = "row";
  return element("tr", "", head, ...classes.map((className) => element("td", className)));
}

// "Stream/AppendKeys" may go over two lines where there is no room.
const breakable = (name) => name.split(/(?<=\/)/).flatMap((part, index) => (index ? [element("wbr"), part] : [part]));

function svg(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function sparkline() {
  return svg(
    "svg",
    { class: "spark", viewBox: `0 0 ${WINDOW - 1} 20`, preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("path", { class: "area" }),
    svg("path", { class: "line" }),
  );
}

// Values of the last seconds, the newest at the right edge; where one is null the line has a gap.
function drawSparkline(spark, values, top) {
  const scale = top || Math.max(...values.filter((value) => value !== null), 0) || 1;
  const runs = [[]];
  values.forEach((value, index) => {
    if (value === null) runs.push([]);
    else runs.at(-1).push([WINDOW - values.length + index, 19 - (18 * value) / scale]);
  });
  const filled = runs.filter((run) => run.length);
  // A single second between gaps is drawn as long as a second.
  for (const run of filled) if (run.length === 1) run.unshift([run[0][0] - 1, run[0][1]]);
  const points = (run) => run.map(([x, y]) => `${x} ${y.toFixed(2)}`).join("L");
  const [area, line] = spark.children;
  line.setAttribute("d", filled.map((run) => `M${points(run)}`).join(""));
  area.setAttribute("d", filled.map((run) => `M${run[0][0]} 20L${points(run)}L${run.at(-1)[0]} 20Z`).join(""));
}

function rangeBar() {
  const bar = element("div", "range", element("span"));
  bar.setAttribute("aria-hidden", "true");
  return bar;
}

// From p50 to p99 on a logarithmic scale from 10 µs to 10 s.
function drawRange(bar, p50, p99) {
  const place = (seconds) => Math.min(Math.max((Math.log10(seconds) + 5) / 6, 0), 1);
  const span = bar.firstChild;
  span.hidden = p50 === null;
  if (p50 === null) return;
  span.style.left = `calc(${100 * place(p50)}% - 3px)`;
  span.style.width = `calc(${100 * (place(p99) - place(p50))}% + 6px)`;
}

// --- Parts of the page ---

function showServer(live) {
  const status = byId("status");
  status.dataset.state = live.ready ? "ready" : "not-ready";
  write(status, live.ready ? "Serving" : `Not ready: ${live.obstacle}`);
  document.title = live.ready ? "blockdex" : "blockdex, not ready";
  write(byId("device"), live.device);
  write(byId("version"), live.version);
  write(byId("uptime"), duration(live.uptime_seconds));
  write(byId("epoch"), live.epoch);
  const age = byId("epoch-age");
  // An epoch much younger than the server: the engine failed and lost its cache.
  const lost = live.uptime_seconds - live.epoch_seconds > 30;
  age.classList.toggle("fresh", lost && live.epoch_seconds < 600);
  write(age, `${duration(live.epoch_seconds)} old`);
  const seconds = Math.round(live.window_seconds);
  for (const node of document.querySelectorAll(".window")) write(node, `last ${seconds} s`);
}

function showTiles(live) {
  const tiles = byId("tiles");
  if (!tiles.children.length) {
    for (const [key, name] of TILES) {
      const tile = element("div", "tile", element("h2", "", name), element("p", "value"), element("p", "more"), sparkline());
      tile.dataset.key = key;
      tiles.append(tile);
    }
  }
  for (const tile of tiles.children) {
    const { key } = tile.dataset;
    const past = live.seconds[key] ?? [];
    const [value, more] = tile.querySelectorAll("p");
    if (key === "busy") {
      write(value, share(live.now.busy, 1));
      const device = `device ${share(live.now.device_busy, 1)}`;
      write(more, `${device}, ${count(live.queued)} queued, ${count(live.waiting)} waiting`);
    } else if (key === "decode_seconds") {
      write(value, time(live.now[key]));
      write(more, `mean, peak ${time(Math.max(...past) || null)}`);
    } else if (key === "errors") {
      write(value, compact(live.now.errors));
      write(more, `faults of the server ${compact(live.now.faults)}`);
    } else {
      write(value, compact(live.now[key]));
      write(more, `peak ${compact(Math.max(...past, 0))}`);
    }
    drawSparkline(tile.querySelector(".spark"), past, key === "busy" ? 1 : 0);
    tile.classList.toggle("bad", key === "errors" && live.now.errors > 0);
  }
}

function showPages({ cache: { pages, cells, page_bytes, capacity_tokens }, seconds: { pages_used: past } }) {
  write(
    byId("cache-summary"),
    `${count(pages.total)} pages of ${bytes(page_bytes)}, ${count(capacity_tokens)} tokens, ` +
      `${share(pages.total - pages.free, pages.total)} used`,
  );
  const names = Object.keys(STATES);
  const rows = rowsOf(byId("pages").tBodies[0], names, (name) => {
    const made = row([element("span", `swatch ${name}`), name], "about wide", "n", "n", "n");
    made.cells[1].textContent = STATES[name];
    return made;
  });
  rows.forEach((made, index) => {
    const held = pages[names[index]];
    [count(held), share(held, pages.total), bytes(held * page_bytes)].forEach((text, cell) => write(made.cells[cell + 2], text));
  });
  const words = names.map((name) => `${count(pages[name])} ${name}`).join(", ");
  byId("map").setAttribute("aria-label", `Map of ${count(pages.total)} pages: ${words}`);
  map.show(cells, pages.total);
  const used = byId("used");
  if (!used.firstChild) used.append(sparkline());
  drawSparkline(used.firstChild, past, pages.total);
}

function showSequences({ sequences, cache }) {
  write(byId("sequences-open"), count(sequences.open));
  write(byId("sequences-idle"), count(sequences.idle));
  write(byId("sequences-tokens"), compact(sequences.tokens));
  write(byId("evictions"), count(cache.evictions));
  const most = Math.max(...sequences.lengths, 1);
  const rows = rowsOf(byId("lengths").tBodies[0], sequences.bounds, (bound) => {
    const made = row(count(bound), "bar-column", "n");
    made.cells[1].append(element("div", "bar"));
    return made;
  });
  rows.forEach((made, index) => {
    const open = sequences.lengths[index];
    made.cells[1].firstChild.style.width = `${(100 * open) / most}%`;
    showCount(made.cells[2], open);
    made.classList.toggle("unused", !open);
  });
}

function showStages(live) {
  const names = live.stages.map(({ name }) => name);
  const rows = rowsOf(byId("stages").tBodies[0], names, (name) => {
    const made = row(name, "n", "n", "n", "range-column", "spark-column");
    made.cells[4].append(rangeBar());
    made.cells[5].append(sparkline());
    return made;
  });
  rows.forEach((made, index) => {
    showTimes(made, live.stages[index]);
    drawSparkline(made.cells[5].firstChild, live.seconds.p99[names[index]]);
  });
}

function showCalls({ rpcs }) {
  const rows = rowsOf(byId("calls").tBodies[0], rpcs.map(({ name }) => name), (name) => {
    const made = row(breakable(name), "n", "n", "n", "range-column", "n");
    made.cells[4].append(rangeBar());
    return made;
  });
  rows.forEach((made, index) => {
    showTimes(made, rpcs[index]);
    showCount(made.cells[5], rpcs[index].errors, true);
  });
}

function showTimes(made, { rate, p50, p99 }) {
  write(made.cells[1], compact(rate));
  write(made.cells[2], time(p50));
  write(made.cells[3], time(p99));
  for (const cell of [1, 2, 3]) made.cells[cell].classList.toggle("zero", p50 === null);
  made.classList.toggle("unused", p50 === null);
  drawRange(made.cells[4].firstChild, p50, p99);
}

function showCount(cell, value, alarming = false) {
  write(cell, count(value));
  cell.classList.toggle("zero", value === 0);
  cell.classList.toggle("alarm", alarming && value > 0);
}

function showBatches({ batches }) {
  const { bounds, requests, tokens, mean, tokens_mean: means } = batches;
  const columns = [requests, tokens.append, tokens.decode, tokens.prefill];
  const sizes = [...bounds, Infinity].map((bound, index) => sizeWords(bounds[index - 1] ?? 0, bound));
  const make = (name) => row(name, ...columns.map(() => "n heat"));
  rowsOf(byId("batches").tBodies[0], sizes, make).forEach((made, index) => {
    columns.forEach((column, place) => {
      const cell = made.cells[place + 1];
      showCount(cell, column[index]);
      cell.style.setProperty("--size", column[index] / Math.max(...column, 1));
    });
    made.classList.toggle("unused", columns.every((column) => !column[index]));
  });
  const [foot] = rowsOf(byId("batches").tFoot, ["mean"], () => row("mean", "n", "n", "n", "n"));
  [mean, means.append, means.decode, means.prefill].forEach((value, place) => {
    write(foot.cells[place + 1], value === null ? "–" : compact(value));
  });
}

function sizeWords(below, bound) {
  if (bound === Infinity) return `over ${count(below)}`;
  return bound - below > 1 ? `${count(below + 1)}–${count(bound)}` : count(bound);
}

function showCodes({ codes }) {
  const rows = rowsOf(byId("codes").tBodies[0], codes.map(({ code }) => code), (code) => row(code, "n", "n"));
  rows.forEach((made, index) => {
    const { code, window: recent, total } = codes[index];
    showCount(made.cells[1], recent, code !== "OK");
    showCount(made.cells[2], total);
    made.classList.toggle("unused", total === 0);
  });
}

function showSettings({ kernels, spec, limits }) {
  rowsOf(byId("kernels").tBodies[0], kernels.map(([phase]) => phase), (phase) => row(phase, "", "why")).forEach(
    (made, index) => kernels[index].forEach((text, cell) => cell && write(made.cells[cell], text)),
  );
  for (const [id, values] of Object.entries({ spec, limits })) {
    const names = Object.keys(values).filter((name) => values[name] !== null);
    rowsOf(byId(id).tBodies[0], names, (name) => row(name.replaceAll("_", " "), "n")).forEach((made, index) => {
      const name = names[index], value = values[name];
      const shown = name.endsWith("_bytes") ? bytes(value) : new Intl.NumberFormat("en").format(value);
      write(made.cells[1], typeof value === "number" ? shown : value);
    });
  }
}

// --- The map ---

const map = {
  canvas: byId("map"),
  cells: null,
  total: 0,
  columns: 1,
  rows: 1,
  chosen: -1,

  show(cells, total) {
    this.cells = cells;
    this.total = total;
    this.draw();
    this.tell();
  },

  pagesOf(index) {
    const size = this.cells.pages_per_cell;
    const [first, last] = [index * size, Math.min((index + 1) * size, this.total)];
    const [held, shared, idle] = [this.cells.private[index], this.cells.shared[index], this.cells.idle[index]];
    return { first, last: last - 1, private: held, shared, idle, free: last - first - held - shared - idle };
  },

  // Cells fill the canvas to its edges, as square as that allows; each is filled from below by its pages' states.
  draw() {
    if (!this.cells) return;
    const { canvas } = this;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight].map((side) => Math.round(side * devicePixelRatio));
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const number = this.cells.private.length;
    this.rows = Math.min(number, Math.max(1, Math.round(height / Math.sqrt((width * height) / number))));
    this.columns = Math.ceil(number / this.rows);
    const style = getComputedStyle(canvas);
    const colours = Object.fromEntries(Object.keys(STATES).map((name) => [name, style.getPropertyValue(`--${name}`)]));
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, width, height);
    const gap = width / this.columns >= 5 * devicePixelRatio ? Math.ceil(devicePixelRatio) : 0;
    for (let index = 0; index < number; index += 1) this.drawCell(context, index, width, height, gap, colours);
  },

  drawCell(context, index, width, height, gap, colours) {
    const [column, line] = [index % this.columns, Math.floor(index / this.columns)];
    const [left, right] = [column, column + 1].map((edge) => Math.round((edge * width) / this.columns));
    const [top, bottom] = [line, line + 1].map((edge) => Math.round((edge * height) / this.rows));
    const pages = this.pagesOf(index);
    const size = pages.last - pages.first + 1;
    let below = 0;
    for (const state of ["private", "shared", "idle", "free"]) {
      if (!pages[state]) continue;
      const [from, to] = [below, below + pages[state]].map((edge) => Math.round((edge * (bottom - top - gap)) / size));
      context.fillStyle = colours[state];
      context.fillRect(left, bottom - gap - to, right - left - gap, to - from);
      below += pages[state];
    }
    if (index === this.chosen) {
      context.strokeStyle = getComputedStyle(this.canvas).color;
      context.lineWidth = 2 * devicePixelRatio;
      context.strokeRect(left, top, right - left - gap, bottom - top - gap);
    }
  },

  choose(index) {
    this.chosen = index >= 0 && this.cells && index < this.cells.private.length ? index : -1;
    this.draw();
    this.tell();
  },

  tell() {
    const node = byId("map-cell");
    if (this.chosen < 0) {
      const size = this.cells.pages_per_cell;
      write(node, `A cell is ${size === 1 ? "a page" : `${size} pages, filled from below`}.`);
      return;
    }
    const { first, last, ...states } = this.pagesOf(this.chosen);
    const words = Object.entries(states).filter(([, pages]) => pages);
    const what = first === last ? words[0][0] : words.map(([state, pages]) => `${pages} ${state}`).join(", ");
    write(node, `${first === last ? `Page ${first}` : `Pages ${first}–${last}`}: ${what}`);
  },
};

map.canvas.addEventListener("pointermove", (event) => {
  const { left, top, width, height } = map.canvas.getBoundingClientRect();
  const column = Math.floor(((event.clientX - left) / width) * map.columns);
  const line = Math.floor(((event.clientY - top) / height) * map.rows);
  map.choose(line * map.columns + column);
});
map.canvas.addEventListener("pointerleave", () => map.choose(-1));
map.canvas.addEventListener("blur", () => map.choose(-1));
map.canvas.addEventListener("keydown", (event) => {
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -map.columns, ArrowDown: map.columns };
  if (!(event.key in steps)) return;
  event.preventDefault();
  const next = map.chosen < 0 ? 0 : map.chosen + steps[event.key];
  if (next >= 0 && next < map.cells.private.length) map.choose(next);
});
new ResizeObserver(() => map.draw()).observe(map.canvas);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => map.draw());

// --- Asking ---

function show(live) {
  // Another server has taken this one's place, and may say other things.
  if (shown && shown.version !== live.version) location.reload();
  shown = live;
  byId("main").classList.remove("stale");
  showServer(live);
  showTiles(live);
  showPages(live);
  showSequences(live);
  showStages(live);
  showCalls(live);
  showBatches(live);
  showCodes(live);
  showSettings(live);
  for (const id of ["facts", "main"]) byId(id).hidden = false;
  map.draw();
}

function showUnreachable() {
  const status = byId("status");
  byId("main").classList.add("stale");
  if (status.dataset.state === "unreachable") return;
  status.dataset.state = "unreachable";
  document.title = "blockdex, unreachable";
  write(status, `Unreachable since ${new Date().toLocaleTimeString("en-GB")}, asking again`);
}

async function ask() {
  const answer = await fetch("v1/live", { signal: AbortSignal.timeout(PATIENCE_MS), cache: "no-store" });
  if (!answer.ok) throw new Error(`status ${answer.status}`);
  return answer.json();
}

let asking = false;
let next = 0;

// One question at a time, a second between them, none while nobody looks.
async function watch() {
  clearTimeout(next);
  if (asking || document.hidden) return;
  asking = true;
  const live = await ask().catch(() => null);
  asking = false;
  if (live) show(live);
  else showUnreachable();
  next = setTimeout(watch, EVERY_MS);
}

document.addEventListener("visibilitychange", watch);
watch();
