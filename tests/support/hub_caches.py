"""The Hub's cache on this machine, with a model in it that nobody downloaded."""

import shutil

from early_exit_cli.files.atomic import file_sha256


def hub_cache(model, folder, commit="a" * 40):
    """The Hub's cache in `folder` with `model` as the newest commit of org/tiny; the folder of its files, which are links."""
    repository = folder / "models--org--tiny"
    snapshot = repository / "snapshots" / commit
    for made in (repository / "blobs", repository / "refs", snapshot):
        made.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    for path in model.iterdir():
        blob = repository / "blobs" / file_sha256(path)
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(blob)
    return snapshot
