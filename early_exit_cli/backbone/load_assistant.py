"""Loading the assistant of a Gemma 4 model: from the Hub or a folder, found to fit the backbone before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from early_exit_cli.backbone.assistant import Assistant, Clusters
from early_exit_cli.backbone.auto_model import read_model
from early_exit_cli.backbone.backbone import Backbone
from early_exit_cli.backbone.contents import content_of, content_of_tensors
from early_exit_cli.backbone.families import ASSISTANTS
from early_exit_cli.backbone.load import files_behind, is_remote, quiet_libraries
from early_exit_cli.backbone.load_errors import load_error, require_all_weights
from early_exit_cli.backbone.quantization import saved_in, settings_for
from early_exit_cli.config import BackboneConfig, Quantization
from early_exit_cli.errors import BackboneError, UnsupportedBackboneError
from early_exit_cli.steps import step

EXAMPLE = "google/gemma-4-E2B-it-assistant"
CLUSTERS = "masked_embedding"
"""The modules that choose which rows of the LM head are read. They stay unquantized, as the LM head does."""


def refuse_other_assistant(name: str, backbone: Any, whose: str) -> None:
    """Refuse what is no assistant of a backbone, before any weight is read.

    Args:
        name: a folder, or a Hub id, which may end in @REVISION. backbone: configuration, transformers' own.
        whose: the backbone's name.

    Raises:
        BackboneError: not found, gated, offline or damaged.
        UnsupportedBackboneError: of another kind or family, or made for another backbone.
    """
    _fitting_settings(name, backbone, whose)


def load_assistant(name: str, backbone: Backbone) -> tuple[Assistant, Tensor]:
    """The assistant that a folder or Hub id holds, in the backbone's precision; and its LM head's weight, [vocab, hidden].

    Raises:
        BackboneError, UnsupportedBackboneError: as `refuse_other_assistant`; or its weights are not whole.
    """
    settings = _fitting_settings(name, backbone.config, backbone.name)
    source, revision = _located(name)
    to_download = is_remote(BackboneConfig(model_name=source, revision=revision))
    with step(f"downloading {name} from the Hub" if to_download else f"loading {name}", has_bars=to_download):
        model = _load(name, backbone, settings)
    files = files_behind(source, revision)
    content = (None if files is None else content_of(files)) or content_of_tensors(model)
    text, inner = settings.text_config, model.model
    assistant = Assistant(
        name,
        content,
        enter=model.pre_projection,
        blocks=inner.layers,
        norm=inner.norm,
        leave=model.post_projection,
        rotary=inner.rotary_emb,
        kinds=list(text.layer_types),
        window=int(text.sliding_window),
        clusters=_clusters_of(name, model),
    )
    return assistant, model.lm_head.weight


def _load(name: str, backbone: Backbone, settings: Any) -> Any:
    """transformers' model of an assistant."""
    source, revision = _located(name)
    asked = backbone.quantization if backbone.quantization in get_args(Quantization) else "4bit"
    saved = saved_in(name, settings, backbone.device, backbone.dtype)
    try:
        model, report = read_model(
            source,
            settings,
            backbone.dtype,
            backbone.device,
            revision=revision,
            quantization_config=settings_for(asked, backbone.dtype, (CLUSTERS,)) if saved is None else None,  # type: ignore[arg-type]
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # the library raises whatever a damaged file provokes
        raise load_error(name, source, revision, "weights", error, "assistant") from error
    require_all_weights(name, report)
    return model.eval().requires_grad_(False)


def _clusters_of(name: str, model: Any) -> Clusters | None:
    """Raises: BackboneError: they hold what is no token."""
    settings = model.config
    if not settings.use_ordered_embeddings:
        return None
    clusters = getattr(model, CLUSTERS)
    tokens = clusters.token_ordering.long()
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < len(model.lm_head.weight):
        raise BackboneError(f"{name} orders tokens that are not in its vocabulary", hint="copy or download it again")
    return Clusters(
        clusters.centroids, tokens.view(settings.num_centroids, -1), int(settings.centroid_intermediate_top_k)
    )


def _located(name: str) -> tuple[str, str | None]:
    """A folder or Hub id, and the revision of the latter."""
    path = Path(name).expanduser()
    if path.is_file():
        raise BackboneError(f"the assistant {name} is a file", hint="name the folder that holds its config.json")
    if path.is_dir():
        return str(path), None
    repo_id, _, revision = name.partition("@")
    return repo_id, revision or None


def _fitting_settings(name: str, backbone: Any, whose: str) -> Any:
    """An assistant's configuration, transformers' own, found to fit: `refuse_other_assistant`."""
    from transformers import AutoConfig

    quiet_libraries()
    source, revision = _located(name)
    try:
        settings = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as error:  # the library raises whatever a damaged config.json provokes
        raise load_error(name, source, revision, "configuration", error, "assistant") from error
    family = ASSISTANTS.get(settings.model_type)
    if family is None:
        raise UnsupportedBackboneError(
            f"{name} is no assistant of Gemma 4: it is of family {settings.model_type!r}",
            hint=f"--assistant takes such as {EXAMPLE}",
        )
    if family != backbone.model_type:
        raise UnsupportedBackboneError(
            f"the assistant {name} drafts for models of family {family!r}, and {whose} is of {backbone.model_type!r}",
            hint="--model-name names the model that it was made for",
        )
    faults = _misfits(settings, backbone)
    if faults:
        raise UnsupportedBackboneError(
            f"the assistant {name} does not fit {whose}: {'; '.join(faults)}",
            hint="each size of Gemma 4 has an assistant of its own",
        )
    return settings


def _misfits(settings: Any, backbone: Any) -> list[str]:
    """What of an assistant's configuration is not the backbone's, both values named."""
    text = settings.text_config
    if text is None:
        return ["its config.json describes no blocks"]
    found = []
    pairs = {
        "hidden size": (settings.backbone_hidden_size, backbone.hidden_size),
        "vocabulary": (text.vocab_size, backbone.vocab_size),
    }
    found += [
        f"it is made for a {name} of {theirs:,}, not {ours:,}"
        for name, (theirs, ours) in pairs.items()
        if theirs != ours
    ]
    kept = _key_shapes(backbone, len(backbone.layer_types) - backbone.num_kv_shared_layers)
    for kind, shape in _key_shapes(text, len(text.layer_types)).items():
        if kind not in kept:
            found.append(f"it reads keys of {kind} blocks, and the backbone keeps none")
        elif shape != kept[kind]:
            (heads, size), (our_heads, our_size) = shape, kept[kind]
            found.append(f"its {kind} blocks read {heads} key heads of {size}, not {our_heads} of {our_size}")
    if settings.use_ordered_embeddings and text.vocab_size % settings.num_centroids:
        found.append(f"its {settings.num_centroids:,} clusters do not divide the vocabulary")
    return found


def _key_shapes(config: Any, count: int) -> Mapping[str, tuple[int, int]]:
    """(heads, size) of the keys of the last block of each kind, of the first `count` blocks of a configuration."""
    blocks = list(zip(config.layer_types, config.per_layer_config, strict=True))[:count]
    return {kind: (int(block.num_key_value_heads), int(block.head_dim)) for kind, block in blocks}
