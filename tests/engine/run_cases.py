"""Run golden cases in an engine of their own and write down what came out; started by tests as a process.

    python -m tests.engine.run_cases CHECKPOINT OUT '{"engine": {...}, "cases": [...], "chat": NAME, "noisy": NAME}'

engine: arguments of ``LLM``. cases: recorded runs to repeat together. chat: one run from its question through the
chat template. noisy: one run with temperature and random remasking. OUT becomes a JSON object of
name -> {"tokens", "prompt_len", "finish_reason"}.
"""

import base64
import json
import sys
from pathlib import Path

from tests.golden import cases


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
    }


def main() -> None:
    from vllm import LLM, SamplingParams

    folder, out, job = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    llm = LLM(folder, **job["engine"])

    def params(case, options=None, **changes):
        extra_args = cases.extra_args(case) | (options or {})
        return SamplingParams(max_tokens=case.settings["gen_length"], extra_args=extra_args, **changes)

    names, prompts, settings = [], [], []
    for name in job["cases"]:
        case = cases.load(name)
        prompt = {"prompt": cases.prompt_text(case)}
        if case.image_records:
            prompt["multi_modal_data"] = {"image": cases.images(case)}
        names.append(name)
        prompts.append(prompt)
        settings.append(params(case, temperature=0))
    if "noisy" in job:
        case = cases.load(job["noisy"])
        names.append("noisy")
        prompts.append({"prompt": cases.prompt_text(case)})
        settings.append(params(case, {"diffusion_remasking": "random"}, temperature=0.8, seed=3))
    results = dict(zip(names, map(described, llm.generate(prompts, settings, use_tqdm=False)), strict=True))
    if "chat" in job:
        case = cases.load(job["chat"])
        results["chat"] = described(llm.chat(chat_message(case), params(case, temperature=0), use_tqdm=False)[0])
    out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
