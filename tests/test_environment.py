"""The files that describe the environment agree with each other, with the code and with what is installed."""

import ast
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RUNTIME = [Requirement(text) for text in PROJECT["dependencies"]]
EXTRAS = [Requirement(text) for texts in PROJECT["optional-dependencies"].values() for text in texts]
SOURCES = sorted((ROOT / "tgpo_lab").rglob("*.py"))
PROVIDERS = packages_distributions()


def names(requirements: list[Requirement]) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements}


def read_constraints() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pinned_versions(name: str) -> list[Version]:
    """The versions that constraints.txt names for a package: one, if the file is right."""
    return [
        Version(specifier.version)
        for constraint in read_constraints()
        if canonicalize_name(constraint.name) == canonicalize_name(name)
        for specifier in constraint.specifier
    ]


def lower_bound(specifiers: SpecifierSet) -> Version:
    (bound,) = (Version(specifier.version) for specifier in specifiers if specifier.operator == ">=")
    return bound


def read_conda_environment() -> dict:
    return yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))


class ImportFinder(ast.NodeVisitor):
    """Collects the top-level names of absolute imports, apart by whether importing the file runs them."""

    def __init__(self) -> None:
        self.at_import: set[str] = set()
        self.on_call: set[str] = set()
        self._function_depth = 0

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level == 0:
            self._add(node.module)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._function_depth += 1
        self.generic_visit(node)
        self._function_depth -= 1

    visit_AsyncFunctionDef = visit_FunctionDef

    def _add(self, module: str) -> None:
        top = module.partition(".")[0]
        if top != "tgpo_lab" and top not in sys.stdlib_module_names:
            (self.on_call if self._function_depth else self.at_import).add(top)


def find_imports(source: str) -> ImportFinder:
    finder = ImportFinder()
    finder.visit(ast.parse(source))
    return finder


def undeclared(modules: set[str], declared: set[str]) -> list[str]:
    """The modules that no declared package provides. A package not installed is taken to be named like its module."""
    return sorted(
        module
        for module in modules
        if declared.isdisjoint(canonicalize_name(name) for name in PROVIDERS.get(module, [module]))
    )


def test_every_constraint_is_one_exact_public_version():
    for constraint in read_constraints():
        specifiers = list(constraint.specifier)
        exact = len(specifiers) == 1 and specifiers[0].operator == "==" and "*" not in specifiers[0].version
        assert exact and "+" not in specifiers[0].version, (
            f"constraints.txt has {str(constraint)!r}: write it as name==version, without a local version such as +cpu."
        )
    constrained = [canonicalize_name(constraint.name) for constraint in read_constraints()]
    repeated = sorted({name for name in constrained if constrained.count(name) > 1})
    assert not repeated, f"constraints.txt pins these more than once, keep one line for each: {', '.join(repeated)}"


# vLLM takes an older transformers than the pinned one, so it lives in an environment of its own (docs/sampling.md).
PINNED = RUNTIME + [extra for extra in EXTRAS if extra.name != "vllm"]


@pytest.mark.parametrize("requirement", PINNED, ids=str)
def test_every_dependency_has_one_pin_within_its_range(requirement: Requirement):
    pins = pinned_versions(requirement.name)
    assert len(pins) == 1, (
        f"constraints.txt has {len(pins)} pins for {requirement.name}, a dependency in pyproject.toml: give it one."
    )
    assert requirement.specifier.contains(pins[0], prereleases=True), (
        f"constraints.txt pins {requirement.name} to {pins[0]}, outside pyproject.toml's {requirement.specifier}: "
        "widen the range or move the pin."
    )


def test_torch_is_pinned_to_the_tested_release():
    assert pinned_versions("torch") == [Version("2.13.0")], (
        "constraints.txt no longer pins torch to 2.13.0, which the recorded results were made with: restore it, "
        "or make the results again and change this test."
    )


def test_conda_users_get_the_same_environment():
    environment = read_conda_environment()
    assert environment["name"] == PROJECT["name"], f"Set name: {PROJECT['name']} in environment.yml."
    assert environment["channels"] == ["conda-forge"], (
        "environment.yml must use the channel conda-forge and no other: defaults is licensed, and pytorch is retired."
    )
    (pip_lines,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip_lines == ["-c constraints.txt", "-e .[dev]"], (
        "The pip section of environment.yml must be the two lines `-c constraints.txt` and `-e .[dev]`, "
        "so that conda users get the pinned packages and nothing else."
    )


def test_conda_asks_for_the_same_oldest_python():
    conda_requirements = [
        Requirement(text) for text in read_conda_environment()["dependencies"] if isinstance(text, str)
    ]
    (conda_python,) = (requirement for requirement in conda_requirements if requirement.name == "python")
    assert lower_bound(conda_python.specifier) == lower_bound(SpecifierSet(PROJECT["requires-python"])), (
        f"environment.yml asks for python {conda_python.specifier} and pyproject.toml for "
        f"{PROJECT['requires-python']}: give both the same lower bound."
    )


def test_installed_versions_equal_the_pins():
    differences = []
    for constraint in read_constraints():
        try:
            installed = Version(version(constraint.name))
        except PackageNotFoundError:
            continue  # Not everything is needed everywhere: trl is an extra, some packages serve one system only.
        if not constraint.specifier.contains(installed, prereleases=True):
            differences.append(f"{constraint} (installed: {installed})")
    assert not differences, (
        "The installed packages differ from constraints.txt: "
        + ", ".join(differences)
        + ". Run `make distclean setup`, or pin the new versions if they are meant."
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_import_is_declared(path: Path):
    imports = find_imports(path.read_text(encoding="utf-8"))
    extra = ROOT / "tgpo_lab" / "integrations" in path.parents  # a bridge is imported by those who have its extra
    missing = undeclared(imports.at_import, names(RUNTIME + EXTRAS if extra else RUNTIME))
    assert not missing, (
        f"{path.relative_to(ROOT)} imports {', '.join(missing)}: add the package to the dependencies in "
        "pyproject.toml and its version to constraints.txt."
    )
    missing = undeclared(imports.on_call, names(RUNTIME + EXTRAS))
    assert not missing, (
        f"A function in {path.relative_to(ROOT)} imports {', '.join(missing)}: add the package to the dependencies "
        "or to an extra in pyproject.toml, and its version to constraints.txt."
    )


def test_import_scan_tells_required_from_optional():
    imports = find_imports(
        "import os, torch.nn\n"
        "from . import sibling\n"
        "from tgpo_lab import losses\n"
        "class Model:\n"
        "    import numpy\n"
        "    async def compare(self):\n"
        "        from trl.trainer import GKDTrainer\n"
    )
    assert (imports.at_import, imports.on_call) == ({"torch", "numpy"}, {"trl"})
    assert undeclared({"yaml", "no_such_module"}, {"pyyaml"}) == ["no_such_module"]


@pytest.mark.parametrize(("goal", "offline"), [("setup", True), ("wheelhouse", False)])
def test_only_the_folder_that_is_filled_already_is_installed_from(tmp_path, goal, offline):
    # A fresh clone: what is not there yet is made, and with -n only said.
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    said = subprocess.run(
        ["make", "-n", goal, "WHEELHOUSE=wheels", f"PYTHON={sys.executable}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    ).stdout
    installs = [line for line in said.splitlines() if "pip install" in line]
    assert len(installs) == 2 and all(("--no-index" in line) is offline for line in installs), said
