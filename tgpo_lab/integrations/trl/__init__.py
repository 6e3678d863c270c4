"""TGPO inside TRL: :class:`TGPOTrainer`, a GRPOTrainer with teacher guidance (docs/trl.md).

Raises:
    ImportError: trl is missing, or not of the series that this was written for.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

SUPPORTED_SERIES = "1.16"
"""What is used of GRPOTrainer begins with an underscore and may change with any minor version: the batch that
``_generate_and_score_completions`` returns, the one call of the model in ``_compute_loss``, and its normaliser."""


def require_trl() -> None:
    """Refuse to go on without a trl that this was written for.

    Raises:
        ImportError: it is not installed, or of another series.
    """
    advice = f"tgpo_lab.integrations.trl needs trl {SUPPORTED_SERIES}: pip install 'tgpo-lab[trl]'."
    try:
        installed = version("trl")
    except PackageNotFoundError as error:
        raise ImportError(f"trl is not installed. {advice}") from error
    if installed.split(".")[:2] != SUPPORTED_SERIES.split("."):
        raise ImportError(f"trl {installed} is installed. {advice}")


require_trl()

from .config import TGPOConfig  # noqa: E402
from .trainer import TGPOTrainer  # noqa: E402

__all__ = ["SUPPORTED_SERIES", "TGPOConfig", "TGPOTrainer", "require_trl"]
