"""What an installed copy holds and needs: wheel, imports, dependencies, licences."""

import ast
import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from email.message import Message
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import cast

import nibabel as nib
import numpy as np
import pytest
from packaging.requirements import Requirement

import ich_pipeline

ROOT = Path(__file__).parent.parent
RESOURCES = ("bundles", "configs", "data_manifests")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEAVY = {"torch", "monai", "ignite", "mlflow", "matplotlib", "scipy", "highdicom"}
LIGHT = ("cli", "bundles", "manifest", "errors", "labels", "files", "commands", "label_commands")
# Dependencies that no line of the package imports; pyproject.toml says why each is there.
SHIPPED = Path("bundles", "cascade3d", "models", "model.pt")
NOT_IMPORTED = {"fire", "nvidia-ml-py", "python-gdcm"}


def run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is built, with things in it that must not travel."""
    copy = tmp_path_factory.mktemp("source") / "checkout"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copyfile(ROOT / name, copy / name)
    for name in ("ich_pipeline", *RESOURCES):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.pt"))
    shutil.copyfile(ROOT / SHIPPED, copy / SHIPPED)
    (copy / "bundles" / "unet3d" / "models").mkdir(exist_ok=True)
    (copy / "bundles" / "unet3d" / "models" / "model.pt").write_bytes(b"weights trained in this checkout")
    (copy / "configs" / ".env").write_text("token=1")
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    """The wheel, built from the source distribution."""
    built = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", source.parent / "dist", cwd=source)
    assert built.returncode == 0, built.stderr
    [path] = (source.parent / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """A folder with the wheel in it and nothing else; its dependencies are those of the tests."""
    target = wheel.parent.parent / "installed"
    done = run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel),
        cwd=wheel.parent,
    )
    assert done.returncode == 0, done.stderr
    return target


def command(installed: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return run(installed / "bin" / "ich-pipeline", *words, cwd=installed.parent, PYTHONPATH=str(installed))


class TestWheel:
    def test_resources_travel_whole_with_the_weights_that_ship_and_no_others(self, source: Path, wheel: Path) -> None:
        packed = {name for name in zipfile.ZipFile(wheel).namelist() if "/_resources/" in name}
        here = {path.relative_to(source) for name in RESOURCES for path in (source / name).rglob("*") if path.is_file()}
        travel = {p for p in here if not p.name.startswith(".") and p.parent.name != "models"} | {SHIPPED}
        assert packed == {f"ich_pipeline/_resources/{path.as_posix()}" for path in travel}
        # What was planted is there to be left out, and every kind of resource is among the rest.
        assert {p.name for p in here - travel} >= {"model.pt", ".env"}
        assert SHIPPED in here
        assert {p.parts[0] for p in travel} == set(RESOURCES)

    def test_is_small(self, wheel: Path) -> None:
        sizes = {file.filename: file.file_size for file in zipfile.ZipFile(wheel).infolist()}
        weights = sizes.pop(f"ich_pipeline/_resources/{SHIPPED.as_posix()}")
        assert weights < 25_000_000
        assert max(sizes.values()) < 1_000_000

    def test_holds_licence_types_and_template(self, wheel: Path) -> None:
        names = zipfile.ZipFile(wheel).namelist()
        assert {"ich_pipeline/py.typed", "ich_pipeline/report.html.jinja"} <= set(names)
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


class TestInstalledCopy:
    def test_is_what_runs(self, installed: Path) -> None:
        where = run(
            *(sys.executable, "-c", "import ich_pipeline; print(ich_pipeline.__file__)"),
            cwd=installed.parent,
            PYTHONPATH=str(installed),
        )
        assert Path(where.stdout.strip()) == installed / "ich_pipeline" / "__init__.py"
        assert command(installed, "--version").stdout.split() == ["ich-pipeline", ich_pipeline.__version__]

    def test_lists_its_own_bundles(self, installed: Path) -> None:
        listed = {bundle["name"]: bundle for bundle in json.loads(command(installed, "bundles", "--json").stdout)}
        assert set(listed) == {path.parent.parent.name for path in (ROOT / "bundles").glob("*/configs/metadata.json")}
        resources = installed / "ich_pipeline" / "_resources" / "bundles"
        assert {Path(bundle["path"]) for bundle in listed.values()} == {resources / name for name in listed}

    def test_reaches_into_their_configs(self, installed: Path) -> None:
        refused = command(installed, "train", "bundle=cascade3d", "epoch=5")
        assert refused.returncode == 2
        assert "did you mean 'epochs'?" in refused.stderr

    def test_measures_a_mask(self, installed: Path, tmp_path: Path) -> None:
        values = np.zeros((32, 32, 8), np.uint8)
        values[8:18, 8:18, 2:7] = 1  # 10 x 10 x 5 voxels of 2 x 2 x 5 mm: 10 mL
        nib.save(nib.Nifti1Image(values, np.diag([2.0, 2.0, 5.0, 1.0])), tmp_path / "block.nii.gz")
        done = command(installed, "volume", tmp_path / "block.nii.gz", "--masks", "--out", tmp_path / "volumes.csv")
        assert done.returncode == 0, done.stderr
        header, row = (line.split(",") for line in (tmp_path / "volumes.csv").read_text().splitlines())
        assert float(row[header.index("volume_ml")]) == pytest.approx(10.0)
        assert 'data-case="block"' in (tmp_path / "report.html").read_text()


def modules() -> Iterator[str]:
    for module in pkgutil.walk_packages(ich_pipeline.__path__, "ich_pipeline."):
        if not module.name.endswith("__main__"):  # importing it is running it
            yield module.name


@pytest.mark.parametrize("name", list(modules()))
def test_every_module_imports(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in imports_of(extras()):
            raise
        pytest.skip(f"{error.name} is an extra that is not installed")


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_nothing_heavy(name: str) -> None:
    assert heavy_after(f"import ich_pipeline.{name}") == set()


def test_heavy_imports_would_be_seen() -> None:
    assert "scipy" in heavy_after("import scipy.ndimage")


def heavy_after(statement: str) -> set[str]:
    done = run(sys.executable, "-c", f"{statement}\nimport sys\nprint(*sys.modules)", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return HEAVY & set(done.stdout.split())


def distribution(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def core() -> set[str]:
    return {distribution(Requirement(line).name) for line in PROJECT["dependencies"]}


def extras() -> set[str]:
    lines = [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    return {distribution(Requirement(line).name) for line in lines}


@cache
def owners() -> dict[str, set[str]]:
    """Distributions that each importable name belongs to."""
    return {name: set(map(distribution, found)) for name, found in metadata.packages_distributions().items()}


def imports_of(distributions: set[str]) -> set[str]:
    """Names under which distributions are imported; one that is not installed goes by its own name."""
    found = {name for name, found_in in owners().items() if found_in & distributions}
    return found | {name.replace("-", "_") for name in distributions}


def imported(folder: Path) -> set[str]:
    """Top-level names that the Python files of a folder import, but for the standard library and our own."""
    names: set[str] = set()
    own = {"ich_pipeline", *(path.stem for path in folder.rglob("*.py"))}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return names - own - set(sys.stdlib_module_names)


class TestDependencies:
    def test_what_the_package_imports_is_declared(self) -> None:
        assert imported(ROOT / "ich_pipeline") - imports_of(core() | extras()) == set()

    def test_what_the_tests_import_is_declared(self) -> None:
        assert imported(ROOT / "tests") - imports_of(core() | extras()) - {"packaging"} == set()

    def test_what_is_declared_is_imported(self) -> None:
        used = imported(ROOT / "ich_pipeline")
        assert {name for name in core() if not imports_of({name}) & used} == NOT_IMPORTED

    def test_an_import_is_seen_wherever_it_stands(self, tmp_path: Path) -> None:
        (tmp_path / "module.py").write_text(
            "import os\ndef f():\n    from itk.core import x\n    import numpy.linalg\n"
        )
        assert imported(tmp_path) == {"itk", "numpy"}

    def test_each_has_a_range_that_what_is_installed_fits(self) -> None:
        for line in PROJECT["dependencies"]:
            requirement = Requirement(line)
            assert any(bound.operator == ">=" for bound in requirement.specifier), line
            assert requirement.specifier.contains(metadata.version(requirement.name)), line

    def test_no_licence_binds_the_whole(self) -> None:
        licences = {name: licence(cast("Message", metadata.metadata(name))) for name in closure(PROJECT["name"])}
        assert "numpy" in licences
        assert {name: words for name, words in licences.items() if binds_the_whole(words)} == {}

    @pytest.mark.parametrize(
        ("words", "binds"),
        [
            ("GPL-3.0-or-later", True),
            ("MIT AND GPL-2.0-only", True),
            ("License :: OSI Approved :: GNU General Public License v3 (GPLv3)", True),
            ("License :: OSI Approved :: GNU Affero General Public License v3", True),
            ("AGPL-3.0", True),
            ("LGPL-3.0-or-later", False),
            ("License :: OSI Approved :: GNU Lesser General Public License v3 (LGPLv3)", False),
            ("BSD-3-Clause AND GPL-3.0-or-later WITH GCC-exception-3.1", False),
            ("Apache-2.0", False),
        ],
    )
    def test_binding_licences_are_known(self, words: str, binds: bool) -> None:
        assert binds_the_whole(words) == binds


def closure(name: str) -> set[str]:
    """Installed distributions that one needs, and those need, without extras."""
    seen: set[str] = set()
    todo = [name]
    while todo:
        needs = (Requirement(line) for line in metadata.requires(todo.pop()) or ())
        wanted = {distribution(each.name) for each in needs if not each.marker or each.marker.evaluate({"extra": ""})}
        todo += wanted - seen
        seen |= wanted
    return seen


def licence(package: Message) -> str:
    """What a distribution says of its licence, shortest form first: long texts quote those of others."""
    classifiers = [line for line in package.get_all("Classifier") or () if line.startswith("License ::")]
    return package.get("License-Expression") or " ".join(classifiers) or package.get("License") or ""


def binds_the_whole(licence_words: str) -> bool:
    """GPL or AGPL; not LGPL, and not GPL with an exception, such as that of compiler libraries."""
    words = re.sub(r"GPL-[\w.-]+ WITH \S+", "", licence_words)
    return bool(re.search(r"(?<!L)GPL|(?<!Lesser )General Public License", words))
