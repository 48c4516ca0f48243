"""The columns of a table: their kinds and scales, and how users' values become numbers.

Rows are float32 [n, columns] in the user's units. A category is a code 0, 1, ..., and NaN stands
for a missing value. The module `avb_tf.columns` has the likelihood of these rows and the layer that
reads them.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import keras
import numpy as np

from avb_tf import tables
from avb_tf.errors import UserError

REAL, COUNTS = ("gaussian", "student_t"), ("poisson", "negative_binomial")
KINDS = (*REAL, *COUNTS, "bernoulli", "category", "exposure")
SKIP = "skip"  # a column that is left out
_MOST_CATEGORIES = 1000
_FEWEST_DIGITS = 1e5  # largest mean in standard deviations, because float32 has 7 digits


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
      name: name of the column.
      kind: one of `KINDS`.
      shift: for real numbers the mean, for counts the mean per unit of exposure, for an exposure
        the mean of its log; 0 for other kinds.
      scale: for real numbers the standard deviation, for counts the standard deviation of
        log(1 + x), for an exposure the standard deviation of its log; 1 for other kinds.
      categories: for categories the values that the codes 0, 1, ... stand for; () for other kinds.
    """

    name: str
    kind: str
    shift: float = 0.0
    scale: float = 1.0
    categories: tuple[Any, ...] = ()


@keras.saving.register_keras_serializable("avb_tf")
@dataclass(frozen=True)
class Table:
    """The columns of a table of real numbers, counts and categories.

        frame = pandas.read_csv("patients.csv")
        table = avb_tf.Table.of(frame, {"visits": "poisson", "city": "category"}, missing=True)
        model = avb_tf.build("avb_ac", table, latent_dim=4)
        model.compile()
        model.fit(frame, epochs=20)
        filled = frame.fillna(model.reconstruct(frame, samples=100))

    `print(table)` shows the columns. A saved model keeps its table as `model.table`.

    Attributes:
      columns: the columns, in the order of the model's x.
      missing: whether values may be missing (NaN).
      skipped: names of the columns that are left out.
    """

    columns: tuple[Column, ...]
    missing: bool = False
    skipped: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, x: Any, kinds: Mapping[str, str] | str = "", missing: bool = False, place: str = "x"
    ) -> "Table":
        """Returns the table that describes x.

        Args:
          x: a pandas data frame, or an array [n, columns]. The columns of an array are named "0",
            "1", ..., and its categories are codes 0, 1, ...
          kinds: column -> kind, or one kind for all columns; "*" stands for all columns that are
            not named here. Real numbers: gaussian or student_t, with a learned scale. Counts:
            poisson or negative_binomial. Zeros and ones: bernoulli. One of several values:
            category. exposure: a column that multiplies the rates of all counts and is not
            modelled. skip: a column that is left out. Without a kind, a column of zeros and ones is
            bernoulli, a pandas Categorical is a category, and any other column of numbers is
            gaussian.
          missing: whether values may be missing (NaN).
          place: name of x in error messages.
        Raises:
          UserError: a name or kind is unknown, or a column has values that its kind cannot have, or
            has only one distinct value.
        """
        values = _columns(x, place)
        kinds = {"*": kinds} if isinstance(kinds, str) else kinds
        if unknown := sorted(set(kinds) - set(values) - {"*"}):
            raise UserError(
                f"{place} has no column '{unknown[0]}'; expected one of {_listed(values)}"
            )
        for kind in kinds.values():
            if kind not in (*KINDS, SKIP, ""):
                raise UserError(
                    f"kind '{kind}' is unknown; expected one of {_listed((*KINDS, SKIP))}"
                )
        kind_of = {name: kinds.get(name, kinds.get("*", "")) for name in values}
        skipped = tuple(name for name, kind in kind_of.items() if kind == SKIP)
        kept = {name: column for name, column in values.items() if name not in skipped}
        exposures = [name for name in kept if kind_of[name] == "exposure"]
        if len(exposures) > 1:
            raise UserError(f"{place} has the exposures {_listed(exposures)}; expected one at most")
        exposure = 1.0
        if exposures:
            column = Column(exposures[0], "exposure")
            exposure = _numbers(column, kept[column.name], missing, place)
        columns = tuple(
            _described(name, column, kind_of[name], missing, exposure, place)
            for name, column in kept.items()
        )
        if all(column.kind == "exposure" for column in columns):
            raise UserError(f"{place} has no column to model; expected at least one")
        return cls(columns, missing, skipped)

    def array(self, x: Any, place: str = "x") -> np.ndarray:
        """Returns x in the form that the model takes, float32 [n, columns].

        Args:
          x: a data frame with the table's columns, in any order, or an array [n, columns].
          place: name of x in error messages.
        Raises:
          UserError: a column is missing, or has values that its kind cannot have.
        """
        values = _columns(x, place)
        names = [column.name for column in self.columns]
        if not is_frame(x) and len(values) == len(names):
            values = dict(zip(names, values.values(), strict=True))
        if absent := [name for name in names if name not in values]:
            raise UserError(
                f"{place} has the columns {_listed(values)}; expected {_listed(names)}; "
                f"add '{absent[0]}'"
            )
        if unknown := sorted(set(values) - set(names) - set(self.skipped)):
            raise UserError(f"{place} has the unknown column '{unknown[0]}'; remove it")
        numbers = [_numbers(c, values[c.name], self.missing, place) for c in self.columns]
        return np.stack(numbers, -1).astype(np.float32)

    def frame(self, rows: Any, index: Any = None) -> Any:
        """Returns rows as a pandas data frame with the table's names and categories.

        Args:
          rows: [n, columns], as `array` returns them, such as `model.sample(5)`.
          index: index of the frame.
        """
        import pandas

        rows, columns = np.asarray(rows, np.float64), {}
        for column, values in zip(self.columns, rows.T, strict=True):
            if column.kind == "category":
                codes = np.where(np.isnan(values), -1, values).astype(int)
                values = pandas.Categorical.from_codes(codes, list(column.categories))
            columns[column.name] = values
        return pandas.DataFrame(columns, index=index)

    def get_config(self) -> dict[str, Any]:
        """Returns plain values, for `.keras` files."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Table":
        """Returns the table that `get_config` described."""
        columns = [Column(**{**c, "categories": tuple(c["categories"])}) for c in config["columns"]]
        return cls(tuple(columns), bool(config["missing"]), tuple(config["skipped"]))

    def __str__(self) -> str:
        cells = [
            (c.name, c.kind, f"{c.shift:.4g}", f"{c.scale:.4g}", _listed(c.categories))
            for c in self.columns
        ]
        header = ("column", "kind", "mean", "scale", "categories")
        return tables.aligned([list(cell) for cell in zip(header, *cells, strict=True)])


def kinds_of(text: str) -> dict[str, str] | str:
    """Parses `config.data.columns`, such as "poisson" or "visits=poisson,city=category".

    Returns:
      Column -> kind, or one kind for all columns.
    Raises:
      UserError: the text has another form.
    """
    if "=" not in text:
        return text.strip()
    pairs = [part.rpartition("=") for part in text.split(",")]
    if any(not equals or not name.strip() for name, equals, _ in pairs):
        raise UserError(
            f"config.data.columns is '{text}'; expected name=kind,name=kind, or one kind for all"
        )
    return {name.strip(): kind.strip() for name, _, kind in pairs}


def is_frame(x: Any) -> bool:
    """Returns whether x is a pandas data frame, without importing pandas."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(x, pandas.DataFrame)


def _columns(x, place) -> dict[str, Any]:
    """Returns name -> values of the column, a pandas Series or float64 [n]."""
    if is_frame(x):
        names = [str(name) for name in x.columns]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"{place} has several columns '{repeated[0]}'; rename them")
        if not len(x):
            raise UserError(f"{place} has no rows; expected at least one")
        return {name: x.iloc[:, i] for i, name in enumerate(names)}
    try:
        rows = np.asarray(x)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{place} is not an array ({error!s:.100}); expected [n, columns]"
        ) from error
    numeric = np.issubdtype(rows.dtype, np.number) or rows.dtype == bool
    if rows.ndim != 2 or not rows.size or not numeric or np.iscomplexobj(rows):
        raise UserError(
            f"{place} is of type {rows.dtype} and shape {rows.shape}; expected a pandas data "
            "frame, or an array of numbers [n, columns]"
        )
    return {str(i): column for i, column in enumerate(rows.T.astype(np.float64))}


def _described(name, values, kind, missing, exposure, place) -> Column:
    """Returns the description of a column, with its scale and its categories."""
    dtype = getattr(values, "dtype", None)
    if kind == "" and hasattr(dtype, "categories"):
        kind = "category"
    column = Column(name, kind or "gaussian", categories=_categories(values, kind, name, place))
    numbers = _numbers(column, values, missing, place)
    known = numbers[~np.isnan(numbers)]
    if kind == "" and np.isin(known, (0, 1)).all() and len(known):
        column = Column(name, kind := "bernoulli")
    if len(np.unique(known)) < 2 and kind != "exposure":
        raise UserError(
            f"{place}: column '{name}' has fewer than two values; expected more; leave it out, "
            f"{{'{name}': 'skip'}}"
        )
    if column.kind in REAL:
        shift, scale = known.mean(), known.std()
        if abs(shift) > _FEWEST_DIGITS * scale:
            raise UserError(
                f"{place}: column '{name}' varies by {scale:.1e} around {shift:.6g}, less than "
                "float32 resolves; subtract a constant from it"
            )
        return Column(name, column.kind, float(shift), float(scale))
    if column.kind in COUNTS:
        exposed = np.broadcast_to(exposure, numbers.shape)[~np.isnan(numbers)]
        return Column(
            name, column.kind, float(known.sum() / exposed.sum()), float(np.log1p(known).std())
        )
    if column.kind == "exposure":
        logs = np.log(known)
        return Column(name, "exposure", float(logs.mean()), float(logs.std()) or 1.0)
    return column


def _categories(values, kind, name, place) -> tuple[Any, ...]:
    """Returns the categories of a column of this kind as plain Python values."""
    dtype = getattr(values, "dtype", None)
    if isinstance(values, np.ndarray):
        if kind != "category":
            return ()
        count = 1 + int(values[np.isfinite(values)].max(initial=0.0))
        _check_number(count, name, place)
        return tuple(range(count))
    if hasattr(dtype, "categories"):
        distinct = list(dtype.categories)
    elif kind == "category":
        distinct = list(values.dropna().unique())
    else:
        return ()
    _check_number(len(distinct), name, place)
    plain = [value.item() if isinstance(value, np.generic) else value for value in distinct]
    if odd := [value for value in plain if not isinstance(value, (str, int, float, bool))]:
        raise UserError(
            f"{place}: column '{name}' has the category {odd[0]!r:.50} of type "
            f"{type(odd[0]).__name__}; expected text or numbers; convert it"
        )
    if hasattr(dtype, "categories"):
        return tuple(plain)
    return tuple(sorted(plain, key=lambda value: (isinstance(value, str), value)))


def _check_number(count, name, place):
    if count > _MOST_CATEGORIES:
        raise UserError(
            f"{place}: column '{name}' has {count} categories; expected at most "
            f"{_MOST_CATEGORIES}; join some, or skip it"
        )


def _numbers(column: Column, values, missing, place) -> np.ndarray:
    """Returns the column's values as float64 [n], with NaN for missing values.

    Raises:
      UserError: a value does not suit the column's kind, or is missing and must not be.
    """
    if column.kind == "category" and not isinstance(values, np.ndarray):
        numbers = _codes(column, values, place)
    else:
        numbers = _as_numbers(column, values, place)
    absent = np.isnan(numbers)
    if column.kind == "exposure":
        _refuse(absent, "no value", column, values, place, "an exposure above 0")
    elif not missing:
        advice = "a value; fill it, or allow missing values (missing=True, config.data.missing)"
        _refuse(absent, "no value", column, values, place, advice)
    known = np.where(absent, 1.0, numbers)
    with np.errstate(over="ignore"):
        finite = np.isfinite(known.astype(np.float32))
    _refuse(~finite, None, column, values, place, "a number that float32 can hold")
    fits = {
        **dict.fromkeys(COUNTS, ((known >= 0) & (known == np.rint(known)), "a count 0, 1, 2, ...")),
        "bernoulli": ((known == 0) | (known == 1), "0 or 1"),
        "exposure": (known > 0, "an exposure above 0"),
    }
    if column.kind == "category":
        codes = np.arange(len(column.categories))
        fits["category"] = (np.isin(known, codes) | absent, f"a code below {len(codes)}")
    if column.kind in fits:
        suits, expected = fits[column.kind]
        _refuse(
            ~suits, None, column, values, place, f"{expected}, because its kind is {column.kind}"
        )
    return numbers


def _as_numbers(column, values, place) -> np.ndarray:
    """Returns a column of numbers as float64 [n]."""
    if isinstance(values, np.ndarray):
        return values
    from pandas.api import types

    advice = f"numbers; declare it a category, {{'{column.name}': 'category'}}, or skip it"
    if not types.is_numeric_dtype(values):
        texts = np.array([isinstance(value, str) for value in values])
        _refuse(texts, None, column, values, place, advice)
    try:
        if not (types.is_numeric_dtype(values) or types.is_object_dtype(values)):
            raise TypeError
        return values.to_numpy(np.float64, na_value=np.nan)
    except (TypeError, ValueError):
        raise UserError(
            f"{place}: column '{column.name}' is of type {values.dtype}; expected {advice}"
        ) from None


def _codes(column, values, place) -> np.ndarray:
    """Returns the codes of a column of categories, float64 [n]."""
    import pandas

    codes = pandas.Index(list(column.categories), dtype=object).get_indexer(
        values.astype(object)
    ).astype(np.float64)  # fmt: skip
    absent = values.isna().to_numpy()
    known = ", ".join(map(repr, column.categories[:5])) + ", ..." * (len(column.categories) > 5)
    _refuse((codes < 0) & ~absent, None, column, values, place, f"one of the categories {known}")
    return np.where(absent, np.nan, codes)


def _refuse(bad: np.ndarray, has: str | None, column, values, place, expected: str):
    """Raises a UserError about the first bad row, if there is one."""
    if not bad.any():
        return
    row = int(np.argmax(bad))
    if has is None:
        value = values[row] if isinstance(values, np.ndarray) else values.iloc[row]
        has = f"{value!s:.50}" if not isinstance(value, str) else f"'{value:.50}'"
    raise UserError(
        f"{place}: column '{column.name}' has {has} in row {row}, counted from 0; "
        f"expected {expected}"
    )


def _listed(names: Sequence[Any] | Mapping[str, Any]) -> str:
    first = ", ".join(str(name) for name in list(names)[:10])
    return first + ", ..." * (len(names) > 10)
