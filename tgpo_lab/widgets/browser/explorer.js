// The explorer as a whole: cards, detail, heatmap, and their connection with Python.

let explorers = 0;

function render({ model, el }) {
  explorers += 1;
  const id = `tgpo-explorer-${explorers}-${Math.random().toString(36).slice(2, 8)}`;
  const root = make("div", { class: "tgpo-explorer", id });
  const levels = make("style");
  const legendBox = make("div", { class: "legend-box" });
  const cardsBox = make("div", { class: "cards" });
  const heatmapBox = make("div", { class: "heatmap-box" });
  const status = make("p", { class: "status" });
  const spoken = make("div", { class: "spoken", role: "status", "aria-live": "polite" });
  const message = make("p", { class: "message", role: "alert", hidden: true });
  let cards = [];
  let heatmap = null;
  let pointed = null; // {name, position}
  let theme = "light";
  let awaitedBranch = false;
  let drawing = false;
  let selecting = false;

  const ctx = {
    id,
    live: !model.standalone,
    get scene() {
      return model.get("scene");
    },
    quantity: () => ctx.scene.quantities.find((found) => found.name === model.get("quantity")) ?? ctx.scene.quantities[0],
    text: (token) => ctx.scene.texts[token],
    find: (name) => ctx.scene.responses.find((response) => response.name === name),
    selection: () => ({ name: model.get("selected_response"), positions: model.get("selected_positions") }),
    point,
    select(name, positions) {
      model.set("selected_response", positions.length ? name : "");
      model.set("selected_positions", positions);
      model.save_changes();
    },
    take(name, position, token) {
      const response = ctx.find(name);
      if (!ctx.live) return say("The student can go on only in a running notebook.");
      if (token === response.tokens[position]) return say("That token stands here already.");
      awaitedBranch = true;
      root.classList.add("busy");
      ctx.send({ kind: "take", name, position, token });
    },
    open(names) {
      model.set("opened", names);
      model.save_changes();
    },
    goTo(step) {
      if (ctx.live && ctx.scene.step !== step) root.classList.add("busy");
      model.set("step", step);
      model.save_changes();
      bar.update();
    },
    send: (content) => model.send(content),
  };
  const detail = detailPanel(ctx);
  const bar = controlBar(ctx, model);
  const main = make("div", { class: "main" }, cardsBox, heatmapBox, detail.element);
  root.append(levels, bar.element, legendBox, message, main, status, spoken);
  el.replaceChildren(root);

  function say(text) {
    spoken.textContent = text;
  }

  /** Show the detail of a token, unless another one is locked. */
  function point(name, position, aloud) {
    pointed = { name, position };
    const { positions } = ctx.selection();
    if (!positions.length) detail.show(ctx.find(name), position, false);
    if (aloud) say(spokenDetail(ctx, ctx.find(name), position));
  }

  function drawSelection() {
    const { name, positions } = ctx.selection();
    for (const card of cards) card.mark(card.response.name === name ? positions : []);
    const response = ctx.find(name);
    if (response && positions.length) {
      const position = positions[positions.length - 1];
      detail.show(response, position, true);
      say(`Locked: token ${position + 1}. ${spokenDetail(ctx, response, position)}`);
    } else if (pointed && ctx.find(pointed.name)?.tokens.length > pointed.position) {
      detail.show(ctx.find(pointed.name), pointed.position, false);
    } else {
      detail.clear();
    }
  }

  function drawCards() {
    const names = model.get("opened").filter((name) => ctx.find(name));
    const focused = cards.findIndex((card) => card.element.contains(document.activeElement));
    const at = pointed?.position ?? 0;
    cards = names.map((name, index) => {
      const response = ctx.find(name);
      const others = ctx.scene.responses.filter((other) => other.run === response.run);
      const replace = (chosen) => ctx.open(names.map((old, place) => (place === index ? chosen : old)));
      const close = names.length > 1 ? () => ctx.open(names.filter((_, place) => place !== index)) : null;
      return tokenCard(ctx, response, others, replace, close);
    });
    cardsBox.replaceChildren(...cards.map((card) => card.element));
    cardsBox.classList.toggle("several", cards.length > 1);
    if (awaitedBranch && cards.some((card) => card.response.branch)) {
      const branch = ctx.scene.responses[ctx.scene.responses.length - 1];
      const card = cards.find((found) => found.response.name === branch.name);
      if (card && branch.branch) {
        awaitedBranch = false;
        card.focus(branch.branch.position);
        const share = branch.branch.right === null ? "" : `; ${branch.branch.right} of ${branch.branch.continuations} continuations right`;
        say(`${branch.label} with ${ctx.text(branch.branch.token)}: ${branch.reward === null ? "not judged" : `reward ${branch.reward}`}${share}.`);
      }
    } else if (focused >= 0 && cards[focused]) {
      cards[focused].focus(at);
    }
  }

  function drawHeatmap() {
    heatmap = heatmapView(
      ctx,
      model.get("sort"),
      (name) => {
        model.set("opened", [name]);
        model.set("view", "tokens");
        model.save_changes();
        queueMicrotask(() => cards[0]?.focus(0));
      },
      (text, aloud) => {
        status.textContent = text;
        if (aloud) say(text);
      },
    );
    heatmapBox.replaceChildren(heatmap.element);
    heatmap.paint(ctx.scene.palettes[theme]);
  }

  function draw() {
    const tokens = model.get("view") === "tokens";
    cardsBox.hidden = detail.element.hidden = !tokens;
    heatmapBox.hidden = tokens;
    main.classList.toggle("with-detail", tokens);
    status.textContent = "";
    bar.update();
    legendBox.replaceChildren(legend(ctx));
    if (tokens) {
      drawCards();
      drawSelection();
    } else {
      drawHeatmap();
    }
  }

  /** Draw once, however many values have changed together. */
  function drawSoon() {
    if (drawing) return;
    drawing = true;
    queueMicrotask(() => {
      drawing = false;
      draw();
    });
  }

  /** Once, although name and positions change one after the other. */
  function drawSelectionSoon() {
    if (selecting) return;
    selecting = true;
    queueMicrotask(() => {
      selecting = false;
      if (!drawing && model.get("view") === "tokens") drawSelection();
    });
  }

  function drawTheme() {
    root.dataset.contrast = highContrast() ? "more" : "normal";
    const found = hostTheme(root.parentElement ?? document.body);
    if (found === root.dataset.theme) return;
    theme = root.dataset.theme = found;
    levels.textContent = levelRules(id, ctx.scene.palettes[theme]);
    if (heatmap && model.get("view") === "heatmap") heatmap.paint(ctx.scene.palettes[theme]);
  }

  function drawMessage() {
    message.textContent = model.get("message");
    message.hidden = !message.textContent;
    root.classList.remove("busy");
    awaitedBranch = awaitedBranch && message.hidden;
  }

  const listeners = {
    "change:scene": () => {
      root.classList.remove("busy");
      drawSoon();
    },
    "change:opened": drawSoon,
    "change:view": drawSoon,
    "change:sort": drawSoon,
    "change:step": () => bar.update(),
    "change:quantity": () => {
      bar.update();
      legendBox.replaceChildren(legend(ctx));
      for (const card of cards) card.recolor();
      if (model.get("view") === "heatmap") drawHeatmap();
    },
    "change:selected_positions": drawSelectionSoon,
    "change:selected_response": drawSelectionSoon,
    "change:message": drawMessage,
  };
  for (const [event, listener] of Object.entries(listeners)) model.on(event, listener);
  // The host's shortcuts would act on the notebook while keys are meant for a token. JupyterLab looks at a key after the
  // page has; Notebook 7 before, and its shortcuts are for the element that has the focus: there that one must say so.
  root.addEventListener("keydown", (event) => event.stopPropagation());
  root.addEventListener("focusin", (event) => event.target.setAttribute("data-lm-suppress-shortcuts", "true"));
  const stopWatching = watchTheme(drawTheme);
  const resized = new ResizeObserver(() => {
    drawTheme(); // only now it is in the page and has a background behind it
    if (heatmap && model.get("view") === "heatmap") heatmap.paint(ctx.scene.palettes[theme]);
  });
  resized.observe(root);
  drawTheme();
  draw();
  drawMessage();
  return () => {
    bar.stop();
    stopWatching();
    resized.disconnect();
    for (const [event, listener] of Object.entries(listeners)) model.off(event, listener);
  };
}

/** What stands in for Python in a saved file: the scenes of all steps, and the values a reader changes. */
function standaloneModel({ state, scenes }) {
  const listeners = {};
  const changed = new Set();
  const values = { ...state };
  const model = {
    standalone: true,
    get: (name) => values[name],
    set(name, value) {
      if (values[name] === value) return;
      values[name] = value;
      changed.add(name);
      if (name === "step") {
        const names = new Set(scenes[value].responses.map((response) => response.name));
        values.scene = scenes[value];
        values.opened = values.opened.filter((opened) => names.has(opened));
        if (!values.opened.length) values.opened = [scenes[value].responses[0].name];
        values.selected_positions = [];
        values.selected_response = "";
        changed.add("scene");
      }
    },
    save_changes() {
      const names = [...changed];
      changed.clear();
      for (const name of names) for (const listener of listeners[`change:${name}`] ?? []) listener();
    },
    on: (event, listener) => (listeners[event] ??= []).push(listener),
    off: (event, listener) => {
      listeners[event] = (listeners[event] ?? []).filter((other) => other !== listener);
    },
    send: () => {},
  };
  return model;
}
