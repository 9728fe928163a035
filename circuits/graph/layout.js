"use strict";
/* Where the nodes are, computed without touching the document. */
const layout = (() => {
  const SLOT = 24, PAD = 12, HEAD = 44, FOOT = 26, GUTTER = 112, LEAST = 64, EMPTY = 22, LETTER = 6.4, NARROW = 600, MOST_LETTERS = 22;

  const clipped = (text, n) => (text.length <= n ? text : text.slice(0, n - 1) + "…");

  /* The most letters of a label that a column holds beside its node. */
  const room = (column) => Math.max(0, Math.min(MOST_LETTERS, Math.floor((column - SLOT - 4) / LETTER)));

  /* Left end and width of each column: those without nodes are as narrow as their tokens, the others share the rest. */
  function columnsOf(data, shown, width, gutter) {
    const used = new Set(shown.map((i) => data.nodes.column[i]));
    const empty = data.columns.map((text, c) => (used.has(c) ? 0 : Math.min(LEAST, EMPTY + 7 * Math.min(6, text.length))));
    const left = width - gutter - empty.reduce((sum, x) => sum + x, 0);
    const wides = empty.map((x) => x || Math.max(LEAST, left / Math.max(1, used.size)));
    let x = gutter;
    return { wides, lefts: wides.map((wide) => { const own = x; x += wide; return own; }), right: x };
  }

  /*
   * Nodes flow through the cell of their site and position, the strongest first; a label takes the room that it needs,
   * so no two overlap. Returns the place of each node, of each site and of each column.
   */
  function place(data, shown, labels, width) {
    const { row, column, name } = data.nodes, narrow = width < NARROW;
    const gutter = narrow ? 0 : GUTTER, above = narrow ? 16 : 0;
    const { wides, lefts, right } = columnsOf(data, shown, width, gutter);
    const cells = new Map(), lines = data.sites.map(() => 1), where = [];
    for (const i of shown) {
      const wide = wides[column[i]], text = clipped(labels[name[i]] || "", room(wide)), need = SLOT + (text ? text.length * LETTER + 8 : 0);
      const key = `${row[i]},${column[i]}`, cell = cells.get(key) || { line: 0, used: 0, ends: [] };
      if (cell.used > 0 && cell.used + need > wide) { cell.line++; cell.used = 0; }
      where[i] = { cell, line: cell.line, x: cell.used + SLOT / 2, text };
      cell.used += need;
      cell.ends[cell.line] = cell.used;
      cells.set(key, cell);
      lines[row[i]] = Math.max(lines[row[i]], cell.line + 1);
    }
    const heights = lines.map((n) => n * SLOT + PAD + above);
    const height = HEAD + heights.reduce((sum, h) => sum + h, 0) + FOOT;
    let bottom = height - FOOT;
    const bottoms = heights.map((h) => { const own = bottom; bottom -= h; return own; });
    for (const i of shown) {
      const { cell, line, x, text } = where[i];
      where[i] = {
        x: lefts[column[i]] + (wides[column[i]] - cell.ends[line]) / 2 + x,
        y: bottoms[row[i]] - PAD / 2 - SLOT * (line + 0.5), text,
      };
    }
    return { where, bottoms, heights, wides, lefts, gutter, width: right, height, narrow };
  }

  const radius = (size, largest) => 3.2 + 6.3 * Math.sqrt(largest ? Math.min(1, size / largest) : 0);

  /* The path of an edge: it leaves upwards and arrives from below. */
  function curve(a, b) {
    const bend = Math.max(12, Math.abs(a.y - b.y) / 2);
    const at = (x) => x.toFixed(1);
    return `M${at(a.x)} ${at(a.y)}C${at(a.x)} ${at(a.y - bend)} ${at(b.x)} ${at(b.y + bend)} ${at(b.x)} ${at(b.y)}`;
  }

  /* The node that lies in a direction: near along it, and little aside. */
  function next(from, direction, shown, where) {
    const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[direction];
    let best = from, least = Infinity;
    for (const i of shown) {
      const x = where[i].x - where[from].x, y = where[i].y - where[from].y;
      const along = x * dx + y * dy, aside = Math.abs(x * dy) + Math.abs(y * dx);
      if (i !== from && along > 1 && along + 3 * aside < least) { least = along + 3 * aside; best = i; }
    }
    return best;
  }

  return { place, radius, curve, next, clipped, HEAD };
})();
