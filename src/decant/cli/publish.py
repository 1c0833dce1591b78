"""A finished student goes to the hub: its folder as it is, card included. A failure here costs nothing that is made."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token

from decant.errors import UserError, refuse
from decant.models.guard import first_line

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_ready(repository: str) -> None:
    """Refuse a push that cannot succeed, before the run that it would follow.

    Raises:
        UserError: the name is no ``owner/name``, there is no token, or the hub is switched off.
    """
    place = f"--push-to-hub {repository}"
    if not _REPOSITORY.fullmatch(repository) or ".." in repository or "--" in repository:
        raise refuse(place, "no repository", allowed="owner/name", hint="for example --push-to-hub you/bk-tiny")
    if constants.is_offline_mode():
        hint = "unset HF_HUB_OFFLINE, or leave --push-to-hub out and push later"
        raise refuse(place, "the hub is switched off", allowed="HF_HUB_OFFLINE unset", hint=hint)
    if get_token() is None:
        hint = "`hf auth login` once, or set HF_TOKEN to a token that may write"
        raise refuse(place, "no token", allowed="a token of the hub", hint=hint)


def push(folder: Path, repository: str) -> str:
    """Upload a pipeline folder into a private repository, made if need be; gives its address.

    Raises:
        UserError: the hub did not take it; the folder is as it was.
    """
    api: Any = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="A student made by decant")
    except UserError:
        raise
    # The hub's client raises errors of several libraries, and all of them mean the same to the user.
    except Exception as error:
        raise refuse(
            f"--push-to-hub {repository}",
            f"the hub did not take it: {first_line(error)}",
            allowed="a repository that your token may write to",
            hint=f"nothing is lost; the student is in {folder}: the same command pushes it again without making it "
            f"anew, and so does `hf upload {repository} {folder}`",
        ) from error
    return f"{api.endpoint}/{repository}"
