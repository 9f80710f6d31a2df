"""Tag sounds with Apache Spark: each task has one single-threaded tagger, and its rows become a Parquet table.

python examples/spark_tag.py resources --out tags
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from pyspark.sql import SparkSession

from ced import AudioError, Tagger

SCHEMA = "file string, start double, end double, label string, mid string, prob float, error string"
COLUMNS = [column.split()[0] for column in SCHEMA.split(", ")]


def tag(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    """Turn the paths of a partition into a row for each tag, or one with the error of a file that cannot be read."""
    with Tagger("esc10") as tagger:  # opened once a partition
        for batch in batches:
            rows: list[tuple[object, ...]] = []
            for path in batch["path"]:
                try:
                    record = tagger.tag(path)
                except AudioError as error:
                    rows.append((path, None, None, None, None, None, str(error)))
                else:
                    found = [(piece, tag) for piece in record for tag in piece.tags]
                    rows += [(path, piece.start, piece.end, tag.label, tag.mid, tag.prob, None) for piece, tag in found]
            yield pd.DataFrame(rows, columns=COLUMNS)


def main() -> None:
    """Tag a folder, and print how many files and tags there are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", default="tags")
    arguments = parser.parse_args()
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # on a cluster: a Python that has ced-audio
    spark = SparkSession.builder.appName("ced").getOrCreate()
    paths = [str(path.resolve()) for path in sorted(arguments.folder.glob("**/*.*")) if path.suffix in (".ogg", ".wav")]
    files = spark.createDataFrame([(path,) for path in paths], "path string")
    tags = files.repartition(spark.sparkContext.defaultParallelism).mapInPandas(tag, SCHEMA)
    tags.write.mode("overwrite").parquet(arguments.out)
    tags = spark.read.parquet(arguments.out)
    failed = tags.where("error is not null").count()
    print(f"{len(paths)} files, {failed} failed, {tags.count() - failed} tags")
    spark.stop()


if __name__ == "__main__":
    main()
