"""Names on the Hugging Face hub, found in a made-up cache of downloads without a network, by real trainings.

Models lie in the cache as huggingface_hub puts them there. A dataset lies there as ``datasets`` keeps it once it was
loaded (its offline mode reads nothing else): its own builder, given the repository's name, writes it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml
from datasets.packaged_modules.json.json import Json

from tgpo_lab.models.pairs import pair_paths

ROOT = Path(__file__).resolve().parent.parent
REVISION = "0123456789abcdef0123456789abcdef01234567"
# The teacher writes, answers and is known by its weights; the student writes and learns.
SETTINGS = ["--quiet", "--method", "luffy", "--teacher-cache", "traces", "--steps", "1", "--prompts-per-step", "2",
            "--group-size", "4", "--max-new-tokens", "12", "--evaluate-every", "0",
            "--evaluation-prompts", "4"]  # fmt: skip


def put_model(home: Path, name: str, folder: Path) -> None:
    """A folder's model as a download: refs/main names a snapshot, whose files are links to blobs."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    (repository / "blobs").mkdir()
    for file in folder.iterdir():
        blob = repository / "blobs" / f"blob-of-{file.name}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)


def put_dataset(home: Path, name: str, folder: Path) -> None:
    """A folder's prompts as a dataset that was loaded before."""
    owner, own_name = name.split("/")
    files = {split: [str(folder / f"{split}.jsonl")] for split in ("train", "validation", "test")}
    builder = Json(cache_dir=str(home / "elsewhere"), dataset_name=own_name, data_files=files)
    place = home / "datasets" / f"{owner}___{own_name}" / builder.config.name / str(builder.config.version) / REVISION
    builder.download_and_prepare(output_dir=str(place))


def trained(output: Path, home: Path, *arguments: object) -> tuple[dict[str, float], dict[str, object]]:
    """One step in a process of its own: its row of numbers without times, and what the model card says to the hub."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
        environment.pop(name, None)
    output.mkdir()
    done = subprocess.run([sys.executable, "-m", "tgpo_lab", "train", *SETTINGS, "--output", output, *arguments],
                          env=environment, cwd=output, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    row = json.loads((output / "metrics.jsonl").read_text().splitlines()[0])
    card = (output / "checkpoints" / "step-000001" / "README.md").read_text()
    return {name: value for name, value in row.items() if "seconds" not in name}, yaml.safe_load(card.split("---")[1])


def test_names_on_the_hub_give_the_run_that_the_same_files_give_as_folders(tmp_path):
    student, teacher, prompts = pair_paths("near")
    home = tmp_path / "home"
    put_model(home, "some-org/some-student", student)
    put_model(home, "some-org/some-teacher", teacher)
    put_dataset(home, "some-org/some-dataset", prompts)
    row, card = trained(tmp_path / "named", home, "--student", "some-org/some-student",
                        "--teacher", "some-org/some-teacher", "--dataset", "some-org/some-dataset")  # fmt: skip
    assert (card["base_model"], card["datasets"]) == ("some-org/some-student", ["some-org/some-dataset"])
    (about,) = (tmp_path / "named" / "traces").rglob("about.json")
    assert json.loads(about.read_text())["teacher"] == f"some-org/some-teacher@{REVISION}"
    from_folders, _ = trained(tmp_path / "folders", tmp_path / "nothing", "--student", student, "--teacher", teacher,
                              "--dataset", prompts)  # fmt: skip
    assert row == from_folders and row["tokens"] > 0
