"""Writes what `vllm-dvlm selftest` replays from the recordings in tests/golden: `python -m tests.selftest_goldens`."""

import json
import shutil
from pathlib import Path

from tests.golden import cases, lavida_cases
from vllm_dvlm.synthetic.lavida_files import DREAM

FOLDER = Path(__file__).parents[1] / "vllm_dvlm" / "tools" / "selftest"
EOT_ID = 126348
# Of one checkpoint: text, picture, cached with a threshold, cached with a suffix, pruned.
LLADA_V = ("a1_text_single_block", "c1_steps_lt_gen", "g8_fast_blocks_r4_thr1", "h3_suffix_fast", "f1_redvtp_keep25")
LAVIDA = ("text_full", "img_step_per_block", "redvtp_repaired_k50_allsteps")
LAVIDA_DREAM = ("dream_text_prefix_entropy", "dream_img_full_margin")


def _row(name, prompt, file, options, max_tokens, token_ids):
    image = None if file is None else Path(file).name
    return {
        "name": name,
        "prompt": prompt,
        "image": image,
        "max_tokens": max_tokens,
        "options": options,
        "token_ids": token_ids,
    }


def _llada_v(name):
    case = cases.load(name)
    assert case.build_args == {"seed": 0}
    file = next((f"llada_v_{record['file']}" for record in case.image_records), None)
    ids = case.final_ids + ([EOT_ID] if case.stopped_at is not None else [])
    return _row(name, cases.prompt_text(case), file, cases.extra_args(case), case.settings["gen_length"], ids)


def _lavida(name):
    case = lavida_cases.load(name)
    file = None if case.image_record is None else f"lavida_{Path(case.image_record['file']).name}"
    options = lavida_cases.extra_args(case)
    if case.kind is DREAM:
        options["diffusion_top_k"] = case.settings["top_k"] or 0
    return _row(name, case.prompt_text, file, options, case.settings["max_new_tokens"], case.final_ids)


def goldens():
    """Rows by checkpoint."""
    return {
        "llada_v": [_llada_v(name) for name in LLADA_V],
        "lavida-llada": [_lavida(name) for name in LAVIDA],
        "lavida-dream": [_lavida(name) for name in LAVIDA_DREAM],
    }


def text():
    """The file's contents."""
    return json.dumps(goldens(), indent=1, ensure_ascii=False) + "\n"


def sources():
    """Pictures of the rows: name in the package -> the recorded file."""
    found = {}
    for rows in goldens().values():
        for name in filter(None, (row["image"] for row in rows)):
            file = name.removeprefix("llada_v_").removeprefix("lavida_")
            folder = cases.IMAGE_FOLDER if name.startswith("llada_v_") else lavida_cases.FOLDER / "images"
            found[name] = folder / file
    return found


def main():
    (FOLDER / "goldens.json").write_text(text(), encoding="utf-8")
    for name, source in sources().items():
        shutil.copy(source, FOLDER / "images" / name)


if __name__ == "__main__":
    main()
