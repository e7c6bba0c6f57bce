"""N1: every recorded run of the official code that the engine can do, token for token.

The recordings belong to the repository's tests: a folder such as tests/golden/llada_v, with cases.py beside it.
"""

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vllm import SamplingParams

from vllm_dvlm.bench.common import progress
from vllm_dvlm.synthetic import tiny_checkpoint

if TYPE_CHECKING:
    from vllm_dvlm.bench.engine_host import EngineHost, Request
    from vllm_dvlm.bench.result import Result

BATCH = 8
EOT_ID = 126348


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"dvlm_goldens_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up while the file runs.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def playable(cases: ModuleType, quick: bool) -> list[Any]:
    """Cases without guidance, pruning or a recorded defect; with `quick` only those of text prompts."""
    return [
        case
        for case in cases.all_cases()
        if case.mode in ("plain", "fast_dllm")
        and not case.is_informative
        and not case.uses_guidance
        and not (quick and case.image_records)
    ]


def case_request(cases: ModuleType, case: Any) -> "Request":
    """The recorded run as a request."""
    prompt: dict[str, Any] = {"prompt": cases.prompt_text(case)}
    if case.image_records:
        prompt["multi_modal_data"] = {"image": cases.images(case)}
    if case.image_aspect_ratio == "pad":
        prompt["mm_processor_kwargs"] = {"image_aspect_ratio": "pad"}
    extra_args = cases.extra_args(case)
    return prompt, SamplingParams(temperature=0, max_tokens=case.settings["gen_length"], extra_args=extra_args)


def case_tokens(case: Any) -> list[int]:
    """What the engine emits: it shows the stop token, which the recording leaves out."""
    return case.final_ids + ([EOT_ID] if case.stopped_at is not None else [])


def batches(group: list[Any]) -> list[list[Any]]:
    """Batches of BATCH, the last one filled up from the start of the group."""
    cycle = itertools.cycle(group)
    count = -(-len(group) // BATCH)
    return [list(itertools.islice(cycle, BATCH)) for _ in range(count)]


def measure_equality(host: "EngineHost", folder: Path, workdir: Path, quick: bool, result: "Result") -> None:
    """Run every case alone and in mixed batches; adds N1_token_equality, the share of equal runs.

    Cases of one checkpoint share a batch. The engine is not started anew: it takes the next checkpoint's weights.
    """
    cases = _load(folder.parent / "cases.py")
    groups: dict[tuple, list[Any]] = {}
    for case in playable(cases, quick):
        groups.setdefault(tuple(sorted(case.build_args.items())), []).append(case)
    num_runs, wrong = 0, []
    for build_args, group in progress(groups.items(), "N1"):
        host.use_weights(tiny_checkpoint.checkpoint(workdir, **dict(build_args)))
        for together in [[case] for case in group] + batches(group):
            run = host.run([case_request(cases, case) for case in together])
            num_runs += len(together)
            wrong += [
                f"{case.name} ({'alone' if len(together) == 1 else 'batch'})"
                for case, tokens in zip(together, run.token_ids, strict=True)
                if tokens != case_tokens(case)
            ]
    num_cases = sum(map(len, groups.values()))
    which = "text cases" if quick else "cases"
    setting = f"{num_cases} golden {which} on {len(groups)} checkpoints, alone and in mixed batches of {BATCH}"
    share = (num_runs - len(wrong)) / num_runs
    result.value("N1_token_equality", setting, share, "= 1", not wrong)
    result.figures["N1_num_runs"] = num_runs
    result.figures["N1_unequal"] = ", ".join(sorted(set(wrong))) or "none"
