"""Run notebooks and save what they show.

    python notebooks/execute.py            all of them; or some: python notebooks/execute.py 01 03

Stops at the first cell that raises. A notebook remembers a hash of the code that its outputs belong to.
"""

import hashlib
import sys
import time
from pathlib import Path

try:
    import nbformat
    from nbclient import NotebookClient
except ImportError as error:
    sys.exit(f"error: {error.name} is not installed, which runs notebooks; pip install nbclient ipykernel")

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

from checkpoint import atomic  # noqa: E402
from errors import Parser, UserError, program  # noqa: E402


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


def main(argv: list[str]) -> None:
    parser = Parser(prog="notebooks/execute.py", description="Run notebooks and save what they show.")
    parser.add_argument("numbers", nargs="*", help="which ones, such as 01 03 (default: all)")
    numbers, there = parser.parse_args(argv).numbers, {path.name[:2]: path for path in sorted(FOLDER.glob("*.ipynb"))}
    unknown = [number for number in numbers if number not in there]
    if unknown:
        raise UserError(f"there is no notebook {', '.join(unknown)}; there are {', '.join(there)}")
    for path in [there[number] for number in numbers] or there.values():
        notebook, seconds = execute(path)
        with atomic(path) as file:
            file.write(nbformat.writes(notebook).encode() + b"\n")
        print(f"{path.name}: {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(program(main, sys.argv[1:]))
