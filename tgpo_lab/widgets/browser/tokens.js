// A card with one response, token by token.

const SPOKEN_TOKENS = 3; // of each list, for those who hear it

/**
 * ctx: what all parts share
 *   scene, quantity(), live            what is shown
 *   text(id)                           visible text of a token
 *   point(name, position)              pointer or focus is on a token
 *   select(name, positions)            lock these tokens, none to clear
 *   selection()                        {name, positions}
 *   take(name, position, token)        branch off
 *   open(names)                        responses to show as cards
 */
function tokenCard(ctx, response, others, onChoose, onClose) {
  const listId = `${ctx.id}-list-${response.name.replace(":", "-")}`;
  const choice = make("select", { "aria-label": "Response in this card" });
  for (const other of others) {
    const option = make("option", { value: other.name, text: optionLabel(ctx, other) });
    option.selected = other.name === response.name;
    choice.append(option);
  }
  choice.addEventListener("change", () => onChoose(choice.value));
  const close = make("button", { type: "button", class: "quiet-button", "aria-label": `Close ${response.label}`, text: "×" });
  close.addEventListener("click", onClose);
  const list = make("div", {
    class: "tokens",
    role: "listbox",
    id: listId,
    "aria-multiselectable": "true",
    "aria-label": `Tokens of ${describe(ctx, response)}`,
  });
  const element = make(
    "section",
    { class: "card", "aria-label": describe(ctx, response), "data-response": response.name },
    make("header", {}, ctx.scene.runs.length > 1 ? make("strong", { class: "run", text: ctx.scene.runs[response.run] }) : "", choice, rewardBadge(response), onClose ? close : ""),
    facts(ctx, response),
    list,
  );

  const tokens = fillTokens(ctx, response, list);
  let active = 0;
  tokens[0]?.setAttribute("tabindex", "0");

  function activate(position, focus) {
    tokens[active].setAttribute("tabindex", "-1");
    active = position;
    tokens[active].setAttribute("tabindex", "0");
    if (focus) tokens[active].focus({ preventScroll: false });
  }

  function positionOf(event) {
    const token = event.target.closest(".token");
    return token && list.contains(token) ? Number(token.dataset.position) : -1;
  }

  function toggle(position, extend, add) {
    const now = ctx.selection();
    const mine = now.name === response.name ? now.positions : [];
    let next;
    if (extend && mine.length) {
      const from = mine[0] <= position ? mine[0] : position;
      const to = mine[0] <= position ? position : mine[mine.length - 1];
      next = Array.from({ length: to - from + 1 }, (_, index) => from + index);
    } else if (add) {
      next = mine.includes(position) ? mine.filter((p) => p !== position) : [...mine, position].sort((a, b) => a - b);
    } else {
      next = mine.length === 1 && mine[0] === position ? [] : [position];
    }
    ctx.select(response.name, next);
  }

  list.addEventListener("pointerover", (event) => {
    const position = positionOf(event);
    if (position >= 0) ctx.point(response.name, position, false);
  });
  list.addEventListener("focusin", (event) => {
    const position = positionOf(event);
    if (position < 0) return;
    event.target.setAttribute("aria-label", spokenToken(ctx, response, position));
    ctx.point(response.name, position, true);
  });
  list.addEventListener("click", (event) => {
    const position = positionOf(event);
    if (position < 0) return;
    activate(position, true);
    toggle(position, event.shiftKey, event.ctrlKey || event.metaKey);
  });
  list.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !tokens.length) return;
    const key = event.key;
    let next = -1;
    if (key === "ArrowRight") next = active + 1;
    else if (key === "ArrowLeft") next = active - 1;
    else if (key === "ArrowDown") next = onNextLine(tokens, active, 1);
    else if (key === "ArrowUp") next = onNextLine(tokens, active, -1);
    else if (key === "Home") next = 0;
    else if (key === "End") next = tokens.length - 1;
    else if (key.toLowerCase() === "d") next = nextDifference(response, active, event.shiftKey ? -1 : 1);
    else if (key === "Enter" || key === " ") toggle(active, event.shiftKey, key === " ");
    else if (key === "Escape") ctx.select(response.name, []);
    else if (key.toLowerCase() === "t") ctx.take(response.name, active, response.best[active]);
    else return;
    event.preventDefault();
    if (next < 0 || next >= tokens.length) return;
    activate(next, true);
    if (event.shiftKey && key.startsWith("Arrow")) toggle(next, true, false);
  });

  return {
    element,
    response,
    focus: (position) => tokens.length && activate(Math.min(position, tokens.length - 1), true),
    recolor: () => colorTokens(ctx, response, tokens),
    mark: (positions) => {
      const marked = new Set(positions);
      for (const token of list.querySelectorAll('[aria-selected="true"]')) token.setAttribute("aria-selected", "false");
      for (const position of marked) tokens[position]?.setAttribute("aria-selected", "true");
    },
  };
}

/** Fill the list with tokens; the teacher's token stands above one that differs from it. */
function fillTokens(ctx, response, list) {
  const fragment = document.createDocumentFragment();
  const tokens = response.tokens.map((id, position) => {
    const token = document.createElement("span");
    token.className = "token";
    token.setAttribute("role", "option");
    token.setAttribute("aria-selected", "false");
    token.setAttribute("tabindex", "-1");
    token.dataset.position = position;
    if (response.best[position] !== id) {
      token.classList.add("differs");
      const proposal = document.createElement("span");
      proposal.className = "proposal";
      proposal.textContent = ctx.text(response.best[position]);
      token.append(proposal);
    }
    const written = document.createElement("span");
    const text = ctx.text(id);
    written.className = "written";
    written.textContent = text;
    if (response.branch?.position === position) token.classList.add("taken");
    token.append(written);
    fragment.append(token);
    if (text.endsWith("↵")) fragment.append(document.createElement("br"));
    return token;
  });
  colorTokens(ctx, response, tokens);
  list.append(fragment);
  return tokens;
}

function colorTokens(ctx, response, tokens) {
  const quantity = ctx.quantity();
  const values = response.columns[quantity.name];
  tokens.forEach((token, position) => {
    token.lastChild.className = `written level-${levelOf(quantity, numeric(values[position]))}`;
  });
}

function nextDifference(response, from, direction) {
  for (let at = from + direction; at >= 0 && at < response.tokens.length; at += direction) {
    if (response.best[at] !== response.tokens[at]) return at;
  }
  return -1;
}

/** The token of the next line (or the one before) that stands nearest below (or above). */
function onNextLine(tokens, from, direction) {
  const bottom = (token) => token.offsetTop + token.offsetHeight;
  const centre = (token) => token.offsetLeft + token.offsetWidth / 2;
  let at = from + direction;
  while (at >= 0 && at < tokens.length && Math.abs(bottom(tokens[at]) - bottom(tokens[from])) < 4) at += direction;
  if (at < 0 || at >= tokens.length) return -1;
  const line = bottom(tokens[at]);
  let best = at;
  for (; at >= 0 && at < tokens.length && Math.abs(bottom(tokens[at]) - line) < 4; at += direction) {
    if (Math.abs(centre(tokens[at]) - centre(tokens[from])) < Math.abs(centre(tokens[best]) - centre(tokens[from]))) best = at;
  }
  return best;
}

function rewardBadge(response) {
  if (response.reward === null) return make("span", { class: "badge", text: "not judged" });
  const right = response.reward > 0;
  return make("span", { class: `badge ${right ? "right" : "wrong"}`, text: `reward ${formatNumber(response.reward, Number.isInteger(response.reward) ? 0 : 2)}` });
}

function facts(ctx, response) {
  const line = make("p", { class: "facts" });
  line.append("Prompt ", make("code", { text: shortened(response.prompt) }));
  if (response.answer !== null) line.append(" · right answer ", make("code", { text: response.answer }));
  line.append(` · ${response.tokens.length} tokens, ${response.finished ? "ended by itself" : "cut at the limit"}`);
  line.append(` · student of step ${response.step}`);
  if (response.branch) {
    const { parent_label: parent, position, token, right, continuations } = response.branch;
    line.append(` · leaves ${parent} at token ${position + 1} with `, make("code", { text: ctx.text(token) }));
    if (right !== null) line.append(make("strong", { text: ` · ${right} of ${continuations} continuations right` }));
  }
  return line;
}

function shortened(text) {
  return text.length > 160 ? `${text.slice(0, 160)} …` : text;
}

/** Model text within a sentence: letters written from right to left must not reorder what stands around it. */
function isolated(text) {
  return `\u2068${text}\u2069`;
}

/** Name of a response in a list of choices. */
function optionLabel(ctx, response) {
  const reward = response.reward === null ? "" : `, reward ${formatNumber(response.reward, 0)}`;
  if (!response.branch) return `${response.label}${reward}`;
  return `${response.label} at token ${response.branch.position + 1}: ${isolated(ctx.text(response.branch.token))}${reward}`;
}

function describe(ctx, response) {
  const run = ctx.scene.runs.length > 1 ? `${ctx.scene.runs[response.run]}, ` : "";
  return `${run}${response.label}, prompt ${isolated(shortened(response.prompt))}`;
}

/** What a token is called: its place, its text and the teacher's. */
function spokenToken(ctx, response, position) {
  const differs = response.best[position] !== response.tokens[position];
  const teacher = differs ? `the teacher would write ${isolated(ctx.text(response.best[position]))}` : "the teacher would write the same";
  return `Token ${position + 1} of ${response.tokens.length}: ${isolated(ctx.text(response.tokens[position]))}; ${teacher}.`;
}

/** Its value of the quantity that colours. */
function spokenValue(ctx, response, position) {
  const quantity = ctx.quantity();
  return `${quantity.label} ${formatNumber(numeric(response.columns[quantity.name][position]))} ${quantity.unit}`.trim();
}

/** The detail in a sentence: the value, and the heads of both lists. */
function spokenDetail(ctx, response, position) {
  const lists = ["Student", "Teacher"].map((who, index) => {
    const probability = (rank) => formatProbability(numeric(response.top_logprobs[index][position][rank]));
    const head = response.top[index][position].slice(0, SPOKEN_TOKENS);
    return `${who}: ${head.map((id, rank) => `${isolated(ctx.text(id))} ${probability(rank)}`).join(", ")}.`;
  });
  return `${spokenValue(ctx, response, position)}. ${lists.join(" ")}`;
}
