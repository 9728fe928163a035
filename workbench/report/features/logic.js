"use strict";
/* What the page computes, without touching the document: search, order, visible rows, addresses, numbers. */
const logic = (() => {
  const TEXT_FIELDS = ["explanation", "flag", "token", "promoted", "suppressed", "reads"];
  const TERM = /(-?)(?:([A-Za-z_][\w.-]*)(>=|<=|[:=<>]))?(?:"((?:\\"|[^"])*)(?:"|$)|(\S+))/g;
  const NUMBER = /^[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?$/i;

  /* "-flag:dead output_score>0.01 dog" as terms; a term that is still being typed ("output_score>") is left out. */
  function parseQuery(text) {
    const terms = [];
    for (const [, minus, field, op, quoted, bare] of text.matchAll(TERM)) {
      const value = quoted === undefined ? bare : quoted.replaceAll('\\"', '"');
      if (field === undefined && quoted === undefined && /^[A-Za-z_][\w.-]*(>=|<=|[:=<>])$/.test(bare)) continue;
      if (value === "") continue;
      terms.push({ negated: minus === "-", field: field || null, op: op || null, value, quoted: quoted !== undefined });
    }
    return terms;
  }

  /* The rows that a query keeps, or why it can't be read. */
  function search(index, text) {
    const tests = [];
    for (const term of parseQuery(text)) {
      const made = testOf(index, term);
      if (typeof made === "string") return { rows: [], error: made };
      tests.push(term.negated ? (row) => !made(row) : made);
    }
    const rows = [];
    for (let row = 0; row < index.feature.length; row++) if (tests.every((test) => test(row))) rows.push(row);
    return { rows, error: null };
  }

  function testOf(index, term) {
    const { field, op, value } = term;
    if (field === null) return freeTest(index, term);
    if (field in index.values) return numberTest(index.values[field], field, op, value);
    if (!TEXT_FIELDS.includes(field)) {
      const known = [...Object.keys(index.values), ...TEXT_FIELDS].join(", ");
      return `There is no field “${field}”. Fields: ${known}. Put text with a sign like “${op}” in quotes.`;
    }
    if (op !== ":" && op !== "=") return `“${field}” is text. Use ${field}:word, or ${field}="word" for the whole of it.`;
    const found = matcher(value, op === "=");
    if (field === "explanation") return (row) => found(index.explanation[row]);
    if (field === "flag") return (row) => index.flags[row].some((flag) => found(op === "=" ? flagName(flag) : flag));
    const lists = field === "token" ? ["promoted", "suppressed", "reads"] : [field];
    return tokenTest(index, lists, found);
  }

  function freeTest(index, { value, quoted }) {
    const number = quoted ? null : /^#?(\d+)$/.exec(value);
    const isNumber = number === null ? () => false : (row) => index.feature[row] === Number(number[1]);
    if (number !== null && value.startsWith("#")) return isNumber;
    const found = matcher(value, false);
    const token = tokenTest(index, ["promoted", "suppressed", "reads"], found);
    return (row) =>
      isNumber(row) || found(index.explanation[row]) || index.flags[row].some(found) || token(row);
  }

  function tokenTest(index, lists, found) {
    const hit = Uint8Array.from(index.strings, (text) => (found(text) ? 1 : 0));
    return (row) => lists.some((name) => index[name][row].some((id) => hit[id] === 1));
  }

  function matcher(value, exact) {
    const wanted = value.toLowerCase();
    return exact ? (text) => text.toLowerCase() === wanted : (text) => text.toLowerCase().includes(wanted);
  }

  function numberTest(values, field, op, text) {
    if ((op === ":" || op === "=") && text === "none") return (row) => values[row] === null;
    const range = text.split("..");
    if ((op === ":" || op === "=") && range.length === 2 && range.every((end) => end === "" || NUMBER.test(end))) {
      const low = range[0] === "" ? -Infinity : Number(range[0]);
      const high = range[1] === "" ? Infinity : Number(range[1]);
      return (row) => values[row] !== null && values[row] >= low && values[row] <= high;
    }
    if (!NUMBER.test(text)) {
      return `“${text}” is no number. Use ${field}>0.01, ${field}:0.1..0.5, or ${field}:none where it was not measured.`;
    }
    const bound = Number(text);
    const holds = {
      ">": (x) => x > bound, ">=": (x) => x >= bound, "<": (x) => x < bound, "<=": (x) => x <= bound,
      ":": (x) => x === bound, "=": (x) => x === bound,
    }[op];
    return (row) => values[row] !== null && holds(values[row]);
  }

  /* Sorted copy; rows without a value come last both ways, equal ones by feature number. */
  function sortRows(rows, values, descending, feature) {
    const sign = descending ? -1 : 1;
    return [...rows].sort((a, b) => {
      const x = values[a], y = values[b];
      if (x === null || y === null) return (x === null) - (y === null) || feature[a] - feature[b];
      return (x < y ? -sign : x > y ? sign : 0) || feature[a] - feature[b];
    });
  }

  /* First row to draw and the one after the last. */
  function visibleRange(scrollTop, height, rowHeight, n, extra) {
    const first = Math.max(0, Math.min(n - 1, Math.floor(scrollTop / rowHeight)) - extra);
    return [first, Math.max(first, Math.min(n, Math.ceil((scrollTop + height) / rowHeight) + extra))];
  }

  /* Where to scroll so that a row is wholly inside; as little as possible. */
  function scrollFor(place, scrollTop, height, rowHeight) {
    if (place * rowHeight < scrollTop) return place * rowHeight;
    return Math.max(scrollTop, (place + 1) * rowHeight - height);
  }

  /* Which row a key goes to; null for keys that do not move. */
  function moveTo(key, place, n, page) {
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity }[key];
    if (step === undefined || n === 0) return null;
    if (place < 0) return step < 0 && key !== "Home" ? n - 1 : key === "End" ? n - 1 : 0;
    return Math.max(0, Math.min(n - 1, place + step));
  }

  function parseHash(hash) {
    const given = new URLSearchParams(hash.replace(/^#/, ""));
    const feature = given.get("feature");
    return {
      feature: feature !== null && /^\d+$/.test(feature) ? Number(feature) : null,
      query: given.get("q"),
      sort: given.get("sort"),
    };
  }

  function buildHash({ feature, query, sort }) {
    const parts = new URLSearchParams();
    if (feature !== null) parts.set("feature", String(feature));
    if (query) parts.set("q", query);
    if (sort) parts.set("sort", sort);
    return "#" + parts.toString();
  }

  /* Three significant digits; whole numbers with all of theirs; null is "not measured". */
  function num(x) {
    if (x === null || x === undefined) return "not measured";
    if (typeof x === "object" || !Number.isFinite(x)) return x.$float === "-inf" || x === -Infinity ? "−∞" : "∞";
    const size = Math.abs(x);
    if (0 < size && size < 1e-7) return x > 0 ? "<1e-7" : ">−1e-7";
    const rounded = Number(size.toPrecision(3));
    let shown;
    if (Number.isInteger(x) && size < 1e9) shown = size >= 1e5 ? group(String(size)) : String(size);
    else if (size >= 1e9 || (0 < size && size < 1e-4)) shown = rounded.toExponential().replace("e+", "e");
    else shown = group(rounded.toFixed(Math.max(0, 2 - Math.floor(Math.log10(rounded)))));
    return (x < 0 ? "−" : "") + shown;
  }

  /* The same for a measured quantity: 3.00 beside 2.80. */
  const real = (x) => (Number.isInteger(x) && x !== 0 && Math.abs(x) < 100 ? num(x < 0 ? x - 1e-12 : x + 1e-12) : num(x));

  const group = (digits) => digits.replace(/^\d+/, (whole) => whole.replace(/\B(?=(\d{3})+$)/g, ","));

  function percent(x) {
    return x === null ? "not measured" : x > 0 && x < 1e-5 ? `${num(1e6 * x)} in a million` : `${num(100 * x)}%`;
  }

  const flagName = (flag) => flag.split(":", 1)[0].trim();

  /* Whether bins span so much that only a logarithmic axis shows them all. */
  const isWide = (bins) => bins.length > 0 && bins[0][0] > 0 && bins[bins.length - 1][1] > 20 * bins[0][0];

  /* Bars of a histogram in a box of given size; heights by log(1 + tokens), because counts fall off steeply. */
  function bars(all, width, height) {
    const bins = all.filter((bin) => bin.every(Number.isFinite));
    if (bins.length === 0) return [];
    const scale = isWide(bins) ? Math.log : (edge) => edge;
    const low = scale(bins[0][0]), span = scale(bins[bins.length - 1][1]) - low || 1;
    const top = Math.max(...bins.map((bin) => Math.log1p(bin[2]))) || 1;
    return bins.map(([from, to, n]) => {
      const h = (height * Math.log1p(n)) / top, x = (width * (scale(from) - low)) / span;
      return { x, y: height - h, width: Math.max(0.5, (width * (scale(to) - scale(from))) / span - 1), height: h, from, to, n };
    });
  }

  /* A packed window: [stratum, row, document, peak, token ids, place value place value ..., left-out places]. */
  function unpackWindow(packed, strings) {
    const [stratum, row, document, peak, ids, active, left] = packed;
    const tokens = ids.map((id) => ({ text: strings[id], value: 0 }));
    for (let i = 0; i < active.length; i += 2) tokens[active[i]].value = active[i + 1];
    for (const place of left) tokens[place].value = null;
    return { stratum: strings[stratum], row, document, peak, tokens };
  }

  return {
    parseQuery, search, sortRows, visibleRange, scrollFor, moveTo, parseHash, buildHash, num, real, percent, flagName, bars, isWide,
    unpackWindow, TEXT_FIELDS,
  };
})();
if (typeof module !== "undefined") module.exports = logic;
