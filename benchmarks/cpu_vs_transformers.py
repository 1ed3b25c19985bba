"""Output tokens per second on a CPU: `LLM.generate` against Transformers' `generate`, one by one and as a padded batch.

    python benchmarks/cpu_vs_transformers.py --model models/SmolLM2-135M-Instruct --json benchmarks/results/cpu.json

32 chat prompts, 64 greedy tokens each, float32, end tokens ignored, the same threads in total; all three in one run,
in turns, and the best of the repeats counts for each. Also checks that PipeMax gives the tokens of the one-by-one
run.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

from pipemax import LLM, SamplingParams

NUM_TOKENS = 64
TOPICS = ["the sea", "a bicycle", "tax law", "photosynthesis", "chess", "bread", "black holes", "a good night's sleep"]
ASKS = [
    "Tell me about {}.",
    "Write a short poem about {}, in simple words, for a child of seven who has never heard of it.",
    "List five facts about {} that most people get wrong, and for each of them say in one sentence why it is wrong.",
    (
        "I have to give a talk of ten minutes about {} next week in front of thirty colleagues who know nothing of it. "
        "Suggest an outline with an opening that wakes them up, three main points in a sensible order, one example for "
        "each of the points, and a closing line."
    ),
]
PROMPTS = [ask.format(topic) for topic in TOPICS for ask in ASKS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    ids = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    greedy = {"do_sample": False, "max_new_tokens": NUM_TOKENS, "min_new_tokens": NUM_TOKENS}

    def one_by_one(num_prompts: int) -> list[list[int]]:
        outputs = []
        for prompt in ids[:num_prompts]:
            prompt_1T = torch.tensor([prompt])
            output = model.generate(prompt_1T, attention_mask=torch.ones_like(prompt_1T), **greedy)
            outputs.append(output[0, len(prompt) :].tolist())
        return outputs

    def padded(num_prompts: int) -> list[list[int]]:
        chosen = ids[:num_prompts]
        longest = max(map(len, chosen))
        pad = tokenizer.pad_token_id
        padded_BT = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in chosen])
        mask_BT = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in chosen])
        return model.generate(padded_BT, attention_mask=mask_BT, **greedy)[:, longest:].tolist()

    def pipemax(llm: LLM, num_prompts: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, min_tokens=NUM_TOKENS)
        return [output.outputs[0].token_ids for output in llm.generate(ids[:num_prompts], params)]

    seconds: dict[str, list[float]] = {}
    tokens: dict[str, list[list[int]]] = {}
    settings = {"device": "cpu", "dtype": "float32", "max_model_len": 512}
    with (
        LLM(args.model, threads_per_stage=args.threads, **settings) as one_stage,
        LLM(
            args.model, pipeline_parallel_size=2, threads_per_stage=max(1, args.threads // 2), **settings
        ) as two_stages,
    ):
        runs: dict[str, Callable[[int], list[list[int]]]] = {
            "transformers generate, one by one": one_by_one,
            "transformers generate, padded batch": padded,
            "pipemax, 1 stage": lambda count: pipemax(one_stage, count),
            "pipemax, 2 stages": lambda count: pipemax(two_stages, count),
        }
        with torch.inference_mode():
            for run in runs.values():
                run(2)  # warms up
            for _ in range(args.repeats):
                for name, run in runs.items():
                    start = time.perf_counter()
                    tokens[name] = run(len(ids))
                    seconds.setdefault(name, []).append(time.perf_counter() - start)

    total = len(ids) * NUM_TOKENS
    rates = {name: total / min(values) for name, values in seconds.items()}
    one, reference = tokens["pipemax, 1 stage"], tokens["transformers generate, one by one"]
    same = sum(a == b for a, b in zip(one, reference, strict=True))
    for name, rate in rates.items():
        print(f"{name:40s} {rate:8.1f} tok/s   {rate / rates['transformers generate, one by one']:.2f}x")
    print(f"same tokens as one by one: {same} of {len(ids)} prompts")
    if args.json:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        result = {
            "command": " ".join(["python", *sys.argv]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit.stdout.strip(),
            "machine": {"processor": platform.processor() or platform.machine(), "threads": args.threads},
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "prompts": len(ids),
            "prompt_tokens": sum(map(len, ids)),
            "output_tokens_each": NUM_TOKENS,
            "output_tokens_per_second": rates,
            "seconds": seconds,
            "prompts_with_equal_tokens": same,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
