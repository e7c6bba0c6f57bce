"""Recorded LaViDa runs as requests, and a process of its own that repeats some: started by tests.

    python -m tests.engine.run_lavida CHECKPOINT OUT '{"engine": {...}, "cases": [...]}'

OUT becomes a JSON object of name -> token ids.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.golden import lavida_cases as cases
from vllm_dvlm.synthetic.lavida_files import DREAM

ROOT = Path(__file__).parents[2]


def request_of(case, **changes):
    from vllm import SamplingParams

    prompt = {"prompt": case.prompt_text}
    if case.image_record is not None:
        prompt["multi_modal_data"] = {"image": cases.image(case)}
    if ratio := case.config_overrides.get("image_aspect_ratio"):
        prompt["mm_processor_kwargs"] = {"image_aspect_ratio": ratio}
    options = cases.extra_args(case) | {"diffusion_trace": 1} | changes.pop("extra_args", {})
    if case.kind is DREAM:
        options["diffusion_top_k"] = case.settings["top_k"] or 0
    values = {"temperature": 0, "max_tokens": case.settings["max_new_tokens"], "ignore_eos": True} | changes
    return prompt, SamplingParams(extra_args=options, **values)


def run(model, out, engine, names):
    """Token ids by name, from a process of its own; no environment variable of vLLM is set there."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    job = json.dumps({"engine": engine, "cases": names})
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.run_lavida", str(model), str(out), job],
        cwd=ROOT,
        env=inherited,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(out.read_text())


def main() -> None:
    from vllm import LLM

    folder, out, job = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    llm = LLM(folder, max_model_len=4096, max_num_seqs=8, **job["engine"])
    work = [request_of(cases.load(name), extra_args={"diffusion_trace": 0}) for name in job["cases"]]
    outputs = llm.generate([prompt for prompt, _ in work], [params for _, params in work], use_tqdm=False)
    found = {name: list(output.outputs[0].token_ids) for name, output in zip(job["cases"], outputs, strict=True)}
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
