"""Tables in CSV and Parquet files. The readers never unpickle anything."""

import csv
from pathlib import Path
from typing import Any

from avb_tf.data.source import Source, array_split, cut, data_path
from avb_tf.data.table import Table, kinds_of
from avb_tf.errors import UserError

SUFFIXES = (".csv", ".parquet")


def load(path: str, seed: int, columns: str, missing: bool, table: Table | None = None) -> Source:
    """Returns a source of a table's rows, 80 % train, 10 % validation and 10 % test.

    Args:
      path: a .csv or .parquet file.
      seed: seed of the cut.
      columns: the columns' kinds, as `table.kinds_of` parses them.
      missing: whether values may be missing.
      table: the table of a trained model, whose columns the file must have. By default the train
        rows define the table.
    Raises:
      UserError: the file cannot be read, or a column is not as described.
    """
    import pandas

    place = data_path(path)
    if not place:
        raise UserError("config.data.path is empty; expected a .csv or .parquet file; name one")
    frame = read(Path(place))
    train, validation, test = cut(len(frame), 2, seed, place)
    if table is None:
        kinds = kinds_of(columns)
        # All rows define the categories, because a rare category may be absent from the train rows.
        whole = Table.of(frame, kinds, missing, place)
        types = {
            column.name: pandas.CategoricalDtype(list(column.categories))
            for column in whole.columns
            if column.kind == "category"
        }
        table = Table.of(frame.astype(types).iloc[train], kinds, missing, place)
    rows = table.array(frame, place)
    splits = [array_split(rows[part]) for part in (train, validation, test)]
    return Source("table", rows.shape[1:], *splits, table=table)


def read(path: Path) -> Any:
    """Reads the file as a pandas data frame.

    Raises:
      UserError: the file is missing, empty or damaged, or its rows differ in length.
    """
    import pandas

    readers = {".csv": _read_csv, ".parquet": pandas.read_parquet}
    if path.suffix.lower() not in readers:
        raise UserError(
            f"{path} is not a .csv or .parquet file; expected one of these; rename or convert it"
        )
    try:
        frame = readers[path.suffix.lower()](path)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f"{path} needs pyarrow, which is not installed; pip install 'avb_tf[parquet]'"
        ) from error
    except Exception as error:  # pandas, csv and pyarrow raise different exception types
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read ({reason:.150}); expected a table") from error
    if not len(frame):
        raise UserError(f"{path} has no rows; expected a table")
    return frame


def _read_csv(path: Path):
    """Reads a CSV file and checks that every row is as long as the header.

    pandas would fill short rows without an error.
    """
    import pandas

    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        header = next(reader, [])
        if not "".join(header).strip():
            raise UserError(f"{path} begins with an empty line; expected the columns' names")
        for i, name in enumerate(header):
            if not name.strip():
                raise UserError(
                    f"{path}: column {i}, counted from 0, has no name; name it, or write the file "
                    "without its index (to_csv(index=False))"
                )
            if name in header[:i]:
                raise UserError(f"{path} has several columns '{name}'; rename them")
        if all(map(_is_number, header)):
            raise UserError(f"{path} begins with the numbers {header[0]}, ...; expected names")
        for number, row in enumerate(filter(None, reader)):
            if len(row) != len(header):
                raise UserError(
                    f"{path} has {len(row)} values in row {number}, counted from 0; expected "
                    f"{len(header)}, as in its first line"
                )
    return pandas.read_csv(path, encoding="utf-8-sig", index_col=False, low_memory=False)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
