"""One repository on the Hub, through `huggingface_hub`: what is tried again, what is never sent twice, how refusals read.

The library tries uploads of large files again by itself, but neither the creation of a repository nor the commit. Both are
tried again here. A commit whose reply was lost may have arrived, so before another try the branch is looked at: where it
has moved to our content, the push is done.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars

from early_exit_cli import __version__
from early_exit_cli.config_files import HubConfig
from early_exit_cli.errors import ConfigError, HubError
from early_exit_cli.files.atomic import file_sha256

BUSY = {408, 429, 500, 502, 503, 504}
CONFLICT = {409, 412}
COMMIT = re.compile(r"[0-9a-f]{40}")
LOG_IN = "hf auth login, or HF_TOKEN"
Result = TypeVar("Result")


class UnreachableError(HubError):
    """No answer, or that of an overloaded server: it may be different in a moment."""


class OfflineError(UnreachableError):
    """There is no way to the Hub at all: trying again now is of no use."""


class ConflictError(HubError):
    """The branch is not where it was."""


@dataclass(frozen=True)
class Commit:
    """What a push left: the branch's commit, the files that changed, the pull request if one was opened."""

    commit: str
    changed: list[str]
    pull_request: str | None = None


class Repository:
    """A model repository; every method raises HubError in words a person can act on."""

    def __init__(self, config: HubConfig) -> None:
        if config.repo_id is None:
            raise ConfigError("which repository?", hint="--repo-id ORG/NAME")
        self.repo_id, self.revision, self.config = config.repo_id, config.revision, config
        self.name = f"{config.repo_id}@{config.revision}" if config.revision else config.repo_id
        if not sys.stderr.isatty():
            disable_progress_bars()
        self.api = HfApi(library_name="eexit", library_version=__version__)
        self.url = f"{self.api.endpoint}/{self.repo_id}"

    def head(self) -> str:
        """The commit that the revision names."""
        return str(self._patiently(lambda: self.api.model_info(self.repo_id, revision=self.revision)).sha)

    def ensure(self, private: bool) -> None:
        """Make the repository, and the branch, where they are missing.

        Raises:
            HubError: refused; or it is public and a private one is asked for.
        """
        self._patiently(lambda: self.api.create_repo(self.repo_id, private=private or None, exist_ok=True))
        if private and self._patiently(lambda: self.api.model_info(self.repo_id)).private is False:
            raise HubError(f"{self.repo_id} exists and is public", hint="another --repo-id, or without --private")
        branch = self.revision
        if branch not in (None, "main") and not branch.startswith("refs/"):
            self._patiently(lambda: self.api.create_branch(self.repo_id, branch=branch, exist_ok=True))

    def commit(self, files: Mapping[str, Path | None], message: str, create_pr: bool) -> Commit:
        """Bring the branch to `files` in one commit; None means that the file must not be there. No change, no commit.

        Raises:
            HubError: refused, unreachable, or somebody else committed meanwhile.
        """
        parent = self.head()
        operations = self._patiently(lambda: self._changes(files, parent))
        if not operations:
            return Commit(parent, [])
        changed = [operation.path_in_repo for operation in operations]

        def send() -> Commit:
            info = self.api.create_commit(
                self.repo_id,
                operations,
                commit_message=message,
                revision=self.revision,
                create_pr=create_pr,
                parent_commit=parent,
            )
            return Commit(info.oid, changed, info.pr_url)

        def arrived(fault: HubError) -> Commit | None:
            if create_pr and not isinstance(fault, ConflictError):
                raise HubError(
                    f"the connection broke; whether the pull request to {self.name} was opened is unknown",
                    hint=f"look at {self.url}/discussions before pushing again",
                )
            head = self.head()
            if head == parent or create_pr:
                return None
            if self._patiently(lambda: self._changes(files, head)):
                raise ConflictError(f"somebody else committed to {self.name} meanwhile", hint="push again")
            return Commit(head, changed)

        return self._patiently(send, arrived)

    def _changes(
        self, files: Mapping[str, Path | None], commit: str
    ) -> list[CommitOperationAdd | CommitOperationDelete]:
        """What leads from the files of a commit to `files`."""
        entries = self.api.list_repo_tree(self.repo_id, revision=commit)
        there = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
        operations: list[CommitOperationAdd | CommitOperationDelete] = []
        for name, path in files.items():
            if path is None:
                if name in there:
                    operations.append(CommitOperationDelete(name))
            elif name not in there or not is_same(path, there[name]):
                operations.append(CommitOperationAdd(name, path))
        return operations

    def download(self, names: Iterable[str]) -> tuple[Path, str]:
        """Those of the files that exist, in the Hub's cache; where the Hub is not reached, as they are in the cache.

        Returns:
            (folder, commit).

        Raises:
            HubError: no such repository or revision, or neither reached nor cached.
        """
        fetch = partial(
            snapshot_download, self.repo_id, revision=self.revision, allow_patterns=list(names), library_name="eexit"
        )
        try:
            if self.revision is None or COMMIT.fullmatch(self.revision) is None:
                self.head()  # patiently; the download itself would take what is in the cache at the first fault
            folder = self._patiently(fetch)
        except UnreachableError as error:
            try:
                folder = fetch(local_files_only=True)
            except (OSError, ValueError):
                raise HubError(f"{error.message}, and {self.name} is not in its cache", hint=error.hint) from error
        return Path(folder), Path(folder).name

    def _patiently(
        self, call: Callable[[], Result], arrived: Callable[[HubError], Result | None] | None = None
    ) -> Result:
        """`call()`, tried again while the Hub is busy or the connection breaks; `arrived` tells whether it worked after all.

        Raises:
            HubError
        """
        wait, tries_left = self.config.retry_wait, self.config.retries
        while True:
            try:
                with self._readable():
                    return call()
            except (UnreachableError, ConflictError) as error:
                again = isinstance(error, UnreachableError) and not isinstance(error, OfflineError) and tries_left > 0
                if again:
                    time.sleep(wait)
                    wait, tries_left = wait * 2, tries_left - 1
                done = arrived(error) if arrived else None
                if done is not None:
                    return done
                if not again:
                    raise

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Turn the library's exceptions into ours. The token is taken out of what the server says."""
        try:
            yield
        except OfflineModeIsEnabled as error:
            raise OfflineError(
                "HF_HUB_OFFLINE is set: the Hub is not asked", hint="HF_HUB_OFFLINE=0 eexit ..."
            ) from error
        except HfHubHTTPError as error:
            raise self._refusal(error) from error
        except (HTTPError, json.JSONDecodeError) as error:  # JSON: a gateway in between answered
            if type(error).__name__ == "ConnectError":  # of httpx or httpx2, whichever the library uses
                raise OfflineError(f"{self.api.endpoint} cannot be reached", hint="check the network") from error
            raise UnreachableError(
                f"the connection to {self.api.endpoint} broke ({type(error).__name__})",
                hint="the same command again: what has arrived is not sent twice",
            ) from error
        except (OSError, ValueError, RuntimeError) as error:
            raise HubError(f"{self.name}: {one_line(str(error))}") from error

    def _refusal(self, error: HfHubHTTPError) -> HubError:
        status = error.response.status_code
        said = one_line(error.server_message or "")
        if status in BUSY:
            return UnreachableError(
                f"the Hub is busy ({status})", hint="the same command later: what has arrived is not sent twice"
            )
        if status in CONFLICT:
            return ConflictError(f"{self.name} changed meanwhile ({status}) {said}".rstrip(), hint="push again")
        if isinstance(error, GatedRepoError):
            return HubError(f"{self.repo_id} is gated", hint=f"ask for access at {self.url}, then {LOG_IN}")
        if isinstance(error, RevisionNotFoundError):
            return HubError(f"{self.repo_id} has no revision {self.revision or 'main'}")
        if status == 401 and get_token():
            return HubError("the Hub does not accept the token (401)", hint=LOG_IN)
        if status == 401:
            return HubError(f"the Hub shows {self.repo_id} to nobody without a token (401)", hint=LOG_IN)
        if status == 403:
            return HubError(f"the token may not do this to {self.repo_id} (403) {said}".rstrip(), hint=LOG_IN)
        if status == 404:
            return HubError(f"the Hub has no {self.name}, or this token may not see it (404)", hint=LOG_IN)
        return HubError(f"{self.name}: the Hub answered {status} {said}".rstrip())


def is_same(path: Path, there: RepoFile) -> bool:
    """Whether a local file is the one on the Hub: SHA-256 for large files, git's SHA-1 for others."""
    if path.stat().st_size != there.size:
        return False
    if there.lfs is not None:
        return file_sha256(path) == there.lfs.sha256
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == there.blob_id


def one_line(text: str) -> str:
    """The text on one line, without the token."""
    token = get_token()
    return " ".join(text.replace(token, "***").split() if token else text.split())
