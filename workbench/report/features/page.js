/* The page itself. Text from the data only ever becomes text nodes and attributes, never markup. */
(() => {
  const { num, real, percent } = logic;
  const { $, el, svg, chip, missing, showTip, hideTip } = dom;
  const index = JSON.parse($("index").textContent);
  const packed = [...document.querySelectorAll("script.chunk")];
  const rowOf = new Map(index.feature.map((feature, row) => [feature, row]));
  const about = new Map(index.columns.map((column) => [column.name, column]));
  const numeric = index.columns.filter(({ name, kind }) => name !== "feature" && (kind === "number" || kind === "test"));
  const narrow = matchMedia("(max-width: 60rem)");
  const state = { feature: null, query: "", sort: "feature", rows: [], at: -1 };
  const drawn = new Map();

  for (const [name, values] of Object.entries(index.values)) {
    index.values[name] = values.map((x) => (x === null || typeof x === "number" ? x : x.$float === "inf" ? Infinity : -Infinity));
  }

  const lacking = (text) => el("p", { class: "na", text });

  /* ---------------------------------------------------------------- table */

  function sorting() {
    const descending = state.sort.startsWith("-");
    return { name: descending ? state.sort.slice(1) : state.sort, descending };
  }

  const firstToken = (row) => (index.promoted[row].length ? index.strings[index.promoted[row][0]].toLowerCase() : null);
  const textColumns = {
    explanation: { label: "What it reads", values: index.explanation.map((text) => (text === "" ? null : text.toLowerCase())) },
    promoted: { label: "What it promotes", values: index.feature.map((_, row) => firstToken(row)) },
  };
  const sortValues = (name) => (name in index.values ? index.values[name] : textColumns[name].values);
  const isColumn = (name) => name in index.values || name in textColumns;

  function refresh(keep) {
    const found = logic.search(index, state.query);
    const { name, descending } = sorting();
    const stay = keep && state.at >= 0 ? state.rows[state.at] : undefined;
    state.rows = logic.sortRows(found.rows, sortValues(name), descending, index.feature);
    state.at = stay === undefined ? -1 : state.rows.indexOf(stay);
    const n = state.rows.length, all = index.feature.length;
    $("found").textContent = found.error || (n === all ? `${num(all)} features` : `${num(n)} of ${num(all)} features`);
    $("found").classList.toggle("wrong", found.error !== null);
    $("grid").setAttribute("aria-rowcount", String(n + 1));
    $("rows").style.height = `calc(${Math.max(n, 1)} * var(--row))`;
    for (const row of drawn.values()) row.remove();
    drawn.clear();
    if (!keep) $("grid").scrollTop = 0;
    drawHead();
    draw();
  }

  function drawHead() {
    const { name, descending } = sorting();
    const column = (key, title, means, kind) => {
      const sorted = key === name ? (descending ? "descending" : "ascending") : "none";
      const button = el("button", { type: "button", text: title, title: means, tabindex: "-1", on: { click: () => sortBy(key) } });
      return el("div", { role: "columnheader", class: kind, "aria-sort": sorted }, button);
    };
    const key = keyColumn();
    $("head").replaceChildren(el("div", { role: "row", class: "row", "aria-rowindex": "1" },
      column("feature", "#", about.get("feature").meaning, "id"),
      column("explanation", textColumns.explanation.label, "The explanation, or the tokens at the peaks of its contexts.", "reads"),
      column("promoted", textColumns.promoted.label, "Tokens that it makes likelier, through the final norm.", "writes"),
      ...numeric.map((c) => column(c.name, c.label, c.meaning, c.name === key ? "num key" : "num"))));
    $("sort").value = name;
    $("direction").textContent = descending ? "↓" : "↑";
    $("direction").setAttribute("aria-label", descending ? "Descending; change to ascending" : "Ascending; change to descending");
  }

  /* The one number that a narrow table shows: what it is sorted by, or else the first score. */
  function keyColumn() {
    const { name } = sorting();
    if (numeric.some((column) => column.name === name)) return name;
    return (numeric.find((column) => column.name === "output_score") || numeric[0]).name;
  }

  function sortBy(key) {
    const { name, descending } = sorting();
    const first = key in index.values && key !== "feature" ? "-" : "";
    state.sort = key === name ? (descending ? key : `-${key}`) : first + key;
    refresh(true);
    remember();
  }

  const rowHeight = () => parseFloat(getComputedStyle($("grid")).getPropertyValue("--row"));
  const bodyHeight = () => $("grid").clientHeight - $("head").offsetHeight;

  function draw() {
    const [first, last] = logic.visibleRange($("grid").scrollTop, bodyHeight(), rowHeight(), state.rows.length, 8);
    for (const [place, row] of drawn) if (place < first || place >= last) { row.remove(); drawn.delete(place); }
    const height = rowHeight(), key = keyColumn();
    for (let place = first; place < last; place++) if (!drawn.has(place)) {
      const row = drawRow(place, key);
      row.style.transform = `translateY(${place * height}px)`;
      drawn.set(place, row);
      $("rows").append(row);
    }
    if (state.rows.length === 0 && !$("rows").querySelector(".none")) {
      $("rows").append(el("div", { class: "none", text: "No feature fits this search." }));
    } else if (state.rows.length) $("rows").querySelector(".none")?.remove();
    mark();
  }

  function drawRow(place, key) {
    const row = state.rows[place];
    const cell = (kind, ...children) => el("div", { role: "gridcell", class: kind }, ...children);
    const flags = index.flags[row].map((flag) => el("span", { class: "flag", text: logic.flagName(flag), title: flag }));
    const chips = (ids, n) => ids.slice(0, n).map((id) => chip(index.strings[id]));
    const reads = index.explanation[row] !== "" && (index.holds[row] || !index.reads[row].length) ? [el("span", { class: "said", text: index.explanation[row] })]
      : index.reads[row].length ? chips(index.reads[row], 6) : [missing("not explained")];
    const writes = index.promoted[row].length ? chips(index.promoted[row], 6) : [missing("promoted tokens not measured")];
    return el("div", {
      role: "row", class: "row", id: `row-${row}`, "aria-rowindex": String(place + 2),
      on: { click: () => { state.at = place; open(index.feature[row]); } },
    },
      cell("id", String(index.feature[row])), cell("reads", ...flags, ...reads), cell("writes", ...writes),
      ...numeric.map(({ name, label }) => {
        const value = index.values[name][row];
        const made = cell(name === key ? "num key" : "num", value === null ? missing() : real(value));
        made.title = label;
        return made;
      }));
  }

  function mark() {
    const shown = state.feature === null ? undefined : rowOf.get(state.feature);
    for (const [place, row] of drawn) {
      row.classList.toggle("at", place === state.at);
      row.setAttribute("aria-selected", String(state.rows[place] === shown));
    }
    const active = drawn.get(state.at);
    if (active) $("grid").setAttribute("aria-activedescendant", active.id);
    else $("grid").removeAttribute("aria-activedescendant");
  }

  function goTo(place) {
    state.at = place;
    $("grid").scrollTop = logic.scrollFor(place, $("grid").scrollTop, bodyHeight(), rowHeight());
    draw();
  }

  /* ----------------------------------------------------------------- card */

  const unpacked = new Map();

  /* The cards of one chunk; the last few stay unpacked. */
  async function chunk(number) {
    if (!unpacked.has(number)) {
      if (unpacked.size >= 8) unpacked.delete(unpacked.keys().next().value);
      const bytes = Uint8Array.from(atob(JSON.parse(packed[number].textContent)), (char) => char.charCodeAt(0));
      const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
      unpacked.set(number, new Response(plain).json());
    }
    return unpacked.get(number);
  }

  function open(feature, focus = true) {
    state.feature = feature;
    remember();
    show(focus);
  }

  function close() {
    state.feature = null;
    remember();
    show(false);
    $("grid").focus({ preventScroll: true });
  }

  async function show(focus) {
    const feature = state.feature;
    layout();
    document.title = feature === null ? $("main").dataset.title : `Feature ${feature} · ${$("main").dataset.title}`;
    hideTip();
    if (feature === null) return void $("panel").replaceChildren();
    const row = rowOf.get(feature);
    state.at = state.rows.indexOf(row);
    if (state.at >= 0) goTo(state.at);
    const title = el("h2", { tabindex: "-1", text: `Feature ${feature}` });
    const body = el("div", {});
    $("panel").replaceChildren(el("article", { class: "wb-card" }, steps(title), body));
    $("panel").scrollTop = 0;
    if (focus) title.focus({ preventScroll: true });
    if (row === undefined) return void body.append(lacking(`Feature ${feature} is not on this page.`));
    $("panel").setAttribute("aria-busy", "true");
    const cards = await chunk(Math.floor(row / index.chunk));
    if (state.feature !== feature) return;
    body.append(...cardBody(row, cards[row % index.chunk]));
    $("panel").removeAttribute("aria-busy");
  }

  function step(by) {
    const place = state.at < 0 ? 0 : state.at + by;
    if (place >= 0 && place < state.rows.length) open(index.feature[state.rows[place]]);
  }

  function steps(title) {
    const button = (text, label, key, enabled, click) => {
      const made = el("button", { type: "button", text, "aria-label": label, title: `${label} (${key})`, on: { click } });
      made.disabled = !enabled;
      return made;
    };
    return el("div", { class: "bar-top" }, title, el("div", { class: "steps" },
      button("←", "Previous feature in the list", "left arrow", state.at > 0, () => step(-1)),
      button("→", "Next feature in the list", "right arrow", state.at >= 0 && state.at < state.rows.length - 1, () => step(1)),
      button("✕", "Close the card", "Escape", true, close)));
  }

  function cardBody(row, card) {
    return [
      ...flagLines(index.flags[row]), headline(row, card.explanation), contextPart(card), tokenPart(card),
      explanationPart(card.explanation), scorePart(row, card.tokens), histogramPart(card.histogram), neighbourPart(card.neighbours), steeringPart(card.steering),
    ].filter((part) => part !== null);
  }

  function flagLines(flags) {
    return flags.map((flag) => el("p", {}, el("span", { class: "flag", text: logic.flagName(flag) }),
      el("span", { class: "muted", text: flag.slice(flag.indexOf(":") + 1 || flag.length).trim() })));
  }

  function part(title, ...children) {
    return el("section", {}, el("h3", { text: title }), ...children);
  }

  function table(columns, rows, kind = "") {
    const head = columns.map(([text, kind]) => el("th", { scope: "col", class: kind, text }));
    return el("div", { class: "scroll" }, el("table", { class: kind }, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows)));
  }

  function estimate(given) {
    if (given === null) return missing();
    const range = ` [${real(given.low)}, ${real(given.high)}] n\u00a0=\u00a0${num(given.n)} ${given.unit}`;
    const title = `${num(100 * given.level)}% interval, ${given.method}`;
    return el("span", { title }, el("b", { text: real(given.value) }), el("small", { text: range }));
  }

  // The explanation where its tests say that it holds, else the tokens at the peaks, which nobody has to believe.
  function headline(row, given) {
    if (given !== null && given.holds) return part("What it reads", el("p", { class: "says", text: given.text }));
    const peaks = index.reads[row].map((place) => chip(index.strings[place]));
    if (!peaks.length) return null;
    return part("What it reads", el("p", { class: "says" }, ...peaks.flatMap((one) => [one, " "])),
      el("p", { class: "muted", text: "The tokens at the peaks of its contexts." }));
  }

  function explanationPart(given) {
    if (given === null) return part("Explanation", lacking("No explanation was made for this feature."));
    const columns = [["test", ""], ...given.arms.map((name, i) => [i ? `control: ${name}` : name, ""])];
    const rows = given.tests.map((test) => el("tr", {}, el("th", { scope: "row", text: test.label }, el("small", { text: test.meaning })),
      ...test.arms.map((arm, i) => el("td", { "data-label": columns[i + 1][0] }, estimate(arm),
        i === 0 && test.verdict ? el("small", { class: "verdict", text: test.verdict }) : null))));
    const source = `Explained by: ${given.method}. Tested on ${num(given.windows)} held-out windows.`;
    const untested = lacking("The explanation was not tested, so nothing says that it is right.");
    const text = given.holds ? null : el("p", { text: given.text });
    if (!rows.length) return part("Explanation", text, el("p", { class: "muted", text: `Explained by: ${given.method}.` }), untested);
    return part("Explanation", text, el("details", {}, el("summary", {}, "Tests ", el("span", { class: "flag", text: given.badge })),
      el("p", { class: "muted", text: source }), table(columns, rows, "stacks")));
  }

  function scorePart(row, tokens) {
    const names = index.columns.filter(({ name, kind }) => name !== "feature" && kind === "number").map(({ name }) => name);
    const value = (name) => (name === "frequency" ? percent(index.values[name][row]) : real(index.values[name][row]));
    const rows = names.map((name) => el("tr", {}, el("th", { scope: "row", text: about.get(name).label }),
      el("td", { class: "num" }, index.values[name][row] === null ? missing() : value(name)),
      el("td", { class: "means", text: about.get(name).meaning })));
    const read = tokens ? `${num(tokens)} tokens were read.` : "No tokens were read.";
    return part("Numbers", table([["measure", ""], ["value", "num"], ["meaning", ""]], rows), el("p", { class: "muted", text: read }));
  }

  function tokenPart(card) {
    const list = (tokens, kind) => {
      const most = Math.max(...tokens.map(([, , logit]) => Math.abs(logit || 0))) || 1;
      if (tokens.every(([, , logit]) => logit === null)) {
        return el("p", {}, ...tokens.flatMap(([place]) => [chip(index.strings[place]), " "]));
      }
      return el("ul", { class: `lens ${kind}` }, ...tokens.map(([place, id, logit]) => el("li", { title: `token ${id}` },
        el("span", {}, chip(index.strings[place])),
        el("span", { class: "bar", "aria-hidden": "true" }, el("span", { vars: { "--v": (100 * Math.abs(logit || 0)) / most } })),
        el("span", { class: "num" }, logit === null ? el("span", { class: "na", text: "n/a", title: "not measured" }) : real(logit)))));
    };
    const side = (title, tokens, kind) => el("div", {}, el("h4", { text: title }), tokens.length ? list(tokens, kind) : lacking("not measured"));
    return part("What it writes: tokens by logit, through the final norm", el("div", { class: "pair" },
      side("Promoted", card.promoted, "up"), side("Suppressed", card.suppressed, "down")));
  }

  function contextPart(card) {
    if (card.windows.length === 0) return part("Contexts", lacking("No context was collected."));
    const lists = [];
    const deciles = [];
    const largest = Math.max(...card.windows.map((given) => given[5].reduce((most, x, i) => (i % 2 ? Math.max(most, x) : most), 0))) || 1;
    let stratum = null;
    let group = lists;
    const others = card.windows.filter((given) => index.strings[given[0]] !== "top").length;
    const folds = others < card.windows.length;
    for (const given of card.windows) {
      const window_ = logic.unpackWindow(given, index.strings);
      if (window_.stratum !== stratum) {
        stratum = window_.stratum;
        group = stratum === "top" || !folds ? lists : deciles;
        group.push(el("h4", { text: stratum === "top" ? "Strongest" : stratum[0].toUpperCase() + stratum.slice(1) }), el("ul", { class: "windows" }));
      }
      group[group.length - 1].append(contextLine(window_, largest));
    }
    const first = lists.map((list) => list.querySelector("mark")).find((found) => found);
    const more = `By decile of the activation: ${num(others)} more context${others === 1 ? "" : "s"}`;
    const fold = deciles.length ? el("details", {}, el("summary", { text: more }), ...deciles) : null;
    if (first) first.tabIndex = 0;
    const rest = card.windows_left ? lacking(`${num(card.windows_left)} more contexts were left out of this page.`) : null;
    return part("Contexts", el("p", { class: "muted", text: "Point at a token, or tap it, for its activation. Dotted: no activation was recorded." }), ...lists, fold, rest);
  }

  function contextLine(window_, largest) {
    const peak = window_.tokens[window_.peak].value;
    const tokens = window_.tokens.map(({ text, value }, place) => {
      const top = place === window_.peak;
      if (value === null && !top) return el("span", { class: "left", "data-tip": "no activation was recorded here", text });
      if (value === 0) return el("span", { "data-tip": "silent (0)", text });
      const share = value === null ? 50 : Math.max(0, Math.min(100, (100 * value) / largest));
      const tip = value === null ? "peak; its activation was not recorded" : `${real(value)}, ${share.toFixed(0)}% of the largest shown`;
      return el("mark", { class: top ? "most" : "", tabindex: "-1", vars: { "--v": share.toFixed(0) }, "data-tip": tip },
        text, el("span", { class: "sr", text: ` (${real(value)}) ` }));
    });
    // A line end is shown by its sign and may then end the line.
    const pieces = tokens.flatMap((token, i) => (window_.tokens[i].text.includes("⏎") ? [token, el("wbr")] : [token]));
    const where = window_.row < 0 ? "" : `; document ${window_.document}, row ${window_.row}`;
    return el("li", {}, el("span", { class: "peak", title: `peak${where}`, text: peak === null ? "n/a" : real(peak) }), el("div", { class: "text" }, ...pieces));
  }

  function histogramPart(bins) {
    if (bins.length === 0) return part("Activations", lacking("The distribution of activations was not measured."));
    const [width, height] = [560, 130];
    const shown = logic.bars(bins, width, height);
    const total = bins.reduce((sum, bin) => sum + bin[2], 0);
    const say = `Histogram of ${num(total)} positive activations from ${num(bins[0][0])} to ${num(bins[bins.length - 1][1])}`;
    const rects = shown.map((bar) => {
      const tip = `${num(bar.from)} to ${num(bar.to)}: ${num(bar.n)} tokens`;
      return svg("rect", { x: bar.x, y: bar.y, width: bar.width, height: bar.height, "data-tip": tip });
    });
    const label = (x, anchor, text) => { const made = svg("text", { x, y: height + 16, "text-anchor": anchor }); made.textContent = text; return made; };
    const drawing = svg("svg", { viewBox: `0 0 ${width} ${height + 22}`, role: "img", "aria-label": say }, ...rects,
      svg("line", { x1: 0, x2: width, y1: height, y2: height }), label(0, "start", num(bins[0][0])), label(width, "end", num(bins[bins.length - 1][1])));
    return part("Activations", el("figure", {}, drawing, el("p", { class: "muted", text: `${say}; heights by log(1 + tokens)${logic.isWide(bins) ? ", widths by log too" : ""}.` })));
  }

  function neighbourPart(list) {
    if (list.length === 0) return part("Neighbours", lacking("Neighbours were not measured."));
    const rows = list.map(([feature, kind, value, jaccard, zero]) => {
      const known = rowOf.get(feature);
      const link = known === undefined ? el("span", { text: `${feature} (not on this page)` })
        : el("a", { href: `#feature=${feature}`, text: String(feature), on: { click: (event) => { event.preventDefault(); open(feature); } } });
      const hint = known === undefined ? "" : index.explanation[known];
      const tokens = known === undefined || hint !== "" ? [] : index.promoted[known].slice(0, 3).map((id) => chip(index.strings[id]));
      const verdict = value === null || zero === null ? "" : value > zero ? ": above" : ": no more than random";
      return el("tr", {}, el("th", { scope: "row" }, link, el("small", {}, hint.slice(0, 80), ...tokens)),
        el("td", { "data-label": "near because", text: index.kinds[index.strings[kind]] || index.strings[kind] }),
        el("td", { "data-label": "value" }, value === null ? missing() : el("b", { text: real(value) }), el("small", { text: `random ${real(zero)}${verdict}` })),
        el("td", { class: "num", "data-label": "Jaccard" }, jaccard === null ? missing() : real(jaccard)));
    });
    const columns = [["feature", ""], ["near because", ""], ["value", ""], ["Jaccard", "num"]];
    const note = "Random: what a random feature reaches (95th percentile); a neighbour that is not above it says nothing.";
    return part("Neighbours", table(columns, rows, "stacks"), el("p", { class: "muted", text: note }));
  }

  function steeringPart(list) {
    if (list.length === 0) return part("Steering", lacking("Not steered with."));
    const arm = (title, text, kind) => el("div", { class: kind }, el("h4", { text: title }), el("p", { text }));
    return part("Steering, beside controls", ...list.map((example) => el("div", { class: "story" },
      el("p", {}, el("b", { text: example.prompt }), el("small", { text: `  strength ${num(example.strength)} × its largest activation` })),
      el("div", { class: "arms" }, arm("With the feature", example.steered, "with"), arm("Unsteered", example.unsteered, ""),
        arm("Random direction, equal norm", example.random, "")))));
  }

  /* ------------------------------------------------------- tip and keyboard */

  /* Focus may scroll its token into view, and the tip goes with it; a mouse that rests is above another token then. */
  function onPanelScroll() {
    const told = document.querySelector("[aria-describedby=tip]");
    if (told !== null && told === document.activeElement) showTip(told);
    else hideTip();
  }

  let mouse = "";

  function tipFor(event) {
    const focused = document.activeElement.closest("#panel [data-tip]");
    // After a scroll the browser reports a mouse that rests as one that came; it does not take the tip from the focus.
    const rests = event.type === "mouseover" && mouse === `${event.clientX} ${event.clientY}`;
    const pointed = event.target instanceof Element ? event.target.closest("[data-tip]") : null;
    const target = (rests && focused) || pointed || focused;
    hideTip();
    if (target) showTip(target);
  }

  function moveToken(from, by) {
    const marks = [...$("panel").querySelectorAll("mark")].filter((mark) => !mark.closest("details:not([open])"));
    const next = marks[marks.indexOf(from) + by];
    if (!next) return;
    from.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { key, target } = event;
    const typing = target.matches("input, select");
    if (key === "/" && !typing) { event.preventDefault(); $("query").focus(); $("query").select(); return; }
    if (key === "Escape") return onEscape(target);
    if (target === $("query") && (key === "ArrowDown" || key === "Enter")) {
      event.preventDefault();
      $("grid").focus({ preventScroll: true });
      if (state.rows.length) goTo(Math.max(state.at, 0));
      return;
    }
    if (typing) return;
    if (target === $("grid")) return onGridKey(event);
    const side = { ArrowLeft: -1, ArrowRight: 1 }[key];
    if (side === undefined || state.feature === null) return;
    event.preventDefault();
    if (target.matches("mark")) moveToken(target, side);
    else step(side);
  }

  function onGridKey(event) {
    const { key } = event;
    const place = logic.moveTo(key, state.at, state.rows.length, Math.max(1, Math.floor(bodyHeight() / rowHeight()) - 1));
    if (place !== null) { event.preventDefault(); goTo(place); }
    else if (key === "Enter" && state.at >= 0) { event.preventDefault(); open(index.feature[state.rows[state.at]]); }
  }

  function onEscape(target) {
    if (!$("tip").hidden && target.matches("mark")) return hideTip();
    const help = document.querySelector(".help");
    if (help.open) help.open = false;
    else if (target === $("query") && state.query !== "") setQuery("");
    else if (state.feature !== null) close();
    else $("grid").focus({ preventScroll: true });
  }

  /* -------------------------------------------------------------- address */

  /* A viewer may forbid changing the address; the page works without. */
  function remember() {
    const hash = logic.buildHash({ ...state, sort: state.sort === "feature" ? "" : state.sort });
    const before = logic.parseHash(location.hash).feature;
    try {
      if (before !== state.feature) location.hash = hash;
      else history.replaceState(null, "", hash);
    } catch (error) {
      if (!(error instanceof DOMException)) throw error;
    }
  }

  function follow() {
    const asked = logic.parseHash(location.hash);
    const sort = asked.sort && isColumn(asked.sort.replace(/^-/, "")) ? asked.sort : null;
    if (asked.query !== null && asked.query !== state.query) { state.query = asked.query; $("query").value = asked.query; refresh(false); }
    if (sort !== null && sort !== state.sort) { state.sort = sort; refresh(true); }
    if (asked.feature !== state.feature) { state.feature = asked.feature; show(asked.feature !== null); }
  }

  function setQuery(text) {
    state.query = text.trim();
    $("query").value = text;
    refresh(false);
    remember();
  }

  function layout() {
    const compact = narrow.matches || state.feature !== null;
    const changed = document.body.classList.contains("compact") !== compact;
    document.body.classList.toggle("compact", compact);
    $("panel").hidden = state.feature === null;
    if (changed) refresh(true);
  }

  function start() {
    $("main").dataset.title = document.title;
    $("grid").style.setProperty("--columns", `3.5rem minmax(14rem, 2fr) minmax(11rem, 1.4fr) repeat(${numeric.length}, 5.6rem)`);
    $("grid").style.setProperty("--least", `${33 + 6.4 * numeric.length}rem`);
    $("grid").setAttribute("aria-colcount", String(3 + numeric.length));
    const options = [["feature", "Feature"], ...Object.entries(textColumns).map(([name, c]) => [name, c.label]),
      ...index.columns.slice(1).map((c) => [c.name, c.label])];
    $("sort").append(...options.map(([value, text]) => el("option", { value, text })));
    $("sort").addEventListener("change", () => { const key = $("sort").value; if (key !== sorting().name) sortBy(key); });
    $("direction").addEventListener("click", () => sortBy(sorting().name));
    $("query").addEventListener("input", () => { state.query = $("query").value.trim(); refresh(false); remember(); });
    $("grid").addEventListener("scroll", () => requestAnimationFrame(draw), { passive: true });
    $("grid").addEventListener("focus", () => { if (state.at < 0 && state.rows.length) { state.at = 0; draw(); } });
    for (const kind of ["mouseover", "focusin", "click"]) $("panel").addEventListener(kind, tipFor);
    for (const kind of ["mouseleave", "focusout"]) $("panel").addEventListener(kind, hideTip);
    $("panel").addEventListener("mousemove", (event) => { mouse = `${event.clientX} ${event.clientY}`; }, { passive: true });
    $("panel").addEventListener("scroll", onPanelScroll, { passive: true });
    addEventListener("keydown", onKey);
    addEventListener("hashchange", follow);
    new ResizeObserver(() => requestAnimationFrame(() => { layout(); draw(); })).observe($("grid"));
    narrow.addEventListener("change", layout);
    document.body.classList.toggle("compact", narrow.matches);
    refresh(false);
    follow();
  }

  start();
})();
