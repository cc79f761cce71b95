"""``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` of the networks.

By ``PyTorchModelHubMixin`` of huggingface_hub where that is installed (``sr_kernels[hub]``); where
it is not, the networks are the same but for these three methods, which say so. A saved folder
holds ``config.json``, the network's arguments, and ``model.safetensors``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

__all__ = ["HubMixin"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"

try:
    from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
except ImportError as error:
    _reason = str(error)

    class HubMixin:
        """Says what is missing."""

        def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
            _refuse("save_pretrained")

        def push_to_hub(self, *_: Any, **__: Any) -> NoReturn:
            _refuse("push_to_hub")

        @classmethod
        def from_pretrained(cls, *_: Any, **__: Any) -> NoReturn:
            _refuse("from_pretrained")

    def _refuse(method: str) -> NoReturn:
        raise ImportError(
            f"{method} needs huggingface_hub ({_reason}): pip install 'sr_kernels[hub]'",
            name="huggingface_hub",
        )

else:

    class HubMixin(  # type: ignore[no-redef]
        PyTorchModelHubMixin,
        library_name="sr_kernels",
        pipeline_tag="image-to-image",
        tags=["super-resolution"],
    ):
        """huggingface_hub's mixin, with our files: strict, and no argument that is not the
        network's own (``backend`` belongs to a machine).

        A network has its arguments in ``config``.
        """

        if TYPE_CHECKING:
            config: dict[str, Any]

        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Any:
            """The network of a folder that ``save_pretrained`` has written, or of a repository of
            the Hugging Face Hub, in eval mode.

            Args:
                pretrained_model_name_or_path: the folder, or ``"user/name"``.
                options: ``map_location``, arguments of the network such as ``backend``, and those
                    of huggingface_hub for what is downloaded (``revision``, ``token``, ...).

            Raises:
                FileNotFoundError: no such folder, or a file of it is missing.
                CheckpointError: the files are damaged, or not those of such a network.
            """
            given = pretrained_model_name_or_path
            folder = Path(given).expanduser()
            # Anything but "user/name" can only be meant as a folder; huggingface_hub would ask its
            # server for it.
            looks_local = isinstance(given, Path) or given[:1] in "./~" or given.count("/") != 1
            if folder.is_dir():
                return super().from_pretrained(_checked_folder(folder), **options)
            if looks_local or folder.exists():
                what = "is a file; load_checkpoint reads those" if folder.exists() else "is absent"
                raise FileNotFoundError(f"{folder} {what}; expected a folder with {CONFIG}")
            return super().from_pretrained(given, **options)

        @classmethod
        def _from_pretrained(
            cls,
            *,
            model_id: str,
            revision: str | None,
            cache_dir: str | Path | None,
            force_download: bool,
            local_files_only: bool,
            token: str | bool | None,
            map_location: Any = "cpu",
            config: dict[str, Any] | None = None,
            **arguments: Any,
        ) -> Any:
            from .checkpoints import CheckpointError, checked_state, load_strictly, read

            if os.path.isdir(model_id):
                file = Path(model_id, WEIGHTS)
            else:
                downloaded = hf_hub_download(
                    model_id,
                    WEIGHTS,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
                file = Path(downloaded)
            kind = (config or {}).get("architecture")
            if kind != cls.__name__:
                raise CheckpointError(f"{model_id}: {CONFIG} is of {kind}, not of {cls.__name__}")
            try:
                model: Any = cls(**arguments)
            except (TypeError, ValueError, RuntimeError) as error:
                raise CheckpointError(
                    f"{model_id}: {CONFIG} describes no {cls.__name__}: {error}"
                ) from error
            state = checked_state(read(file), file)
            if hasattr(model, "fold") and not any(name.endswith(".D_diag") for name in state):
                model.fold()
            load_strictly(model, state, file)
            return model.eval().to(map_location)

        def _save_pretrained(self, save_directory: Path) -> None:
            from safetensors.torch import save_model

            config = {"architecture": type(self).__name__, **self.config}
            partial = save_directory / (WEIGHTS + ".part")
            save_model(self, str(partial))  # type: ignore[arg-type]
            os.replace(partial, save_directory / WEIGHTS)
            (save_directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")

    def _checked_folder(folder: Path) -> Path:
        """The folder, if its arguments can be read."""
        from .checkpoints import CheckpointError

        file = folder / CONFIG
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{file}: is damaged: {error}") from error
        if not isinstance(config, dict):
            raise CheckpointError(f"{file}: holds a {type(config).__name__}; expected an object")
        return folder
