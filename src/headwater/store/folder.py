"""A folder of one JSON file and one safetensors file: arrays and what they mean, readable without this library."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from headwater.errors import DamagedFile, NotSaved
from headwater.store.draft import draft
from headwater.store.kinds import kind_of
from headwater.store.seal import SAVE_AGAIN, check_folder, seal_folder

DESCRIPTION, ARRAYS = "fit.json", "arrays.safetensors"


def write_folder(
    path: str | os.PathLike[str], description: Mapping[str, object], arrays: Mapping[str, np.ndarray]
) -> None:
    """Whole or not at all. Errors: AlreadySaved if there is one; NotWritten, of a full disk for example."""
    with draft(path) as folder:
        try:
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / ARRAYS)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        (folder / DESCRIPTION).write_text(json.dumps(description))
        seal_folder(folder, DESCRIPTION)


def read_folder(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What `write_folder` wrote. Errors: NotSaved; DamagedFile for files that are not as they were written."""
    folder = Path(path)
    if not (folder / DESCRIPTION).is_file() and not (folder / ARRAYS).is_file():
        raise NotSaved(f"{path} is no saved fit: it needs {DESCRIPTION} and {ARRAYS}{kind_of(folder)}.")
    description = check_folder(folder, DESCRIPTION)
    try:
        return description, load_file(folder / ARRAYS)
    except (OSError, ValueError, SafetensorError) as error:
        raise DamagedFile(f"{folder / ARRAYS} cannot be read ({error}). {SAVE_AGAIN}") from error
