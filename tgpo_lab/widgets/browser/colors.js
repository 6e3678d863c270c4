// Numbers as text, values as colours, and the host's theme.

const LEVELS = 33; // as in token_colors.py

/** A number from Python; "Infinity" and "-Infinity" come as text. */
function numeric(value) {
  return value === null || value === undefined ? NaN : Number(value);
}

/** Two decimals; two significant digits of a small number; a true minus sign. */
function formatNumber(value, digits = 2) {
  if (Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  let text = value.toFixed(size >= 100 ? 0 : digits);
  if (size > 0 && size < 0.001) text = value.toExponential(1);
  else if (size > 0 && size < 0.1) text = Number(value.toPrecision(2)).toString();
  return text.replaceAll("-", "−");
}

/** A probability from its logarithm: 0.93, or 2e−6 where decimals would show nothing. */
function formatProbability(logprob) {
  const probability = Math.exp(logprob);
  if (probability >= 0.9995) return probability === 1 ? "1" : "≈ 1";
  if (probability >= 0.001) return probability.toFixed(3);
  if (probability === 0) return "0";
  return probability.toExponential(0).replace("-", "−");
}

/** Which of the colour levels a value has, 0 purple to LEVELS − 1 orange; −1 where there is no value. */
function levelOf(quantity, value) {
  if (Number.isNaN(value)) return -1;
  const place = Math.max(-1, Math.min(1, quantity.offset + (quantity.direction * value) / quantity.full));
  return Math.round(((place + 1) / 2) * (LEVELS - 1));
}

/** Rules for the levels' classes inside the element with this id. */
function levelRules(id, palette) {
  return palette
    .map(([background, text], level) => `#${id} .level-${level}{background-color:${background};color:${text}}`)
    .join("\n");
}

/** "light" or "dark": what the host says of itself, else the page's own background, else the system. */
function hostTheme(element) {
  const body = document.body;
  if (body.dataset.jpThemeLight) return body.dataset.jpThemeLight === "false" ? "dark" : "light";
  const kind = body.dataset.vscodeThemeKind || body.className;
  if (/vscode-(high-contrast-)?light/.test(kind)) return "light"; // its class list has vscode-high-contrast as well
  if (/vscode-(dark|high-contrast)/.test(kind)) return "dark";
  const { documentElement: page } = document;
  // Colab: html[theme=dark] is what its developers promise; nothing is promised for its light theme.
  if (page.hasAttribute("theme") || window.google?.colab) return page.getAttribute("theme") === "dark" ? "dark" : "light";
  if (["dark", "light"].includes(page.dataset.theme)) return page.dataset.theme;
  for (let node = element; node; node = node.parentElement) {
    const found = getComputedStyle(node).backgroundColor.match(/[\d.]+/g);
    if (found && (found.length < 4 || Number(found[3]) > 0.5)) {
      const [red, green, blue] = found.map(Number);
      return 0.2126 * red + 0.7152 * green + 0.0722 * blue < 128 ? "dark" : "light";
    }
  }
  return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}

/** Whether the host or the system asks for high contrast. */
function highContrast() {
  return /high-contrast/.test(document.body.dataset.vscodeThemeKind ?? "") || matchMedia("(prefers-contrast: more)").matches;
}

/** Call back when the theme may have changed; returns the function that stops it. */
function watchTheme(callback) {
  const observer = new MutationObserver(callback);
  const attributes = ["class", "style", "theme", "data-theme", "data-jp-theme-light", "data-vscode-theme-kind"];
  for (const node of [document.documentElement, document.body]) {
    observer.observe(node, { attributes: true, attributeFilter: attributes });
  }
  const system = ["(prefers-color-scheme: dark)", "(prefers-contrast: more)"].map((query) => matchMedia(query));
  for (const query of system) query.addEventListener("change", callback);
  return () => {
    observer.disconnect();
    for (const query of system) query.removeEventListener("change", callback);
  };
}

/** An element with attributes, properties (text, title, disabled, …) and children. All text goes in as text. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") element.textContent = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}
