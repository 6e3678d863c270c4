// The bar above the tokens: quantity, view, step, play, branches; and the legend.

const PLAY_PAUSE = 900; // milliseconds a step stays before the next is asked for

function controlBar(ctx, model) {
  const quantity = labelled("Colour", make("select", {}));
  const view = labelled("View", make("select", {}, make("option", { value: "tokens", text: "tokens" }), make("option", { value: "heatmap", text: "all responses" })));
  const sort = labelled("Sort", make("select", {}, ...Object.entries(SORTS).map(([value, [text]]) => make("option", { value, text }))));
  const slider = make("input", { type: "range", min: "0", step: "1" });
  const step = labelled("Step", slider);
  const shown = make("output", { class: "step-shown" });
  step.append(shown);
  const play = make("button", { type: "button", class: "play", text: "Play" });
  const fresh = make("input", { type: "checkbox" });
  const freshLabel = make("label", { class: "check", title: "Off: the responses that are shown now are judged by the student of every step." }, fresh, "new responses at each step");
  const beside = make("button", { type: "button", text: "Open another beside" });
  const undo = make("button", { type: "button", text: "Undo branch" });
  const element = make("div", { class: "controls", role: "group", "aria-label": "Guidance explorer" }, quantity, view, sort, step, play, freshLabel, beside, undo);
  let timer = null;

  const set = (name, value) => {
    model.set(name, value);
    model.save_changes();
  };
  quantity.querySelector("select").addEventListener("change", (event) => set("quantity", event.target.value));
  view.querySelector("select").addEventListener("change", (event) => set("view", event.target.value));
  sort.querySelector("select").addEventListener("change", (event) => set("sort", event.target.value));
  slider.addEventListener("input", () => ctx.goTo(ctx.scene.steps[Number(slider.value)]));
  fresh.addEventListener("change", () => set("fresh", fresh.checked));
  undo.addEventListener("click", () => ctx.send({ kind: "undo" }));
  beside.addEventListener("click", () => {
    const open = model.get("opened");
    const last = ctx.find(open[open.length - 1]);
    const other = ctx.scene.responses.find((response) => response.run === last?.run && !open.includes(response.name));
    if (other) ctx.open([...open, other.name]);
  });
  play.addEventListener("click", () => (timer === null ? start() : stop()));

  function start() {
    const steps = ctx.scene.steps;
    if (ctx.scene.step === steps[steps.length - 1]) ctx.goTo(steps[0]);
    timer = setInterval(advance, PLAY_PAUSE);
    play.textContent = "Pause";
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  }

  function advance() {
    if (ctx.scene.step !== model.get("step")) return; // Python has not answered yet
    const { steps } = ctx.scene;
    const at = steps.indexOf(ctx.scene.step);
    if (at + 1 >= steps.length) stop();
    else ctx.goTo(steps[at + 1]);
  }

  function update() {
    const { scene } = ctx;
    const choice = quantity.querySelector("select");
    if (choice.options.length !== scene.quantities.length) {
      choice.replaceChildren(...scene.quantities.map((found) => make("option", { value: found.name, text: found.label })));
    }
    choice.value = ctx.quantity().name;
    view.querySelector("select").value = model.get("view");
    sort.querySelector("select").value = model.get("sort");
    sort.hidden = model.get("view") !== "heatmap";
    beside.hidden = model.get("view") !== "tokens" || scene.responses.length < 2;
    const several = scene.steps.length > 1;
    step.hidden = play.hidden = !several;
    freshLabel.hidden = !several || !scene.can_sample;
    slider.max = String(scene.steps.length - 1);
    const at = scene.steps.indexOf(model.get("step"));
    slider.value = String(Math.max(0, at));
    slider.setAttribute("aria-valuetext", `step ${scene.steps[Math.max(0, at)]}`);
    shown.textContent = `${scene.steps[Math.max(0, at)]} of ${scene.steps[scene.steps.length - 1]}`;
    fresh.checked = scene.fresh;
    fresh.disabled = !ctx.live;
    undo.disabled = !scene.can_undo || !ctx.live;
    undo.hidden = !ctx.live;
  }

  return { element, update, stop };
}

/** A control with its name before it; the name alone, where the label's text would include the choices. */
function labelled(text, control) {
  control.setAttribute("aria-label", text);
  return make("label", {}, make("span", { text }), control);
}

/** The colour scale of the quantity with its ends named. */
function legend(ctx) {
  const quantity = ctx.quantity();
  const box = make("div", { class: "legend", role: "img" });
  const values = quantity.offset ? [0, 1] : (quantity.signed ? [-4, -3, -2, -1, 0, 1, 2, 3, 4] : [0, 1, 2, 3, 4]).map((part) => (part * quantity.full) / 4);
  const scale = make("span", { class: "scale" });
  values.forEach((value, index) => {
    const limit = quantity.offset ? "" : index === values.length - 1 ? "≥ " : index === 0 && quantity.signed ? "≤ " : "";
    const text = quantity.offset ? (value ? "agree" : "differ") : limit + formatLegend(value);
    scale.append(make("span", { class: `level-${levelOf(quantity, value)}`, text }));
  });
  const low = quantity.offset ? "" : quantity.low;
  const high = quantity.offset ? "" : quantity.high;
  box.setAttribute("aria-label", `Colour scale of ${quantity.label}${quantity.unit ? ` in ${quantity.unit}` : ""}, from ${quantity.low} to ${quantity.high}`);
  box.append(make("span", { class: "end", text: low }), scale, make("span", { class: "end", text: high }), make("span", { class: "unit", text: quantity.unit }));
  return box;
}

function formatLegend(value) {
  return Number(value.toPrecision(3)).toString().replace("-", "−");
}
