"""Folders as DSSD's own program leaves them, and a pickle that shows whether it was run."""

import os
import shutil
from pathlib import Path

DSSD_FILES = ("aux_heads.pt", "config.json", "calibration.json")


class Touch:
    """Unpickled without care, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def dssd_folder(bundle: Path, folder: Path) -> Path:
    """The files that DSSD's own program would have left, and nothing of ours."""
    folder.mkdir()
    for name in DSSD_FILES:
        shutil.copy(bundle / name, folder / name)
    return folder
