"""The upload to the hub through huggingface_hub, whose token it takes from HF_TOKEN or `hf auth login`.

Every failure is one line. The token is neither printed nor written.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the client that it uses
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

from common.types import UserError


def check(name: str) -> str:
    """The full name, OWNER/NAME, of the repository that `name` means.

    Raises UserError for a name that the hub does not take, and for a token that it does not know.
    """
    with _one_line(name, "log in with `hf auth login` or set HF_TOKEN, and name OWNER/NAME"):
        api = HfApi()
        user = api.whoami()["name"]
        full = name if "/" in name else f"{user}/{name}"
        api.repo_exists(full)  # checks the form of the name
        return full


def push(folder: Path, name: str, message: str) -> str:
    """Upload the folder into the repository `name`, which is made if it is not there. Returns its address.

    A new repository has the visibility that its owner's settings give: public, unless an organisation says otherwise;
    an existing one keeps its own. Raises UserError.
    """
    api = HfApi()
    with _one_line(name, f"{folder} is complete; upload it later: hf upload {name} {folder}"):
        disable_progress_bars()  # they would bury a one-line error
        address = api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
        visibility = "private" if api.model_info(name).private else "public"
    return f"{address} ({visibility})"


@contextmanager
def _one_line(name: str, advice: str) -> Iterator[None]:
    try:
        yield
    # OSError: the hub's answers, files, no token; ValueError: names; RuntimeError: the upload of a file.
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise UserError(f"--push {name}: {_without_token(reason)}; {advice}") from None


def _without_token(text: str) -> str:
    """The transport quotes a header that it cannot send, and with it a malformed token."""
    token = get_token()
    for form in (token, repr(token)[1:-1]) if token else ():
        text = text.replace(form, "***")
    return text
