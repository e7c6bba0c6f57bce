"""Run golden cases in an engine of their own and write down what came out; started by tests as a process.

    python -m tests.engine.run_cases CHECKPOINT OUT '{"engine": {...}, "cases": [...], "chat": NAME, "noisy": NAME}'

engine: arguments of ``LLM``. cases: recorded runs to repeat together. changed: name -> [recorded run, its other
options, sampling parameters if any], in the same batch. noisy: one run with temperature and random remasking, there
too. chat: one run from its question through the chat template. OUT becomes a JSON object of name -> {"tokens",
"prompt_len", "finish_reason", "request_id"}.
"""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.golden import cases

ROOT = Path(__file__).parents[2]
ENGINE = {"max_model_len": 4096, "max_num_seqs": 8, "limit_mm_per_prompt": {"image": 1}}
# For what does not depend on the engine core being a process of its own: half of the start-up.
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
NOISE = {"temperature": 0.8, "seed": 3}
NOISY_OPTIONS = {"diffusion_remasking": "random"}


def run(model, out, environment=None, python=sys.executable, root=ROOT, **job):
    """What a process of its own wrote to ``out``; no environment variable of vLLM is set there.

    model: folder or hub name. environment: variables for the process. python, root: of another installation, and where
    it finds the tests. job: see the module.
    """
    job["engine"] = ENGINE | job["engine"]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    done = subprocess.run(
        [str(python), "-m", "tests.engine.run_cases", str(model), str(out), json.dumps(job)],
        cwd=root,
        env=inherited | (environment or {}),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(out.read_text())


def assert_recorded(results, *names):
    """The named runs gave the recorded tokens."""
    for name in names:
        case, result = cases.load(name), dict(results[name])
        result.pop("request_id")
        assert result == {
            "tokens": case.final_ids,
            "prompt_len": case.prompt_len,
            "finish_reason": "length",
        }, name


def chat_message(case):
    """The user's turn in OpenAI's form, images first."""
    parts = []
    for record in case.image_records:
        data = base64.b64encode((cases.IMAGE_FOLDER / record["file"]).read_bytes()).decode()
        parts.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
    parts.append({"type": "text", "text": cases.question(case).removeprefix("<image>\n")})
    return [{"role": "user", "content": parts}]


def described(output):
    (completion,) = output.outputs
    return {
        "tokens": list(completion.token_ids),
        "prompt_len": len(output.prompt_token_ids),
        "finish_reason": completion.finish_reason,
        "request_id": output.request_id,
    }


def main() -> None:
    from vllm import LLM, SamplingParams

    folder, out, job = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    llm = LLM(folder, **job["engine"])

    def params(case, options=None, **changes):
        extra_args = cases.extra_args(case) | (options or {})
        return SamplingParams(max_tokens=case.settings["gen_length"], extra_args=extra_args, **changes)

    work = {name: (name, {}, {"temperature": 0}) for name in job["cases"]}
    for name, (of, options, *more) in job.get("changed", {}).items():
        work[name] = (of, options, {"temperature": 0} | (more[0] if more else {}))
    if "noisy" in job:
        work["noisy"] = (job["noisy"], NOISY_OPTIONS, NOISE)
    prompts, settings = [], []
    for name, options, changes in work.values():
        case = cases.load(name)
        prompt = {"prompt": cases.prompt_text(case)}
        if case.image_records:
            prompt["multi_modal_data"] = {"image": cases.images(case)}
        prompts.append(prompt)
        settings.append(params(case, options, **changes))
    results = dict(zip(work, map(described, llm.generate(prompts, settings, use_tqdm=False)), strict=True))
    if "chat" in job:
        case = cases.load(job["chat"])
        results["chat"] = described(llm.chat(chat_message(case), params(case, temperature=0), use_tqdm=False)[0])
    out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
