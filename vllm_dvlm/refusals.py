"""Options that a model or a server cannot serve, each refused with the remedy. Neither torch nor vllm is imported."""

from __future__ import annotations

from vllm_dvlm.families import Family
from vllm_dvlm.options import DenoiseParams
from vllm_dvlm.settings import ServerSettings

# Rows that each built-in method takes; a method of a third party checks its own.
_ROWS_OF = {
    "none": (),
    "redvtp": ("masked", "committed", "response_prompt", "all"),
    "fastv": ("masked", "response_prompt", "all", "last"),
    "random": (),
    "uniform": (),
    "diversity": (),
}


def refuse_unsupported(opts: DenoiseParams, settings: ServerSettings) -> None:
    """ValueError for options that contradict each other, the model's family, or the server's settings."""
    if opts.diffusion_cfg_scale != 0:
        raise ValueError("diffusion_cfg_scale: classifier-free guidance is not supported yet; leave it at 0")
    _refuse_for_family(opts, settings.family)
    _refuse_pruning(opts, settings)
    if opts.diffusion_stream_every > 1 and opts.diffusion_stream != "provisional":
        raise ValueError("diffusion_stream_every belongs to diffusion_stream 'provisional'; remove it")
    if opts.diffusion_trace and settings.trace_dir is None:
        raise ValueError(
            "diffusion_trace: this server writes no traces; start it with "
            '--additional-config \'{"dvlm": {"trace_dir": "FOLDER"}}\' or leave diffusion_trace at 0'
        )


def _refuse_pruning(opts: DenoiseParams, settings: ServerSettings) -> None:
    if opts.prune_layer is not None:
        if opts.prune_method != "fastv":
            raise ValueError(f"prune_layer belongs to prune_method 'fastv', not {opts.prune_method!r}; remove it")
        if settings.num_layers is not None and opts.prune_layer >= settings.num_layers:
            raise ValueError(f"prune_layer must be from 1 to {settings.num_layers - 1}, not {opts.prune_layer}")
    check = _ROWS_OF.get(opts.prune_method)
    if opts.prune_rows is not None and check is not None and opts.prune_rows not in check:
        raise ValueError(
            f"prune_rows {opts.prune_rows!r} does not go with prune_method {opts.prune_method!r}; "
            f"use one of {', '.join(check) or 'none: remove it'}"
        )


def _refuse_for_family(opts: DenoiseParams, family: Family) -> None:
    if opts.diffusion_schedule not in family.schedules or (
        opts.diffusion_schedule_shift is not None and "shift" not in family.schedules
    ):
        names = " or ".join(map(repr, family.schedules))
        raise ValueError(f"diffusion_schedule: {family.name} has no other schedules; use {names}")
    if opts.diffusion_schedule_shift is not None and opts.diffusion_schedule != "shift":
        raise ValueError(
            "diffusion_schedule_shift belongs to diffusion_schedule 'shift', not "
            f"{opts.diffusion_schedule!r}; remove it"
        )
    if opts.diffusion_threshold is not None and (
        opts.diffusion_schedule != "uniform" or opts.diffusion_step_ratio is not None
    ):
        raise ValueError(
            "diffusion_threshold: the number of steps follows the confidence; leave out diffusion_schedule and "
            "diffusion_step_ratio"
        )
    if opts.diffusion_step_ratio is not None and not family.has_step_ratio:
        raise ValueError(f"diffusion_step_ratio: {family.name} has none; use diffusion_max_steps")
    if opts.diffusion_attention is not None and opts.diffusion_attention not in family.attentions:
        raise ValueError(
            f"diffusion_attention {opts.diffusion_attention!r}: {family.name} has only "
            f"{' and '.join(family.attentions)}; use one of these"
        )
    attention = opts.diffusion_attention or family.attentions[0]
    if attention == "prefix" and opts.diffusion_refresh_interval > 1:
        raise ValueError(
            "diffusion_refresh_interval: with diffusion_attention 'prefix' the prompt's KV is exact for the whole "
            "request; leave it at 1, or use 'full'"
        )
    if opts.diffusion_refresh_interval > 1 and family.shifts_logits:
        raise ValueError(
            f"diffusion_refresh_interval: the logits of {family.name} are shifted, so no canvas can be computed "
            "without its prompt; leave it at 1"
        )
    if opts.diffusion_threshold is not None and family.follows_time_grid:
        raise ValueError(f"diffusion_threshold: {family.name} follows a grid of time steps; use diffusion_max_steps")
    if opts.diffusion_top_k is not None and not family.has_top_k_top_p:
        raise ValueError(f"diffusion_top_k: {family.name} takes all tokens into account; remove it")
    if opts.diffusion_suffix and not family.has_suffix:
        raise ValueError(f"diffusion_suffix: {family.name} has none; remove it")
    if opts.diffusion_block_length is not None and not family.has_blocks:
        raise ValueError(f"diffusion_block_length: {family.name} decodes its canvas as one block; remove it")
