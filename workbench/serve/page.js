/* The playground itself. What comes from the server only ever becomes text nodes and attributes, never markup. */
(() => {
  const { num, real } = logic;
  const { $, el, svg, chip, missing, showTip, hideTip } = dom;
  const KEPT = "workbench-playground", SHOWN = 60, SHOWN_TOKENS = 300, SHOWN_REASONS = 3, SHOWN_NUMBERS = 8, SUGGESTED = 5, FIELDS = ["prompt", "max_new_tokens", "temperature", "seed", "scope"];
  const state = { about: null, index: null, rowOf: new Map(), hits: [], at: -1, chosen: [], lens: new Map(), run: null, active: null, colour: "" };

  /* -------------------------------------------------------------- server */

  /* The answer as JSON; what went wrong, in words, otherwise. */
  async function ask(path, options = {}) {
    let answer;
    try {
      answer = await fetch(path, options);
    } catch (error) {
      if (!(error instanceof TypeError)) throw error;
      throw new Error("The server does not answer. Is `workbench serve` still running? What you wrote here is kept.");
    }
    if (!answer.ok) throw new Error((await answer.json()).error || `The server answered ${answer.status}.`);
    return answer;
  }

  const post = (path, asked) => ask(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(asked) });

  const getJson = async (path) => (await ask(path)).json();

  async function load() {
    const { about, index } = await getJson("/api/setup");
    state.about = about;
    state.index = index;
    if (index !== null) {
      state.rowOf = new Map(index.feature.map((feature, row) => [feature, row]));
      for (const [name, values] of Object.entries(index.values)) {
        index.values[name] = values.map((x) => (x === null || typeof x === "number" ? x : x.$float === "inf" ? Infinity : -Infinity));
      }
    }
    const sae = about.site === null ? "no SAE: texts and log-probabilities only" : `${num(about.d_sae)} features at ${about.site}`;
    $("about").textContent = `${about.model} · ${about.layers} layers · ${about.dtype} on ${about.device} · ${sae}`;
    $("choose").hidden = about.site === null;
    for (const part of document.querySelectorAll(".edit-only")) part.hidden = about.site === null;
    $("chat-line").hidden = !about.chat;
    $("max_new_tokens").max = String(about.max_new_tokens);
    search(true);
    drawChosen();
  }

  /* ------------------------------------------------------------ features */

  function tokensOf(feature) {
    const row = state.rowOf.get(feature);
    if (row !== undefined && state.index.promoted[row].length) return state.index.promoted[row].map((id) => state.index.strings[id]);
    return state.lens.get(feature) || null;
  }

  /* One line about a feature: number, explanation or tokens, score. */
  function line(feature) {
    const row = state.rowOf.get(feature), tokens = tokensOf(feature);
    const said = row === undefined ? "" : state.index.explanation[row];
    const score = row === undefined ? null : (state.index.values.output_score || [])[row];
    const flags = row === undefined ? [] : state.index.flags[row].map((flag) => el("span", { class: "flag", text: logic.flagName(flag), title: flag }));
    const what = said !== "" ? [el("span", { text: said })] : tokens ? tokens.slice(0, 5).map(chip) : [missing("tokens not computed")];
    return el("div", { class: "line" }, el("span", { class: "id", text: `#${feature}` }), ...flags, el("span", { class: "said" }, ...what),
      typeof score === "number" ? el("span", { class: "score", title: "output score", text: real(score) }) : null);
  }

  function search(quiet = false) {
    const text = $("query").value.trim();
    const { features, error } = play.hits(state.index, text, state.about.d_sae || 0, logic.search);
    const free = features.filter((feature) => !state.chosen.some((edit) => edit.feature === feature));
    state.hits = free.slice(0, SHOWN);
    state.at = text !== "" && state.hits.length ? 0 : -1;
    $("found").textContent = error || (text === "" ? "" : free.length > SHOWN ? `${num(free.length)} features; the first ${SHOWN}:` : `${num(free.length)} feature${free.length === 1 ? "" : "s"}`);
    $("found").classList.toggle("wrong", error !== null);
    $("hits").hidden = quiet || state.hits.length === 0;
    $("hits").scrollTop = 0;
    drawHits();
    drawSuggested();
  }

  function closeHits() {
    $("hits").hidden = $("preview").hidden = true;
    $("query").setAttribute("aria-expanded", "false");
    drawSuggested();
  }

  /* Features to begin with, while nothing is searched. */
  function drawSuggested() {
    const { features, by } = play.suggested(state.index, state.chosen.map((edit) => edit.feature), SUGGESTED);
    const why = { output_score: "the highest output scores", frequency: "active most often; output scores were not measured" }[by];
    $("suggested").hidden = !$("hits").hidden || $("query").value.trim() !== "" || features.length === 0;
    $("suggested-why").textContent = `Suggested: ${why}`;
    $("suggested-features").replaceChildren(...features.map((feature) => el("button", { type: "button", class: "suggested", on: { click: () => choose(feature) } }, line(feature))));
  }

  function drawHits() {
    $("hits").replaceChildren(...state.hits.map((feature, place) => el("li", {
      role: "option", id: `hit-${place}`, "aria-selected": String(place === state.at), on: {
        mousedown: (event) => { event.preventDefault(); choose(feature); }, mouseenter: () => drawPreview(feature), mouseleave: () => drawPreview(state.hits[state.at]),
      },
    }, line(feature), whyOf(feature))));
    drawPreview(state.hits[state.at]);
    $("query").setAttribute("aria-expanded", String(!$("hits").hidden));
    if (state.at >= 0) $("query").setAttribute("aria-activedescendant", `hit-${state.at}`);
    else $("query").removeAttribute("aria-activedescendant");
  }

  /* The fields that a hit matched in, the word marked. */
  function whyOf(feature) {
    const row = state.rowOf.get(feature);
    const found = row === undefined ? [] : play.why(state.index, row, $("query").value, logic);
    if (found.length === 0) return null;
    const shown = found.slice(0, SHOWN_REASONS).map(({ field, text, word }) => el("span", { class: "reason" }, `${field}: `, ...(word === null ? [num(text)] : marked(text, word))));
    return el("div", { class: "why" }, ...shown, found.length > shown.length ? `and ${found.length - shown.length} more` : null);
  }

  function marked(text, word) {
    const [before, at, after] = play.pieces(text, word);
    return [before, at === "" ? "" : el("mark", { text: at }), after];
  }

  /* What the index holds of a feature; its contexts are in the feature page. */
  function drawPreview(feature) {
    const row = state.rowOf.get(feature), index = state.index;
    $("preview").hidden = $("hits").hidden || row === undefined;
    if ($("preview").hidden) return;
    const chips = (name) => (index[name][row].length ? [el("dt", { text: name }), el("dd", {}, ...index[name][row].map((id) => chip(index.strings[id])))] : []);
    const measured = index.columns.filter(({ name, kind }) => kind === "number" && name !== "feature" && index.values[name][row] !== null);
    const numbers = measured.slice(0, SHOWN_NUMBERS).flatMap(({ name, label }) => [el("dt", { text: label }), el("dd", { text: real(index.values[name][row]) })]);
    const weak = index.holds[row] ? "" : " (not above its controls in every test)";
    $("preview").replaceChildren(el("h3", { text: `Feature ${feature}` }),
      index.explanation[row] === "" ? "" : el("p", { text: index.explanation[row] + weak }),
      ...index.flags[row].map((flag) => el("p", { class: "note", text: flag })),
      el("dl", {}, ...["reads", "promoted", "suppressed"].flatMap(chips), ...numbers));
  }

  function moveHit(key) {
    const place = logic.moveTo(key, state.at, state.hits.length, 8);
    if (place === null) return false;
    state.at = place;
    $("hits").hidden = false;
    drawHits();
    $(`hit-${place}`).scrollIntoView({ block: "nearest" });
    return true;
  }

  function choose(feature) {
    if (state.chosen.some((edit) => edit.feature === feature)) return;
    state.chosen.push({ feature, mode: "steer", strength: play.DEFAULTS.steer });
    $("query").value = "";
    search(true);
    drawChosen();
    keep();
    const made = $("chosen").lastElementChild;
    made.querySelector("input").focus();
    made.scrollIntoView({ block: "nearest" });
  }

  function drawChosen() {
    $("chosen").replaceChildren(...state.chosen.map(chosenLine));
    for (const { feature } of state.chosen) learn(feature);
  }

  /* What an unknown feature promotes is asked for once; without it the feature works all the same. */
  async function learn(feature) {
    if (tokensOf(feature) !== null || state.lens.has(feature)) return;
    state.lens.set(feature, null);
    try {
      state.lens.set(feature, (await getJson(`/api/feature?number=${feature}`)).promoted);
      const old = $(`chosen-${feature}`);
      if (old) old.querySelector(".line").replaceWith(line(feature));
    } catch (error) {
      complain(error.message);
    }
  }

  function chosenLine(edit) {
    const unit = el("span", { class: "unit", text: play.UNITS[edit.mode] });
    const strength = el("input", { type: "number", step: "any", value: String(edit.strength), "aria-label": `Strength of feature ${edit.feature}`, on: {
      input: () => { edit.strength = strength.value === "" ? null : Number(strength.value); keep(); },
    } });
    strength.disabled = edit.mode === "ablate";
    const modes = Object.keys(play.UNITS).map((mode) => el("option", { value: mode, text: mode }));
    const mode = el("select", { "aria-label": `What to do with feature ${edit.feature}`, on: { change: () => {
      edit.mode = mode.value;
      edit.strength = play.DEFAULTS[edit.mode];
      strength.value = String(edit.strength);
      strength.disabled = edit.mode === "ablate";
      unit.textContent = play.UNITS[edit.mode];
      keep();
    } } }, ...modes);
    mode.value = edit.mode;
    const remove = el("button", { type: "button", text: "✕", "aria-label": `Remove feature ${edit.feature}`, title: "Remove", on: { click: () => {
      state.chosen = state.chosen.filter((other) => other !== edit);
      drawChosen();
      search(true);
      keep();
      $("query").focus();
    } } });
    return el("li", { id: `chosen-${edit.feature}` }, line(edit.feature), el("div", { class: "knobs" }, mode, strength, unit, remove));
  }

  /* ---------------------------------------------------------------- form */

  function form() {
    const edits = state.chosen.map(({ feature, mode, strength }) => ({ feature, mode, strength }));
    const steers = state.about.site !== null;
    return {
      prompt: $("prompt").value, chat: state.about.chat && $("chat").checked, max_new_tokens: Number($("max_new_tokens").value),
      temperature: Number($("temperature").value), seed: Number($("seed").value), scope: $("scope").value, control: $("control").checked,
      edits: steers ? edits : [],
    };
  }

  /* The form outlives a reload of this tab; where the browser keeps nothing, the page works without. */
  function keep() {
    const fields = Object.fromEntries(FIELDS.map((name) => [name, $(name).value]));
    const kept = { fields, chat: $("chat").checked, control: $("control").checked, chosen: state.chosen };
    try { sessionStorage.setItem(KEPT, JSON.stringify(kept)); } catch (error) { if (!(error instanceof DOMException)) throw error; }
  }

  function recall() {
    let kept = null;
    try { kept = JSON.parse(sessionStorage.getItem(KEPT)); } catch (error) { if (!(error instanceof DOMException)) throw error; }
    if (kept === null) return;
    for (const [name, value] of Object.entries(kept.fields)) $(name).value = value;
    $("chat").checked = kept.chat;
    $("control").checked = kept.control;
    state.chosen = kept.chosen;
  }

  /* ----------------------------------------------------------------- run */

  const newName = () => [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

  async function run() {
    if (state.active !== null || !$("form").reportValidity()) return;
    const asked = form();
    state.active = newName();
    state.run = play.begin();
    complain(null);
    drawProgress(asked);
    try {
      const answer = await post(`/api/run?name=${state.active}`, asked);
      await follow(answer.body.getReader(), asked);
      if (state.run.phase === "error") complain(state.run.message);
    } catch (error) {
      state.run = { ...state.run, phase: "error" };
      complain(error.message);
    } finally {
      state.active = null;
      drawProgress(asked);
    }
  }

  async function follow(reader, asked) {
    const decoder = new TextDecoder();
    let rest = "";
    while (!play.isOver(state.run)) {
      const { done, value } = await reader.read();
      if (done) throw new Error("The server ended before the run did. Is `workbench serve` still running? What was written is kept.");
      const read = play.readLines(rest + decoder.decode(value, { stream: true }));
      rest = read.rest;
      for (const event of read.events) {
        state.run = play.after(state.run, event);
        drawEvent(event, asked);
      }
      drawProgress(asked);
    }
  }

  async function stop() {
    if (state.active === null) return;
    $("stop").disabled = true;
    try {
      await ask(`/api/stop?name=${state.active}`, { method: "POST" });
    } catch (error) {
      complain(error.message);
    }
  }

  function drawProgress(asked) {
    const busy = state.active !== null;
    $("run").disabled = busy;
    $("stop").disabled = !busy;
    $("progress").hidden = !busy;
    $("progress").value = play.progress(state.run, asked.max_new_tokens);
    $("status").textContent = play.says(state.run);
    $("results").setAttribute("aria-busy", String(busy));
  }

  function complain(message) {
    $("error").hidden = message === null;
    $("error").textContent = message || "";
  }

  /* ------------------------------------------------------ active features */

  function drawActive({ tokens, note, strongest }) {
    const shown = tokens.slice(-SHOWN_TOKENS);
    const first = tokens.length > shown.length ? ` The last ${num(shown.length)} of ${num(tokens.length)} tokens are shown.` : "";
    $("active-said").textContent = `Unedited model; at each token the ${strongest} strongest features with their activations. Press one to edit it. Prompt: ${note}.${first}`;
    $("active-tokens").replaceChildren(table([["token", ""], ["active", "num"], ["strongest first", ""]], shown.map(activeRow)));
    $("active").hidden = false;
    $("active").scrollIntoView({ block: "nearest" });
  }

  function activeRow({ text, left_out, n_active, active }) {
    const features = active.map(([feature, value]) => el("button", { type: "button", class: "active", title: saidOf(feature), on: { click: () => choose(feature) } },
      el("span", { class: "id", text: `#${feature}` }), el("span", { class: "said", text: saidOf(feature) }), el("span", { class: "score", text: real(value) })));
    const none = left_out === "" ? "no feature is active" : `left out: ${left_out}`;
    return el("tr", {}, el("th", { scope: "row" }, chip(text)), el("td", { class: "num", text: left_out === "" ? num(n_active) : "–" }),
      el("td", {}, ...(features.length ? features : [missing(none)])));
  }

  /* What a feature is, in words or by the tokens that it promotes; empty if nothing is known. */
  function saidOf(feature) {
    const row = state.rowOf.get(feature);
    const said = row === undefined ? "" : state.index.explanation[row];
    return said !== "" ? said : (tokensOf(feature) || []).slice(0, 5).join(" ");
  }

  /* ----------------------------------------------------- Python, intervention */

  /* Sends the form to one of the short questions and shows the answer. */
  async function take(path, part, show, read = (answer) => answer.json()) {
    complain(null);
    try {
      await show(await read(await post(path, form())));
    } catch (error) {
      $(part).hidden = true;
      complain(error.message);
    }
  }

  async function fileOf(answer) {
    return { name: answer.headers.get("Content-Disposition").split('"')[1], content: await answer.blob() };
  }

  function keepFile({ name, content }) {
    const link = el("a", { href: URL.createObjectURL(content), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
    showTaken(`Downloaded ${name}. It is read so, for this model:`, `edits = wb.Intervention.load(${JSON.stringify(name)})`);
  }

  async function showPython({ code }) {
    const copied = await copy(code);
    showTaken(copied ? "Copied. It loads the model and writes the edited text:" : "This browser does not let the page copy. The code is selected; copy it:", code);
    if (!copied) getSelection().selectAllChildren($("taken-text"));
  }

  function showTaken(said, text) {
    $("taken").hidden = false;
    $("taken-said").textContent = said;
    $("taken-text").textContent = text;
    $("taken").scrollIntoView({ block: "nearest" });
  }

  /* Whether the text is in the clipboard; a page that came unencrypted from another machine has none. */
  async function copy(text) {
    if (!navigator.clipboard) return false;
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch (error) {
      if (!(error instanceof DOMException)) throw error;
      return false;
    }
  }

  /* --------------------------------------------------------------- texts */

  function drawEvent(event, asked) {
    if (event.kind === "writing") {
      if (event.place === 0) {
        for (const id of ["texts", "edits"]) $(id).replaceChildren();
        $("shading").hidden = true;
        $("texts").append(el("div", { class: "columns" }));
      }
      $("texts").firstElementChild.append(arm(event.arm, asked, el("p", { class: "text", id: `writing-${event.arm}` }, before(asked))));
    } else if (event.kind === "token") {
      $(`writing-${event.arm}`).append(...token(el("span", { class: "tok" }), event.text));
    } else if (event.kind === "done") drawResult(event.result, asked);
  }

  /* The end of the prompt; a user message has a line of its own. */
  const before = (asked) => el("span", { class: "before" }, asked.prompt.length > 200 ? `…${asked.prompt.slice(-200)}` : asked.prompt, asked.chat ? el("br") : null);

  /* A token's span with its text; a line end is shown by its sign and ends the line. */
  function token(span, text) {
    span.textContent = text;
    return text.includes("⏎") ? [span, el("br")] : [span];
  }

  function arm(name, asked, ...children) {
    const what = { unsteered: "no edit", steered: asked.edits.map(wordsOf).join(", "), control: "changed by the same norm at each token" }[name];
    const tone = { unsteered: "var(--c1)", steered: "var(--c2)", control: "var(--c6)" }[name];
    return el("article", { class: "arm", id: `arm-${name}`, vars: { "--tone": tone } }, el("h3", {}, play.TITLES[name], el("small", { text: what })), ...children);
  }

  function wordsOf({ feature, mode, strength }) {
    return { steer: `steer #${feature} ${num(strength)} × a_max`, clamp: `clamp #${feature} at ${num(strength)}`, scale: `scale #${feature} × ${num(strength)}`, ablate: `ablate #${feature}` }[mode];
  }

  function drawResult(result, asked) {
    const modes = play.colours(result.rows);
    if (!modes.some(([mode]) => mode === state.colour)) state.colour = modes[0][0];
    $("colour").replaceChildren(...modes.map(([value, text]) => el("option", { value, text })));
    $("colour").value = state.colour;
    $("shading").hidden = false;
    const columns = result.rows.map((row) => arm(row.arm, asked, textOf(row, asked), meansOf(row), klOf(row)));
    $("texts").replaceChildren(el("div", { class: "columns" }, ...columns));
    const first = $("texts").querySelector("[data-tip]");
    if (first) first.tabIndex = 0;
    $("edits").replaceChildren(...editsOf(result));
    state.result = result;
    paint();
  }

  function textOf(row, asked) {
    const spans = row.tokens.flatMap((text, i) => token(el("span", {
      class: row.lens[i] ? "tok lens" : "tok", tabindex: "-1", "data-tip": play.tip(row, i, num), "data-place": String(i),
    }), text));
    const none = row.tokens.length ? null : el("span", { class: "na", text: " nothing was written" });
    return el("p", { class: "text" }, before(asked), ...spans, none);
  }

  /* Colours every token anew; nothing else changes. */
  function paint() {
    const { rows } = state.result, [kind, name] = state.colour.split(":");
    const largest = kind === "kl" ? play.largestKl(rows, name) : 0;
    for (const row of rows) {
      for (const span of $(`arm-${row.arm}`).querySelectorAll("[data-place]")) {
        const { tone, share } = play.shade(row, Number(span.dataset.place), state.colour, largest);
        span.classList.toggle("warm", tone === "warm");
        span.classList.toggle("cool", tone === "cool");
        span.style.setProperty("--v", String(share));
      }
    }
    $("legend").textContent = play.legend(state.colour);
  }

  function table(columns, rows) {
    const head = columns.map(([text, kind]) => el("th", { scope: "col", class: kind, text }));
    return el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows));
  }

  function meansOf(row) {
    const value = (x, own) => el("td", { class: "num" }, own ? "–" : x === null ? missing() : real(x));
    const rows = play.means(row).map(({ name, logprob, kl }) => el("tr", { class: name === row.arm ? "own" : "" },
      el("th", { scope: "row", text: play.SHORT[name] }), value(logprob), value(kl, name === "unsteered")));
    // In bold the model that wrote the text.
    const marked = row.lens.filter(Boolean).length, steered = Object.keys(row.logprobs).length > 1;
    const lens = steered ? ` ${num(marked)} of them lens tokens of the edited features.` : "";
    return el("div", {}, table([["nats per token under", ""], ["log-prob.", "num"], ["KL", "num"]], rows),
      el("p", { class: "note", text: `Bold: what wrote it. ${num(row.tokens.length)} tokens, ended by ${row.ended}.${lens}` }));
  }

  function klOf(row) {
    const names = Object.keys(row.kl);
    if (names.length === 0 || row.tokens.length === 0) return null;
    const [width, height] = [320, 48];
    const { most, bars } = play.klBars(row, width, height);
    const rects = bars.map((bar) => svg("rect", {
      x: bar.x, y: bar.y, width: bar.width, height: bar.height, class: bar.name === "control" ? "quiet" : "",
      "data-tip": `KL of ${play.SHORT[bar.name]} at token ${bar.i + 1}, “${row.tokens[bar.i]}”: ${num(bar.value)} nats`,
    }));
    const drawing = svg("svg", { viewBox: `0 0 ${width} ${height + 1}`, role: "img", "aria-label": `KL per position, up to ${num(most)} nats` },
      ...rects, svg("line", { x1: 0, x2: width, y1: height, y2: height }));
    const key = (name) => [el("span", { class: "key", vars: { background: name === "control" ? "var(--c6)" : "var(--c2)" } }), `${play.SHORT[name]} `];
    return el("figure", {}, drawing, el("figcaption", {}, `KL from unsteered at each token, up to ${num(most)} nats. `, ...names.flatMap(key)));
  }

  function editsOf(result) {
    const input = el("p", { class: "note", text: `Prompt: ${num(result.prompt_tokens)} tokens; ${result.note}.` });
    if (result.edits.length === 0) return [input];
    const example = el("p", { class: "note", text: "One prompt and one draw are an example, no measurement; `workbench steer` measures." });
    const rows = result.edits.map((edit) => {
      const silent = edit.norm === 0 ? el("div", { class: "silent", text: "changed nothing: the activation was already so at every token" }) : null;
      const together = edit.together > 1 ? el("div", { class: "note", text: `with ${edit.together - 1} more at this site; by itself ${real(edit.intended)}` }) : null;
      return el("tr", {}, el("th", { scope: "row" }, play.TITLES[edit.arm], el("div", { class: "note", text: edit.what })),
        el("td", { text: edit.edit }), el("td", { class: "num", text: num(edit.passes) }), el("td", { class: "num", text: num(edit.tokens) }),
        el("td", { class: "num" }, real(edit.norm), silent, together), el("td", { class: "num", text: `${num(100 * edit.share)}%` }));
    });
    const columns = [["text", ""], ["edit", ""], ["passes", "num"], ["tokens edited", "num"], ["mean norm added", "num"], ["of the activation's", "num"]];
    return [el("section", {}, el("h2", { text: "Edit report" }), el("div", { class: "scroll" }, table(columns, rows)),
      el("p", { class: "note", text: "Counted while the texts were written; an edit that did not happen is an error. The last token is sampled, and not read again, so it is not edited." }), input, example)];
  }

  /* -------------------------------------------------------- tip, keyboard */

  function tipFor(event) {
    const pointed = event.target instanceof Element ? event.target.closest("[data-tip]") : null;
    const target = pointed || document.activeElement.closest("#texts [data-tip]");
    hideTip();
    if (target) showTip(target);
  }

  function moveToken(from, by) {
    const all = [...$("texts").querySelectorAll("span[data-tip]")];
    const next = all[all.indexOf(from) + by];
    if (!next) return;
    from.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }

  function onKey(event) {
    const { key, target } = event;
    if (key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); run(); return; }
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (key === "Escape") return onEscape();
    if (target === $("query")) return onQueryKey(event);
    if (key === "/" && !target.matches("input, textarea, select") && !$("choose").hidden) { event.preventDefault(); $("query").focus(); return; }
    const side = { ArrowLeft: -1, ArrowRight: 1 }[key];
    if (side !== undefined && target.matches("span[data-tip]")) { event.preventDefault(); moveToken(target, side); }
  }

  function onQueryKey(event) {
    const { key } = event;
    if (["ArrowDown", "ArrowUp", "PageDown", "PageUp"].includes(key) && moveHit(key)) event.preventDefault();
    else if (key === "Enter") {
      // Enter chooses a feature here; it does not send the form.
      event.preventDefault();
      if (state.at >= 0) choose(state.hits[state.at]);
    }
  }

  function onEscape() {
    const help = document.querySelector(".help");
    if (!$("tip").hidden) hideTip();
    else if (help.open) help.open = false;
    else if (!$("hits").hidden) { $("query").value = ""; search(true); }
    else stop();
  }

  function start() {
    history.replaceState(null, "", location.pathname);
    recall();
    $("query").addEventListener("input", () => search());
    $("query").addEventListener("focus", () => search());
    $("query").addEventListener("blur", closeHits);
    $("form").addEventListener("submit", (event) => { event.preventDefault(); run(); });
    $("form").addEventListener("input", keep);
    $("stop").addEventListener("click", stop);
    $("read").addEventListener("click", () => take("/api/active", "active", drawActive));
    $("python").addEventListener("click", () => take("/api/python", "taken", showPython));
    $("save").addEventListener("click", () => take("/api/save", "taken", ({ folder, command }) => showTaken(`Saved in ${folder}. It is used by Intervention.load, or so:`, command)));
    $("download").addEventListener("click", () => take("/api/download", "taken", keepFile, fileOf));
    $("taken-close").addEventListener("click", () => { $("taken").hidden = true; });
    $("colour").addEventListener("change", () => { state.colour = $("colour").value; paint(); });
    for (const kind of ["mouseover", "focusin"]) $("texts").addEventListener(kind, tipFor);
    for (const kind of ["mouseleave", "focusout"]) $("texts").addEventListener(kind, hideTip);
    $("results").addEventListener("scroll", hideTip, { passive: true });
    addEventListener("keydown", onKey);
    load().catch((error) => { $("about").textContent = ""; complain(error.message); });
  }

  start();
})();
