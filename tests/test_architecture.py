"""Who may import whom, and what no module may call, read off the syntax trees."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
ROOMS = ("teachers", "students", "rl_policy")
PACKAGES = (*ROOMS, "distill")
RECIPES = frozenset(
    f"distill.{name}" for name in ("build", "config", "recipe", "teacher", "teacher_config")
)
LEAVES = frozenset(
    f"distill.{package}{name}"
    for package, names in {
        "": "augmentation benchmarks checkpoint data errors intervals landmarks metrics progress "
        "provenance registry run_folder seeding stopping tasks",
        "matching.": "distiller losses measures projectors targets",
        "training.": "feedback",
        "caching.": "cache",
        "drawing.": "charts overlays plots",
        "probing.": "head_room layer_map linear_probe map_picture map_report",
        "evaluation.": "backbones correspondence counting depth footprint geometry_pictures "
        "inference linear neighbours parity pictures",
        "deployment.": "folder formats hub runtimes",
        "reporting.": "page",
        "costs.": "flops memory",
    }.items()
    for name in names.split()
)


def module_name(path: Path) -> str:
    parts = path.relative_to(CHECKOUT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {
    module_name(path): path
    for package in PACKAGES
    for path in sorted((CHECKOUT / package).rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in PATHS.items()}


def imports(tree: ast.AST) -> set[str]:
    """Every module of the repository that is imported anywhere in the tree, by its full name."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a module lies"
            module = str(node.module)
            # `from distill import data` names a module, `from distill.data import Resized` none.
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


GRAPH = {name: imports(tree) & TREES.keys() - {name} for name, tree in TREES.items()}


def unsafe_calls(tree: ast.AST) -> Iterator[str]:
    """Calls that may run code from a file or a string."""
    safe_loaders = {"yaml.SafeLoader", "yaml.CSafeLoader"} | {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and "yaml.SafeLoader" in map(ast.unparse, node.bases)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if (
            name in {"eval", "exec", "compile", "__import__", "os.system"}
            or name in {"yaml.unsafe_load", "yaml.full_load", "yaml.load_all"}
            or (name == "torch.load" and options.get("weights_only") != "True")
            or (name == "yaml.load" and options.get("Loader") not in safe_loaders)
            or options.get("shell") == "True"
            or options.get("allow_pickle") == "True"
            or options.get("trust_remote_code") == "True"
        ):
            yield ast.unparse(node)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_neither_each_other_nor_distill(room):
    others = {package for package in PACKAGES if package != room}
    for name, tree in TREES.items():
        if name.split(".")[0] == room:
            strangers = {found for found in imports(tree) if found.split(".")[0] in others}
            assert not strangers, f"{name} imports {strangers}"


def test_commands_are_imported_by_the_command_line_and_by_other_commands_alone():
    commands = {name for name in GRAPH if name.startswith("distill.commands.")}
    assert GRAPH["distill.cli"] >= commands
    for name, found in GRAPH.items():
        assert "distill.cli" not in found or name == "distill.__main__"
        if name != "distill.cli" and name not in commands:
            assert not found & commands, f"{name} imports {found & commands}"


def test_leaves_know_no_recipes():
    leaves = {name for name in GRAPH if name in LEAVES or name.startswith("distill.benchmarks.")}
    assert leaves >= LEAVES
    for name in leaves:
        knowing = GRAPH[name] & RECIPES
        assert not knowing, f"{name} imports {knowing}; hand it the fields that it needs"


def test_neither_modules_nor_packages_import_each_other():
    def package(name: str) -> str:
        return ".".join(name.split(".")[:2])

    packages: dict[str, set[str]] = {}
    for name, found in GRAPH.items():
        packages.setdefault(package(name), set()).update(map(package, found))
    for graph in (GRAPH, {name: found - {name} for name, found in packages.items()}):
        assert set(TopologicalSorter(graph).static_order()) == graph.keys()


def test_nothing_imports_experiments_or_tests():
    for name, tree in TREES.items():
        tops = {found.split(".")[0] for found in imports(tree)}
        assert not tops & {"experiments", "tests"}, name


@pytest.mark.parametrize("name", TREES)
def test_every_module_says_what_it_is(name):
    assert ast.get_docstring(TREES[name]) or not TREES[name].body


@pytest.mark.parametrize("name", TREES)
def test_no_module_runs_code_from_a_file_or_a_string(name):
    assert list(unsafe_calls(TREES[name])) == []
    assert not imports(TREES[name]) & {"pickle", "cloudpickle", "dill", "joblib", "marshal"}


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, Loader=yaml.Loader)",
        "class Mine(yaml.Loader): pass\nyaml.load(text, Loader=Mine)",
        "eval(text)",
        "def inner():\n    exec(text)",
        "subprocess.run(command, shell=True)",
        "numpy.load(path, allow_pickle=True)",
    ],
)
def test_unsafe_calls_are_found(code):
    assert len(list(unsafe_calls(ast.parse(code)))) == 1


def test_only_training_loops_and_policies_compute_gradients():
    callers = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "backward"
    }
    # `bench` times a backward pass of its own.
    assert {name for name in callers if not name.startswith("rl_policy.")} == {
        "distill.training.trainer",
        "distill.pretraining.teach",
        "distill.costs.step",
        "distill.evaluation.linear",  # all learning rates at once, on frozen features
    }


@pytest.mark.parametrize(
    ("code", "needed"),
    [
        *(
            (f"from distill.cli import main; main({words})", set())
            for words in (["--help"], ["train", "--help"], ["list"])
        ),
        ("import teachers", set()),
        ("import distill.recipe", {"pydantic", "yaml"}),
    ],
)
def test_what_must_answer_at_once_loads_no_heavy_library(code, needed):
    heavy = {"accelerate", "diffusers", "gymnasium", "huggingface_hub", "matplotlib", "numpy"}
    heavy |= {"pydantic", "stable_baselines3", "timm", "torch", "torchvision", "yaml"}
    told = f"print('loaded', *sorted({heavy!r} & sys.modules.keys()))"
    output = subprocess.run(
        [sys.executable, "-c", f"import atexit, sys; atexit.register(lambda: {told}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output.splitlines()[-1].split() == ["loaded", *sorted(needed)]
    assert "main" not in code or len(output.splitlines()) > 5
