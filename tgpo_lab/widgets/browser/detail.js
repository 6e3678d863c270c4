// The detail of one token: both top-k lists, and what one step of each method would do to the logits.
// Its elements are made once and filled anew for every token that is pointed at: with thousands of tokens on the page
// half a thousand new elements at every move of the pointer would be felt.

function detailPanel(ctx) {
  const hints = [
    make("p", { class: "hint" }, "Point at a token, or move to one with the arrow keys, to see what student and teacher say there."),
    make("p", { class: "hint keys" }, ...keys()),
  ];
  const body = make("div", { class: "detail-body" }, ...hints);
  const element = make("aside", { class: "detail", role: "region", "aria-label": "Detail of one token" }, body);
  const now = { response: null, position: -1, locked: false, take: (token) => ctx.take(now.response.name, now.position, token) };
  let parts = null;

  function clear() {
    now.response = null;
    body.replaceChildren(...hints);
  }

  function show(response, position, locked) {
    if (response === now.response && position === now.position && locked === now.locked) return;
    const empty = now.response === null;
    Object.assign(now, { response, position, locked });
    parts ??= [heading(ctx, now), numbers(now), topLists(ctx, now), updateBars(ctx, now)];
    if (empty) body.replaceChildren(...parts.map((part) => part.element));
    for (const part of parts) part.fill();
  }

  return { element, show, clear };
}

function keys() {
  const entries = [["← → ↑ ↓", "move"], ["Enter", "lock"], ["Space", "add"], ["Shift+→", "extend"], ["Esc", "clear"], ["D", "next difference"], ["T", "take the teacher’s token"]];
  return entries.flatMap(([key, does], index) => [index ? " · " : "", make("kbd", { text: key }), ` ${does}`]);
}

/** A place for text in an element; returns the function that fills it. */
function slot(element) {
  const node = document.createTextNode("");
  element.append(node);
  return (text) => {
    if (node.data !== text) node.data = text;
  };
}

function heading(ctx, now) {
  const [place, token, state, same] = [make("span", { class: "place" }), make("code", { class: "big" }), make("span", { class: "state" }), make("span", { class: "quiet", text: "The teacher would write the same." })];
  const [showPlace, showToken, showState] = [place, token, state].map(slot);
  const take = takeButton(ctx, now, "Take the teacher’s token ");
  const element = make("div", { class: "detail-head" }, place, token, state, same, take.element);
  return {
    element,
    fill() {
      const { response, position, locked } = now;
      const proposed = response.best[position];
      const run = ctx.scene.runs.length > 1 ? `${ctx.scene.runs[response.run]}, ` : "";
      showPlace(`${run}${response.label}, token ${position + 1} of ${response.tokens.length}`);
      showToken(ctx.text(response.tokens[position]));
      showState(locked ? "locked" : "");
      same.hidden = response.tokens[position] !== proposed;
      take.fill(same.hidden ? proposed : null);
    },
  };
}

/** A button that takes the token it was filled with; filled with null it is not there. */
function takeButton(ctx, now, words) {
  const element = make("button", { type: "button", class: words ? "take" : "take small" }, words || "take");
  const code = make("code");
  const showToken = slot(code);
  if (words) element.append(code);
  let token = null;
  element.addEventListener("click", () => now.take(token));
  if (!ctx.live) {
    element.disabled = true;
    element.title = "The student can go on only in a running notebook.";
  }
  return {
    element,
    fill(id) {
      token = id;
      element.hidden = id === null;
      if (id === null) return;
      showToken(ctx.text(id));
      element.setAttribute("aria-label", `${words || "Take "}${ctx.text(id)} at token ${now.position + 1}`);
    },
  };
}

function numbers(now) {
  const value = (name) => numeric(now.response.columns[name][now.position]);
  const entries = [
    ["log πθ", () => numeric(now.response.logprobs[0][now.position])],
    ["log πT", () => numeric(now.response.logprobs[1][now.position])],
    ["reward of RKL", () => value("token_reward")],
    ["entropy of student", () => value("student_entropy")],
    ["of teacher", () => value("teacher_entropy")],
    ["advantage", () => numeric(now.response.advantage)],
    ["w", () => numeric(now.response.guidance_weight)],
  ];
  const element = make("p", { class: "numbers" });
  const fills = entries.map(([name, number]) => {
    const entry = make("span", {}, make("span", { class: "quiet", text: name }), " ");
    const write = slot(entry);
    element.append(entry);
    return () => write(formatNumber(number()));
  });
  return { element, fill: () => fills.forEach((fill) => fill()) };
}

/** The name of a token in a table, with a mark where it is the written one or the teacher's. */
function nameCell(ctx, now, tag, attributes = {}) {
  const code = make("code");
  const showToken = slot(code);
  const written = make("span", { class: "mark", text: "written" });
  const proposed = make("span", { class: "mark teacher", text: "teacher’s" });
  return {
    element: make(tag, { class: "name", ...attributes }, code, " ", written, " ", proposed),
    fill(id) {
      showToken(ctx.text(id));
      written.hidden = id !== now.response.tokens[now.position];
      proposed.hidden = id !== now.response.best[now.position];
    },
  };
}

/** Student's and teacher's lists side by side; the written and the proposed token follow where a list lacks them. */
function topLists(ctx, now) {
  const element = make("div", { class: "top-lists" });
  const lists = ["Student", "Teacher"].map((who, index) => {
    const head = [["rank", ""], [null, "token"], [null, "probability"], ["log-probability in nats", "log"], ["take", ""]];
    const body = make("tbody");
    const table = make("table", {}, make("caption", { text: `${who}: most probable tokens` }), make("thead", {}, make("tr", {}, ...head.map(([label, text]) => make("th", { scope: "col", text, "aria-label": label })))), body);
    const rows = [];
    element.append(table);
    return () => {
      const { response, position } = now;
      const listed = response.top[index][position].map((id, rank) => [id, rank + 1, response.top_logprobs[index][position][rank]]);
      const marked = [
        [response.best[position], ...(index ? [1, response.top_logprobs[1][position][0]] : [response.proposal_ranks[position], response.proposal_logprobs[position]])],
        [response.tokens[position], response.ranks[index][position], response.logprobs[index][position]],
      ];
      for (const entry of marked) if (!listed.some(([id]) => id === entry[0])) listed.push(entry);
      while (rows.length < listed.length) rows.push(topRow(ctx, now, body));
      const length = response.top[index][position].length;
      rows.forEach((row, at) => row(listed[at], at >= length));
    };
  });
  return { element, fill: () => lists.forEach((fill) => fill()) };
}

/** A row of a list at the end of a table's body; returns the function that fills it, or hides it without an entry. */
function topRow(ctx, now, body) {
  const [rank, figure, log] = [make("td", { class: "rank" }), make("span", { class: "figure" }), make("td", { class: "log" })];
  const [showRank, showFigure, showLog] = [rank, figure, log].map(slot);
  const name = nameCell(ctx, now, "td");
  const bar = make("span", { class: "share" });
  const take = takeButton(ctx, now, "");
  const row = make("tr", {}, rank, name.element, make("td", { class: "probability" }, bar, figure), log, make("td", {}, take.element));
  body.append(row);
  return (entry, beyond) => {
    row.hidden = !entry;
    if (!entry) return;
    const [id, place, value] = entry;
    const logprob = numeric(value);
    const written = id === now.response.tokens[now.position];
    row.className = [written && "is-written", id === now.response.best[now.position] && "is-proposed", beyond && "beyond"].filter(Boolean).join(" ");
    showRank(String(place));
    name.fill(id);
    bar.style.width = `${Math.min(100, 100 * Math.exp(logprob))}%`;
    showFigure(formatProbability(logprob));
    showLog(formatNumber(logprob));
    take.fill(written ? null : id);
  };
}

/** Bars to both sides of 0, on one scale, or each method on its own: guidance is small beside an advantage. */
function updateBars(ctx, now) {
  const own = make("input", { type: "checkbox" });
  const title = make("div", { class: "updates-title" }, make("span", { text: "What one step would add to the logits, before the division by the tokens of a batch" }), make("label", { class: "own-scales" }, own, " each method on its own scale"));
  const head = make("tr", {}, make("th", { scope: "col", text: "token" }));
  const showScales = ctx.scene.methods.map(([, label]) => {
    const unit = make("span", { class: "unit" });
    head.append(make("th", { scope: "col" }, label, unit));
    return slot(unit);
  });
  const body = make("tbody");
  const table = make("table", { class: "updates", "aria-label": "Logit updates of one step" }, make("thead", {}, head), body);
  const rows = [];

  function fill() {
    const tokens = now.response.compared[now.position];
    const updates = now.response.updates[now.position].map((values) => values.map(numeric));
    const largest = updates.map((values) => Math.max(...values.map((value) => (Number.isFinite(value) ? Math.abs(value) : 0))));
    const full = own.checked ? largest : largest.map(() => Math.max(...largest));
    showScales.forEach((show, method) => show(largest[method] ? `scale ±${formatNumber(full[method])}` : "no update"));
    while (rows.length < tokens.length) rows.push(updateRow(ctx, now, body));
    rows.forEach((row, at) => row(tokens[at], updates.map((values) => values[at]), full));
  }

  own.addEventListener("change", fill);
  return { element: make("div", {}, title, make("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Logit updates" }, table)), fill };
}

function updateRow(ctx, now, body) {
  const name = nameCell(ctx, now, "th", { scope: "row" });
  const cells = ctx.scene.methods.map(() => {
    const [bar, figure] = [make("span", { class: "bar" }), make("span", { class: "figure" })];
    return { bar, show: slot(figure), cell: make("td", { class: "move" }, make("span", { class: "track" }, bar), figure) };
  });
  const row = make("tr", {}, name.element, ...cells.map(({ cell }) => cell));
  body.append(row);
  return (id, values, full) => {
    row.hidden = id === undefined;
    if (row.hidden) return;
    name.fill(id);
    cells.forEach(({ bar, show }, method) => {
      const value = values[method];
      const share = full[method] ? Math.min(1, Math.abs(value) / full[method]) : 0;
      bar.className = value < 0 ? "bar down" : "bar up";
      bar.style.width = `${50 * (Number.isFinite(share) ? share : 1)}%`;
      show(formatUpdate(value));
    });
  };
}

function formatUpdate(value) {
  if (value === 0) return "0";
  return (value > 0 ? "+" : "") + formatNumber(value);
}
