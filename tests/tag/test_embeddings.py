from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ced.errors import ConfigError
from ced.sound.tables import read_table
from ced.tag.embeddings import Row, write_embeddings

ROWS = [
    Row("a.wav", 0.0, 10.0, np.array([1, 2, 3], np.float32)),
    Row("a.wav", 10.0, 12.5, np.array([4, 5, 6], np.float32)),
]


def test_an_array_with_a_table_of_its_rows(tmp_path: Path) -> None:
    assert write_embeddings(tmp_path / "new" / "e.npy", iter(ROWS)) == 2
    found = np.load(tmp_path / "new" / "e.npy")
    assert found.dtype == np.float32
    assert found.tolist() == [[1, 2, 3], [4, 5, 6]]
    table = read_table(tmp_path / "new" / "e.npy.tsv")
    assert table.columns == {
        "file": ["a.wav", "a.wav"],
        "start": ["0.000", "10.000"],
        "end": ["10.000", "12.500"],
        "channel": ["mean", "mean"],
    }


def test_parquet_has_one_row_a_vector(tmp_path: Path) -> None:
    assert write_embeddings(tmp_path / "e.parquet", iter(ROWS * 1000)) == 2000
    found = pq.read_table(tmp_path / "e.parquet")
    assert found.schema.metadata[b"ced_embeddings"] == b"1"
    assert found.num_rows == 2000
    assert found.to_pylist()[-1] == {
        "file": "a.wav",
        "start": 10.0,
        "end": 12.5,
        "channel": "mean",
        "vector": [4.0, 5.0, 6.0],
    }


def test_other_suffixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.npy or \.parquet; got .*e\.csv"):
        write_embeddings(tmp_path / "e.csv", ROWS)
