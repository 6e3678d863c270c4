"""Program of test_trl_trainer.py: a short run in as many processes as it was launched with.

python tests/trl_process.py STUDENT TEACHER OUTPUT MARK SEVEN OPTIONS PROMPT …
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import test_trl_trainer as shared
from safetensors.torch import save_file


def main(student: str, teacher: str, output: str, mark: str, seven: str, options: str, *prompts: str) -> None:
    """Train, and leave the weights and the log in the output folder."""
    shared.MARK, shared.SEVEN = int(mark), int(seven)
    pair = SimpleNamespace(student=Path(student), teacher=Path(teacher))
    trainer = shared.make_trainer(pair, Path(output), list(prompts), **json.loads(options))
    trainer.train()
    if trainer.accelerator.is_main_process:
        state = trainer.accelerator.unwrap_model(trainer.model).state_dict()
        save_file({name: value.clone() for name, value in state.items()}, Path(output) / "end.safetensors")
        (Path(output) / "log.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main(*sys.argv[1:])
