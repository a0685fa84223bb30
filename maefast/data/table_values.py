"""Columns of Arrow and Parquet that hold images or paths: which fit, and what a row has."""

from __future__ import annotations

from typing import Any

from maefast.data import remote
from maefast.data.records import is_url


def open_parquet(file: str) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(remote.open_file(file) if is_url(file) else file)


def is_text(kind: Any) -> bool:
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind)


def is_binary(kind: Any) -> bool:
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind)


def fitting_columns(schema: Any, column: str | None) -> tuple[list[str], str | None]:
    """The columns of bytes or, without any, of texts, both where one is asked for; and that one."""
    from pyarrow import types

    kinds = {entry.name: entry.type for entry in schema}
    texts = [name for name, kind in kinds.items() if is_text(kind)]
    held = [
        name
        for name, kind in kinds.items()
        if is_binary(kind) or (types.is_struct(kind) and kind.get_field_index("bytes") >= 0)
    ]
    return (held + texts if column is not None else held or texts), column


def field_of(value: Any, at: int, name: str) -> Any:
    from pyarrow import types

    if not types.is_struct(value.type) or value.type.get_field_index(name) < 0 or not value[at].is_valid:
        return None
    return value[at][name].as_py()


def has_bytes(value: Any, at: int) -> bool:
    from pyarrow import types

    return not types.is_struct(value.type) or (value[at].is_valid and value[at]["bytes"].is_valid)


def bytes_of(value: Any, at: int) -> bytes:
    found = value[at].as_py() if is_binary(value.type) else field_of(value, at, "bytes")
    if found is None:
        raise ValueError("there is nothing in its row")
    return found


def raising(error: Exception) -> bytes:
    raise error


def reason_of(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else error!r}"
