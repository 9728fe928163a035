/* What the playground computes, without touching the document: events, progress, colours, means, words. */
const play = (() => {
  const TITLES = { unsteered: "Unsteered", steered: "With the edits", control: "Control: random direction" };
  const SHORT = { unsteered: "unsteered", steered: "with the edits", control: "random direction" };
  const UNITS = { steer: "× a_max", clamp: "activation", scale: "× activation", ablate: "" };
  const DEFAULTS = { steer: 2, clamp: 10, scale: 2, ablate: 0 };
  const SURPRISE = 8, CHANGE = 4;

  /* Whole lines of a stream as events, and the piece that is left. */
  function readLines(text) {
    const parts = text.split("\n");
    return { events: parts.slice(0, -1).filter((line) => line !== "").map((line) => JSON.parse(line)), rest: parts[parts.length - 1] };
  }

  const begin = () => ({ phase: "waiting", ahead: 0, texts: [], of: 1, result: null, message: "" });

  /* What is known after one more event. */
  function after(state, event) {
    switch (event.kind) {
      case "waiting": return { ...state, phase: "waiting", ahead: event.ahead };
      case "writing": return { ...state, phase: "writing", of: event.of, texts: [...state.texts, { arm: event.arm, tokens: [] }] };
      case "token": return { ...state, texts: state.texts.map((t) => (t.arm === event.arm ? { ...t, tokens: [...t.tokens, event.text] } : t)) };
      case "measuring": return { ...state, phase: "measuring" };
      case "done": return { ...state, phase: "done", result: event.result };
      case "stopped": return { ...state, phase: "stopped" };
      case "error": return { ...state, phase: "error", message: event.message };
      default: return state;
    }
  }

  const isOver = (state) => ["done", "stopped", "error"].includes(state.phase);

  /* Share of the work that is done; measuring is counted as one more text. */
  function progress(state, maxNewTokens) {
    if (isOver(state)) return 1;
    if (state.phase === "measuring") return state.of / (state.of + 1);
    const finished = Math.max(0, state.texts.length - 1);
    const last = state.texts.length ? Math.min(1, state.texts[finished].tokens.length / maxNewTokens) : 0;
    return (finished + last) / (state.of + 1);
  }

  function says(state) {
    if (state.phase === "waiting") return state.ahead ? `waiting for ${state.ahead} other run${state.ahead > 1 ? "s" : ""}` : "starting";
    if (state.phase === "writing") {
      const { arm, tokens } = state.texts[state.texts.length - 1];
      return `writing ${SHORT[arm]}: ${tokens.length} tokens`;
    }
    if (state.phase === "measuring") return "measuring every text under every model";
    return { stopped: "stopped; what was written is kept, not measured", done: "", error: "" }[state.phase];
  }

  /* The ways to colour the tokens that make sense for these texts. */
  function colours(rows) {
    const models = rows.length ? Object.keys(rows[0].logprobs) : [];
    const change = models.filter((name) => name !== "unsteered").map((name) => [`change:${name}`, `log-probability: ${SHORT[name]} minus unsteered`]);
    const kl = models.filter((name) => name !== "unsteered").map((name) => [`kl:${name}`, `KL: ${SHORT[name]} from unsteered`]);
    const plain = models.map((name) => [`surprise:${name}`, `surprise under ${name === "unsteered" ? "the unsteered model" : SHORT[name]}`]);
    return [...change, ...kl, ...plain, ["none", "none"]];
  }

  function legend(mode) {
    const [kind, name] = mode.split(":");
    if (kind === "change") return `orange: likelier ${SHORT[name]} · blue: less likely · full colour at ${CHANGE} nats`;
    if (kind === "kl") return "orange: by divergence, relative to the largest shown";
    if (kind === "surprise") return `orange: the less likely, the stronger; full colour at ${SURPRISE} nats`;
    return "";
  }

  /* The largest divergence of a model on any of the texts; what colours are relative to, so that texts compare. */
  function largestKl(rows, name) {
    return rows.reduce((most, row) => (row.kl[name] || []).reduce((a, b) => Math.max(a, b), most), 0);
  }

  /* Colour of one token: warm or cool, and how strong from 0 to 100. */
  function shade(row, i, mode, largest) {
    const [kind, name] = mode.split(":");
    if (kind === "change") {
      const change = row.logprobs[name][i] - row.logprobs.unsteered[i];
      return { tone: change < 0 ? "cool" : "warm", share: Math.round(100 * Math.min(1, Math.abs(change) / CHANGE)) };
    }
    if (kind === "kl") return { tone: "warm", share: largest > 0 ? Math.round((100 * row.kl[name][i]) / largest) : 0 };
    if (kind === "surprise") return { tone: "warm", share: Math.round(100 * Math.min(1, -row.logprobs[name][i] / SURPRISE)) };
    return { tone: "", share: 0 };
  }

  /* What is said about one token; a line each. */
  function tip(row, i, num) {
    const lines = [`token ${i + 1}${row.lens[i] ? ", a lens token" : ""}`];
    for (const [name, values] of Object.entries(row.logprobs)) {
      const kl = row.kl[name] ? `, KL ${num(row.kl[name][i])}` : "";
      lines.push(`${SHORT[name]}: log-probability ${num(values[i])} (${num(100 * Math.exp(values[i]))}%)${kl}`);
    }
    return lines.join("\n");
  }

  const mean = (values) => (values && values.length ? values.reduce((a, b) => a + b, 0) / values.length : null);

  /* Mean log-probability and divergence of a text under each model. */
  function means(row) {
    return Object.keys(row.logprobs).map((name) => ({ name, logprob: mean(row.logprobs[name]), kl: name in row.kl ? mean(row.kl[name]) : null }));
  }

  /* Bars of two series side by side, by position. */
  function klBars(row, width, height) {
    const series = Object.keys(row.kl).map((name) => [name, row.kl[name]]);
    const most = Math.max(0, ...series.flatMap(([, values]) => values)), n = row.tokens.length;
    if (most === 0 || n === 0) return { most: 0, bars: [] };
    const slot = width / n, wide = Math.max(0.5, (slot - Math.min(1.5, slot / 4)) / series.length);
    const bars = series.flatMap(([name, values], s) => values.map((value, i) => ({
      name, i, value, x: i * slot + s * wide, width: wide, y: height * (1 - value / most), height: (height * value) / most,
    })));
    return { most, bars };
  }

  /* Features that fit a search, best first: by output score, or by how early a promoted token holds the word. */
  function hits(index, text, dSae, search) {
    const number = /^\s*#?(\d+)\s*$/.exec(text);
    const bare = number !== null && Number(number[1]) < dSae ? Number(number[1]) : null;
    const found = index === null ? { rows: [], error: null } : search(index, text);
    if (found.error !== null) return { features: [], error: found.error };
    const rows = index === null ? [] : ranked(index, found.rows, text);
    const features = rows.map((row) => index.feature[row]);
    if (bare !== null) return { features: [bare, ...features.filter((feature) => feature !== bare)], error: null };
    if (index === null && text.trim() !== "") return { features: [], error: "Nothing is known of these features, so they are found by number only. Start with --features FOLDER to search." };
    return { features, error: null };
  }

  function ranked(index, rows, text) {
    const scores = index.values.output_score;
    const word = /[^\s"-][^\s"]*/.exec(text);
    const place = (row) => {
      const at = word === null ? -1 : index.promoted[row].findIndex((id) => index.strings[id].toLowerCase().includes(word[0].toLowerCase()));
      return at < 0 ? Infinity : at;
    };
    const score = (row) => (scores && typeof scores[row] === "number" ? scores[row] : -Infinity);
    const key = new Map(rows.map((row) => [row, [score(row), place(row)]]));
    return [...rows].sort((a, b) => {
      const [x, p] = key.get(a), [y, q] = key.get(b);
      if (x !== y) return x < y ? 1 : -1;
      if (p !== q) return p < q ? -1 : 1;
      return index.feature[a] - index.feature[b];
    });
  }

  /* Why a row is a hit: each field that a term of the search was found in, with the text and the word; values of numbers. */
  function why(index, row, text, logic) {
    const found = [];
    for (const { negated, field, op, value, quoted } of logic.parseQuery(text)) {
      if (negated) continue;
      if (field in index.values) found.push({ field, text: index.values[field][row], word: null });
      else found.push(...textsOf(index, row, field, value, quoted, op === "=" ? logic.flagName : (flag) => flag).filter((one) => fits(one.text, value, op)).map((one) => ({ ...one, word: value })));
    }
    return found.filter((one, i) => found.findIndex((other) => other.field === one.field && other.text === one.text) === i);
  }

  const LISTS = ["promoted", "suppressed", "reads"];
  const fits = (text, value, op) => (op === "=" ? text.toLowerCase() === value.toLowerCase() : text.toLowerCase().includes(value.toLowerCase()));

  /* The texts that a term looks at; those of a number alone, such as #12, are none. */
  function textsOf(index, row, field, value, quoted, flagText) {
    if (field === null && !quoted && /^#\d+$/.test(value)) return [];
    const wanted = field === null ? ["explanation", "flag", ...LISTS] : field === "token" ? LISTS : [field];
    return wanted.flatMap((name) => {
      if (name === "explanation") return [{ field: name, text: index.explanation[row] }];
      if (name === "flag") return index.flags[row].map((flag) => ({ field: name, text: flagText(flag) }));
      return index[name][row].map((id) => ({ field: name, text: index.strings[id] }));
    });
  }

  /* A text before, at and after the first place of a word; whole where its letters change length in lower case. */
  function pieces(text, word) {
    const low = text.toLowerCase();
    const at = word === null || low.length !== text.length ? -1 : low.indexOf(word.toLowerCase());
    return at < 0 ? [text, "", ""] : [text.slice(0, at), text.slice(at, at + word.length), text.slice(at + word.length)];
  }

  /* The features to begin with, and by what they were chosen: output score, or else how often they are active. */
  function suggested(index, taken, n) {
    const by = index === null ? undefined : ["output_score", "frequency"].find((name) => (index.values[name] || []).some((x) => x !== null));
    if (by === undefined) return { features: [], by: null };
    const values = index.values[by], isDead = (row) => index.flags[row].some((flag) => flag.startsWith("dead"));
    const rows = index.feature.map((_, row) => row).filter((row) => values[row] !== null && !isDead(row) && index.values.frequency?.[row] !== 0 && !taken.includes(index.feature[row]));
    rows.sort((a, b) => values[b] - values[a] || index.feature[a] - index.feature[b]);
    return { features: rows.slice(0, n).map((row) => index.feature[row]), by };
  }

  return {
    why, pieces, suggested, TITLES, SHORT, UNITS, DEFAULTS, readLines, begin, after, isOver, progress, says, colours, legend, largestKl, shade, tip, means, klBars, hits,
  };
})();
if (typeof module !== "undefined") module.exports = play;
