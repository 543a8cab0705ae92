"""Models on the Hugging Face hub, named hf://ORG/NAME or hf://ORG/NAME@REVISION (a branch, tag or commit).

folder = local("hf://OpenNLPLab/TransNormerLLM-385M")     # in the hub's cache; what is not a hub name stays a path
push(Path("385m-hf"), "my-org/385m", private=False)       # returns the address of the new commit

HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE hold as everywhere. What is in the cache is used where the hub does not
answer; nothing here is imported or asked before such a name is given.
"""

import re
from pathlib import Path
from typing import Any

from tnllm.errors import RunError, UserError
from tnllm.files import LOCK
from tnllm.progress import log

# A model folder of any layout; weights as pickles only where there are no others.
_FILES = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.py", "*.txt", "*.md", "*.jinja", "SHA256SUMS"]
_PICKLES = [*_FILES, "*.bin"]
# pathlib makes one slash of two.
_NAME = re.compile(r"hf:/{1,2}(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^\s@]+))?/?")


def is_hub_name(given: Path | str) -> bool:
    """Whether `given` names a model on the hub rather than a folder here."""
    return str(given).lower().startswith("hf:/")


def repo_name(given: Path | str) -> str:
    """ORG/NAME of a hub name."""
    return _parse(given)[0]


def local(given: Path | str) -> Path:
    """The folder on this machine: that of a hub name, downloaded if need be; a path as it is.

    Raises UserError for a name, revision or permission that does not exist, RunError where the network or the disk fails.
    """
    if not is_hub_name(given):
        return Path(given)
    from huggingface_hub import constants, snapshot_download

    repo, revision = _parse(given)
    offline = constants.HF_HUB_OFFLINE
    if not offline and not answers(constants.ENDPOINT):
        log(f"{constants.ENDPOINT} does not answer: reading its cache on this machine only")
        offline = True
    for patterns in (_FILES, _PICKLES):
        try:
            folder = snapshot_download(
                repo, revision=revision, allow_patterns=patterns, local_files_only=offline, endpoint=constants.ENDPOINT
            )
        except Exception as error:  # the hub's client and its network libraries share no base class
            raise _explained(error, f"hf://{repo}" + (f"@{revision}" if revision else "")) from None
        if any(Path(folder).glob("*.safetensors")):
            break
    return Path(folder)


def check_push(repo: str) -> None:
    """Raise UserError, before any work, for a name or a token with which `push` would fail."""
    from huggingface_hub import HfApi

    _parse(f"hf://{repo}")
    try:
        HfApi().whoami()
    except Exception as error:  # as above
        raise _explained(error, f"hf://{repo}") from None


def push(folder: Path, repo: str, private: bool) -> str:
    """Upload a folder as one commit to the hub's model `repo`, made if need be; returns the commit's address."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, ignore_patterns=[LOCK], commit_message=f"Upload {folder.name} with tnllm"
        )
    except Exception as error:  # as above
        raise _explained(
            error, f"hf://{repo}", f"{folder} is complete; upload it with: hf upload {repo} {folder}"
        ) from None
    return str(commit.commit_url)


def answers(url: str, wait_s: float = 5.0) -> bool:
    """Whether the hub, or a proxy, answers anything within `wait_s` seconds: its client would retry for half a minute."""
    # Imported here, since commands import this module before they know that they need it.
    import ssl
    import threading
    import urllib.error
    import urllib.request

    answered: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=wait_s).close()
            answered.append(True)
        except urllib.error.HTTPError:
            answered.append(True)
        except OSError as error:
            # Other libraries may trust certificates that urllib does not.
            answered.append(isinstance(getattr(error, "reason", None), ssl.SSLError))

    # Name resolution has no timeout, so a thread does it.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(wait_s)
    return any(answered)


def _parse(given: Path | str) -> tuple[str, str | None]:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    match = _NAME.fullmatch(str(given))
    try:
        if match is None:
            raise HFValidationError("")
        validate_repo_id(match["repo"])
    except HFValidationError:
        raise UserError(
            f"{str(given)!r} is no name of a model on the hub; give hf://ORG/NAME or hf://ORG/NAME@REVISION"
        ) from None
    return match["repo"], match["revision"]


def _explained(error: Exception, name: str, advice: str = "") -> Exception:
    """One line for a failure of the hub's client: UserError where another name or token helps, else RunError."""
    from huggingface_hub import constants, errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    line = " ".join(str(error).split())[:200].rstrip(".")
    kind: Any = UserError
    if isinstance(error, errors.LocalTokenNotFoundError) or status == 401:
        text = (
            f"{name}: no such model, or no right to it; if it is private, log in with `hf auth login` or set HF_TOKEN"
        )
    elif isinstance(error, errors.GatedRepoError) or status == 403:
        text = f"{name}: your token has no right to it; ask for access on its page, or use another token"
    elif isinstance(error, errors.RevisionNotFoundError):
        text = f"{name}: no such branch, tag or commit"
    elif isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        text = f"{name}: no such model on {constants.ENDPOINT}"
    elif isinstance(error, errors.LocalEntryNotFoundError):
        kind = RunError
        text = f"{name} is not in the cache on this machine, and {constants.ENDPOINT} was not asked or did not answer"
        advice = advice or f"where there is a network: hf download {name.removeprefix('hf://').partition('@')[0]}"
    else:
        kind, text = RunError, f"{name}: {type(error).__name__}: {line}"
    return kind(f"{text}; {advice}" if advice else text)
