/* Elements, and the tip beside one of them. Text only ever becomes text nodes and attributes, never markup. */
const dom = (() => {
  const $ = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";

  function el(tag, options = {}, ...children) {
    const { text, on, vars, ...attributes } = options;
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    for (const [name, value] of Object.entries(vars || {})) made.style.setProperty(name, value);
    for (const [name, value] of Object.entries(on || {})) made.addEventListener(name, value);
    if (text !== undefined) made.textContent = text;
    made.append(...children.filter((child) => child !== null));
    return made;
  }

  function svg(tag, attributes, ...children) {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, String(value));
    made.append(...children);
    return made;
  }

  const chip = (text) => el("span", { class: "t chip", text });
  const missing = (text = "not measured") => el("span", { class: "na", text });

  function showTip(target) {
    const tip = $("tip"), box = target.getBoundingClientRect();
    tip.textContent = target.dataset.tip;
    tip.hidden = false;
    target.setAttribute("aria-describedby", "tip");
    const wide = tip.offsetWidth, high = tip.offsetHeight;
    tip.style.left = `${Math.max(4, Math.min(innerWidth - wide - 4, box.left + box.width / 2 - wide / 2))}px`;
    tip.style.top = `${box.top - high - 6 < 0 ? box.bottom + 6 : box.top - high - 6}px`;
  }

  function hideTip() {
    $("tip").hidden = true;
    document.querySelector("[aria-describedby=tip]")?.removeAttribute("aria-describedby");
  }

  return { $, el, svg, chip, missing, showTip, hideTip };
})();
