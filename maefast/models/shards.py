"""Folders of torch.distributed.checkpoint, read by one process or by several, with nothing in them run."""

from __future__ import annotations

import pathlib
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INDEX = ".metadata"  # by which such a folder is known
# What an index is made of. It is a pickle, and torch reads it as one, so here nothing else is let through.
_PARTS = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
}  # fmt: skip
_PATHS = {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("pathlib") and name in _PATHS:
            return pathlib.PurePath
        if name in _PARTS.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it holds an object of {module}.{name}, which is not loaded: it could run code")


def is_sharded(folder: Path) -> bool:
    """Whether torch.distributed.checkpoint wrote this folder."""
    return (folder / INDEX).is_file()


def read(folder: Path, empty: Callable[[str, torch.Size, torch.dtype], Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors in a folder that `is_sharded`, whatever number of processes wrote it.

    Args:
        empty: (name, shape, dtype) -> the tensor to read into; one in shards (DTensor) is read by all of its processes
            together, each its part. By default each is read whole, into the memory of the host.

    Raises:
        ValueError: it cannot be read, or its index holds what is no part of one.
    """
    # Imported late: it takes long, and most checkpoints need none of it.
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

    class Reader(FileSystemReader):
        def read_metadata(self, *_: Any, **__: Any) -> Metadata:
            with open(folder / INDEX, "rb") as file:
                found = _Unpickler(file).load()
            if not isinstance(found, Metadata):
                raise pickle.UnpicklingError(f"it is a {type(found).__name__}, no index")
            found.storage_meta = found.storage_meta or StorageMeta()
            found.storage_meta.load_id = self.load_id
            return found

    try:
        reader, tensors = Reader(folder), {}
        for name, about in reader.read_metadata().state_dict_metadata.items():
            if isinstance(about, TensorStorageMetadata):
                kind = about.properties.dtype
                tensors[name] = torch.empty(about.size, dtype=kind) if empty is None else empty(name, about.size, kind)
        alone = empty is None or not torch.distributed.is_initialized()
        with warnings.catch_warnings():  # that there is one process
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(tensors, storage_reader=reader, no_dist=alone)
    except (CheckpointException, Exception) as error:  # a broken pickle raises anything; the first is no Exception
        raise ValueError(f"{folder} cannot be read: {error}") from error
    return tensors
