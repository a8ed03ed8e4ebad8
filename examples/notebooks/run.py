"""Runs the notebooks from top to bottom and stores what they print, without times and numbers of executions.

    make docs && PYTHONPATH=python build/docs/bin/python examples/notebooks/run.py

Needs nbclient and ipykernel, which come with the site's generator, and matplotlib.
"""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient


def main() -> None:
    for path in sorted(Path(__file__).parent.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        metadata = dict(notebook.metadata)
        NotebookClient(notebook, timeout=300, kernel_name="python3", coalesce_streams=True).execute()
        notebook.metadata = nbformat.NotebookNode(metadata)
        for cell in notebook.cells:
            cell.metadata = nbformat.NotebookNode()
            if cell.cell_type == "code":
                cell.execution_count = None
                for output in cell.outputs:
                    output.pop("execution_count", None)
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
