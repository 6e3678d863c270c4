"""What the doctor says: findings one by one, each with what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Literal

from ..diagnostics.pair_card import PairCard, card_markdown
from ..errors import InputError
from ..loop.out_of_memory import OutOfMemoryError
from ..teachers.prompt_logprobs import TeacherServerError
from .memory_estimate import MemoryEstimate

LEVELS = ("ok", "warning", "refused")


class ExaminationEnded(Exception):
    """Something was refused without which nothing further can be looked at."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Literal["ok", "warning", "refused"]
    """ok; warning: it may go wrong; refused: it cannot work."""
    subject: str
    text: str
    """What was found, with both sides named where there are two."""
    change: str = ""
    """What to change; empty where nothing has to be."""


@dataclass
class Diagnosis:
    """All findings of one examination, in the order in which they were made."""

    findings: list[Finding] = field(default_factory=list)
    memory: MemoryEstimate | None = None
    card: PairCard | None = None
    run_finished: bool = False
    """Whether the run that was to go on has made all its steps."""

    def add(self, level: Literal["ok", "warning", "refused"], subject: str, text: str, change: str = "") -> None:
        """Add a finding."""
        self.findings.append(Finding(level, subject, text, change))

    @contextmanager
    def refused_as(self, subject: str) -> Iterator[None]:
        """What is refused in this block is a finding about ``subject``, and the last one.

        Raises:
            ExaminationEnded: something was.
        """
        try:
            yield
        except (InputError, OutOfMemoryError, TeacherServerError) as error:
            self.add("refused", subject, str(error))
            raise ExaminationEnded from error

    @property
    def status(self) -> int:
        """0 if all is well, 1 with warnings, 2 if something was refused: the command's exit status."""
        return max((LEVELS.index(finding.level) for finding in self.findings), default=0)

    def as_dict(self) -> dict:
        """Plain values, for JSON."""
        return {
            "status": self.status,
            "findings": [asdict(finding) for finding in self.findings],
            "memory": self.memory.parts if self.memory is not None else None,
            "card": self.card.as_dict() if self.card is not None else None,
        }

    def __str__(self) -> str:
        """The report."""
        width = max((len(finding.subject) for finding in self.findings), default=0)
        lines = []
        for finding in self.findings:
            lines.append(f"{finding.level:7}  {finding.subject:{width}}  {finding.text}")
            if finding.change:
                lines.append(f"{'':7}  {'':{width}}  → {finding.change}")
        if self.card is not None:
            lines += ["", card_markdown(self.card).rstrip()]
        counts = {level: sum(f.level == level for f in self.findings) for level in LEVELS}
        verdict = ("This run can start.", "This run can start; see the warnings.", "This run cannot work.")[self.status]
        if self.run_finished and self.status < 2:
            verdict = "This run is finished."
        lines += ["", f"{verdict} {counts['ok']} ok, {counts['warning']} warnings, {counts['refused']} refused."]
        return "\n".join(lines)
