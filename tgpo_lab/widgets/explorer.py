"""The guidance explorer: see, token by token, what the teacher says where the student goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import anywidget
import pandas as pd
import traitlets

from ..errors import InputError
from ..explorer.explored_response import ExploredResponse
from ..explorer.token_text import token_of_text
from ..files import require_writable_folder, write_text
from ..models.pairs import Pair
from .pages import fallback_page, module_source, standalone_page, style_source
from .quantities import BY_NAME, scaled_quantities
from .scene import build_scene
from .sources import Source, explore, title_of


class GuidanceExplorer(anywidget.AnyWidget):
    """One widget that shows responses token by token with what student and teacher say, and takes other tokens.

        explorer = GuidanceExplorer(pair, "47+85+12=")            # the pair's own student
        explorer = GuidanceExplorer(pair, Path("runs/tgpo"))      # the student of every kept step of a run
        explorer = GuidanceExplorer(pair, {"RKL": "runs/rkl", "TGPO": "runs/tgpo"})  # two runs side by side
        explorer.take_token(0)                                    # the teacher's token at the first place
        explorer.branches[-1].reward, explorer.selected_frame()

    What a reader does on the page changes the attributes below, and setting them changes the page. For a slider with
    many steps train with ``checkpoint_every=5, keep_checkpoints=0``: by default a run keeps its last two checkpoints.
    """

    _esm = module_source()
    _css = style_source()

    scene = traitlets.Dict().tag(sync=True)
    """What the page shows, see :func:`tgpo_lab.widgets.scene.build_scene`. Read only."""
    quantity = traitlets.Unicode("token_reward").tag(sync=True)
    """Name of the quantity that colours tokens, see :data:`tgpo_lab.widgets.quantities.QUANTITIES`."""
    view = traitlets.Enum(["tokens", "heatmap"], "tokens").tag(sync=True)
    sort = traitlets.Enum(["sampled", "reward", "length", "mean", "departure"], "sampled").tag(sync=True)
    """Order of the heatmap's rows."""
    step = traitlets.Int(0).tag(sync=True)
    """Step of the run whose student is shown; one of :attr:`steps`."""
    fresh = traitlets.Bool(True).tag(sync=True)
    """Whether every step's student writes its own responses; off, those shown at that moment are judged by all."""
    opened = traitlets.List(traitlets.Unicode()).tag(sync=True)
    """Names of the responses that are open as cards, such as ``0:2`` (sample 3 of the first run) or ``0:b1``."""
    selected_response = traitlets.Unicode("").tag(sync=True)
    """Name of the response in which tokens are locked, or empty."""
    selected_positions = traitlets.List(traitlets.Int()).tag(sync=True)
    """Positions of the locked tokens, from 0."""
    message = traitlets.Unicode("").tag(sync=True)
    """What could not be done, in one sentence, or empty."""

    def __init__(
        self,
        pair: Pair,
        source: Source,
        *,
        prompt: str | Sequence[str] | None = None,
        answer: str | Sequence[str | None] | None = None,
        samples: int = 8,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int = 8,
        reward: str | None = None,
        seed: int = 0,
    ):
        """Sample (unless rollouts are given) and show the first step.

        Args:
            pair: brings teacher and tokenizer, and the student where no run is given.
            source: a prompt or several, :class:`~tgpo_lab.rollouts.Rollouts`, the folder of a run (or its result), or
                label → folder for two runs side by side. A text that names no folder is a prompt.
            prompt: for runs: what to answer; by default the first held-out prompt of the run.
            answer: the right answer to each prompt (each row of rollouts); by default looked up in the data.
            samples: responses to each prompt, a group of GRPO; the same number of continuations for each branch.
            max_new_tokens: responses are cut after so many tokens; by default as in the run, or 80.
            temperature: of sampling, 0 is greedy; by default as in the run, or 1.
            top_k: length of the two lists.
            reward: name of the reward; by default as in the run, or ``marked_answer``.
            seed: decides the samples.

        Raises:
            InputError: nothing to look at, no run there, a damaged checkpoint, impossible numbers.
        """
        self._exploration = explore(
            pair,
            source,
            prompt=prompt,
            answer=answer,
            samples=samples,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            reward=reward,
            seed=seed,
        )
        self._written_at: int | None = None
        self._title = title_of(self._exploration)
        first = self.steps[0]
        shown = self._exploration.responses(first)
        self._quantities = scaled_quantities({id(found.view): found.view for found in shown}.values())
        runs = range(len(self._exploration.histories))
        starts = [next(found.name for found in shown if found.run == run) for run in runs]
        super().__init__(scene=self._scene(first), step=first, opened=starts, fresh=self._exploration.samples_anew)
        self.observe(self._show_step, "step")
        self.observe(self._change_fresh, "fresh")
        self.on_msg(self._receive)

    # ── Read and act from Python ─────────────────────────────────────────────────────────────────
    @property
    def steps(self) -> list[int]:
        """Steps on the slider."""
        return self._exploration.steps

    @property
    def responses(self) -> list[ExploredResponse]:
        """Responses of the step shown, then the branches taken there."""
        step = self.step if self.step in self.steps else self.steps[0]
        return [*self._exploration.responses(step, self._written_at), *self._exploration.branches_at(step)]

    @property
    def branches(self) -> list[ExploredResponse]:
        """Branches of all steps, oldest first."""
        return list(self._exploration.branches)

    def response(self, name: str | None = None) -> ExploredResponse:
        """A response of the step shown by its name; by default the first card's.

        Raises:
            InputError: there is none of that name.
        """
        return self._exploration.find(name or self.opened[0], self.step, self._written_at)

    def take_token(
        self, position: int, token: int | str | None = None, response: str | None = None
    ) -> ExploredResponse:
        """Write another token at ``position`` (from 0) and let the student go on; the branch opens beside the old one.

        Args:
            position: of the token to replace.
            token: id or text of the token to take; by default the teacher's most probable.
            response: name of the response; by default the first card's.

        Raises:
            InputError: the response, the position or the token does not exist, or it stands there already.
        """
        parent = response or self.opened[0]
        if isinstance(token, str):
            token = token_of_text(self._exploration.pair.tokenizer, token)
        branch = self._exploration.take_token(parent, position, token, step=self.step, written_at=self._written_at)
        opened = [name for name in self.opened if name != branch.name]
        place = opened.index(parent) + 1 if parent in opened else len(opened)
        self._refresh([*opened[:place], branch.name, *opened[place:]])
        return branch

    def undo_branch(self) -> ExploredResponse | None:
        """Forget the newest branch and return it; None if there is none."""
        branch = self._exploration.undo_branch()
        if branch is not None:
            self._refresh([name for name in self.opened if name != branch.name])
        return branch

    def selected_frame(self) -> pd.DataFrame:
        """The locked tokens as a table, or all tokens of the first card; see
        :meth:`tgpo_lab.explorer.guidance_view.GuidanceView.frame`.

        The column ``response`` has the response's name, ``step`` the step of its student.
        """
        found = self.response(self.selected_response or None)
        frame = found.frame(self.selected_positions if self.selected_response else None)
        frame.insert(0, "step", found.step)
        frame.insert(0, "response", found.name)
        return frame

    def responses_frame(self) -> pd.DataFrame:
        """One row for each response of the step shown, see :meth:`ExploredResponse.summary`.

        Compare branches here: ``parent``, ``position``, ``taken`` and ``right_continuations`` say where one leaves
        which response with which token, and how many of its ``continuations`` were right.
        """
        labels = [history.label for history in self._exploration.histories]
        return pd.DataFrame([{**found.summary(), "run": labels[found.run]} for found in self.responses])

    def save_html(self, path: str | Path, *, every_step: bool = True) -> Path:
        """Write one HTML file that works without a kernel and without a network, whole or not at all.

        Args:
            path: of the file.
            every_step: with all steps of the slider, computing those not seen yet; otherwise with the one shown.

        Raises:
            InputError: the folder cannot be written, or a checkpoint is damaged.
        """
        path = Path(path)
        require_writable_folder(path.parent)
        if path.is_dir():
            raise InputError(f"{path} is a folder. Give the name of an HTML file.")
        steps = self.steps if every_step else [self.step]
        scenes = {step: {**self._scene(step), "steps": steps} for step in steps}
        state = {
            name: getattr(self, name)
            for name in ("quantity", "view", "sort", "step", "fresh", "opened", "selected_response")
        }
        state |= {"selected_positions": self.selected_positions, "message": "", "scene": scenes[self.step]}
        write_text(path, standalone_page(self._title, state, scenes))
        return path

    def _repr_mimebundle_(self, **options: object) -> tuple[dict, dict]:
        """The widget for a live page, and beside it what a page without a kernel can show."""
        found = super()._repr_mimebundle_(**options)
        bundle, metadata = found if isinstance(found, tuple) else (found or {}, {})
        html = fallback_page(self.scene, self.quantity, self.opened)
        return {**bundle, "text/plain": f"GuidanceExplorer: {self._title}", "text/html": html}, metadata

    # ── What the page asks for ───────────────────────────────────────────────────────────────────
    @traitlets.validate("quantity")
    def _check_quantity(self, proposal: traitlets.Bunch) -> str:
        if proposal["value"] not in BY_NAME:
            raise traitlets.TraitError(f"quantity must be one of {', '.join(BY_NAME)}, but is {proposal['value']!r}.")
        return proposal["value"]

    @traitlets.validate("step")
    def _check_step(self, proposal: traitlets.Bunch) -> int:
        if proposal["value"] not in self.steps:
            kept = ", ".join(map(str, self.steps))
            raise traitlets.TraitError(f"step must be one of those that were kept ({kept}), not {proposal['value']}.")
        return proposal["value"]

    @traitlets.validate("opened")
    def _check_opened(self, proposal: traitlets.Bunch) -> list[str]:
        names, there = proposal["value"], [entry["name"] for entry in self.scene["responses"]]
        if not names or not set(names) <= set(there):
            raise traitlets.TraitError(f"opened must name one or more of {', '.join(there)}, but is {names}.")
        return names

    @traitlets.validate("fresh")
    def _check_fresh(self, proposal: traitlets.Bunch) -> bool:
        return proposal["value"] and self._exploration.samples_anew

    def _show_step(self, _change: traitlets.Bunch) -> None:
        self._guarded(self._refresh)

    def _change_fresh(self, change: traitlets.Bunch) -> None:
        self._written_at = None if change["new"] or not self._exploration.samples_anew else self.step
        self._guarded(self._refresh)

    def _receive(self, _widget: object, content: dict, _buffers: object) -> None:
        if content.get("kind") == "take":
            self._guarded(
                lambda: self.take_token(int(content["position"]), int(content["token"]), str(content["name"]))
            )
        elif content.get("kind") == "undo":
            self._guarded(self.undo_branch)

    def _guarded(self, action: Callable[[], object]) -> None:
        """Do it; what cannot be done is said on the page, where its traceback would not be seen."""
        self.message = ""
        try:
            action()
        except InputError as error:
            self.message = str(error)

    def _refresh(self, opened: list[str] | None = None) -> None:
        scene = self._scene(self.step)
        there = {entry["name"]: entry for entry in scene["responses"]}
        kept = [name for name in (self.opened if opened is None else opened) if name in there]
        for run in range(len(scene["runs"])):  # of every run one card stays
            if not any(there[name]["run"] == run for name in kept):
                kept.append(next(name for name, entry in there.items() if entry["run"] == run))
        self.selected_response, self.selected_positions = "", []
        with self.hold_sync():  # cards and scene belong together
            self.scene = scene
            self.opened = kept

    def _scene(self, step: int) -> dict[str, object]:
        exploration = self._exploration
        return build_scene(
            [*exploration.responses(step, self._written_at), *exploration.branches_at(step)],
            self._quantities,
            [history.label for history in exploration.histories],
            step=step,
            steps=exploration.steps,
            fresh=self._written_at is None and exploration.samples_anew,
            can_sample=exploration.samples_anew,
            can_undo=bool(exploration.branches),
        )
