"""Ask a question about pictures offline, as a batch with and without pruning, and print what each answer cost.

    python examples/offline.py MODEL PICTURE... [--question "What is in this picture?"]

MODEL is a LLaDA-V or LaViDa folder, for example examples/demo_model.
"""

import argparse

from PIL import Image
from vllm import LLM, SamplingParams

RECIPES = {
    "exact": {},
    "RedVTP": {"prune_method": "redvtp", "prune_keep_ratio": 0.25},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("pictures", nargs="+")
    parser.add_argument("--question", default="What is in this picture?")
    parser.add_argument("--max-tokens", type=int, default=32)
    args = parser.parse_args()

    llm = LLM(args.model)
    chats, params, names = [], [], []
    for path in args.pictures:
        content = [
            {"type": "image_pil", "image_pil": Image.open(path)},
            {"type": "text", "text": args.question},
        ]
        for name, options in RECIPES.items():
            names.append(f"{path}, {name}")
            chats.append([{"role": "user", "content": content}])
            params.append(SamplingParams(temperature=0, max_tokens=args.max_tokens, extra_args=options))
    for name, output in zip(names, llm.chat(chats, params), strict=True):
        report = output.kv_transfer_params["dvlm"]
        freed = report.get("kv_blocks_freed", 0)
        print(f"{name}: {output.outputs[0].text.strip()!r}")
        print(f"    {report['denoise_steps']} steps, {report['flops'] / 1e9:.2f} GFLOP, {freed} KV blocks given back")


if __name__ == "__main__":  # vLLM starts its engine in a process of its own
    main()
