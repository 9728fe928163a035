/* The page of a circuit. Text from the data only ever becomes text nodes and attributes, never markup. */
const circuitPage = (() => {
  const { $, el, svg, showTip, hideTip } = dom;
  const data = JSON.parse($("data").textContent);
  const { nodes, edges } = data, n = nodes.name.length, m = edges.source.length;
  const FIRST_EDGES = 300, LISTED = 100, WIDTHS = [0.6, 1.2, 2, 3.2], RINGS = 4;
  const placeOf = new Map(nodes.name.map((name, i) => [name, i]));
  const largest = Math.max(...nodes.effect.map((x) => Math.abs(x ?? 0)), 0);
  const largestEdge = Math.max(...edges.effect.map((x) => Math.abs(x ?? 0)), 0);
  const out = nodes.name.map(() => []), into = nodes.name.map(() => []);
  edges.source.forEach((source, e) => { out[source].push(e); into[edges.target[e]].push(e); });
  const kept = store.make(data.labels);
  const work = { nodes: 0, paths: 0, segments: 0 };  // what was drawn so far, for whoever asks why it is slow
  const state = { shown: [], visible: new Set(), edges: m, open: null, chosen: new Set(), focus: 0, placed: null };
  const drawn = [];

  const isPositive = (x) => (x ?? 0) >= 0;
  const passes = (e) => e < state.edges && state.visible.has(edges.source[e]) && state.visible.has(edges.target[e]);
  const called = (i) => (kept.labels[nodes.name[i]] ? `${kept.labels[nodes.name[i]]} (${nodes.name[i]})` : nodes.name[i]);

  /* ---------------------------------------------------------------- picture */

  function redraw() {
    const width = $("frame").clientWidth - 2;
    const p = state.placed = layout.place(data, state.shown, kept.labels, width), graph = $("graph");
    graph.setAttribute("viewBox", `0 0 ${p.width} ${p.height}`);
    graph.setAttribute("width", p.width);
    graph.setAttribute("height", p.height);
    const below = svg("g", { class: "rows" }), links = svg("g", { class: "links" }), lit = svg("g", { class: "lit" });
    const above = svg("g", { class: "nodes" });
    drawRows(below, p);
    drawn.length = 0;
    for (const i of state.shown) above.append((drawn[i] = drawNode(i, p.where[i])));
    graph.replaceChildren(below, links, lit, above, drawWatermark(p));
    drawLinks();
    mark();
  }

  function drawRows(group, p) {
    const text = layout.clipped(data.output, Math.min(48, Math.floor((p.width - p.gutter) / 8.5))), wide = 7.4 * text.length + 24;
    const middle = (p.gutter + Math.min(p.width, p.gutter + $("frame").clientWidth)) / 2;
    group.append(svg("rect", { class: "output", x: middle - wide / 2, y: 6, width: wide, height: 26, rx: 6 }));
    group.append(svg("text", { class: "name", x: middle, y: 24, "text-anchor": "middle" }, text));
    data.sites.forEach((site, row) => {
      const bottom = p.bottoms[row], y = p.narrow ? bottom - p.heights[row] + 14 : bottom - p.heights[row] / 2 + 4;
      group.append(svg("path", { class: "line", d: `M0 ${bottom}H${p.width}` }), svg("text", { x: p.narrow ? 2 : 4, y }, layout.clipped(site, 18)));
    });
    data.columns.forEach((column, i) => {
      const x = p.lefts[i] + p.wides[i] / 2, letters = Math.max(2, Math.floor(p.wides[i] / 7));
      const text = svg("text", { class: "token", x, y: p.height - 8, "text-anchor": "middle" }, layout.clipped(column, letters));
      text.append(svg("title", {}, column));
      group.append(text);
    });
  }

  /* What failed, across the whole picture, so that no part of it and no saved file is without it. */
  function drawWatermark(p) {
    const group = svg("g", { class: "watermark" }), text = data.watermark || "";
    if (!text) return group;
    const size = Math.max(12, Math.min(44, (1.7 * p.width) / text.length)), gap = Math.max(120, 4 * size);
    for (let y = Math.min(p.height, gap) * 0.6; y < p.height; y += gap) {
      const at = `${p.width / 2} ${y}`;
      const line = svg("text", { x: p.width / 2, y, "text-anchor": "middle", transform: `rotate(-8 ${at})` }, text);
      line.style.fontSize = `${size}px`;  // a style attribute is against the policy of the page
      group.append(line);
    }
    return group;
  }

  function drawNode(i, { x, y, text }) {
    work.nodes++;
    const r = layout.radius(Math.abs(nodes.effect[i] ?? 0), largest);
    const group = svg("g", {
      class: `node ${isPositive(nodes.effect[i]) ? "pos" : "neg"}`, id: `node-${i}`, "data-i": i, role: "button", tabindex: i === state.focus ? 0 : -1,
      "aria-label": `${called(i)}, effect ${nodes.text[i]}`,
    });
    group.append(svg("circle", { class: "hit", cx: x, cy: y, r: 11 }));
    group.append(nodes.isError[i]
      ? svg("path", { class: "shape", d: `M${x} ${y - r}L${x - r} ${y + 0.8 * r}H${x + r}Z` })
      : svg("circle", { class: "shape", cx: x, cy: y, r }));
    if (text) group.append(svg("text", { x: x + 13, y: y + 4 }, text));
    return group;
  }

  /* All edges of one sign and width are one path, so the picture stays as small as its nodes. */
  function drawLinks() {
    const paths = new Map();
    for (let e = 0; e < state.edges; e++) if (passes(e)) {
      const size = largestEdge ? Math.abs(edges.effect[e]) / largestEdge : 0;
      const bin = Math.min(WIDTHS.length - 1, Math.floor(size * WIDTHS.length));
      const key = `${isPositive(edges.effect[e]) ? "pos" : "neg"} ${bin}`;
      if (!paths.has(key)) paths.set(key, []);
      paths.get(key).push(curveOf(e));
    }
    const made = [...paths].map(([key, parts]) => {
      const [sign, bin] = key.split(" ");
      return svg("path", { class: `link ${sign}`, "stroke-width": WIDTHS[bin], d: parts.join("") });
    });
    work.paths += made.length;
    $("graph").querySelector(".links").replaceChildren(...made);
  }

  function curveOf(e) {
    work.segments++;
    return layout.curve(state.placed.where[edges.source[e]], state.placed.where[edges.target[e]]);
  }

  /* Shows what is open, chosen and grouped, without drawing anything else again. */
  function mark() {
    const lit = state.open === null ? [] : [...into[state.open], ...out[state.open]].filter(passes);
    const near = new Set(lit.flatMap((e) => [edges.source[e], edges.target[e]]));
    const ring = new Map();
    kept.groups.forEach((group, g) => group.nodes.forEach((name) => ring.set(placeOf.get(name), g % RINGS)));
    for (const i of state.shown) {
      const list = drawn[i].classList;
      list.toggle("open", i === state.open);
      list.toggle("chosen", state.chosen.has(i));
      list.toggle("near", near.has(i));
      for (let g = 0; g < RINGS; g++) list.toggle(`group-${g}`, ring.get(i) === g);
    }
    $("graph").classList.toggle("dim", state.open !== null);
    $("graph").querySelector(".lit").replaceChildren(...lit.map((e) => {
      work.paths++;
      const width = 1 + 2.4 * (largestEdge ? Math.abs(edges.effect[e]) / largestEdge : 0);
      return svg("path", { class: `link ${isPositive(edges.effect[e]) ? "pos" : "neg"}`, "data-edge": e, "stroke-width": width.toFixed(2), d: curveOf(e) });
    }));
    drawSide();
    $("undo").disabled = !kept.canUndo;
    $("redo").disabled = !kept.canRedo;
  }

  /* ---------------------------------------------------------------- sliders */

  function filter() {
    const nodeLimit = Number($("node-limit").value);
    state.edges = Number($("edge-limit").value);
    state.shown = Array.from({ length: nodeLimit }, (_, i) => i);  // the strongest first
    state.visible = new Set(state.shown);
    if (state.open !== null && !state.visible.has(state.open)) state.open = null;
    state.chosen = new Set([...state.chosen].filter((i) => state.visible.has(i)));
    if (!state.visible.has(state.focus)) state.focus = 0;
    $("node-said").textContent = nodeLimit === n ? `all ${n}` : `${nodeLimit} of ${n}` + (nodeLimit ? `, |effect| ≥ ${nodes.size[nodeLimit - 1]}` : "");
    let count = 0;
    for (let e = 0; e < state.edges; e++) if (passes(e)) count++;
    $("edge-said").textContent = m === 0 ? "none given" : `${count} of ${m}` + (state.edges ? `, |effect| ≥ ${edges.size[state.edges - 1]}` : "");
  }

  /* ---------------------------------------------------------------- side table */

  function drawSide() {
    const side = $("side");
    if (side.contains(document.activeElement) && document.activeElement.tagName === "INPUT") document.activeElement.blur();
    side.replaceChildren(...[
      ...(state.open === null ? [el("p", { class: "meta", text: "Nothing selected." })] : aboutNode(state.open)),
      ...(state.chosen.size ? [aboutChosen()] : []), ...(kept.groups.length ? [aboutGroups()] : []),
    ]);
  }

  function aboutNode(i) {
    const more = data.details[i] || {};
    const input = el("input", { id: "label", value: kept.labels[nodes.name[i]] || "", maxlength: "200", autocomplete: "off" });
    const form = el("form", { on: { submit: (event) => { event.preventDefault(); labelled(i, input.value); } } },
      el("label", { for: "label", text: "Label" }), input, el("button", { text: "Set" }));
    const parts = [
      el("h2", { tabindex: "-1", text: called(i) }),
      el("p", { class: "numbers", text: `${nodes.kind[i]}, effect ${nodes.text[i]} ${nodes.interval[i] || "(no interval)"}` }), form,
    ];
    if (more.link) parts.push(el("p", {}, el("a", { href: more.link, target: "_blank", rel: "noopener", text: "Feature card" })));
    for (const [before, peak, after] of more.contexts || []) {
      parts.push(el("p", { class: "context" }, before, el("mark", { text: peak }), after));
    }
    if ((more.promoted || []).length) parts.push(el("p", { class: "context" }, "promotes ", ...more.promoted.map((token) => el("span", { class: "chip", text: token }))));
    return [...parts, edgeTable("incoming", "Incoming", into[i], edges.source), edgeTable("outgoing", "Outgoing", out[i], edges.target)];
  }

  function edgeTable(id, title, all, other) {
    const found = all.filter(passes), hidden = all.length - found.length, listed = found.slice(0, LISTED);
    const body = el("tbody", {}, ...listed.map((e) => el("tr", { "data-edge": e },
      el("td", {}, el("button", { type: "button", class: "plain", text: called(other[e]), on: { click: () => open(other[e], true) } })),
      el("td", { class: "num", text: edges.text[e] }), el("td", { class: "num", text: edges.interval[e] }))));
    const said = [found.length > LISTED ? `the ${LISTED} strongest of ${found.length}` : `${found.length}`, hidden ? `${hidden} hidden by the sliders` : ""];
    return el("table", { id }, el("caption", { text: `${title}: ${said.filter(Boolean).join("; ")}` }), body);
  }

  function aboutChosen() {
    const input = el("input", { id: "group-name", "aria-label": "Name of the group", placeholder: "name of the group", maxlength: "200", autocomplete: "off" });
    const form = el("form", { id: "grouping", on: { submit: (event) => { event.preventDefault(); grouped(input.value); } } },
      el("span", { text: `${state.chosen.size} selected` }), input, el("button", { text: "Group" }));
    return form;
  }

  function aboutGroups() {
    return el("ul", { id: "groups" }, ...kept.groups.map((group, g) => el("li", { class: `group-${g % RINGS}` },
      el("button", { type: "button", class: "plain", text: `${group.name || "group"} (${group.nodes.length})`, on: { click: () => {
        state.chosen = new Set(group.nodes.map((name) => placeOf.get(name)).filter((i) => state.visible.has(i)));
        mark();
      } } }),
      el("button", { type: "button", class: "plain", text: "×", "aria-label": `Remove ${group.name || "group"}`, on: { click: () => { kept.ungroup(g); mark(); } } }))));
  }

  /* ---------------------------------------------------------------- actions */

  function focusOn(i) {
    drawn[state.focus]?.setAttribute("tabindex", "-1");
    state.focus = i;
    drawn[i].setAttribute("tabindex", "0");
    drawn[i].focus();
  }

  function open(i, focus = false) {
    state.open = state.open === i && !focus ? null : i;
    mark();
    if (focus && state.visible.has(i)) focusOn(i);
  }

  function choose(i) {
    if (!state.chosen.delete(i)) state.chosen.add(i);
    mark();
  }

  function labelled(i, text) { kept.label(nodes.name[i], text); redraw(); focusOn(i); }
  function grouped(name) { kept.group(name, [...state.chosen].map((i) => nodes.name[i])); state.chosen = new Set(); mark(); }
  function step(how) { kept[how](); redraw(); }
  function say(text) { $("status").textContent = text; }

  /* ---------------------------------------------------------------- files */

  const asJson = () => JSON.stringify({
    format: store.FORMAT, title: data.title, labels: kept.labels, groups: kept.groups,
    nodes: nodes.name.map((name, i) => ({ name, effect: nodes.effect[i], se: nodes.se[i], n: nodes.n[i], interval: nodes.interval[i] })),
    edges: edges.source.map((source, e) => ({ source: nodes.name[source], target: nodes.name[edges.target[e]], effect: edges.effect[e], se: edges.se[e], n: edges.n[e], interval: edges.interval[e] })),
  }, null, 1);

  /* The picture with its colours written out, since a file has no style of this page. */
  function asSvg() {
    const graph = $("graph"), copy = graph.cloneNode(true);
    const own = [graph, ...graph.querySelectorAll("*")], made = [copy, ...copy.querySelectorAll("*")];
    own.forEach((element, k) => {
      const style = getComputedStyle(element);
      for (const name of ["fill", "stroke", "stroke-width", "opacity", "stroke-dasharray"]) made[k].setAttribute(name, style.getPropertyValue(name));
      if (element.tagName === "text") for (const name of ["font-size", "font-family", "font-weight"]) made[k].setAttribute(name, style.getPropertyValue(name));
      for (const name of ["class", "id", "role", "tabindex", "aria-label", "data-i"]) made[k].removeAttribute(name);
    });
    copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
    const { width, height } = state.placed;
    copy.prepend(svg("rect", { width, height, fill: getComputedStyle(document.body).backgroundColor }));
    return new XMLSerializer().serializeToString(copy);
  }

  async function asPng() {
    const image = new Image();
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(asSvg())}`;
    await image.decode();
    const canvas = el("canvas", { width: String(2 * Math.ceil(state.placed.width)), height: String(2 * Math.ceil(state.placed.height)) });
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    return new Promise((done) => { canvas.toBlob(done, "image/png"); });
  }

  function save(blob, ending) {
    const address = URL.createObjectURL(blob);
    el("a", { href: address, download: `circuit.${ending}` }).click();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
    say(`Saved circuit.${ending}.`);
  }

  function load(text) {
    try {
      const { labels, groups, strange } = store.read(text, placeOf);
      kept.replace({ labels, groups });
      redraw();
      say(`${Object.keys(labels).length} labels and ${groups.length} groups read` + (strange ? `; ${strange} of other nodes left out.` : "."));
    } catch (error) { say(error.message); }
  }

  /* ---------------------------------------------------------------- events */

  const nodeAt = (target) => { const found = target.closest?.(".node"); return found ? Number(found.dataset.i) : null; };

  function tip(i) {
    const more = data.details[i] || {}, group = drawn[i];
    const lines = [called(i), `effect ${nodes.text[i]} ${nodes.interval[i]}`];
    if (more.contexts?.length) lines.push(more.contexts[0].join(""));
    if (more.promoted?.length) lines.push(`promotes ${more.promoted.slice(0, 4).join(" ")}`);
    group.dataset.tip = lines.join("\n");
    showTip(group);
  }

  function keys(event) {
    const i = nodeAt(event.target);
    if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z" && event.target.tagName !== "INPUT") {
      event.preventDefault();
      step(event.shiftKey ? "redo" : "undo");
    } else if (event.key === "Escape") { hideTip(); state.open = null; state.chosen = new Set(); mark(); }
    else if (i === null) return;
    else if (event.key.startsWith("Arrow")) { event.preventDefault(); focusOn(layout.next(i, event.key, state.shown, state.placed.where)); }
    else if (event.key === "Enter") { event.preventDefault(); open(i); }
    else if (event.key === " ") { event.preventDefault(); choose(i); }
  }

  function start() {
    $("node-limit").max = n;
    $("node-limit").value = n;
    $("edge-limit").max = m;
    $("edge-limit").value = Math.min(m, FIRST_EDGES);
    for (const id of ["node-limit", "edge-limit"]) $(id).disabled = Number($(id).max) === 0;
    $("node-limit").addEventListener("input", () => { filter(); redraw(); });
    $("edge-limit").addEventListener("input", () => { filter(); drawLinks(); mark(); });
    const graph = $("graph");
    graph.addEventListener("click", (event) => {
      const i = nodeAt(event.target);
      if (i === null) { state.open = null; mark(); } else if (event.shiftKey) choose(i); else open(i);
    });
    graph.addEventListener("pointerover", (event) => { const i = nodeAt(event.target); if (i === null) hideTip(); else tip(i); });
    graph.addEventListener("pointerleave", hideTip);
    graph.addEventListener("focusin", (event) => { const i = nodeAt(event.target); if (i !== null) tip(i); });
    graph.addEventListener("focusout", hideTip);
    document.addEventListener("keydown", keys);
    $("undo").addEventListener("click", () => step("undo"));
    $("redo").addEventListener("click", () => step("redo"));
    $("save-json").addEventListener("click", () => save(new Blob([asJson()], { type: "application/json" }), "json"));
    $("save-svg").addEventListener("click", () => save(new Blob([asSvg()], { type: "image/svg+xml" }), "svg"));
    $("save-png").addEventListener("click", async () => save(await asPng(), "png"));
    $("load-json").addEventListener("change", async (event) => { const [file] = event.target.files; if (file) load(await file.text()); event.target.value = ""; });
    let width = innerWidth;
    addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; redraw(); } });
    filter();
    redraw();
  }

  start();
  return { data, work, state, kept, asJson, asSvg, asPng, load };
})();
