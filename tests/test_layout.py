"""The layering and the budgets of the design, read from the source."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("common", "actor", "learner", "launch")
FILES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TESTS = sorted(path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py"))

MAY_IMPORT = {
    "common": {"common"},
    "actor": {"actor", "common"},
    "learner": {"learner", "common"},
    "launch": {"launch", "learner", "actor", "common"},
}
ONLY_IN = {
    "vllm": {"actor/vllm_engine.py", "actor/vllm_worker.py"},
    "peft": {"learner/policy/policy.py"},
    "ray": {"actor/actor.py", "learner/learner.py", *(str(path) for path in FILES if path.parts[0] == "launch")},
}
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_LOOP_LINES = 300, 60, 120
MAX_FILES, MAX_LEARNER_FILES, MAX_README_LINES = 12, 14, 150


def imports(path: Path) -> set[str]:
    """Top-level names of everything that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names.add((node.module or "").split(".")[0])
    return names


def num_lines(path: Path) -> int:
    return len((ROOT / path).read_text().splitlines())


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_package_imports_only_the_layers_below_it(path: Path) -> None:
    assert imports(path) & set(PACKAGES) <= MAY_IMPORT[path.parts[0]]


@pytest.mark.parametrize(("library", "files"), ONLY_IN.items())
def test_a_large_library_is_imported_in_one_place(library: str, files: set[str]) -> None:
    assert {str(path) for path in FILES if library in imports(path)} <= files


@pytest.mark.parametrize("path", [*FILES, *TESTS], ids=str)
def test_files_and_functions_keep_their_budget(path: Path) -> None:
    assert num_lines(path) <= (MAX_LOOP_LINES if str(path) == "launch/loop.py" else MAX_FILE_LINES)
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
        if node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    }
    assert not long


def test_the_tests_mirror_the_packages() -> None:
    """tests/learner/head/test_head.py tests something of learner/head."""
    for path in TESTS:
        room = path.relative_to("tests").parent
        assert (ROOT / room).is_dir() or room.parts in ((), ("helpers",), ("end_to_end",)), path
    for package in PACKAGES:
        assert (ROOT / package / "__init__.py").is_file()


def test_a_folder_reads_as_a_table_of_contents() -> None:
    rooms = {path.parent for path in FILES}
    for room in sorted(rooms):
        files = [path for path in FILES if path.parent == room and path.name != "__init__.py"]
        assert len(files) <= (MAX_LEARNER_FILES if str(room) == "learner" else MAX_FILES), room


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert num_lines(Path("README.md")) <= MAX_README_LINES
    for readme in [ROOT / "README.md", *(path for package in PACKAGES for path in (ROOT / package).rglob("*.md"))]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", readme.read_text()):
            assert (readme.parent / target).exists(), f"{readme.relative_to(ROOT)} links to {target}"
