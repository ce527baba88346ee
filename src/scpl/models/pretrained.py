"""Classifiers of ``transformers``, from a folder or by their name on the hub.

Code that lies beside the weights is never run (no ``trust_remote_code``).
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scpl.errors import InputError, unknown_name
from scpl.outside import parse_json, read_text

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "CONFIG",
    "EMBEDDINGS",
    "PROCESSOR",
    "SENTENCE_LIMIT",
    "ImageSettings",
    "config_text",
    "describe",
    "embeddings_of",
    "image_settings",
    "inputs_of_texts",
    "is_pretrained",
    "load_pretrained",
    "rebuild",
]

CONFIG = "config.json"
PROCESSOR = "preprocessor_config.json"
EMBEDDINGS = "embeddings"
_SENTENCES = "sentence_bert_config.json"
SENTENCE_LIMIT = f"max_seq_length in {_SENTENCES}"
"""What says how many tokens of a text a network was trained on, though it has room for more."""
_AUTO = {
    "text": "AutoModelForSequenceClassification",
    "image": "AutoModelForImageClassification",
}
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "*.index.json")
_SHOWN = 4  # names in a note
_VOLATILE = ("_name_or_path", "transformers_version")
"""Keys of a configuration that say nothing of the network."""
_PROBLEMS = {
    "classes": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}
"""What ``transformers`` calls a task."""


def load_pretrained(
    name: str,
    kind: str,
    num_classes: int,
    arguments: Mapping[str, Any],
    tell: Callable[[str], None],
) -> nn.Module:
    """Load a classifier with a head for so many classes.

    What its files lack, and a head for other classes, is drawn from torch's global random state.
    A folder without weights gives a network of drawn weights.

    Args:
        name: A folder, or a name on the hub.
        kind: Of what it is a classifier: ``"text"`` or ``"image"``.
        num_classes: Number of logits.
        arguments: Settings of its configuration other than those of the files.
        tell: Takes what the user should know: which weights are new, which are left out.

    Raises:
        InputError: if it cannot be loaded, is of another kind, or its weights do not fit.
    """
    config = _read_config(name, arguments)
    auto = _auto(kind, config, name)
    config.num_labels = num_classes
    folder = Path(name).expanduser()
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        tell(f"{name} holds no weights: the network starts from drawn ones")
        with _plainly(name):
            return _float32(auto.from_config(config))
    with _plainly(name):
        network, info = auto.from_pretrained(
            _place(name),
            config=config,
            ignore_mismatched_sizes=True,  # checked below: of the head only
            output_loading_info=True,
            dtype="float32",  # files may hold another; what a run computes in is its own setting
            trust_remote_code=False,
        )
    _check_loaded(name, network, info, tell)
    return _float32(network)


def rebuild(description: Mapping[str, Any], kind: str) -> nn.Module:
    """Build the network that `describe` describes, with weights of no meaning.

    Raises:
        InputError: if the description is not one that ``transformers`` knows.
    """
    with _plainly("The configuration of the network"):
        config = _library().AutoConfig.for_model(**description)
        return _float32(_auto(kind, config, "the run").from_config(config))


def describe(network: nn.Module) -> dict[str, Any]:
    """Return the configuration of a network, as JSON values."""
    values = json.loads(network.config.to_json_string(use_diff=False))  # type: ignore[operator,union-attr]
    return {key: value for key, value in values.items() if key not in _VOLATILE}


def config_text(
    network: nn.Module, classes: Sequence[str], task: Mapping[str, Any] | None = None
) -> str:
    """Write ``config.json`` for a trained network.

    Args:
        network: The network.
        classes: Names of the outputs.
        task: What they mean, as JSON values (`scpl.tasks.Task.to_json`). Mean and deviation of
            standardised numbers are written as ``target_mean`` and ``target_std``.
    """
    task = task or {"kind": "classes"}
    config: Any = copy.deepcopy(network.config)
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: number for number, name in enumerate(classes)}
    config.problem_type = _PROBLEMS[task["kind"]]
    for name in ("mean", "std"):
        if task.get(name):
            setattr(config, f"target_{name}", list(task[name]))
    config.architectures = [type(network).__name__]
    return str(config.to_json_string())


def is_pretrained(network: nn.Module) -> bool:
    """Whether a network is one of ``transformers``."""
    import sys

    library: Any = sys.modules.get("transformers")  # else it cannot be one
    return library is not None and isinstance(network, library.PreTrainedModel)


def embeddings_of(network: Any) -> nn.Module:
    """Return the layer that makes vectors of what a network of ``transformers`` reads.

    With positions and normalisation where they are of one layer (BERT, ViT); else that of tokens.
    """
    whole: nn.Module | None = getattr(network.base_model, EMBEDDINGS, None)
    return network.get_input_embeddings() if whole is None else whole


def inputs_of_texts(name: str) -> tuple[set[str], dict[str, int]]:
    """Say what a classifier of texts takes.

    Returns:
        The names of its arguments; and how many tokens of a text it reads at most, by the settings
        of its files that say so.
    """
    config = _read_config(name, {})
    network: Any = _auto("text", config, name)._model_mapping[type(config)]
    found = {
        "max_position_embeddings": getattr(config, "max_position_embeddings", None),
        SENTENCE_LIMIT: _sentence_limit(name),
    }
    limits = {key: most for key, most in found.items() if isinstance(most, int) and most > 0}
    return set(inspect.signature(network.forward).parameters), limits


def _sentence_limit(name: str) -> int | None:
    """How many tokens a checkpoint of ``sentence-transformers`` was trained on."""
    try:
        with _plainly(name):
            path = _library().utils.cached_file(_place(name), _SENTENCES)
        values = parse_json(read_text(Path(path)))
        most = values.get("max_seq_length")
    except (InputError, ValueError, AttributeError):
        return None  # others have no such file
    return most if isinstance(most, int) else None


@dataclass(frozen=True)
class ImageSettings:
    """How a classifier wants its images; None where its files do not say.

    Attributes:
        channels: 1 or 3.
        size: Height and width in pixels.
        mean: What is subtracted from each channel of pixels in 0..1.
        std: What each channel is divided by then.
        text: The file that says so, for a run folder.
    """

    channels: int
    size: int | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    text: str = ""


def image_settings(name: str) -> ImageSettings:
    """Read the size and the normalisation of a classifier's images from its processor's file.

    Raises:
        InputError: if its images are not square, or its pixels are not scaled to 0..1 first.
    """
    library = _library()
    config = _read_config(name, {})
    _auto("image", config, name)
    channels = int(getattr(config, "num_channels", 3))
    side = getattr(config, "image_size", None)
    try:
        with _plainly(name):
            mixin: Any = library.image_processing_utils.BaseImageProcessor
            values, _ = mixin.get_image_processor_dict(_place(name))
    except InputError:
        values = {}
    if not values:
        return ImageSettings(channels, _square(side, name), None, None)
    if not values.get("do_rescale", True):
        raise InputError(
            f"{PROCESSOR} of {name} must scale pixels to 0..1",
            "Got do_rescale false",
            "Set it to true, with mean and std to match",
        )
    size = values.get("crop_size") if values.get("do_center_crop") else values.get("size")
    # The default scale is 1/255; another one goes into mean and std.
    scale = 255 * float(values.get("rescale_factor", 1 / 255))
    plain = values.get("do_normalize", True)
    mean = values.get("image_mean") if plain else [0.0] * channels
    std = values.get("image_std") if plain else [1.0] * channels
    if mean is None or std is None:
        return ImageSettings(channels, _square(size or side, name), None, None)
    return ImageSettings(
        channels,
        _square(size or side, name),
        tuple(float(value) / scale for value in mean),
        tuple(float(value) / scale for value in std),
        json.dumps(values, indent=2, sort_keys=True) + "\n",
    )


def _square(size: Any, name: str) -> int | None:
    if isinstance(size, Mapping):
        sides = {size[key] for key in ("height", "width", "shortest_edge") if key in size}
    elif isinstance(size, (list, tuple)):
        sides = set(size)
    else:
        return None if size is None else int(size)
    if len(sides) != 1:
        raise InputError(
            "A network must take square images to be trained here", f"{name} takes {size}"
        )
    return int(sides.pop())


def _check_loaded(name: str, network: Any, info: Any, tell: Callable[[str], None]) -> None:
    """Check that the files are of this network, and say what of it is new."""
    base = f"{network.base_model_prefix}."
    wrong = sorted(key for key, *_ in info["mismatched_keys"] if key.startswith(base))
    if wrong:
        raise InputError(
            f"The weights of {name} must fit its {CONFIG}, but for the classifier's",
            f"Others in size: {_few(wrong)}",
            "Leave settings that change its layers out of `model_args`",
        )
    new = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if not set(network.state_dict()) - set(new):
        raise InputError(
            f"The weights of {name} must be those of a {type(network).__name__}",
            f"None of its {len(new)} is there",
        )
    if new:
        tell(f"New weights, which {name} has not or has for other classes: {_few(new)}")
    if info["unexpected_keys"]:
        tell(f"Left out, for no part of the classifier: {_few(sorted(info['unexpected_keys']))}")


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _float32(network: Any) -> nn.Module:
    """Bring a network to float32, and have its configuration say so, for whoever loads it next."""
    import torch

    result: nn.Module = network.float()
    network.config.dtype = torch.float32
    return result


def _read_config(name: str, arguments: Mapping[str, Any]) -> Any:
    with _plainly(name):
        config = _library().AutoConfig.from_pretrained(_place(name), trust_remote_code=False)
    for key, value in arguments.items():
        if not hasattr(config, key):
            known = [each for each in config.to_dict() if each[0] != "_"]
            raise unknown_name(f"A setting of {name}", key, known)
        setattr(config, key, value)
    return config


def _auto(kind: str, config: Any, name: str) -> Any:
    auto = getattr(_library(), _AUTO[kind])
    if type(config) not in auto._model_mapping:
        other = "image" if kind == "text" else "text"
        fits = type(config) in getattr(_library(), _AUTO[other])._model_mapping
        raise InputError(
            f"For {kind}s the network must be one that {_AUTO[kind]} knows",
            f"{name} is a {config.model_type}" + (f", a network for {other}s" if fits else ""),
            "Choose another network, or other data",
        )
    return auto


def _place(name: str) -> str:
    folder = Path(name).expanduser()
    return str(folder) if folder.is_dir() else name


@contextmanager
def _plainly(name: str) -> Iterator[None]:
    """Turn what ``transformers`` raises into one sentence, and keep it from talking meanwhile."""
    logger = logging.getLogger("transformers")
    level, bars = logger.level, _library().utils.logging
    shown = bars.is_progress_bar_enabled()
    logger.setLevel(logging.CRITICAL)
    bars.disable_progress_bar()
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        folder = Path(name).expanduser().is_dir()
        raise InputError(
            f"{name} must be {'a folder' if folder else 'a folder here, or a name on the hub,'} "
            "that transformers can load",
            f"It raised {type(error).__name__}: {lines[0][:300] if lines else 'no message'}",
            "" if folder else "Check the name; without a network, give the path of a folder",
        ) from error
    finally:
        logger.setLevel(level)
        if shown:
            bars.enable_progress_bar()


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            "Networks named hf:... need the package 'transformers'",
            f"It cannot be imported: {error}",
            "Install it with: pip install 'scpl[transformers]'",
        ) from error
    return transformers
