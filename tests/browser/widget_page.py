"""The explorer's module on a page without a kernel, loaded as anywidget loads it: from a blob."""

import json

from playwright.sync_api import Page

from tgpo_lab.widgets import GuidanceExplorer
from tgpo_lab.widgets.pages import module_source, style_source

LOAD = """async ({ source, style, state }) => {
  // First, so that the host's styles win where both are as specific.
  document.head.prepend(Object.assign(document.createElement("style"), { textContent: style }));
  const url = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
  const module = await import(url);
  const listeners = {};
  const changed = new Set();
  window.sent = [];
  const model = (window.model = {
    get: (name) => state[name],
    set: (name, value) => { state[name] = value; changed.add(name); },
    save_changes: () => {
      const names = [...changed];
      changed.clear();
      for (const name of names) for (const listener of listeners[`change:${name}`] ?? []) listener();
    },
    on: (event, listener) => (listeners[event] ??= []).push(listener),
    off: () => {},
    send: (content) => window.sent.push(content),
    receive: (values) => {
      for (const [name, value] of Object.entries(values)) model.set(name, value);
      model.save_changes();
    },
  });
  module.default.render({ model, el: document.getElementById("widget"), experimental: {} });
}"""
STATE = ("scene", "quantity", "view", "sort", "step", "fresh", "opened", "selected_response", "selected_positions",
         "message")  # fmt: skip


def load_widget(page: Page, explorer: GuidanceExplorer) -> None:
    """Show the explorer's state in the element #widget.

    ``window.model`` stands in for Python: ``window.sent`` has what the page has asked it for, ``model.get(name)`` what
    the page has set, and ``model.receive({name: value})`` is an answer.
    """
    state = json.loads(json.dumps({name: getattr(explorer, name) for name in STATE}))
    page.evaluate(LOAD, {"source": module_source(), "style": style_source(), "state": state})
