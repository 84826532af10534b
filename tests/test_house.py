"""The structure of the project: which files may import which."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

SCRIPTS = {"train_minimal", "train_ddp", "eval", "generate", "report", "bench", "hf"}
FOLDERS = {
    *("runtime", "settings", "corpus", "parallel", "training", "checkpointing", "conversion"),
    "reporting",
}
# From the lowest floor up: a file imports from its own floor and from those below.
FLOORS = [
    {"runtime"},
    {"config"},
    {"settings"},
    {"corpus"},
    {"loss", "kv_cache"},
    {"model"},
    {"parallel"},
    {"dataset"},
    {"training"},
    {"checkpoint", "checkpointing"},
    {"conversion"},
    {"reporting"},
    SCRIPTS,
]


def modules():
    paths = [*ROOT.glob("*.py"), *(p for f in FOLDERS for p in (ROOT / f).glob("*.py"))]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in paths}


def imported(node, known):
    """The modules of the project that an import statement names."""
    if isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
    elif isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        return set()
    return {name for name in names if name in known}


def imports_of(path, known):
    return {
        name for node in ast.walk(ast.parse(path.read_text())) for name in imported(node, known)
    }


def floor_of(module):
    (found,) = (i for i, floor in enumerate(FLOORS) if module.split(".")[0] in floor)
    return found


def test_imports_point_down():
    known = modules()
    up = [
        f"{module} imports {other}"
        for module, path in known.items()
        for other in imports_of(path, known)
        if floor_of(other) > floor_of(module)
    ]
    assert up == []


def test_no_file_imports_itself_by_way_of_others():
    known = modules()
    TopologicalSorter(
        {m: imports_of(p, known) for m, p in known.items()}
    ).prepare()  # or CycleError


def test_nothing_imports_a_script():
    known = modules()
    assert [m for m, p in known.items() if imports_of(p, known) & SCRIPTS] == []


def test_no_function_hides_an_import_of_the_project():
    known = modules()
    hidden = [
        f"{module}:{inner.lineno}"
        for module, path in known.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for inner in ast.walk(node)
        if imported(inner, known)
    ]
    assert hidden == []


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_each_folder_says_in_a_few_lines_what_lives_there(folder):
    text = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text()))
    assert "Start reading in" in text and len(text.splitlines()) <= 3
    (start,) = [word for word in text.split() if word.rstrip(".,;").endswith(".py")][:1]
    assert (ROOT / folder / start.rstrip(".,;")).exists() or (ROOT / start.rstrip(".,;")).exists()


def test_the_readme_names_every_file_and_folder_at_the_top():
    readme = (ROOT / "README.md").read_text()
    tops = [p.name for p in ROOT.glob("*.py")] + [f"{folder}/" for folder in FOLDERS]
    assert [name for name in tops if f"`{name}`" not in readme] == []


def test_the_map_names_every_file():
    named = (ROOT / "docs/map.md").read_text()
    missing = [
        path
        for module in modules()
        if not (path := module.replace(".", "/") + ".py").endswith("__init__.py")
        and f"`{path}`" not in named
    ]
    assert missing == []
    files = re.findall(r"`([\w/]+\.py)`", named)
    assert [f for f in files if not (ROOT / f).exists()] == []


def test_training_on_one_device_does_not_load_what_only_many_processes_use():
    code = "import sys, train_minimal; sys.exit('parallel.parallel_model' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
