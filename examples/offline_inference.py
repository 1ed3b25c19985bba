"""The Python API: text completion, chat, and answers as they finish, over two pipeline stages.

python examples/offline_inference.py models/SmolLM2-135M-Instruct
"""

import sys

from pipemax import LLM, SamplingParams
from pipemax.llm import GenerationRequest

model = sys.argv[1] if len(sys.argv) > 1 else "models/SmolLM2-135M-Instruct"

with LLM(model, pipeline_parallel_size=2, max_model_len=1024) as llm:
    # Completions: one list in, one list out, in the same order.
    prompts = ["The three primary colours are", "Water boils at", "def add(a, b):\n"]
    for prompt, output in zip(
        prompts, llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24)), strict=True
    ):
        print(f"{prompt!r} -> {output.outputs[0].text!r}")

    # Chat: conversations in OpenAI's message format, with the model's own chat template.
    conversation = [
        {"role": "system", "content": "You answer in one sentence."},
        {"role": "user", "content": "Why is the sky blue?"},
    ]
    (output,) = llm.chat(conversation, SamplingParams(temperature=0, max_tokens=60))
    print(output.outputs[0].text)

    # Stream: any number of requests, read only as far ahead as needed; answers come as they finish. A request that
    # cannot run comes back with `error` set, and the others go on.
    requests = (
        GenerationRequest(
            request_id=f"row-{number}",
            prompt="" if number == 3 else f"Here are {number} words that rhyme with 'light':",
            sampling_params=SamplingParams(temperature=0.8, seed=number, max_tokens=16 * number),
        )
        for number in range(1, 6)
    )
    for output in llm.stream(requests):
        text = f"refused: {output.error}" if output.error else repr(output.outputs[0].text)
        print(f"{output.request_id}: {text}")

    stats = llm.stats()
    print(f"{stats.output_tokens} tokens in {stats.steps} steps and {stats.elapsed_seconds:.1f} s")
