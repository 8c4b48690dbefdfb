"""The layering and the budgets of the design, read from the source; and what the READMEs say of files."""

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
READMES = sorted(path for room in (*PACKAGES, "tests") for path in (ROOT / room).rglob("README.md"))
MARKDOWN = [ROOT / "README.md", *(ROOT / ".github").glob("*.md"), ROOT / "launch/benchmarks/RESULTS.md", *READMES]
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


def test_the_readmes_are_short() -> None:
    assert [path for path in (ROOT / "README.md", *READMES) if num_lines(path) > MAX_README_LINES] == []


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\((?!http)([^)#]+)", path.read_text())
    assert [target for target in targets if not (path.parent / target).exists()] == []


def reading_order(readme: Path) -> list[str]:
    """What a README's tables "read in this order" name in their first columns: paths or patterns below its folder."""
    tables = re.findall(r"^\| read in this order .*\n((?:\|.*\n)+)", readme.read_text(), re.MULTILINE)
    return [name for table in tables for row in table.splitlines() for name in re.findall("`(.+?)`", row.split("|")[1])]


def files_of(readme: Path) -> list[Path]:
    """The Python files of a room: those below its folder that no README nearer to them has."""
    rooms = [path.parent for path in READMES]
    listed = FILES + [path for path in TESTS if path.parent in (Path("tests"), Path("tests/helpers"))]
    absolute = [ROOT / path for path in listed if path.name != "__init__.py"]
    return [path for path in absolute if next(p for p in path.parents if p in rooms or p == ROOT) == readme.parent]


def test_every_file_belongs_to_a_room_with_a_readme() -> None:
    assert files_of(ROOT / "README.md") == []


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_readme_names_the_files_of_its_room(readme: Path) -> None:
    """Its reading order has every Python file, and nothing that is not there."""
    found = {name: set(readme.parent.glob(name)) for name in reading_order(readme)}
    assert [name for name, paths in found.items() if not paths] == [], "no such file"
    named = {path for paths in found.values() for path in paths}
    assert [path.name for path in files_of(readme) if path not in named] == [], 'missing in "read in this order"'


def test_the_tree_of_the_readme_names_every_room() -> None:
    tree = (ROOT / "README.md").read_text().partition("## Where things are")[2].partition("\n|")[0]
    named = set(re.findall(r"(\w+)/", tree))
    rooms = {part for path in READMES for part in path.parent.relative_to(ROOT).parts}
    assert rooms <= named
    assert named <= {path.name for room in (*PACKAGES, "tests") for path in (ROOT / room, *(ROOT / room).rglob("*"))}
