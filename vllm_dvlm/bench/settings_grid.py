"""Kinds of requests that `bench quality` and `bench frontier` compare, and their names. Light to import.

A name tells mode, method, layer, keep ratio in percent and positions, what is usual left out: `unpruned` (exact),
`redvtp_25`, `fastv_L2_50`, `redvtp_25_keep` (survivors keep their rotary positions), `refresh32_unpruned`,
`refresh32_threshold_random_50`, `full_redvtp_50` (another attention than the family's default).
"""

import dataclasses
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from vllm_dvlm.pruning.names import AT_LAYER, targets

KEEP_RATIOS = (0.75, 0.5, 0.25, 0.1)
BASE = "unpruned"  # name of the setting that everything is compared with


@dataclasses.dataclass(frozen=True)
class Mode:
    """How a request is decoded: refresh interval (1: exact), threshold factor (None: a fixed number of steps) and
    attention (None: the family's default)."""

    refresh: int = 1
    threshold: float | None = None
    attention: str | None = None

    @property
    def name(self) -> str:
        """Without the threshold's value, which is the same for a whole run."""
        parts = [self.attention] if self.attention else []
        parts += [f"refresh{self.refresh}"] * (self.refresh > 1) + ["threshold"] * (self.threshold is not None)
        return "_".join(parts) or "exact"


@dataclasses.dataclass(frozen=True)
class Setting:
    """One kind of request; method "none" goes with keep ratio 1."""

    mode: Mode
    method: str = "none"
    keep: float = 1.0
    layer: int | None = None
    positions: str = "renumber"

    @property
    def pruner(self) -> str:
        """Method and layer: what a line of a plot stands for."""
        return self.method if self.layer is None else f"{self.method}_L{self.layer}"

    @property
    def name(self) -> str:
        """See the module."""
        parts = [] if self.mode.name == "exact" else [self.mode.name]
        parts += [BASE] if self.method == "none" else [self.pruner, f"{self.keep * 100:g}"]
        return "_".join(parts + ["keep"] * (self.positions == "keep"))

    def options(self) -> dict[str, Any]:
        """Request options, canvas and steps excepted."""
        options: dict[str, Any] = {"diffusion_refresh_interval": self.mode.refresh, "prune_method": self.method}
        if self.mode.threshold is not None:
            options["diffusion_threshold"] = self.mode.threshold
        if self.mode.attention is not None:
            options["diffusion_attention"] = self.mode.attention
        if self.method != "none":
            options |= {"prune_keep_ratio": self.keep, "prune_positions": self.positions}
        if self.layer is not None:
            options["prune_layer"] = self.layer
        return options


def prune_layers(num_layers: int) -> tuple[int, ...]:
    """Layers after which fastv is tried: the first, half of them, three quarters of them."""
    return tuple(sorted({1, max(1, num_layers // 2), max(1, min(num_layers - 1, round(0.75 * num_layers)))}))


def modes(refreshes: Sequence[int], threshold: float, attentions: Sequence[str] = ("full",)) -> list[Mode]:
    """Every mode of a family with these attentions, its default first; KV of a prefix is never refreshed."""
    found = []
    for attention in attentions:
        intervals = [1] if attention == "prefix" else [1, *sorted(set(refreshes) - {1})]
        name = None if attention == attentions[0] else attention
        found += [Mode(refresh, factor, name) for factor in (None, threshold) for refresh in intervals]
    return found


def cached_mode(settings: Sequence["Setting"]) -> Mode:
    """The mode of a fixed number of steps that reads the KV of earlier steps most, in the family's own attention."""
    own = [s.mode for s in settings if s.mode.threshold is None and s.mode.attention is None]
    return max(own, key=lambda mode: mode.refresh)


def grid(
    layers: Sequence[int],
    refreshes: Sequence[int],
    threshold: float,
    ratios: Sequence[float] = KEEP_RATIOS,
    attentions: Sequence[str] = ("full",),
) -> list[Setting]:
    """Every mode with every method, keep ratio and kind of positions, fastv after each of `layers`.

    The base comes first. refreshes: refresh intervals besides 1. attentions: those of the family, its default first.
    """
    methods = [(name, layer) for name in targets() for layer in (layers if name in AT_LAYER else [None])]
    settings = []
    for mode in modes(refreshes, threshold, attentions):
        settings.append(Setting(mode))
        for positions in ("renumber", "keep"):
            for method, layer in methods:
                settings += [Setting(mode, method, keep, layer, positions) for keep in sorted(ratios, reverse=True)]
    return settings


def quality_default(settings: Sequence[Setting]) -> list[Setting]:
    """Of the whole grid: every mode unpruned; exact with every method, kept positions only for redvtp and the middle
    fastv; the longest refresh interval with redvtp (both kinds of positions) and random; thresholds and other
    attentions with redvtp."""
    longest = max(s.mode.refresh for s in settings)
    cached = cached_mode(settings)
    layers = sorted({s.layer for s in settings if s.layer is not None})
    middle = layers[len(layers) // 2] if layers else None

    def wanted(s: Setting) -> bool:
        if s.method == "none":
            return True
        if s.positions == "keep":
            if s.mode == Mode() and s.layer is not None:
                return s.layer == middle
            return s.method == "redvtp" and s.mode in (Mode(), cached)
        if s.mode == Mode():
            return True
        if s.mode.refresh not in (1, longest):
            return False
        return s.method == "redvtp" or (s.method == "random" and s.mode == cached)

    return [s for s in settings if wanted(s)]


def frontier_default(settings: Sequence[Setting]) -> list[Setting]:
    """Of the whole grid, renumbered: exact and the longest refresh interval with redvtp at every ratio, and fastv
    (middle and late), random, uniform and diversity at 0.5 and 0.25; with a threshold besides or another attention,
    only redvtp."""
    longest = max(s.mode.refresh for s in settings)
    cached = cached_mode(settings)
    layers = sorted({s.layer for s in settings if s.layer is not None})

    def wanted(s: Setting) -> bool:
        if s.positions == "keep" or s.mode.refresh not in (1, longest):
            return False
        if s.method == "none":
            return True
        few = s.keep in (0.5, 0.25)
        if s.mode.threshold is not None or s.mode.attention is not None:
            fast = dataclasses.replace(cached, threshold=s.mode.threshold)
            return few and s.method == "redvtp" and (s.mode == fast or s.mode == Mode(attention=s.mode.attention))
        if s.method == "redvtp":
            return True
        if s.mode.refresh > 1:
            return few and (s.method == "random" or (s.layer is not None and s.layer == layers[-1]))
        return few and (s.layer is None or s.layer != layers[0] or len(layers) == 1)

    return [s for s in settings if wanted(s)]


def choose(
    settings: Sequence[Setting], default: Sequence[Setting], patterns: Sequence[str] | None, always: Sequence[Setting]
) -> list[Setting]:
    """Settings of a run, in the order of the grid.

    patterns: shell patterns of names, or "all"; None for the default. `always` are added: what others are compared
    with. ValueError for a pattern that fits no name.
    """
    if patterns is None:
        return list(default)
    for pattern in patterns:
        if pattern != "all" and not any(fnmatchcase(s.name, pattern) for s in settings):
            raise ValueError(f"--settings {pattern!r} fits no setting; see --list-settings.")
    return [s for s in settings if s in always or "all" in patterns or any(fnmatchcase(s.name, p) for p in patterns)]
