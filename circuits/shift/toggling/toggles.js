"use strict";
(() => {
  const { ablated, features, logits, parts, label, shortcut, groups } = JSON.parse(document.getElementById("data").textContent);
  const boxes = [...document.querySelectorAll("fieldset input")];
  const names = [...new Set(groups)].sort();
  const Z = 1.959963984540054;

  /* Share of hits with the Wilson interval. */
  function share(hits) {
    const n = hits.length, p = hits.reduce((sum, hit) => sum + hit, 0) / n;
    const centre = p + Z * Z / (2 * n), spread = Z * Math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n)), scale = 1 + Z * Z / n;
    return { value: p, low: Math.max(0, Math.min(p, (centre - spread) / scale)), high: Math.min(1, Math.max(p, (centre + spread) / scale)), n };
  }

  function rows(off) {
    const said = logits.map((logit, i) => Number(logit - off.reduce((sum, f) => sum + parts[i][f], 0) > 0));
    const hits = said.map((one, i) => Number(one === label[i]));
    const made = [["label", share(hits)]];
    if (shortcut !== null) made.push(["agreement with the attribute", share(said.map((one, i) => Number(one === shortcut[i])))]);
    for (const name of names) made.push([name, share(hits.filter((_, i) => groups[i] === name))]);
    return made;
  }

  const plain = rows([]), first = shortcut === null ? 1 : 2;
  const text = (value) => value.toFixed(3);

  function cell(content, number) {
    const made = document.createElement("td");
    made.textContent = content;
    if (number) made.className = "num";
    return made;
  }

  function show() {
    const off = boxes.filter((box) => box.checked).map((box) => Number(box.value));
    const now = rows(off), least = Math.min(...now.slice(first).map(([, one]) => one.value));
    document.querySelector("#table tbody").replaceChildren(...now.map(([name, one], i) => {
      const row = document.createElement("tr");
      if (i >= first && one.value === least) row.className = "worst";
      row.append(cell(name), cell(text(plain[i][1].value), true), cell(text(one.value), true),
        cell(`${text(one.low)} to ${text(one.high)}`, true), cell(one.n, true));
      return row;
    }));
    document.getElementById("count").textContent = `${off.length} of ${features.length} ablated`;
    window.whatIf = Object.fromEntries(now);
  }

  const set = (wanted) => { for (const box of boxes) box.checked = wanted(features[Number(box.value)]); show(); };
  document.getElementById("all").addEventListener("click", () => set(() => true));
  document.getElementById("none").addEventListener("click", () => set(() => false));
  document.getElementById("first").addEventListener("click", () => set((name) => ablated.includes(name)));
  for (const box of boxes) box.addEventListener("change", show);
  show();
})();
