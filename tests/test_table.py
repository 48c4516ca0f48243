"""Tests tables: kinds and scales of their columns, and CSV and Parquet files."""

import numpy as np
import pandas as pd
import pytest
from ml_collections import ConfigDict

from avb_tf import data
from avb_tf.columns import TableLikelihood
from avb_tf.data import table_files
from avb_tf.data.table import Table, kinds_of
from avb_tf.errors import UserError

RNG = np.random.default_rng(0)
FRAME = pd.DataFrame(
    {
        "age": RNG.normal(50.0, 10.0, 40),
        "visits": RNG.poisson(3.0, 40),
        "days": RNG.uniform(1.0, 9.0, 40),
        "city": RNG.choice(["Rome", "Oslo"], 40),
        "grade": RNG.integers(1, 4, 40),
        "ill": RNG.random(40) < 0.5,
        "id": [f"p{i}" for i in range(40)],
    }
)
KINDS = {
    "visits": "poisson", "days": "exposure", "city": "category", "grade": "category", "id": "skip",
}  # fmt: skip


def column(table, name):
    return next(column for column in table.columns if column.name == name)


def test_a_frame_gives_kinds_scales_and_categories():
    table = Table.of(FRAME, KINDS)
    kinds = {c.name: c.kind for c in table.columns}
    assert kinds == {
        "age": "gaussian", "visits": "poisson", "days": "exposure", "city": "category",
        "grade": "category", "ill": "bernoulli",
    }  # fmt: skip
    age, visits, days = (column(table, name) for name in ("age", "visits", "days"))
    assert (age.shift, age.scale) == pytest.approx((FRAME.age.mean(), FRAME.age.std(ddof=0)))
    assert visits.shift == pytest.approx(FRAME.visits.sum() / FRAME.days.sum())
    assert visits.scale == pytest.approx(np.log1p(FRAME.visits).std(ddof=0))
    assert days.shift == pytest.approx(np.log(FRAME.days).mean())
    assert column(table, "city").categories == ("Oslo", "Rome")
    assert column(table, "grade").categories == (1, 2, 3)
    assert "| visits | poisson " in str(table)
    assert "Oslo, Rome" in str(table)


def test_rows_go_to_numbers_and_back():
    table = Table.of(FRAME, KINDS)
    rows = table.array(FRAME)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows[:, 4], FRAME.grade - 1)
    back = table.frame(rows)
    pd.testing.assert_frame_equal(
        back, FRAME.drop(columns="id"), check_dtype=False, check_categorical=False, rtol=1e-6
    )
    np.testing.assert_array_equal(table.array(back), rows)


def test_missing_values_are_left_out_of_the_scales():
    holes = FRAME.astype({"ill": object, "visits": "Int64"})
    for name in ("age", "visits", "city", "ill"):
        holes.loc[:9, name] = None
    table = Table.of(holes, KINDS, missing=True)
    rest = FRAME[10:]
    assert column(table, "age").shift == pytest.approx(rest.age.mean())
    assert column(table, "visits").shift == pytest.approx(rest.visits.sum() / rest.days.sum())
    assert column(table, "ill").kind == "bernoulli"
    rows = table.array(holes)
    absent = [True, True, False, True, False, True]
    np.testing.assert_array_equal(np.isnan(rows[:10]), np.tile(absent, [10, 1]))
    assert not np.isnan(rows[10:]).any()
    assert table.frame(rows).isna().to_numpy().sum() == 40
    with pytest.raises(UserError, match=r"column 'age' has no value in row 0.*missing=True"):
        Table.of(holes, KINDS)


def test_a_kind_may_be_of_all_columns():
    counts = RNG.poisson(4.0, (30, 3))
    table = Table.of(counts, "negative_binomial")
    assert {c.kind for c in table.columns} == {"negative_binomial"}
    assert TableLikelihood(table).outputs == 6
    np.testing.assert_array_equal(table.array(counts), counts)
    mixed = Table.of(counts, {"*": "poisson", "1": "category"})
    assert [c.kind for c in mixed.columns] == ["poisson", "category", "poisson"]
    assert mixed.columns[1].categories == tuple(range(counts[:, 1].max() + 1))
    assert kinds_of("a=poisson, b c=skip") == {"a": "poisson", "b c": "skip"}
    assert kinds_of("poisson") == "poisson"
    assert kinds_of("") == ""


LARGE = FRAME.assign(age=1.7e9 + FRAME.age)
WRONG = {
    "text": (FRAME, {"id": "", "city": "category"}, "'id' has 'p0' in row 0.*'id': 'category'"),
    "text of a count": (FRAME, KINDS | {"city": "poisson"}, "'city' has '(Rome|Oslo)' in row 0"),
    "an unknown kind": (FRAME, KINDS | {"age": "normal"}, "kind 'normal' is unknown.*gaussian"),
    "an unknown column": (FRAME, KINDS | {"agee": "gaussian"}, "no column 'agee'.*age, visits"),
    "fractions": (FRAME, KINDS | {"age": "poisson"}, r"'age' has \d+\.\d+ in row 0.*a count"),
    "negative counts": (FRAME.assign(visits=-3), KINDS, "'visits' has -3 in row 0"),
    "infinity": (FRAME.assign(age=np.inf), KINDS, "'age' has inf in row 0"),
    "too large": (FRAME.assign(age=1e39), KINDS, "'age' has 1e.39 in row 0.*float32"),
    "constant": (FRAME.assign(age=3.0), KINDS, "'age' has fewer than two values.*'skip'"),
    "one category": (FRAME.assign(city="Rome"), KINDS, "'city' has fewer than two values"),
    "nothing": (FRAME.assign(age=np.nan), KINDS, "'age' has no value in row 0"),
    "too precise": (LARGE, KINDS, "'age' varies by .* around 1.7e.09.*subtract a constant"),
    "no exposure": (FRAME.assign(days=0.0), KINDS, "'days' has 0.0 in row 0.*above 0"),
    "two exposures": (FRAME, KINDS | {"age": "exposure"}, "the exposures age, days; expected one"),
    "dates": (FRAME.assign(age=pd.Timestamp(0)), KINDS, "'age' is of type datetime"),
    "odd categories": (
        FRAME.assign(city=[pd.Timestamp(i) for i in range(40)]), KINDS, "'city' has the category",
    ),
    "codes beyond all bounds": (np.array([[1e9], [1.0]]), "category", "1000000001 categories"),
    "nothing to model": (FRAME[["days"]], {"days": "exposure"}, "no column to model"),
    "no rows": (FRAME[:0], KINDS, "has no rows"),
    "same names": (FRAME.rename(columns={"id": "age"}), {}, "several columns 'age'"),
    "a vector": (np.zeros(3), {}, r"of shape|shape \(3,\)"),
    "an array of text": (np.array([["a"]]), {}, "an array of numbers"),
    "ragged": ([[1.0], [1.0, 2.0]], {}, "x is not an array"),
}  # fmt: skip


@pytest.mark.parametrize(("x", "kinds", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_a_table_is_refused_in_one_line(x, kinds, message):
    with pytest.raises(UserError, match=message) as error:
        Table.of(x, kinds)
    assert "\n" not in str(error.value)


# Files.


LISTED = ",".join(f"{name}={kind}" for name, kind in KINDS.items())


def load(path, columns=LISTED, missing=False, like=None):
    settings = {"name": "table", "path": str(path), "seed": 0}
    return data.load(ConfigDict({**settings, "columns": columns, "missing": missing}), like)


def content(split):
    return split.read(np.arange(split.size)).numpy()


def test_a_csv_file_is_cut_into_splits_with_the_scales_of_the_train_rows(tmp_path):
    frame = FRAME.astype({"city": object})
    frame.loc[7, "city"] = "Bergen"
    frame.to_csv(tmp_path / "table.csv", index=False)
    source = load(tmp_path / "table.csv")
    assert [source.train.size, source.validation.size, source.test.size] == [32, 4, 4]
    assert source.event_shape == (6,)
    rows = np.concatenate([content(s) for s in (source.train, source.validation, source.test)])
    in_order = rows[np.argsort(rows[:, 0])]
    expected = Table.of(frame, KINDS).array(frame)
    np.testing.assert_allclose(in_order, expected[np.argsort(expected[:, 0])], rtol=1e-6)
    assert column(source.table, "age").shift == pytest.approx(content(source.train)[:, 0].mean())
    assert column(source.table, "city").categories == ("Bergen", "Oslo", "Rome")


def test_a_later_file_is_read_with_the_models_columns(tmp_path):
    FRAME.to_csv(tmp_path / "first.csv", index=False)
    FRAME.assign(grade=FRAME.grade.clip(2)).to_csv(tmp_path / "later.csv", index=False)
    first = load(tmp_path / "first.csv")
    later = load(tmp_path / "later.csv", like=TableLikelihood(first.table))
    assert later.table == first.table
    np.testing.assert_array_equal(
        content(later.train)[:, 4], np.maximum(content(first.train)[:, 4], 1)
    )
    FRAME.assign(city="Bergen").to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(UserError, match="'city' has 'Bergen' in row 0"):
        load(tmp_path / "other.csv", like=TableLikelihood(first.table))


def test_empty_cells_of_a_csv_file_are_missing_values(tmp_path):
    (tmp_path / "x.csv").write_text("\ufeffa,b\n1.5,2\n,3\n\n2.5,\n9,1\n7,5\n", encoding="utf-8")
    source = load(tmp_path / "x.csv", "", missing=True)
    rows = np.concatenate([content(s) for s in (source.train, source.validation, source.test)])
    assert np.isnan(rows).sum(0).tolist() == [1, 1]
    with pytest.raises(UserError, match=r"x\.csv: column 'a' has no value in row 1"):
        load(tmp_path / "x.csv", "")


FILES = {
    "empty.csv": (b"", "begins with an empty line"),
    "header.csv": (b"a,b\n", "no rows"),
    "short.csv": (b"a,b\n1,2\n3\n", "1 values in row 1"),
    "long.csv": (b"a,b\n1,2\n3,4,5\n", "3 values in row 1"),
    "index.csv": (b",a\n0,1\n1,2\n", "column 0.*no name.*index=False"),
    "twice.csv": (b"a,a\n0,1\n1,2\n", "several columns 'a'"),
    "no_header.csv": (b"1.5,2\n0,1\n1,2\n", "begins with the numbers 1.5"),
    "binary.csv": (b"\xff\xfe\x00a", "cannot be read"),
    "quote.csv": (b'a,b\n"1,2\n', "cannot be read"),
    "table.parquet": (b"PAR1", "cannot be read|needs pyarrow"),
    "table.pkl": (b"", "no .csv or .parquet file"),
    "infinite.csv": (b"a\n1\n1e999\n2\n3\n", "'a' has inf in row 1"),
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_refused_in_one_line(name, tmp_path):
    content, message = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path / name, "")
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_wrong_list_of_columns_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "none.csv")
    FRAME.to_csv(tmp_path / "x.csv", index=False)
    with pytest.raises(UserError, match="expected name=kind"):
        load(tmp_path / "x.csv", "age=gaussian,poisson")
    with pytest.raises(UserError, match=r"config\.data\.path is empty"):
        load("")


def test_a_parquet_file_is_read_as_a_frame(tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow, of the extra [parquet], is not installed")
    FRAME.to_parquet(tmp_path / "x.parquet")
    pd.testing.assert_frame_equal(table_files.read(tmp_path / "x.parquet"), FRAME)
    assert load(tmp_path / "x.parquet").event_shape == (6,)
