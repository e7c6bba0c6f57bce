"""Every pruning method at several keep ratios on the same questions: right answers, work and memory.

    python examples/compare_pruners.py [MODEL] [--num 50] [--keep 0.5 0.25 0.1] [--data questions.jsonl]

Without --data: questions about handwritten digits that the demo model (the default) never saw.
"""

import argparse
from pathlib import Path

from vllm import LLM, SamplingParams

from vllm_dvlm.bench.questions import load_items
from vllm_dvlm.pruning.names import METHODS

DEMO = Path(__file__).parent / "demo_model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", nargs="?", default=str(DEMO))
    parser.add_argument("--num", type=int, default=50)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25, 0.1])
    parser.add_argument("--data")
    parser.add_argument("--max-tokens", type=int, default=8)
    args = parser.parse_args()

    items, _ = load_items(args.data, args.num, seed=0)
    llm = LLM(args.model)
    settings = {"none": {}}
    for method in METHODS:
        for keep in args.keep:
            settings[f"{method} {keep:g}"] = {"prune_method": method, "prune_keep_ratio": keep}
    print(f"{'method':<16} {'right':>7} {'GFLOP':>7} {'KV blocks given back':>21}")
    for name, options in settings.items():
        chats = []
        for item in items:
            pictures = [{"type": "image_pil", "image_pil": picture} for picture in item.open_images()]
            chats.append([{"role": "user", "content": [*pictures, {"type": "text", "text": item.question}]}])
        params = SamplingParams(temperature=0, max_tokens=args.max_tokens, extra_args=options)
        outputs = llm.chat(chats, params, use_tqdm=False)
        replies = [output.outputs[0].text.strip() for output in outputs]
        right = sum(reply in item.answers for reply, item in zip(replies, items, strict=True)) / len(items)
        reports = [output.kv_transfer_params["dvlm"] for output in outputs]
        work = sum(report["flops"] for report in reports) / 1e9
        freed = sum(report.get("kv_blocks_freed", 0) for report in reports)
        print(f"{name:<16} {right:>7.1%} {work:>7.1f} {freed:>21}", flush=True)


if __name__ == "__main__":  # vLLM starts its engine in a process of its own
    main()
