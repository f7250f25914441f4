"""Models by their id on the Hugging Face hub."""

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

_FILES = ["config.json", "generation_config.json", "model*.safetensors"]
_FILES += ["model.safetensors.index.json", "tokenizer*.json", "special_tokens_map.json"]
_FILES += ["chat_template.jinja"]


def fetch(repo: str) -> Path:
    """The folder of a model of the hub, downloaded into the hub's own cache if it is not there.

    Raises:
        ConnectionError: the hub cannot be reached, and the model is not in the cache.
        ValueError: the hub has no such model, or does not show it to this user.
    """
    try:
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=_FILES))
    except GatedRepoError as error:
        raise ValueError(
            f"{repo} is gated: accept its terms on the hub, then log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"there is no folder {repo!r}, and the hub shows no model of this id: check the "
            "spelling; if it is private, log in with `hf auth login`"
        ) from error
    except Exception as error:  # of its HTTP library, which differs from version to version
        raise ConnectionError(
            f"there is no folder {repo!r}, and the hub cannot be reached for a model of this id "
            f"({type(error).__name__}): give the path of a .gguf file or of a folder instead"
        ) from error
