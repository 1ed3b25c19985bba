"""Where the time went: looks on while a pipeline works, and writes its report and its trace.

python examples/record_a_run.py models/SmolLM2-135M-Instruct
"""

import dataclasses
import sys
from pathlib import Path

from pipemax import LLM, SamplingParams
from pipemax.report.chrome_trace import write_chrome_trace
from pipemax.report.html_report import JobOutcome, write_html_report
from pipemax.report.manifest import run_manifest
from pipemax.report.recorder import StepRecorder

model = sys.argv[1] if len(sys.argv) > 1 else "models/SmolLM2-135M-Instruct"
settings = {"pipeline_parallel_size": 2, "max_model_len": 512, "num_device_blocks": 64, "num_window_blocks": 24}

with LLM(model, **settings) as llm:
    recorder = StepRecorder(capacity=llm.capacity)
    llm.observe(recorder)
    prompts = [f"Here are {number} facts about the sea:" for number in range(2, 18)]
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=48, ignore_eos=True))

run = recorder.snapshot()
for stage, use in enumerate(run.totals.stages):
    print(
        f"stage {stage}: {use.compute_seconds:.2f} s of {run.elapsed_seconds:.2f} s computing, "
        f"{use.window_wait_seconds:.2f} waiting for the window, {use.activation_wait_seconds:.2f} for input"
    )
print(f"{run.totals.home_blocks} KV blocks went home, {run.totals.refill_blocks} came back")

manifest = run_manifest(command=sys.argv, settings=settings, capacity=dataclasses.asdict(run.capacity))
outcome = JobOutcome(f"{len(prompts)} prompts with {llm.model_name}", len(prompts), len(prompts), 0)
write_html_report(Path("report.html"), run, outcome=outcome, manifest=manifest)
write_chrome_trace(Path("trace.json"), run, manifest=manifest)
print("report.html and trace.json (open it in ui.perfetto.dev)")
