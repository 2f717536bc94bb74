"""The notebooks are stored with what their code gave, and every exercise is solved. (.ci/run executes them again.)"""

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LESSONS = NOTEBOOKS[:-1]


def code_cells(path: Path) -> list[dict]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells if cell["cell_type"] == "code"]


def printed(cells: list[dict]) -> str:
    return "".join("".join(out.get("text", "")) for cell in cells for out in cell["outputs"])


def checks(path: Path) -> list[str]:
    """The cells that check an exercise."""
    return [cell["source"] for cell in code_cells(path) if cell["source"].startswith("# Check ")]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_was_executed(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "from top to bottom"
    assert not [out for cell in cells for out in cell["outputs"]
                if out["output_type"] == "error" or out.get("name") == "stderr"]
    assert not re.search(r"(?<![\w.])/(home|root|tmp|usr|work|Users)/", printed(cells)), "a folder of the machine"


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_shows_asks_and_checks(path):
    cells, text = code_cells(path), path.read_text(encoding="utf-8")
    assert any("image/png" in out.get("data", {}) for cell in cells for out in cell["outputs"])
    drawings = re.findall(r"!\[[^]]*\]\((\S+?)\)", text)
    assert drawings and all((FOLDER / name).exists() for name in drawings)
    assert max(cell["source"].count("\n") for cell in cells) < 16, "a cell is a thought, not a program"
    assert sum(cell["source"].count("assert ") for cell in cells) >= 5
    assert len(re.findall("not solved yet", printed(cells))) in (2, 3), "exercises come unsolved"


def test_the_solutions_pass_the_checks_of_every_exercise():
    solutions = FOLDER / "solutions.ipynb"
    assert checks(solutions) == [check for lesson in LESSONS for check in checks(lesson)]
    exercises = {re.match(r"# Check (\d\.\d)", check)[1] for check in checks(solutions)}
    assert set(re.findall(r"(\d\.\d) right", printed(code_cells(solutions)))) == exercises


def test_the_list_of_notebooks_is_complete():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((\w+\.ipynb)\)", text) == [path.name for path in NOTEBOOKS]
