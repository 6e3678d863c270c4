// Many responses at once: a row each, a coloured cell for each token.

const SORTS = {
  sampled: ["as sampled", () => 0],
  reward: ["reward, highest first", (a, b) => (b.reward ?? -1) - (a.reward ?? -1)],
  length: ["length, longest first", (a, b) => b.tokens.length - a.tokens.length],
  mean: ["mean of the quantity, highest first", null],
  departure: ["first departure from the teacher, latest first", (a, b) => firstDeparture(b) - firstDeparture(a)],
};
const ROW_HEIGHT = 16;

function heatmapView(ctx, sort, onOpen, onStatus) {
  const responses = sorted(ctx, sort);
  const longest = Math.max(1, ...responses.map((response) => response.tokens.length));
  const list = make("div", { class: "heatmap-rows", role: "listbox", "aria-label": `${responses.length} responses, a row each; Enter opens one` });
  const element = make("div", { class: "heatmap" }, axis(longest), list);
  const rows = responses.map((response, index) => {
    const canvas = make("canvas", { "aria-hidden": "true", height: ROW_HEIGHT });
    const row = make(
      "div",
      { class: "heatmap-row", role: "option", "aria-selected": "false", tabindex: index ? "-1" : "0", "aria-label": rowLabel(ctx, response), "data-response": response.name },
      make("span", { class: "row-label" }, rowTitle(ctx, response), response.reward === null ? "" : make("span", { class: response.reward > 0 ? "badge right" : "badge wrong", text: formatNumber(response.reward, 0) })),
      canvas,
    );
    row.addEventListener("click", () => onOpen(response.name));
    row.addEventListener("focus", () => onStatus(rowLabel(ctx, response), true));
    canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect();
      const position = Math.floor(((event.clientX - box.left) / box.width) * response.tokens.length);
      if (position >= 0 && position < response.tokens.length) onStatus(`${rowTitle(ctx, response)}. ${spokenToken(ctx, response, position)} ${spokenValue(ctx, response, position)}.`, false);
    });
    list.append(row);
    return { row, canvas, response };
  });

  list.addEventListener("keydown", (event) => {
    const at = rows.findIndex(({ row }) => row === document.activeElement);
    const moves = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: rows.length - 1 };
    if (event.key === "Enter" || event.key === " ") onOpen(rows[at].response.name);
    else if (!(event.key in moves)) return;
    event.preventDefault();
    const next = rows[moves[event.key]];
    if (!next) return;
    rows.forEach(({ row }) => row.setAttribute("tabindex", "-1"));
    next.row.setAttribute("tabindex", "0");
    next.row.focus();
  });

  /** Paint once the element has a width. */
  function paint(palette) {
    const quantity = ctx.quantity();
    const width = Math.max(longest * 2, (rows[0]?.canvas.parentElement.clientWidth ?? 600) - labelWidth(rows[0]));
    const cell = Math.min(width / longest, 16); // pixels of a token
    for (const { canvas, response } of rows) {
      canvas.width = Math.max(1, Math.round(cell * response.tokens.length));
      canvas.style.width = `${canvas.width}px`;
      const pen = canvas.getContext("2d");
      pen.clearRect(0, 0, canvas.width, ROW_HEIGHT);
      response.columns[quantity.name].forEach((value, position) => {
        const level = levelOf(quantity, numeric(value));
        if (level < 0) return;
        pen.fillStyle = palette[level][0];
        const left = Math.round(position * cell);
        pen.fillRect(left, 0, Math.max(1, Math.round((position + 1) * cell) - left - (cell > 5 ? 1 : 0)), ROW_HEIGHT);
      });
    }
    element.querySelector(".axis-line").style.width = `${Math.round(cell * longest)}px`;
  }

  return { element, paint };
}

function labelWidth(row) {
  return row ? row.row.firstChild.offsetWidth + 12 : 0;
}

function axis(longest) {
  const line = make("div", { class: "axis-line" }, make("span", { text: "token 1" }), make("span", { text: `${longest}` }));
  return make("div", { class: "axis", "aria-hidden": "true" }, make("span", { class: "row-label" }), line);
}

function sorted(ctx, sort) {
  const responses = [...ctx.scene.responses];
  const [, order] = SORTS[sort] ?? SORTS.sampled;
  if (order) return responses.sort(order);
  const name = ctx.quantity().name;
  const means = new Map(responses.map((response) => [response.name, meanOf(response.columns[name])]));
  return responses.sort((a, b) => means.get(b.name) - means.get(a.name));
}

function meanOf(values) {
  const finite = values.map(numeric).filter(Number.isFinite);
  return finite.reduce((sum, value) => sum + value, 0) / Math.max(1, finite.length);
}

/** Position of the first token that the teacher would not have written; the length where there is none. */
function firstDeparture(response) {
  const found = response.tokens.findIndex((id, position) => id !== response.best[position]);
  return found < 0 ? response.tokens.length : found;
}

function rowTitle(ctx, response) {
  return ctx.scene.runs.length > 1 ? `${ctx.scene.runs[response.run]}, ${response.label}` : response.label;
}

function rowLabel(ctx, response) {
  const quantity = ctx.quantity();
  const reward = response.reward === null ? "not judged" : `reward ${formatNumber(response.reward, 0)}`;
  return `${rowTitle(ctx, response)}: ${reward}, ${response.tokens.length} tokens, mean of ${quantity.label} ${formatNumber(meanOf(response.columns[quantity.name]))} ${quantity.unit}`.trim();
}
