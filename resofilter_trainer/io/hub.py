"""Files on the Hugging Face hub: pushed in one commit, downloaded to its cache. Knows repositories, no meaning.

Everything goes through huggingface_hub, which is imported when it is needed: its endpoint, its token, its cache.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypedDict
from urllib.parse import quote, unquote

from ..config import InputError, with_known_keywords
from .files import file_at

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, DatasetCard

KIND = "dataset"  # of repository
CARD = "README.md"
BEGIN = re.compile(r"hf:/{1,2}(?=[^/])")  # `Path` makes one slash of two
URI = re.compile(r"datasets/([^/@]+/[^/@]+)(?:@(refs/(?:pr|convert)/[\w.-]+|[^/]+))?(?:/(.*))?")
FORM = "hf://datasets/owner/name, with @revision, a folder or a file after it where needed"
REST = 1.0  # seconds until a lost connection is tried once more
LOG_IN = "Log in with 'hf auth login', or set HF_TOKEN"


class PushOptions(TypedDict, total=False):
    """What everything that is pushed takes, as `Dataset.push_to_hub` does.

    Attributes:
        private: whether a repository that is made is private; by default what the owner's settings say.
        token: huggingface_hub's; by default the one that is logged in.
        revision: the branch to push to, which is made if it does not exist; by default the main one.
        create_pr: whether to open a pull request instead.
        commit_message: the commit's message.
    """

    private: bool | None
    token: str | bool | None
    revision: str | None
    create_pr: bool
    commit_message: str


@dataclass(frozen=True)
class HubPath:
    """A place in a repository of datasets on the hub.

    Attributes:
        repo_id: `owner/name`.
        revision: a branch, tag, commit or pull request (`refs/pr/1`); None for the default branch.
        path: a folder or file in it; empty for all of it.
    """

    repo_id: str
    revision: str | None = None
    path: str = ""

    @classmethod
    def of(cls, text: str | os.PathLike[str]) -> Self:
        """The place that a text names, as huggingface_hub writes it: `hf://datasets/owner/name@revision/path`.

        Raises:
            InputError: it names something else than a repository of datasets.
        """
        found = URI.fullmatch(BEGIN.sub("", str(text), count=1).rstrip("/"))
        if found is None:
            raise InputError(f"'{text}' names no repository of datasets on the hub. Write {FORM}.")
        return cls(found[1], None if found[2] is None else unquote(found[2]), found[3] or "")

    def __str__(self) -> str:
        safe = "/" if str(self.revision).startswith("refs/") else ""
        revision = "" if self.revision is None else f"@{quote(self.revision, safe=safe)}"
        return f"hf://datasets/{self.repo_id}{revision}{'/' if self.path else ''}{self.path}"


def is_on_hub(path: str | os.PathLike[str]) -> bool:
    """Whether a path is one on the hub, `hf://...`."""
    return BEGIN.match(str(path)) is not None


# ---- downloading


def at_hand(path: str | os.PathLike[str], *patterns: str, token: str | bool | None = None) -> Path:
    """A local path as it is; the local copy of one on the hub, whose files are downloaded unless they are in the cache.

    Args:
        path: a file or folder, here or on the hub, see `HubPath.of`.
        patterns: which files of a folder are downloaded: `*.parquet`.
        token: huggingface_hub's; by default the one that is logged in.

    Raises:
        InputError: the repository or revision is missing, private or gated, or cannot be reached.
    """
    if not is_on_hub(path):
        return Path(path)
    from huggingface_hub import snapshot_download

    place = HubPath.of(path)
    folder = f"{place.path}/" if place.path else ""
    wanted = [place.path, *(f"{folder}{each}" for each in patterns)] if place.path else list(patterns)
    where: dict[str, Any] = {"repo_type": KIND, "revision": place.revision, "token": token}
    with hub_errors(str(place)), _without_notes():
        found = snapshot_download(place.repo_id, allow_patterns=wanted, **where)
    return Path(found) / place.path


def check_reachable(
    what: str,
    repo_id: str,
    files: Sequence[str],
    kind: str | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    subfolder: str = "",
) -> None:
    """Check in seconds, before anything is loaded from the hub, that it can be asked for a repository.

    Loading from a hub that cannot be reached takes minutes: huggingface_hub repeats each request for 23 seconds, and
    several files are asked for one after another. A repository with one of `files` in the cache is left to the loading,
    which then asks once for each file; so is any other error than those below.

    Args:
        what: the content in words, for errors: `model`.
        repo_id: the name on the hub; no folder here has it.
        files: names of files, of which the repository has one. The hub is asked for the first.
        kind: huggingface_hub's `repo_type`; by default a model's.
        revision, token, cache_dir, subfolder: as for loading.

    Raises:
        InputError: the repository is not in the cache, and is missing, private or gated, or cannot be reached.
    """
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    known = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError)
    inside = [f"{subfolder}/{each}" if subfolder else each for each in files]
    where: dict[str, Any] = {"repo_type": kind, "revision": revision}
    cache = None if cache_dir is None else Path(cache_dir)
    for last in (False, True):
        try:
            if all(try_to_load_from_cache(repo_id, each, cache, **where) is None for each in inside):
                url = hf_hub_url(repo_id, inside[0], **where)
                get_hf_file_metadata(url, token=token, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            return
        except Exception as error:  # huggingface_hub and its HTTP library each raise their own
            if not isinstance(error, known) and not _is_lost(error):
                return
            if isinstance(error, known) or _is_offline(error) or last:
                raise InputError(f"There is no {what} in a folder '{repo_id}' here. {_said(repo_id, error)}") from error
        time.sleep(REST)


@contextlib.contextmanager
def record_at(path: str | os.PathLike[str], name: str, what: str, token: str | bool | None = None) -> Iterator[Path]:
    """The local file of a record that may be on the hub, while it is read.

    Args:
        path: the file, or its folder, here or on the hub.
        name: the file's name in a folder.
        what: the content in words, for errors: `scores`.
        token: as for `at_hand`.

    Raises:
        InputError: as for `at_hand`; or there is no such file. An error of reading it says how to download it again.
    """
    if not is_on_hub(path):
        yield file_at(path, name)
        return
    place = HubPath.of(path)
    found = at_hand(path, name, token=token)
    file = found if found.is_file() else found / name
    if not file.is_file():
        raise InputError(f"There are no {what} at '{place}': it has no file '{name}'.")
    try:
        yield file
    except InputError as error:
        where = {"repo_type": KIND, "revision": place.revision, "force_download": True}
        given = ", ".join(f"{each}={value!r}" for each, value in where.items() if value is not None)
        again = f"huggingface_hub.snapshot_download({place.repo_id!r}, {given})"
        said = str(error).removesuffix(" Make it again.").removesuffix(" Make them again.")
        raise InputError(f"{said} Download it again: {again}.") from error


@contextlib.contextmanager
def _without_notes() -> Iterator[None]:
    """Silences a note of huggingface_hub's that no file was found, which an error says."""
    logger = logging.getLogger("huggingface_hub._snapshot_download")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# ---- pushing


def check_can_push(repo_id: str, token: str | bool | None = None) -> None:
    """Raise InputError for what is no repository's name, or where nobody is logged in; before hours of work."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    with hub_errors(repo_id):
        validate_repo_id(repo_id)
        HfApi().whoami(token=token)


@with_known_keywords
def push_files(
    write: Callable[[Path], object],
    card: DatasetCard,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload with resofilter",
    columns: Mapping[str, Sequence[str]] | None = None,
) -> CommitInfo:
    """Push files and their card to a repository of datasets, which is made if it does not exist, in a single commit.

    A card that somebody else has written there keeps its text, and gets what the new one's header has.

    Args:
        write: writes the files to a folder.
        card: their card.
        repo_id, private, token, revision, create_pr, commit_message: as for `Dataset.push_to_hub`.
        columns: the names of the columns of rows that were pushed there, by configuration.

    Raises:
        InputError: nobody is logged in, the token may not write there, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        with hub_errors(repo_id):
            repo_id = api.create_repo(repo_id, repo_type=KIND, private=private, exist_ok=True).repo_id
            if revision is not None and not revision.startswith("refs/pr/"):
                api.create_branch(repo_id, branch=revision, repo_type=KIND, exist_ok=True)
            card = joined(card, card_of(repo_id, revision, token), columns or {})
            (Path(folder) / CARD).write_text(str(card), encoding="utf-8")
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                repo_type=KIND,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
            )


def remove_file(name: str, repo_id: str, token: str | bool | None, revision: str | None) -> None:
    """Remove a file from a repository, if there is one."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with hub_errors(repo_id):
        if api.file_exists(repo_id, name, repo_type=KIND, revision=revision):
            api.delete_file(name, repo_id, repo_type=KIND, revision=revision, commit_message=f"Remove {name}")


def card_of(repo_id: str, revision: str | None, token: str | bool | None) -> DatasetCard | None:
    """The card of a repository on the hub; None where it has none."""
    from huggingface_hub import DatasetCard, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return DatasetCard.load(hf_hub_download(repo_id, CARD, repo_type=KIND, revision=revision, token=token))
    except LocalEntryNotFoundError:  # the hub cannot be reached
        raise
    except EntryNotFoundError:
        return None


def joined(card: DatasetCard, there: DatasetCard | None, columns: Mapping[str, Sequence[str]]) -> DatasetCard:
    """A card with what another, which it replaces, has in its header; the other's text, if somebody else wrote it.

    Args:
        card: the new card.
        there: the card that is there; its text counts as somebody else's if it has one and not the first tag of `card`.
        columns: the columns of configurations. A header with others, which datasets keeps when rows are replaced
            (github.com/huggingface/datasets/issues/8608), loses what it says of them: rows could not be loaded.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    if there is None:
        return card
    old, new = there.data.to_dict(), card.data.to_dict()
    tags = old.get("tags") or []
    foreign = bool(there.text.strip()) and new["tags"][0] not in tags
    header = {**old, **({} if foreign else new)}
    configs = {each["config_name"]: each for each in (*_configs(old), *_configs(new))}
    header |= {"configs": list(configs.values())} if configs else {}
    said = header.pop("dataset_info", None)
    infos = [each for each in (said if isinstance(said, list) else [said]) if _is_of(each, columns)]
    header |= {"dataset_info": infos if isinstance(said, list) else infos[0]} if infos else {}
    text = there.text if foreign else card.text
    return DatasetCard(f"---\n{DatasetCardData(**header).to_yaml()}\n---\n\n{text.lstrip()}")


def _is_of(info: Any, columns: Mapping[str, Sequence[str]]) -> bool:
    """Whether what a header says of a configuration is of these columns, if they are known."""
    if not isinstance(info, Mapping):
        return False
    known = columns.get(info.get("config_name", "default"))
    return known is None or [each["name"] for each in info.get("features") or []] == list(known)


def _configs(header: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """The configurations in a card's header, by which `load_dataset` knows which files are whose."""
    found = header.get("configs") or []
    return [each for each in found if isinstance(each, Mapping) and "config_name" in each]


# ---- errors


@contextlib.contextmanager
def hub_errors(where: str) -> Iterator[None]:
    """Errors of huggingface_hub as an InputError of one line.

    Args:
        where: the repository, as the message names it.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # huggingface_hub, its HTTP library and datasets each raise their own
        raise InputError(_said(where, error)) from error


def _said(where: str, error: BaseException) -> str:
    """What an error of huggingface_hub means, and what to do."""
    from huggingface_hub import errors

    lost, offline = _is_lost(error), _is_offline(error)
    error = next((each for each in _causes(error) if isinstance(each, errors.HfHubHTTPError)), error)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if offline:
        return f"'{where}' is not in the cache, and HF_HUB_OFFLINE=1 keeps from the hub: unset it."
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"'{where}' needs a token, and nobody is logged in. {LOG_IN}."
    if isinstance(error, errors.GatedRepoError):
        return f"'{where}' is gated: ask for access on its page on the hub. {LOG_IN}."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"'{where}' is not on the hub, or is private and not yours to see. Check the name. {LOG_IN}."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"'{where}' has no such revision on the hub. Pass a branch, tag or commit that it has."
    if isinstance(error, errors.HFValidationError):
        return f"'{where}' is no name of a repository on the hub. Write owner/name."
    if status == 401:
        return f"'{where}' needs a token that the hub knows. {LOG_IN}."
    if status == 403:
        return f"The token may not write to '{where}'. Use one with write access to it, or another owner's name."
    if status in (409, 412):
        return f"'{where}' has just been changed by somebody else, and nothing was pushed. Push again."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if lost:
        return f"The hub cannot be reached for '{where}': {lines[0]}. Check the network, and HF_ENDPOINT if it is set."
    return f"'{where}' on the hub: {lines[0]}"


def _is_offline(error: BaseException) -> bool:
    """Whether HF_HUB_OFFLINE has kept a request from the hub."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    return any(isinstance(each, OfflineModeIsEnabled) for each in _causes(error)) or "HF_HUB_OFFLINE" in str(error)


def _is_lost(error: BaseException) -> bool:
    """Whether the hub could not be reached."""
    return any(isinstance(each, ConnectionError) or "Connect" in type(each).__name__ for each in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
