"""Make ced/model/frontend.onnx, the front end that goes with graphs of features: `python scripts/make_frontend.py`."""

from pathlib import Path

import onnx

from ced.model.graph import front_end_graph
from ced.sound.frontend import LogMel

if __name__ == "__main__":
    path = Path(__file__).parents[1] / "ced" / "model" / "frontend.onnx"
    onnx.save(front_end_graph(LogMel()), path)
    print(path)
