"""Settings of one server: parsed once, frozen, strict. Neither torch nor vllm is imported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from vllm_dvlm.families import Family, family_named
from vllm_dvlm.option_checks import choice, integer, unknown
from vllm_dvlm.options import DenoiseParams, parse, setting
from vllm_dvlm.pruning.names import AT_LAYER

# Settings that may be null: what they mean then is worked out elsewhere.
_MAY_BE_ABSENT = (
    "default_canvas_length",
    "default_block_length",
    "default_max_steps",
    "max_image_tiles",
    "logits_chunk_bytes",
    "num_layers",
)


@dataclass(frozen=True)
class ServerSettings:
    """Settings of one server, from ``--additional-config '{"dvlm": {...}}'``.

    ``defaults`` holds values of request options for requests that do not set them; in the JSON they stand beside the
    other settings. ``num_layers``, ``architecture`` and what the family says of blocks and steps are filled in by the
    config hook.
    """

    defaults: DenoiseParams = DenoiseParams()
    max_canvas_length: int = setting(512, "largest canvas, suffix included, that a request may ask for", "≥ 1")
    default_canvas_length: int | None = setting(
        None,
        "canvas of requests that name neither a canvas nor `max_tokens`; default: the family's",
        "1 … `max_canvas_length`",
    )
    max_image_tiles: int | None = setting(None, "most tiles of one image; default: the checkpoint's grid", "≥ 1")
    trace_dir: str | None = setting(None, "folder for traces; without it `diffusion_trace` is refused", "path")
    logits_chunk_bytes: int | None = setting(
        None, "bound on vocabulary logits held at once; default: 8 to 32 MiB on a CPU, 256 MiB on a GPU", "≥ 1"
    )
    fastv_kv_groups: str = setting(
        "auto", "auto: with fastv as default method and an even split, late layers get their own KV group", "auto|one"
    )
    attention_whole: str = setting(
        "auto",
        "attention of steps whose keys are all their own tokens; auto: torch in float32 on a CPU, else vllm; xformers: "
        "GPUs only, not measured yet",
        "auto|vllm|xformers",
    )
    cpu_dtype: str = setting("float32", "dtype on a CPU host (a GPU follows `--dtype`)", "float32|bfloat16")
    num_layers: int | None = None
    architecture: str | None = None
    default_block_length: int | None = None
    default_max_steps: int | None = None

    @property
    def family(self) -> Family:
        """The model's; that of the first family as long as no model is known."""
        return family_named(self.architecture)

    @classmethod
    def from_additional_config(cls, additional_config: Mapping[str, Any] | None) -> ServerSettings:
        """Read the ``dvlm`` entry; ValueError with the remedy for anything unknown or ill-typed."""
        raw = (additional_config or {}).get("dvlm", {})
        if not isinstance(raw, Mapping):
            raise ValueError(f'additional-config "dvlm" must be an object of settings, not {type(raw).__name__}')
        own = {f.name for f in fields(cls)} - {"defaults"}
        known = cls.names()
        for key in raw:
            if key not in known:
                raise ValueError(unknown(key, known, "server setting"))
        settings = cls(defaults=parse({k: v for k, v in raw.items() if k not in own}))
        if settings.defaults.diffusion_stream != "committed":
            raise ValueError("diffusion_stream: what a stream shows is a request's choice; remove it from the settings")
        for key in own & set(raw):
            value = raw[key]
            if key in ("trace_dir", "architecture"):
                if value is not None and not isinstance(value, str):
                    raise ValueError(f"{key} must be {'a path' if key == 'trace_dir' else 'a name'}, not {value!r}")
            elif key == "fastv_kv_groups":
                choice(key, value, ("auto", "one"))
            elif key == "attention_whole":
                choice(key, value, ("auto", "vllm", "xformers"))
            elif key == "cpu_dtype":
                choice(key, value, ("float32", "bfloat16"))
            elif value is None and key in _MAY_BE_ABSENT:
                pass
            else:
                value = integer(key, value, minimum=1)
            settings = replace(settings, **{key: value})
        if (settings.default_canvas_length or 0) > settings.max_canvas_length:
            raise ValueError(
                f"default_canvas_length {settings.default_canvas_length} is larger than max_canvas_length "
                f"{settings.max_canvas_length}; lower the one or raise the other"
            )
        return settings

    @classmethod
    def names(cls) -> set[str]:
        """What the ``dvlm`` entry may say: settings, and options as defaults."""
        return {f.name for c in (cls, DenoiseParams) for f in fields(c)} - {"defaults"}

    def for_model(self, num_layers: int, family: Family) -> ServerSettings:
        """The settings with what the model says where they say nothing."""
        canvas = self.default_canvas_length or min(family.default_canvas_len, self.max_canvas_length)
        blocks: dict[str, Any] = {}
        if canvas == family.default_canvas_len:
            blocks = {"default_block_length": family.default_block_len, "default_max_steps": family.default_steps}
        return replace(
            self,
            num_layers=num_layers,
            architecture=family.architecture,
            default_canvas_length=canvas,
            **blocks,
        )

    def late_group_start(self) -> int | None:
        """Layers before the late KV cache group; None if all layers share one group.

        vLLM pads groups to the same number of layers unless they differ by less than half.
        """
        if self.num_layers is None or self.fastv_kv_groups == "one" or self.defaults.prune_method not in AT_LAYER:
            return None
        early = self.defaults.prune_layer or max(1, self.num_layers // 2)
        late = self.num_layers - early
        return early if min(early, late) > 0 and max(early, late) <= 1.5 * min(early, late) else None

    def to_mapping(self) -> dict[str, Any]:
        """Inverse of ``from_additional_config``, without the key ``dvlm``."""
        raw = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "defaults"}
        default = DenoiseParams()
        for f in fields(DenoiseParams):
            if getattr(self.defaults, f.name) != getattr(default, f.name):
                raw[f.name] = getattr(self.defaults, f.name)
        return raw

    def to_name(self) -> str:
        """Encode as an identifier suffix, for classes that any process rebuilds from their name alone."""
        return json.dumps(self.to_mapping(), sort_keys=True).encode().hex()

    @classmethod
    def from_name(cls, name: str) -> ServerSettings:
        """Inverse of ``to_name``."""
        return cls.from_additional_config({"dvlm": json.loads(bytes.fromhex(name).decode())})
