"""Tables of mixed types as numbers that distances can be taken between, and tables on disk (csv, parquet)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float

from foveal.core.errors import UserError

SUFFIXES = (".csv", ".tsv", ".parquet", ".pq")
#: Wider rows are projected at random to this many columns, which keeps distances to about a tenth (Johnson and Lindenstrauss).
WIDEST = 256
#: Values of a categorical column that get a column of their own; rarer ones share one.
MOST_CATEGORIES = 32


def read_table(path: str | Path) -> pd.DataFrame:
    """A csv, tsv or parquet file.

    Raises:
        UserError: missing, unreadable, of another type, or without rows.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"expected a table; {file} does not exist; check the path")
    if file.suffix.lower() not in SUFFIXES:
        raise UserError(f"expected a table ending in {', '.join(SUFFIXES)}; got {file.name}; save it as one of these")
    try:
        if file.suffix.lower() in (".parquet", ".pq"):
            table = pd.read_parquet(file)
        else:
            table = pd.read_csv(file, sep="\t" if file.suffix.lower() == ".tsv" else ",")
    except (ValueError, OSError) as error:  # pandas' and arrow's parsing errors are ValueErrors
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"expected a table; {file} cannot be read: {reason}; check the file") from None
    if table.empty:
        raise UserError(f"expected rows and columns in {file}; it has {table.shape[0]} rows and {table.shape[1]} columns")
    return table


def write_table(table: pd.DataFrame, path: str | Path) -> None:
    """As csv, tsv or parquet, by the suffix; the index is not written."""
    file = Path(path)
    if file.suffix.lower() in (".parquet", ".pq"):
        table.to_parquet(file, index=False)
    else:
        table.to_csv(file, index=False, sep="\t" if file.suffix.lower() == ".tsv" else ",")


def encode(table: pd.DataFrame) -> Float[np.ndarray, "rows features"]:
    """Columns as numbers on one scale: what a distance between rows means.

    Numbers and times: the median for missing ones, then mean 0 and deviation 1. All else: one column a value (the rarest share one, a missing value
    is one), scaled so that two rows that differ are as far apart as two average numbers. Columns with one value alone, and names (text that
    differs in more than half of the rows), tell nothing and are left out.

    Raises:
        ValueError: no column is left.
    """
    columns: list[np.ndarray] = []
    for place in range(table.shape[1]):
        column = table.iloc[:, place]
        if column.nunique(dropna=False) <= 1:
            continue
        categorical = pd.api.types.is_bool_dtype(column) or isinstance(column.dtype, pd.CategoricalDtype)
        if not categorical and pd.api.types.is_numeric_dtype(column):
            columns.append(_standardised(column.to_numpy(dtype=np.float64, na_value=np.nan)))
        elif pd.api.types.is_datetime64_any_dtype(column) or pd.api.types.is_timedelta64_dtype(column):
            ticks = column.astype("int64").to_numpy(dtype=np.float64)
            columns.append(_standardised(np.where(column.isna(), np.nan, ticks)))
        elif categorical or column.nunique() <= max(MOST_CATEGORIES, len(column) // 2):
            columns.append(_one_hot(column))
    if not columns:
        raise ValueError("expected a column that tells rows apart; every column is constant, or a name of its row")
    return np.column_stack(columns)


def _standardised(values: np.ndarray) -> np.ndarray:
    if np.isinf(values).any():
        values = np.where(np.isinf(values), np.nan, values)
    filled = np.where(np.isnan(values), np.nanmedian(values), values)
    deviation = filled.std()
    return ((filled - filled.mean()) / (deviation if deviation > 0 else 1.0)).astype(np.float32)


def _one_hot(column: pd.Series) -> np.ndarray:
    text = column.astype("string").fillna("<missing>")
    frequent = text.value_counts().index[: MOST_CATEGORIES - 1]
    codes = pd.Categorical(text.where(text.isin(frequent), "<other>")).codes
    return np.eye(codes.max() + 1, dtype=np.float32)[codes]
