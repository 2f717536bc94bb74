"""Run notebooks and save what they show.

    python notebooks/execute.py            all of them; or some: python notebooks/execute.py 01 03

Stops at the first cell that raises. A notebook remembers a hash of the code that its outputs belong to.
"""

import hashlib
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def code_hash(notebook) -> str:
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def execute(path: Path) -> tuple[nbformat.NotebookNode, float]:
    """The notebook with new outputs, and the seconds it took; CellExecutionError for a cell that raises."""
    notebook, started = nbformat.read(path, as_version=4), time.perf_counter()
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(FOLDER)}}).execute()
    notebook.metadata["code_hash"] = code_hash(notebook)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
        if cell.cell_type == "code":  # progress bars and warnings of libraries say nothing about the notebook
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    return notebook, time.perf_counter() - started


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not sys.argv[1:] or path.name[:2] in sys.argv[1:]:
            notebook, seconds = execute(path)
            nbformat.write(notebook, path)
            print(f"{path.name}: {seconds:.0f} s", flush=True)
