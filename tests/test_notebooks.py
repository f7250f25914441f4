"""The notebooks run from top to bottom, on a small setting."""

import os
import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "colab").glob("*.ipynb"))
SAYS = {
    "01_stream_for_ever": "streaming  perplexity",
    "02_retrieval_heads": "retrieval heads  recall",
}
SMALL = {
    "SINKJAX_STREAM_TOKENS": "8",
    "SINKJAX_SCORE_TOKENS": "256",
    "SINKJAX_CACHE_SIZE": "64",
    "SINKJAX_TRAIN_STEPS": "2",
    "SINKJAX_TRAIN_LENGTH": "192",
    "SINKJAX_WORDS": "3",
    "SINKJAX_PROMPT": "256",
    "SINKJAX_SAMPLES": "1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # half the time to compile
    "JUPYTER_PLATFORM_DIRS": "1",
}


# nbclient leaves its event loop and sockets to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_notebook_runs(path, monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": os.getcwd()}})
    client.execute()
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert any(SAYS[path.stem] in o.get("text", "") for o in outputs)
