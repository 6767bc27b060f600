"""Runs notebooks anew and stores what they print and draw, small. For those who change one; readers
just open them.

    pip install nbclient nbformat ipykernel
    python -m notebooks.run 1_flow 8_weights        # without names: all
"""
import base64
import hashlib
import io
import pathlib

from PIL import Image

from engine.checks import printable
from engine.command import Parser
from engine.files import weights_digest
from sample import TOY_FOLDER

HERE = pathlib.Path(__file__).parent


def small(png: str) -> str:
    """A picture of at most 256 colours, base64 in and out."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    image = image.quantize(256, dither=Image.Dither.NONE)
    out = io.BytesIO()
    image.save(out, "png", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def origin(cells: list) -> dict:
    """What outputs depend on: the code of these cells, and the toy. (Modules count as well.)"""
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return dict(code=hashlib.sha256("\0".join(code).encode()).hexdigest()[:8],
                toy=weights_digest(TOY_FOLDER))


def run(file: pathlib.Path) -> None:
    """Executes a notebook and writes it back with its outputs, their origin, and nothing of this
    machine."""
    # Only whoever runs notebooks needs these.
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(file, 4)
    kernel = notebook.metadata.kernelspec
    folder = {"metadata": {"path": HERE}}
    NotebookClient(notebook, timeout=600, record_timing=False, coalesce_streams=True,
                   resources=folder).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = small(output.data["image/png"])
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"},
                         "outputs of": origin(notebook.cells)}
    nbformat.write(notebook, file)
    print(f"{file.name}: {file.stat().st_size // 1000} kB")


def main() -> None:
    names = sorted(file.stem for file in HERE.glob("*.ipynb"))
    p = Parser(prog="python -m notebooks.run", description=__doc__)
    p.add_argument("names", nargs="*", help=f"of {', '.join(names)}")
    asked = [name.removesuffix(".ipynb") for name in p.parse_args().names]
    if unknown := [name for name in asked if name not in names]:
        p.error(f"there is no notebook {printable(unknown[0])}, only {', '.join(names)}")
    for name in asked or names:
        run(HERE / f"{name}.ipynb")


if __name__ == "__main__":
    main()
