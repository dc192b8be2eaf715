"""Rules of the house that no type checker sees: who imports whom, and what is in the repository."""

import ast
import fnmatch
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mmx

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pallas_kernels", "sharding", "mmx", "recipes")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
STANDARD = sys.stdlib_module_names


def tracked():
    """Every file under version control, relative to the root."""
    # The checkout may belong to someone else, as in a container.
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    files = [Path(name) for name in listing.decode().split("\0") if name]
    assert Path("pyproject.toml") in files
    return [file for file in files if (ROOT / file).is_file()]


FILES = tracked()
PYTHON = [file for file in FILES if file.suffix == ".py"]


def imports(file):
    """Top-level names of what a module imports anywhere in it, and `from` modules in full."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            found.add(node.module)
    return found


def tops(file):
    return {name.split(".")[0] for name in imports(file)}


def in_package(package):
    files = [file for file in PYTHON if file.parts[0] == package]
    assert files
    return files


def isolated(code):
    """Run code in a new interpreter; what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------- who imports whom


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("pallas_kernels", {"jax", "numpy", "jaxtyping", "pallas_kernels"}),
        ("sharding", {"jax", "numpy", "jaxtyping", "pallas_kernels", "sharding"}),
    ],
)
def test_the_lower_floor_knows_jax_only(package, allowed):
    for file in in_package(package):
        assert tops(file) - STANDARD <= allowed, file


def test_nothing_imports_upwards():
    above = {
        "mmx": {"recipes", "tests", "benchmarks", "notebooks", "docs", "tools"},
        "recipes": {"tests", "benchmarks", "notebooks", "docs", "tools"},
    }
    for package, forbidden in above.items():
        for file in in_package(package):
            assert not tops(file) & forbidden, file


def test_nobody_imports_tests():
    modules = {file.stem for file in PYTHON if file.parts[0] == "tests"} | {"tests"}
    for file in PYTHON:
        if file.parts[0] != "tests":
            # A test module may share its name with one of the standard library, say.
            assert not (tops(file) & modules) - STANDARD, file


def test_third_party_imports_are_declared_dependencies():
    declared = {Requirement(text).name for text in PROJECT["project"]["dependencies"]}
    for extra in ("hf", "parquet", "serve"):
        extras = PROJECT["project"]["optional-dependencies"][extra]
        declared |= {Requirement(text).name for text in extras}
    declared = {canonicalize_name(name) for name in declared}
    homes = importlib.metadata.packages_distributions()
    for package in PACKAGES:
        for file in in_package(package):
            for name in tops(file) - STANDARD - set(PACKAGES):
                distributions = {canonicalize_name(d) for d in homes.get(name, [name])}
                assert distributions & declared, f"{file} imports {name}"


def test_no_environment_variables_of_our_own():
    names = {"environ", "environb", "getenv", "putenv"}
    # What launchers of processes set is read in one place, and nothing else is read there.
    launchers = Path("sharding/processes.py")
    tree = ast.parse((ROOT / launchers).read_text())
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    read = {
        s for s in strings if isinstance(s, str) and re.fullmatch(r"[A-Z][A-Z0-9]*_[A-Z_0-9]+", s)
    }
    theirs = ("SLURM_", "OMPI_", "MEGASCALE_", "KUBERNETES_", "JOB_COMPLETION_", "JAX_COORDINATOR_")
    assert read
    assert all(name.startswith(theirs) for name in read), read
    for package in PACKAGES:
        for file in in_package(package):
            for node in ast.walk(ast.parse((ROOT / file).read_text())):
                used = getattr(node, "attr", None) or getattr(node, "id", None)
                assert used not in names or file == launchers, f"{file}:{node.lineno}"


# ---------------------------------------------------------------- what importing does

IMPORT_ALL = f"""
import importlib, pkgutil
count = 0
for package in {PACKAGES!r}:
    found = importlib.import_module(package)
    for module in pkgutil.walk_packages(found.__path__, package + "."):
        importlib.import_module(module.name)
        count += 1
"""


def test_importing_mmx_imports_no_jax():
    loaded = isolated("import sys, mmx; print(sorted({'jax', 'flax', 'numpy'} & {*sys.modules}))")
    assert loaded == "[]\n"


def test_importing_everything_touches_no_device():
    code = IMPORT_ALL + (
        "from jax._src import xla_bridge\n"
        "print(count, xla_bridge.backends_are_initialized())\n"
        "import jax; jax.devices()\n"
        "print(xla_bridge.backends_are_initialized())"  # it would have been noticed
    )
    before, after = isolated(code).splitlines()
    count, initialised = before.split()
    assert int(count) > 20
    assert (initialised, after) == ("False", "True")


def test_importing_everything_changes_no_setting():
    """Of jax or numpy. (The environment is another test; parts of jax itself write to it.)"""
    code = (
        "import jax, numpy, flax.nnx\n"
        "def settings(): return repr((jax.config.values, numpy.geterr()))\n"
        "before = settings()\n" + IMPORT_ALL + "print(settings() == before, count)"
    )
    same, count = isolated(code).split()
    assert int(count) > 20
    assert same == "True"


def test_public_names():
    wanted = {"ModelConfig", "preset", "load", "Cache", "init_cache", "Engine", "Sampling",
              "generate", "ForwardOutput", "abstract_params", "count_params", "forward",
              "init_params", "loss"}  # fmt: skip
    assert wanted <= set(mmx.__all__)
    assert len(set(mmx.__all__)) == len(mmx.__all__)
    for name in mmx.__all__:
        assert callable(getattr(mmx, name)), name
        assert name in dir(mmx)
        assert getattr(mmx, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = mmx.lode


def test_public_names_are_known_to_type_checkers():
    """What `__getattr__` finds is also imported under TYPE_CHECKING, from the same place."""
    seen = {
        alias.asname: node.module
        for node in ast.walk(ast.parse((ROOT / "mmx/__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("mmx.")
        for alias in node.names
    }
    assert set(seen) == set(mmx.__all__)
    for name, module in seen.items():
        home = importlib.import_module(module)
        assert getattr(home, name) is getattr(mmx, name)


# ---------------------------------------------------------------- packaging


def test_packages_are_the_folders_with_an_init():
    """What setuptools finds: folders with an __init__.py, their parents too, of these names."""
    options = PROJECT["tool"]["setuptools"]["packages"]["find"]
    assert set(options) == {"include"}
    folders = {file.parent for file in PYTHON if file.name == "__init__.py"}
    whole = {folder for folder in folders if {folder, *folder.parents} - {Path()} <= folders}
    names = {".".join(folder.parts) for folder in whole}
    found = {n for n in names if any(fnmatch.fnmatchcase(n, p) for p in options["include"])}
    assert {name.split(".")[0] for name in found} == set(PACKAGES)
    # ... and no module lies in a folder without one.
    for file in PYTHON:
        if file.parts[0] in PACKAGES:
            assert ".".join(file.parent.parts) in found, file
    typed = {f"{package}/py.typed" for package in PROJECT["tool"]["setuptools"]["package-data"]}
    assert typed == {"mmx/py.typed", "pallas_kernels/py.typed", "sharding/py.typed"}
    assert typed <= {str(file) for file in FILES}


def test_every_direct_dependency_is_pinned_within_its_bounds():
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (pin,) = requirement.specifier
            assert pin.operator == "==", line
            pins[canonicalize_name(requirement.name)] = pin.version
    project = PROJECT["project"]
    direct = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        direct += extra
    for text in direct:
        requirement = Requirement(text)
        version = pins.get(canonicalize_name(requirement.name))
        assert version, f"{text} has no pin"
        assert requirement.specifier.contains(version), f"{text}, pinned at {version}"


def test_version_is_written_once():
    assert "version" in PROJECT["project"]["dynamic"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "mmx.__version__"}
    assert importlib.metadata.version("mmx") == mmx.__version__


# ---------------------------------------------------------------- files


def test_files_can_be_read_in_one_sitting():
    for file in PYTHON:
        limit = 600 if file.parts[0] == "pallas_kernels" else 400
        lines = (ROOT / file).read_text().count("\n")
        assert lines <= limit, f"{file} has {lines} lines"


def test_no_lock_files():
    names = {"package-lock.json", "pnpm-lock.yaml", "npm-shrinkwrap.json", "conda-lock.yml"}
    for file in FILES:
        assert file.suffix != ".lock", file
        assert file.name not in names, file


@pytest.mark.parametrize(
    "pattern",
    [
        r"(pypi\.org|pythonhosted\.org|registry\.npmjs|registry\.yarnpkg|conda\.anaconda|anaconda\.org)",
        r"(--(extra-)?index-url|--find-links)\b",
        r"(?<![\w.])(/home/|/Users/|/root/|/work/|[A-Z]:\\Users\\)\w",
    ],
    ids=["registries", "other indices", "somebody's folders"],
)
def test_texts_name_no(pattern):
    texts = [file for file in FILES if file.suffix not in {".safetensors", ".png"}]
    assert len(texts) > 50
    for file in texts:
        # Lines of this file that are the patterns themselves begin with r".
        for number, line in enumerate((ROOT / file).read_text().splitlines(), 1):
            quoted = line.strip().startswith('r"')
            assert quoted or not re.search(pattern, line), f"{file}:{number}: {line}"


def test_no_file_is_large():
    """Golden checkpoints are tiny; anything of megabytes was added by accident."""
    for file in FILES:
        assert (ROOT / file).stat().st_size < 2**20, file


# ---------------------------------------------------------------- README


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_python_of_the_readme_runs(tmp_path, quick_children):
    """All blocks in order, where a reader would be: beside a `tests/golden`."""
    found = blocks((ROOT / "README.md").read_text(), "python")
    assert found
    assert max(block.count("\n") for block in found) <= 14  # twelve lines, as it promises
    shutil.copytree(ROOT / "tests" / "golden", tmp_path / "tests" / "golden")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(found)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **quick_children},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(1, 6, 64)")


def test_commands_of_the_readme_exist():
    """`make` targets and `mmx` sub-commands in its shell blocks."""
    text = "\n".join(blocks((ROOT / "README.md").read_text(), "sh"))
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = set(re.findall(r"^make (\w+)", text, re.MULTILINE))
    assert {"demo", "test"} <= used <= targets
    from mmx.cli import COMMANDS

    used = set(re.findall(r"\bmmx (\w[\w-]*)", text))
    assert used
    assert used <= set(COMMANDS)
