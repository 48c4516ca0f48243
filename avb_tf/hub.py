"""Trained models on the Hugging Face Hub, through huggingface_hub."""

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

    `keras.saving.load_model("hf://me/digits-avb_ac")` loads it too, where `avb_tf` is imported.
    Needs the extra [hub], and the login of `hf auth login` or the variable HF_TOKEN.

    Args:
      path: as of `load_model`; the card of a workdir has its config and its results.
      repository: "owner/name"; it is created where there is none.
      private: whether a repository created here is private.
    Returns:
      The address of the upload.
    Raises:
      UserError: there is no model, or the Hub refuses.
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
        except Exception as error:  # of the network, the account or the name
            raise _refused(repository, error) from error


def from_hub(repository: str, revision: str | None = None) -> AVB:
    """Downloads a model that `push_to_hub` uploaded.

        model = avb_tf.from_hub("me/digits-avb_ac")

    Args:
      repository: "owner/name".
      revision: branch, tag or commit; the newest by default.
    Raises:
      UserError: the Hub refuses, or the repository holds no model of this program.
    """
    hub = _huggingface_hub()
    try:
        folder = hub.snapshot_download(repository, revision=revision)
    except Exception as error:  # of the network, the account or the name
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
