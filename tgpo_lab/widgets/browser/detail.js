// The detail of one token: both top-k lists, and what one step of each method would do to the logits.

function detailPanel(ctx) {
  const body = make("div", { class: "detail-body" });
  const element = make("aside", { class: "detail", role: "region", "aria-label": "Detail of one token" }, body);
  let shown = "";
  let ownScales = false;

  function clear() {
    shown = "";
    body.replaceChildren(
      make("p", { class: "hint" }, "Point at a token, or move to one with the arrow keys, to see what student and teacher say there."),
      make("p", { class: "hint keys" }, ...keys()),
    );
  }

  function show(response, position, locked) {
    const key = `${response.name}/${response.step}/${position}/${locked}/${ownScales}`;
    if (key === shown) return;
    shown = key;
    body.replaceChildren(
      heading(ctx, response, position, locked),
      numbers(response, position),
      topLists(ctx, response, position),
      updateBars(ctx, response, position, ownScales, (own) => {
        ownScales = own;
        show(response, position, locked);
        body.querySelector(".own-scales input").focus();
      }),
    );
  }

  clear();
  return { element, show, clear };
}

function keys() {
  const entries = [["← → ↑ ↓", "move"], ["Enter", "lock"], ["Shift+→", "extend"], ["Esc", "clear"], ["D", "next difference"], ["T", "take the teacher’s token"]];
  return entries.flatMap(([key, does], index) => [index ? " · " : "", make("kbd", { text: key }), ` ${does}`]);
}

function heading(ctx, response, position, locked) {
  const written = response.tokens[position];
  const proposed = response.best[position];
  const line = make("div", { class: "detail-head" });
  line.append(
    make("span", { class: "place", text: `${ctx.scene.runs.length > 1 ? `${ctx.scene.runs[response.run]}, ` : ""}${response.label}, token ${position + 1} of ${response.tokens.length}` }),
    make("code", { class: "big", text: ctx.text(written) }),
    make("span", { class: "state", text: locked ? "locked" : "" }),
  );
  if (written === proposed) {
    line.append(make("span", { class: "quiet", text: "The teacher would write the same." }));
  } else {
    line.append(takeButton(ctx, response, position, proposed, "Take the teacher’s token "));
  }
  return line;
}

function takeButton(ctx, response, position, token, words) {
  const button = make("button", { type: "button", class: words ? "take" : "take small", "aria-label": `${words || "Take "}${ctx.text(token)} at token ${position + 1}` });
  if (words) button.append(words, make("code", { text: ctx.text(token) }));
  else button.append("take");
  if (!ctx.live) {
    button.disabled = true;
    button.title = "The student can go on only in a running notebook.";
  }
  button.addEventListener("click", () => ctx.take(response.name, position, token));
  return button;
}

function numbers(response, position) {
  const [student, teacher] = response.logprobs.map((values) => numeric(values[position]));
  const value = (name) => formatNumber(numeric(response.columns[name][position]));
  const rows = [
    ["log πθ", formatNumber(student)],
    ["log πT", formatNumber(teacher)],
    ["reward of RKL", value("token_reward")],
    ["entropy of student", value("student_entropy")],
    ["of teacher", value("teacher_entropy")],
    ["advantage", formatNumber(numeric(response.advantage))],
    ["w", formatNumber(numeric(response.guidance_weight))],
  ];
  return make("p", { class: "numbers" }, ...rows.map(([name, text]) => make("span", {}, make("span", { class: "quiet", text: name }), ` ${text}`)));
}

function topLists(ctx, response, position) {
  const box = make("div", { class: "top-lists" });
  ["Student", "Teacher"].forEach((who, index) => {
    const ids = response.top[index][position];
    const logprobs = response.top_logprobs[index][position].map(numeric);
    const table = make("table", {}, make("caption", { text: `${who}: most probable tokens` }));
    table.append(
      make("thead", {}, make("tr", {}, ...["", "token", "probability", "log", ""].map((text, column) => make("th", { scope: "col", text, "aria-label": ["rank", null, null, "log-probability in nats", "take"][column] })))),
    );
    const rows = make("tbody");
    ids.forEach((id, rank) => {
      const written = id === response.tokens[position];
      const proposed = id === response.best[position];
      const row = make("tr", { class: [written && "is-written", proposed && "is-proposed"].filter(Boolean).join(" ") });
      const name = make("td", { class: "name" }, make("code", { text: ctx.text(id) }));
      if (written) name.append(make("span", { class: "mark", text: "written" }));
      if (proposed) name.append(make("span", { class: "mark teacher", text: "teacher’s" }));
      const probability = make("td", { class: "probability" });
      const bar = make("span", { class: "share" });
      bar.style.width = `${Math.min(100, 100 * Math.exp(logprobs[rank]))}%`;
      probability.append(bar, make("span", { class: "figure", text: formatProbability(logprobs[rank]) }));
      row.append(
        make("td", { class: "rank", text: rank + 1 }),
        name,
        probability,
        make("td", { class: "log", text: formatNumber(logprobs[rank]) }),
        make("td", {}, written ? "" : takeButton(ctx, response, position, id, "")),
      );
      rows.append(row);
    });
    table.append(rows);
    box.append(table);
  });
  return box;
}

/** Bars to both sides of 0, on one scale, or each method on its own: guidance is small beside an advantage. */
function updateBars(ctx, response, position, ownScales, onScales) {
  const tokens = response.compared[position];
  const updates = response.updates[position].map((values) => values.map(numeric));
  const choice = make("input", { type: "checkbox" });
  choice.checked = ownScales;
  choice.addEventListener("change", () => onScales(choice.checked));
  const title = make("div", { class: "updates-title" }, make("span", { text: "What one step would add to the logits, before the division by the tokens of a batch" }), make("label", { class: "own-scales" }, choice, " each method on its own scale"));
  const table = make("table", { class: "updates", "aria-label": "Logit updates of one step" });
  const head = make("tr", {}, make("th", { scope: "col", text: "token" }));
  const largest = updates.map((values) => Math.max(...values.map((value) => (Number.isFinite(value) ? Math.abs(value) : 0))));
  const full = ownScales ? largest : largest.map(() => Math.max(...largest));
  ctx.scene.methods.forEach(([, label], method) => {
    head.append(make("th", { scope: "col" }, label, make("span", { class: "unit", text: largest[method] ? `scale ±${formatNumber(full[method])}` : "no update" })));
  });
  table.append(make("thead", {}, head));
  const rows = make("tbody");
  tokens.forEach((id, index) => {
    const name = make("th", { scope: "row", class: "name" }, make("code", { text: ctx.text(id) }));
    if (id === response.tokens[position]) name.append(make("span", { class: "mark", text: "written" }));
    if (id === response.best[position]) name.append(make("span", { class: "mark teacher", text: "teacher’s" }));
    const row = make("tr", {}, name);
    updates.forEach((values, method) => {
      const value = values[index];
      const bar = make("span", { class: value < 0 ? "bar down" : "bar up" });
      const share = full[method] ? Math.min(1, Math.abs(value) / full[method]) : 0;
      bar.style.width = `${50 * (Number.isFinite(share) ? share : 1)}%`;
      row.append(make("td", { class: "move" }, make("span", { class: "track" }, bar), make("span", { class: "figure", text: formatUpdate(value) })));
    });
    rows.append(row);
  });
  table.append(rows);
  return make("div", {}, title, make("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Logit updates" }, table));
}

function formatUpdate(value) {
  if (value === 0) return "0";
  return (value > 0 ? "+" : "") + formatNumber(value);
}
