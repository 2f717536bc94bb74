"""The notebooks run, show what their code gives, and keep to their time."""

import resource
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat, nbclient and ipykernel run the notebooks")
pytest.importorskip("nbclient", reason="nbformat, nbclient and ipykernel run the notebooks")
pytest.importorskip("ipykernel", reason="nbformat, nbclient and ipykernel run the notebooks")

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
sys.path.insert(0, str(FOLDER))
import execute  # noqa: E402


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_saved_and_belong_to_the_code(path):
    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata.get("code_hash") == execute.code_hash(notebook), "run notebooks/execute.py again"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code) and any("image/png" in str(cell.outputs) for cell in code)
    assert max(len(cell.source.splitlines()) for cell in code) <= 12, "a cell is a thought, not a program"
    assert any("assert" in cell.source for cell in code) and "Exercise" in str(notebook.cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_in_its_time(path):
    """In 90 seconds on two cores: 180 seconds of computing, which do not depend on what else the machine does."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    execute.execute(path)  # raises with the cell that failed
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 180


def test_the_list_of_notebooks_is_complete():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"]({path.name})" in text for path in NOTEBOOKS) and NOTEBOOKS


@pytest.mark.parametrize("arguments, words", [
    (["99"], ["no notebook 99", "01, 02"]), (["1"], ["no notebook 1;"]), (["01", "x"], ["no notebook x"]),
    (["--all"], ["--all", "notebooks/execute.py --help"]),
])
def test_a_number_that_is_no_notebooks_is_refused(arguments, words, monkeypatch):
    monkeypatch.setattr(execute, "execute", lambda path: pytest.fail(f"{path} was run"))
    with pytest.raises(execute.UserError) as caught:
        execute.main(arguments)
    assert all(word in str(caught.value) for word in words)


def test_a_notebook_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "01-one.ipynb"
    path.write_bytes(NOTEBOOKS[0].read_bytes())
    monkeypatch.setattr(execute, "FOLDER", tmp_path)
    monkeypatch.setattr(execute, "execute", lambda path: (nbformat.read(path, as_version=4), 1.0))
    execute.main(["01"])
    assert path.read_bytes() == NOTEBOOKS[0].read_bytes() and list(tmp_path.iterdir()) == [path]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        execute.main([])
    assert path.read_bytes() == NOTEBOOKS[0].read_bytes() and list(tmp_path.iterdir()) == [path]
