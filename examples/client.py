"""Ask a server about a picture and watch the canvas of mask tokens fill in.

bash examples/serve.sh                                   # in another terminal
python examples/client.py PICTURE "What is in this picture?" [--url http://localhost:8000]
"""

import argparse
import base64
from pathlib import Path

from openai import OpenAI

OPTIONS = {"prune_method": "redvtp", "prune_keep_ratio": 0.25, "diffusion_stream": "provisional"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("question")
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--max-tokens", type=int, default=32)
    args = parser.parse_args()

    client = OpenAI(base_url=f"{args.url}/v1", api_key="none")
    picture = base64.b64encode(args.picture.read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": args.question},
    ]
    answer, report = "", {}
    for chunk in client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": content}],
        max_tokens=args.max_tokens,
        temperature=0,
        stream=True,
        extra_body={"vllm_xargs": OPTIONS},
    ):
        report |= (chunk.model_extra or {}).get("kv_transfer_params", {})
        delta = chunk.choices[0].delta
        answer += delta.content or ""
        shown = (delta.model_extra or {}).get("diffusion", {})
        if shown.get("event") == "snapshot":
            print(f"step {shown['step']:>3}  {shown['text']!r}")
        elif shown.get("event") == "pruned":
            print(f"visual tokens {shown['visual_tokens']}, KV blocks given back: {shown['kv_blocks_freed']}")
    print(f"answer    {answer.strip()!r}")
    print(f"report    {report['dvlm']}")


if __name__ == "__main__":
    main()
