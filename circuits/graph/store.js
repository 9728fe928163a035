/* What a reader has added to the page: labels and groups, with every step that can be undone; as a file and back. */
const store = (() => {
  const MOST_LETTERS = 200, FORMAT = "circuit-labels";

  /* Text in which nothing hides or reorders: control characters and direction marks become their codes. */
  const clear = (text) => text.trim().slice(0, MOST_LETTERS).replace(
    /[\u0000-\u001f\u007f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g,
    (sign) => `⟨U+${sign.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);

  function make(labels) {
    const past = [], future = [];
    let now = { labels: { ...labels }, groups: [] };
    const change = (next) => { past.push(now); future.length = 0; now = next; };
    return {
      get labels() { return now.labels; },
      get groups() { return now.groups; },
      get canUndo() { return past.length > 0; },
      get canRedo() { return future.length > 0; },
      label(name, text) {
        const labels = { ...now.labels };
        delete labels[name];
        if (clear(text)) labels[name] = clear(text);
        if (labels[name] !== now.labels[name]) change({ ...now, labels });
      },
      group(name, nodes) { change({ ...now, groups: [...now.groups, { name: clear(name), nodes }] }); },
      ungroup(place) { change({ ...now, groups: now.groups.filter((_, i) => i !== place) }); },
      replace(next) { change(next); },
      undo() { if (past.length) { future.push(now); now = past.pop(); } },
      redo() { if (future.length) { past.push(now); now = future.pop(); } },
    };
  }

  /* Labels and groups of a file, as far as their nodes are known; throws words for people. */
  function read(text, known) {
    let found;
    try { found = JSON.parse(text); } catch { throw new Error("This file is not JSON. Choose one that this page exported."); }
    if (found === null || typeof found !== "object" || typeof found.labels !== "object" || found.labels === null) {
      throw new Error("This file holds no labels. Choose one that this page exported.");
    }
    const labels = {}, groups = [];
    let strange = 0;
    for (const [name, label] of Object.entries(found.labels)) {
      if (known.has(name) && typeof label === "string") labels[name] = clear(label);
      else strange++;
    }
    for (const group of Array.isArray(found.groups) ? found.groups : []) {
      const nodes = Array.isArray(group.nodes) ? group.nodes.filter((name) => known.has(name)) : [];
      if (typeof group.name === "string" && nodes.length) groups.push({ name: clear(group.name), nodes });
    }
    return { labels, groups, strange };
  }

  return { make, read, FORMAT };
})();
