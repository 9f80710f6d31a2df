"""Tag sounds with Apache Spark: each task has one single-threaded tagger, and its rows become a Parquet table.

python examples/spark_tag.py resources --out spark
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from pyspark.sql import SparkSession

from ced import AudioError, Tagger

COLUMNS = "file string, start double, end double, label string, mid string, prob float, error string"


def tag(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    """Turn the paths of a partition into a row for each tag, or one with the error of a file that cannot be read."""
    with Tagger("esc10") as tagger:  # opened once a partition, in the task
        for batch in batches:
            rows = []
            for path in batch["path"]:
                try:
                    record = tagger.tag(path)
                except AudioError as error:
                    rows.append((path, None, None, None, None, None, str(error)))
                    continue
                for piece in record:
                    rows += [(path, piece.start, piece.end, each.label, each.mid, each.prob, None) for each in piece.tags]
            yield pd.DataFrame(rows, columns=[column.split()[0] for column in COLUMNS.split(", ")])


def main() -> None:
    """Tag a folder, and show the most probable class of each file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", default="spark")
    arguments = parser.parse_args()
    spark = SparkSession.builder.appName("ced").getOrCreate()
    paths = sorted(str(path.resolve()) for path in arguments.folder.rglob("*.*") if path.suffix in (".ogg", ".wav"))
    files = spark.createDataFrame([(path,) for path in paths], "path string")
    # As many partitions as cores, or a few times as many: each opens the model once.
    tags = files.repartition(spark.sparkContext.defaultParallelism).mapInPandas(tag, COLUMNS)
    tags.write.mode("overwrite").parquet(arguments.out)
    for row in spark.read.parquet(arguments.out).where("error is null").groupBy("file").max("prob").orderBy("file").collect():
        print(Path(row["file"]).name, f"{row['max(prob)']:.2f}")
    spark.stop()


if __name__ == "__main__":
    main()
