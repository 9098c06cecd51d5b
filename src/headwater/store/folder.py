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

from headwater.errors import InvalidInput
from headwater.store.draft import draft

DESCRIPTION, ARRAYS = "fit.json", "arrays.safetensors"


def write_folder(
    path: str | os.PathLike[str], description: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    """Whole or not at all. Errors: FileExistsError if there is one already; OSError, of a full disk for example."""
    with draft(path) as folder:
        try:
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / ARRAYS)
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=1))


def read_folder(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What `write_folder` wrote. Errors: FileNotFoundError; InvalidInput for files that are not whole."""
    folder = Path(path)
    if not (folder / DESCRIPTION).is_file() or not (folder / ARRAYS).is_file():
        raise FileNotFoundError(f"{path} is no saved fit: it needs {DESCRIPTION} and {ARRAYS}.")
    try:
        return json.loads((folder / DESCRIPTION).read_text()), load_file(folder / ARRAYS)
    except (ValueError, SafetensorError) as error:
        raise InvalidInput(f"{path} cannot be read: {error}") from error
