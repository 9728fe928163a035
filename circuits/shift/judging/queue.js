"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const { judge, cards, given } = JSON.parse($("data").textContent);
  const DECISIONS = ["spurious", "intended", "unsure"];
  const known = new Set(cards.map((card) => card.feature));
  const KEY = `judging ${judge} ${cards.map((card) => card.feature).sort().join(" ")}`;
  const verdicts = new Map();

  const isVerdict = (one) => one !== null && typeof one === "object" && known.has(one.feature) && one.judge === judge
    && DECISIONS.includes(one.verdict) && typeof one.rationale === "string" && typeof one.timestamp === "string";

  /* Of two verdicts on one feature the later one holds. */
  function add(list) {
    let taken = 0;
    for (const one of list) {
      if (!isVerdict(one)) continue;
      const before = verdicts.get(one.feature);
      if (!before || before.timestamp <= one.timestamp) { verdicts.set(one.feature, one); taken++; }
    }
    return taken;
  }

  function stored() {
    try { return JSON.parse(localStorage.getItem(KEY) ?? "[]"); } catch { return []; }
  }

  function keep() {
    try { localStorage.setItem(KEY, JSON.stringify([...verdicts.values()])); }
    catch { say("This browser keeps nothing: export before you close the page."); }
  }

  function say(text) { $("said").textContent = text; }

  add(given);
  add(stored());
  const open = () => cards.findIndex((card) => !verdicts.has(card.feature));
  let place = Math.max(open(), 0);

  function show() {
    const card = cards[place], verdict = verdicts.get(card.feature);
    $("feature").textContent = card.feature;
    $("active").textContent = `active on ${card.n.toLocaleString("en")} ${card.n === 1 ? "token" : "tokens"}`;
    $("contexts").replaceChildren(...card.contexts.map(([before, token, after]) => {
      const item = document.createElement("li"), mark = document.createElement("mark");
      mark.textContent = token;
      item.append(before, mark, after);
      return item;
    }));
    $("why").value = verdict?.rationale ?? "";
    for (const button of document.querySelectorAll("[data-verdict]")) {
      button.setAttribute("aria-pressed", String(button.dataset.verdict === verdict?.verdict));
    }
    $("progress").textContent = `${place + 1} of ${cards.length}, ${verdicts.size} judged`;
    $("back").disabled = place === 0;
    $("forward").disabled = place === cards.length - 1;
  }

  function decide(verdict) {
    const feature = cards[place].feature;
    const timestamp = new Date().toISOString().replace(/\.\d+Z$/, "+00:00");
    verdicts.set(feature, { feature, verdict, rationale: $("why").value.trim(), judge, timestamp });
    keep();
    const next = open();
    say(next < 0 ? "All features are judged: export the verdicts." : "");
    if (next >= 0) place = next;
    show();
  }

  function asLines() {
    return cards.filter((card) => verdicts.has(card.feature))
      .map((card) => `${JSON.stringify(verdicts.get(card.feature))}\n`).join("");
  }

  function save() {
    const address = URL.createObjectURL(new Blob([asLines()], { type: "application/jsonl" }));
    const link = document.createElement("a");
    Object.assign(link, { href: address, download: "verdicts.jsonl" }).click();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
    say("Saved verdicts.jsonl.");
  }

  function load(text) {
    const lines = text.split("\n").filter((line) => line.trim());
    let read;
    try { read = lines.map((line) => JSON.parse(line)); }
    catch { say("This file is not JSON lines. Choose one that this page exported."); return; }
    const taken = add(read);
    keep();
    say(`${taken} of ${lines.length} verdicts taken.`);
    place = Math.max(open(), 0);
    show();
  }

  const go = (step) => { place = Math.min(Math.max(place + step, 0), cards.length - 1); show(); };
  $("back").addEventListener("click", () => go(-1));
  $("forward").addEventListener("click", () => go(1));
  $("export").addEventListener("click", save);
  $("load").addEventListener("change", async (event) => {
    const [file] = event.target.files;
    if (file) load(await file.text());
    event.target.value = "";
  });
  for (const button of document.querySelectorAll("[data-verdict]")) {
    button.addEventListener("click", () => decide(button.dataset.verdict));
  }
  addEventListener("keydown", (event) => {
    if (event.target === $("why") || event.ctrlKey || event.metaKey || event.altKey) return;
    const chosen = DECISIONS[Number(event.key) - 1];
    if (chosen) decide(chosen);
    if (event.key === "ArrowLeft") go(-1);
    if (event.key === "ArrowRight") go(1);
  });
  window.queueLines = asLines;
  show();
})();
