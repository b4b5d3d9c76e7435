"""The shape of the code, read from its source: what may import what, and that documents say what the program says."""

import ast
import importlib
import importlib.util
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from readme import README, generated

import llmctl
from llmctl.cli import app
from llmctl.pipeline import recipe, registry, stage

ROOT = README.parent
PACKAGE = ROOT / "llmctl"

ROOMS = (
    *("config", "distributed", "data", "model", "artifacts", "evaluate", "convert", "compress", "train"),
    *("pipeline", "plan", "cli"),
)
"""The folders of the package, from the lowest up: each imports itself and those before it, type checkers' imports
included. At most twelve."""

JAX_FREE = (
    *("cli", "pipeline", "__main__", "artifacts.workspace", "artifacts.atomic", "artifacts.artifact"),
    *("config", "distributed.backend", "distributed.processes", "model.config", "model.families"),
    *("data.config", "data.source", "data.sources", "train.run_log", "train.adapters"),
    *("train.distill_settings", "train.finetune_settings"),
    *(f"train.robust.{name}" for name in ("settings", "registry", "adversary", "fgm", "pgd", "freelb", "smart")),
    *("evaluate.metrics.base", "evaluate.report", "evaluate.settings", "evaluate.tasks.registry", "evaluate.probes"),
    *(f"evaluate.bias.{name}" for name in ("probes", "settings")),
    *(f"evaluate.robustness.{name}" for name in ("probe", "settings", "perturbations", "synonyms")),
    *("evaluate.attribution.settings", "evaluate.attribution.page", "evaluate.attribution.picture"),
    *(f"evaluate.harm.{name}" for name in ("probes", "settings", "word_list")),
    *(
        "compress.calibration.settings",
        "compress.pruning.scores",
        "compress.quantization.schemes",
        "compress.pruning.pattern",
        "compress.structured_method",
        "model.wiring",
    ),
)
"""Modules (and all below a package) that import nothing heavy when they are imported."""
HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "qwix", "tensorflow_datasets", "torch", "transformers"}


def modules() -> dict[str, Path]:
    """Every module of the package, as `data.packing`; a package is `data.__init__`."""
    return {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in sorted(PACKAGE.rglob("*.py"))}


def imported(path: Path, everywhere: bool) -> set[str]:
    """Absolute names that a module imports: at module scope, or everywhere (in functions, and for type checkers)."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test) and not everywhere:
                continue
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not everywhere:
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                found.add(child.module or "")
                found.update(f"{child.module}.{alias.name}" for alias in child.names)
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def ours(path: Path, everywhere: bool = True) -> set[str]:
    """The modules of the package that a module imports, as `modules` names them; not the packages on the way."""
    known = modules()
    return {m for name in imported(path, everywhere) if (m := name.removeprefix("llmctl.")) != name and m in known}


def test_the_package_holds_its_rooms_and_no_more():
    top = {p.name for p in PACKAGE.iterdir() if p.name != "__pycache__"}
    assert top == {*ROOMS, "__init__.py", "__main__.py"} and len(ROOMS) <= 12


@pytest.mark.parametrize("module", [m for m in modules() if "." in m])
def test_imports_run_downward(module):
    room = module.split(".")[0]
    for other in ours(modules()[module]):
        if "." in other:
            below = other.split(".")[0]
            assert ROOMS.index(below) <= ROOMS.index(room), f"{module} imports {other}, which lies above it"


def test_no_circles():
    """Neither at module scope, nor by imports inside functions or for type checkers."""
    edges = {m: ours(p) - {m} for m, p in modules().items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join((*path, module))
        if module not in done:
            for other in edges[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in edges:
        visit(module, ())


@pytest.mark.parametrize("kind", stage.kinds())
def test_stages_do_not_import_one_another(kind):
    assert not {m for m in ours(modules()[f"pipeline.stages.{kind}"]) if m.startswith("pipeline.stages.")}


@pytest.mark.parametrize("module", [m for m in modules() if any(f"{m}.".startswith(f"{free}.") for free in JAX_FREE)])
def test_what_is_free_of_jax(module):
    assert not {n for n in imported(modules()[module], everywhere=False) if n.split(".")[0] in HEAVY}


@pytest.mark.parametrize("module", modules())
def test_there_is_no_drawer_for_odds_and_ends(module):
    assert module.split(".")[-1] not in ("utils", "util", "helpers", "misc", "common")


def test_never_unpickled():
    for module, path in modules().items():
        names = {n.split(".")[0] for n in imported(path, everywhere=True)}
        assert not names & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}, module


@pytest.mark.parametrize("kind", stage.kinds())
def test_a_stage_is_a_config_and_a_run(kind):
    module = stage.load(kind)
    assert issubclass(module.Config, stage.StageConfig) and module.Config.model_fields["kind"].default == kind
    assert callable(module.run)
    for name, field in module.Config.model_fields.items():
        assert name == "kind" or field.description, f"{kind}.{name} has no docstring: --help would say nothing"
    assert set(module.Config.artifact_fields) <= set(module.Config.model_fields)


@pytest.mark.parametrize("name", [*registry.commands(), *registry.stages()])
def test_a_command_says_what_it_does_in_one_sentence(name):
    assert re.fullmatch(r"[A-Z].*\.", registry.summary(name), flags=re.S), name


def test_every_module_can_be_imported():
    """And has a docstring; heavy ones included, so that a broken import shows here and not in a user's hands."""
    for info in pkgutil.walk_packages(llmctl.__path__, "llmctl."):
        if info.name != "llmctl.__main__":
            assert importlib.import_module(info.name).__doc__, info.name


TASK_FILES = sorted((ROOT / "recipes" / "tasks").glob("*.toml"))
RECIPES = [file for file in sorted((ROOT / "recipes").rglob("*.toml")) if file not in TASK_FILES]


@pytest.mark.parametrize("file", TASK_FILES, ids=lambda p: p.name)
def test_task_files_are_valid(file):
    from llmctl.evaluate import task_files

    assert task_files.read(str(file)).data.test == 1


@pytest.mark.parametrize("file", RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_recipe_is_valid(file):
    got = recipe.read(file)
    assert got.steps


RECIPES_README = ROOT / "recipes" / "README.md"


def fenced(language: str) -> list[str]:
    text = README.read_text(encoding="utf-8") + RECIPES_README.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.S | re.M)


def test_readme_recipes_are_valid(tmp_path):
    from llmctl.evaluate import task_files

    for text in fenced("toml"):
        (tmp_path / "r.toml").write_text(text)
        if "task" in tomllib.loads(text):  # a task file
            assert task_files.read(str(tmp_path / "r.toml")).data.path
        else:
            assert recipe.read(tmp_path / "r.toml").steps


def test_readme_commands_are_understood():
    """Every command in a README names a command, and flags that it has; every make target is there."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    lines = [shlex.split(line, comments=True) for text in fenced("sh") for line in text.splitlines() if line.strip()]
    assert ["make", "demo"] in lines and ["make", "test"] in lines
    for words in lines:
        if words[0] == "make":
            assert words[1] in targets, words
        if words[0] == "llmctl":
            assert words[1] in (*registry.commands(), *registry.stages()), words
            flags = _flags(words[1])
            for word in words[2:]:
                assert not word.startswith("-") or word in flags, f"{words[1]} has no {word}"
        for word in words:
            if word.startswith("recipes/"):
                assert (ROOT / word).exists(), word


def _flags(command: str) -> set[str]:
    """The flags of a command, as its own help lists them."""
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert app.run([command, "--help-all" if command in registry.stages() else "--help"]) == 0
    return set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w.-]*", out.getvalue()))


def test_readme_says_what_help_says():
    text = README.read_text(encoding="utf-8")
    assert generated(text) == text, "run `make docs`"


@pytest.mark.parametrize("file", [README, RECIPES_README], ids=lambda p: str(p.relative_to(ROOT)))
def test_readme_links_lead_somewhere(file):
    for target in re.findall(r"\]\(([^)#]+)\)", file.read_text(encoding="utf-8")):
        assert target.startswith("http") or (file.parent / target).exists(), target


def test_recipes_and_launch_files_are_listed():
    links = re.findall(r"\]\(([^)#]+)\)", RECIPES_README.read_text(encoding="utf-8"))
    recipes = RECIPES_README.parent
    assert {*recipes.glob("*.toml"), *recipes.glob("launch/*")} <= {recipes / link for link in links}


CONTRIBUTING = (ROOT / ".github/CONTRIBUTING.md").read_text(encoding="utf-8")


def test_contributing_names_files_and_modules_that_exist():
    paths = set(re.findall(r"(?<![\w./])(?:llmctl|recipes|tests|\.github)/[\w./]*", CONTRIBUTING))
    assert {"llmctl/config", "recipes/bench/train_step.py"} <= paths
    assert not {p for p in paths if not (ROOT / p.rstrip(".")).exists()}
    for name in re.findall(r"`(llmctl(?:\.\w+)+)`", CONTRIBUTING):
        module, _, last = name.rpartition(".")
        assert hasattr(importlib.import_module(module), last) or importlib.util.find_spec(name), name


def test_decisions_are_under_headings_and_give_their_cost():
    _, *sections = re.split(r"^### ", CONTRIBUTING[CONTRIBUTING.index("## Decisions") :], flags=re.M)
    for section in sections:
        heading, *entries = re.split(r"^- ", section, flags=re.M)
        assert entries, heading
        for entry in entries:
            assert entry.startswith("**") and "Cost:" in entry, f"{heading.strip()}: {entry}"


def test_python_versions_agree():
    """What pyproject.toml promises is what CI runs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11" and sys.version_info >= (3, 11)
    assert '["3.11", "3.12"]' in (ROOT / ".github/workflows/test.yml").read_text()


def test_benchmarks_need_nothing_that_their_target_does_not_install():
    """Planning for TPUs wants an extra that `make bench` leaves out."""
    said = subprocess.run(["make", "-n", "bench"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "recipes/bench/train_step.py" in said and "recipes/bench/plan_" not in said


def test_programs_in_tests_import_modules_that_are_there():
    """Programs that tests run in other processes are strings, which no linter reads."""
    names = re.compile(r"^\s*from (llmctl[\w.]*) import (\w+(?:, *\w+)*)", flags=re.M)
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for module, words in names.findall(node.value):
                    there = importlib.import_module(module)
                    for word in words.replace(" ", "").split(","):
                        found = hasattr(there, word) or importlib.util.find_spec(f"{module}.{word}")
                        assert found, f"{path}: {module} has no {word}"
