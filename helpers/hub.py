"""Uploads to the Hugging Face Hub, always under the name of the user who is logged in."""

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError


class NotLoggedIn(RuntimeError):
    """No usable token was found. Nothing has been uploaded; the message says what to do."""


def own_repository(name: str) -> str:
    """`user/<last part of name>` for the user who is logged in.

    Raises NotLoggedIn, before anything is sent, without a token or with one the Hub refuses.
    """
    if huggingface_hub.get_token() is None:
        raise NotLoggedIn(
            "no Hugging Face token was found and nothing was uploaded: run `hf auth login` first"
        )
    try:
        user = huggingface_hub.whoami()["name"]
    except (HfHubHTTPError, OSError) as error:
        raise NotLoggedIn(
            f"the Hub did not accept the login ({type(error).__name__}) and nothing was uploaded: "
            "check the network, or run `hf auth login` again"
        ) from error
    return f"{user}/{name.split('/')[-1]}"
