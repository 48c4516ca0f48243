"""Uploads and downloads trained models on the Hugging Face Hub, by huggingface_hub."""

import importlib
import tempfile
from pathlib import Path
from typing import Any

from avb_tf import checkpoints, model_card
from avb_tf.errors import UserError
from avb_tf.model import AVB


def push_to_hub(path: str | Path, repository: str, private: bool = False) -> str:
    """Uploads a trained model and its model card.

        avb_tf.push_to_hub("runs/digits-avb_ac", "me/digits-avb_ac")

    After `import avb_tf`, `keras.saving.load_model("hf://me/digits-avb_ac")` also loads the upload.
    The function needs the extra [hub], and a login by `hf auth login` or the environment variable
    HF_TOKEN.

    Args:
      path: a path that `load_model` accepts. The card of a workdir includes its config and results.
      repository: "owner/name"; created if missing.
      private: whether a repository that this call creates is private.
    Returns:
      The address of the upload.
    Raises:
      UserError: there is no model at `path`, huggingface_hub is not installed, or the Hub refuses
        the upload.
    """
    hub = _huggingface_hub()
    model = checkpoints.load_model(path)
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder, zipped=False)
        card = checkpoints.card(model, Path(path), f"hf://{repository}")
        Path(folder, model_card.FILE).write_text(card)
        try:
            api = hub.HfApi(library_name="avb_tf")
            created = api.create_repo(repository, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=created.repo_id, folder_path=folder))
        except Exception as error:  # the network, the account or the name can be at fault
            raise _refused(repository, error) from error


def from_hub(repository: str, revision: str | None = None) -> AVB:
    """Downloads a model that `push_to_hub` uploaded.

        model = avb_tf.from_hub("me/digits-avb_ac")

    Args:
      repository: "owner/name".
      revision: branch, tag or commit; the newest commit of the default branch by default.
    Returns:
      The model, as `load_model` returns it.
    Raises:
      UserError: huggingface_hub is not installed, the Hub refuses the download, or the repository
        holds no model of this program.
    """
    hub = _huggingface_hub()
    try:
        folder = hub.snapshot_download(repository, revision=revision)
    except Exception as error:  # the network, the account or the name can be at fault
        raise _refused(repository, error) from error
    return checkpoints.load_model(folder)


def _huggingface_hub() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise UserError(
            'huggingface_hub is not installed; expected it; pip install "avb_tf[hub]"'
        ) from error


def _refused(repository: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(
        f"the Hub refuses '{repository}' ({reason:.200}); expected a repository that this account "
        "may use; check the name, the login and the network"
    )
