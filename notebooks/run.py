"""Runs notebooks anew and stores what they print and draw, small. For those who change one; readers just open them.

    pip install nbclient nbformat ipykernel
    python notebooks/run.py 1_flow 6_weights                                    # without names: all
"""
import base64
import io
import pathlib
import sys

import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = pathlib.Path(__file__).parent


def small(png):
    """A picture of at most 256 colours, base64 in and out."""
    out = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(out, "png", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


for file in [HERE / f"{name}.ipynb" for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")):
    notebook = nbformat.read(file, 4)
    meta = notebook.metadata
    NotebookClient(notebook, timeout=600, record_timing=False, coalesce_streams=True, resources={"metadata": {"path": HERE}}).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = small(output.data["image/png"])
    notebook.metadata = {"kernelspec": meta.kernelspec, "language_info": {"name": "python"}}               # nothing of this machine
    nbformat.write(notebook, file)
    print(f"{file.name}: {file.stat().st_size // 1000} kB")
